"""Sa2VA: ask in words about an image or a video, get words and masks.

Importing this package registers `model_type: sa2va_chat` with transformers' Auto classes, so that
`AutoModel.from_pretrained("ByteDance/Sa2VA-4B")` runs this code, whatever code the checkpoint itself points to.
"""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from .configuration_sa2va import Sa2VAChatConfig, Sa2VAChatConfigQwen, Sa2VAGroundingConfig, Sa2VAVisionConfig
from .modeling_sa2va import Sa2VAChatModel, Sa2VAChatModelQwen, Sa2VAFrame, Sa2VAOutput, Sa2VAStream
from .processing_sa2va import Sa2VAProcessor, Sa2VAProcessorQwen
from .sam2_decoder import Sam2Decoder

__version__ = "0.1.0"

AutoConfig.register(Sa2VAChatConfig.model_type, Sa2VAChatConfig, exist_ok=True)
for _auto_class in (AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM):
    _auto_class.register(Sa2VAChatConfig, Sa2VAChatModel, exist_ok=True)
    _auto_class.register(Sa2VAChatConfigQwen, Sa2VAChatModelQwen, exist_ok=True)
AutoProcessor.register(Sa2VAChatConfig, Sa2VAProcessor, exist_ok=True)
AutoProcessor.register(Sa2VAChatConfigQwen, Sa2VAProcessorQwen, exist_ok=True)

__all__ = [
    "Sa2VAChatConfig",
    "Sa2VAChatConfigQwen",
    "Sa2VAChatModel",
    "Sa2VAChatModelQwen",
    "Sa2VAFrame",
    "Sa2VAGroundingConfig",
    "Sa2VAOutput",
    "Sa2VAProcessor",
    "Sa2VAProcessorQwen",
    "Sa2VAStream",
    "Sa2VAVisionConfig",
    "Sam2Decoder",
]

"""Sa2VA: a vision-language model and SAM 2, joined by the token `[SEG]` (arXiv 2501.04001).

* backbones      InternViT (transformers' InternVL) + projector, any causal language model, SAM 2 (`sam2_decoder`)
* `forward`      losses: text, and masks of every `[SEG]` (`Sa2VATrainingOutput`)
* `generate`     tokens from pictures and words
* `predict_forward`, `predict_batch`, `predict_stream`   from a user's image or video and question to text and masks

The language model writes text; the state of every `[SEG]` it writes goes through `text_hidden_fcs` and prompts SAM 2.
Checkpoints keep the released module and key names; the fused layouts of InternViT and InternLM2 are converted when
loading and saving.
"""

import copy
import inspect
import itertools
import json
import math
import os
import re
import shlex
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import partial
from numbers import Integral, Real
from operator import index as as_index
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BitsAndBytesConfig,
    Cache,
    CompileConfig,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    InternVLVisionConfig,
    InternVLVisionModel,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    StaticCache,
)
from transformers import __version__ as transformers_version
from transformers.conversion_mapping import get_model_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.core_model_loading import Chunk, ConversionOps, WeightConverter, WeightRenaming, WeightTransform
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import _add_variant
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.quantizers import AutoQuantizationConfig
from transformers.utils import (
    ADAPTER_CONFIG_NAME,
    CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    WEIGHTS_INDEX_NAME,
    WEIGHTS_NAME,
    ModelOutput,
    cached_file,
    has_file,
    logging,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from .configuration_sa2va import (
    PROMPT_DECODER,
    Sa2VAChatConfig,
    Sa2VAChatConfigQwen,
    Sa2VAInternLM2Config,
    Sa2VAVisionConfig,
    blaming,
    blaming_config,
    by_own_names,
    hub_arguments_in,
    read_index,
    reading_weights,
)
from .processing_sa2va import (
    IMAGE_TOKEN,
    REGION_END,
    REGION_START,
    SEG_TOKEN,
    ReadAhead,
    Sa2VAInputs,
    Sa2VAProcessor,
    check_area,
    coco_masks,
    collate_inputs,
    find_token,
    masks_to_rle,
    open_video,
    prepare_samples,
    replacing_files,
)
from .sam2_decoder import MaskPrediction, Sam2Decoder, Sam2Model, TrackingState, WideLayerNorm2d, in_batches

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity holds for it

IGNORE_INDEX = -100
_INTEGERS = (torch.int64, torch.int32)  # what embeddings and tensors can be indexed with
_NO_PIXELS = "The text shows a picture, or regions of one, but there are no pixel_values. Use the processor's."
_OF_PROCESSOR = "Build both with the processor, from the same picture."
_MOST_BEAMS = 1000  # more than anybody searches with; far more take all memory there is
_MOST_BEAM_TOKENS = 10**7  # beams times tokens, for all of which beam search sets room aside
_ABSURDLY_LONG = 4  # times the longest text that a language model was made for; attention takes memory by its square
_MOST_TABLED = 3 * 10**8  # numbers in tables that are not stored but made anew; of GPT-Neo's layers 10**8
_MOST_ABSENT = 2 * 10**9  # parameters that a checkpoint may lack; SAM 2 and a vision tower are 0.5 * 10**9
OUTPUT_FORMATS = ("numpy", "torch", "rle")
MASK_SIZES = ("first", "own")
# transformers 5.24 gave the key-value cache of every model a new name.
_CACHE = "cache" if "cache" in inspect.signature(LlamaForCausalLM.forward).parameters else "past_key_values"
# Bytes of activations that encoding a frame of 1024 x 1024 is reckoned to take: twice what float32 took on a CPU.
_ENCODING_MEMORY = 2**30
_MOST_ENCODED = 8
_MOST_MASK_PIXELS = 2**25  # of masks that are resized at a time; logits, probabilities and masks of each are 9 bytes
_MOST_ON_THEIR_WAY = 8  # frames whose masks go to the host while a GPU works on
_PROCESSOR_LOADING = threading.Lock()
_ADAPTER_PREFIX = "base_model.model."
_FULL_PRECISION = (  # modules that no quantization touches, of both families
    *("vision_model", "mlp1", "language_model.lm_head"),
    *("model.model.visual", "model.lm_head"),
    *("text_hidden_fcs", "grounding_encoder"),
)
_SKIP_LISTS = ("llm_int8_skip_modules", "modules_to_not_convert", "skip_modules")  # as the backends' configs name them
_ROWS_PACKED = 32  # of a 4-bit weight, by bitsandbytes on a CPU
_BLIND_TO_PADDING = {  # settings of `generate` that look neither at the tokens of a prompt nor at other rows
    *("max_new_tokens", "min_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("num_beams", "length_penalty", "early_stopping", "num_return_sequences", "use_cache", "stop_strings"),
    *("eos_token_id", "pad_token_id", "bos_token_id", "return_dict_in_generate", "output_scores", "output_logits"),
    *("output_attentions", "output_hidden_states", "transformers_version", "_from_model_config"),
    *("cache_implementation", "max_cache_len", "compile_config", "disable_compile"),
}
_MAX_NEW_TOKENS = 2048  # of the released code
_PICTURES_IN_PARTS = (5, 23)  # the transformers since which `generate` can read a prompt with pictures in parts
_SAVED_SETTINGS = {  # of generation_config.json: type, least and most
    "max_new_tokens": (int, 1, 10**6),
    "do_sample": (bool, False, True),
    "temperature": (int | float, 0.01, 100),
    "top_k": (int, 0, 10**6),
    "top_p": (int | float, 0, 1),
    "min_p": (int | float, 0, 1),
    "repetition_penalty": (int | float, 0.01, 100),
    "no_repeat_ngram_size": (int, 0, 1000),
    "num_beams": (int, 1, 100),
    "length_penalty": (int | float, -100, 100),
}
_MADE_HERE = {  # what the language model reads, which `predict_*` prepare by themselves
    *("input_ids", "inputs", "inputs_embeds", "attention_mask", "position_ids", "mm_token_type_ids"),
    *("pixel_values", "image_grid_thw", "prompt_masks", "prompt_mask_tiles", "labels", "is_assistant"),
}
_FOR_LOSSES = ("labels", "grounding_pixel_values", "mask_labels")  # arguments of `forward` alone
_REFUSED_SETTINGS = {  # arguments of transformers' `generate`: the only value they may have, and why
    "guidance_scale": (1, "needs a prompt without its picture, which is not made here"),
    "negative_prompt_ids": (None, "goes with guidance_scale, which needs a prompt without its picture"),
    "assistant_early_exit": (None, "needs a model of words alone, and would change this one"),
}
_SETTING_RANGES = {"max_time": (0, math.inf)}  # least and most
_SAMPLING_RANGES = {  # transformers overlooks them unless it samples
    "temperature": (1e-20, 1e20),  # logits beyond are infinite or all alike
    **dict.fromkeys(("top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"), (0, 1)),
}


def _are(kind: Any, values: Any) -> bool:
    return isinstance(values, list | tuple | set) and all(isinstance(value, kind) for value in values)


_SETTING_KINDS = {  # arguments of transformers' `generate`: what they must be, and whether they are
    **dict.fromkeys(("logits_processor", "stopping_criteria"), ("a list of functions", partial(_are, Callable))),
    "streamer": ("an object with the methods put and end, as a TextStreamer has", lambda value: hasattr(value, "put")),
    "stop_strings": (
        "a string or a list of them, none of them empty",
        lambda value: value != "" and (isinstance(value, str) or (_are(str, value) and "" not in value)),
    ),
    "watermarking_config": (
        "a WatermarkingConfig",
        lambda value: isinstance(value, dict) or hasattr(value, "construct_processor"),
    ),
    "exponential_decay_length_penalty": (
        "two numbers: the token it begins with, and its factor",
        lambda value: _are(Real, value) and len(value) == 2,
    ),
    **dict.fromkeys(("past_key_values", "cache"), ("a Cache", lambda value: isinstance(value, Cache))),
}
_COMPILE_OPTIONS = {  # of `torch.compile`, and their types
    "fullgraph": bool,
    "dynamic": bool | None,
    "backend": str | Callable,
    "mode": str | None,
    "options": dict | None,
}


@dataclass
class Sa2VAOutput(ModelOutput):
    """Answer to one question.

    Attributes:
        prediction: the answer with its special tokens, as released: `Sure, it is [SEG].<|im_end|>`.
        prediction_masks: one entry per `[SEG]`, `[]` if none: np.bool_ [frames, h, w] at the user's size (an image has
            one frame); float32 probabilities with `return_raw_masks`; tensors or COCO RLE dicts by `output_format`.
        past_text: the whole conversation; pass it back as `past_text` to ask on.
        phrases: the words each `[SEG]` belongs to: its `<p>` phrase, else its sentence.
        mask_scores: for each `[SEG]` a dict of float32 arrays [frames] in 0..1: "iou", the IoU SAM 2 expects of its
            mask, and "object", the probability that the object is in the frame.
        mask_logits: float32 [frames, h, w] for each `[SEG]`; only with `return_mask_logits`.
        sample_idx: numbers of the key frames that the language model saw; [0] for an image, [] for text alone.
        problems: what could not be read of a damaged video file, in words; [] for a whole one, None without a video.
    """

    prediction: str | None = None
    prediction_masks: list | None = None
    past_text: str | None = None
    phrases: list[str] | None = None
    mask_scores: list[dict[str, Any]] | None = None
    mask_logits: list | None = None
    sample_idx: list[int] | None = None
    problems: list[str] | None = None


@dataclass
class Sa2VAFrame(ModelOutput):
    """One frame of `predict_stream`.

    Attributes:
        frame_index: 0-based.
        prediction, past_text, phrases: as in `Sa2VAOutput`, the same for all frames of a call.
        masks: np.bool_ [objects, h, w] (float32 probabilities, tensors or a list of RLE by the call's options).
        mask_scores: dict of float32 arrays [objects]: "iou" and "object".
    """

    frame_index: int | None = None
    prediction: str | None = None
    past_text: str | None = None
    phrases: list[str] | None = None
    masks: Any = None
    mask_scores: dict[str, Any] | None = None


@dataclass
class Sa2VATrainingOutput(ModelOutput):
    """What `forward` returns.

    Attributes:
        loss: weighted sum of the parts that the inputs allow; None without `labels` and `mask_labels`.
        lm_loss, mask_loss, dice_loss, iou_loss, object_score_loss: the parts, unweighted; None where not asked for.
        logits: [B, L, vocab].
        pred_masks: for each sample float32 logits [objects, frames, S/4, S/4]; None without `grounding_pixel_values`.
        seg_hidden_states: [M, hidden], the `[SEG]` states of the answers, in batch order.
        image_hidden_states: [tiles, tokens, hidden], the projected image features.
        hidden_states: [B, L, hidden] of each layer; only with `output_hidden_states`.
        attentions: [B, heads, L, L] of each layer; only with `output_attentions`, which only the attention
            implementation "eager" computes.
    """

    loss: Tensor | None = None
    lm_loss: Tensor | None = None
    mask_loss: Tensor | None = None
    dice_loss: Tensor | None = None
    iou_loss: Tensor | None = None
    object_score_loss: Tensor | None = None
    logits: Tensor | None = None
    pred_masks: list[Tensor] | None = None
    seg_hidden_states: Tensor | None = None
    image_hidden_states: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


class SpecialTokenIds(NamedTuple):
    """Ids of the tokens that carry pictures and masks."""

    image: int
    seg: int
    region_start: int
    region_end: int

    @classmethod
    def of(cls, tokenizer) -> "SpecialTokenIds":
        """Looks the tokens up.

        Raises:
            ValueError: the tokenizer lacks one, so it is not a Sa2VA tokenizer.
        """
        tokens = (IMAGE_TOKEN, SEG_TOKEN, REGION_START, REGION_END)
        ids = [find_token(tokenizer, token) for token in tokens]
        missing = [token for token, i in zip(tokens, ids, strict=True) if i is None]
        if missing:
            raise ValueError(f"The tokenizer lacks {missing}. Pass the tokenizer that came with the checkpoint.")
        return cls(*ids)


class TextStates(NamedTuple):
    """One reading of texts: the model's output, the states [B, L, hidden] `[SEG]` is taken from, image features."""

    text: ModelOutput
    seg_states: Tensor
    image_hidden_states: Tensor | None


class Answer(NamedTuple):
    """What the language model made of a question: words, and a vector [N, D] that prompts SAM 2 for each `[SEG]`."""

    prediction: str
    past_text: str
    phrases: list[str]
    prompts: Tensor


@dataclass
class _Progress:
    """How far a stream is: the answer, once it is written, and what the frames to come depend on."""

    tracking: TrackingState
    problems: list[str]
    size: tuple[int, int] | None = None
    answer: Answer | None = None

    @classmethod
    def none(cls) -> "_Progress":
        """That of a stream before its first frame."""
        return cls(TrackingState(), [])


class Sa2VAStream(Generator):
    """What `predict_stream` returns: a generator of `Sa2VAFrame`, which can be stopped and gone on with.

    `close()` frees all it holds; so does leaving a `with` block, or letting go of it.
    """

    def __init__(self, frames: Generator[Sa2VAFrame, None, None], progress: _Progress, grounding: dict[str, int]):
        self._frames = frames
        self._progress = progress
        self._grounding = grounding

    def __enter__(self) -> "Sa2VAStream":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def send(self, value: None) -> Sa2VAFrame:
        """Part of a generator's protocol; use `next` or a loop."""
        return self._frames.send(value)

    def throw(self, *error) -> Sa2VAFrame:
        """Part of a generator's protocol."""
        return self._frames.throw(*error)

    def close(self) -> None:
        """Stops reading and frees the memory of the video; `state` can't be called any more."""
        self._frames.close()
        self._progress = _Progress.none()

    @property
    def problems(self) -> list[str]:
        """What could not be read of a damaged video file so far, in words."""
        return list(self._progress.problems)

    def state(self) -> dict[str, Tensor]:
        """Everything the frames after the last one depend on, for `predict_stream(video=..., resume=state)`.

        Returns:
            Tensors on the CPU by name, which `torch.save` and safetensors' `save_file` write as they are. Their size is
            bounded: of tracked frames they hold the last `num_maskmem` - 1 maps and `max_object_pointers` - 1 pointers;
            besides, predictions of frames before the first key frame that were not handed out yet.

        Raises:
            ValueError: no frame has come yet, or the stream was closed.
        """
        progress = self._progress
        if progress.answer is None or not progress.tracking.next_frame:
            raise ValueError("There is no state before the first frame and after close(). Take it in between.")
        words = {name: getattr(progress.answer, name) for name in ("prediction", "past_text", "phrases")}
        description = json.dumps({"size": progress.size, "model": self._grounding, **words}).encode()
        return {
            "description": torch.frombuffer(bytearray(description), dtype=torch.uint8),
            "prompts": progress.answer.prompts.clone().cpu(),
            **progress.tracking.to_tensors(),
        }


class Sa2VAVisionModel(InternVLVisionModel):
    """transformers' InternViT under a name of its own, so that the layout rules below hold only inside Sa2VA."""

    def __init__(self, config: InternVLVisionConfig):
        super().__init__(config)
        for layer in self.encoder.layer:
            for norm in (layer.attention.q_norm, layer.attention.k_norm):
                norm.variance_epsilon = config.layer_norm_eps  # transformers has a constant there


class Sa2VAInternLM2RotaryEmbedding(LlamaRotaryEmbedding):
    """Rotary positions whose base grows with a text longer than `max_position_embeddings` (dynamic NTK).

    Llama's keep the greatest length they met, so that a long text would change the answers that follow it.
    """

    def forward(self, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines [B, L, head_dim], in the dtype of `x`, for int64 [B, L]."""
        if self.rope_type != "dynamic":
            return super().forward(x, position_ids)
        length = position_ids.max().float() + 1  # a tensor: nothing waits for its value, and compiled graphs stay whole
        frequencies, _ = ROPE_INIT_FUNCTIONS["dynamic"](self.config, x.device, seq_len=length)
        angles = position_ids[..., None].float() * frequencies.repeat(2)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


class Sa2VAInternLM2ForCausalLM(LlamaForCausalLM):
    """InternLM2 is Llama; the layout rules below, which this name stands for, read and write its checkpoints."""

    config_class = Sa2VAInternLM2Config

    def __init__(self, config: Sa2VAInternLM2Config):
        super().__init__(config)
        self.model.rotary_emb = Sa2VAInternLM2RotaryEmbedding(config)


def _register_layout(class_name: str) -> None:
    """Has transformers rename what the released checkpoints call otherwise than `sam2` does, in models of a class."""
    register_checkpoint_conversion_mapping(class_name, [WeightRenaming("g_weight", "gamma")], overwrite=True)


class Sa2VAChatModel(PreTrainedModel, GenerationMixin):
    """Chat, referring segmentation and grounded captions on images and videos.

    Module names are the released ones: `vision_model`, `mlp1`, `language_model`, `text_hidden_fcs`,
    `grounding_encoder.sam2_model`.

    Attributes:
        generation_config: `GenerationConfig` of `predict_*` and `generate` where a call says nothing else: greedy, at
            most 2048 new tokens, as released, unless generation_config.json was saved with other settings. The
            template's end marks are added to its own.
    """

    config_class = Sa2VAChatConfig
    config: Sa2VAChatConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    input_modalities = ("image", "video", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVLVisionEmbeddings", "InternVLVisionLayer", "Sam2Decoder"]
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _keep_in_fp32_modules_strict = ["pe_layer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init_subclass__(cls, **kwargs):
        """Has a subclass read and write checkpoints by the layout rules of this class, which go by names."""
        super().__init_subclass__(**kwargs)
        _register_layout(cls.__name__)

    def __init__(self, config: Sa2VAChatConfig):
        super().__init__(config)
        with blaming_config():
            self._build_language_side(config)
            self.grounding_encoder = Sam2Decoder(config.grounding_config)
        hidden_size = config.get_text_config().hidden_size
        self.text_hidden_fcs = nn.Sequential(
            nn.Linear(hidden_size, hidden_size),
            nn.ReLU(inplace=True),
            nn.Linear(hidden_size, config.grounding_config.d_model),
            nn.Dropout(0.0),
        )
        self.generation_config = GenerationConfig(max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
        self._processor: Sa2VAProcessor | None = None
        self._lacks_processor = False  # whether reading the checkpoint's own has failed
        self._hub_arguments: dict[str, Any] = {}
        self._folder: str | None = None  # where the checkpoint lay, whatever becomes of the working directory
        self.post_init()
        kinds = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = kinds.intersection(self._no_split_modules)  # FSDP wants no others
        self._weight_conversions = _released_layout(self)

    def __getstate__(self) -> dict[str, Any]:
        """What a pickle or copy holds: all but a token of the Hub."""
        shown = {name: value for name, value in self._hub_arguments.items() if name != "token"}
        return {**self.__dict__, "_hub_arguments": shown}

    def __new__(cls, config: Sa2VAChatConfig | None = None, *args, **kwargs):
        is_qwen = cls is Sa2VAChatModel and getattr(config, "is_qwen_vl", False)
        return super().__new__(Sa2VAChatModelQwen if is_qwen else cls)

    def _build_language_side(self, config: Sa2VAChatConfig) -> None:
        """What reads pictures and words: InternViT, projector, language model."""
        hidden_size = config.llm_config.hidden_size
        vision_width = config.vision_config.hidden_size * round(1 / config.downsample_ratio) ** 2
        self.vision_model = Sa2VAVisionModel._from_config(_internvl_config(config.vision_config))
        self.language_model = _language_model(config.llm_config)
        self.get_decoder().register_forward_hook(_note_output)
        self.mlp1 = nn.Sequential(
            nn.LayerNorm(vision_width),
            nn.Linear(vision_width, hidden_size),
            nn.GELU(),
            nn.Linear(hidden_size, hidden_size),
        )

    @property
    def causal_model(self) -> nn.Module:
        """The part that writes: it has `generate`, `lm_head` and the text loss."""
        return self.language_model

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """transformers' `from_pretrained`, which also takes what users of the released code pass.

        `use_flash_attn` and `low_cpu_mem_usage` have no effect here: attention follows `attn_implementation`, and
        loading never needs the weights twice. `torch_dtype`, `load_in_8bit` and `load_in_4bit` are translated. A
        `quantization_config` quantizes the layers of the language model only, as if its skip list named all else. Its
        skip list, and a `device_map` that is a dictionary, may name modules as the released code does.

        Raises:
            OSError: no such checkpoint, its weights or their index are damaged, the index names files elsewhere, or the
                weights are pickles (`.bin`), which are never read.
            ValueError: config.json describes no model that can be built, or another than the weights are of.
        """
        source = _base_of(pretrained_model_name_or_path)
        _refuse_pickles(source, kwargs)
        _check_index(source, kwargs)
        # None: safetensors first, and on the Hub True would have transformers ask a service for a conversion.
        kwargs["use_safetensors"] = os.path.isdir(source or "") or None
        kwargs.pop("use_flash_attn", None)
        kwargs.pop("low_cpu_mem_usage", None)
        for bits in ("load_in_8bit", "load_in_4bit"):
            if kwargs.pop(bits, False):
                kwargs.setdefault("quantization_config", BitsAndBytesConfig(**{bits: True}))
        if "torch_dtype" in kwargs:
            kwargs.setdefault("dtype", kwargs.pop("torch_dtype"))
        if isinstance(kwargs.get("dtype"), str):
            kwargs["dtype"] = kwargs["dtype"].removeprefix("torch.")
        chosen = kwargs.get("dtype") is not None
        hub_arguments = hub_arguments_in(kwargs)
        if isinstance(kwargs.get("device_map"), dict) or kwargs.get("quantization_config") is not None:
            names = ModuleNames.of_checkpoint(source, kwargs.get("config"), hub_arguments)
            kwargs |= _with_native_names(names, kwargs)
        wants_report = kwargs.pop("output_loading_info", False)
        load = partial(_load, super().from_pretrained, pretrained_model_name_or_path, *model_args)
        model, report = load(**kwargs)
        if any(PROMPT_DECODER in key for key in report["unexpected_keys"]):
            # Sa2VA-i in a place where its weight names could not be read beforehand: a subfolder, a variant, a cache.
            config = _as_sa2va_i(model.config)
            del model  # there may not be room for two
            model, report = load(**{**kwargs, "config": config})
        _check_encoder(report, pretrained_model_name_or_path)
        model._hub_arguments = hub_arguments
        for folder in (source, pretrained_model_name_or_path):  # an adapter may have brought a processor of its own
            if os.path.isdir(folder or "") and (folder == source or Path(folder, PROCESSOR_NAME).is_file()):
                model._folder = os.path.abspath(folder)
        if getattr(model, "hf_quantizer", None) is None:  # which has rules of its own
            model._weight_conversions = _released_layout(model)
        _pack_what_fits(model)
        _separate(model)
        _tell_places(model)
        if not chosen and model.device.type == "cpu" and model.dtype in (torch.bfloat16, torch.float16):
            logger.warning_once(
                f"Loaded in {model.dtype}, the dtype of the checkpoint. On a CPU float32 is several times faster for "
                "SAM 2: pass dtype=torch.float32, or device_map to use an accelerator."
            )
        return (model, report) if wants_report else model

    def adjust_generation_fn(self, generation_config: GenerationConfig | None, *args, **kwargs) -> None:
        """transformers' step that reads generation_config.json, unless settings are given.

        Raises:
            ValueError: the file holds something else.
        """
        with blaming_config():
            super().adjust_generation_fn(generation_config, *args, **kwargs)
        if generation_config is None:
            self.generation_config = _saved_settings(self.generation_config)

    def _move_missing_keys_from_meta_to_device(self, missing_keys, *args, **kwargs) -> None:
        """transformers' step that allocates what a checkpoint lacks: weights to be drawn at random, tables to be made.

        Raises:
            ValueError: that is most of a large model, or far more than tables take, so that its config.json is not to
                be believed.
        """
        tabled = sum(buffer.numel() for _, buffer in self.named_non_persistent_buffers())
        if tabled > _MOST_TABLED:
            raise ValueError(
                f"The config.json asks for tables of {tabled:.1e} numbers, such as one of all positions; up to "
                f"{_MOST_TABLED:.0e} are made. Is max_position_embeddings right?"
            )
        lacking = set(missing_keys) - self.all_tied_weights_keys.keys()
        count = sum(self.get_parameter_or_buffer(name).numel() for name in lacking)
        if count > _MOST_ABSENT:
            raise ValueError(
                f"The checkpoint lacks {len(lacking)} tensors of {count:.1e} numbers that its config.json asks for; up "
                f"to {_MOST_ABSENT:.0e} are drawn at random. Is a file missing, or is config.json of another model?"
            )
        super()._move_missing_keys_from_meta_to_device(missing_keys, *args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args) -> None:
        """torch's step of `load_state_dict`, which so takes the layout that `save_pretrained` writes, too.

        transformers' `Trainer` goes on from a checkpoint by it. Parts of a sharded model take the layout in use only.
        """
        own = {prefix + name for name, _ in (*self.named_parameters(), *self.named_buffers())}
        if others := [key for key in state_dict if key.startswith(prefix) and key not in own]:
            modules = ModuleNames(self)
            for key in others:
                parts = modules.native_tensors(key.removeprefix(prefix), state_dict.pop(key), self.config)
                state_dict.update({prefix + name: part for name, part in parts.items()})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def save_pretrained(self, save_directory, *args, **kwargs) -> None:
        """transformers' `save_pretrained`: in the released layout, quantized models in that of transformers.

        Quantized weights can't be fused as the official code wants them, nor would it know what to do with them. This
        code is saved, too: the folder loads with `trust_remote_code`. Where an older checkpoint is replaced, it stays
        whole until the new one is; see `replacing_files`. A subclass comes with its own code if it was registered, by
        `register_for_auto_class`.

        Raises:
            NotADirectoryError: `save_directory` is a file.
            ValueError: PEFT has wrapped layers of the model, which is not whole without it.
        """
        if not getattr(self, "_hf_peft_config_loaded", False) and kwargs.get("state_dict") is None:
            _refuse_wrapped_layers(self)
        if getattr(self, "hf_quantizer", None) is not None:
            kwargs.setdefault("save_original_format", False)
        if kwargs.get("distributed_checkpoint"):  # in which every process writes its part
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if kwargs.get("push_to_hub"):
            kwargs.setdefault("repo_id", Path(save_directory).name)
        with replacing_files(save_directory) as temporary:
            super().save_pretrained(temporary, *args, **kwargs)
            if self._auto_class is not None and type(self).__module__ != __name__:
                _name_class(temporary / CONFIG_NAME, type(self))

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | None = None,
    ) -> str:
        """transformers' `push_to_hub`, of a whole repository: code, processor and model card beside the weights.

        See `hub_upload.push_checkpoint`. Adapters and quantized models go transformers' own way.

        Returns:
            Address of the commit or pull request.

        Raises:
            OSError: no token, no permission, no connection, no space, or `repo_id` holds something else.
            ValueError: the model has no processor.
        """
        message = commit_message or "Upload Sa2VA"
        hub = {"private": private, "token": token, "revision": revision, "create_pr": create_pr}
        hub |= {"max_shard_size": max_shard_size, "tags": tags}
        hub |= {"commit_message": message, "commit_description": commit_description}
        if getattr(self, "_hf_peft_config_loaded", False) or getattr(self, "hf_quantizer", None) is not None:
            given = {name: value for name, value in hub.items() if value is not None}  # tags=None would be gone through
            return super().push_to_hub(repo_id, **given)
        from .hub_upload import push_model

        return push_model(self, repo_id, **hub).url

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Each library's own initialisation: SAM 2 trains badly if all its weights are drawn from one normal."""
        if isinstance(module, Sam2Model):
            for name in ("maskmem_tpos_enc", "no_mem_embed", "no_mem_pos_enc", "no_obj_ptr"):
                nn.init.trunc_normal_(getattr(module, name), std=0.02)
        for name in ("pos_embed", "pos_embed_window"):
            if isinstance(getattr(module, name, None), nn.Parameter):
                nn.init.zeros_(getattr(module, name))
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.constant_(module.gamma, 1e-6)
        if hasattr(module, "positional_encoding_gaussian_matrix"):
            nn.init.normal_(module.positional_encoding_gaussian_matrix)
        if isinstance(module, WideLayerNorm2d):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif hasattr(module, "reset_parameters"):
            module.reset_parameters()

    def add_adapter(self, adapter_config, adapter_name: str | None = None) -> None:
        """transformers' `add_adapter`; the config may name modules as the released code does, see `adapter_config`."""
        super().add_adapter(self.adapter_config(adapter_config), adapter_name)

    def load_adapter(
        self, peft_model_id=None, adapter_name=None, peft_config=None, adapter_state_dict=None, **kwargs
    ) -> Any:
        """transformers' `load_adapter`, also of adapters that were trained on the released code's modules.

        Raises:
            ValueError: the adapter changes a tensor that is several here, in another way than LoRA does; or a part of
                it was not loaded.
        """
        if peft_config is None and peft_model_id is not None:
            hub = {**getattr(kwargs.get("load_config"), "download_kwargs", {}), **(kwargs.get("adapter_kwargs") or {})}
            hub = hub_arguments_in({**hub, **kwargs})
            config = _peft().PeftConfig.from_pretrained(peft_model_id, **hub)
            if self.adapter_config(config) is not config or config.modules_to_save:  # whose tensors may be fused
                weights = _peft().utils.load_peft_weights(peft_model_id, device="cpu", **hub)
                peft_config, adapter_state_dict = config, weights
        if peft_config is not None and adapter_state_dict is not None:
            adapter_state_dict = native_adapter_weights(self, adapter_state_dict)
        peft_config = None if peft_config is None else self.adapter_config(peft_config)
        report = super().load_adapter(peft_model_id, adapter_name, peft_config, adapter_state_dict, **kwargs)
        if lost := sorted(name for name in report.missing_keys if ".modules_to_save." in name):
            raise ValueError(
                f"The trained {lost} were not loaded: the adapter lacks them, or this version of transformers can't "
                "load what modules_to_save names. Update transformers, or use peft.PeftModel.from_pretrained."
            )
        return report

    def adapter_config(self, config):
        """Translates the released names of modules in a PEFT config: `wqkv`, `w1`, `attn.proj`... to those used here.

        `add_adapter` and `load_adapter` do it by themselves, for `peft.get_peft_model` call it. A tensor that is fused
        there (`wqkv`, `attn.qkv`) becomes three modules here, each with an adapter of its own.

        Args:
            config: a `peft.PeftConfig`. Names as they are here may be used too: `q_proj` of InternViT and of the
                language model, `language_model.model.layers.0.mlp`... as PEFT matches them.

        Returns:
            The config itself if there is nothing to translate, else a copy.
        """
        is_targeted = _peft().tuners.tuners_utils.check_target_module_exists
        modules = ModuleNames(self)
        changed = {}
        if targets := getattr(config, "target_modules", None):
            changed["target_modules"] = modules.native(targets, partial(is_targeted, config))
        for field in ("exclude_modules", "modules_to_save"):
            if (ends := getattr(config, field, None)) and not isinstance(ends, str):
                changed[field] = modules.native(ends, partial(_is_target, ends=ends))
        for field in ("rank_pattern", "alpha_pattern"):
            given = getattr(config, field, None) or {}
            changed[field] = {name: given[pattern] for pattern in given for name in modules.patterns(pattern)}
        changed = {field: value for field, value in changed.items() if value and value != getattr(config, field)}
        if changed:
            config = copy.deepcopy(config)
            for field, value in changed.items():
                setattr(config, field, value)
        return config

    def set_attn_implementation(self, attn_implementation: str | dict[str, str], *args, **kwargs) -> None:
        """transformers' `set_attn_implementation`, of the language model ("text_config" or "llm_config") and what sees.

        transformers does not know that InternViT is made by "vision_config", nor that SAM 2's attention is its own.
        """
        wanted, vision = attn_implementation, self.config.vision_config
        if not isinstance(wanted, dict):
            wanted = dict.fromkeys(("", "vision_config", "text_config"), wanted)
        wanted = by_own_names(self.config, wanted)
        if self.config.is_qwen_vl:
            super().set_attn_implementation(wanted, *args, **kwargs)
            return
        of_vision = wanted.pop("vision_config", vision._attn_implementation)
        super().set_attn_implementation(wanted, *args, **kwargs)
        if of_vision:
            self.vision_model.set_attn_implementation(of_vision, *args, **kwargs)
            vision._attn_implementation = self.vision_model.config._attn_implementation

    def get_input_embeddings(self) -> nn.Module:
        """The language model's token embeddings."""
        return self.causal_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's token embeddings."""
        self.causal_model.set_input_embeddings(value)

    def _get_resized_embeddings(self, *args, **kwargs) -> nn.Embedding:
        """New rows are drawn as the language model draws its own."""
        return self.causal_model._get_resized_embeddings(*args, **kwargs)

    def _get_resized_lm_head(self, *args, **kwargs) -> nn.Linear:
        """New rows are drawn as the language model draws its own."""
        return self.causal_model._get_resized_lm_head(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        """The language model's head."""
        return self.causal_model.get_output_embeddings()

    def set_output_embeddings(self, value: nn.Module) -> None:
        """Replaces the language model's head."""
        self.causal_model.set_output_embeddings(value)

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.language_model.model

    @property
    def gen_config(self) -> GenerationConfig:
        """`generation_config`, as the released code calls it."""
        return self.generation_config

    @gen_config.setter
    def gen_config(self, config: GenerationConfig) -> None:
        self.generation_config = config

    def preparing_for_generation(self, tokenizer=None, max_new_tokens: int = _MAX_NEW_TOKENS, torch_dtype=None) -> None:
        """Kept for callers of the released code, which had to call it once; only `max_new_tokens` has an effect."""
        self.generation_config.max_new_tokens = max_new_tokens

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """Encodes and projects tiles.

        Args:
            pixel_values: [tiles, 3, S, S], ImageNet-normalised, or [B, tiles, 3, S, S], as collators stack samples.

        Returns:
            [tiles, tokens, hidden], tokens = (S / patch_size * downsample_ratio)^2 (256 in released checkpoints).

        Raises:
            ValueError: another shape.
        """
        pixel_values = self._as_tiles(pixel_values).to(_dtype(self.vision_model))
        layer = self.config.select_layer
        output = self.vision_model(pixel_values, output_hidden_states=layer != -1)
        states = output.last_hidden_state if layer == -1 else output.hidden_states[layer]
        return self.mlp1(self._pixel_shuffle(states[:, 1:]).to(_dtype(self.mlp1)))  # without the class token

    def _as_tiles(self, pixel_values: Tensor) -> Tensor:
        """Checks tiles, and takes them out of their samples: [tiles, 3, S, S]."""
        tiles = pixel_values.flatten(0, 1) if pixel_values.ndim == 5 else pixel_values
        channels, step = self.config.vision_config.num_channels, self.config.vision_config.patch_size
        step *= round(1 / self.config.downsample_ratio)
        side = tiles.shape[-1] if tiles.ndim else 0
        if tiles.ndim != 4 or tiles.shape[1:] != (channels, side, side) or side % step or not tiles.numel():
            raise ValueError(
                f"pixel_values of shape {tuple(pixel_values.shape)} are no tiles [n, {channels}, S, S] with a side S "
                f"that {step} divides. Give those of the processor."
            )
        return tiles

    def _pixel_shuffle(self, states: Tensor) -> Tensor:
        """Folds s x s neighbouring patches into channels: [n, p * p, C] -> [n, (p / s)^2, s * s * C]."""
        side, fold = round(states.shape[1] ** 0.5), round(1 / self.config.downsample_ratio)
        grid = states.reshape(len(states), side // fold, fold, side // fold, fold, states.shape[-1])
        grid = grid.transpose(2, 3)
        if self.config.ps_version == "v1":  # the first InternVL kept the folded map transposed
            grid = grid.transpose(1, 2)
        return grid.reshape(len(states), (side // fold) ** 2, -1)

    def get_inputs_embeds(
        self,
        input_ids: Tensor,
        token_ids: SpecialTokenIds,
        image_features: Tensor | None = None,
        prompt_masks: Tensor | None = None,
        prompt_mask_tiles: Tensor | None = None,
    ) -> Tensor:
        """Embeds tokens and puts image features where `<IMG_CONTEXT>` stands.

        Args:
            input_ids: int64 [B, L].
            token_ids: the special tokens' ids.
            image_features: [tiles, tokens, hidden] of all samples, in batch order.
            prompt_masks: bool [R, g, g], the visual prompts of all samples on the token grid; their features stand
                between `<vp>` and `</vp>`.
            prompt_mask_tiles: int64 [R], the tile each visual prompt is read from; default the last.

        Returns:
            [B, L, hidden].

        Raises:
            ValueError: the placeholders in the text do not match the features.
        """
        embeds = self.get_input_embeddings()(input_ids)
        is_image = input_ids == token_ids.image
        if image_features is None:
            if prompt_masks is not None or bool(is_image.any()):
                raise ValueError(_NO_PIXELS)
            return embeds
        image_features = image_features.to(embeds)
        if prompt_masks is None:
            return _fill(embeds, is_image, image_features.flatten(0, 1), "image")
        depth = (input_ids == token_ids.region_start).long() - (input_ids == token_ids.region_end).long()
        in_region = depth.cumsum(dim=-1) > 0
        embeds = _fill(embeds, is_image & ~in_region, image_features.flatten(0, 1), "image")
        region = _region_features(image_features, prompt_masks, prompt_mask_tiles)
        return _fill(embeds, is_image & in_region, region, "visual prompt")

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        prompt_masks: Tensor | None = None,
        prompt_mask_tiles: Tensor | None = None,
        labels: Tensor | None = None,
        grounding_pixel_values: Sequence[Tensor] | Tensor | None = None,
        mask_labels: Sequence[Tensor] | None = None,
        num_items_in_batch: Tensor | int | None = None,
        num_masks_in_batch: Tensor | int | None = None,
        image_grid_thw: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> Sa2VATrainingOutput | tuple:
        """Text logits and losses, masks and mask losses. The recipe is section 3 of the paper.

        Args:
            input_ids: int64 [B, L], right-padded, pictures as `<IMG_CONTEXT>` placeholders.
            attention_mask: [B, L], 1 on tokens.
            pixel_values: [tiles, 3, H, W] of all samples in batch order (a clip gives a tile per key frame).
            prompt_masks, prompt_mask_tiles: see `get_inputs_embeds`.
            labels: int64 [B, L], -100 where no loss. The `[SEG]` tokens among them are the objects.
            grounding_pixel_values: for each sample frames [T, 3, S, S] as SAM 2 wants them (`[3, S, S]` for an image),
                None for samples without masks; the first `grounding_config.num_key_frames` frames are prompted, the
                rest is tracked. Or one tensor [B, 3, S, S] or [B, T, 3, S, S].
            mask_labels: for each sample bool or float [objects, T, h, w] in 0..1, any size (`[objects, h, w]` for an
                image); without it no mask loss.
            num_items_in_batch: supervised tokens over all gradient accumulation steps and processes, from `Trainer`;
                the text loss is then the sum over this batch divided by it.
            num_masks_in_batch: the same for the mask losses: objects x frames. Without it they are means over this
                batch, which count by its share of the supervised tokens.
            image_grid_thw: int64 [pictures, 3], with `pixel_values` around Qwen-VL, where those are [patches, values].
            position_ids: as the language model takes them.
            inputs_embeds: None; pictures and `[SEG]` are found by their tokens.
            use_cache: as other models have it; a whole conversation is read, so nothing is cached.
            return_dict: False gives a tuple.
            logits_to_keep: compute logits of the last so many tokens only, or of these positions (int64 [n]); 0 of all,
                which a text loss needs.
            **kwargs: what the language model takes: `output_hidden_states`, `output_attentions`...

        Returns:
            `Sa2VATrainingOutput`.

        Raises:
            ValueError: placeholders, `[SEG]` tokens, frames and masks do not match, or have other shapes than these;
                tokens that the model doesn't know (on a GPU that trains, torch ends the process for them); `labels`
                with `logits_to_keep`.
            TypeError: something else than a tensor.
        """
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("forward needs input_ids [B, L], not inputs_embeds; build them with the processor.")
        given = {"pixel_values": pixel_values, "image_grid_thw": image_grid_thw, "position_ids": position_ids}
        kwargs |= {name: value for name, value in given.items() if value is not None}
        if prompt_masks is not None:
            kwargs |= {"prompt_masks": prompt_masks, "prompt_mask_tiles": prompt_mask_tiles}
        known = self.config.get_text_config().vocab_size
        text = {"input_ids": input_ids, "labels": labels, "mm_token_type_ids": kwargs.get("mm_token_type_ids")}
        if getattr(attention_mask, "ndim", 2) == 2 and not isinstance(attention_mask, dict):
            text["attention_mask"] = attention_mask  # else [B, 1, L, L], or those of each kind of layer
        _check_inputs(known, text, kwargs)
        token_ids = self.special_token_ids()
        states = self._read(token_ids, input_ids, attention_mask=attention_mask, **kwargs)
        output = self._text_output(states, logits_to_keep)
        if labels is not None:
            output.lm_loss = self._text_loss(output.logits, labels, num_items_in_batch)
        is_seg = (input_ids == token_ids.seg) & (labels != IGNORE_INDEX if labels is not None else True)
        output.seg_hidden_states = states.seg_states[is_seg.to(states.seg_states.device)]
        if grounding_pixel_values is not None or mask_labels is not None:
            objects = is_seg.sum(dim=-1).tolist()
            share = 1.0 if num_masks_in_batch is not None else _share_of_step(labels, num_items_in_batch)
            self._add_masks(output, objects, grounding_pixel_values, mask_labels, num_masks_in_batch, share)
        output.loss = self._total_loss(output)
        return output.to_tuple() if return_dict is False else output

    def _text_output(self, states: TextStates, logits_to_keep: int | Tensor) -> Sa2VATrainingOutput:
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        return Sa2VATrainingOutput(
            logits=self.causal_model.lm_head(states.text.last_hidden_state[:, kept]),
            image_hidden_states=states.image_hidden_states,
            hidden_states=states.text.get("hidden_states"),
            attentions=states.text.get("attentions"),
        )

    def _text_loss(self, logits: Tensor, labels: Tensor, num_items_in_batch: Tensor | int | None) -> Tensor:
        if logits.shape[1] != labels.shape[1]:
            raise ValueError("The text loss needs all logits. Leave logits_to_keep out, or labels.")
        return self.causal_model.loss_function(
            logits=logits, labels=labels.long(), vocab_size=logits.shape[-1], num_items_in_batch=num_items_in_batch
        )

    def _read(
        self,
        token_ids: SpecialTokenIds,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        prompt_masks: Tensor | None = None,
        prompt_mask_tiles: Tensor | None = None,
        **kwargs,
    ) -> TextStates:
        """Reads whole conversations, for `forward`."""
        image_features = None if pixel_values is None else self.get_image_features(pixel_values)
        embeds = self.get_inputs_embeds(input_ids, token_ids, image_features, prompt_masks, prompt_mask_tiles)
        output = self.get_decoder()(inputs_embeds=embeds, attention_mask=attention_mask, use_cache=False, **kwargs)
        return TextStates(output, output.last_hidden_state, image_features)

    def _add_masks(
        self,
        output: Sa2VATrainingOutput,
        objects_per_sample: list[int],
        clips: Sequence[Tensor] | Tensor | None,
        mask_labels: Sequence[Tensor] | None,
        num_masks: Tensor | int | None,
        share: Tensor | float,
    ) -> None:
        """Segments the objects of all samples, clips of equal length together, and averages the losses over objects."""
        if clips is None:
            raise ValueError("mask_labels need grounding_pixel_values, the frames that they belong to.")
        side = self.config.grounding_config.image_size
        clips = [None if clip is None else _as_clip(clip, side) for clip in clips]
        if len(clips) != len(objects_per_sample):
            raise ValueError(f"{len(objects_per_sample)} samples but grounding_pixel_values of {len(clips)}.")
        if mask_labels is not None and len(mask_labels) != len(clips):
            raise ValueError(f"{len(clips)} samples but mask_labels of {len(mask_labels)}. Give one entry for each.")
        prompts = list(self.text_hidden_fcs(output.seg_hidden_states).split(objects_per_sample))
        output.pred_masks = [prompt.new_zeros(len(prompt), 0, 0, 0) for prompt in prompts]
        losses = []
        of_length: dict[int, list[int]] = {}
        for i, (clip, count) in enumerate(zip(clips, objects_per_sample, strict=True)):
            if clip is not None and count:
                of_length.setdefault(len(clip), []).append(i)
        for length, samples in sorted(of_length.items()):
            predictions = self._segment_samples(torch.stack([clips[i] for i in samples]), [prompts[i] for i in samples])
            low_res = torch.cat([p.logits for p in predictions], dim=1)
            for i, masks in zip(samples, low_res.split([len(prompts[i]) for i in samples]), strict=True):
                output.pred_masks[i] = masks
            if mask_labels is not None:
                targets = [_mask_target(mask_labels[i], len(prompts[i]), length) for i in samples]
                losses.append(self._mask_losses(predictions, targets))
        self._average_losses(output, losses, num_masks, share)

    def _segment_samples(self, clips: Tensor, prompts: list[Tensor]) -> list[MaskPrediction]:
        clips = clips.to(prompts[0])
        clip_index = torch.arange(len(prompts), device=clips.device)
        clip_index = clip_index.repeat_interleave(torch.tensor([len(p) for p in prompts], device=clips.device))
        num_key_frames = self.config.grounding_config.num_key_frames
        return self.grounding_encoder.segment_clips(clips, torch.cat(prompts), clip_index, num_key_frames)

    def _mask_losses(self, predictions: list[MaskPrediction], targets: list[Tensor]) -> dict[str, Tensor]:
        """Sums of each loss over the objects and frames of one group, and under "count" how many there are."""
        all_masks = self.config.supervise_all_masks
        target = torch.cat([_resized_target(t, predictions[0].logits.shape[-2:]) for t in targets])
        sums: dict[str, Tensor] = {}
        for t, prediction in enumerate(predictions):
            prediction = MaskPrediction(*(value.float() for value in prediction))  # FSDP rounds what a part gives back
            masks = prediction.multimask_logits if all_masks else prediction.logits
            wanted = target[:, t : t + 1].to(masks)
            parts = _point_losses(masks, wanted, self.config)
            parts["object_score_loss"] = F.binary_cross_entropy_with_logits(
                prediction.object_scores, (wanted > 0.5).flatten(1).any(dim=1).to(masks), reduction="sum"
            )
            actual = _mask_iou(prediction.multimask_logits, wanted)
            parts["iou_loss"] = F.mse_loss(prediction.multimask_iou_scores, actual, reduction="sum") / actual.shape[1]
            parts["count"] = wanted.new_tensor(len(wanted))
            sums = {name: value + sums.get(name, 0) for name, value in parts.items()}
        return sums

    def _average_losses(
        self,
        output: Sa2VATrainingOutput,
        losses: list[dict[str, Tensor]],
        num_masks: Tensor | int | None,
        share: Tensor | float,
    ) -> None:
        if losses:
            count = sum(group["count"] for group in losses) if num_masks is None else num_masks
            for name in ("mask_loss", "dice_loss", "iou_loss", "object_score_loss"):
                mean = sum(group[name] for group in losses) / count
                output[name] = mean * (share.to(mean.device) if isinstance(share, Tensor) else share)

    def _total_loss(self, output: Sa2VATrainingOutput) -> Tensor | None:
        weights = {
            "lm_loss": 1.0,
            "mask_loss": self.config.mask_loss_weight,
            "dice_loss": self.config.dice_loss_weight,
            "iou_loss": self.config.iou_loss_weight,
            "object_score_loss": self.config.object_score_loss_weight,
        }
        parts = [weight * output[name] for name, weight in weights.items() if weight and output.get(name) is not None]
        return sum(part.to(parts[0].device) for part in parts) if parts else None

    def special_token_ids(self, tokenizer=None) -> SpecialTokenIds:
        """Ids of the special tokens, from `tokenizer`, else from the checkpoint's own."""
        return SpecialTokenIds.of(self.load_processor().tokenizer if tokenizer is None else tokenizer)

    def load_processor(self) -> Sa2VAProcessor:
        """The processor of the checkpoint this model was loaded from, read once.

        Raises:
            ValueError: the model was not loaded from a checkpoint, or the checkpoint's folder is gone.
        """
        with _PROCESSOR_LOADING:
            if self._processor is None:
                name = self._folder or self.name_or_path
                if not name or (self._folder and not os.path.isdir(self._folder)):
                    reason = f"{self._folder} is gone" if name else "This model was built from a config"
                    raise ValueError(
                        f"{reason}, so there is no checkpoint to read a tokenizer from. Pass processor= (or "
                        "tokenizer=), or set it once with model.set_processor(processor)."
                    )
                self._processor = Sa2VAProcessor.from_pretrained(name, config=self.config, **self._hub_arguments)
            return self._processor

    def set_processor(self, processor: Sa2VAProcessor | None) -> None:
        """Sets the processor of calls that are given none; None restores the checkpoint's.

        Raises:
            TypeError: it is neither a processor nor a tokenizer, of which one is made.
            ValueError: it is of the other family.
        """
        self._processor = None if processor is None else self._resolve_processor(None, processor)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        prompt_masks: Tensor | None = None,
        prompt_mask_tiles: Tensor | None = None,
        **generate_kwargs,
    ):
        """Continues prompts with pictures.

        Args:
            input_ids, attention_mask, pixel_values, prompt_masks, prompt_mask_tiles: as for `forward`, padded on either
                side. `inputs` is another name of `input_ids`, as in transformers.
            **generate_kwargs: anything transformers' `generate` takes. What is not given comes from
                `generation_config` and the template, at whose end marks an answer stops.

        Returns:
            What the language model's `generate` returns; sequences hold only the new tokens.

        Raises:
            ValueError: no `input_ids`, tokens that the model doesn't know, tensors of other shapes than those of
                `forward`, pictures that don't fit their placeholders, or a setting that can't be followed.
            TypeError: something else than a tensor, or than what a setting is.
        """
        input_ids = _given_ids(input_ids, generate_kwargs)
        pictures = {"pixel_values": pixel_values, "prompt_masks": prompt_masks, "prompt_mask_tiles": prompt_mask_tiles}
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        _check_inputs(self.config.get_text_config().vocab_size, text, pictures)
        arguments = self._generation_arguments(self.load_processor(), generate_kwargs)
        embeds = self._prompt_embeds(self.special_token_ids(), input_ids, **pictures)
        mask = None if attention_mask is None else attention_mask.to(embeds.device)
        return self._write(_padded_in_front({"inputs_embeds": embeds, "attention_mask": mask}), arguments)

    def _write(self, prompt: dict[str, Tensor | None], arguments: dict[str, Any]) -> Any:
        """transformers' `generate` of the part that writes.

        transformers keeps the length of the longest static cache it was asked for; if there was no room, all later
        calls would ask for it again.
        """
        model, before = self.causal_model, getattr(self.causal_model, "_previous_max_cache_length", -1)
        _check_against_prompt(prompt, arguments, self.config.get_text_config())
        try:
            return model.generate(**prompt, **arguments)
        except BaseException:
            model._previous_max_cache_length = before
            raise

    def _prompt_embeds(
        self,
        token_ids: SpecialTokenIds,
        input_ids: Tensor,
        pixel_values: Tensor | None = None,
        prompt_masks: Tensor | None = None,
        prompt_mask_tiles: Tensor | None = None,
    ) -> Tensor:
        device = self.execution_device
        features = None if pixel_values is None else self.get_image_features(pixel_values.to(device))
        prompt_masks = None if prompt_masks is None else prompt_masks.to(device)
        return self.get_inputs_embeds(input_ids.to(device), token_ids, features, prompt_masks, prompt_mask_tiles)

    def compile_parts(self, image_encoder: bool = True, decode_step: bool = True, **options) -> None:
        """Compiles what is called most, by `torch.compile`, in place. Each call decides anew; False undoes it.

        The first use of a part takes a minute or more, and so does its second shape (frames encoded together, length of
        the cache), after which shapes are free. Weights, their names and what is saved stay as they are. InternViT and
        the reading of prompts stay plain: their shapes change with every picture.

        Args:
            image_encoder: SAM 2's, on [T, 3, S, S].
            decode_step: the language model on one more token for each answer, in `predict_*` and `generate`. Keys and
                values then lie in transformers' static cache; `cache_implementation="dynamic"` leaves it in a call.
            **options: of `torch.compile`: `fullgraph`, `dynamic`, `backend`, `mode`, `options`. The mode
                "reduce-overhead" does not allow several threads.

        Raises:
            OSError: nothing can be compiled here, for want of a C++ compiler or of Triton.
            TypeError, ValueError: an option that `torch.compile` does not have, or does not take.
            ValueError: weights of a part are offloaded, or quantized in a way that can't be compiled.
        """
        config = _compile_config(options)
        encoder = self.grounding_encoder.sam2_model.image_encoder
        wanted = [part for part, on in ((encoder, image_encoder), (self.causal_model, decode_step)) if on]
        _check_compilable(wanted, config, self.device)
        quantizer = getattr(self, "hf_quantizer", None)
        if decode_step and quantizer is not None and not quantizer.is_compileable:
            raise ValueError(f"{type(quantizer).__name__} can't be compiled. Pass decode_step=False.")
        if image_encoder:
            encoder.compile(**config.to_dict())
        else:
            encoder._compiled_call_impl = None
        _set_decode_step(self.causal_model, config if decode_step else None)

    @property
    def _first_module(self) -> nn.Module:
        return self.vision_model

    @property
    def execution_device(self) -> torch.device:
        """Where inputs go: the device the first module computes on."""
        return _execution_device(self._first_module)

    @torch.no_grad()
    def predict_forward(
        self,
        image=None,
        video=None,
        text: str | None = None,
        past_text: str | None = "",
        mask_prompts=None,
        tokenizer=None,
        processor=None,
        *,
        num_frames: int | None = None,
        frame_sampling: str | Sequence[int] | None = None,
        mask_threshold: float = 0.5,
        return_raw_masks: bool = False,
        return_mask_logits: bool = False,
        output_format: str = "numpy",
        mask_sizes: str = "first",
        encode_batch_size: int | None = None,
        **generate_kwargs,
    ) -> Sa2VAOutput:
        """Answers a question about an image, a video or neither, with a mask in every frame for every `[SEG]`.

        Args:
            image: PIL image of any mode, array, tensor or path (`processing_sa2va.load_image`).
            video: list, array, path, folder or iterator of frames (`processing_sa2va.open_video`).
            text: the question. `<image>` marks where the picture goes; without it the picture comes first.
            past_text: `out.past_text` of the turn before.
            mask_prompts: regions the question speaks of as region1, region2...: [n, H, W], any size; on a video they
                mark the first key frame.
            tokenizer, processor: default is the checkpoint's own; either may be passed as either.
            num_frames, frame_sampling: how many key frames the language model sees, and which: "first", "uniform" or
                explicit indices, beside which `num_frames` has no effect. Defaults from the config (released: the
                first 5).
            mask_threshold: probability in (0, 1) above which a pixel belongs to the object.
            return_raw_masks: float32 probabilities instead of booleans.
            return_mask_logits: fill `mask_logits`.
            output_format: "numpy", "torch" (tensors on the CPU) or "rle" (COCO, one dict per frame).
            mask_sizes: "first": all masks at the size of frame 0, as released; "own": each frame at its own size, and
                a list instead of a stacked array.
            encode_batch_size: how many frames of a video (or images of `predict_batch`) SAM 2 encodes together;
                default 1 on a CPU, on a GPU as many as its free memory is reckoned to hold, up to 8. Take 1 for a live
                source, whose frames come slowly.
            **generate_kwargs: anything transformers' `generate` takes: `max_new_tokens`, `num_beams`, `streamer`...
                `sample_num_frames` is Sa2VA-i's name of `num_frames`.

        Returns:
            `Sa2VAOutput`.

        Raises:
            ValueError, TypeError: an input is unusable; the message says what is accepted.
            OSError: a file can't be read.
        """
        options = _MaskOptions(
            mask_threshold, return_raw_masks, output_format, mask_sizes, return_mask_logits, encode_batch_size
        )
        processor = self._resolve_processor(tokenizer, processor)
        num_frames = generate_kwargs.pop("sample_num_frames", num_frames)
        inputs = processor.prepare(image, video, text, past_text, mask_prompts, num_frames, frame_sampling)
        (answer,) = self._answers([inputs], processor, generate_kwargs)
        return self._output(inputs, processor, answer, options)

    @torch.no_grad()
    def predict_batch(
        self,
        samples: Iterable[Mapping[str, Any]],
        tokenizer=None,
        processor=None,
        *,
        batch_size: int = 8,
        num_frames: int | None = None,
        frame_sampling: str | Sequence[int] | None = None,
        mask_threshold: float = 0.5,
        return_raw_masks: bool = False,
        return_mask_logits: bool = False,
        output_format: str = "numpy",
        mask_sizes: str = "first",
        encode_batch_size: int | None = None,
        **generate_kwargs,
    ) -> list[Sa2VAOutput]:
        """`predict_forward` for many samples: answers are written together, images encoded some at a time.

        What a sample gets does not depend on its neighbours. Where it would (settings of `generate` that look at the
        prompt or at the whole batch, such as a streamer; a text that outgrows its model's rotary positions) samples are
        answered one after the other. Draws of `do_sample` are those of a batch. Clips are tracked one by
        one: the frames of each are many enough to be encoded together.

        Args:
            samples: dictionaries of `predict_forward`'s `image` or `video`, `text`, `past_text`, `mask_prompts`,
                `num_frames`, `frame_sampling`; in any mixture. An iterator is read a batch at a time.
            batch_size: how many samples are answered together. When memory runs out it is halved for the rest, with a
                warning, as `encode_batch_size` is for the frames at hand.
            **generate_kwargs, and the rest: as for `predict_forward`, for all samples.

        Returns:
            An output for each sample, in order.

        Raises:
            ValueError, TypeError, OSError: as `predict_forward`, with the number of the sample.
            ValueError: a `cache`, which belongs to one conversation.
            RuntimeError: out of memory with a single sample.
        """
        _check_count("batch_size", batch_size)
        if any(generate_kwargs.get(name) is not None for name in (_CACHE, "past_key_values")):
            raise ValueError("A cache belongs to one conversation. Leave it out, or call predict_forward for each.")
        options = _MaskOptions(
            mask_threshold, return_raw_masks, output_format, mask_sizes, return_mask_logits, encode_batch_size
        )
        processor = self._resolve_processor(tokenizer, processor)
        num_frames = generate_kwargs.pop("sample_num_frames", num_frames)
        prepared = prepare_samples(processor.prepare, samples, num_frames=num_frames, frame_sampling=frame_sampling)

        def look(batch: Sequence[Sa2VAInputs]) -> list[tuple[Sa2VAInputs, Answer, MaskPrediction | None]]:
            answers = self._answers(batch, processor, generate_kwargs)
            prompts = [answer.prompts for answer in answers]
            predictions = self._segment_images(batch, processor, prompts, encode_batch_size)
            return list(zip(batch, answers, predictions, strict=True))

        return [
            self._output(inputs, processor, answer, options, prediction)
            for batch in in_batches(look, prepared, batch_size, "samples")
            for inputs, answer, prediction in batch
        ]

    def _output(
        self,
        inputs: Sa2VAInputs,
        processor: Sa2VAProcessor,
        answer: Answer,
        options: "_MaskOptions",
        prediction: MaskPrediction | None = None,
    ) -> Sa2VAOutput:
        """Collects the masks of all frames; `prediction` is that of an image which was looked at already."""
        arriving = _Arriving(options.output_format == "rle")
        if len(answer.prompts):  # else not even the frames need be read
            for parts, predicted in self._segment(inputs, processor, answer.prompts, options, prediction):
                arriving.add({**options.keep(parts, processor), **_scores(predicted)}, predicted.logits.device)
        frames = arriving.wait()
        plain = replace(options, output_format="torch" if options.output_format == "torch" else "numpy")
        masks, logits = ([frame.pop(name) for frame in frames] for name in ("masks", "logits"))
        objects = range(len(answer.prompts))
        return Sa2VAOutput(
            prediction=answer.prediction,
            prediction_masks=options.pack(masks, len(objects)),
            past_text=answer.past_text,
            phrases=answer.phrases,
            mask_scores=[
                {name: torch.stack([frame[name][i] for frame in frames]).numpy() for name in ("iou", "object")}
                for i in objects
            ],
            mask_logits=plain.pack(logits, len(objects)) if options.logits else None,
            sample_idx=list(inputs.key_frames),
            problems=list(inputs.frames.problems) if inputs.is_video else None,
        )

    def predict_stream(
        self,
        image=None,
        video=None,
        text: str | None = None,
        past_text: str | None = "",
        mask_prompts=None,
        tokenizer=None,
        processor=None,
        *,
        num_frames: int | None = None,
        frame_sampling: str | Sequence[int] | None = None,
        mask_threshold: float = 0.5,
        return_raw_masks: bool = False,
        output_format: str = "numpy",
        mask_sizes: str = "first",
        encode_batch_size: int | None = None,
        resume: Mapping[str, Tensor] | None = None,
        **generate_kwargs,
    ) -> "Sa2VAStream":
        """`predict_forward` frame by frame: memory does not grow with the length of the video.

        Only frames before the first key frame have to be held, as they are tracked backwards from it.

        Arguments and errors are those of `predict_forward`, but for `return_mask_logits`. The answer is written before
        the first frame comes; an answer without `[SEG]` gives frames with no objects. With `output_format="rle"` masks
        are encoded as they come.

        Args:
            resume: `stream.state()` of a stream that was stopped. Give the same video, from its first frame, and no
                words: frames that were seen are passed over.

        Returns:
            A `Sa2VAStream`: it yields a `Sa2VAFrame` for each frame, and does nothing before the first is asked for.

        Raises:
            ValueError, TypeError, OSError: as `predict_forward`, but then; neither image nor video; a `resume` that is
                no stream's state, of another SAM 2 or dtype (others can't be told apart), or beyond the video's end.
        """
        if "return_mask_logits" in generate_kwargs:
            raise TypeError("predict_stream has no return_mask_logits. Leave it out, or call predict_forward.")
        options = _MaskOptions(
            mask_threshold, return_raw_masks, output_format, mask_sizes, encode_batch_size=encode_batch_size
        )
        processor = self._resolve_processor(tokenizer, processor)
        progress, config = _Progress.none(), self.config.grounding_config
        grounding = {"image_size": config.image_size, "d_model": config.d_model}

        def start() -> Sa2VAInputs:
            """Checks what was given, and writes or takes up the answer."""
            if resume is not None:
                asked = (image, text, past_text or None, mask_prompts, num_frames, frame_sampling)
                _check_nothing_is_asked(video, *asked, generate_kwargs or None)
                return self._resume(resume, video, progress, grounding)
            count = generate_kwargs.pop("sample_num_frames", num_frames)
            inputs = processor.prepare(image, video, text, past_text, mask_prompts, count, frame_sampling)
            if inputs.frames is None:
                raise ValueError("predict_stream needs an image or a video; use predict_forward for text alone.")
            (progress.answer,) = self._answers([inputs], processor, generate_kwargs)
            progress.size = inputs.size
            return inputs

        return Sa2VAStream(self._stream(start, processor, options, progress), progress, grounding)

    @torch.no_grad()
    def _stream(
        self,
        start: Callable[[], Sa2VAInputs],
        processor: Sa2VAProcessor,
        options: "_MaskOptions",
        progress: _Progress,
    ) -> Generator[Sa2VAFrame, None, None]:
        inputs = start()
        progress.problems = inputs.frames.problems
        answer = progress.answer
        frames = self._segment(inputs, processor, answer.prompts, options, tracking=progress.tracking)
        with closing(frames):
            for index, (parts, prediction) in enumerate(frames, start=progress.tracking.next_frame):
                arriving = _Arriving(options.output_format == "rle")
                arriving.add({**options.keep(parts, processor), **_scores(prediction)}, prediction.logits.device)
                (frame,) = arriving.wait()
                yield Sa2VAFrame(
                    frame_index=index,
                    prediction=answer.prediction,
                    past_text=answer.past_text,
                    phrases=answer.phrases,
                    masks=options.convert(frame["masks"]),
                    mask_scores={name: frame[name].numpy() for name in ("iou", "object")},
                )

    def _resume(
        self, state: Mapping[str, Tensor], video: Any, progress: _Progress, grounding: dict[str, int]
    ) -> Sa2VAInputs:
        """Fills `progress` from what `Sa2VAStream.state` gave, and opens the video."""
        device = _execution_device(self.grounding_encoder)
        try:
            tensors = dict(state)
            words = json.loads(bytes(tensors.pop("description").tolist()))
            prompts = tensors.pop("prompts").to(device)
            progress.tracking = TrackingState.from_tensors(tensors, self.config.grounding_config, device)
            progress.answer = Answer(words["prediction"], words["past_text"], words["phrases"], prompts)
            height, width = progress.size = tuple(map(as_index, words["size"]))
            check_area(width, height, what="video")
            model = words["model"]
            if len(prompts) != progress.tracking.num_objects:
                raise ValueError(f"It tracks {progress.tracking.num_objects} objects of {len(prompts)}.")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, OverflowError, RecursionError) as error:
            raise ValueError(
                f"resume is no state of a stream of a video. Give what stream.state() returned, unchanged. ({error})"
            ) from error
        if model != grounding:
            raise ValueError(f"resume comes from a model with {model}, this one has {grounding}. Use the same model.")
        if prompts.dtype != (dtype := _dtype(self.text_hidden_fcs)):
            raise ValueError(f"resume comes from a model in {prompts.dtype}, this one is in {dtype}. Load it so.")
        nothing = torch.zeros(1, 0, dtype=torch.long)
        return Sa2VAInputs("", nothing, nothing, frames=open_video(video), is_video=True, size=progress.size)

    def _resolve_processor(self, tokenizer, processor) -> Sa2VAProcessor:
        """The processor of a call; users pass processors as `tokenizer` and the other way round."""
        given = processor if processor is not None else tokenizer
        if given is None:
            return self.load_processor()
        if hasattr(given, "prepare"):
            if hasattr(given, "image_processor") != self.config.is_qwen_vl:
                raise ValueError(
                    f"This {type(given).__name__} is of the other family, InternVL or Qwen-VL. Leave processor= out, "
                    "or give the one of this checkpoint."
                )
            return given
        tokenizer = getattr(given, "tokenizer", given)
        if not callable(getattr(tokenizer, "convert_tokens_to_ids", None)):
            raise TypeError(
                f"processor= and tokenizer= must be such objects, got {given!r}. Leave them out, or load one."
            )
        return self._processor_with(tokenizer, given)

    def _processor_with(self, tokenizer: Any, given: Any) -> Sa2VAProcessor:
        """The checkpoint's processor and its settings around a tokenizer, and what `given` has of its other parts."""
        parts = {name: getattr(given, name, None) for name in ("image_processor", "chat_template")}
        needs_own = self.config.is_qwen_vl and parts["image_processor"] is None
        own = self.load_processor() if needs_own else self._own_processor()
        if own is None:
            return Sa2VAProcessor.from_config(self.config, tokenizer, **parts)
        own = copy.copy(own)
        own.tokenizer = tokenizer
        for name, part in parts.items() if self.config.is_qwen_vl else ():
            if part is not None:
                setattr(own, name, part)
        return own

    def _own_processor(self) -> Sa2VAProcessor | None:
        """The checkpoint's processor, or None if there is none that can be read; it is tried once."""
        if self._processor is None and not self._lacks_processor and (self._folder or self.name_or_path):
            try:
                return self.load_processor()
            except Exception as error:  # a damaged tokenizer raises that; callers have one
                self._lacks_processor = True
                logger.warning(f"The checkpoint's own processor can't be read, so config.json's settings hold: {error}")
        return self._processor

    def _answers(
        self, inputs: Sequence[Sa2VAInputs], processor: Sa2VAProcessor, generate_kwargs: dict[str, Any]
    ) -> list[Answer]:
        """Lets the language model answer questions, together where that changes none of the answers."""
        if made := sorted(_MADE_HERE & generate_kwargs.keys()):
            raise TypeError(
                f"{made} are made here, from image, video, text, past_text and mask_prompts. Leave them out, or give "
                "what the processor returned to generate."
            )
        arguments = self._generation_arguments(processor, generate_kwargs)
        config = arguments["generation_config"]
        if config.num_return_sequences not in (None, 1):
            raise ValueError("num_return_sequences must be 1: a prediction is one answer and its masks.")
        config.return_dict_in_generate = True
        answers: dict[int, Answer] = {}
        for group in self._groups([question.input_ids.shape[1] for question in inputs], arguments):
            written = self._answer_together([inputs[i] for i in group], processor, arguments)
            answers |= zip(group, written, strict=True)
        return [answers[i] for i in range(len(inputs))]

    def _groups(self, lengths: Sequence[int], arguments: dict[str, Any]) -> list[list[int]]:
        """Which questions, of these numbers of tokens, can share a padded batch; others stay alone.

        Padding must not be seen: not by a setting of `generate`, nor by positions that depend on the longest text.
        """
        if len(lengths) == 1:
            return [[0]]
        config, limit = arguments["generation_config"], self._fixed_rope_length()
        settings = {**self.causal_model.generation_config.to_diff_dict(), **config.to_diff_dict()}.keys()
        # Behind a stop string, padding with an end mark would look like one that was written.
        is_ambiguous = config.stop_strings is not None and config.pad_token_id in _end_ids(config)
        if settings - _BLIND_TO_PADDING or arguments.keys() - {"generation_config", "tokenizer"} or is_ambiguous:
            return [[i] for i in range(len(lengths))]
        longest = float("inf") if limit is None else limit - (config.max_new_tokens or limit)
        together = [i for i, length in enumerate(lengths) if length <= longest]
        alone = [[i] for i, length in enumerate(lengths) if length > longest]
        return [together, *alone] if together else alone

    def _fixed_rope_length(self) -> int | None:
        """Longest text whose rotary positions don't depend on its length; None if there is no such limit."""
        config = self.config.get_text_config()
        rope = _rope(config)
        if rope.get("rope_type") == "longrope":  # short factors up to there, long ones beyond
            return rope.get("original_max_position_embeddings") or config.original_max_position_embeddings
        return config.max_position_embeddings if rope.get("rope_type") == "dynamic" else None

    def _answer_together(
        self, inputs: Sequence[Sa2VAInputs], processor: Sa2VAProcessor, arguments: dict[str, Any]
    ) -> list[Answer]:
        """Answers in one `generate`, and the `[SEG]` states of each."""
        token_ids = self.special_token_ids(processor.tokenizer)
        for question in inputs:
            self._check_vocabulary(question.input_ids, token_ids)
        prompt = self._prompt(token_ids, inputs)
        with _setting(_WRITTEN, _WrittenStates(*prompt["attention_mask"].shape)) as written:
            generated = self._write(prompt, arguments)
        given = prompt["input_ids"].shape[1] if "input_ids" in prompt else 0  # embeddings are not given back
        answers = _without_padding(generated.sequences[:, given:], arguments["generation_config"])
        states = self._seg_states(prompt, answers, token_ids.seg, generated.get(_CACHE), written)
        states = [s if question.frames is not None else s[:0] for question, s in zip(inputs, states, strict=True)]
        prompts = self.text_hidden_fcs(torch.cat(states).to(_dtype(self.text_hidden_fcs)))
        prompts = prompts.to(_dtype(self.grounding_encoder)).split([len(s) for s in states])
        return list(map(partial(_as_answer, processor), inputs, answers, prompts))

    def _check_vocabulary(self, input_ids: Tensor, token_ids: SpecialTokenIds) -> None:
        known = self.config.get_text_config().vocab_size
        if (highest := max(int(input_ids.max()), *token_ids)) >= known:
            raise ValueError(
                f"The tokenizer gives token {highest}, but this model knows {known} tokens. Use the checkpoint's own."
            )

    def _generation_arguments(self, processor: Sa2VAProcessor, given: dict[str, Any]) -> dict[str, Any]:
        """The model's settings, the template's stop words and the caller's arguments, as `generate` wants them."""
        given = dict(given)
        if given.get("max_new_tokens") is None:
            given.pop("max_new_tokens", None)  # as if it were not given; transformers would stop after 20
        own = self.generation_config or GenerationConfig()
        config = _call_config(given.pop("generation_config", None), own)
        _check_generation(config, given, self.config.get_text_config().vocab_size)
        if given.get("max_length") is not None:
            config.max_new_tokens = None  # else transformers would follow that
        arguments = config.update(**given)  # leaves what is no setting: streamer, logits_processor...
        if config.max_new_tokens is not None:
            config.max_length = None
        self._check_room(config)
        tokenizer = processor.tokenizer
        words = {word: find_token(tokenizer, word) for word in processor.stop_words}
        if config.eos_token_id is None:
            ends = (*words.values(), tokenizer.eos_token_id, *_end_ids(own))
            config.eos_token_id = sorted({i for i in ends if i is not None}) or None
        if config.pad_token_id is None:
            config.pad_token_id = processor.pad_token_id
        config.stop_strings = config.stop_strings or None
        # An end mark that is several tokens (phi3_chat over a Qwen tokenizer) can only be seen in the text.
        if spelled := [word for word, i in words.items() if i is None]:
            asked = config.stop_strings
            config.stop_strings = [*([asked] if isinstance(asked, str) else asked or ()), *spelled]
        if config.stop_strings is not None:
            arguments.setdefault("tokenizer", tokenizer)
        return {"generation_config": config, **arguments}

    def _check_room(self, config: GenerationConfig) -> None:
        """Refuses to set room aside for more tokens than the model has positions, or for endless beams."""
        kind = config.cache_implementation or self.causal_model.generation_config.cache_implementation or ""
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None) or 0  # some have none
        most = max(positions, _MAX_NEW_TOKENS)
        length = (config.max_length if config.max_new_tokens is None else config.max_new_tokens) or 0
        beams = config.num_beams or 1
        if beams > 1 and beams * length > _MOST_BEAM_TOKENS:
            raise ValueError(
                f"{beams} beams of {length} tokens: room is set aside for all, at most {_MOST_BEAM_TOKENS}. "
                "Lower num_beams or max_new_tokens."
            )
        wanted = max(length, getattr(config, "max_cache_len", None) or 0)  # older transformers lack it
        if "static" in kind and wanted > most:
            raise ValueError(
                f"A static cache, which compile_parts uses, sets room aside for all {wanted} tokens; this model has "
                f"{most} positions. Lower max_new_tokens, or pass cache_implementation='dynamic'."
            )

    def _prompt(self, token_ids: SpecialTokenIds, inputs: Sequence[Sa2VAInputs]) -> dict[str, Tensor]:
        """Questions as arguments of `causal_model.generate`, padded in front."""
        batch = collate_inputs(inputs)
        mask = batch.pop("attention_mask")
        embeds = self._prompt_embeds(token_ids, **batch)
        return {"inputs_embeds": embeds, "attention_mask": mask.to(embeds.device)}

    def _seg_states(
        self,
        prompt: dict[str, Tensor],
        answers: Sequence[Tensor],
        seg_id: int,
        cache: Any,
        written: "_WrittenStates | None" = None,
    ) -> list[Tensor]:
        """For each answer, int64 [n], the states [N, hidden] of its `[SEG]`, taken where the model reads the token.

        They were seen while it was written, or else the finished answers are read again, on the prompts' keys and
        values: behind beams and assistants, and if a `[SEG]` ends a truncated answer.
        """
        positions = [(ids == seg_id).nonzero().flatten() for ids in answers]
        longest = max((int(found[-1]) + 1 for found in positions if len(found)), default=0)
        if not longest:
            size = (0, self.config.get_text_config().hidden_size)
            return [torch.zeros(size, dtype=_dtype(self.text_hidden_fcs), device=answers[0].device)] * len(answers)
        states = None if written is None else written.of(answers)
        if states is None or states.shape[1] < longest:
            read = pad_sequence([ids[:longest] for ids in answers], True)  # nothing before looks at what is put behind
            states = self._answer_states(prompt, read, _prompt_cache(cache, *prompt["attention_mask"].shape))
            states = states[:, -read.shape[1] :]
        return [row[found.to(row.device)] for row, found in zip(states, positions, strict=True)]

    def _answer_states(self, prompt: dict[str, Tensor], answers: Tensor, cache: DynamicCache | None) -> Tensor:
        """States [B, .., hidden] that end with those of `answers` int64 [B, n]; a `cache` holds the prompts."""
        embeds = self.get_input_embeddings()(answers).to(prompt["inputs_embeds"])
        if cache is None:
            embeds = torch.cat([prompt["inputs_embeds"], embeds], dim=1)
        mask = _mask_with(prompt, answers)
        positions = (mask.cumsum(dim=-1) - 1).clamp(min=0)
        length, step = mask.shape[1], embeds.shape[1]
        first = length - step
        if cache is not None and self._base_grows(length):
            step = 1
        outputs = [
            self.get_decoder()(
                inputs_embeds=embeds[:, start - first : start - first + step],
                attention_mask=mask[:, : start + step],
                position_ids=positions[:, start : start + step],
                use_cache=cache is not None,
                **{_CACHE: cache},
            )
            for start in range(first, length, step)
        ]
        return torch.cat([output.last_hidden_state for output in outputs], dim=1)

    def _base_grows(self, length: int) -> bool:
        """Whether in a text so long every token was rotated by a base of its own, so that it must be read alone."""
        config = self.config.get_text_config()
        return _rope(config).get("rope_type") == "dynamic" and length > config.max_position_embeddings

    def _segment(
        self,
        inputs: Sa2VAInputs,
        processor: Sa2VAProcessor,
        prompts: Tensor,
        options: "_MaskOptions",
        prediction: MaskPrediction | None = None,
        tracking: TrackingState | None = None,
    ) -> Generator[tuple[Iterator[Tensor], MaskPrediction], None, None]:
        """Yields logits at the user's size, as `_resized_parts`, and the prediction they come from, for every frame.

        `prediction` is that of an image which was looked at already; `tracking` is moved along, from where it stands.
        """
        is_sa2va_i = self.config.grounding_config.separate_prompt_decoder
        own_sizes: dict[int, tuple[int, int]] = {}  # of frames that are read and not handed out yet
        tracking = TrackingState() if tracking is None else tracking
        count = options.encode_batch_size or _encode_batch_size(self.grounding_encoder)
        start, wanted = tracking.next_frame, len(prompts) > 0
        look, preprocess = _frame_steps(processor, prompts, waits=start < min(inputs.key_frames, default=0))
        with closing(_ready_frames(inputs, look, start, wanted, 2 * count, prompts.device.type != "cpu")) as ready:
            frames = _without_sizes(ready, start, own_sizes)
            if not len(prompts):
                prediction = _no_objects(prompts)
            elif prediction is None and not inputs.is_video:
                (prediction,) = self._segment_images([inputs], processor, [prompts], count)
            if prediction is None:
                if not tracking.banks:
                    self._condition(inputs, prompts, tracking, look, preprocess, count)
                predictions = self.grounding_encoder.propagate(tracking, frames, preprocess, count)
            else:
                predictions = _same_for_all(prediction, frames, tracking)
            for index, prediction in predictions:
                own_size = own_sizes.pop(index)
                size = own_size if options.mask_sizes == "own" else inputs.size
                two_steps = inputs.is_video or not is_sa2va_i
                yield _resized_parts(processor, prediction.logits, size, two_steps), prediction

    def _segment_images(
        self,
        inputs: Sequence[Sa2VAInputs],
        processor: Sa2VAProcessor,
        prompts: Sequence[Tensor],
        encode_batch_size: int | None,
    ) -> list[MaskPrediction | None]:
        """The predictions of all images with objects, some encoded together; None for other samples."""
        asked = [i for i, x in enumerate(inputs) if len(prompts[i]) and not x.is_video]
        predictions: list[MaskPrediction | None] = [None] * len(inputs)
        count = encode_batch_size or _encode_batch_size(self.grounding_encoder)
        for start in range(0, len(asked), count):
            some = asked[start : start + count]
            frames = [frame for i in some for frame in inputs[i].frames]
            pixels = processor.grounding_pixel_values(frames, dtype=prompts[0].dtype, device=prompts[0].device)
            features = self.grounding_encoder.encode(pixels)
            for row, i in enumerate(some):
                one = features.rows(slice(row, row + 1))
                predictions[i] = self.grounding_encoder.decode(one, prompts[i])
        return predictions

    def _condition(
        self,
        inputs: Sa2VAInputs,
        prompts: Tensor,
        tracking: TrackingState,
        look: Callable[[list[Image.Image]], Tensor],
        preprocess: Callable[[Sequence[Tensor]], Tensor],
        encode_batch_size: int,
    ) -> None:
        """Prompts the objects of a video on its key frames, where `tracking` then begins; with `_frame_steps`."""
        images = inputs.key_images or inputs.frames.select(inputs.key_frames)
        looked_at = (look([image]) for image in images)
        if prompts.device.type != "cpu":  # which is busy itself
            looked_at = _look_at_all(images, look, 2 * encode_batch_size)
        with closing(looked_at) as ready:
            keys = ((index, preprocess([frame])) for index, frame in zip(inputs.key_frames, ready, strict=True))
            conditioned = self.grounding_encoder.condition(keys, prompts, inputs.size, encode_batch_size)
        tracking.banks, tracking.predictions = conditioned.banks, conditioned.predictions
        inputs.key_images.clear()  # a long video must not carry them along


class Sa2VAChatModelQwen(Sa2VAChatModel, GenerationMixin):  # named again, or transformers would derive another class
    """Sa2VA around transformers' Qwen2.5-VL or Qwen3-VL, which is `model`; `Sa2VAChatModel(config)` chooses it.

    Qwen3-VL's `[SEG]` state is the last layer's output before the final norm, on which the released checkpoints were
    trained; Qwen2.5-VL's is after it, as in the InternVL family.
    """

    config_class = Sa2VAChatConfigQwen
    config: Sa2VAChatConfigQwen
    _no_split_modules = [
        "Qwen2_5_VLVisionBlock",
        "Qwen2_5_VLDecoderLayer",
        "Qwen3VLVisionBlock",
        "Qwen3VLTextDecoderLayer",
        "Sam2Decoder",
    ]

    def _build_language_side(self, config: Sa2VAChatConfigQwen) -> None:
        parts = {"": config, "text_config": config.text_config, "vision_config": config.vision_config}
        attention = {name: part._attn_implementation for name, part in parts.items()}  # building forgets it
        self.model = AutoModelForImageTextToText.from_config(config.qwen_vl_config(), attn_implementation=attention)
        if config.qwen_vl_type == "qwen3_vl":
            self.get_decoder().norm.register_forward_pre_hook(_note_last_layer)
        else:
            self.get_decoder().register_forward_hook(_note_output)

    @property
    def causal_model(self) -> nn.Module:
        """The part that writes: it has `generate`, `lm_head` and the text loss."""
        return self.model

    @property
    def _first_module(self) -> nn.Module:
        return self.model.model.visual

    def get_decoder(self) -> nn.Module:
        """The language model without its head."""
        return self.model.model.language_model

    def get_image_features(self, pixel_values: Tensor, image_grid_thw: Tensor) -> Any:
        """What transformers' Qwen-VL gives of `pixel_values` [patches, values] and `image_grid_thw` [pictures, 3]."""
        return self.model.get_image_features(pixel_values, image_grid_thw)

    def special_token_ids(self, tokenizer=None) -> SpecialTokenIds:
        """Ids of the special tokens; this family has no visual prompts, and -1 for theirs.

        Raises:
            ValueError: the tokenizer lacks `[SEG]`.
        """
        tokenizer = self.load_processor().tokenizer if tokenizer is None else tokenizer
        seg = find_token(tokenizer, SEG_TOKEN)
        if seg is None:
            raise ValueError("The tokenizer lacks [SEG]. Pass the tokenizer that came with the checkpoint.")
        return SpecialTokenIds(self.config.image_token_id, seg, -1, -1)

    @torch.no_grad()
    def generate(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs):
        """Continues prompts with pictures; sequences begin with the prompt, as those of transformers' Qwen-VL do.

        Args:
            input_ids, attention_mask: int64 [B, L], padded on either side; the sequences are padded in front. `inputs`
                is another name of `input_ids`, as in transformers.
            **kwargs: `pixel_values` [patches, values], `image_grid_thw` [pictures, 3] and anything transformers'
                `generate` takes. What is not given comes from `generation_config` and the template, at whose end marks
                an answer stops.

        Raises:
            ValueError, TypeError: see `Sa2VAChatModel.generate`.
        """
        input_ids = _given_ids(input_ids, kwargs)
        text = {"input_ids": input_ids, "attention_mask": attention_mask}
        text["mm_token_type_ids"] = kwargs.pop("mm_token_type_ids", None)
        _check_inputs(self.config.get_text_config().vocab_size, text, kwargs)
        self._check_pixels(input_ids, kwargs)
        if text["mm_token_type_ids"] is None:
            text["mm_token_type_ids"] = self._token_types(input_ids)
        arguments = self._generation_arguments(self.load_processor(), kwargs)
        device = self.execution_device
        text = {name: None if value is None else value.to(device) for name, value in text.items()}
        pictures = {name: value.to(device) for name, value in arguments.items() if isinstance(value, Tensor)}
        arguments = {name: value for name, value in arguments.items() if name not in pictures}
        return self._write({**_padded_in_front(text), **pictures}, arguments)

    def _generation_arguments(self, processor: Sa2VAProcessor, given: dict[str, Any]) -> dict[str, Any]:
        """Those of `Sa2VAChatModel`; words looked up in the prompt must not be placeholders, which want pixels."""
        arguments = super()._generation_arguments(processor, given)
        config = arguments["generation_config"]
        if config.prompt_lookup_num_tokens is not None:
            config.suppress_tokens = [*(config.suppress_tokens or ()), self.config.image_token_id]
        return arguments

    def _check_pixels(self, input_ids: Tensor, given: Mapping[str, Any]) -> None:
        """Refuses pictures that don't fit the text; transformers would go on without them, or fail in the middle."""
        pixels, grid = given.get("pixel_values"), given.get("image_grid_thw")
        is_image = self._token_types(input_ids)
        if pixels is None:
            if bool(is_image.any()):
                raise ValueError(_NO_PIXELS)
            return
        if grid is None or grid.ndim != 2 or grid.shape[1] != 3 or grid.dtype not in _INTEGERS:
            shape = None if grid is None else f"{grid.dtype} of shape {tuple(grid.shape)}"
            raise ValueError(f"pixel_values need image_grid_thw int64 [pictures, 3], got {shape}. {_OF_PROCESSOR}")
        vision, sizes = self.config.vision_config, grid.tolist()  # transformers waits for them, too
        merge, width = vision.spatial_merge_size, vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        patches = sum(map(math.prod, sizes))
        is_whole = all(min(size) > 0 and size[1] % merge == size[2] % merge == 0 for size in sizes)
        if pixels.shape[-1:] != (width,) or pixels.numel() != patches * width or not is_whole:
            raise ValueError(
                f"pixel_values of shape {tuple(pixels.shape)} don't fit image_grid_thw={sizes}: it is for [{patches}, "
                f"{width}], and {merge} must divide rows and columns. {_OF_PROCESSOR}"
            )
        if not _may_wait(input_ids):
            return
        edges = F.pad(is_image, (1, 1)).diff(dim=1)  # 1 where a picture's tokens begin, -1 behind their end
        found = ((edges == -1).nonzero()[:, 1] - (edges == 1).nonzero()[:, 1]).tolist()
        if found != (wanted := [math.prod(size) // merge**2 for size in sizes]):
            raise ValueError(f"The text's pictures have {found} placeholders, pixel_values {wanted}. {_OF_PROCESSOR}")

    def _token_types(self, input_ids: Tensor) -> Tensor:
        return (input_ids == self.config.image_token_id).long()

    def _read(self, token_ids: SpecialTokenIds, input_ids: Tensor, **kwargs) -> TextStates:
        if "prompt_masks" in kwargs:
            raise ValueError("prompt_masks are not supported around Qwen-VL; only the InternVL family knows regions.")
        self._check_pixels(input_ids, kwargs)
        kwargs = {"mm_token_type_ids": self._token_types(input_ids), **kwargs}
        with _setting(_READ, []) as read:
            output = self.model.model(input_ids=input_ids, use_cache=False, **kwargs)
        return TextStates(output, self._seg_source(output, read), None)

    def _seg_source(self, output: ModelOutput, read: list[Tensor]) -> Tensor:
        return read[-1] if self.config.qwen_vl_type == "qwen3_vl" else output.last_hidden_state

    def _prompt(self, token_ids: SpecialTokenIds, inputs: Sequence[Sa2VAInputs]) -> dict[str, Tensor]:
        prompt = collate_inputs(inputs)
        prompt["mm_token_type_ids"] = self._token_types(prompt["input_ids"])
        return {name: value.to(self.execution_device) for name, value in prompt.items()}

    def _answer_states(self, prompt: dict[str, Tensor], answers: Tensor, cache: DynamicCache | None) -> Tensor:
        with _setting(_READ, []) as read:
            if cache is None:
                output = self.model.model(**self._prompt_with(prompt, answers), use_cache=False)
            else:
                output = self.get_decoder()(
                    inputs_embeds=self.get_input_embeddings()(answers),
                    attention_mask=_mask_with(prompt, answers),
                    position_ids=self._answer_positions(prompt, answers.shape[1]),
                    use_cache=True,
                    **{_CACHE: cache},
                )
        return self._seg_source(output, read)

    def _prompt_with(self, prompt: dict[str, Tensor], answers: Tensor) -> dict[str, Tensor]:
        ends = {"input_ids": answers, "attention_mask": torch.ones_like(answers), "mm_token_type_ids": answers * 0}
        return {**prompt, **{name: torch.cat([prompt[name], end], dim=1) for name, end in ends.items()}}

    def _answer_positions(self, prompt: dict[str, Tensor], length: int) -> Tensor:
        """Rotary positions [3, B, length] of answers: a picture takes fewer positions than it has tokens."""
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        start = prompt["attention_mask"].sum(dim=1, keepdim=True)
        if "image_grid_thw" in prompt:
            _, shift = self.model.model.get_rope_index(**{name: prompt[name] for name in names})
            start = start + shift
        return (start + torch.arange(length, device=start.device)).expand(3, -1, -1)


_READ: ContextVar[list[Tensor] | None] = ContextVar("read", default=None)
_WRITTEN: ContextVar["_WrittenStates | None"] = ContextVar("written", default=None)


@contextmanager
def _setting(variable: ContextVar, value: Any) -> Iterator[Any]:
    """Sets a variable in this thread, while the block runs."""
    token = variable.set(value)
    try:
        yield value
    finally:
        variable.reset(token)


class _WrittenStates:
    """States of an answer's tokens, kept as the model read each in order to write the next."""

    def __init__(self, num_answers: int, prompt_length: int):
        self._shape = (num_answers, 1)
        self._prompt_left = prompt_length
        self._steps: list[Tensor] | None = []

    def add(self, states: Tensor) -> None:
        """Takes the states [B, L, hidden] of one call; those of the prompt, which may come in parts, are not kept."""
        if self._steps is None:
            return
        if self._prompt_left > 0:
            self._prompt_left -= states.shape[1]
        elif states.shape[:2] == self._shape:
            self._steps.append(states)
        else:  # beams, an assistant or no cache: nothing of it can be used
            self._steps = None

    def of(self, answers: Sequence[Tensor]) -> Tensor | None:
        """States [B, n - 1 or n, hidden] of answers of at most n tokens; mostly nobody read the last.

        None if they weren't written token by token, or by a compiled step.
        """
        unread = max(map(len, answers)) - len(self._steps or ())
        if not self._steps or unread not in (0, 1):  # on MPS one call is made before it is known that all have ended
            return None
        return torch.cat(self._steps, dim=1)


def _note_written(states: Tensor) -> None:
    if not torch.compiler.is_compiling() and (written := _WRITTEN.get()) is not None:
        written.add(states)


def _note_output(decoder: nn.Module, args: tuple, output: ModelOutput) -> None:
    _note_written(output[0])


def _note_last_layer(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
    if (read := _READ.get()) is not None:
        read.append(args[0])
    else:
        _note_written(args[0])


@dataclass(frozen=True)
class _MaskOptions:
    """How a caller wants masks; checked before anything is computed."""

    threshold: float
    raw: bool
    output_format: str
    mask_sizes: str
    logits: bool = False
    encode_batch_size: int | None = None

    def __post_init__(self):
        if self.output_format not in OUTPUT_FORMATS:
            raise ValueError(f"output_format={self.output_format!r} is unknown. Use one of {OUTPUT_FORMATS}.")
        if self.mask_sizes not in MASK_SIZES:
            raise ValueError(f"mask_sizes={self.mask_sizes!r} is unknown. Use one of {MASK_SIZES}.")
        if not isinstance(self.threshold, Real):
            raise TypeError(f"mask_threshold={self.threshold!r} is not a number. Give a probability between 0 and 1.")
        if self.encode_batch_size is not None:
            _check_count("encode_batch_size", self.encode_batch_size)
        if not 0 < self.threshold < 1:
            raise ValueError(f"mask_threshold={self.threshold} is not a probability between 0 and 1.")
        if self.raw and self.output_format == "rle":
            raise ValueError("return_raw_masks gives probabilities, which run-length encoding can't hold. Drop one.")
        if self.output_format == "rle":
            coco_masks()  # if it is not installed, that is told before an answer is written

    def keep(self, parts: Iterable[Tensor], processor: Sa2VAProcessor) -> dict[str, list[Any]]:
        """The "masks" of a frame, and its "logits" if they are asked for, as `_Arriving` takes them.

        Args:
            parts: logits [n, h, w] of some objects after others. Of each come bool or float32 probabilities, as
                `_to_host` gives them.
        """
        kept: dict[str, list[Any]] = {"masks": [], "logits": []}
        for logits in parts:
            masks = logits.sigmoid() if self.raw else processor.binarize(logits, float(self.threshold))
            kept["masks"].append(_to_host(masks))
            kept["logits"] += [_to_host(logits)] if self.logits else []
        return kept

    def pack(self, frames: list[Any], num_objects: int) -> list[Any]:
        """For each object what the caller asked for, of all frames; those of their own sizes stay a list.

        Args:
            frames: [N, h, w] or N RLE dicts of each. They are taken out of the list, so that memory does not hold all
                of them twice.
        """
        if self.output_format == "rle" or not (frames and num_objects):
            return [[frame[i] for frame in frames] for i in range(num_objects)]
        if self.mask_sizes == "own":
            return [[mask for frame in frames for mask in self.convert(frame[i][None])] for i in range(num_objects)]
        objects = [frames[0].new_empty(len(frames), *frames[0].shape[1:]) for _ in range(num_objects)]
        for number in range(len(frames)):
            frame, frames[number] = frames[number], None
            for masks, mask in zip(objects, frame, strict=True):
                masks[number] = mask
        return [self.convert(masks) for masks in objects]

    def convert(self, masks: Any) -> Any:
        """Masks [n, h, w] on the CPU -> array or tensor; a list of n RLE dicts stays."""
        return masks.numpy() if self.output_format == "numpy" else masks


def _load(from_pretrained: Callable, name_or_path: str | os.PathLike, *args, **kwargs) -> tuple[PreTrainedModel, dict]:
    """transformers' `from_pretrained` with the loading report; weights that don't fit are told in one error."""
    try:
        with reading_weights(str(name_or_path)):
            model, report = from_pretrained(name_or_path, *args, output_loading_info=True, **kwargs)
    except RuntimeError as error:
        if "ignore_mismatched_sizes" not in str(error):
            raise
        raise ValueError(
            f"The weights of {name_or_path} have other shapes than its config.json asks for. `python hub_upload.py "
            f"check {name_or_path}` names each; ignore_mismatched_sizes=True draws those anew."
        ) from error
    _check_quantized(name_or_path, model)
    return model, report


def _check_encoder(report: Mapping[str, Any], name_or_path: str | os.PathLike) -> None:
    """Raises ValueError for weights with another image encoder than SAM 2's, which would be drawn at random."""
    lacks_trunk = any(".image_encoder.trunk." in name for name in report["missing_keys"])
    if lacks_trunk and any("grounding_encoder." in name for name in report["unexpected_keys"]):
        raise ValueError(
            f"The grounding encoder of {name_or_path} is not SAM 2.0's, which is the only one known here. `python "
            f"hub_upload.py check {name_or_path}` names every weight that is missing or unknown."
        )


def _check_quantized(name_or_path: str | os.PathLike, model: PreTrainedModel) -> None:
    """Raises ValueError for plain weights that config.json calls quantized by bitsandbytes: the first call fails."""
    if not getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False):
        return
    quantized = (module for module in model.modules() if type(module).__module__.startswith("bitsandbytes."))
    if any(type(module.weight) is nn.Parameter for module in quantized):  # bitsandbytes has classes of its own
        raise ValueError(
            f"The config.json of {name_or_path} has a quantization_config of bitsandbytes, but the weights are not "
            "quantized. Remove it there, and pass quantization_config to from_pretrained to quantize while loading."
        )


def _frame_steps(
    processor: Sa2VAProcessor, prompts: Tensor, waits: bool = False
) -> tuple[Callable[[list[Image.Image]], Tensor], Callable[[Sequence[Tensor]], Tensor]]:
    """What is done to a video's frame as it is read, in a thread, and then to several, where SAM 2 is.

    A GPU is sent bytes, of which it makes numbers by itself. For a CPU the thread does that, while the networks work,
    unless frames may be many that have to wait for the first key frame: numbers take four times as much memory.
    """
    pixel_values = partial(processor.grounding_pixel_values, dtype=prompts.dtype, device=prompts.device, is_video=True)
    if prompts.device.type == "cpu" and not waits:
        return pixel_values, torch.cat
    return processor.resize_for_grounding, pixel_values


def _look_at_all(
    images: Sequence[Image.Image], look: Callable[[list[Image.Image]], Tensor], ahead: int
) -> Generator[Tensor, None, None]:
    """What `look` makes of each of some pictures, so many of them `ahead`, by a few threads."""
    waiting: deque[Future] = deque()
    pool = ThreadPoolExecutor(min(ahead, 4), thread_name_prefix="read_ahead")
    try:
        for image in images:
            waiting.append(pool.submit(look, [image]))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _ready_frames(
    inputs: Sa2VAInputs,
    look: Callable[[list[Image.Image]], Tensor],
    start: int,
    wanted: bool,
    ahead: int,
    decode_apart: bool = False,
) -> ReadAhead | Generator[tuple[tuple[int, int], Any], None, None]:
    """Sizes (h, w) of the frames from `start` on, and the frames [1, 3, S, S] as SAM 2 will `look` at them.

    None stands for what it need not look at: key frames, which it has seen, and all if none are `wanted`. A video is
    read and resized in a thread, so far `ahead` that the frames to be encoded together next are there in time. A GPU is
    faster than both together for large frames, so that another thread may decode them.
    """
    encoded = set(inputs.key_frames)

    def ready() -> Generator[tuple[tuple[int, int], Any], None, None]:
        decoded = inputs.frames.read(start)
        with closing(ReadAhead(decoded) if decode_apart and inputs.is_video else decoded) as frames:
            for index, frame in enumerate(frames, start):
                yield (frame.height, frame.width), look([frame]) if wanted and index not in encoded else None

    return ReadAhead(ready(), ahead) if inputs.is_video else ready()


def _without_sizes(
    frames: Iterator[tuple[tuple[int, int], Any]], start: int, sizes: dict[int, tuple[int, int]]
) -> Iterator[Any]:
    """Passes frames on; the sizes (h, w) they come with go into `sizes`, by number from `start` on."""
    for index, (size, frame) in enumerate(frames, start):
        sizes[index] = size
        yield frame


def _resized_parts(
    processor: Sa2VAProcessor, logits: Tensor, size: tuple[int, int], two_steps: bool
) -> Iterator[Tensor]:
    """Logits [N, 1, s, s] -> float32 [n, h, w] at the user's size, of so many objects at a time as memory holds."""
    if not len(logits):
        return iter([logits.new_zeros(0, *size, dtype=torch.float32)])
    count = max(1, _MOST_MASK_PIXELS // max(math.prod(size), processor.grounding_image_size**2))
    return (processor.resize_logits(part, size, two_steps=two_steps) for part in logits.split(count))


def _same_for_all(
    prediction: MaskPrediction, frames: Iterator, tracking: TrackingState
) -> Iterator[tuple[int, MaskPrediction]]:
    for index, _ in enumerate(frames, tracking.next_frame):
        tracking.next_frame = index + 1
        yield index, prediction


def _execution_device(module: nn.Module) -> torch.device:
    """The device that a module, or its first part, computes on; offloaded weights hide it."""
    for part in module.modules():
        device = getattr(vars(part).get("_hf_hook"), "execution_device", None)
        if device is not None:
            return torch.device(device)
        if next(part.parameters(recurse=False), None) is not None:
            break
    return next(module.parameters()).device


def _encode_batch_size(decoder: Sam2Decoder) -> int:
    """How many frames of a video or images of a batch are encoded together where nobody says: one on a CPU.

    An accelerator has room for more, but how much a frame takes is an estimate: a third of free memory is used.
    """
    device = _execution_device(decoder)
    if device.type != "cuda":
        return 1
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # what torch holds for later use
    return max(1, min(_MOST_ENCODED, int(free / 3 / (_ENCODING_MEMORY * (decoder.config.image_size / 1024) ** 2))))


def _refuse_wrapped_layers(model: PreTrainedModel) -> None:
    """The model inside a `PeftModel` has layers of other names, without which a checkpoint can't be read again."""
    if any(".base_layer." in name or ".modules_to_save." in name for name, _ in model.named_parameters()):
        raise ValueError(
            "PEFT has wrapped layers of this model. Call save_pretrained of the PeftModel for the adapter alone, or "
            "merge_and_unload() first for the whole model."
        )


def _name_class(config: Path, kind: type[PreTrainedModel]) -> None:
    """Has a saved config name a class whose code was saved along."""
    if config.is_file():
        values = json.loads(config.read_text(encoding="utf-8"))
        values["auto_map"][kind._auto_class] = f"{kind.__module__.rpartition('.')[2]}.{kind.__name__}"
        config.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _as_sa2va_i(config: Sa2VAChatConfig) -> Sa2VAChatConfig:
    """A copy of a config that asks for the second mask decoder, and for key frames as such checkpoints want them."""
    config = copy.deepcopy(config)
    config.grounding_config.separate_prompt_decoder = True
    config.grounding_config.frame_sampling = "uniform"
    return config


def _with_native_names(names: "ModuleNames", arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that name modules, by the names used here."""
    changed: dict[str, Any] = {}
    if isinstance(device_map := arguments.get("device_map"), dict):
        places = ((name, place) for key, place in device_map.items() for name in names.at(key))
        changed["device_map"] = dict(places)
    if (config := arguments.get("quantization_config")) is not None:
        config = _language_model_only(config, arguments.get("dtype"))
        for field in _SKIP_LISTS:
            if given := getattr(config, field, None):
                native = names.native(given, partial(_is_target, ends=given))
                setattr(config, field, list(dict.fromkeys([*given, *native])))
        changed["quantization_config"] = config
    return changed


def _language_model_only(
    config: dict[str, Any] | QuantizationConfigMixin, dtype: str | torch.dtype | None
) -> QuantizationConfigMixin:
    """A copy of a quantization config that also leaves out all but the layers of the language model.

    The rest is a small part of the weights, and masks suffer when it is rounded. bitsandbytes multiplies 4 bits in
    float32 unless it is told the model's `dtype` (here that of the checkpoints, if none is asked for).
    """
    config = AutoQuantizationConfig.from_dict(config) if isinstance(config, dict) else copy.deepcopy(config)
    for name in _SKIP_LISTS:
        if hasattr(config, name):
            setattr(config, name, list(dict.fromkeys([*(getattr(config, name) or ()), *_FULL_PRECISION])))
    if getattr(config, "load_in_4bit", False) and config.bnb_4bit_compute_dtype == torch.float32:
        name = "bfloat16" if dtype in (None, "auto") else str(dtype).removeprefix("torch.")
        config.bnb_4bit_compute_dtype = getattr(torch, name)
    return config


def _separate(model: nn.Module) -> None:
    """Gives weights that are parts of one fused tensor memory of their own.

    accelerate and safetensors would take them for shared. Not while loading, when memory also holds the file.
    """
    for weight in model.parameters():
        is_plain = type(weight.data) is Tensor  # neither quantized nor spread over processes
        if is_plain and weight.untyped_storage().nbytes() > weight.nbytes:
            weight.data = weight.data.clone()


def _tell_places(model: "Sa2VAChatModel") -> None:
    """Tells the part that writes where its modules are, as accelerate told the model.

    Otherwise transformers' `generate` would compile a step with a static cache on a GPU though weights are offloaded.
    """
    if (places := getattr(model, "hf_device_map", None)) is None:
        return
    prefix = next(f"{name}." for name, module in model.named_modules() if module is model.causal_model)
    model.causal_model.hf_device_map = {
        key[len(prefix) :]: place for key, place in places.items() if not key or f"{key}.".startswith(prefix)
    }


def _pack_what_fits(model: nn.Module) -> None:
    """Has bitsandbytes run 4-bit layers of odd widths as on CPUs without bfloat16 instructions.

    On CPUs with them it packs weights anew when a layer is first used: 32 rows together, with one scale for each block
    of a row, and fails where a layer has other widths than multiples of those. Unpacked the same weights are slower.
    What was packed is saved in order (`_put_scales_in_order`).
    """
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            fits = layer.out_features % _ROWS_PACKED == 0 and layer.in_features % layer.weight.blocksize == 0
            layer.support_avx512bf16_for_cpu &= fits
            layer.register_state_dict_post_hook(_put_scales_in_order)


def _put_scales_in_order(layer: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Mends what bitsandbytes saves of a 4-bit layer that was packed for a CPU.

    It unpacks the weights, in the layer, too, but leaves their scales as they were packed: turned around, so that each
    block of weights would have another's.
    """
    quant_state = getattr(layer.weight, "quant_state", None)
    if quant_state is not None and quant_state.absmax.dim() == 2:
        quant_state.absmax = quant_state.absmax.T.reshape(-1).float()
        state_dict[f"{prefix}weight.absmax"] = quant_state.absmax


def _dtype(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)  # layers that torch quantized have none


def _released_layout(model: PreTrainedModel) -> list[WeightTransform]:
    """The rules below as they apply to a model; saving reverses them, whatever layout it was loaded from.

    Left to itself, transformers would reverse the rules that loading needed, or for a model that was not loaded also
    its own for Qwen2.5-VL files older than any Sa2VA.
    """

    def is_ours(module: nn.Module) -> bool:
        """Whether its class is one of this file, or derived from one."""
        return any(kind.__module__ == __name__ for kind in type(module).__mro__)

    rules = get_model_conversion_mapping(model, add_legacy=False)
    return [rule for rule in rules if is_ours(model.get_submodule(rule.scope_prefix or ""))]


def pickled_weights_message(name_or_path: str) -> str:
    """Why a checkpoint with pickled weights is refused, and the commands that make it loadable."""
    folder = Path(name_or_path)
    fetch = "" if folder.is_dir() else f"hf download {name_or_path} --local-dir {folder.name} && "
    folder = folder if folder.is_dir() else Path(folder.name)
    old, new = shlex.quote(str(folder)), shlex.quote(f"{folder}-safetensors")
    return (
        f"{name_or_path} has only pickled weights (.bin), which can run code when they are read and are not loaded. "
        f"Convert them to safetensors: {fetch}python hub_upload.py convert {old} {new}"
    )


def _refuse_pickles(name_or_path: str | os.PathLike | None, arguments: dict[str, Any]) -> None:
    """Raises OSError for a checkpoint that has pickled weights and no safetensors; looks at file names only."""
    if name_or_path is None:
        return
    path, subfolder = Path(name_or_path), arguments.get("subfolder") or ""
    if path.is_dir():
        folder = path / subfolder
        pickled = any(folder.glob("pytorch_model*.bin")) and not any(folder.glob("model*.safetensors*"))
    elif path.is_file():
        pickled = path.suffix == ".bin"
    else:
        pickled = _hub_has_only_pickles(str(name_or_path), subfolder, arguments)
    if pickled:
        raise OSError(pickled_weights_message(str(path.parent if path.is_file() else name_or_path)))


def _check_index(name_or_path: str | os.PathLike | None, arguments: dict[str, Any]) -> None:
    """Raises OSError for an index of weights that is damaged or names files elsewhere; follows none of its names."""
    if name_or_path is None or os.path.isfile(name_or_path):
        return
    subfolder, variant = arguments.get("subfolder") or "", arguments.get("variant")
    weights, index = (_add_variant(file, variant) for file in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    if Path(name_or_path, subfolder, weights).is_file():
        return  # transformers prefers these
    path = cached_file(
        str(name_or_path),
        index,
        subfolder=subfolder,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_connection_errors=False,
        **_where(arguments),
    )
    if path is not None and "metadata" not in read_index(Path(path)):
        raise OSError(f'{path} has no metadata, without which transformers reads no index. Add "metadata": {{}}.')


def _base_of(name_or_path: str | os.PathLike | None) -> str | os.PathLike | None:
    """The checkpoint itself; in place of an adapter's folder the checkpoint it belongs to, as transformers has it.

    Raises:
        OSError: the adapter's config can't be read.
    """
    adapter = Path(name_or_path or "", ADAPTER_CONFIG_NAME)
    if name_or_path is None or adapter.with_name(CONFIG_NAME).is_file() or not adapter.is_file():
        return name_or_path
    with blaming(OSError, f"{adapter} can't be read", "Is it whole? Save or download it again."):
        return json.loads(adapter.read_text(encoding="utf-8"))["base_model_name_or_path"] or name_or_path


def _where(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which files of a name on the Hub are meant."""
    return {key: arguments[key] for key in ("revision", "token", "cache_dir", "local_files_only") if key in arguments}


def _hub_has_only_pickles(name: str, subfolder: str, arguments: dict[str, Any]) -> bool:
    """Whether a Hub repository has no other weights; asks the Hub only if the cache has none that are safe."""
    where = _where(arguments)

    def has(*files: str, **options) -> bool:
        return any(has_file(name, f"{subfolder}/{file}".lstrip("/"), **{**where, **options}) for file in files)

    safe = (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)
    try:
        return not has(*safe, local_files_only=True) and not has(*safe) and has(WEIGHTS_NAME, WEIGHTS_INDEX_NAME)
    except HFValidationError:
        return False  # transformers explains what a name must look like


def _language_model(config: PreTrainedConfig) -> PreTrainedModel:
    """A language model with weights yet to be loaded."""
    if config.model_type == Sa2VAInternLM2Config.model_type:  # no isinstance, see `is_qwen_vl`
        return Sa2VAInternLM2ForCausalLM._from_config(config)
    return AutoModelForCausalLM.from_config(config)


def _internvl_config(config: Sa2VAVisionConfig) -> InternVLVisionConfig:
    """The released description of InternViT in transformers' terms."""
    return InternVLVisionConfig(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_channels=config.num_channels,
        patch_size=config.patch_size,
        image_size=config.image_size,
        attention_bias=config.qkv_bias,
        use_qk_norm=config.qk_normalization,
        norm_type=config.norm_type,
        hidden_act=config.hidden_act,
        layer_norm_eps=config.layer_norm_eps,
        hidden_dropout_prob=config.dropout,
        attention_dropout=config.attention_dropout,
        initializer_range=config.initializer_range,
        layer_scale_init_value=config.initializer_factor,
        use_mean_pooling=True,  # False would add a final norm, which InternVL does not use
        attn_implementation=config._attn_implementation,
        dtype=config.dtype,
    )


def _fill(embeds: Tensor, where: Tensor, features: Tensor, what: str) -> Tensor:
    """Puts features [n, hidden] at the n places of `where` [B, L], in order."""
    if int(where.sum()) != len(features):
        raise ValueError(
            f"The text has {int(where.sum())} {what} placeholders but there are {len(features)} {what} features. "
            f"{_OF_PROCESSOR}"
        )
    return embeds.masked_scatter(where.unsqueeze(-1).to(embeds.device), features)


def _region_features(image_features: Tensor, masks: Tensor, tiles: Tensor | None) -> Tensor:
    """Image features at the marked cells of visual prompts: [n, hidden], region after region.

    Args:
        image_features: [tiles, g * g, hidden].
        masks: bool [R, g, g].
        tiles: int64 [R], the tile each region lies on; default the last.
    """
    side = math.isqrt(image_features.shape[1])
    if masks.dtype != torch.bool or masks.ndim != 3 or masks.shape[1:] != (side, side):
        raise ValueError(
            f"prompt_masks are {masks.dtype} of shape {tuple(masks.shape)}: bool [R, {side}, {side}] is needed, a cell "
            "for each token of a tile. Give those of the processor."
        )
    if tiles is None:
        tiles = torch.full((len(masks),), len(image_features) - 1)
    is_numbers = tiles.shape == masks.shape[:1] and tiles.dtype in _INTEGERS
    if not is_numbers or bool(((tiles < 0) | (tiles >= len(image_features))).any()):
        raise ValueError(
            f"prompt_mask_tiles={tiles.tolist()} must hold, for each of the {len(masks)} prompt_masks, one of the "
            f"{len(image_features)} tiles, counted from 0."
        )
    return image_features[tiles.to(image_features.device)][masks.flatten(1).to(image_features.device)]


def _mask_with(prompt: dict[str, Tensor], answers: Tensor) -> Tensor:
    """Attention mask of prompts and what follows them, int64 [B, L + n]."""
    return torch.cat([prompt["attention_mask"], torch.ones_like(answers)], dim=1)


def _check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name}={value!r} must be an integer, at least 1.")


def _call_config(chosen: GenerationConfig | None, own: GenerationConfig) -> GenerationConfig:
    """A copy of a call's settings, filled up with the model's own; without end marks unless the call has others."""
    if chosen is not None and not isinstance(chosen, GenerationConfig):
        raise TypeError(f"generation_config must be a GenerationConfig, got {type(chosen).__name__}.")
    config = copy.copy(own if chosen is None else chosen)  # `generate` makes a deep one
    for name, value in vars(own).items():
        if getattr(config, name, None) is None:
            setattr(config, name, value)
    if chosen is not None and chosen.max_length is not None and chosen.max_new_tokens is None:
        config.max_new_tokens = None  # which would go before
    if config.max_new_tokens is None and config.max_length is None:
        config.max_new_tokens = _MAX_NEW_TOKENS
    if config.eos_token_id == own.eos_token_id:
        config.eos_token_id = None  # the template's join them
    return config


def _saved_settings(loaded: GenerationConfig) -> GenerationConfig:
    """What is taken of a generation_config.json, over the released settings.

    Files from before transformers 5 came with the released code, which never read them; of others only what a stranger
    may set is taken. End marks are the template's.
    """
    config = GenerationConfig(max_new_tokens=_MAX_NEW_TOKENS, do_sample=False)
    version = str(loaded.transformers_version)
    if loaded._from_model_config or not version[:1].isdecimal() or version.startswith(("3.", "4.")):
        return config
    for name, (kind, least, most) in _SAVED_SETTINGS.items():
        value = getattr(loaded, name, None)
        is_switch = isinstance(value, bool)  # which Python counts among the integers
        if isinstance(value, kind) and is_switch == (kind is bool) and least <= value <= most:
            setattr(config, name, value)
        elif value is not None:
            logger.warning_once(
                f"generation_config.json: {name}={value!r:.50} is not used; {least} to {most} would be."
            )
    return config


def _check_generation(config: GenerationConfig, given: Mapping[str, Any], known: int) -> None:
    """Refuses arguments of `generate`, given or in its config, that it would explain less well, or too late.

    Args:
        config: the settings beside those given.
        given: arguments of a call.
        known: how many tokens there are.
    """
    settings = {name: value for name, value in {**vars(config), **given}.items() if value is not None}
    for name in ("max_new_tokens", "max_length", "max_cache_len", "num_beams", "num_return_sequences"):
        if name in settings:
            _check_count(name, settings[name])
            if name.startswith("num_") and settings[name] > _MOST_BEAMS:
                raise ValueError(f"{name}={settings[name]}: each holds the whole prompt; {_MOST_BEAMS} are the most.")
    for name, (accepted, reason) in _REFUSED_SETTINGS.items():
        if settings.get(name) not in (None, accepted):
            raise ValueError(f"{name} {reason}. Leave it out.")
    if "offloaded" in str(settings.get("cache_implementation")) and not torch.accelerator.is_available():
        raise ValueError("An offloaded cache_implementation needs an accelerator, and there is none. Leave it out.")
    for name, (wanted, fits) in _SETTING_KINDS.items():
        if name in settings and not fits(settings[name]):
            raise TypeError(f"{name}={settings[name]!r} must be {wanted}.")
    _check_ranges(settings)
    for name in settings:
        if name.endswith("_token_id"):
            _check_setting_ids(name, settings[name], known)


def _check_setting_ids(name: str, given: Any, known: int) -> None:
    """Refuses a setting of `generate` that is no token of a model that knows so many; end marks may be several."""
    ids = given.tolist() if isinstance(given, Tensor) else given
    ids = ids if "eos" in name and isinstance(ids, list | tuple) else [ids]
    if name == "pad_token_id" and ids == [-1]:  # as some write that there is none
        return
    if not all(isinstance(i, Integral) and 0 <= i < known for i in ids):
        raise ValueError(f"{name}={given!r} is no token: this model knows 0 to {known - 1}.")


def _check_ranges(settings: Mapping[str, Any]) -> None:
    """Refuses numbers among settings of `generate` that it would not follow, or fail on."""
    ranges = {**_SETTING_RANGES, **(_SAMPLING_RANGES if settings.get("do_sample") else {})}
    for name, (least, most) in ranges.items():
        value = settings.get(name)
        if value is not None and not (isinstance(value, Real) and least <= value <= most):
            advice = " For the likeliest words leave do_sample out." if name == "temperature" else ""
            raise ValueError(f"{name}={value!r} must be a number from {least} to {most}.{advice}")


def _given_ids(input_ids: Any, arguments: dict[str, Any]) -> Any:
    """The tokens of a prompt, which transformers' `generate` calls `inputs`; takes them out of the arguments.

    Out goes what only losses read, too: a `Trainer` that generates leaves it among the inputs.
    """
    for name in _FOR_LOSSES:
        arguments.pop(name, None)
    inputs = arguments.pop("inputs", None)
    if (input_ids is None) == (inputs is None):
        raise ValueError("generate needs input_ids [B, L] (or inputs, its other name); build them with the processor.")
    return inputs if input_ids is None else input_ids


def _check_inputs(known: int, text: Mapping[str, Any], others: Mapping[str, Any]) -> None:
    """Refuses what can't be a batch, by types and shapes; ids and labels as `_check_token_ids` does.

    Args:
        known: how many tokens there are.
        text: `input_ids` int64 [B, L], and what has its shape or is None.
        others: of which those named like tensors must be some, or None.
    """
    tensors = {"pixel_values", "image_grid_thw", "prompt_masks", "prompt_mask_tiles"}
    for name, value in {**text, **{name: others.get(name) for name in tensors}}.items():
        if not isinstance(value, Tensor | None):
            raise TypeError(f"{name} must be a tensor, got a {type(value).__name__}. Give that of the processor.")
    input_ids = text["input_ids"]
    if input_ids.ndim != 2 or not input_ids.numel():
        raise ValueError(f"input_ids of shape {tuple(input_ids.shape)}: [B, L] is needed, at least one token.")
    _check_token_ids("input_ids", input_ids, known)
    for name, value in text.items():
        if value is not None and value.shape != input_ids.shape:
            raise ValueError(f"{name} {tuple(value.shape)} must have the shape of input_ids, {tuple(input_ids.shape)}.")
    if (labels := text.get("labels")) is not None:
        _check_token_ids("labels", labels, known, ignored=IGNORE_INDEX)


def _may_wait(tensor: Tensor) -> bool:
    """Whether values may be looked at: training on a GPU does not wait for them."""
    return tensor.device.type == "cpu" or not torch.is_grad_enabled()


def _check_token_ids(name: str, ids: Tensor, known: int, ignored: int | None = None) -> None:
    """Refuses what are no tokens of a model that knows so many, but for those to be ignored."""
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"{name} are {ids.dtype}: int64 is needed, the numbers of tokens.")
    if _may_wait(ids):
        ids = ids if ignored is None else ids.masked_fill(ids == ignored, 0)
        lowest, highest = map(int, ids.aminmax())
        if lowest < 0 or highest >= known:
            raise ValueError(f"{name} hold tokens from {lowest} to {highest}; this model knows 0 to {known - 1}.")


def _padded_in_front(text: Mapping[str, Tensor | None]) -> dict[str, Tensor | None]:
    """Moves padding behind texts in front of them, where `generate` goes on.

    Args:
        text: `attention_mask` [B, L], without which there is no padding, and what goes with it: [B, L] or [B, L, ...].
    """
    if (mask := text["attention_mask"]) is None:
        return dict(text)
    behind = (mask.flip(1).cumsum(1) == 0).sum(1, keepdim=True)
    columns = (torch.arange(mask.shape[1], device=mask.device) - behind) % mask.shape[1]
    rows = torch.arange(len(mask), device=mask.device)[:, None]
    return {name: None if tensor is None else tensor[rows, columns] for name, tensor in text.items()}


def _check_against_prompt(
    prompt: Mapping[str, Tensor | None], arguments: Mapping[str, Any], text_config: PreTrainedConfig
) -> None:
    """Refuses prompts that a language model can't read, and settings of `generate` that don't go with a prompt."""
    config = arguments["generation_config"]
    length = prompt.get("inputs_embeds", prompt.get("input_ids")).shape[1]
    advice = "Shorten the question or past_text, or show fewer frames."
    if length > _ABSURDLY_LONG * (most := _most_tokens(text_config)):
        raise ValueError(f"The prompt takes {length} tokens; the model was made for {most}. {advice}")
    if length > most:
        logger.warning_once(f"A prompt takes {length} tokens; the model was made for {most}. {advice}")
    if config.max_new_tokens is None and config.max_length is not None and config.max_length <= length:
        raise ValueError(
            f"max_length={config.max_length} counts the prompt, which takes {length} tokens. Give max_new_tokens."
        )
    in_parts = getattr(config, "prefill_chunk_size", None) is not None
    if "input_ids" not in prompt and arguments.get("assistant_model") is not None:
        raise ValueError("assistant_model can't read pictures as this family gives them. Leave it out.")
    if "input_ids" not in prompt and in_parts:
        raise ValueError("prefill_chunk_size can't cut prompts that are embeddings, as in this family. Leave it out.")
    if in_parts and tuple(map(int, transformers_version.split(".")[:2])) < _PICTURES_IN_PARTS:
        raise ValueError(
            f"transformers {transformers_version} loses pictures where prefill_chunk_size cuts a prompt. Leave it out."
        )


def _rope(config: PreTrainedConfig) -> dict[str, Any]:
    """A language model's settings of rotary positions; none where it has others, as OPT does."""
    return getattr(config, "rope_parameters", None) or {}


def _most_tokens(config: PreTrainedConfig) -> float:
    """How many tokens a language model can tell the places of."""
    stretched = _rope(config).get("factor") or 1
    return getattr(config, "max_position_embeddings", math.inf) * max(1, stretched)


def _check_nothing_is_asked(video: Any, *asked: Any) -> None:
    """Refuses to resume a stream without its video, or with anything that could only shape an answer."""
    if video is None or any(value is not None for value in asked):
        raise ValueError(
            "resume goes on with an answer that is written: give it with video= alone, and how masks are wanted."
        )


def _end_ids(config: GenerationConfig) -> list[int]:
    """The tokens that end an answer."""
    ends = config.eos_token_id
    ends = ends.tolist() if isinstance(ends, Tensor) else ends
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [int(ends)]


def _without_padding(sequences: Tensor, config: GenerationConfig) -> list[Tensor]:
    """Each answer [n] of a batch, up to its end; `generate` fills those that end early up to the longest."""
    if len(sequences) == 1:
        return [sequences[0]]
    ends, answers = sequences.new_tensor(_end_ids(config)), []
    for row in sequences:
        found = torch.isin(row, ends).nonzero()
        if not len(found):  # cut off, or ended by a stop string
            found = (row != config.pad_token_id).nonzero()[-1:]
        answers.append(row[: int(found[0]) + 1] if len(found) else row)
    return answers


def _as_answer(processor: Sa2VAProcessor, question: Sa2VAInputs, new_ids: Tensor, prompts: Tensor) -> Answer:
    """Words of an answer, and what goes with them."""
    prediction = processor.tokenizer.decode(new_ids, skip_special_tokens=False).strip()
    end = processor.missing_end(prediction)
    # A token that stands for a picture, which sampling may write, would be filled with one in the next turn.
    said = processor.decode_continuation(question.input_ids, new_ids).replace(processor.image_token, "")
    return Answer(
        prediction=prediction,
        past_text=f"{question.prompt}{said}{end}\n",
        phrases=processor.phrases(prediction) if question.frames is not None else [],
        prompts=prompts,
    )


def _prompt_cache(cache: Any, num_prompts: int, length: int) -> DynamicCache | None:
    """The prompts' part of a cache that `generate` filled; None if it can't be cut out."""
    if not isinstance(cache, (DynamicCache, StaticCache)) or any(getattr(x, "is_sliding", False) for x in cache.layers):
        return None
    if isinstance(cache, StaticCache):
        if cache.offloading:  # the CPU holds its layers, and the decoder is elsewhere
            return None
        cache = DynamicCache([(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in cache.layers])
    if surplus := cache.get_seq_length() - length:
        cache.crop(-surplus)
    if (rows := len(cache.layers[0].keys)) > num_prompts:  # beams share their prompt
        cache.batch_select_indices(torch.arange(0, rows, rows // num_prompts))
    return cache


class _CompiledCall:
    """A module's call, compiled. A copy or pickle compiles that of the module it comes with.

    transformers would keep a function in this place, which a copy of the module shares and no pickle can hold.
    """

    def __init__(self, module: nn.Module, config: CompileConfig):
        self.__setstate__((module, config))

    def __call__(self, *args, **kwargs) -> Any:
        return self._call(*args, **kwargs)

    def __getstate__(self) -> tuple[nn.Module, CompileConfig]:
        return self._state

    def __setstate__(self, state: tuple[nn.Module, CompileConfig]) -> None:
        self._state = module, config = state
        self._call = torch.compile(module.__call__, **config.to_dict())


def _compile_config(options: dict[str, Any]) -> CompileConfig:
    """Options of `torch.compile` as `generate` takes them; transformers' own mode does not allow several threads."""
    if unknown := sorted(options.keys() - _COMPILE_OPTIONS):
        raise TypeError(f"compile_parts can't use {unknown}: options of torch.compile are {[*_COMPILE_OPTIONS]}.")
    for name, value in options.items():
        if not isinstance(value, kind := _COMPILE_OPTIONS[name]):
            raise TypeError(f"{name}={value!r} can't be given to torch.compile, which takes {kind}.")
    config = CompileConfig(**{"mode": None, **options})
    config._compile_all_devices = True  # transformers would leave a CPU out
    return config


def _check_compilable(parts: Sequence[nn.Module], config: CompileConfig, device: torch.device) -> None:
    """Compiles next to nothing, so that what is missing is told now and not in the middle of an answer."""
    modules = itertools.chain.from_iterable(part.modules() for part in parts)
    if any(getattr(getattr(module, "_hf_hook", None), "offload", False) for module in modules):
        raise ValueError("Weights that are offloaded can't be compiled. Load the model without, or leave the part out.")
    if not parts:
        return
    probe, understood = nn.GELU(), False
    try:
        probe.compile(**config.to_dict())
        understood = True  # else the options are wrong, not what is installed
        probe(torch.zeros(2, device=device))
    except RuntimeError as error:
        reason = str(error).strip().partition("\n")[0]
        if config.backend != "inductor" or not understood:
            raise ValueError(f"torch.compile does not work with {config.to_dict()}: {reason}") from error
        raise OSError(
            f"torch.compile does not work here: {reason}. It needs a C++ compiler on a CPU (g++, clang or MSVC) and "
            "Triton on a GPU. Install it, or do without compile_parts."
        ) from error


def _set_decode_step(model: PreTrainedModel, config: CompileConfig | None) -> None:
    """Has `model.generate` compile its steps after the first, or no longer."""
    settings = model.generation_config
    if config is not None:
        settings.cache_implementation, settings.compile_config = "static", config
        model._compiled_call, model._last_compile_config = _CompiledCall(model, config), config
    elif isinstance(getattr(model, "_compiled_call", None), _CompiledCall):
        settings.cache_implementation = settings.compile_config = None
        del model._compiled_call, model._last_compile_config


def _no_objects(prompts: Tensor) -> MaskPrediction:
    empty = prompts.new_zeros(0, dtype=torch.float32)
    return MaskPrediction(empty.view(0, 1, 1, 1), empty, empty, prompts)


def _scores(prediction: MaskPrediction) -> dict[str, Tensor]:
    return {"iou": _to_host(prediction.iou_scores), "object": _to_host(prediction.object_scores.sigmoid())}


def _to_host(tensor: Tensor) -> Tensor:
    """A tensor on the CPU; off a GPU it is copied while the GPU works on, and complete once that was waited for."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class _Arriving:
    """Frames of a video that `_to_host` copies: a few copies may be on their way, so that the GPU need not wait.

    A frame holds by name tensors, or lists of a tensor's parts, which are joined, and masks encoded if that is asked
    for. Those that have come leave pinned memory, of which there is little: torch takes a power of two for each tensor,
    and keeps it for ever.

    Args:
        as_rle: make "masks" run-length encodings.
    """

    def __init__(self, as_rle: bool = False):
        self._as_rle = as_rle
        self._frames: list[dict[str, Any]] = []
        self._on_their_way: deque[torch.cuda.Event] = deque()  # of the last frames

    def add(self, frame: dict[str, Any], device: torch.device) -> None:
        """Takes the next frame, whose tensors come from `device`."""
        self._frames.append(frame if device.type == "cuda" else self._complete(frame))
        if device.type == "cuda":
            self._on_their_way.append(torch.cuda.current_stream(device).record_event())
            if len(self._on_their_way) > _MOST_ON_THEIR_WAY:
                self._receive()

    def wait(self) -> list[dict[str, Any]]:
        """All frames, complete."""
        while self._on_their_way:
            self._receive()
        return self._frames

    def _receive(self) -> None:
        index = len(self._frames) - len(self._on_their_way)
        self._on_their_way.popleft().synchronize()
        self._frames[index] = self._complete(self._frames[index], copied=True)

    def _complete(self, frame: dict[str, Any], copied: bool = False) -> dict[str, Any]:
        if self._as_rle:
            frame["masks"] = [code for part in frame["masks"] for code in masks_to_rle(part)]
        return {name: _joined(value, copied) for name, value in frame.items()}


def _joined(value: Tensor | list[Any], copied: bool) -> Any:
    """A tensor, or the parts [n, ...] of one put together; a list of anything else stays."""
    parts = [value] if isinstance(value, Tensor) else value
    if not (parts and isinstance(parts[0], Tensor)):
        return value
    return torch.cat(parts) if copied or len(parts) > 1 else parts[0]


def _as_clip(frames: Tensor, side: int) -> Tensor:
    """Checks a sample's frames and gives an image its frame axis: [T, 3, S, S]."""
    if not isinstance(frames, Tensor):
        raise TypeError(f"grounding_pixel_values hold a {type(frames).__name__}. Give a tensor [T, 3, {side}, {side}].")
    if frames.shape[-3:] != (3, side, side) or not frames.numel():
        raise ValueError(
            f"grounding_pixel_values of shape {tuple(frames.shape)}: [T, 3, {side}, {side}] is needed, at least one "
            "frame, as processor.grounding_pixel_values makes them."
        )
    return frames.reshape(-1, 3, side, side)


def _share_of_step(labels: Tensor | None, num_items: Tensor | int | None) -> Tensor | float:
    """Which part of a step's supervised tokens a batch has: a tensor, or 1 where nobody tells of a step."""
    return 1.0 if labels is None or num_items is None else (labels[:, 1:] != IGNORE_INDEX).sum() / num_items


def _mask_target(masks: Tensor, num_objects: int, num_frames: int) -> Tensor:
    """Checks a sample's masks and gives an image's its frame axis: [objects, T, h, w]."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"mask_labels hold a {type(masks).__name__}. Give a tensor [objects, frames, h, w] of 0..1.")
    masks = masks.unsqueeze(1) if masks.ndim == 3 and num_frames == 1 else masks
    if masks.ndim != 4 or masks.shape[:2] != (num_objects, num_frames) or not masks.numel():
        raise ValueError(
            f"mask_labels of shape {tuple(masks.shape)} do not fit {num_objects} [SEG] tokens and {num_frames} frames: "
            f"[{num_objects}, {num_frames}, h, w] is needed."
        )
    if not 0 <= masks.min() <= masks.max() <= 1:
        raise ValueError(
            f"mask_labels hold values from {masks.min():g} to {masks.max():g}. Give 0..1: divide by 255, or masks > 0."
        )
    return masks


def _resized_target(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """[objects, T, h, w] -> float32 at SAM 2's input size, four times that of the logits."""
    return F.interpolate(masks.float(), size=[4 * side for side in size], mode="area")


def _point_losses(masks: Tensor, targets: Tensor, config: Sa2VAChatConfig) -> dict[str, Tensor]:
    """Binary cross entropy and dice loss at sampled points, summed over objects.

    Args:
        masks: logits [N, C, h, w], C candidates of N objects, averaged.
        targets: [N, 1, H, W] in 0..1.
    """
    logits, candidates = masks.flatten(0, 1).unsqueeze(1), masks.shape[1]
    if config.num_points:
        with torch.no_grad():
            points = _uncertain_points(logits, config)
        logits, wanted = _sample(logits, points), _sample(targets.repeat_interleave(candidates, dim=0), points)
    else:
        wanted = F.interpolate(targets, size=logits.shape[-2:], mode="area").repeat_interleave(candidates, dim=0)
    logits, wanted = logits.flatten(1), wanted.flatten(1)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none").mean(dim=1)
    probability = logits.sigmoid()
    overlap = 2 * (probability * wanted).sum(dim=1)
    dice = 1 - (overlap + 1) / (probability.sum(dim=1) + wanted.sum(dim=1) + 1)
    return {"mask_loss": cross_entropy.sum() / candidates, "dice_loss": dice.sum() / candidates}


def _uncertain_points(logits: Tensor, config: Sa2VAChatConfig) -> Tensor:
    """Points [N, P, 2] in 0..1 as (x, y), mostly where logits [N, 1, h, w] are near 0 (PointRend, arXiv 1912.08193)."""
    count, device = config.num_points, logits.device
    candidates = torch.rand(len(logits), int(count * config.oversample_ratio), 2, device=device)
    important = int(count * config.importance_sample_ratio)
    uncertainty = -_sample(logits, candidates).flatten(1).abs()
    chosen = uncertainty.topk(important, dim=1).indices.unsqueeze(-1).expand(-1, -1, 2)
    rest = torch.rand(len(logits), count - important, 2, device=device)
    return torch.cat([candidates.gather(1, chosen), rest], dim=1)


def _sample(maps: Tensor, points: Tensor) -> Tensor:
    """Bilinear values [N, 1, P] of maps [N, 1, h, w] at points [N, P, 2] in 0..1."""
    return F.grid_sample(maps, 2 * points.unsqueeze(2) - 1, mode="bilinear", align_corners=False).squeeze(-1)


@torch.no_grad()
def _mask_iou(logits: Tensor, targets: Tensor) -> Tensor:
    """IoU [N, C] of thresholded candidates [N, C, h, w] with targets [N, 1, H, W]; two empty masks agree."""
    predicted = logits > 0
    wanted = F.interpolate(targets, size=logits.shape[-2:], mode="area") > 0.5
    union = (predicted | wanted).flatten(2).sum(dim=-1)
    overlap = (predicted & wanted).flatten(2).sum(dim=-1)
    return torch.where(union > 0, overlap / union.clamp(min=1), 1.0)


class SplitGroupedHeads(ConversionOps):
    """InternLM2's fused attention -> queries, keys and values.

    The rows of `wqkv` [(heads + 2 * kv_heads) * head_dim, ...] are, for every key-value head, its query heads, then its
    key, then its value.
    """

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs) -> dict[str, Tensor]:
        """Called by transformers with one tensor (weight or bias), and the names of the three."""
        (fused,) = _tensors(input_dict, source_patterns)
        kv_heads, group = _head_groups(config)
        heads = fused.unflatten(0, (kv_heads, group + 2, -1))  # [kv_heads, group + 2, head_dim, ...]
        parts = heads.split((group, 1, 1), dim=1)
        return {name: part.flatten(0, 2).contiguous() for name, part in zip(target_patterns, parts, strict=True)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What saving does."""
        return FuseGroupedHeads()


class FuseGroupedHeads(ConversionOps):
    """The reverse of `SplitGroupedHeads`."""

    @torch.no_grad()
    def convert(self, input_dict, source_patterns, target_patterns, config, **kwargs) -> dict[str, Tensor]:
        """Called by transformers with queries, keys and values, and the name of the fused tensor."""
        kv_heads, group = _head_groups(config)
        parts = zip(_tensors(input_dict, source_patterns), (group, 1, 1), strict=True)
        heads = [part.unflatten(0, (kv_heads, count, -1)) for part, count in parts]
        return {target_patterns[0]: torch.cat(heads, dim=1).flatten(0, 2)}

    @property
    def reverse_op(self) -> ConversionOps:
        """What loading does."""
        return SplitGroupedHeads()


def _peft() -> ModuleType:
    try:
        import peft  # guarded, or transformers would demand it before it loads this file from a checkpoint
    except ImportError as error:
        raise ImportError("Adapters need PEFT: pip install peft") from error
    return peft


class ModuleNames:
    """What a model's modules and tensors are called here, and in the released code.

    Attributes:
        released: for each name here, the released one, which three modules share if their tensors are fused there.
        natives: for each name of the released code that is none here, the names here that share it.
        splits: for the released names of fused tensors, the operation that splits them.
    """

    def __init__(self, model: PreTrainedModel):
        rules = [(rule.reverse_transform(), rule) for rule in _released_layout(model)[::-1]]
        self.released: dict[str, str] = {}
        self.splits: dict[str, ConversionOps] = {}
        parameters = model.named_parameters(remove_duplicate=False)  # tied ones have two names
        for name, _ in (*model.named_modules(), *parameters, *model.named_buffers()):
            released, split = name, None
            for reverse, rule in rules:
                released, matched = reverse.rename_source_key(released)
                if matched is not None and isinstance(rule, WeightConverter):
                    split = rule.operations[0]
            self.released[name] = released
            if split is not None:
                self.splits[released] = split
        self.natives: dict[str, list[str]] = {}
        for name, released in self.released.items():
            if released not in self.released:
                self.natives.setdefault(released, []).append(name)

    @classmethod
    def of_checkpoint(
        cls, name_or_path: str, config: PreTrainedConfig | str | os.PathLike | None, hub_arguments: dict[str, Any]
    ) -> "ModuleNames":
        """Those of a checkpoint that is yet to be loaded, from its config alone."""
        if not isinstance(config, PreTrainedConfig):
            config = Sa2VAChatConfig.from_pretrained(config or name_or_path, **hub_arguments)
        with torch.device("meta"):
            return cls(Sa2VAChatModel(copy.deepcopy(config)))

    def at(self, name: str) -> list[str]:
        """What is called `name` in the released code and not here: one module, or the parts of one; else the name."""
        return self.natives.get(name, [name])

    def native_tensors(self, name: str, tensor: Tensor, config: PreTrainedConfig) -> dict[str, Tensor]:
        """A parameter of this name, in the released code or here, as the one or three that it is here."""
        names = self.at(name)
        if name not in self.splits:
            return {names[0]: tensor}
        if len(names) < 3:  # PEFT has wrapped some
            return {name: tensor}
        return self.splits[name].convert({"fused": tensor}, ["fused"], names, config=config)

    def native(self, targets: str | Sequence[str], is_target: Callable[[str], Any]) -> str | Sequence[str]:
        """PEFT's targets (a regular expression, or ends of names), translated if only released names meet them."""
        found = {name for name in self.released if is_target(name)}
        more = {name for name, released in self.released.items() if is_target(released)} - found
        if not more:
            return targets
        kept = found if isinstance(targets, str) else [t for t in targets if any(_is_target(n, [t]) for n in found)]
        return sorted({*kept, *more})

    def patterns(self, pattern: str) -> list[str]:
        """A key of PEFT's rank_pattern, a regular expression of ends of names, and what only released names meet."""
        matches = re.compile(rf"(.*\.)?({pattern})\Z").match
        more = [name for name, released in self.released.items() if matches(released) and not matches(name)]
        kept = [pattern] if not more or any(map(matches, self.released)) else []
        return [*kept, *map(re.escape, more)]


def _is_target(name: str, ends: Sequence[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") for end in ends)


def native_adapter_weights(model: PreTrainedModel, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's weights under the names used here; those of a fused tensor are split as it is."""
    modules = ModuleNames(model)
    output = {}
    for key, tensor in weights.items():
        prefix = _ADAPTER_PREFIX if key.startswith(_ADAPTER_PREFIX) else ""
        words = key.removeprefix(prefix).split(".")
        heads = [".".join(words[:end]) for end in range(len(words), 0, -1)]
        released = next((head for head in heads if head in modules.natives), "")
        rest = key.removeprefix(prefix + released)
        names = modules.natives.get(released, [""])
        parts = [tensor] if len(names) == 1 else _split_adapter(rest, tensor, names, modules.splits[released], model)
        output |= {f"{prefix}{name}{rest}": part for name, part in zip(names, parts, strict=True)}
    return output


def merged_with_adapter(model: PreTrainedModel, folder: str | os.PathLike) -> PreTrainedModel:
    """A model with an adapter's changes in its own weights.

    Args:
        model: `Sa2VAChatModel`, which is changed.
        folder: holds adapter_config.json and weights, of PEFT or of `save_pretrained`, also trained on the released
            code's modules.

    Raises:
        ValueError: the adapter has other modules than the model, or can't be merged.
    """
    peft = _peft()
    config = model.adapter_config(peft.PeftConfig.from_pretrained(folder))
    weights = native_adapter_weights(model, peft.utils.load_peft_weights(str(folder), device="cpu"))
    wrapped = peft.get_peft_model(model, config)
    expected = peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    report = peft.set_peft_model_state_dict(wrapped, weights)
    if lost := sorted({*report.unexpected_keys, *(expected.keys() - weights.keys())}):
        raise ValueError(f"{lost} are of the adapter or of the model only.")
    return wrapped.merge_and_unload()


def _split_adapter(
    what: str, tensor: Tensor, names: list[str], split: ConversionOps, model: PreTrainedModel
) -> Sequence[Tensor]:
    """The parts of a fused module's adapter: LoRA's A is the same for all, B has a row for each output.

    Args:
        what: the end of the tensor's name; nothing if it is the fused tensor itself, trained in full.
    """
    if what.startswith((".lora_A", ".lora_embedding_A")):
        return [tensor.clone() for _ in names]
    if what and not what.startswith((".lora_B", ".lora_magnitude_vector")):
        raise ValueError(
            f"The adapter's {what[1:]} belongs to a tensor of the released code that is {names} here, and can't be "
            "split. Only LoRA and DoRA adapters of fused tensors can be loaded."
        )
    parts = split.convert({"fused": tensor}, ["fused"], names, config=model.config)
    return [parts[name] for name in names]


class EachQuantizedConverter(WeightConverter):
    """A converter from one tensor to several, each of which is quantized for itself.

    torchao's operation takes one tensor and would drop the others.
    """

    def convert(self, layer_name, model=None, config=None, hf_quantizer=None, loading_info=None) -> dict[str, Tensor]:
        """Called by transformers when the tensors of a layer are read."""
        parts = super().convert(layer_name, model=model, config=config, loading_info=loading_info)
        if hf_quantizer is None or hf_quantizer.pre_quantized:
            return parts
        quantized = {}
        for name, part in parts.items():
            if hf_quantizer.param_needs_quantization(model, name):
                missing = loading_info.missing_keys if loading_info else None
                operation = hf_quantizer.get_quantize_ops()
                part = operation.convert({name: part}, full_layer_name=name, model=model, missing_keys=missing)
            quantized |= part if isinstance(part, dict) else {name: part}
        return quantized


def _head_groups(config: PreTrainedConfig) -> tuple[int, int]:
    """How many key-value heads a language model has, and how many query heads share each."""
    config = config.get_text_config()
    return config.num_key_value_heads, config.num_attention_heads // config.num_key_value_heads


def _tensors(input_dict: dict[str, Any], names: Sequence[str]) -> list[Tensor]:
    """What transformers collected under these names: a tensor each, when loading in a list of one."""
    return [found[0] if isinstance(found, list) else found for found in (input_dict[name] for name in names)]


# What the released checkpoints call things, and what the libraries do. Reversed when saving.
register_checkpoint_conversion_mapping(
    "Sa2VAVisionModel",
    [
        WeightRenaming("class_embedding", "cls_token"),
        WeightRenaming("position_embedding", "position_embeddings"),
        WeightRenaming("patch_embedding", "patch_embeddings.projection"),
        WeightRenaming("encoder.layers", "encoder.layer"),
        WeightRenaming("attn.proj", "attention.projection_layer"),
        WeightRenaming("attn.q_norm", "attention.q_norm"),
        WeightRenaming("attn.k_norm", "attention.k_norm"),
        WeightRenaming("norm1", "layernorm_before"),
        WeightRenaming("norm2", "layernorm_after"),
        WeightRenaming("ls1", "lambda_1"),
        WeightRenaming("ls2", "lambda_2"),
        WeightConverter(
            "attn.qkv",
            ["attention.q_proj", "attention.k_proj", "attention.v_proj"],
            operations=[Chunk(dim=0)],
        ),
    ],
    overwrite=True,
)
register_checkpoint_conversion_mapping(
    "Sa2VAInternLM2ForCausalLM",
    [
        WeightRenaming("model.tok_embeddings", "model.embed_tokens"),
        WeightRenaming("attention.wo", "self_attn.o_proj"),
        WeightRenaming("feed_forward.w1", "mlp.gate_proj"),
        WeightRenaming("feed_forward.w3", "mlp.up_proj"),
        WeightRenaming("feed_forward.w2", "mlp.down_proj"),
        WeightRenaming("attention_norm", "input_layernorm"),
        WeightRenaming("ffn_norm", "post_attention_layernorm"),
        WeightRenaming("output", "lm_head"),
        EachQuantizedConverter(
            "attention.wqkv",
            ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
            operations=[SplitGroupedHeads()],
        ),
    ],
    overwrite=True,
)
_register_layout("Sa2VAChatModel")

__all__ = [
    "Sa2VAChatModel",
    "Sa2VAChatModelQwen",
    "Sa2VAFrame",
    "Sa2VAInternLM2ForCausalLM",
    "Sa2VAOutput",
    "Sa2VAStream",
    "Sa2VATrainingOutput",
    "Sa2VAVisionModel",
]

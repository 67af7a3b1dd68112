"""Configuration of Sa2VA (arXiv 2501.04001): every number a checkpoint needs, no tensors.

* `Sa2VAVisionConfig`    InternViT, in the field names of the released config.json
* `Sa2VAGroundingConfig` SAM 2: its sizes, how key frames are chosen, what memory keeps
* `Sa2VAChatConfig`      the whole model; reads a released config.json unchanged and writes one the official code reads
"""

import copy
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

FRAME_SAMPLINGS = ("first", "uniform")


class Sa2VAVisionConfig(PreTrainedConfig):
    """InternViT as the released checkpoints describe it (`intern_vit_6b`, which also names the 300M tower).

    Defaults are InternViT-300M-448px. `qk_normalization` normalises queries and keys over their full width;
    `norm_type` is "layer_norm" (300M) or "rms_norm" (6B).
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        hidden_size: int = 1024,
        intermediate_size: int = 4096,
        num_hidden_layers: int = 24,
        num_attention_heads: int = 16,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 448,
        qkv_bias: bool = True,
        qk_normalization: bool = False,
        norm_type: str = "layer_norm",
        hidden_act: str = "gelu",
        layer_norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 1.0,
        **kwargs,
    ):
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.qkv_bias = qkv_bias
        self.qk_normalization = qk_normalization
        self.norm_type = norm_type
        self.hidden_act = hidden_act
        self.layer_norm_eps = layer_norm_eps
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.drop_path_rate = drop_path_rate
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        super().__init__(**kwargs)


class Sa2VAGroundingConfig(PreTrainedConfig):
    """SAM 2 inside Sa2VA. Defaults are the released SAM 2 Hiera-L at 1024 pixels.

    Sizes (`embed_dim` ... `max_object_pointers`) follow `sam2_hiera_l.yaml` of the `sam2` package. The rest is ours:

    num_key_frames: how many frames of a video the language model sees and prompts (released: 5).
    frame_sampling: "first" (released) or "uniform", which the paper's ablation prefers.
    memory_dtype: dtype in which memory features are kept between frames. "bfloat16" as released, None keeps them in
        the dtype of the model.
    max_objects_per_batch: objects that go through decoder and memory attention at once; more are taken in chunks.
    """

    model_type = "sa2va_grounding"
    base_config_key = "grounding_config"

    def __init__(
        self,
        image_size: int = 1024,
        embed_dim: int = 144,
        num_heads: int = 2,
        stages: list[int] | None = None,
        global_att_blocks: list[int] | None = None,
        window_spec: list[int] | None = None,
        window_pos_embed_bkg_spatial_size: list[int] | None = None,
        backbone_channel_list: list[int] | None = None,
        d_model: int = 256,
        mem_dim: int = 64,
        memory_attention_layers: int = 4,
        memory_attention_dim_feedforward: int = 2048,
        memory_attention_dropout: float = 0.1,
        mask_decoder_mlp_dim: int = 2048,
        iou_head_hidden_dim: int = 256,
        num_maskmem: int = 7,
        max_object_pointers: int = 16,
        num_key_frames: int = 5,
        frame_sampling: str = "first",
        memory_dtype: str | None = "bfloat16",
        max_objects_per_batch: int = 16,
        **kwargs,
    ):
        if frame_sampling not in FRAME_SAMPLINGS:
            raise ValueError(f"frame_sampling={frame_sampling!r} is unknown. Use one of {FRAME_SAMPLINGS}.")
        self.image_size = image_size
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.stages = list(stages or (2, 6, 36, 4))
        self.global_att_blocks = list((23, 33, 43) if global_att_blocks is None else global_att_blocks)
        self.window_spec = list(window_spec or (8, 4, 16, 8))
        self.window_pos_embed_bkg_spatial_size = list(window_pos_embed_bkg_spatial_size or (7, 7))
        self.backbone_channel_list = list(backbone_channel_list or (embed_dim * 2**stage for stage in (3, 2, 1, 0)))
        self.d_model = d_model
        self.mem_dim = mem_dim
        self.memory_attention_layers = memory_attention_layers
        self.memory_attention_dim_feedforward = memory_attention_dim_feedforward
        self.memory_attention_dropout = memory_attention_dropout
        self.mask_decoder_mlp_dim = mask_decoder_mlp_dim
        self.iou_head_hidden_dim = iou_head_hidden_dim
        self.num_maskmem = num_maskmem
        self.max_object_pointers = max_object_pointers
        self.num_key_frames = num_key_frames
        self.frame_sampling = frame_sampling
        self.memory_dtype = memory_dtype
        self.max_objects_per_batch = max_objects_per_batch
        super().__init__(**kwargs)


def _sub_config(config_class: type[PreTrainedConfig], value: Any, name: str) -> PreTrainedConfig:
    """Builds `config_class` from None (defaults), a dict or an instance."""
    if isinstance(value, PreTrainedConfig):
        return value
    if value is None or isinstance(value, dict):
        return config_class(**(value or {}))
    raise TypeError(f"{name} must be a dict, a config or None, got {type(value).__name__}.")


def _language_config(value: Any) -> PreTrainedConfig:
    """Builds the language model's config by its `model_type` (Qwen2 without one, as in Sa2VA-1B and -4B).

    Raises:
        ValueError: transformers has no model of this type.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or {})
    model_type = value.pop("model_type", "qwen2")
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"llm_config.model_type={model_type!r} is not a language model this version can build. Qwen2, Qwen3 and "
            "every other causal language model type that transformers knows are accepted."
        )
    value.setdefault("tie_word_embeddings", False)  # every released checkpoint stores both matrices
    return CONFIG_MAPPING[model_type](**value)


def _with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Adds `rope_theta` and `rope_scaling`, which transformers < 5 and so the official code read instead."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        scaled = rope.get("rope_type", "default") != "default"
        config["rope_scaling"] = {**rope, "type": rope["rope_type"]} if scaled else None
    return config


class Sa2VAChatConfig(PreTrainedConfig):
    """Sa2VA: InternViT + language model + SAM 2. Defaults are the released behaviour.

    Args:
        vision_config: `Sa2VAVisionConfig` or dict.
        llm_config: config or dict of the language model, chosen by its `model_type`.
        grounding_config: `Sa2VAGroundingConfig` or dict. Released files have none: SAM 2 Hiera-L at 1024.
        template: prompt template: "qwen_chat", "internlm2_chat" or "phi3_chat".
        select_layer: layer of the vision tower whose states are used, -1 is the last.
        downsample_ratio, ps_version: pixel shuffle between vision tower and projector.
        min_dynamic_patch, max_dynamic_patch, use_thumbnail, force_image_size: tiling of images.
        mask_loss_weight, dice_loss_weight: weights of the mask losses beside the text loss of weight 1 (2.0 and 0.5 in
            the official recipe).
        iou_loss_weight, object_score_loss_weight: weights that train SAM 2's own two scores; 0 as in the recipe, which
            keeps SAM 2's. Needed when SAM 2 is trained from scratch.
        num_points, oversample_ratio, importance_sample_ratio: PointRend sampling of the mask losses; `num_points=0`
            takes every pixel.
        supervise_all_masks: train all three candidate masks of SAM 2 rather than only the one it picks.

    Raises:
        ValueError, TypeError: a sub-config of unknown type, or an unknown `frame_sampling`.
    """

    model_type = "sa2va_chat"
    is_composition = True
    sub_configs = {
        "vision_config": Sa2VAVisionConfig,
        "llm_config": AutoConfig,
        "grounding_config": Sa2VAGroundingConfig,
    }

    def __init__(
        self,
        vision_config=None,
        llm_config=None,
        grounding_config=None,
        template: str = "qwen_chat",
        select_layer: int = -1,
        force_image_size: int = 448,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 12,
        mask_loss_weight: float = 2.0,
        dice_loss_weight: float = 0.5,
        iou_loss_weight: float = 0.0,
        object_score_loss_weight: float = 0.0,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        supervise_all_masks: bool = False,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.vision_config = _sub_config(Sa2VAVisionConfig, vision_config, "vision_config")
        self.llm_config = _language_config(llm_config)
        self.grounding_config = _sub_config(Sa2VAGroundingConfig, grounding_config, "grounding_config")
        self.template = template
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.mask_loss_weight = mask_loss_weight
        self.dice_loss_weight = dice_loss_weight
        self.iou_loss_weight = iou_loss_weight
        self.object_score_loss_weight = object_score_loss_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.supervise_all_masks = supervise_all_masks
        self.tie_word_embeddings = tie_word_embeddings
        kwargs["hidden_size"] = self.llm_config.hidden_size
        super().__init__(**kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The language model's config, where transformers looks for vocabulary, cache and generation settings."""
        return self.llm_config

    def to_dict(self) -> dict[str, Any]:
        """As stored in config.json: readable by this package and, key by key, by the official code."""
        output = super().to_dict()
        output["llm_config"] = _with_legacy_rope(copy.deepcopy(output["llm_config"]))
        return output


__all__ = ["Sa2VAChatConfig", "Sa2VAGroundingConfig", "Sa2VAVisionConfig"]

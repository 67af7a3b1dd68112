"""Configuration of Sa2VA (arXiv 2501.04001): every number a checkpoint needs, no tensors.

* `Sa2VAVisionConfig`    InternViT, in the field names of the released config.json
* `Sa2VAInternLM2Config` InternLM2, likewise, as the Llama that it is
* `Sa2VAGroundingConfig` SAM 2: its sizes, how key frames are chosen, what memory keeps
* `Sa2VAChatConfig`      the whole model; reads a released config.json unchanged and writes one the official code reads
* `Sa2VAChatConfigQwen`  the same around Qwen2.5-VL or Qwen3-VL; `Sa2VAChatConfig(text_config=...)` makes one
* `auto_map`, `copy_code` what makes a saved checkpoint load with `trust_remote_code` where this package is not
"""

import json
import math
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

from transformers import CONFIG_MAPPING, AutoConfig, LlamaConfig, PreTrainedConfig

FRAME_SAMPLINGS = ("first", "uniform")
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
QWEN_VL_TYPES = ("qwen2_5_vl", "qwen3_vl")
# What the official code of these language models accepts in a rope_scaling of a kind that it knows; it refuses more.
_ROPE_SCALING_KEYS = {
    ("internlm2", "linear"): ("type", "factor"),
    ("internlm2", "dynamic"): ("type", "factor"),
    ("phi3", "longrope"): ("type", "short_factor", "long_factor"),
}
# What a config.json may ask for, far beyond every released checkpoint. A number outside is damage or an attack, and is
# refused before anything of its size is made. Language models have many names for the same.
_LAYERS = ("num_hidden_layers", "num_layers", "n_layers", "n_layer", "depth")
_HEADS = ("num_attention_heads", "num_key_value_heads", "n_head", "n_heads", "num_heads", "mask_decoder_num_heads")
_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "num_labels", "max_object_pointers")
_WIDTHS = ("hidden_size", "intermediate_size", "head_dim", "n_embd", "n_inner", "ffn_dim", "out_hidden_size")
_SAM2_WIDTHS = ("embed_dim", "d_model", "mem_dim", "memory_attention_dim_feedforward", "mask_decoder_mlp_dim")
_EPSILONS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon")
_MAX_LAYERS = 200  # each takes time to build, and is a module of many parts
_LIMITS: dict[str, tuple[int, int]] = {
    **dict.fromkeys((*_LAYERS, "stages"), (1, _MAX_LAYERS)),
    **dict.fromkeys((*_HEADS, "patch_size", "num_channels"), (1, 1000)),
    **dict.fromkeys(("max_dynamic_patch", "num_maskmem", "window_spec"), (1, 1000)),
    **dict.fromkeys((*_COUNTS, "min_dynamic_patch", "window_pos_embed_bkg_spatial_size"), (0, 1000)),
    **dict.fromkeys((*_WIDTHS, *_SAM2_WIDTHS, "iou_head_hidden_dim", "backbone_channel_list"), (1, 2**18)),
    **dict.fromkeys(("image_size", "force_image_size", "temporal_patch_size", "spatial_merge_size"), (0, 2**13)),
    **dict.fromkeys(("num_key_frames", "max_objects_per_batch"), (1, 10**6)),
    **dict.fromkeys(("vocab_size", "num_points", "num_position_embeddings"), (0, 2**24)),
    **dict.fromkeys(("max_position_embeddings", "n_positions"), (1, 2**27)),
    "memory_attention_layers": (1, 32),
    "select_layer": (-1000, 1000),
    "max_cond_frames_in_attn": (-1, 1000),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "downsample_ratio": (1 / 16, 1),
    "oversample_ratio": (1, 100),
    "importance_sample_ratio": (0, 1),
    "rope_theta": (1, 10**15),
    "factor": (1 / 1000, 10**6),  # of rope_scaling
    **dict.fromkeys(_EPSILONS, (0, 1)),
}
_BOUNDS = {**_LIMITS, **_NUMBERS}
_MAX_INTEGER, _MAX_ITEMS, _MAX_PARAMETERS, _MAX_DEPTH = 2**31, 1000, 10**12, 16
_ENDLESS = ("time_step_limit",)  # of Mamba, infinity by default
_DTYPES = ("bfloat16", "float16", "float32", "float64")
# Where code and weights come from and which kernels run is the caller's choice, not the checkpoint's.
_NOT_OF_A_FILE = frozenset(
    ("name_or_path", "transformers_weights", "attn_implementation", "experts_implementation", "trust_remote_code")
)
_NO_SETTINGS = frozenset({"attribute_map", "sub_configs", "sub_configs_defaults", "base_config_key"})
PROMPT_DECODER = "sam_mask_decoder_modified"  # the module, and so the part of weight names, that only Sa2VA-i has
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_WEIGHT_FILE = re.compile(r"[^/\\:\0]+\.safetensors")  # beside the index that names it
_PROMPT_DECODER_KEY = f"grounding_encoder.sam2_model.{PROMPT_DECODER}.iou_token.weight"
CODE_FILES = (
    "configuration_sa2va.py",
    "hub_upload.py",
    "modeling_sa2va.py",
    "processing_sa2va.py",
    "sam2_decoder.py",
)


def auto_map(is_qwen_vl: bool) -> dict[str, str]:
    """Which class of which file each Auto class takes; transformers compares the names, so they are the real ones."""
    ending = "Qwen" if is_qwen_vl else ""
    return {
        "AutoConfig": f"configuration_sa2va.Sa2VAChatConfig{ending}",
        "AutoModel": f"modeling_sa2va.Sa2VAChatModel{ending}",
        "AutoModelForCausalLM": f"modeling_sa2va.Sa2VAChatModel{ending}",
        "AutoModelForImageTextToText": f"modeling_sa2va.Sa2VAChatModel{ending}",
        "AutoModelForMultimodalLM": f"modeling_sa2va.Sa2VAChatModel{ending}",
        "AutoProcessor": f"processing_sa2va.Sa2VAProcessor{ending}",
    }


def copy_code(folder: str | Path) -> list[Path]:
    """Copies the files that `auto_map` points to into a checkpoint's folder, which is made if need be.

    Returns:
        The copies. Where this code itself runs from a checkpoint, transformers may not have fetched all files.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Path(__file__).with_name(name) for name in CODE_FILES]
    copies = {source: folder / source.name for source in sources if source.is_file()}
    for source, target in copies.items():
        if not (target.exists() and target.samefile(source)):
            _replace_with_copy(source, target)
    return list(copies.values())


def _replace_with_copy(source: Path, target: Path) -> None:
    """Replaces a file by a copy of another, at once. A link is replaced, not followed."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        shutil.copyfile(source, temporary)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


class Sa2VAVisionConfig(PreTrainedConfig):
    """InternViT as the released checkpoints describe it (`intern_vit_6b`, which also names the 300M tower).

    Defaults are InternViT-300M-448px. `qk_normalization` normalises queries and keys over their full width;
    `norm_type` is "layer_norm" (300M) or "rms_norm" (6B).
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_channels: int = 3
    patch_size: int = 14
    image_size: int = 448
    qkv_bias: bool = True
    qk_normalization: bool = False
    norm_type: str = "layer_norm"
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    drop_path_rate: float = 0.0
    initializer_range: float = 0.02
    initializer_factor: float = 1.0

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        self.validate()  # transformers checks by itself only what its decorator `strict` has seen


def _check_sam2_sizes(image_size: int, stages: list[int], window_spec: list[int]) -> None:
    if len(stages) != 4 or sum(stages) > _MAX_LAYERS:
        raise ValueError(
            f"stages={stages} must be the numbers of blocks in SAM 2's 4 stages, up to {_MAX_LAYERS} in all."
        )
    # The image encoder halves five times; its finest map, a quarter of the side, is tiled by the first window.
    unit = math.lcm(32, 4 * window_spec[0])
    if image_size < 1 or image_size % unit:
        raise ValueError(
            f"grounding_config.image_size={image_size} does not suit SAM 2: use a multiple of {unit}, such as 1024."
        )


class Sa2VAGroundingConfig(PreTrainedConfig):
    """SAM 2 inside Sa2VA. Defaults are the released SAM 2 Hiera-L at 1024 pixels.

    Sizes (`embed_dim` ... `max_object_pointers`) follow `sam2_hiera_l.yaml` of the `sam2` package. The rest is ours:

    num_key_frames: how many frames of a video the language model sees and prompts (released: 5). A loaded model's
        processor keeps what it found at its first call; give `num_frames=` in a call, then.
    frame_sampling: "first" (released) or "uniform", which the paper's ablation prefers and Sa2VA-i was made for.
    separate_prompt_decoder: Sa2VA-i: a mask decoder of its own (`sam_mask_decoder_modified`) answers the prompts, and
        its masks are what the plain decoder tracks. None, as in every released config.json, means that the weights
        tell: see `Sa2VAChatConfig.from_dict`.
    max_cond_frames_in_attn: how many key frames memory attention looks at, the closest ones. -1 is all, as released.
        May be set on a loaded model, `model.config.grounding_config.max_cond_frames_in_attn = 2`: each costs as much
        as one of the last tracked frames.
    memory_dtype: dtype in which memory features are kept between frames. "bfloat16" as released, None keeps them in
        the dtype of the model.
    max_objects_per_batch: objects that go through decoder and memory attention at once; more are taken in chunks.

    Raises:
        ValueError: an unknown `frame_sampling` or `memory_dtype`, other than 4 `stages`, an `image_size` that SAM 2
            can't halve and tile (it must be a multiple of 32, and of four times the first of `window_spec`), or no
            number of frames.
    """

    model_type = "sa2va_grounding"
    base_config_key = "grounding_config"

    image_size: int = 1024
    embed_dim: int = 144
    num_heads: int = 2
    stages: list[int] | None = None
    global_att_blocks: list[int] | None = None
    window_spec: list[int] | None = None
    window_pos_embed_bkg_spatial_size: list[int] | None = None
    backbone_channel_list: list[int] | None = None
    d_model: int = 256
    mem_dim: int = 64
    memory_attention_layers: int = 4
    memory_attention_dim_feedforward: int = 2048
    memory_attention_dropout: float = 0.1
    mask_decoder_mlp_dim: int = 2048
    mask_decoder_num_heads: int = 8
    mask_decoder_attention_downsample_rate: int = 2
    iou_head_hidden_dim: int = 256
    num_maskmem: int = 7
    max_object_pointers: int = 16
    max_cond_frames_in_attn: int = -1
    num_key_frames: int = 5
    frame_sampling: str | None = None
    separate_prompt_decoder: bool | None = None
    memory_dtype: str | None = "bfloat16"
    max_objects_per_batch: int = 16

    def __post_init__(self, **kwargs):
        if self.frame_sampling not in (None, *FRAME_SAMPLINGS):
            raise ValueError(f"frame_sampling={self.frame_sampling!r} is unknown. Use one of {FRAME_SAMPLINGS}.")
        if self.memory_dtype not in (None, *_DTYPES):
            raise ValueError(f"memory_dtype={self.memory_dtype!r} is unknown. Use one of {_DTYPES}, or None.")
        if (most := self.max_cond_frames_in_attn) < 1 and most != -1:
            raise ValueError(f"max_cond_frames_in_attn={most} is no number of frames: use 1 or more, or -1 (all).")
        self.stages = list(self.stages or (2, 6, 36, 4))
        self.global_att_blocks = list((23, 33, 43) if self.global_att_blocks is None else self.global_att_blocks)
        self.window_spec = list(self.window_spec or (8, 4, 16, 8))
        _check_sam2_sizes(self.image_size, self.stages, self.window_spec)
        self.window_pos_embed_bkg_spatial_size = list(self.window_pos_embed_bkg_spatial_size or (7, 7))
        widths = (self.embed_dim * 2**stage for stage in (3, 2, 1, 0))
        self.backbone_channel_list = list(self.backbone_channel_list or widths)
        self.frame_sampling = self.frame_sampling or ("uniform" if self.separate_prompt_decoder else "first")
        super().__post_init__(**kwargs)
        self.validate()  # transformers checks by itself only what its decorator `strict` has seen


class Sa2VAInternLM2Config(LlamaConfig):
    """InternLM2 (Sa2VA-8B, -26B), which transformers does not have: Llama with other names and a fused attention.

    Fields are those of `LlamaConfig`; `bias` is InternLM2's name of `attention_bias`.
    """

    model_type = "internlm2"
    attribute_map = {"bias": "attention_bias"}
    attention_bias: bool = True

    def to_dict(self) -> dict[str, Any]:
        """As stored in config.json, `bias` included: without it the official code would take True."""
        return {**super().to_dict(), "bias": self.attention_bias}


@contextmanager
def blaming(kind: type[Exception], fault: str, advice: str, passes: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """Whatever goes wrong in the block is the fault of a file, which may hold any value where any other belongs.

    Args:
        kind: what is raised for any wrong value, or for what is no JSON. A missing package stays ImportError.
        fault, advice: what its message says before and after the reason.
        passes: what else stays as it is.
    """
    try:
        yield
    except Exception as error:
        tells_itself = isinstance(error, (ValueError, ImportError, OSError, MemoryError, *passes))
        if tells_itself and not isinstance(error, json.JSONDecodeError | UnicodeDecodeError):
            raise
        raise kind(f"{fault}: {type(error).__name__}: {error}. {advice}") from error


def blaming_config() -> AbstractContextManager[None]:
    """`blaming` of a config; raises ValueError."""
    advice = "Compare it with that of the released checkpoint it comes from."
    return blaming(ValueError, "The config describes no model that can be built", advice)


def _plausible(name: str, value: Any, depth: int = 0) -> Any:
    """A copy of what a config.json holds under a name, without what is not a checkpoint's to say.

    Raises:
        ValueError: a number is absurd, or there is too much of something.
    """
    if depth > _MAX_DEPTH:
        raise ValueError(f"{name} is nested more than {_MAX_DEPTH} levels deep, which no config of a model is.")
    if isinstance(value, dict | list | tuple) and len(value) > _MAX_ITEMS:
        raise ValueError(f"{name} has {len(value)} items, more than the {_MAX_ITEMS} that any model has.")
    if isinstance(value, dict):
        left_out = _NOT_OF_A_FILE | {"auto_map"} if depth else _NOT_OF_A_FILE
        names = [key for key in value if str(key).removeprefix("_").removesuffix("_internal") not in left_out]
        for key in names:
            if callable(getattr(PreTrainedConfig, str(key), None)) or key in _NO_SETTINGS or str(key)[:2] == "__":
                raise ValueError(f"{name} holds {key!r}, which is no setting. Remove it.")
        checked = {key: _plausible(f"{name}.{key}", value[key], depth + 1) for key in names}
        _check_parameters(name, checked)
        return checked
    if isinstance(value, list | tuple):
        return [_plausible(name, item, depth + 1) for item in value]
    _check_value(name, value)
    return value


def _check_value(name: str, value: Any) -> None:
    """Refuses a number, dtype or count that no Sa2VA has; a name as "config.llm_config.vocab_size" says what it is."""
    field = name.rpartition(".")[2]
    if field in ("dtype", "torch_dtype") and str(value).removeprefix("torch.") not in (*_DTYPES, "None"):
        raise ValueError(f"{name}={value!r} is no dtype of weights. Use one of {_DTYPES}.")
    is_integer = isinstance(value, int) and not isinstance(value, bool)
    most = _MAX_LAYERS if field.endswith(("layers", "num_blocks")) else _MAX_INTEGER  # whatever kind of layers
    if is_integer and abs(value) > most:
        raise ValueError(f"{name}={value} is beyond anything a model has; up to {most} are accepted.")
    if isinstance(value, float) and not math.isfinite(value) and field not in _ENDLESS:
        raise ValueError(f"{name}={value} is no number to compute with. Is the config damaged?")
    if value is None or field not in _BOUNDS:
        return
    low, high = _BOUNDS[field]
    if not (is_integer or (field in _NUMBERS and isinstance(value, float))) or not low <= value <= high:
        kind = "an integer" if field in _LIMITS else "a number"
        raise ValueError(f"{name}={value!r} must be {kind} from {low} to {high}. Is the config damaged?")


def _check_parameters(name: str, config: dict[str, Any]) -> None:
    """Refuses a transformer whose parts may be plausible, but not all at once."""
    layers, width, inner = (config.get(key) for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    if not all(isinstance(number, int) for number in (layers, width, inner)):
        return
    words = config.get("vocab_size") or 0  # tokens have a row in the first matrix and one in the last
    if (count := layers * width * (4 * width + 3 * inner) + 2 * words * width) > _MAX_PARAMETERS:
        raise ValueError(f"{name} describes about {count:.0e} parameters; more than {_MAX_PARAMETERS:.0e} are refused.")


def _sub_config(config_class: type[PreTrainedConfig], value: Any) -> PreTrainedConfig:
    """Builds `config_class` from None (defaults), a dict or an instance."""
    if isinstance(value, PreTrainedConfig):
        return value
    if value is None or isinstance(value, dict):
        return config_class(**(value or {}))
    raise TypeError(f"{config_class.base_config_key} must be a dict, a config or None, got {type(value).__name__}.")


def _language_config(value: Any) -> PreTrainedConfig:
    """Builds the language model's config by its `model_type`, else by its `architectures`, else as Qwen2.

    Raises:
        ValueError: transformers has no model of this type.
    """
    if isinstance(value, PreTrainedConfig):
        return value
    value = dict(value or {})
    value.pop("attn_implementation", None)  # of the machine that made the checkpoint
    value.setdefault("tie_word_embeddings", False)  # every released checkpoint stores both matrices
    model_type = value.pop("model_type", None) or _language_model_type(value.get("architectures"))
    if rope := value.get("rope_scaling"):
        value["rope_scaling"] = dict(rope)  # transformers adds to it
        if rope.get("type") == "su":  # the first name of longrope, with which Phi3 was released
            value["rope_scaling"]["rope_type"] = "longrope"
    if model_type == Sa2VAInternLM2Config.model_type:
        return Sa2VAInternLM2Config(**value)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"llm_config.model_type={model_type!r} is not a language model this version can build. Qwen2, InternLM2 "
            "and the causal language models of transformers that keep their decoder as `model` are accepted."
        )
    config = CONFIG_MAPPING[model_type](**value)
    if (getattr(config, "pad_token_id", None) or 0) >= getattr(config, "vocab_size", float("inf")):
        config.pad_token_id = None  # Phi3's default, 32000, can't be embedded by a smaller vocabulary
    return config


def _language_model_type(architectures: list[str] | None) -> str:
    """The model type that a class belongs to: "qwen2" for ["Qwen2ForCausalLM"], and if nothing is said."""
    return (architectures or ["Qwen2"])[0].removesuffix("ForCausalLM").lower()


def _with_legacy_rope(config: dict[str, Any]) -> dict[str, Any]:
    """Adds `rope_theta` and `rope_scaling`, which transformers < 5 and so the official code read instead."""
    rope = dict(config.get("rope_parameters") or {})
    if "rope_theta" in rope:
        config["rope_theta"] = rope.pop("rope_theta")
        kind = rope.get("rope_type", "default")
        scaled = {"type": kind, **rope} if kind != "default" or "mrope_section" in rope else None
        if keys := _ROPE_SCALING_KEYS.get((config["model_type"], kind)):
            scaled = {key: scaled[key] for key in keys if key in scaled}
        config["rope_scaling"] = scaled
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
        dynamic_image_size: kept for the official code's config.json; images are always tiled, as there.
        mask_loss_weight, dice_loss_weight: weights of the mask losses beside the text loss of weight 1 (2.0 and 0.5 in
            the official recipe).
        iou_loss_weight, object_score_loss_weight: weights that train SAM 2's own two scores; 0 as in the recipe, which
            keeps SAM 2's. Needed when SAM 2 is trained from scratch.
        num_points, oversample_ratio, importance_sample_ratio: PointRend sampling of the mask losses; `num_points=0`
            takes every pixel.
        supervise_all_masks: train all three candidate masks of SAM 2 rather than only the one it picks.

    Raises:
        ValueError, TypeError: a sub-config of unknown type, an unknown `frame_sampling`, or a `select_layer` that the
            vision tower lacks.
    """

    model_type = "sa2va_chat"
    is_qwen_vl = False  # to be asked for instead of the class: every file of a remote-code folder has its own classes
    sub_configs = {
        "vision_config": Sa2VAVisionConfig,
        "llm_config": AutoConfig,
        "grounding_config": Sa2VAGroundingConfig,
    }
    # `Trainer` gathers the outputs of all batches for metrics; of these, not every batch has as many.
    keys_to_ignore_at_inference = [
        *("lm_loss", "mask_loss", "dice_loss", "iou_loss", "object_score_loss", "pred_masks"),
        *("seg_hidden_states", "image_hidden_states", "hidden_states", "attentions"),
    ]

    __eq__ = PreTrainedConfig.__eq__  # transformers would put one here that compares the fields of its own class alone

    def __init_subclass__(cls, **kwargs):
        """Subclasses inherit `__init__` and `__eq__`, too: those of transformers would know none of the fields here.

        A field of theirs has a plain default (`flag: bool = False`), no `dataclasses.field`.
        """
        for name in ("__init__", "__eq__"):
            if name not in vars(cls):
                setattr(cls, name, getattr(cls, name))
        super().__init_subclass__(**kwargs)

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
        self.vision_config = _sub_config(Sa2VAVisionConfig, vision_config)
        self.llm_config = _language_config(llm_config)
        self.grounding_config = _sub_config(Sa2VAGroundingConfig, grounding_config)
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
        if not -1 - (layers := self.vision_config.num_hidden_layers) <= select_layer <= layers:
            raise ValueError(f"select_layer={select_layer} does not exist: the vision tower has {layers} layers.")
        super().__init__(**kwargs)

    def __new__(cls, *args, text_config=None, **kwargs):
        return super().__new__(Sa2VAChatConfigQwen if cls is Sa2VAChatConfig and text_config is not None else cls)

    @property
    def _attn_implementation(self) -> str | None:
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict[str, Any] | None) -> None:
        PreTrainedConfig._attn_implementation.fset(
            self, by_own_names(self, value) if isinstance(value, dict) else value
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs) -> "Sa2VAChatConfig":
        """transformers' `from_pretrained`; see `from_dict` for what is read beside config.json."""
        kwargs.setdefault("name_or_path", str(pretrained_model_name_or_path))
        kwargs["hub_arguments"] = hub_arguments_in(kwargs)
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' `get_config_dict`.

        Raises:
            OSError: there is no config.json, or it is no JSON.
            ValueError: it holds something else than a config.
        """
        with blaming_config():
            found, unused = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
            if not isinstance(found, dict):
                raise TypeError(f"config.json must hold an object, not a {type(found).__name__}")
        if not found:
            raise OSError(f"{str(pretrained_model_name_or_path)!r} holds no config.json. Give a checkpoint's folder.")
        return found, unused

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs):
        """transformers' `from_dict`, which tells Sa2VA-i from Sa2VA.

        Their config.json are alike, but the weights of Sa2VA-i hold a second mask decoder. So if `config_dict` does not
        say whether there is one, the checkpoint at `name_or_path` is asked: its weight index or safetensors header.
        `hub_arguments` are those of `HUB_ARGUMENTS` that it was found with.

        The file may come from anyone. Paths, code and kernels that it names are not followed, and numbers far beyond
        every released checkpoint are refused before anything of that size is made.

        Raises:
            ValueError: the file belongs to another kind of model, or describes none that can be built.
        """
        where = kwargs.pop("hub_arguments", {})
        if (model_type := config_dict.get("model_type", cls.model_type)) != cls.model_type:
            raise ValueError(f"The config's model_type is {model_type!r}; that of Sa2VA is {cls.model_type!r}.")
        for name in ("dtype", "torch_dtype"):  # an argument of `from_pretrained`
            if isinstance(kwargs.get(name), str):
                kwargs[name] = kwargs[name].removeprefix("torch.")
            if kwargs.get(name) != "auto":
                _check_value(name, kwargs.get(name))
        with blaming_config():
            config_dict = _plausible("config", config_dict)
            grounding = dict(config_dict.get("grounding_config") or {})
            if (name := kwargs.get("name_or_path")) and grounding.get("separate_prompt_decoder") is None:
                revision = config_dict.get("_commit_hash") or where.get("revision")
                grounding["separate_prompt_decoder"] = has_prompt_decoder(str(name), {**where, "revision": revision})
                config_dict = {**config_dict, "grounding_config": grounding}
            return super().from_dict(config_dict, **kwargs)

    def save_pretrained(self, save_directory, push_to_hub: bool = False, **kwargs) -> None:
        """transformers' `save_pretrained`, which also saves this code: the folder loads with `trust_remote_code`.

        Where this code came from a checkpoint, of which nothing but the config was loaded, it saves that file alone.
        """
        self.auto_map = auto_map(self.is_qwen_vl)
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as temporary:
            super().save_pretrained(temporary)
            for file in Path(temporary).iterdir():
                _replace_with_copy(file, folder / file.name)
        copy_code(folder)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)

    def get_text_config(self, decoder=None, encoder=None) -> PreTrainedConfig:
        """The language model's config, where transformers looks for vocabulary, cache and generation settings."""
        return self.llm_config

    def to_dict(self) -> dict[str, Any]:
        """As stored in config.json: readable by this package and, key by key, by the official code."""
        output = super().to_dict()
        output["llm_config"] = _with_legacy_rope(output["llm_config"])
        return output


class Sa2VAChatConfigQwen(Sa2VAChatConfig):
    """Sa2VA around a whole Qwen2.5-VL or Qwen3-VL: vision tower and language model are transformers' own.

    Args:
        text_config, vision_config: as in transformers' `Qwen2_5_VLConfig` and `Qwen3VLConfig`; `model_type` of
            `vision_config` says which of the two. `llm_config` is another name of `text_config`.
        grounding_config, mask_loss_weight ... supervise_all_masks: see `Sa2VAChatConfig`.
        image_token_id, video_token_id, vision_start_token_id, vision_end_token_id: ids of Qwen's vision tokens.

    Raises:
        ValueError, TypeError: a sub-config of unknown type.
    """

    is_qwen_vl = True
    attribute_map = {"llm_config": "text_config"}
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig, "grounding_config": Sa2VAGroundingConfig}

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        grounding_config=None,
        template: str = "qwen_chat",
        mask_loss_weight: float = 2.0,
        dice_loss_weight: float = 0.5,
        iou_loss_weight: float = 0.0,
        object_score_loss_weight: float = 0.0,
        num_points: int = 12544,
        oversample_ratio: float = 3.0,
        importance_sample_ratio: float = 0.75,
        supervise_all_masks: bool = False,
        image_token_id: int = 151655,
        video_token_id: int = 151656,
        vision_start_token_id: int = 151652,
        vision_end_token_id: int = 151653,
        tie_word_embeddings: bool = False,
        **kwargs,
    ):
        self.image_token_id = image_token_id
        self.video_token_id = video_token_id
        self.vision_start_token_id = vision_start_token_id
        self.vision_end_token_id = vision_end_token_id
        self.tie_word_embeddings = tie_word_embeddings
        library = _qwen_config(text_config, vision_config)
        self.text_config, self.vision_config = library.text_config, library.vision_config
        self.grounding_config = _sub_config(Sa2VAGroundingConfig, grounding_config)
        self.template = template
        self.mask_loss_weight = mask_loss_weight
        self.dice_loss_weight = dice_loss_weight
        self.iou_loss_weight = iou_loss_weight
        self.object_score_loss_weight = object_score_loss_weight
        self.num_points = num_points
        self.oversample_ratio = oversample_ratio
        self.importance_sample_ratio = importance_sample_ratio
        self.supervise_all_masks = supervise_all_masks
        PreTrainedConfig.__init__(self, **kwargs)

    @property
    def qwen_vl_type(self) -> str:
        """ "qwen2_5_vl" or "qwen3_vl"."""
        return self.vision_config.model_type.removesuffix("_vision")

    def qwen_vl_config(self) -> PreTrainedConfig:
        """transformers' config of the vision-language model; shares its sub-configs with this one."""
        names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
        return CONFIG_MAPPING[self.qwen_vl_type](
            text_config=self.text_config,
            vision_config=self.vision_config,
            tie_word_embeddings=self.tie_word_embeddings,
            dtype=self.dtype,
            **{name: getattr(self, name) for name in names},
        )

    def to_dict(self) -> dict[str, Any]:
        """As stored in config.json: readable by this package and, key by key, by the official code."""
        output = PreTrainedConfig.to_dict(self)
        output["text_config"] = _with_legacy_rope(output["text_config"])
        output["vision_config"] = {**output["vision_config"], "model_type": self.qwen_vl_type}
        return output


def by_own_names(config: Sa2VAChatConfig, parts: dict[str, Any]) -> dict[str, Any]:
    """Settings of parts by the names of a family, whose language model is made by "llm_config" or "text_config"."""
    names = {"llm_config", "text_config"}
    (own,) = names & config.sub_configs.keys()
    return {own if name in names else name: value for name, value in parts.items()}


def _qwen_config(text_config: Any, vision_config: Any) -> PreTrainedConfig:
    """transformers' config of the Qwen-VL that these two describe; Qwen2.5-VL if they don't say."""
    if isinstance(vision_config, PreTrainedConfig):
        named = vision_config.model_type
    else:
        named = (vision_config or {}).get("model_type", QWEN_VL_TYPES[0])
    model_type = named.removesuffix("_vision")
    if model_type not in QWEN_VL_TYPES:
        raise ValueError(f"vision_config.model_type={named!r} beside a text_config: one of {QWEN_VL_TYPES} is needed.")
    if isinstance(text_config, dict):
        text_config = {"tie_word_embeddings": False, **text_config}  # every released checkpoint stores both matrices
    if isinstance(vision_config, dict):
        vision_config = {**vision_config, "model_type": model_type}
    return CONFIG_MAPPING[model_type](text_config=text_config, vision_config=vision_config, tie_word_embeddings=False)


def hub_arguments_in(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those arguments of a `from_pretrained` that say which files are meant, and how they are fetched."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}


def has_prompt_decoder(name_or_path: str, hub_arguments: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a checkpoint's weights hold Sa2VA-i's second mask decoder; no weights are read.

    Args:
        name_or_path: folder, or name on the Hugging Face Hub (asked over the network only for headers).
        hub_arguments: of `HUB_ARGUMENTS`, what says which files of it are meant.

    Raises:
        OSError: the weights or their index can't be read, or the index names files elsewhere.
    """
    if not Path(name_or_path).is_dir():
        return _hub_has_prompt_decoder(name_or_path, hub_arguments)
    folder = Path(name_or_path, hub_arguments.get("subfolder") or "")
    index, weights = folder / _INDEX, folder / _WEIGHTS
    with reading_weights(name_or_path):
        if weights.is_file():  # which transformers prefers to an index, too
            from safetensors import safe_open

            with safe_open(weights, framework="pt") as file:
                return _PROMPT_DECODER_KEY in file.keys()  # noqa: SIM118  (not a dict)
        return index.is_file() and _PROMPT_DECODER_KEY in read_index(index)["weight_map"]


def read_index(path: Path) -> dict[str, Any]:
    """The index of a checkpoint's safetensors files, whose weight_map says which file holds which weight.

    Raises:
        OSError: it can't be read, or names anything else than safetensors files that lie beside it.
    """
    with reading_weights(str(path.parent)):
        values = json.loads(path.read_text(encoding="utf-8"))
    files = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(files, dict) or not files or not isinstance(values.get("metadata", {}), dict):
        raise OSError(
            f"{path} is no index: it needs a weight_map from names of weights to files, and metadata, if any, that are "
            f"an object. `python hub_upload.py check {path.parent}` says more; download or save it again."
        )
    for name, file in files.items():
        if not isinstance(file, str) or not _WEIGHT_FILE.fullmatch(file):
            raise OSError(
                f"{path} puts {name} into {file!r}, but only safetensors files beside it are read. If you trust the "
                "checkpoint, put that file there and name it without a folder."
            )
    return values


@contextmanager
def reading_weights(name_or_path: str) -> Iterator[None]:
    """Turns what damaged weight files and indices raise into OSError with the command that says more.

    Raises:
        OSError: the weights can't be read.
    """
    from safetensors import SafetensorError

    try:
        yield
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise OSError(
            f"The weights of {name_or_path} or their index are damaged: {error}. `python hub_upload.py check "
            f"{name_or_path}` says what is wrong; download or save them again."
        ) from error


def _hub_has_prompt_decoder(name: str, hub_arguments: Mapping[str, Any]) -> bool:
    """Whether a Hub repository's weights do, by the cache if they are there; False if that can't be found out.

    Raises:
        OSError: their index is damaged, or names files elsewhere.
    """
    from huggingface_hub import file_exists, hf_hub_download, parse_safetensors_file_metadata, snapshot_download
    from huggingface_hub.errors import HFValidationError, HTTPError, LocalEntryNotFoundError, SafetensorsParsingError

    subfolder = hub_arguments.get("subfolder") or ""
    revision, cache_dir, token = (hub_arguments.get(key) for key in ("revision", "cache_dir", "token"))
    try:
        cached = Path(snapshot_download(name, revision=revision, cache_dir=cache_dir, local_files_only=True))
        if any((cached / subfolder / file).is_file() for file in (_INDEX, _WEIGHTS)):
            return has_prompt_decoder(str(cached), {"subfolder": subfolder})
    except (LocalEntryNotFoundError, HFValidationError):
        pass
    if hub_arguments.get("local_files_only"):
        return False
    weights, index = (str(PurePosixPath(subfolder, file)) for file in (_WEIGHTS, _INDEX))
    try:
        if file_exists(name, weights, revision=revision, token=token):
            header = parse_safetensors_file_metadata(name, weights, revision=revision, token=token)
            return _PROMPT_DECODER_KEY in header.tensors
        found = hf_hub_download(name, index, revision=revision, cache_dir=cache_dir, token=token)
    except (HTTPError, HFValidationError, SafetensorsParsingError, OSError):
        return False
    return _PROMPT_DECODER_KEY in read_index(Path(found))["weight_map"]


__all__ = [
    "Sa2VAChatConfig",
    "Sa2VAChatConfigQwen",
    "Sa2VAGroundingConfig",
    "Sa2VAInternLM2Config",
    "Sa2VAVisionConfig",
]

"""SAM 2 prompted with language: one 256-number vector per object instead of clicks.

* `Sam2Model`      the networks, from the `sam2` package, sized by `Sa2VAGroundingConfig`; released key names
* `ObjectMemoryAttention`, `RotaryAttention`  SAM 2's memory attention without what is equal between objects
* `FrameFeatures`  what the image encoder leaves of a frame, shared by every object
* `MaskPrediction` what the mask decoder says about N objects on one frame
* `MemoryBank`     what later frames may still look at, for N objects at once; forgets the rest
* `Sam2Decoder`    encode a frame once, decode all objects, remember, track forwards and backwards

Behaviour follows the released Sa2VA: every key frame is prompted with the language vector and becomes a conditioning
frame; the others are tracked by SAM 2's memory (SAM 2, arXiv 2408.00714; `sam2/modeling/sam2_base.py`). Unlike there,
masks are never blanked by a negative object score.

Sa2VA-i (`separate_prompt_decoder`) prompts a mask decoder of its own, cuts its masks out at the size of the video and
gives them to SAM 2 as a user's masks; from there on it is plain SAM 2, blanking included.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from sam2.modeling.backbones.hieradet import Hiera
from sam2.modeling.backbones.image_encoder import FpnNeck, ImageEncoder
from sam2.modeling.memory_attention import MemoryAttention, MemoryAttentionLayer
from sam2.modeling.memory_encoder import CXBlock, Fuser, MaskDownSampler, MemoryEncoder
from sam2.modeling.position_encoding import PositionEmbeddingRandom, PositionEmbeddingSine, compute_axial_cis
from sam2.modeling.sam.mask_decoder import MaskDecoder
from sam2.modeling.sam.transformer import Attention, RoPEAttention, TwoWayTransformer
from sam2.modeling.sam2_base import NO_OBJ_SCORE, SAM2Base
from sam2.modeling.sam2_utils import LayerNorm2d
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers.utils import logging

from .configuration_sa2va import Sa2VAGroundingConfig

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity holds for it

LEVEL_STRIDES = (4, 8, 16, 32)  # of the maps of Hiera
BLOCK_SIZE = 1024  # queries, and keys, of which `_attend_in_blocks` holds all scores at once


@lru_cache(maxsize=16)
def _axial_rope_table(head_dim: int, side: int, device: torch.device) -> Tensor:
    """Rotary table of a square map, complex64 [side * side, head_dim / 2]; made once per size and device.

    It comes from the host, as in `sam2`: complete for threads on other streams, and without complex kernels of MPS.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        return compute_axial_cis(dim=head_dim, end_x=side, end_y=side).to(device)


class RotaryAttention(RoPEAttention):
    """`sam2`'s RoPEAttention for one head, its table looked up on first use instead of stored.

    The parent computes the table while it is built: a meta tensor under `from_pretrained`, and moved to "cuda" wherever
    there is one. It also writes it to `self` in every call, which two threads on two devices can't share.
    """

    def __init__(self, *args, **kwargs):
        Attention.__init__(self, *args, num_heads=1, **kwargs)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, num_k_exclude_rope: int = 0) -> Tensor:
        """Attends from a map q [B or 1, side * side, C] to k, v [B, L, C_kv]: [B, side * side, C].

        Keys are maps of the same size, one behind another, and `num_k_exclude_rope` tokens that have no place. A single
        row of q is shared by all objects.
        """
        table = _axial_rope_table(self.internal_dim, round(q.shape[1] ** 0.5), q.device)
        q = _rotate(self.q_proj(q), table).expand(len(k), -1, -1)
        if self._averages_first(q, k, v):
            rows = zip(q, k, v, strict=True)
            attended = [_attend_in_blocks(q, self._keys(k, num_k_exclude_rope, table), v) for q, k, v in rows]
            return self.out_proj(self.v_proj(torch.stack(attended)))
        maps, tokens = self.k_proj(k).split([k.shape[1] - num_k_exclude_rope, num_k_exclude_rope], dim=1)
        k = torch.cat([_rotate(maps.unflatten(1, (-1, len(table))), table).flatten(1, 2), tokens], dim=1)
        dropout = self.dropout_p if self.training else 0.0
        # Metal holds the scores of all rows in one tensor, which may not take more than 4 GB (pytorch issue 149261).
        step = 1 if q.device.type == "mps" else len(k)
        # Expanded queries have strides of 0, with which cuDNN's attention fails in older torch (pytorch pull 175764).
        return self.out_proj(_attend_in_rows(q.contiguous(), k, self.v_proj(v), dropout, step))

    def _keys(self, k: Tensor, num_k_exclude_rope: int, table: Tensor) -> Iterator[Tensor]:
        """Keys [S, C] of each map of one row, rotated, then of the tokens, if there are any."""
        maps, tokens = k.split([len(k) - num_k_exclude_rope, num_k_exclude_rope])
        for part in maps.split(len(table)):
            yield _rotate(self.k_proj(part), table)
        if num_k_exclude_rope:
            yield self.k_proj(tokens)

    def _averages_first(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether values are averaged before they are projected: the same, as weights sum to 1, and narrower.

        On a CPU that saves a third of all arithmetic, though no fused kernel there does it: it pays where there is more
        than one block. Those of accelerators are better left alone, half precision needs their wider sums, and training
        their gradients and dropout.
        """
        by_hand = q.device.type == "cpu" and q.dtype == torch.float32 and not torch.is_grad_enabled()
        pays = v.shape[-1] < self.internal_dim and q.shape[1] * k.shape[1] > BLOCK_SIZE**2
        return by_hand and pays and not self.training


def _rotate(x: Tensor, table: Tensor) -> Tensor:
    """Rotates pairs of neighbouring channels of x [..., L, C] by a complex table [L, C / 2], in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * table).flatten(-2).type_as(x)


def _attend_in_rows(q: Tensor, k: Tensor, v: Tensor, dropout: float, step: int) -> Tensor:
    """torch's attention of q [B, L, C] to k [B, S, C] with values v [B, S, C], `step` rows at a time: [B, L, C]."""
    parts = zip(*(x[:, None].split(step) for x in (q, k, v)), strict=True)
    attended = [F.scaled_dot_product_attention(*part, dropout_p=dropout)[:, 0] for part in parts]
    return attended[0] if len(attended) == 1 else torch.cat(attended)


def _attend_in_blocks(q: Tensor, keys: Iterable[Tensor], v: Tensor) -> Tensor:
    """Softmax attention of q [L, C] to keys, which come in parts [S, C], with values v [sum of S, C_v]: [L, C_v].

    Scores live in blocks of 1024 x 1024, which fit into a cache; each is weighted against the highest score so far
    (FlashAttention, arXiv 2205.14135).
    """
    queries = q * q.shape[-1] ** -0.5
    attended, total = q.new_zeros(len(q), v.shape[-1]), q.new_zeros(len(q), 1)
    highest = torch.full_like(total, -torch.inf)
    rows = list(zip(*(x.split(BLOCK_SIZE) for x in (queries, highest, total, attended)), strict=True))
    seen = 0
    for key in itertools.chain.from_iterable(part.split(BLOCK_SIZE) for part in keys):
        value = v[seen : (seen := seen + len(key))]
        for query, highest_so_far, sum_so_far, result in rows:
            scores = query @ key.mT
            top = torch.maximum(highest_so_far, scores.amax(-1, keepdim=True))
            weights, fading = scores.sub_(top).exp_(), (highest_so_far - top).exp_()
            sum_so_far.mul_(fading).add_(weights.sum(-1, keepdim=True))
            result.mul_(fading).addmm_(weights, value)
            highest_so_far.copy_(top)
    return attended / total


class ObjectMemoryAttention(MemoryAttention):
    """`sam2`'s MemoryAttention that takes a frame once for all objects, until their memories make it differ."""

    def forward(
        self, curr: Tensor, memory: Tensor, curr_pos: Tensor, memory_pos: Tensor, num_obj_ptr_tokens: int = 0
    ) -> Tensor:
        """Fuses frames with memories.

        Args:
            curr, curr_pos: [h * w, N or 1, D], a row for each object or one for all; `SAM2Base` gives lists of one.
            memory, memory_pos: [L, N, mem_dim]; one row of positions may serve all.
            num_obj_ptr_tokens: how many of the L, the last ones, come from object pointers.

        Returns:
            [h * w, N, D].
        """
        curr, curr_pos = (x[-1] if isinstance(x, list) else x for x in (curr, curr_pos))
        output = (curr + 0.1 * curr_pos).transpose(0, 1)
        memory, memory_pos = memory.transpose(0, 1), memory_pos.transpose(0, 1)
        for layer in self.layers:
            output = layer(output, memory, memory_pos, num_k_exclude_rope=num_obj_ptr_tokens)
        return self.norm(output).transpose(0, 1)


class SharedPositionEmbedding(PositionEmbeddingSine):
    """`sam2`'s sine encoding of a map: one row that serves all frames, kept for each size and device.

    The parent keeps the whole first batch alive, on the device of the first call, and copies a row for each frame.
    """

    def _pe(self, B: int, device: torch.device, *size: int) -> Tensor:
        """[1, C, h, w], whatever the batch."""
        if (key := (*size, device)) not in self.cache:
            with torch.inference_mode(False):
                # From the host it is complete for threads on other streams, too.
                self.cache[key] = super()._pe(1, torch.device("cpu"), *size).to(device)
        return self.cache[key]

    def prepare(self, device: torch.device, *sides: int) -> None:
        """Makes what square maps of these sides will need.

        Left to a compiled encoder, it would be made among its outputs, whose memory CUDA graphs take back at the next
        call ("reduce-overhead").
        """
        for side in sides:
            self._pe(1, device, side, side)


def _position_encoding(channels: int) -> PositionEmbeddingSine:
    # The warm-up would fill a cache on "cuda" wherever there is one, before anyone chose a device.
    return SharedPositionEmbedding(num_pos_feats=channels, normalize=True, temperature=10000, warmup_cache=False)


class WidePositionEmbedding(PositionEmbeddingRandom):
    """SAM's random Fourier encoding of places, its matrix product in float32 whatever dtype or autocast asks for."""

    def _pe_encoding(self, coords: Tensor) -> Tensor:
        with torch.autocast(coords.device.type, enabled=False):
            angles = 2 * torch.pi * ((2 * coords.float() - 1) @ self.positional_encoding_gaussian_matrix.float())
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class WideLayerNorm2d(LayerNorm2d):
    """`sam2`'s norm of channels, in float32 where the model is in float16, which can't hold the squares."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalises x [N, C, h, w] over its channels."""
        return super().forward(x.float()).to(x.dtype) if x.dtype == torch.float16 else super().forward(x)


class _LinspaceOnCpu(TorchFunctionMode):
    """Hiera reads its drop path rates out of a `torch.linspace`, which on the meta device holds nothing to read.

    transformers takes care of this while it loads a model, for all threads; this is for models of names and shapes
    alone (`hub_upload`, `ModuleNames`), which are built on the meta device by `torch.device`.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function is torch.linspace:
            kwargs.setdefault("device", "cpu")
        return function(*args, **kwargs)


def _build_image_encoder(config: Sa2VAGroundingConfig) -> ImageEncoder:
    with _LinspaceOnCpu():
        trunk = Hiera(
            embed_dim=config.embed_dim,
            num_heads=config.num_heads,
            stages=tuple(config.stages),
            global_att_blocks=tuple(config.global_att_blocks),
            window_pos_embed_bkg_spatial_size=tuple(config.window_pos_embed_bkg_spatial_size),
            window_spec=tuple(config.window_spec),
        )
    neck = FpnNeck(
        position_encoding=_position_encoding(config.d_model),
        d_model=config.d_model,
        backbone_channel_list=list(config.backbone_channel_list),
        fpn_top_down_levels=[2, 3],
        fpn_interp_model="nearest",
    )
    return ImageEncoder(trunk=trunk, neck=neck, scalp=1)


def _build_memory_attention(config: Sa2VAGroundingConfig) -> MemoryAttention:
    dropout = config.memory_attention_dropout
    attention = {"embedding_dim": config.d_model, "dropout": dropout}
    layer = MemoryAttentionLayer(
        activation="relu",
        dim_feedforward=config.memory_attention_dim_feedforward,
        dropout=dropout,
        pos_enc_at_attn=False,
        self_attention=RotaryAttention(**attention),
        d_model=config.d_model,
        pos_enc_at_cross_attn_keys=True,
        pos_enc_at_cross_attn_queries=False,
        cross_attention=RotaryAttention(**attention, kv_in_dim=config.mem_dim),
    )
    return ObjectMemoryAttention(
        d_model=config.d_model, pos_enc_at_input=True, layer=layer, num_layers=config.memory_attention_layers
    )


def _build_memory_encoder(config: Sa2VAGroundingConfig) -> MemoryEncoder:
    return MemoryEncoder(
        out_dim=config.mem_dim,
        position_encoding=_position_encoding(config.mem_dim),
        mask_downsampler=MaskDownSampler(embed_dim=config.d_model, kernel_size=3, stride=2, padding=1),
        fuser=Fuser(CXBlock(dim=config.d_model, kernel_size=7, padding=3, layer_scale_init_value=1e-6), num_layers=2),
        in_dim=config.d_model,
    )


def _build_mask_decoder(config: Sa2VAGroundingConfig) -> MaskDecoder:
    return MaskDecoder(
        num_multimask_outputs=3,
        transformer=TwoWayTransformer(
            depth=2,
            embedding_dim=config.d_model,
            mlp_dim=config.mask_decoder_mlp_dim,
            num_heads=config.mask_decoder_num_heads,
            attention_downsample_rate=config.mask_decoder_attention_downsample_rate,
        ),
        transformer_dim=config.d_model,
        iou_head_depth=3,
        iou_head_hidden_dim=config.iou_head_hidden_dim,
        use_high_res_features=True,
        iou_prediction_use_sigmoid=True,
        pred_obj_scores=True,
        pred_obj_scores_mlp=True,
        use_multimask_token_for_obj_ptr=True,
        dynamic_multimask_via_stability=True,
    )


class Sam2Model(SAM2Base):
    """SAM 2.0's networks and parameter names, sized by the config (keys as in the released checkpoints)."""

    def __init__(self, config: Sa2VAGroundingConfig):
        super().__init__(
            image_encoder=_build_image_encoder(config),
            memory_attention=_build_memory_attention(config),
            memory_encoder=_build_memory_encoder(config),
            num_maskmem=config.num_maskmem,
            image_size=config.image_size,
            sigmoid_scale_for_mem_enc=20.0,
            sigmoid_bias_for_mem_enc=-10.0,
            directly_add_no_mem_embed=True,
            use_high_res_features_in_sam=True,
            multimask_output_in_sam=True,
            multimask_output_for_tracking=True,
            use_multimask_token_for_obj_ptr=True,
            iou_prediction_use_sigmoid=True,
            use_obj_ptrs_in_encoder=True,
            max_obj_ptrs_in_encoder=config.max_object_pointers,
            add_tpos_enc_to_obj_ptrs=False,
            only_obj_ptrs_in_the_past_for_eval=True,
            pred_obj_scores=True,
            pred_obj_scores_mlp=True,
            fixed_no_obj_ptr=True,
            use_mlp_for_obj_ptr_proj=True,
        )
        self.sam_prompt_encoder.pe_layer = WidePositionEmbedding(config.d_model // 2)
        # SAM2Base writes the widths of the released decoder into its own; other sizes need this one.
        self.sam_mask_decoder = _build_mask_decoder(config)
        if config.separate_prompt_decoder:
            self.sam_mask_decoder_modified = _build_mask_decoder(config)
        for module in self.modules():
            if type(module) is LayerNorm2d:
                module.__class__ = WideLayerNorm2d

    @property
    def prompt_decoder(self) -> MaskDecoder:
        """The mask decoder that answers language prompts."""
        return getattr(self, "sam_mask_decoder_modified", self.sam_mask_decoder)


class FrameFeatures(NamedTuple):
    """Image encoder output of T frames (or of T rows, one per object, after `rows`).

    Attributes:
        vision_features: [T, D, h, w], stride 16.
        vision_pos_embeds: [1, D, h, w], equal for all frames.
        high_res_features: [T, D/8, 4h, 4w] and [T, D/4, 2h, 2w], as the mask decoder adds them.
        prompt_high_res_features: the same for the decoder that answers prompts, where that is another one.
    """

    vision_features: Tensor
    vision_pos_embeds: Tensor
    high_res_features: tuple[Tensor, Tensor]
    prompt_high_res_features: tuple[Tensor, Tensor]

    def rows(self, index: Tensor | slice) -> "FrameFeatures":
        """The features of frames `index` (int64 [N]), a row each."""
        index = index if isinstance(index, slice) else index.to(self.vision_features.device)
        high_res = tuple(level[index] for level in self.high_res_features)
        prompt = high_res
        if self.prompt_high_res_features is not self.high_res_features:
            prompt = tuple(level[index] for level in self.prompt_high_res_features)
        return FrameFeatures(self.vision_features[index], self.vision_pos_embeds, high_res, prompt)

    @classmethod
    def cat(cls, parts: Sequence["FrameFeatures"]) -> "FrameFeatures":
        """Joins the features of frames that were encoded apart."""
        if len(parts) == 1:
            return parts[0]
        features, positions, high_res, prompt = zip(*parts, strict=True)
        is_one = prompt[0] is high_res[0]
        high_res = tuple(map(torch.cat, zip(*high_res, strict=True)))
        prompt = high_res if is_one else tuple(map(torch.cat, zip(*prompt, strict=True)))
        return cls(torch.cat(features), positions[0], high_res, prompt)


class MaskPrediction(NamedTuple):  # a tuple, so that FSDP and DeepSpeed see the tensors that backward comes from
    """What the mask decoder says about N objects on one frame.

    Attributes:
        logits: float32 [N, 1, S/4, S/4], mask logits of the candidate with the highest predicted IoU.
        iou_scores: float32 [N] in 0..1, the predicted IoU of that candidate.
        object_scores: float32 [N], logit of "the object is in this frame".
        object_pointers: [N, D], what memory attention sees of each object beside its memory features.
        multimask_logits: float32 [N, 3, S/4, S/4], all candidates; None unless asked for.
        multimask_iou_scores: float32 [N, 3]; None unless asked for.
    """

    logits: Tensor
    iou_scores: Tensor
    object_scores: Tensor
    object_pointers: Tensor
    multimask_logits: Tensor | None = None
    multimask_iou_scores: Tensor | None = None

    @classmethod
    def cat(cls, parts: Sequence["MaskPrediction"]) -> "MaskPrediction":
        """Joins the predictions of several groups of objects on the same frame."""
        if len(parts) == 1:
            return parts[0]
        return cls(*(None if column[0] is None else torch.cat(column) for column in zip(*parts, strict=True)))


@dataclass(frozen=True)
class FrameMemory:
    """One remembered frame of N objects.

    Attributes:
        features: [h * w, N, mem_dim] in the memory dtype; None once no later frame looks at them.
        object_pointers: [N, D].
    """

    features: Tensor | None
    object_pointers: Tensor


@dataclass
class MemoryBank:
    """What a frame may look at while N objects are tracked in one direction.

    Conditioning frames stay for ever; of the tracked frames the last `num_maskmem - 1` features and the last
    `max_object_pointers - 1` pointers stay, because SAM 2 looks no further back.

    Attributes:
        num_maskmem, max_object_pointers: SAM 2's horizon.
        max_cond_frames: a frame looks at no more conditioning frames than this; -1 lets it look at all.
        position: [h * w, 1, mem_dim], sine encoding of the memory features, equal for all frames.
        conditioning: frame index -> memory of the prompted frames.
        recent: frame index -> memory of the tracked frames.
    """

    num_maskmem: int
    max_object_pointers: int
    max_cond_frames: int = -1
    position: Tensor | None = None
    conditioning: dict[int, FrameMemory] = field(default_factory=dict)
    recent: dict[int, FrameMemory] = field(default_factory=dict)

    @classmethod
    def of(cls, config: Sa2VAGroundingConfig) -> "MemoryBank":
        """An empty bank that looks as far as the config says."""
        return cls(config.num_maskmem, config.max_object_pointers, config.max_cond_frames_in_attn)

    @property
    def num_objects(self) -> int:
        """How many objects are remembered; all frames have the same."""
        return next((len(memory.object_pointers) for memory in self.conditioning.values()), 0)

    def restart(self) -> "MemoryBank":
        """A bank with the same conditioning frames and nothing tracked yet."""
        return replace(self, recent={})

    def add(self, frame: int, memory: FrameMemory) -> None:
        """Remembers a tracked frame and forgets what no later frame of this direction can reach."""
        self.recent[frame] = memory
        reach = max(self.num_maskmem, self.max_object_pointers) - 1
        self.recent = {t: m for t, m in self.recent.items() if abs(frame - t) < reach}
        for t, old in self.recent.items():
            if abs(frame - t) >= self.num_maskmem - 1 and old.features is not None:
                self.recent[t] = FrameMemory(None, old.object_pointers)

    def spatial(self, frame: int, reverse: bool) -> list[tuple[int, Tensor]]:
        """(row of `maskmem_tpos_enc`, features) in SAM 2's order: conditioning, then passed lately, oldest first."""
        chosen = self.chosen(frame)
        memories = [(self.num_maskmem - 1, self.conditioning[t].features) for t in chosen]
        for distance in range(self.num_maskmem - 1, 0, -1):
            memory = self._passed(frame + distance if reverse else frame - distance, chosen)
            if memory is not None and memory.features is not None:
                memories.append((distance - 1, memory.features))
        return memories

    def pointers(self, frame: int, reverse: bool) -> list[Tensor]:
        """Object pointers [N, D] of the conditioning frames already passed, then of other frames, newest first."""
        chosen = self.chosen(frame)
        pointers = [self.conditioning[t].object_pointers for t in chosen if (t >= frame if reverse else t <= frame)]
        for distance in range(1, self.max_object_pointers):
            memory = self._passed(frame + distance if reverse else frame - distance, chosen)
            if memory is not None:
                pointers.append(memory.object_pointers)
        return pointers

    def chosen(self, frame: int) -> list[int]:
        """The conditioning frames that `frame` looks at as such, in order of time.

        With a limit they are the closest before, the closest after, and whichever are closest then, as
        `sam2.modeling.sam2_utils.select_closest_cond_frames` has it, which refuses a limit of 1.
        """
        if not 0 < self.max_cond_frames < len(self.conditioning):
            return sorted(self.conditioning)
        before = max((t for t in self.conditioning if t < frame), default=None)
        after = min((t for t in self.conditioning if t >= frame), default=None)
        nearest = sorted(self.conditioning, key=lambda t: (t not in (before, after), abs(t - frame)))
        return sorted(nearest[: self.max_cond_frames])

    def _passed(self, frame: int, chosen: Sequence[int]) -> FrameMemory | None:
        """What is left of a frame; a conditioning frame that was not chosen is one like any other."""
        return self.recent.get(frame) or (None if frame in chosen else self.conditioning.get(frame))


@dataclass
class TrackingState:
    """Objects prompted on their key frames, and how far they were tracked: all that later frames depend on.

    Attributes:
        banks: one `MemoryBank` per group of at most `max_objects_per_batch` objects.
        predictions: frame -> its prediction, until it is handed out: key frames, and what was tracked ahead.
        next_frame: the frame that comes next.
    """

    banks: list[MemoryBank] = field(default_factory=list)
    predictions: dict[int, MaskPrediction] = field(default_factory=dict)
    next_frame: int = 0

    def to_tensors(self) -> dict[str, Tensor]:
        """A copy by name on the CPU, contiguous, for `torch.save` or safetensors."""
        named: dict[str, Any] = {"next_frame": torch.tensor(self.next_frame)}
        for number, bank in enumerate(self.banks):
            named[f"banks.{number}.position"] = bank.position
            for kind in ("conditioning", "recent"):
                for frame, memory in getattr(bank, kind).items():
                    name = f"banks.{number}.{kind}.{frame}"
                    named |= {f"{name}.features": memory.features, f"{name}.object_pointers": memory.object_pointers}
        for frame, prediction in self.predictions.items():
            named |= {f"predictions.{frame}.{name}": tensor for name, tensor in prediction._asdict().items()}
        given = {name: tensor for name, tensor in named.items() if tensor is not None}
        return {name: t.to("cpu", copy=True, memory_format=torch.contiguous_format) for name, t in given.items()}

    @property
    def num_objects(self) -> int:
        """How many objects are tracked."""
        return sum(bank.num_objects for bank in self.banks)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], config: Sa2VAGroundingConfig, device) -> "TrackingState":
        """The inverse of `to_tensors`.

        Raises:
            KeyError, TypeError, ValueError, AttributeError, IndexError: these are no such tensors, or don't fit each
                other and the config.
        """
        tree: dict[str, Any] = {}
        for name, tensor in tensors.items():
            *path, leaf = name.split(".")
            node = tree
            for step in path:
                node = node.setdefault(step, {})
            node[leaf] = tensor.to(device)
        banks = [
            replace(
                MemoryBank.of(config),
                position=bank["position"],
                conditioning=_memories(bank["conditioning"]),
                recent=_memories(bank.get("recent", {})),
            )
            for _, bank in sorted(tree.get("banks", {}).items(), key=lambda item: int(item[0]))
        ]
        predictions = {int(t): MaskPrediction(**parts) for t, parts in tree.get("predictions", {}).items()}
        state = cls(banks, predictions, int(tree["next_frame"]))
        state._check(config)
        return state

    def _check(self, config: Sa2VAGroundingConfig) -> None:
        """Raises a ValueError if tensors don't fit each other or SAM 2."""
        if self.next_frame < 0:
            raise ValueError(f"Its next frame is {self.next_frame}.")
        num_cells = (config.image_size // 16) ** 2
        found = []
        for bank in self.banks:
            found.append((bank.position.shape, (num_cells, 1, config.mem_dim)))
            for memory in (*bank.conditioning.values(), *bank.recent.values()):
                found.append((memory.object_pointers.shape, (bank.num_objects, config.d_model)))
                if memory.features is not None:
                    found.append((memory.features.shape, (num_cells, bank.num_objects, config.mem_dim)))
        for prediction in self.predictions.values():
            found += [
                (scores.shape, (self.num_objects,)) for scores in (prediction.iou_scores, prediction.object_scores)
            ]
            found.append((prediction.logits.shape, (self.num_objects, 1, *(config.image_size // 4,) * 2)))
        for given, wanted in found:
            if given != wanted:
                raise ValueError(f"It holds {given} where {wanted} belongs.")


class Sam2Decoder(nn.Module):
    """Segments and tracks language-prompted objects; `sam2_model` holds the networks.

    All work goes through `forward`, the one entry that the hooks of accelerate (offload) and FSDP see: SAM 2 reads the
    weights of modules outside those modules' own `forward`, so it must be placed whole.

    Attributes:
        most_frames: how many frames the image encoder takes at once.
    """

    def __init__(self, config: Sa2VAGroundingConfig):
        super().__init__()
        self.config = config
        self.sam2_model = Sam2Model(config)
        self.most_frames = _most_frames(config)

    def forward(self, stage: str, *args, **kwargs) -> Any:
        """Runs the private method of that name; use `encode`, `decode`, `condition`, `propagate`, `segment_clips`."""
        with self._direct_weights():
            return getattr(self, f"_{stage}")(*args, **kwargs)

    @contextmanager
    def _direct_weights(self) -> Iterator[None]:
        """Holds the weights that SAM 2 reads without calling their modules, which accelerate may have offloaded.

        Its hooks load weights when a module is called; these modules never are.
        """
        model = self.sam2_model
        owners = dict.fromkeys((model.sam_prompt_encoder, model.sam_mask_decoder, model.prompt_decoder))
        embeddings = (child for owner in owners for child in owner.children() if isinstance(child, nn.Embedding))
        modules = [module for module in (model, *embeddings) if hasattr(module, "_hf_hook")]
        for module in modules:
            module._hf_hook.pre_forward(module)
        try:
            yield
        finally:
            for module in modules:
                module._hf_hook.post_forward(module, None)

    def encode(self, frames: Tensor) -> FrameFeatures:
        """Runs the image encoder on normalised frames [T, 3, S, S], of the dtype and device of the weights.

        Returns:
            `FrameFeatures` of the T frames. Out of memory, fewer are encoded together, with a warning.
        """
        return self("encode", frames)

    def decode(self, features: FrameFeatures, prompts: Tensor, output_all_masks: bool = False) -> MaskPrediction:
        """Segments prompted objects on frames without memory.

        Args:
            features: of one frame, shared by all objects.
            prompts: [N, D], one language vector per object, N at least 1.
            output_all_masks: also return the three candidates of each object.

        Returns:
            `MaskPrediction` of the N objects.
        """
        groups = self._groups(len(prompts))
        return MaskPrediction.cat([self("decode", features, prompts[g], output_all_masks) for g in groups])

    def condition(
        self,
        key_frames: Iterable[tuple[int, Tensor]],
        prompts: Tensor,
        frame_size: tuple[int, int] | None = None,
        encode_batch_size: int = 1,
    ) -> TrackingState:
        """Prompts N objects on every key frame, without memory, and remembers the result.

        Args:
            key_frames: (frame index, normalised frame [1, 3, S, S]), read as they are needed; each is encoded once.
            prompts: [N, D], N at least 1.
            frame_size: (h, w) of the video, at which Sa2VA-i cuts masks out before it tracks them; None takes S x S.
            encode_batch_size: how many frames go through the image encoder together.

        Returns:
            `TrackingState` with the memory and the predictions of the key frames.
        """
        groups = self._groups(len(prompts))
        state = TrackingState([MemoryBank.of(self.config) for _ in groups])
        of_groups = [prompts[g] for g in groups]
        for chunk in _chunks(key_frames, encode_batch_size):
            indices, pixel_values = zip(*chunk, strict=True)
            state.predictions |= self(
                "condition_frames", indices, torch.cat(pixel_values), of_groups, state.banks, frame_size
            )
        return state

    def propagate(
        self,
        state: TrackingState,
        frames: Iterable[Any],
        preprocess: Callable[[Sequence[Any]], Tensor],
        encode_batch_size: int = 1,
    ) -> Iterator[tuple[int, MaskPrediction]]:
        """Tracks conditioned objects through a video and yields every frame in order.

        Frames before the first key frame are tracked backwards from it and so are kept, as they came, until then, and
        their predictions until they are yielded. Otherwise memory does not grow with the length of the video.

        Args:
            state: from `condition`. It moves along: when a frame is yielded, it is what the frames after it need.
            frames: all frames from `state.next_frame` on, in any form; read lazily, once.
            preprocess: turns T frames into [T, 3, S, S]; gets no key frames, which are encoded already.
            encode_batch_size: how many frames are read and go through the image encoder together.

        Yields:
            (frame index, `MaskPrediction` of the N objects), frame by frame.
        """
        frames = iter(frames)
        if state.next_frame not in state.predictions and state.next_frame < (first := min(state.banks[0].conditioning)):
            before = list(itertools.islice(frames, first - state.next_frame))
            self._look_back(state, before, preprocess, encode_batch_size)
            frames = itertools.chain(before, frames)
            del before  # the chain lets go of it
        for chunk in _chunks(frames, encode_batch_size):
            numbered = list(enumerate(chunk, start=state.next_frame))
            new = [(index, frame) for index, frame in numbered if index not in state.predictions]
            self._track(state, new, preprocess, state.banks, reverse=False)
            for index, _ in numbered:
                state.next_frame = index + 1
                yield index, state.predictions.pop(index)

    def _look_back(
        self,
        state: TrackingState,
        frames: list[Any],
        preprocess: Callable[[Sequence[Any]], Tensor],
        encode_batch_size: int,
    ) -> None:
        banks = [bank.restart() for bank in state.banks]
        numbered = list(enumerate(frames, start=state.next_frame))
        for chunk in _chunks(reversed(numbered), encode_batch_size):
            self._track(state, chunk, preprocess, banks, reverse=True)

    def _track(
        self,
        state: TrackingState,
        numbered: Sequence[tuple[int, Any]],
        preprocess: Callable[[Sequence[Any]], Tensor],
        banks: list[MemoryBank],
        reverse: bool,
    ) -> None:
        """Adds the predictions of these frames to the state."""
        if numbered:
            indices, frames = zip(*numbered, strict=True)
            state.predictions |= self("track_frames", indices, preprocess(frames), banks, reverse)

    def segment_clips(
        self, frames: Tensor, prompts: Tensor, clip_index: Tensor, num_key_frames: int
    ) -> list[MaskPrediction]:
        """Training pass: the objects of B clips of equal length together, differentiable, with all candidates.

        Args:
            frames: [B, T, 3, S, S] normalised.
            prompts: [M, D]; object m lives in clip `clip_index[m]` (int64 [M]).
            num_key_frames: this many frames at the start are prompted without memory, the rest is tracked.

        Returns:
            T predictions of the M objects.
        """
        packed = self("segment_clips", frames, prompts, clip_index, num_key_frames)
        return _unpacked(packed, self.config)

    def _groups(self, num_objects: int) -> list[slice]:
        size = self.config.max_objects_per_batch
        return [slice(start, start + size) for start in range(0, num_objects, size)]

    def _encode(self, frames: Tensor) -> FrameFeatures:
        if len(frames) == 1 or torch.is_grad_enabled():  # who trains sets the size of a batch
            return FrameFeatures.cat([self._encode_together(some) for some in frames.split(self.most_frames)])
        encoded = in_batches(
            lambda some: self._encode_together(torch.cat(some)), iter(frames.split(1)), self.most_frames, "frames"
        )
        return FrameFeatures.cat(list(encoded))

    def _encode_together(self, frames: Tensor) -> FrameFeatures:
        side = self.config.image_size
        self.sam2_model.image_encoder.neck.position_encoding.prepare(frames.device, *(side // s for s in LEVEL_STRIDES))
        output = self.sam2_model.image_encoder(frames)
        # The neck sums its top-down level in float32 whatever the model's dtype.
        high, middle, low = (level.to(frames.dtype) for level in output["backbone_fpn"])
        position = output["vision_pos_enc"][-1][:1].to(frames.dtype)
        decoders = (self.sam2_model.sam_mask_decoder, self.sam2_model.prompt_decoder)
        high_res = {d: (d.conv_s0(high), d.conv_s1(middle)) for d in dict.fromkeys(decoders)}  # once if they are one
        return FrameFeatures(low, position, *(high_res[d] for d in decoders))

    def _decode(self, features: FrameFeatures, prompts: Tensor, output_all_masks: bool = False) -> MaskPrediction:
        no_memory = self.sam2_model.no_mem_embed.reshape(1, -1, 1, 1)
        return self._predict_masks(features, features.vision_features + no_memory, prompts, output_all_masks)

    def _condition_frames(
        self,
        indices: Sequence[int],
        pixel_values: Tensor,
        prompts: list[Tensor],
        banks: list[MemoryBank],
        frame_size: tuple[int, int] | None,
    ) -> dict[int, MaskPrediction]:
        predictions = {}
        for index, features in zip(indices, self._encode_each(pixel_values), strict=True):
            parts = []
            for group, bank in zip(prompts, banks, strict=True):
                parts.append(self._to_track(features, self._decode(features, group), frame_size))
                bank.conditioning[index] = self._remember(features, parts[-1], bank)
            predictions[index] = MaskPrediction.cat(parts)
        return predictions

    def _encode_each(self, pixel_values: Tensor) -> Iterator[FrameFeatures]:
        """The features of each of T frames, which are encoded together."""
        features = self._encode(pixel_values)
        return (features.rows(slice(row, row + 1)) for row in range(len(pixel_values)))

    def _to_track(
        self, features: FrameFeatures, prediction: MaskPrediction, frame_size: tuple[int, int] | None = None
    ) -> MaskPrediction:
        """What SAM 2 tracks of a prompted frame: the prediction itself, or for Sa2VA-i its mask, as if a user drew it.

        The plain decoder then only makes the object pointer (`SAM2Base._use_mask_as_output`). The scores stay those of
        the decoder that was prompted.
        """
        if not self.config.separate_prompt_decoder:
            return prediction
        side = (self.config.image_size,) * 2
        cut_out = F.interpolate(prediction.logits, size=frame_size or side, mode="bilinear", align_corners=False) > 0
        masks = F.interpolate(cut_out.float(), size=side, mode="bilinear", align_corners=False, antialias=True) >= 0.5
        masks = masks.to(features.vision_features.dtype)
        logits = F.interpolate(
            20.0 * masks.float() - 10.0,
            size=prediction.logits.shape[-2:],
            mode="bilinear",
            align_corners=False,
            antialias=True,
        )
        appears = masks.flatten(1).any(dim=1, keepdim=True)
        pointers = torch.where(appears, self._mask_pointers(features, masks), self.sam2_model.no_obj_ptr)
        return prediction._replace(logits=logits, object_pointers=pointers)

    def _mask_pointers(self, features: FrameFeatures, masks: Tensor) -> Tensor:
        """Object pointers [N, D] of masks [N, 1, S, S] given as prompts, from the plain decoder's single-mask token."""
        model = self.sam2_model
        dense = model.sam_prompt_encoder.mask_downscaling(model.mask_downsample(masks))
        _, _, tokens, object_scores = model.sam_mask_decoder(
            image_embeddings=features.vision_features,
            image_pe=self._dense_position(features.vision_features),
            sparse_prompt_embeddings=self._sparse_prompts(len(masks), None),
            dense_prompt_embeddings=dense,
            multimask_output=False,
            repeat_image=len(features.vision_features) != len(masks),
            high_res_features=list(features.high_res_features),
        )
        return self._object_pointers(tokens[:, 0], object_scores)

    def _track_frames(
        self, indices: Sequence[int], pixel_values: Tensor, banks: list[MemoryBank], reverse: bool
    ) -> dict[int, MaskPrediction]:
        predictions = {}
        for index, features in zip(indices, self._encode_each(pixel_values), strict=True):
            parts = []
            for bank in banks:
                conditioned = self._attend(features, bank, index, reverse)
                parts.append(self._predict_masks(features, conditioned))
                bank.add(index, self._remember(features, parts[-1], bank))
            predictions[index] = MaskPrediction.cat(parts)
        return predictions

    def _segment_clips(self, frames: Tensor, prompts: Tensor, clip_index: Tensor, num_key_frames: int) -> Tensor:
        length = frames.shape[1]
        features = self._encode(frames.flatten(0, 1))
        bank = MemoryBank.of(self.config)
        predictions = []
        for t in range(length):
            rows = features.rows(clip_index * length + t)
            is_looked_at = max(t + 1, num_key_frames) < length  # by a tracked frame after it
            if t < num_key_frames:
                predictions.append(self._decode(rows, prompts, output_all_masks=True))
                if is_looked_at:
                    bank.conditioning[t] = self._remember(rows, self._to_track(rows, predictions[-1]), bank)
            else:
                conditioned = self._attend(rows, bank, t, reverse=False)
                predictions.append(self._predict_masks(rows, conditioned, output_all_masks=True))
                if is_looked_at:
                    bank.add(t, self._remember(rows, predictions[-1], bank))
        return _packed(predictions)

    def _predict_masks(
        self,
        features: FrameFeatures,
        image_embeddings: Tensor,
        prompts: Tensor | None = None,
        output_all_masks: bool = False,
    ) -> MaskPrediction:
        """Runs the mask decoder on `image_embeddings` [1 or N, D, h, w], with a language token if there are prompts."""
        tracked = prompts is None
        num_objects = len(image_embeddings) if tracked else len(prompts)
        model = self.sam2_model
        masks, iou_scores, tokens, object_scores = (model.sam_mask_decoder if tracked else model.prompt_decoder)(
            image_embeddings=image_embeddings,
            image_pe=self._dense_position(image_embeddings),
            sparse_prompt_embeddings=self._sparse_prompts(num_objects, prompts),
            dense_prompt_embeddings=model.sam_prompt_encoder.no_mask_embed.weight.reshape(1, -1, 1, 1),
            multimask_output=True,
            repeat_image=len(image_embeddings) != num_objects,
            high_res_features=list(features.high_res_features if tracked else features.prompt_high_res_features),
        )
        masks, iou_scores = masks.float(), iou_scores.float()
        if tracked and self.config.separate_prompt_decoder:
            masks = torch.where(object_scores[..., None, None] > 0, masks, NO_OBJ_SCORE)
        each = torch.arange(num_objects, device=masks.device)
        best = iou_scores.argmax(dim=-1)
        return MaskPrediction(
            logits=masks[each, best].unsqueeze(1),
            iou_scores=iou_scores[each, best],
            object_scores=object_scores.float().squeeze(-1),
            object_pointers=self._object_pointers(tokens[each, best], object_scores),
            multimask_logits=masks if output_all_masks else None,
            multimask_iou_scores=iou_scores if output_all_masks else None,
        )

    def _dense_position(self, like: Tensor) -> Tensor:
        """The encoding [1, D, h, w] of the places of a map."""
        return self.sam2_model.sam_prompt_encoder.pe_layer(like.shape[-2:]).unsqueeze(0).to(like)

    def _sparse_prompts(self, num_objects: int, prompts: Tensor | None) -> Tensor:
        """Two empty points, as SAM 2 pads a prompt without clicks, then the language vector: [N, 2 or 3, D]."""
        empty = self.sam2_model.sam_prompt_encoder.not_a_point_embed.weight.expand(num_objects, 2, -1)
        return empty if prompts is None else torch.cat([empty, prompts.to(empty)[:, None]], dim=1)

    def _object_pointers(self, tokens: Tensor, object_scores: Tensor) -> Tensor:
        return torch.where(object_scores > 0, self.sam2_model.obj_ptr_proj(tokens), self.sam2_model.no_obj_ptr)

    def _remember(self, features: FrameFeatures, prediction: MaskPrediction, bank: MemoryBank) -> FrameMemory:
        """Encodes masks and raw frame features into memory; `bank` learns the position encoding from the first."""
        model = self.sam2_model
        size = (model.image_size, model.image_size)
        masks = F.interpolate(prediction.logits, size=size, mode="bilinear", align_corners=False).sigmoid()
        masks = masks * model.sigmoid_scale_for_mem_enc + model.sigmoid_bias_for_mem_enc
        vision_features = features.vision_features
        output = model.memory_encoder(vision_features, masks.to(vision_features.dtype), skip_mask_sigmoid=True)
        if bank.position is None:
            bank.position = _tokens(output["vision_pos_enc"][-1][:1])
        memory = _tokens(output["vision_features"])
        dtype = memory.dtype if self.config.memory_dtype is None else getattr(torch, self.config.memory_dtype)
        return FrameMemory(memory.to(dtype), prediction.object_pointers)

    def _attend(self, features: FrameFeatures, bank: MemoryBank, frame: int, reverse: bool) -> Tensor:
        """Fuses a frame with what the bank remembers: [N, D, h, w]."""
        model, dtype = self.sam2_model, features.vision_features.dtype
        rows, maps = zip(*bank.spatial(frame, reverse), strict=True)
        pointers = self._pointer_tokens(bank.pointers(frame, reverse), like=maps[0])
        # Contiguous for each object: attention takes one after another. Under float16 autocast `cat` takes no bfloat16.
        memory = torch.cat([part.to(dtype).transpose(0, 1) for part in (*maps, pointers)], dim=1).transpose(0, 1)
        position = bank.position + torch.stack([model.maskmem_tpos_enc[row] for row in rows])
        position = torch.cat([position.flatten(0, 1), torch.zeros_like(pointers[:, :1])])
        output = model.memory_attention(
            curr=_tokens(features.vision_features),
            curr_pos=_tokens(features.vision_pos_embeds),
            memory=memory,
            memory_pos=position.to(dtype),
            num_obj_ptr_tokens=len(pointers),
        )
        return output.permute(1, 2, 0).unflatten(-1, features.vision_features.shape[-2:])

    def _pointer_tokens(self, pointers: list[Tensor], like: Tensor) -> Tensor:
        """Splits each pointer [N, D] into D / mem_dim tokens of the memory's width: [P * D / mem_dim, N, mem_dim]."""
        if not pointers:
            return like[:0]
        stacked = torch.stack(pointers).unflatten(-1, (-1, like.shape[-1]))
        return stacked.permute(0, 2, 1, 3).flatten(0, 1)


def _memories(found: Mapping[str, Any]) -> dict[int, FrameMemory]:
    """The memories of a bank, from its part of the tree of `TrackingState.from_tensors`."""
    return {int(t): FrameMemory(m.get("features"), m["object_pointers"]) for t, m in found.items()}


def _most_frames(config: Sa2VAGroundingConfig) -> int:
    """How many frames Hiera may take at once: on CUDA the windows that attention takes together are counted in 16 bits.

    More are a "CUDA error: invalid configuration argument" (pytorch issues 142228 and 146704).
    """
    sides = (config.image_size // stride for stride in LEVEL_STRIDES)
    windows = max(math.ceil(side / window) ** 2 for side, window in zip(sides, config.window_spec, strict=True))
    return max(1, (2**16 - 1) // windows)


def _chunks(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    """Neighbours in lists of `size`, the last of what is left; drawn as they are asked for.

    What `items` raise comes behind those that were drawn before.
    """
    chunk: list[Any] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def in_batches(work: Callable[[Sequence[Any]], Any], items: Iterator[Any], size: int, what: str) -> Iterator[Any]:
    """Yields `work(batch)` for all items in order, in batches of at most `size`, which out of memory halves.

    Args:
        what: items are called in the warning.
    """
    from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size

    waiting: list[Any] = []
    while waiting := waiting + list(itertools.islice(items, max(0, size - len(waiting)))):
        batch = waiting[:size]
        try:
            result = work(batch)
        except RuntimeError as error:
            if len(batch) == 1 or not should_reduce_batch_size(error):
                raise
            result = None
        if result is None:  # only here the error lets go of what it held
            size = len(batch) // 2
            logger.warning_once(f"Out of memory with {len(batch)} {what} at once. Going on with {size}.")
            clear_device_cache(garbage_collection=True)
        else:
            waiting = waiting[len(batch) :]
            yield result


def _packed(predictions: Sequence[MaskPrediction]) -> Tensor:
    """Predictions of T frames, with all candidates, as one tensor [T, M, values].

    DeepSpeed's ZeRO-3 notes each tensor that a part gives back when its gradient comes, and refuses to go on if other
    processes, whose clips have more frames, note more.
    """
    return torch.stack([torch.cat([value.reshape(len(value), -1) for value in p], dim=1) for p in predictions])


def _unpacked(packed: Tensor, config: Sa2VAGroundingConfig) -> list[MaskPrediction]:
    """The inverse of `_packed`."""
    side = config.image_size // 4
    shapes = ((1, side, side), (), (), (config.d_model,), (3, side, side), (3,))  # of an object, as in MaskPrediction
    sizes = [math.prod(shape) for shape in shapes]
    frames = [zip(frame.split(sizes, dim=1), shapes, strict=True) for frame in packed]
    return [MaskPrediction(*(part.reshape(-1, *shape) for part, shape in parts)) for parts in frames]


def _tokens(feature_map: Tensor) -> Tensor:
    """[N, C, h, w] -> [h * w, N, C], the layout of SAM 2's memory attention."""
    return feature_map.flatten(2).permute(2, 0, 1)


__all__ = ["FrameFeatures", "MaskPrediction", "MemoryBank", "Sam2Decoder", "Sam2Model", "TrackingState"]

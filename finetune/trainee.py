"""What learns on synthetic scenes: the model, and heads that exist only while it learns."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from sa2va import Sa2VAChatModel
from sa2va.data.scenes import COLORS, SHAPES
from sa2va.data.shapes import MOTIONS
from sa2va.demo.media import replacing
from sa2va.finetune.batches import IGNORE_INDEX, MAX_COUNT, NUM_FLAGS, NUM_GROUPS

HEAD_WEIGHTS = {
    "class_loss": 0.5,
    "box_loss": 2.0,
    "point_loss": 2.0,
    "target_loss": 1.0,
    "memory_loss": 1.0,
    "cell_loss": 0.5,
    "early_loss": 0.5,
    "cell_box_loss": 2.0,
    "standing_loss": 0.5,
    "rank_loss": 0.5,
    "motion_loss": 0.5,
    "naming_loss": 0.3,
    "tracking_loss": 0.3,
    "past_loss": 3.0,
    "telling_loss": 0.3,
    "told_loss": 1.0,
}
LOSS_NAMES = ("lm_loss", "mask_loss", "dice_loss", "iou_loss", "object_score_loss", *HEAD_WEIGHTS)
NAME_LENGTH = 3  # tokens from before "red star" to its `[SEG]`
OBJECT_WEIGHT = 5.0  # of an image token that shows the object, against one of the many that don't


class SceneTrainee(nn.Module):
    """The model with linear heads that exist only while it learns.

    They read colour, shape and box off each `[SEG]` state and off each image token. That is the shortest way for a
    model without any pretraining to find out what its words are about; the text loss alone takes many times longer.
    For the same reason half the heads of two attention layers are told where to look (at the object that is named, or
    whose motion is told; in clips, at the same object in earlier frames), and the vector that prompts SAM 2 is drawn to
    SAM 2's own encoding of the object's centre. Two heads read off the mask decoder's image tokens, and off what memory
    attention makes of a tracked frame, which places show the object: without them every object is drawn at once for
    hundreds of steps or for ever, since who is meant and how to draw must be found out at the same time. Colour and
    shape are also read off amid the vision tower, so that its later layers have something to compare: how many of a
    shape there are, which of them stands leftmost.
    """

    def __init__(self, model: Sa2VAChatModel):
        super().__init__()
        self.model = model
        hidden_size = model.config.llm_config.hidden_size
        self.seg_heads = nn.ModuleList(nn.Linear(hidden_size, n) for n in (len(COLORS), len(SHAPES)))
        self.box_head = nn.Linear(hidden_size, 4)
        self.target_head = nn.Linear(model.config.grounding_config.d_model, 1)
        self.memory_head = nn.Linear(model.config.grounding_config.d_model, 1)
        self.cell_heads = nn.ModuleList(nn.Linear(hidden_size, n + 1) for n in (len(COLORS), len(SHAPES)))
        vision_size = model.config.vision_config.hidden_size
        self.early_heads = nn.ModuleList(nn.Linear(vision_size, n + 1) for n in (len(COLORS), len(SHAPES)))
        self.cell_box_head = nn.Linear(hidden_size, 4)
        self.standing_head = nn.Linear(hidden_size, NUM_GROUPS * (MAX_COUNT + NUM_FLAGS))
        self.rank_head = nn.Linear(hidden_size, NUM_GROUPS * MAX_COUNT)
        self.motion_head = nn.Linear(hidden_size, len(MOTIONS))
        self.past_head = nn.Linear(hidden_size, 2)
        self.class_prompts = nn.Embedding(len(COLORS) * len(SHAPES), model.config.grounding_config.d_model)
        nn.init.zeros_(self.class_prompts.weight)

    def forward(
        self,
        cell_classes: Tensor,
        cell_boxes: Tensor,
        cell_standings: Tensor,
        cell_ranks: Tensor,
        cell_objects: Tensor,
        cell_motions: Tensor | None = None,
        cell_pasts: Tensor | None = None,
        seg_classes: Tensor | None = None,
        seg_boxes: Tensor | None = None,
        seg_cells: Tensor | None = None,
        is_told: Tensor | None = None,
        told_cells: Tensor | None = None,
        **inputs,
    ) -> dict[str, Tensor]:
        """Losses of `Sa2VAChatModel.forward` plus those of the heads; `loss` is their sum.

        Without `input_ids` only the vision tower is run, and `loss` is that of its tokens.
        """
        seen = (cell_classes, cell_boxes, cell_standings, cell_ranks)
        vision_layers = self.model.vision_model.encoder.layer
        early_layer = vision_layers[len(vision_layers) // 2 - 1]
        if "input_ids" not in inputs:
            with _outputs(early_layer) as early:
                states = self.model.get_image_features(inputs["pixel_values"])
            losses = self._cell_losses(states, *early, *seen)
            return {"loss": _weighted(losses), **losses}
        sam2_model = self.model.grounding_encoder.sam2_model
        with (
            _outputs(early_layer) as early,
            _outputs(sam2_model.prompt_decoder.transformer) as drawn,
            _outputs(sam2_model.memory_attention) as remembered,
            _attention_inputs(self.model) as (first, second),
        ):
            output = self.model(**inputs)
        token_ids = self.model.special_token_ids()
        is_image = inputs["input_ids"] == token_ids.image
        losses = {name: output[name] for name in LOSS_NAMES if output.get(name) is not None}
        if len(seg_classes):
            states = output.seg_hidden_states
            losses["class_loss"] = _class_loss(self.seg_heads, states, seg_classes)
            losses["box_loss"] = F.l1_loss(self.box_head(states), seg_boxes)
            losses["point_loss"] = self._point_loss(self.model.text_hidden_fcs(states), seg_boxes, seg_classes)
            is_seg = (inputs["input_ids"] == token_ids.seg) & (inputs["labels"] != IGNORE_INDEX)
            losses["naming_loss"] = _naming_loss(*second, is_image, is_seg, seg_cells)
            if drawn:
                image_tokens = [tokens for _, tokens in drawn]
                losses["target_loss"] = _shown_loss(self.target_head, image_tokens, inputs["mask_labels"])
            if remembered:
                tracked = [tokens.transpose(0, 1) for tokens in remembered]
                losses["memory_loss"] = _shown_loss(self.memory_head, tracked, inputs["mask_labels"])
        losses |= self._cell_losses(output.image_hidden_states, *early, *seen)
        if cell_motions is not None:
            losses["tracking_loss"] = _tracking_loss(*first, is_image, cell_objects)
            if len(told_cells):
                losses["told_loss"] = F.cross_entropy(output.logits[is_told], inputs["labels"].roll(-1, 1)[is_told])
                losses["telling_loss"] = _looking_loss(*second, is_image, is_told, told_cells)
            losses |= self._motion_losses(second[1]["hidden_states"][is_image], cell_motions, cell_pasts)
        return {"loss": output.loss + _weighted(losses), **losses, "logits": output.logits}

    def _point_loss(self, prompts: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
        """Squared distance of the prompts from the encoded centres of visible objects.

        What all prompts for a colour and shape have in common is free: in clips the place alone says too little.
        """
        sam2_model = self.model.grounding_encoder.sam2_model
        side = sam2_model.image_size
        centres = sam2_model.sam_prompt_encoder.pe_layer.forward_with_coords(side * boxes[:, None, :2], (side, side))
        shared = self.class_prompts(classes[:, 0] * len(SHAPES) + classes[:, 1])
        distance = (prompts - centres[:, 0] - shared).square().mean(dim=1)
        visible = boxes[:, 2] > 0
        return (distance * visible).sum() / visible.sum().clamp(min=1)

    def _cell_losses(
        self, states: Tensor, early: Tensor, classes: Tensor, boxes: Tensor, standings: Tensor, ranks: Tensor
    ) -> dict[str, Tensor]:
        """What is read off image tokens, as the language model gets them, and `early`, amid the vision tower."""
        places = F.layer_norm(early, early.shape[-1:])[:, 1:]  # the first token is the class token
        shows_object = classes[..., 0] > 0
        box_loss = (self.cell_box_head(states) - boxes).abs().mean(dim=-1)[shows_object].sum()
        return {
            "cell_loss": _cell_loss(self.cell_heads, states, classes),
            "early_loss": _cell_loss(self.early_heads, places, classes),
            "cell_box_loss": box_loss / shows_object.sum().clamp(min=1),
            "standing_loss": self._standing_loss(states, standings),
            "rank_loss": self._rank_loss(states, ranks),
        }

    def _motion_losses(self, states: Tensor, motions: Tensor, pasts: Tensor) -> dict[str, Tensor]:
        """How objects move and where they were, read off the language model's states [N, hidden] halfway."""
        logits = self.motion_head(F.layer_norm(states, states.shape[-1:]))
        pasts = pasts.flatten(0, 1)
        known = ~pasts.isnan().any(dim=-1)
        return {
            "motion_loss": F.cross_entropy(logits, motions.flatten(), ignore_index=IGNORE_INDEX),
            "past_loss": F.l1_loss(self.past_head(states[known]), pasts[known]),
        }

    def _standing_loss(self, states: Tensor, standings: Tensor) -> Tensor:
        """Cross entropy of what `_standings` says, for tokens [tiles, tokens, D] that show an object."""
        known = standings[..., 0, 0] != IGNORE_INDEX
        if not known.any():
            return states.new_zeros(())
        logits = self.standing_head(states[known]).unflatten(-1, (NUM_GROUPS, MAX_COUNT + NUM_FLAGS))
        counts, flags = standings[known][..., 0], standings[known][..., 1:]
        plain = flags != IGNORE_INDEX
        count_loss = F.cross_entropy(logits[..., :MAX_COUNT].flatten(0, 1), counts.flatten())
        return count_loss + F.binary_cross_entropy_with_logits(logits[..., MAX_COUNT:][plain], flags[plain].float())

    def _rank_loss(self, states: Tensor, ranks: Tensor) -> Tensor:
        """Cross entropy of what `_ranks` says, for tokens [tiles, tokens, D] whose place in a group is plain."""
        known = ranks != IGNORE_INDEX
        if not known.any():
            return states.new_zeros(())
        logits = self.rank_head(states).unflatten(-1, (NUM_GROUPS, MAX_COUNT))
        return F.cross_entropy(logits[known], ranks[known])


@contextmanager
def _outputs(module: nn.Module) -> Iterator[list[Any]]:
    """Collects what a module gives, call by call, while the block runs."""
    collected: list[Any] = []
    handle = module.register_forward_hook(lambda module, args, output: collected.append(output))
    try:
        yield collected
    finally:
        handle.remove()


@contextmanager
def _attention_inputs(model: Sa2VAChatModel) -> Iterator[list[tuple[nn.Module, dict[str, Tensor]]]]:
    """Two attention layers amid the language model, and what they are called with while the block runs."""
    layers = model.get_decoder().layers
    middle = len(layers) // 2
    collected = [(layer.self_attn, {}) for layer in layers[middle - 1 : middle + 1]]
    handles = [
        layer.register_forward_pre_hook(
            lambda module, args, kwargs, inputs=inputs: inputs.update(kwargs), with_kwargs=True
        )
        for layer, inputs in collected
    ]
    try:
        yield collected
    finally:
        for handle in handles:
            handle.remove()


def _shown_loss(head: nn.Module, tokens: Sequence[Tensor], mask_labels: Sequence[Tensor]) -> Tensor:
    """Cross entropy of "this place shows the object", for tokens [objects, h * w, D] of each of the last frames."""
    logits = torch.stack([head(frame)[..., 0] for frame in tokens], dim=1)
    side = round(logits.shape[-1] ** 0.5)
    masks = [m[:, -len(tokens) :].float() for m in mask_labels if len(m)]
    targets = torch.cat([F.interpolate(m, size=(side, side), mode="area") for m in masks]).flatten(2)
    return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=logits.new_tensor(OBJECT_WEIGHT))


def _attention_loss(layer: nn.Module, inputs: dict, rows: Tensor, columns: Tensor, wanted: Tensor) -> Tensor:
    """Minus log of how much half the heads look where they should.

    Args:
        layer: an attention layer; inputs: what it was called with.
        rows, columns: int64 [N], the tokens that look: samples and places in them.
        wanted: [N, L], in 0..1, the tokens that should be looked at.
    """
    states, (cos, sin) = inputs["hidden_states"], inputs["position_embeddings"]
    queries = layer.q_proj(states).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    keys = layer.k_proj(states).unflatten(-1, (-1, layer.head_dim)).transpose(1, 2)
    queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
    queries, keys = queries[:, : queries.shape[1] // keys.shape[1]], keys[:, 0]  # the heads that share the first keys
    logits = torch.einsum("nhd,nld->nhl", queries[rows, :, columns], keys[rows]) * layer.scaling
    later = torch.arange(states.shape[1], device=columns.device) > columns[:, None]
    attention = logits.masked_fill(later[:, None], -torch.inf).softmax(dim=-1)
    looks = (attention * wanted[:, None]).sum(dim=-1).clamp(min=1e-20)
    return -looks.log().sum() / max(1, looks.numel())


def _naming_loss(layer: nn.Module, inputs: dict, is_image: Tensor, is_seg: Tensor, seg_cells: Tensor) -> Tensor:
    """Attention to an object where it is about to be named, and at its `[SEG]`; see `_looking_loss`."""
    return sum(_looking_loss(layer, inputs, is_image, is_seg, seg_cells, back) for back in (0, NAME_LENGTH))


def _looking_loss(
    layer: nn.Module, inputs: dict, is_image: Tensor, is_about: Tensor, cells: Tensor, back: int = 0
) -> Tensor:
    """Attention to an object at the tokens about it, or so many before.

    Args:
        is_image, is_about: bool [B, L], the image tokens, and M tokens about an object each.
        cells: [M, tokens], how much of each image token of its sample each of the M objects covers, then zeros.
    """
    rows, columns = is_about.nonzero(as_tuple=True)
    visible = cells.amax(dim=1) > 0
    rows, columns, cells = rows[visible], columns[visible], cells[visible]
    order = is_image.cumsum(dim=1) - 1
    places = is_image & (order < cells.shape[1])  # image tokens of visual prompts come later
    wanted = cells.gather(1, order.clamp(0, cells.shape[1] - 1)[rows]) * places[rows]
    wanted = wanted / wanted.amax(dim=1, keepdim=True)
    return _attention_loss(layer, inputs, rows, (columns - back).clamp(min=0), wanted)


def _tracking_loss(layer: nn.Module, inputs: dict, is_image: Tensor, cell_objects: Tensor) -> Tensor:
    """Attention of what shows an object to the same object in earlier frames.

    Args:
        is_image: bool [B, L].
        cell_objects: int64 [B * frames, tokens], which object each image token shows, -1 for background.
    """
    objects = cell_objects.reshape(len(is_image), -1)
    frames = torch.arange(objects.shape[1], device=objects.device) // cell_objects.shape[1]
    same = (objects[:, :, None] == objects[:, None]) & (objects >= 0)[:, None] & (frames[:, None] > frames)
    rows, tokens = same.any(dim=2).nonzero(as_tuple=True)
    places = is_image.nonzero(as_tuple=True)[1].reshape(objects.shape)
    wanted = inputs["hidden_states"].new_zeros(len(rows), is_image.shape[1])
    wanted.scatter_(1, places[rows], same[rows, tokens].to(wanted))
    return _attention_loss(layer, inputs, rows, places[rows, tokens], wanted)


def _weighted(losses: dict[str, Tensor]) -> Tensor:
    return sum(weight * losses[name] for name, weight in HEAD_WEIGHTS.items() if name in losses)


def _class_loss(heads: nn.ModuleList, states: Tensor, classes: Tensor) -> Tensor:
    return sum(F.cross_entropy(head(states).flatten(0, -2), classes[..., i].flatten()) for i, head in enumerate(heads))


def _cell_loss(heads: nn.ModuleList, states: Tensor, classes: Tensor) -> Tensor:
    """Cross entropy of image tokens, half of it from the few that show an object."""
    shows_object = classes[..., 0].flatten() > 0
    weights = torch.where(shows_object, 0.5 / shows_object.sum().clamp(min=1), 0.5 / (~shows_object).sum().clamp(min=1))
    losses = (
        F.cross_entropy(head(states).flatten(0, -2), classes[..., i].flatten(), reduction="none")
        for i, head in enumerate(heads)
    )
    return sum((loss * weights).sum() for loss in losses)


def save_heads(trainee: SceneTrainee, path: Path) -> None:
    """Saves what only training needs, so that a later sitting need not begin with heads that know nothing."""
    with replacing(path) as temporary:
        save_file({name: t for name, t in trainee.state_dict().items() if not name.startswith("model.")}, temporary)


def load_heads(trainee: SceneTrainee, path: Path) -> None:
    """Loads what `save_heads` saved, if there is such a file."""
    if path.is_file():
        trainee.load_state_dict(load_file(path), strict=False)

"""Trains a small Sa2VA from nothing on synthetic scenes, with `transformers.Trainer`.

    python finetune/train.py --preset ten-minutes --output_dir runs/quick
    python finetune/train.py --preset full --output_dir runs/tiny          # run it again to go on where it stopped

Every argument of `transformers.TrainingArguments` works and wins over the preset. The result (weights, tokenizer,
processor files, the curve as curve.png) lands in OUTPUT_DIR/final.
"""

import argparse
import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.trainer_utils import get_last_checkpoint

from sa2va import Sa2VAChatModel, Sa2VAProcessor
from sa2va.data.scenes import COLORS, SHAPES
from sa2va.data.shapes import MOTIONS
from sa2va.finetune.batches import (
    CURRICULUM,
    IGNORE_INDEX,
    MAX_COUNT,
    NUM_FLAGS,
    NUM_GROUPS,
    WORDS_TASKS,
    SceneCollator,
    ScheduledScenes,
    Stage,
)
from sa2va.finetune.tiny import build_model

TINY = str(Path(__file__).resolve().parents[1] / "sa2va-tiny")
PRESETS = {
    # As the paper starts: words and sight are there, how to draw what a [SEG] means is learned from nothing.
    "ten-minutes": {
        "max_steps": 300,
        "learning_rate": 3e-3,
        "init": TINY,
        "new": "mask_decoder",
        "learn": "mask_decoder",
        "clips_per_batch": 4,
        "num_frames": 7,
    },
    # Everything from nothing.
    "full": {"max_steps": 6000, "learning_rate": 1.2e-3, "clips_per_batch": 6, "num_frames": 8},
    "smoke": {"max_steps": 4, "per_device_train_batch_size": 4, "clips_per_batch": 2, "num_frames": 6},
}
HEAD_WEIGHTS = {
    "class_loss": 0.5,
    "box_loss": 2.0,
    "point_loss": 2.0,
    "target_loss": 1.0,
    "cell_loss": 0.5,
    "cell_box_loss": 2.0,
    "standing_loss": 0.5,
    "motion_loss": 0.5,
    "naming_loss": 0.3,
    "tracking_loss": 0.3,
    "past_loss": 3.0,
}
HEADS = "heads.safetensors"
NAME_LENGTH = 3  # tokens from before "red star" to its `[SEG]`
OBJECT_WEIGHT = 5.0  # of an image token that shows the object, against one of the many that don't
PARTS = {  # by the names of their parameters
    "language": re.compile("mlp1|language_model|text_hidden_fcs"),
    "mask_decoder": re.compile(r"text_hidden_fcs|grounding_encoder\.sam2_model\.(sam_mask_decoder|sam_prompt_encoder)"),
}
LEARNERS = {  # what learns
    "all": re.compile(""),
    "words": re.compile("(?!grounding_encoder)"),
    "sam2": re.compile("text_hidden_fcs|grounding_encoder"),
    "mask_decoder": PARTS["mask_decoder"],
}
LOSS_NAMES = ("lm_loss", "mask_loss", "dice_loss", "iou_loss", "object_score_loss", *HEAD_WEIGHTS)


class SceneTrainee(nn.Module):
    """The model with linear heads that exist only while it learns.

    They read colour, shape and box off each `[SEG]` state and off each image token. That is the shortest way for a
    model without any pretraining to find out what its words are about; the text loss alone takes many times longer.
    For the same reason the vector that prompts SAM 2 is drawn to SAM 2's own encoding of the object's centre, and a
    head reads off the mask decoder's image tokens which of them show the prompted object: without it the decoder draws
    every object at once for hundreds of steps, since it must find out who is meant and how to draw at the same time.
    """

    def __init__(self, model: Sa2VAChatModel):
        super().__init__()
        self.model = model
        hidden_size = model.config.llm_config.hidden_size
        self.seg_heads = nn.ModuleList(nn.Linear(hidden_size, n) for n in (len(COLORS), len(SHAPES)))
        self.box_head = nn.Linear(hidden_size, 4)
        self.target_head = nn.Linear(model.config.grounding_config.d_model, 1)
        self.cell_heads = nn.ModuleList(nn.Linear(hidden_size, n + 1) for n in (len(COLORS), len(SHAPES)))
        self.cell_box_head = nn.Linear(hidden_size, 4)
        self.standing_head = nn.Linear(hidden_size, NUM_GROUPS * (MAX_COUNT + NUM_FLAGS))
        self.motion_head = nn.Linear(hidden_size, len(MOTIONS))
        self.past_head = nn.Linear(hidden_size, 2)

    def forward(
        self,
        cell_classes: Tensor,
        cell_boxes: Tensor,
        cell_standings: Tensor,
        cell_objects: Tensor,
        cell_motions: Tensor | None = None,
        cell_pasts: Tensor | None = None,
        seg_classes: Tensor | None = None,
        seg_boxes: Tensor | None = None,
        seg_cells: Tensor | None = None,
        **inputs,
    ) -> dict[str, Tensor]:
        """Losses of `Sa2VAChatModel.forward` plus those of the heads; `loss` is their sum.

        Without `input_ids` only the vision tower is run, and `loss` is that of its tokens.
        """
        if "input_ids" not in inputs:
            states = self.model.get_image_features(inputs["pixel_values"])
            losses = self._cell_losses(states, cell_classes, cell_boxes, cell_standings)
            return {"loss": _weighted(losses), **losses}
        with _image_tokens(self.model) as image_tokens, _attention_inputs(self.model) as (first, second):
            output = self.model(**inputs)
        token_ids = self.model.special_token_ids()
        is_image = inputs["input_ids"] == token_ids.image
        losses = {name: output[name] for name in LOSS_NAMES if output.get(name) is not None}
        if len(seg_classes):
            states = output.seg_hidden_states
            losses["class_loss"] = _class_loss(self.seg_heads, states, seg_classes)
            losses["box_loss"] = F.l1_loss(self.box_head(states), seg_boxes)
            losses["point_loss"] = self._point_loss(self.model.text_hidden_fcs(states), seg_boxes)
            is_seg = (inputs["input_ids"] == token_ids.seg) & (inputs["labels"] != IGNORE_INDEX)
            losses["naming_loss"] = _naming_loss(*second, is_image, is_seg, seg_cells)
            if image_tokens:
                losses["target_loss"] = self._target_loss(image_tokens, inputs["mask_labels"])
        losses |= self._cell_losses(output.image_hidden_states, cell_classes, cell_boxes, cell_standings)
        if cell_motions is not None:
            losses["tracking_loss"] = _tracking_loss(*first, is_image, cell_objects)
            states = second[1]["hidden_states"][is_image]
            motions = self.motion_head(F.layer_norm(states, states.shape[-1:]))
            losses["motion_loss"] = F.cross_entropy(motions, cell_motions.flatten(), ignore_index=IGNORE_INDEX)
            pasts = cell_pasts.flatten(0, 1)
            known = ~pasts.isnan().any(dim=-1)
            losses["past_loss"] = F.l1_loss(self.past_head(states[known]), pasts[known])
        return {"loss": output.loss + _weighted(losses), **losses, "logits": output.logits}

    def _point_loss(self, prompts: Tensor, boxes: Tensor) -> Tensor:
        """Squared distance of the prompts from the encoded centres of visible objects."""
        sam2_model = self.model.grounding_encoder.sam2_model
        side = sam2_model.image_size
        centres = sam2_model.sam_prompt_encoder.pe_layer.forward_with_coords(side * boxes[:, None, :2], (side, side))
        distance = (prompts - centres[:, 0]).square().mean(dim=1)
        visible = boxes[:, 2] > 0
        return (distance * visible).sum() / visible.sum().clamp(min=1)

    def _target_loss(self, image_tokens: list[Tensor], mask_labels: Sequence[Tensor]) -> Tensor:
        """Cross entropy of "this token shows the object", for tokens [objects, h * w, D] of every frame."""
        logits = torch.stack([self.target_head(tokens)[..., 0] for tokens in image_tokens], dim=1)
        side = round(logits.shape[-1] ** 0.5)
        masks = [F.interpolate(m.float(), size=(side, side), mode="area") for m in mask_labels if len(m)]
        targets = torch.cat(masks).flatten(2)
        return F.binary_cross_entropy_with_logits(logits, targets, pos_weight=logits.new_tensor(OBJECT_WEIGHT))

    def _cell_losses(self, states: Tensor, classes: Tensor, boxes: Tensor, standings: Tensor) -> dict[str, Tensor]:
        shows_object = classes[..., 0] > 0
        box_loss = (self.cell_box_head(states) - boxes).abs().mean(dim=-1)[shows_object].sum()
        return {
            "cell_loss": _cell_loss(self.cell_heads, states, classes),
            "cell_box_loss": box_loss / shows_object.sum().clamp(min=1),
            "standing_loss": self._standing_loss(states, standings),
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


@contextmanager
def _image_tokens(model: Sa2VAChatModel) -> Iterator[list[Tensor]]:
    """Collects what the mask decoder's transformer makes of the image, frame by frame, while the block runs."""
    collected: list[Tensor] = []
    transformer = model.grounding_encoder.sam2_model.prompt_decoder.transformer
    handle = transformer.register_forward_hook(lambda module, args, output: collected.append(output[1]))
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
    return -(attention * wanted[:, None]).sum(dim=-1).clamp(min=1e-20).log().mean()


def _naming_loss(layer: nn.Module, inputs: dict, is_image: Tensor, is_seg: Tensor, seg_cells: Tensor) -> Tensor:
    """Attention to an object where it is about to be named, and at its `[SEG]`.

    Args:
        is_image, is_seg: bool [B, L], the image tokens and the `[SEG]` tokens of the answers.
        seg_cells: [M, tokens], how much of each image token of its sample each of the M objects covers.
    """
    rows, columns = is_seg.nonzero(as_tuple=True)
    visible = seg_cells.amax(dim=1) > 0
    rows, columns, cells = rows[visible], columns[visible], seg_cells[visible]
    wanted = cells.new_zeros(len(rows), is_seg.shape[1])
    places = is_image & (is_image.cumsum(dim=1) <= cells.shape[1])  # those of visual prompts come later
    wanted[places[rows]] = (cells / cells.amax(dim=1, keepdim=True)).flatten()
    backs = (0, NAME_LENGTH)
    return sum(_attention_loss(layer, inputs, rows, (columns - back).clamp(min=0), wanted) for back in backs)


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
    save_file({name: t for name, t in trainee.state_dict().items() if not name.startswith("model.")}, path)


def load_heads(trainee: SceneTrainee, path: Path) -> None:
    """Loads what `save_heads` saved, if there is such a file."""
    if path.is_file():
        trainee.load_state_dict(load_file(path), strict=False)


class SceneTrainer(Trainer):
    """`Trainer` that keeps the order of the curriculum and logs each part of the loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._parts: dict[str, list[float]] = defaultdict(list)

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        """Warms up once more where words begin: most modules stood still, and full steps would spoil them."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        start, length = self.train_dataset.first_words, max(1, self.args.warmup_steps)

        def again(step: int) -> float:
            return 1.0 if step < start else min(1.0, (step - start + 1) / length)

        scheduler.lr_lambdas = [
            lambda step, planned=planned: planned(step) * again(step) for planned in scheduler.lr_lambdas
        ]
        return scheduler

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        """Runs the trainee and notes the parts for the next log line."""
        outputs = model(**inputs)
        for name in LOSS_NAMES:
            if name in outputs:
                self._parts[name].append(outputs[name].item())
        if "logits" in outputs:
            self._parts["token_accuracy"].append(_token_accuracy(outputs["logits"], inputs["labels"]))
        return (outputs["loss"], outputs) if return_outputs else outputs["loss"]

    def log(self, logs, *args, **kwargs):
        """Adds the mean of each part since the last log line."""
        if "loss" in logs and self._parts:
            logs |= {name: round(sum(values) / len(values), 4) for name, values in self._parts.items() if values}
            self._parts.clear()
        super().log(logs, *args, **kwargs)


def _token_accuracy(logits: Tensor, labels: Tensor) -> float:
    wanted = labels[:, 1:]
    hits = (logits[:, :-1].argmax(dim=-1) == wanted)[wanted != IGNORE_INDEX]
    return hits.float().mean().item()


def draw_curve(history: list[dict], path: Path) -> None:
    """Draws the logged losses over the steps as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    logs = [entry for entry in history if "loss" in entry]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 3.6), constrained_layout=True)
    for name in ("lm_loss", *HEAD_WEIGHTS):
        left.plot(*_series(logs, name), label=name)
    for name in ("mask_loss", "dice_loss", "iou_loss", "object_score_loss"):
        right.plot(*_series(logs, name), label=name)
    for axis, title in ((left, "words"), (right, "masks")):
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _series(logs: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], float(entry[name])) for entry in logs if name in entry]
    points = [(step, value) for step, value in points if math.isfinite(value)]
    return [step for step, _ in points], [value for _, value in points]


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, TrainingArguments]:
    """Our few options, and everything else as `TrainingArguments` on top of the preset."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="ten-minutes", help="how long to learn")
    parser.add_argument("--clips_per_batch", type=int, help="clips in a step that trains on clips")
    parser.add_argument("--init", metavar="FOLDER", help="go on from a saved model, with the last stage's mix of tasks")
    parser.add_argument("--learn", choices=LEARNERS, help="what learns (default: all)")
    parser.add_argument("--new", choices=PARTS, help="with --init: the part that begins from nothing again")
    parser.add_argument("--num_frames", type=int, help="frames in a clip; those after the key frames are tracked")
    options, rest = parser.parse_known_args(argv)
    preset = dict(PRESETS[options.preset])
    for name in ("init", "new", "learn", "clips_per_batch", "num_frames"):
        value = preset.pop(name, None)
        setattr(options, name, getattr(options, name) or value)
    options.learn = options.learn or "all"
    defaults = {
        "output_dir": "runs/tiny",
        "per_device_train_batch_size": 32,
        "learning_rate": 1.2e-3,
        "warmup_steps": max(1, preset["max_steps"] // 20),
        "lr_scheduler_type": "cosine",
        "weight_decay": 0.02,
        "max_grad_norm": 1.0,
        "adam_beta2": 0.99,
        "logging_steps": 10,
        "save_steps": 200,
        "save_total_limit": 2,
        "dataloader_num_workers": 1,
        "remove_unused_columns": False,
        "report_to": "none",
        "seed": 0,
        "label_names": "labels",
        "prediction_loss_only": True,
        **preset,
    }
    given = {word[2:].split("=")[0] for word in rest if word.startswith("--")}
    words = [word for k, v in defaults.items() if k not in given for word in (f"--{k}", str(v))]
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words + rest)
    return options, arguments


def curriculum_of(options: argparse.Namespace) -> Sequence[Stage]:
    """All stages for a fresh model, the last for a saved one; what serves it best for a part of one."""
    if options.learn == "mask_decoder":
        return (Stage(1.0, {"refer": 3, "multi": 1, "caption": 1}),)
    if options.learn == "words":
        return (Stage(1.0, WORDS_TASKS, video_share=0.3),)
    return CURRICULUM[-1:] if options.init else CURRICULUM


def start(folder: str | None, seed: int, new: str | None = None) -> tuple[Sa2VAChatModel, Sa2VAProcessor]:
    """A fresh small model, or a saved one with its processor, all of it or all but the part called `new`."""
    if folder is None:
        return build_model(seed)
    set_seed(seed)
    model = Sa2VAChatModel.from_pretrained(folder)
    if new is None:
        return model, model.load_processor()
    fresh, processor = build_model(seed)
    kept = {name: tensor for name, tensor in model.state_dict().items() if not PARTS[new].match(name)}
    fresh.load_state_dict(kept, strict=False)
    return fresh, processor


def main(argv: list[str] | None = None) -> Path:
    """Trains, or goes on training, and returns the folder with the result."""
    options, arguments = parse_arguments(argv)
    model, processor = start(options.init, arguments.seed, options.new)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(LEARNERS[options.learn].match(name) is not None)
    dataset = ScheduledScenes(
        arguments.seed,
        arguments.max_steps * arguments.gradient_accumulation_steps,
        arguments.per_device_train_batch_size * arguments.world_size,
        options.clips_per_batch,
        options.num_frames,
        curriculum_of(options),
    )
    trainee = SceneTrainee(model)
    if options.init:
        load_heads(trainee, Path(options.init).parent / HEADS)
    collator = SceneCollator(processor, masks=options.learn != "words")
    trainer = SceneTrainer(model=trainee, args=arguments, train_dataset=dataset, data_collator=collator)
    output = Path(arguments.output_dir)
    resume = arguments.resume_from_checkpoint or (get_last_checkpoint(str(output)) if output.is_dir() else None)
    trainer.train(resume_from_checkpoint=resume)
    final = output / "final"
    if trainer.is_world_process_zero():
        model.save_pretrained(final)
        save_heads(trainee, output / HEADS)
        processor.save_pretrained(final)
        draw_curve(trainer.state.log_history, final / "curve.png")
        settings = {"preset": options.preset, "seed": arguments.seed, "steps": trainer.state.global_step}
        (final / "training.json").write_text(json.dumps(settings, indent=2) + "\n")
    return final


if __name__ == "__main__":
    main()

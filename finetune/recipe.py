"""Trains a Sa2VA checkpoint on one's own data, by the recipe of the paper, with `transformers.Trainer`.

    python finetune/train.py --model ByteDance/Sa2VA-4B --data finetune:my_data --output_dir runs/mine
    accelerate launch --config_file finetune/accelerate/ddp.yaml finetune/train.py --model ... --data ... --resume

`--data` names data sets of `data/registry.py` as NAME:FOLDER[:WEIGHT], or a YAML or JSON file that lists them under
"datasets" with their options; it may be repeated. Every argument of `transformers.TrainingArguments` works (but label
smoothing, sampling strategies, and losses that are not averaged over devices) and wins over the recipe. In OUTPUT_DIR
land checkpoints, previews/ (pictures of what the model answers), adapter/ (what was learned, for PEFT) and final/ (the
whole model in the released layout).

By default a step sees 256 samples, by gradient accumulation. It is the same step however they are spread over
processes and accumulated: each loss is summed over tokens, or over objects and frames, and divided by how many there
are in all of the step.
"""

import argparse
import functools
import json
import math
import os
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.data import ConcatDataset, SequentialSampler
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.integrations import deepspeed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from sa2va import Sa2VAChatModel, Sa2VAProcessor
from sa2va.data.mixture import Mixture
from sa2va.data.registry import Dataset, open_dataset
from sa2va.demo.media import write_json
from sa2va.demo.predict import check_model_name
from sa2va.finetune.collator import Numbered, SampleCollator
from sa2va.finetune.merge import merge_adapter, name_pattern, release_adapter
from sa2va.finetune.previews import Previews
from sa2va.modeling_sa2va import IGNORE_INDEX

GLOBAL_BATCH = 256
LOSS_PARTS = ("lm_loss", "mask_loss", "dice_loss", "iou_loss", "object_score_loss")
LOSS_SETTINGS = ("mask_loss_weight", "dice_loss_weight", "num_points")
SCORE_HEADS = {"iou_loss_weight": "iou_prediction_head", "object_score_loss_weight": "pred_obj_score_head"}
ALL_LINEAR = "all-linear"
RECORD = "recipe.json"  # in a checkpoint, the settings that a run must keep
# Optimizer of the paper's recipe; betas .9 and .999, one epoch.
TRAINING_DEFAULTS = {
    "num_train_epochs": 1,
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "ddp_timeout": 7200,  # seconds that processes wait for the one which merges and writes the result
    "learning_rate": 4e-5,
    "warmup_steps": 0.05,  # of all steps
    "lr_scheduler_type": "cosine",
    "weight_decay": 0.05,
    "max_grad_norm": 1.0,
    "logging_steps": 10,
    "save_steps": 500,
    "save_total_limit": 2,
    "dataloader_num_workers": 2,
    "ddp_find_unused_parameters": False,  # `run_idle_parts` leaves none
    "remove_unused_columns": False,
    "label_names": "labels",
    "report_to": "none",
    "prediction_loss_only": True,
}


@dataclass
class RecipeArguments:
    """What learns, and how samples are cut; the defaults are the recipe of arXiv 2501.04001 and its code."""

    model: str = field(metadata={"help": "checkpoint to start from: a folder, or a name on the Hub"})
    split: str = field(default="train", metadata={"help": "split of the data sets that don't name their own"})
    eval_split: str | None = field(
        default=None, metadata={"help": "split of the same data sets, whose loss --eval_strategy takes"}
    )
    resume: bool = field(default=False, metadata={"help": "go on from the newest checkpoint in OUTPUT_DIR, if any"})
    lora_rank: int = field(default=256, metadata={"help": "of the language model's adapter; 0 trains it in full"})
    lora_alpha: int = field(default=512, metadata={"help": "scale of the adapter, over its rank"})
    lora_dropout: float = field(default=0.05, metadata={"help": "share of the adapter's inputs that is left out"})
    lora_targets: list[str] = field(
        default_factory=lambda: [ALL_LINEAR],
        metadata={
            "help": "names of modules, as here or in the released code, wherever they are; all-linear: all of the "
            "language model"
        },
    )
    train_modules: list[str] = field(
        default_factory=lambda: ["embed_tokens", "lm_head", "mlp1", "text_hidden_fcs", "mask_decoder"],
        metadata={"help": "trained in full beside the adapter ('': none); all else is frozen"},
    )
    mask_loss_weight: float | None = field(default=None, metadata={"help": "default: the checkpoint's (2.0)"})
    dice_loss_weight: float | None = field(default=None, metadata={"help": "default: the checkpoint's (0.5)"})
    num_points: int | None = field(
        default=None, metadata={"help": "points a mask that losses are taken at, 0: everywhere; default 12544"}
    )
    frames: int = field(default=5, metadata={"help": "frames of a clip"})
    objects: int = field(default=5, metadata={"help": "objects of a sample, of those that can be left out"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a conversation (default: 8192, around Qwen2.5-VL 12288)"}
    )
    preview_steps: int = field(default=500, metadata={"help": "steps between previews; 0: none"})
    previews: int = field(default=4, metadata={"help": "samples that previews show"})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "of frozen weights; auto: bfloat16 with --bf16 where nothing is sharded"}
    )


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Tells defaults, but for those that are None or told already."""

    def _get_help_string(self, action):
        is_told = action.default is None or "default" in (action.help or "")
        return action.help if is_told else super()._get_help_string(action)


def parse_arguments(
    argv: Sequence[str] | None = None,
) -> tuple[RecipeArguments, TrainingArguments, list[str]]:
    """The recipe's arguments, those of `TrainingArguments` on top of the recipe's, and the `--data` given.

    Raises:
        ValueError: a number out of range, or several GPUs without a launcher.
    """
    parser = HfArgumentParser((RecipeArguments, TrainingArguments), description=__doc__, formatter_class=_Help)
    listed = "data sets, see docs/data.md, or a .yaml or .json file that lists them"
    parser.add_argument(
        "--data", action="extend", nargs="+", required=True, metavar="NAME:FOLDER[:WEIGHT]|FILE", help=listed
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    defaults = dict(TRAINING_DEFAULTS)
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        defaults["bf16"] = True
    words = [word for name, value in defaults.items() for word in (f"--{name}", str(value))]  # later ones win
    batch = parser.parse_known_args(words + argv)[0].per_device_train_batch_size * int(os.environ.get("WORLD_SIZE", 1))
    words += ["--gradient_accumulation_steps", str(max(1, GLOBAL_BATCH // batch))]
    recipe, training, options = parser.parse_args_into_dataclasses(words + argv)
    _check(recipe, training)
    return recipe, training, options.data


def _check(recipe: RecipeArguments, training: TrainingArguments) -> None:
    for name in ("frames", "objects", "max_length"):
        if (value := getattr(recipe, name)) is not None and value < 1:
            raise ValueError(f"--{name} {value} must be at least 1.")
    for name in ("lora_rank", "num_points", "preview_steps", "previews"):
        if (value := getattr(recipe, name)) is not None and value < 0:
            raise ValueError(f"--{name} {value} must be at least 0.")
    mixed = {"bfloat16": training.bf16, "float16": training.fp16 and not training.use_cpu}
    if not mixed.get(recipe.dtype, True):
        needed = "--bf16" if recipe.dtype == "bfloat16" else "--fp16 on a GPU"
        raise ValueError(f"--dtype {recipe.dtype} needs {needed}: what is trained is float32, and must meet the rest.")
    for name in ("mask_loss_weight", "dice_loss_weight"):
        if (getattr(recipe, name) or 0) < 0:
            raise ValueError(f"--{name} {getattr(recipe, name)} would teach to make masks worse. Give 0 or more.")
    if training.label_smoothing_factor:
        raise ValueError(
            "--label_smoothing_factor would have Trainer take the loss of words alone, and no mask would be learned. "
            "Leave it out."
        )
    if training.world_size > 1 and not training.average_tokens_across_devices:
        raise ValueError(
            "--average_tokens_across_devices False would have the losses of words and of masks weigh differently on "
            "several devices. Leave it out."
        )
    if (strategy := getattr(training, "train_sampling_strategy", "random")) not in ("random", "sequential"):
        raise ValueError(
            f"--train_sampling_strategy {strategy} can't be followed: samples come in the order that the mixture draws "
            "them in. Leave it out."
        )
    if training.eval_strategy != "no" and recipe.eval_split is None:
        raise ValueError(f"--eval_strategy {training.eval_strategy.value} needs --eval_split, such as val, too.")
    check_gpus(training)


def check_gpus(training: TrainingArguments) -> None:
    """Refuses what `DataParallel` would make of a batch.

    Raises:
        ValueError: several GPUs, but one process.
    """
    if training.n_gpu > 1:
        raise ValueError(
            f"There are {training.n_gpu} GPUs, but one process. Use a launcher, such as accelerate launch "
            "--config_file finetune/accelerate/ddp.yaml finetune/train.py ..., or set CUDA_VISIBLE_DEVICES to one."
        )


# ---------- data


def open_datasets(
    data: Sequence[str], split: str, held_out: bool = False
) -> tuple[dict[str, Dataset], dict[str, float] | None]:
    """Opens what `--data` names.

    Args:
        data: NAME:FOLDER[:WEIGHT], or a path to a YAML or JSON file: `datasets`, a list of mappings with "name", "root"
            and if need be "weight", "split", "eval_split" and options of the reader.
        split: for those that name none.
        held_out: open the splits that are held out: "eval_split" in place of "split".

    Returns:
        The data sets by a name of their own, and their weights: None if none was given (each weighs as many samples as
        it has), else 1 where none was given.

    Raises:
        ValueError, OSError: see `open_dataset`; a data set that is written otherwise.
    """
    datasets: dict[str, Dataset] = {}
    weights: dict[str, float | None] = {}
    for entry in (entry for word in data for entry in _entries(word)):
        chosen = entry.pop("split", split), entry.pop("eval_split", split)
        entry = {**entry, "split": chosen[held_out]}
        weight = entry.pop("weight", None)
        key = f"{entry['name']}:{entry['root']}"
        key = key if key not in datasets else f"{key}#{len(datasets)}"
        if not isinstance(weight, int | float | None):
            raise ValueError(f"The weight {weight!r} of {key} must be a number.")
        try:
            datasets[key], weights[key] = open_dataset(**entry), weight
        except TypeError as error:
            raise ValueError(f"{key} can't be opened with {entry}: {error}") from error
    if all(weight is None for weight in weights.values()):
        return datasets, None
    return datasets, {key: 1.0 if weight is None else float(weight) for key, weight in weights.items()}


def _entries(word: str) -> list[dict[str, Any]]:
    """The data sets that one word of `--data` stands for."""
    if word.endswith((".yaml", ".yml", ".json")):
        import yaml

        try:
            listed = yaml.safe_load(Path(word).read_text(encoding="utf-8"))  # JSON is YAML
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ValueError(f"{word} is no YAML: {error}") from error
        entries = listed.get("datasets") if isinstance(listed, Mapping) else None
        if not (
            isinstance(entries, list) and all(isinstance(e, Mapping) and {"name", "root"} <= set(e) for e in entries)
        ):
            raise ValueError(f'{word} must hold "datasets": a list of mappings with "name" and "root".')
        return [dict(entry) for entry in entries]
    name, colon, rest = word.partition(":")
    root, _, weight = rest.rpartition(":")
    if not re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) or not root:
        root, weight = rest, ""
    if not (name and colon and root):
        raise ValueError(f"--data {word!r} must be NAME:FOLDER, NAME:FOLDER:WEIGHT, or a .yaml or .json file.")
    return [{"name": name, "root": root, **({"weight": float(weight)} if weight else {})}]


def plan_mixture(
    datasets: Mapping[str, Dataset], weights: Mapping[str, float] | None, training: TrainingArguments
) -> Mixture:
    """The samples of all steps as one sequence; sets `max_steps` where only epochs were given.

    An epoch is as many samples as the data sets have together, whatever their weights. What is to happen after each is
    set to happen after so many steps: to `Trainer`, the mixture is a single one.

    Raises:
        ValueError: no steps and no epochs, or what `Mixture` refuses.
    """
    batch = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    samples = sum(len(dataset) for dataset in datasets.values())
    if training.max_steps <= 0:
        if training.num_train_epochs <= 0:
            raise ValueError(f"num_train_epochs={training.num_train_epochs} is no training: give more than 0.")
        training.max_steps = max(1, math.ceil(training.num_train_epochs * samples / batch))
    steps = max(1, round(samples / batch))
    for name in ("save", "eval", "logging"):
        strategy = getattr(training, f"{name}_strategy")
        if strategy == "epoch":
            setattr(training, f"{name}_strategy", type(strategy)("steps"))
            setattr(training, f"{name}_steps", steps)
            training.eval_delay *= steps if name == "eval" else 1
    return Mixture(datasets, weights, training.max_steps * batch, training.seed)


# ---------- the model


def load_model(recipe: RecipeArguments, training: TrainingArguments) -> tuple[nn.Module, Sa2VAProcessor]:
    """The checkpoint, with an adapter or without, in which only what the recipe names learns."""
    check_model_name(recipe.model)
    half = training.bf16 and recipe.lora_rank and not _is_sharded(training)
    dtype = ("bfloat16" if half else "float32") if recipe.dtype == "auto" else recipe.dtype
    model = Sa2VAChatModel.from_pretrained(recipe.model, dtype=getattr(torch, dtype))
    for name in LOSS_SETTINGS:
        if getattr(recipe, name) is not None:
            setattr(model.config, name, getattr(recipe, name))
    processor = model.load_processor()
    run_idle_parts(model, _is_sharded(training))
    return prepare_model(model, recipe), processor


def prepare_model(model: Sa2VAChatModel, recipe: RecipeArguments) -> nn.Module:
    """Freezes what does not learn, and adds the adapter.

    Trained weights are float32 whatever the rest is: steps of 4e-5 vanish in bfloat16. Heads that no loss reaches stay
    frozen, too.

    Raises:
        ValueError: a module that is not there.
    """
    set_modules = _full_modules(model, recipe.train_modules)
    model.requires_grad_(False)
    if recipe.lora_rank:
        model = _with_adapter(model, recipe, set_modules)
    else:
        decoder = [name for name, module in model.named_modules() if module is model.get_decoder()]
        for name in (*set_modules, *decoder):
            model.get_submodule(name).requires_grad_(True)
    config = model.config
    unreached = [head for weight, head in SCORE_HEADS.items() if not getattr(config, weight)]
    for name, parameter in model.named_parameters():
        if any(f".{head}." in name for head in unreached):
            parameter.requires_grad_(False)
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return model


def _full_modules(model: Sa2VAChatModel, names: Sequence[str]) -> list[str]:
    """Whole names of the modules that are trained in full. "mask_decoder" is the one that prompts reach."""
    prompted = "sam_mask_decoder" + "_modified" * model.config.grounding_config.separate_prompt_decoder
    ends = [prompted if name == "mask_decoder" else name for name in names if name]
    found = {end: [name for name, _ in model.named_modules() if f".{name}".endswith(f".{end}")] for end in ends}
    if missing := [end for end in ends if not found[end] and end != "mlp1"]:  # which only the InternVL family has
        raise ValueError(f"--train_modules: the model has no {', '.join(missing)}. See model.named_modules().")
    modules = {name for matches in found.values() for name in matches}
    return sorted(name for name in modules if not any(name.startswith(f"{outer}.") for outer in modules))


def _with_adapter(model: Sa2VAChatModel, recipe: RecipeArguments, modules_to_save: list[str]) -> nn.Module:
    import peft

    targets: str | list[str] = list(recipe.lora_targets)
    if targets == [ALL_LINEAR]:
        inside = {id(module) for module in model.get_decoder().modules() if isinstance(module, nn.Linear)}
        targets = name_pattern(name for name, module in model.named_modules() if id(module) in inside)
    config = peft.LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        lora_dropout=recipe.lora_dropout,
        target_modules=targets,
        modules_to_save=modules_to_save,
        base_model_name_or_path=recipe.model,
    )
    return peft.get_peft_model(model, model.adapter_config(config))


def _is_sharded(training: TrainingArguments) -> bool:
    """Whether FSDP or DeepSpeed spread the weights, which want them all in one dtype."""
    launched = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")
    return bool(training.fsdp or training.deepspeed or any(os.environ.get(name) == "true" for name in launched))


def run_idle_parts(model: Sa2VAChatModel, is_sharded: bool = False) -> None:
    """Makes `forward` give every part that learns a gradient, if only of zero, whatever is in the batch.

    A process whose batch has no picture, or no object, runs those parts on made-up input at weight 0, at the same point
    as the others: otherwise processes that train together would wait for ever, or take one part for another. Clips of
    different lengths are segmented in turn, so the number of turns must be equal, too. One process alone gives the
    gradients without the work. So do all processes for what no batch may need, as memory in pictures, unless its
    weights are sharded: FSDP and DeepSpeed do not mind.
    """
    forward = model.forward

    @functools.wraps(forward)
    def forward_with_idle_parts(**inputs: Any) -> Any:
        """The model's `forward`; the loss also holds 0 times what this process had no use for."""
        if inputs.get("labels") is None or not (model.training or dist.is_initialized()):
            return forward(**inputs)
        is_blind, device = inputs.get("pixel_values") is None, inputs["input_ids"].device
        lengths = _lengths_of_clips(model, inputs)
        if not dist.is_initialized():
            output = forward(**inputs)
            if is_blind or not lengths:
                output.loss = output.loss + 0.0 * sum(p.sum() for p in model.parameters() if p.requires_grad)
            return output
        turns = torch.tensor(max(1, len(lengths)), device=device)
        dist.all_reduce(turns, dist.ReduceOp.MAX)  # before any part runs, which may gather its weights from all
        with _prompts_of(model) as prompts, _seeing_nothing(model, device) if is_blind else nullcontext([]) as idle:
            output = forward(**inputs)
            if not prompts:
                model.text_hidden_fcs(_no_state(model, device))
        idle += [_segment_nothing(model, prompts[0]) for _ in range(int(turns) - len(lengths))]
        if not is_sharded:
            idle += [p.sum() for p in model.grounding_encoder.parameters() if p.requires_grad]
        if idle:
            output.loss = output.loss + 0.0 * sum(idle)
        return output

    model.forward = forward_with_idle_parts


def _lengths_of_clips(model: Sa2VAChatModel, inputs: Mapping[str, Any]) -> set[int]:
    """Numbers of frames of the pictures and clips in which there are objects: so many turns are segmented."""
    is_seg = inputs["input_ids"] == model.special_token_ids().seg
    has_objects = (is_seg & (inputs["labels"] != IGNORE_INDEX)).any(dim=1).tolist()
    clips = inputs.get("grounding_pixel_values")
    clips = [None] * len(has_objects) if clips is None else clips
    seen = zip(clips, has_objects, strict=True)
    return {math.prod(clip.shape[:-3]) for clip, has in seen if clip is not None and has}


@contextmanager
def _seeing_nothing(model: Sa2VAChatModel, device: torch.device) -> Iterator[list[Tensor]]:
    """Runs the vision tower on nothing where it would run: before words are embedded, around Qwen-VL after."""
    if not model.config.is_qwen_vl:
        yield [_see_nothing(model, device)]
        return
    seen: list[Tensor] = []
    embeddings = model.get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda *_: seen.append(_see_nothing(model, device)))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _prompts_of(model: Sa2VAChatModel) -> Iterator[list[Tensor]]:
    """Collects what `text_hidden_fcs` gives, [objects, D]; it must run once in every process, objects or none."""
    prompts: list[Tensor] = []
    handle = model.text_hidden_fcs.register_forward_hook(lambda module, args, output: prompts.append(output))
    try:
        yield prompts
    finally:
        handle.remove()


def _no_state(model: Sa2VAChatModel, device: torch.device) -> Tensor:
    dtype = next(model.text_hidden_fcs.parameters()).dtype
    return torch.zeros(0, model.config.get_text_config().hidden_size, dtype=dtype, device=device)


def _segment_nothing(model: Sa2VAChatModel, prompts: Tensor) -> Tensor:
    side = model.config.grounding_config.image_size
    prompt = prompts.sum(dim=0, keepdim=True).to(prompts.dtype)  # zeros if there is none
    clip, where = prompt.new_zeros(1, 1, 3, side, side), torch.zeros(1, dtype=torch.long, device=prompt.device)
    (seen,) = model.grounding_encoder.segment_clips(clip, prompt, where, 1)
    return seen.multimask_logits.mean() + seen.multimask_iou_scores.mean() + seen.object_scores.mean()


def _see_nothing(model: Sa2VAChatModel, device: torch.device) -> Tensor:
    vision = model.config.vision_config
    if not model.config.is_qwen_vl:
        side = model.config.force_image_size or vision.image_size
        return model.get_image_features(torch.zeros(1, 3, side, side, device=device)).mean()
    grid = torch.tensor([[1, vision.spatial_merge_size, vision.spatial_merge_size]], device=device)
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    seen = model.causal_model.model.visual(torch.zeros(int(grid.prod()), width, device=device), grid_thw=grid)
    used = (getattr(seen, "pooler_output", seen), getattr(seen, "deepstack_features", None))
    return sum(part.mean() for part in tree_leaves(used) if part is not None)


# ---------- training


class RecipeTrainer(Trainer):
    """`Trainer` that keeps the order of the mixture, weighs every mask of a step alike, and logs each loss.

    Args:
        *args, **kwargs: as for `Trainer`.
        settings: what a resumed run must keep, for recipe.json of its checkpoints.
    """

    def __init__(self, *args, settings: Mapping[str, Any], **kwargs):
        super().__init__(*args, **kwargs)
        self._settings = settings
        self._parts: dict[str, Tensor] = defaultdict(lambda: torch.zeros((), device=self.args.device))
        self._parts_since: int | None = None  # the step of the last log; a resumed run does not begin at 0

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

    def get_train_dataloader(self):
        """As in `Trainer`, but batches stay where they are until their turn: a step may hold hundreds of pictures."""
        loader = super().get_train_dataloader()
        loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """The batches of a step, each with the number of masks in all of them, of all processes."""
        batches, num_items = super().get_batch_samples(map(_in_own_memory, epoch_iterator), num_batches, device)
        count = sum(m.shape[0] * m.shape[1] for batch in batches for m in batch["mask_labels"] if m is not None)
        count = self.accelerator.reduce(torch.tensor(count, device=device), reduction="sum")
        for batch in batches:
            batch["num_masks_in_batch"] = max(1, int(count))
        return batches, None if num_items is None else int(num_items)  # FSDP would round a tensor

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """As in `Trainer`, which undoes that gradients are averaged over processes; notes the parts for the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            self._note_parts(outputs)
        return (loss, outputs) if return_outputs else loss

    def _note_parts(self, outputs: Mapping[str, Any]) -> None:
        if self._parts_since is None:
            self._parts_since = self.state.global_step
        for name in LOSS_PARTS:
            if outputs.get(name) is not None:
                self._parts[name] += outputs[name].detach().float()

    def log(self, logs, *args, **kwargs):
        """Adds the parts: the mean, over the steps since the last time, of their sums over processes and batches."""
        if "loss" in logs:
            steps = max(1, self.state.global_step - (self._parts_since or 0))
            for name in LOSS_PARTS:  # all processes must ask for the same ones
                total = self.accelerator.reduce(self._parts[name], reduction="sum").item()
                if total:
                    logs[name] = round(total / steps, 6)
            self._parts.clear()
            self._parts_since = self.state.global_step
        super().log(logs, *args, **kwargs)

    def _save(self, output_dir=None, state_dict=None):
        """Checkpoints of a model without adapter keep its own layout, which is what resuming reads."""
        is_checkpoint = Path(output_dir or "").name.startswith(PREFIX_CHECKPOINT_DIR)
        if isinstance(self.model, Sa2VAChatModel) and is_checkpoint:
            self.model.save_pretrained(
                output_dir, state_dict=state_dict, is_main_process=self.args.should_save, save_original_format=False
            )
            if self.args.should_save:
                self.processing_class.save_pretrained(output_dir)
        else:
            frozen = {name: parameter.detach().cpu() for name, parameter in self._frozen_heads().items()}
            super()._save(output_dir, None if state_dict is None else {**frozen, **state_dict})
        if self.args.should_save and is_checkpoint:
            write_json(Path(output_dir) / RECORD, self._settings)

    def save_model(self, output_dir=None, _internal_call=False):
        """As in `Trainer`; under ZeRO-3 all processes gather frozen heads meanwhile, see `_frozen_heads`."""
        if not (frozen := list(self._frozen_heads().values())):
            super().save_model(output_dir, _internal_call)
            return
        from peft.utils.integrations import gather_params_ctx

        with gather_params_ctx(frozen, modifier_rank=None):
            super().save_model(output_dir, _internal_call)

    def _frozen_heads(self) -> dict[str, nn.Parameter]:
        """What does not learn of modules that do. ZeRO-3 leaves it out of an adapter, to which it belongs, too."""
        if not self.is_deepspeed_enabled or isinstance(self.model, Sa2VAChatModel):
            return {}
        named = self.model.named_parameters()
        return {name: p for name, p in named if ".modules_to_save." in name and not p.requires_grad}


def _in_own_memory(batch: dict[str, Any]) -> dict[str, Any]:
    """A copy of what worker processes share: each tensor holds a file open, and a step keeps hundreds."""
    return tree_map(lambda value: value.clone() if isinstance(value, Tensor) and value.is_shared() else value, batch)


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that is whole; a kill, or a full disk, may leave others behind."""
    found = {path: re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name) for path in folder.glob("*")}
    numbered = sorted((int(match[1]), path) for path, match in found.items() if match)
    return next((path for _, path in reversed(numbered) if _is_whole(path)), None)


def _is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint's state, which `Trainer` writes last, and its weights are there and not cut off.

    Weights may also be a folder: FSDP and DeepSpeed write a part for each process.
    """
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
        weights = list(checkpoint.glob("*.safetensors"))
        for file in weights:  # opening compares its length with what its header says
            with safe_open(file, framework="pt"):
                pass
    except (OSError, ValueError, SafetensorError):
        return False
    return bool(weights) or any(path.is_dir() for path in checkpoint.iterdir())


def named_checkpoint(training: TrainingArguments) -> str | None:
    """The checkpoint that --resume_from_checkpoint names; None if it is not given, or True, which names none.

    Raises:
        ValueError: True, by which scripts of transformers mean the newest checkpoint in OUTPUT_DIR, and there is none.
        NotADirectoryError: what is named is no folder.
    """
    named = training.resume_from_checkpoint
    if str(named).lower() != "true":
        if named and not Path(named).is_dir():
            raise NotADirectoryError(f"--resume_from_checkpoint {named} is no folder. Name a checkpoint-... of a run.")
        return named
    if newest_checkpoint(Path(training.output_dir)) is None:
        raise ValueError(
            f"--resume_from_checkpoint {named}: {training.output_dir} holds no whole checkpoint. Name one, or leave it "
            "out to begin anew."
        )
    return None


def _settings_to_keep(recipe: RecipeArguments, training: TrainingArguments, data: Sequence[str]) -> dict[str, Any]:
    """What decides on the samples of a run, and on the tensors of its optimizer."""
    names = ("split", "lora_targets", "train_modules", "frames", "objects", "max_length", *LOSS_SETTINGS)
    own = {name: getattr(recipe, name) for name in names}
    return {**own, "data": list(data), "seed": training.seed, "optim": training.optim.value}


def _find_start(training: TrainingArguments, recipe: RecipeArguments, settings: Mapping[str, Any]) -> str | None:
    named, output = named_checkpoint(training), Path(training.output_dir)
    checkpoint = Path(named) if named else newest_checkpoint(output)
    if checkpoint is None:
        return None
    if not recipe.resume and not training.resume_from_checkpoint:
        raise ValueError(f"{output} holds {checkpoint.name}. Add --resume to go on from there, or name a new folder.")
    adapter = checkpoint / "adapter_config.json"
    saved = {"r": 0, "lora_alpha": recipe.lora_alpha}  # without an adapter, no weight of one can differ
    saved = json.loads(adapter.read_text()) if adapter.is_file() else saved
    is_readable = adapter.is_file() or any(checkpoint.glob("*.safetensors"))  # what FSDP and DeepSpeed write is not
    for option, before in (("lora_rank", saved["r"]), ("lora_alpha", saved["lora_alpha"])):
        if is_readable and before != getattr(recipe, option):
            raise ValueError(
                f"{checkpoint} has --{option} {before}, not {getattr(recipe, option)}. Resume with the arguments it "
                "began with."
            )
    record = checkpoint / RECORD
    kept = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    if changed := [name for name, value in settings.items() if name in kept and kept[name] != value]:
        before = ", ".join(f"--{name} {kept[name]}, not {settings[name]}" for name in changed)
        raise ValueError(f"{checkpoint} has {before}. Resume with the arguments it began with.")
    return str(checkpoint)


@contextmanager
def _unsharded() -> Iterator[None]:
    """Lets one process make models of its own, which transformers would spread over all of them by ZeRO-3."""
    config = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = config


def save_result(trainer: RecipeTrainer, base: str, output: Path) -> Path:
    """Writes what was learned: the whole model in the released layout, and the adapter if there is one.

    Args:
        trainer: after training; every process has to come here.
        base: the checkpoint that training began with.
        output: folder in which "final" and "adapter" are made.

    Returns:
        The folder "final".
    """
    final = output / "final"
    has_adapter = not isinstance(trainer.accelerator.unwrap_model(trainer.model), Sa2VAChatModel)
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    saved = output / "adapter" if has_adapter else final
    trainer.save_model(str(saved))
    if trainer.is_world_process_zero():
        (saved / "training_args.bin").unlink(missing_ok=True)  # a pickle, of no use to others
        if has_adapter:
            with _unsharded():
                release_adapter(saved, base)
                merge_adapter(saved, final, base)
    trainer.accelerator.wait_for_everyone()
    return final


@contextmanager
def _without_tracebacks_of_workers() -> Iterator[None]:
    """An error of a process that loads data says what it is, where torch would put its traceback into the message."""
    try:
        yield
    except (ValueError, TypeError, OSError, ImportError) as error:
        _, found, reason = str(error).rpartition(f"\n{type(error).__name__}: ")
        if not found or not str(error).startswith("Caught "):
            raise
        raise type(error)(reason.strip()) from error


def main(argv: Sequence[str] | None = None) -> Path:
    """Trains, or goes on training, and returns the folder with the result."""
    recipe, training, data = parse_arguments(argv)
    output = Path(training.output_dir)
    settings = _settings_to_keep(recipe, training, data)
    start = _find_start(training, recipe, settings)
    set_seed(training.seed)
    mixture = plan_mixture(*open_datasets(data, recipe.split), training)
    model, processor = load_model(recipe, training)
    # Five frames of full HD are 10,250 tokens of Qwen2.5-VL.
    max_length = recipe.max_length or (12288 if getattr(model.config, "qwen_vl_type", "") == "qwen2_5_vl" else 8192)
    held_out = None
    if recipe.eval_split:
        held_out = Numbered(ConcatDataset(open_datasets(data, recipe.eval_split, held_out=True)[0].values()))
    trainer = RecipeTrainer(
        settings=settings,
        model=model,
        args=training,
        train_dataset=Numbered(mixture),
        eval_dataset=held_out,
        data_collator=SampleCollator(processor, training.seed, recipe.frames, recipe.objects, max_length),
        processing_class=processor,
    )
    if recipe.preview_steps and not _is_sharded(training):
        samples = [mixture[index] for index in range(min(recipe.previews, len(mixture)))]
        trainer.add_callback(
            Previews(samples, processor, output / "previews", recipe.preview_steps, trainer.accelerator)
        )
    with _without_tracebacks_of_workers():
        trainer.train(resume_from_checkpoint=start)
    return save_result(trainer, recipe.model, output)

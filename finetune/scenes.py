"""Trains a small Sa2VA from nothing on synthetic scenes, with `transformers.Trainer`.

    python finetune/train.py --preset ten-minutes --output_dir runs/quick
    python finetune/train.py --preset full --output_dir runs/tiny          # run it again to go on where it stopped

Every argument of `transformers.TrainingArguments` works and wins over the preset. The result (weights, tokenizer,
processor files, the curve as curve.png) lands in OUTPUT_DIR/final. What a run learns by stands in training.json of
each checkpoint; a folder takes no other run.
"""

import argparse
import json
import math
import os
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed

from sa2va import Sa2VAChatModel, Sa2VAProcessor
from sa2va.demo.media import replacing, write_json
from sa2va.demo.predict import at_least
from sa2va.finetune.batches import (
    CURRICULA_OF_PARTS,
    CURRICULUM,
    IGNORE_INDEX,
    SceneCollator,
    ScheduledScenes,
    Stage,
)
from sa2va.finetune.recipe import check_gpus, named_checkpoint, newest_checkpoint
from sa2va.finetune.tiny import build_model
from sa2va.finetune.trainee import HEAD_WEIGHTS, LOSS_NAMES, SceneTrainee, load_heads, save_heads

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
HEADS = "heads.safetensors"
RECORD = "training.json"  # in a checkpoint what its run learns by, in the final folder what came of it
OWN_SETTINGS = ("preset", "init", "new", "learn", "clips_per_batch", "num_frames")
LEARNING_SETTINGS = (  # of TrainingArguments, what decides on the weights
    *("seed", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "world_size"),
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16"),
)
PARTS = {  # by the names of their parameters
    "language": re.compile("mlp1|language_model|text_hidden_fcs"),
    "mask_decoder": re.compile(r"text_hidden_fcs|grounding_encoder\.sam2_model\.(sam_mask_decoder|sam_prompt_encoder)"),
}
LEARNERS = {  # what learns
    "all": re.compile(""),
    "sight": re.compile("vision_model|mlp1"),
    "words": re.compile("(?!grounding_encoder)"),
    "sam2": re.compile("text_hidden_fcs|grounding_encoder"),
    "mask_decoder": PARTS["mask_decoder"],
    "tracking": re.compile(r"grounding_encoder\.sam2_model\.(?!image_encoder)"),
}


class SceneTrainer(Trainer):
    """`Trainer` that keeps the order of the curriculum and logs each part of the loss.

    Args:
        *args, **kwargs: as for `Trainer`.
        settings: what the run learns by, for training.json of its checkpoints.
    """

    def __init__(self, *args, settings: dict[str, Any], **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # losses are means over a batch, which `Trainer` averages over a step's
        self._settings = settings
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

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        super()._save(output_dir, state_dict)
        if self.args.should_save:  # what `Trainer` writes last comes after it, so that no whole checkpoint lacks it
            write_json(Path(output_dir or self.args.output_dir) / RECORD, self._settings)

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
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4), constrained_layout=True)
    for i, name in enumerate(("lm_loss", *HEAD_WEIGHTS)):
        if any(name in entry for entry in logs):
            left.plot(*_series(logs, name), ("-", "--")[i % 2], label=name, color=f"C{i // 2}")
    for name in ("mask_loss", "dice_loss", "iou_loss", "object_score_loss"):
        right.plot(*_series(logs, name), label=name)
    for axis, title in ((left, "words"), (right, "masks")):
        axis.set(title=title, xlabel="step", yscale="log")
        axis.grid(alpha=0.3)
        axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize="small")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110)
    pyplot.close(figure)


def _series(logs: list[dict], name: str) -> tuple[list[int], list[float]]:
    points = [(entry["step"], float(entry[name])) for entry in logs if name in entry]
    points = [(step, value) for step, value in points if math.isfinite(value) and value > 0]  # the axis is logarithmic
    return [step for step, _ in points], [value for _, value in points]


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, TrainingArguments]:
    """Our few options, and everything else as `TrainingArguments` on top of the preset.

    Raises:
        ValueError: several GPUs without a launcher.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="ten-minutes", help="how long to learn")
    parser.add_argument("--clips_per_batch", type=at_least(1), help="clips in a step that trains on clips")
    parser.add_argument("--init", metavar="FOLDER", help="go on from a saved model, with the last stage's mix of tasks")
    parser.add_argument("--learn", choices=LEARNERS, help="what learns (default: all)")
    parser.add_argument("--new", choices=PARTS, help="with --init: the part that begins from nothing again")
    parser.add_argument(
        "--num_frames", type=at_least(1), help="length of clips; what follows the key frames is tracked"
    )
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
    words = [word for k, v in defaults.items() for word in (f"--{k}", str(v))]  # later ones win
    (arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(words + rest)
    check_gpus(arguments)
    return options, arguments


def curriculum_of(options: argparse.Namespace) -> Sequence[Stage]:
    """All stages for a fresh model, the last for a saved one; what serves it best for a part of one."""
    if options.learn in CURRICULA_OF_PARTS:
        return CURRICULA_OF_PARTS[options.learn]
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


def settings_of(options: argparse.Namespace, arguments: TrainingArguments) -> dict[str, Any]:
    """What a run learns by, in the types that JSON has."""
    own = {name: getattr(options, name) for name in OWN_SETTINGS}
    own["init"] = options.init and os.path.realpath(options.init)
    learning = {name: getattr(arguments, name) for name in LEARNING_SETTINGS}
    return json.loads(json.dumps(own | learning))


def find_start(arguments: TrainingArguments, settings: dict[str, Any]) -> Path | None:
    """The checkpoint to go on from: the one that is named, else the newest of the same run in OUTPUT_DIR, if any.

    Raises:
        ValueError: OUTPUT_DIR holds a run with other settings, or one that doesn't tell.
    """
    if named := named_checkpoint(arguments):
        return Path(named)
    output = Path(arguments.output_dir)
    checkpoint = newest_checkpoint(output)
    if checkpoint is None:
        return None
    record = checkpoint / RECORD
    begun = json.loads(record.read_text()) if record.is_file() else {}
    differing = [name for name, value in settings.items() if begun.get(name) != value]
    if differing:
        told = ", ".join(f"{name} {begun.get(name)} and not {settings[name]}" for name in differing)
        raise ValueError(
            f"{output} holds a run with {told if begun else f'unknown settings ({record} is missing)'}. Name a new "
            "folder with --output_dir, give the arguments that it began with to go on with it, or "
            f"--resume_from_checkpoint {checkpoint} to go on from there with these."
        )
    return checkpoint


def _is_done(checkpoint: Path | None, steps: int, final: Path) -> bool:
    """Whether a checkpoint is of the last step, and the result was written, too."""
    state = None if checkpoint is None else checkpoint / "trainer_state.json"
    if state is None or not state.is_file() or not (final / RECORD).is_file():
        return False
    return json.loads(state.read_text())["global_step"] >= steps


def make_trainer(options: argparse.Namespace, arguments: TrainingArguments) -> tuple[SceneTrainer, Sa2VAProcessor]:
    """The model with what learns, its scenes, and its processor."""
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
    collator = SceneCollator(processor, masks=options.learn != "words", words=options.learn != "sight")
    parts = {"model": trainee, "train_dataset": dataset, "data_collator": collator}
    return SceneTrainer(args=arguments, settings=settings_of(options, arguments), **parts), processor


def save_result(trainer: SceneTrainer, processor: Sa2VAProcessor, preset: str, output: Path) -> None:
    """Writes OUTPUT_DIR/final and, for another sitting, the training heads beside it."""
    final = output / "final"
    trainer.model.model.save_pretrained(final)
    save_heads(trainer.model, output / HEADS)
    processor.save_pretrained(final)
    draw_curve(trainer.state.log_history, final / "curve.png")
    facts = {"preset": preset, "seed": trainer.args.seed, "steps": trainer.state.global_step}
    write_json(final / RECORD, facts)  # last: it tells that all is there


def main(argv: list[str] | None = None) -> Path:
    """Trains, or goes on training, and returns the folder with the result.

    Raises:
        ValueError: the folder holds another run, or no checkpoint where one is asked for.
    """
    options, arguments = parse_arguments(argv)
    output, checkpoint = Path(arguments.output_dir), find_start(arguments, settings_of(options, arguments))
    if _is_done(checkpoint, arguments.max_steps, output / "final"):
        print(f"{output / 'final'} has the result of all {arguments.max_steps} steps; nothing is left to do.")
        return output / "final"
    trainer, processor = make_trainer(options, arguments)
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    if trainer.is_world_process_zero():
        save_result(trainer, processor, options.preset, output)
    return output / "final"


if __name__ == "__main__":
    main()

"""Teaches a checkpoint to be asked in Dutch, from a few dozen annotated pictures, and measures what that costs.

    python finetune/one_shot.py --output_dir runs/one-shot                 # from sa2va-tiny, in minutes on a CPU
    python finetune/one_shot.py --output_dir runs/one-shot --steps 20 --count 10                   # to see that it runs

It is one-shot instruction tuning as the paper has it: new pictures in the official fine-tune format
(`annotations.json`: image, polygons, text; beside them what the answer calls each object, in English), mixed with
samples of what the model knows, and `finetune/train.py` with the recipe. Printed is a table of scores before and after:
of Dutch expressions on held-out pictures, where neither colour nor shape alone tells which object is meant, and of the
old tasks on scenes of another seed. Everything follows from the seeds. It is one process, on one GPU or none.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import count as numbers
from pathlib import Path
from typing import Any

import numpy as np

from sa2va.data.export_scenes import TASKS, export_scenes
from sa2va.data.make_samples import outline
from sa2va.data.scenes import IMAGE_REQUESTS, SceneSample, Turn
from sa2va.data.shapes import COLORS, SHAPES, SceneObject, draw_clip, place_objects, shown_well, shuffled
from sa2va.demo.media import picture_writer, write_json
from sa2va.demo.predict import DEFAULT_MODEL, exit_code
from sa2va.evaluation.scenes import converse, evaluate, load, measure_overlap, summarize_overlaps
from sa2va.finetune.recipe import parse_arguments as parse_recipe
from sa2va.finetune.train import main as train

DUTCH_COLORS = {
    "red": "rode",
    "green": "groene",
    "blue": "blauwe",
    "yellow": "gele",
    "purple": "paarse",
    "orange": "oranje",
}
DUTCH_SHAPES = {
    "circle": "de {} cirkel",
    "square": "het {} vierkant",
    "triangle": "de {} driehoek",
    "star": "de {} ster",
    "cross": "het {} kruis",
}
ANSWER = "Sure, it is {} [SEG]."  # as the checkpoint answers: it finds what it has named
SPLITS = ("train", "test")
SIZE = (128, 128)
OLD_SCORES = {  # what is shown of `evaluation/scenes.py`
    "image segmentation, cIoU": ("image_segmentation", "ciou"),
    "video segmentation, J&F": ("video_segmentation", "j_and_f"),
    "absent objects, accuracy": ("absent", "accuracy"),
    "questions, accuracy": ("question", "accuracy"),
    "grounded captions, AP50": ("caption", "ap50"),
    "region captions, accuracy": ("region", "accuracy"),
}
RECIPE = {  # on top of the paper's: a model so small has no use for rank 256, and few steps need large ones
    "lora_rank": 32,
    "lora_alpha": 64,
    "per_device_train_batch_size": 16,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "weight_decay": 0.01,
    "logging_steps": 20,
    "save_steps": 100,
    "preview_steps": 100,
    "dataloader_num_workers": 1,
}


def in_dutch(thing: SceneObject) -> str:
    """An object by colour and shape: "de rode ster"."""
    return DUTCH_SHAPES[thing.shape].format(DUTCH_COLORS[thing.color])


def in_english(thing: SceneObject) -> str:
    """What an answer calls it: "the red star"."""
    return f"the {thing.name}"


def new_scene(seed: int, index: int, split: str = "train") -> SceneSample:
    """A picture of four objects and a question in Dutch for each of them, the first first.

    Others have the colour and the shape of the first. The same arguments give the same scene.
    """
    rng = np.random.default_rng([seed, index, SPLITS.index(split)])
    for _ in numbers():
        (color, second, third, *_), (shape, other, another, *_) = shuffled(rng, tuple(COLORS)), shuffled(rng, SHAPES)
        kinds = [(color, shape), (color, other), (second, shape), (third, another)]
        objects = place_objects(rng, shuffled(rng, kinds), SIZE, moving=False)
        if objects is None:
            continue
        frames, masks, areas = draw_clip(rng, objects, SIZE, 1)
        if shown_well(masks, areas):
            break
    order = sorted(range(len(objects)), key=lambda i: (objects[i].color, objects[i].shape) != (color, shape))
    asked = ((i, IMAGE_REQUESTS[0].format(in_dutch(objects[i])), ANSWER.format(in_english(objects[i]))) for i in order)
    turns = (Turn(question, answer, masks[[i]], (i,), None, "dutch") for i, question, answer in asked)
    return SceneSample("refer", frames, tuple(turns), objects, masks)


def write_new_pictures(folder: Path, seed: int, count: int) -> None:
    """Writes scenes with Dutch expressions in the official fine-tune format: images/ and annotations.json."""
    items = []
    for index in range(count):
        scene = new_scene(seed, index)
        with picture_writer(folder / "images" / f"{index:03}.png") as write:
            write(scene.frames[0])
        things = [scene.objects[turn.targets[0]] for turn in scene.turns]
        polygons = [outline(turn.masks[0, 0]) for turn in scene.turns]
        words = {"text": [in_dutch(thing) for thing in things], "name": [in_english(thing) for thing in things]}
        items.append({"image": f"{index:03}.png", "mask": polygons, **words})
    write_json(folder / "annotations.json", items, indent=1)


def write_mixture(file: Path, seed: int, pictures: int, old_scenes: int, new_share: float) -> None:
    """Writes the file that `--data` reads, and beside it new pictures and scenes of every old task."""
    folder = file.parent
    write_new_pictures(folder / "new", seed, pictures)
    export_scenes(seed, old_scenes, folder / "old", split="train", tasks=TASKS, num_frames=6)
    new = {"name": "finetune", "root": str(folder / "new"), "weight": new_share}
    new |= {"template": IMAGE_REQUESTS[0], "answer": ANSWER}
    old = {"name": "jsonl", "root": str(folder / "old"), "weight": 1 - new_share}
    write_json(file, {"datasets": [new, old]})


def measure(checkpoint: str | Path, seed: int, count: int, split: str) -> dict[str, float]:
    """Scores in percent: cIoU of Dutch expressions, and those of `OLD_SCORES` from `count` scenes of each old task."""
    model, processor = load(str(checkpoint))
    scenes = (new_scene(seed, index, "test") for index in range(count))
    scenes = (replace(scene, turns=scene.turns[:1]) for scene in scenes)
    overlaps = [measure_overlap(turn, out) for scene in scenes for turn, out in converse(model, processor, scene)]
    found = {"new: in Dutch, cIoU": round(100 * summarize_overlaps(overlaps)["ciou"], 2)}
    scores = evaluate(model, processor, seed, count, split=split)["scores"]
    return found | {name: scores[criterion][score] for name, (criterion, score) in OLD_SCORES.items()}


def format_scores(before: dict[str, float], after: dict[str, float]) -> str:
    """A Markdown table."""
    lines = [f"| {name} | {before[name]:.1f} | {after[name]:.1f} |" for name in before]
    return "\n".join(["| score, % | before | after |", "|---|---|---|", *lines])


def parse_arguments(argv: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """Our options, and those that go on to `finetune/train.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="checkpoint to teach (default: %(default)s)")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=48, help="annotated pictures (default: %(default)s)")
    parser.add_argument("--old_scenes", type=int, default=200, help="of each old task, to learn (default: %(default)s)")
    parser.add_argument("--new_share", type=float, default=0.3, help="of the samples (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="(default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of data and training (default: %(default)s)")
    parser.add_argument("--test_seed", type=int, default=1, help="of held-out scenes (default: %(default)s)")
    parser.add_argument("--count", type=int, default=100, help="held-out scenes of each task (default: %(default)s)")
    parser.add_argument("--split", default="test", help="split of the old tasks' scenes (default: %(default)s)")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Teaches, measures, prints the table, and writes it with the settings to OUTPUT_DIR/one_shot.json.

    Raises:
        ValueError: several processes or GPUs, or an option that `finetune/train.py` refuses; before any work is done.
    """
    options, more = parse_arguments(argv)
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        raise ValueError("Several processes would write each other's data. Leave the launcher out.")
    output = options.output_dir
    mixture = output / "data" / "mixture.json"
    settings = {**RECIPE, "model": options.model, "data": mixture, "output_dir": output, "max_steps": options.steps}
    words = [word for name, value in (settings | {"seed": options.seed}).items() for word in (f"--{name}", str(value))]
    parse_recipe([*words, "--resume", *more])
    write_mixture(mixture, options.seed, options.pictures, options.old_scenes, options.new_share)
    before = measure(options.model, options.test_seed, options.count, options.split)
    final = train([*words, "--resume", *more])
    after = measure(final, options.test_seed, options.count, options.split)
    print(format_scores(before, after))
    report = {"before": before, "after": after, "settings": {**vars(options), "more": more}}
    write_json(output / "one_shot.json", report, default=str)
    return report


if __name__ == "__main__":
    sys.exit(exit_code(main, "train"))

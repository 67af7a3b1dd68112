"""Scores a checkpoint on fresh synthetic scenes of any seed.

    python evaluation/scenes.py --model sa2va-tiny --seed 7 --count 200
    python evaluation/scenes.py --seed 7 --count 50 --tasks refer multi --json --output scores.json

Every task gets `--count` scenes; a scene is a conversation of one or two turns, and each turn is judged by one
criterion. The model goes through its public API only and hears its own earlier answers, not the true ones.

criterion            turns                                   scores
image_segmentation   refer, multi, followup (with targets)   ciou, giou, false_absence
video_segmentation   video_refer, video_motion, video_multi  j, f, j_and_f, false_absence
absent               absent, video_absent                    accuracy: no `[SEG]` in the answer
question             question, video_question                accuracy: the expected word is in the answer
caption              caption                                 ap50, ap50_phrase (phrases must be the same, too)
region               region                                  accuracy: "red star" is in the answer
followup             followup (without targets)              accuracy: the expected word is in the answer

Masks are paired with targets in the order of their `[SEG]`. A missing mask counts as empty. In images a turn's
intersections and unions are summed over its objects, so that a mask too many adds to the union; in videos a turn's J
and F are means over its objects, and a mask too many scores 0. False absence is the share of turns about present
objects that were answered without any `[SEG]`.
"""

import argparse
import json
import re
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from PIL import Image
from tqdm import tqdm

import sa2va
from sa2va import Sa2VAChatModel, Sa2VAOutput, Sa2VAProcessor
from sa2va.data.scenes import IMAGE_TASKS, SPLITS, VIDEO_TASKS, SceneSample, Turn, make_sample
from sa2va.data.templates import SEG
from sa2va.demo.media import replacing
from sa2va.demo.predict import DTYPES, at_least, exit_code, load_model
from sa2va.evaluation.metrics import (
    Overlaps,
    PhraseMasks,
    VideoQuality,
    cumulative_iou,
    intersection_union,
    mean,
    mean_iou,
    overlap_precision,
    video_quality,
)

TASKS = IMAGE_TASKS + VIDEO_TASKS
MAX_NEW_TOKENS = 128  # the longest true answer takes half of it; a model that rambles is cut short

# ---------- criteria: what is measured of one turn, and what many turns come to


class Overlap(NamedTuple):
    """A turn about objects in an image: pixels summed over the objects, and whether there was any `[SEG]`."""

    intersection: int
    union: int
    found: bool


class Tracks(NamedTuple):
    """A turn about objects in a video: mean J and F of the objects, and whether there was any `[SEG]`."""

    quality: VideoQuality
    found: bool


class Criterion(NamedTuple):
    """`measure` one turn, then `summarize` many measurements into scores of 0..1 by name."""

    measure: Callable[[Turn, Sa2VAOutput], Any]
    summarize: Callable[[Sequence[Any]], dict[str, float]]


def pair_masks(predicted: Sequence[np.ndarray], targets: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pairs masks bool [T, H, W] with targets bool [S, T, H, W] in order, filling either side up with empty ones."""
    return zip_longest(predicted, targets, fillvalue=np.zeros(targets.shape[1:], dtype=bool))


def measure_overlap(turn: Turn, output: Sa2VAOutput) -> Overlap:
    """Intersection and union of a turn's objects in an image."""
    counts = [intersection_union(*pair) for pair in pair_masks(output.prediction_masks, turn.masks)]
    return Overlap(
        intersection=sum(int(intersection.sum()) for intersection, _ in counts),
        union=sum(int(union.sum()) for _, union in counts),
        found=SEG in output.prediction,
    )


def summarize_overlaps(overlaps: Sequence[Overlap]) -> dict[str, float]:
    """cIoU and gIoU over the turns, and false absence."""
    intersections, unions, found = zip(*overlaps, strict=True)
    return {
        "ciou": cumulative_iou(intersections, unions),
        "giou": mean_iou(intersections, unions),
        "false_absence": 1 - mean(found),
    }


def measure_tracks(turn: Turn, output: Sa2VAOutput) -> Tracks:
    """J and F of a turn's objects in a video."""
    pairs = list(pair_masks(output.prediction_masks, turn.masks))
    qualities = [video_quality(*pair) for pair in pairs[: len(turn.masks)]]
    # an object too many is wrong however empty its mask is
    qualities += [VideoQuality(0.0, 0.0)] * (len(pairs) - len(turn.masks))
    j, f = (mean(values) for values in zip(*qualities, strict=True))
    return Tracks(VideoQuality(j, f), SEG in output.prediction)


def summarize_tracks(tracks: Sequence[Tracks]) -> dict[str, float]:
    """J, F and J&F over the turns, each a video and an expression, and false absence."""
    qualities, found = zip(*tracks, strict=True)
    average = VideoQuality(*(mean(values) for values in zip(*qualities, strict=True)))
    return {"j": average.j, "f": average.f, "j_and_f": average.j_and_f, "false_absence": 1 - mean(found)}


def measure_absence(turn: Turn, output: Sa2VAOutput) -> bool:
    """Whether the answer points at nothing."""
    return SEG not in output.prediction


def measure_words(turn: Turn, output: Sa2VAOutput) -> bool:
    """Whether the expected words are in the answer, as whole words in any case."""
    return bool(re.search(rf"\b{re.escape(turn.expected)}\b", output.prediction, re.IGNORECASE))


def summarize_hits(hits: Sequence[bool]) -> dict[str, float]:
    """Accuracy."""
    return {"accuracy": mean(hits)}


def measure_caption(turn: Turn, output: Sa2VAOutput) -> Overlaps:
    """Masks and phrases of a caption, compared; SAM 2's own estimate of a mask's IoU tells how sure it is."""
    predicted = [masks[0] for masks in output.prediction_masks]
    empty = np.zeros((0, *turn.masks.shape[2:]), dtype=bool)
    scores = np.array([score["iou"][0] for score in output.mask_scores], dtype=float)
    return Overlaps.of(
        PhraseMasks(np.stack(predicted) if predicted else empty, output.phrases, scores),
        PhraseMasks(turn.masks[:, 0], re.findall(r"<p> (.+?) </p>", turn.answer)),
    )


def summarize_captions(captions: Sequence[Overlaps]) -> dict[str, float]:
    """AP50 of the masks alone, and of masks with the right phrase."""
    return {"ap50": overlap_precision(captions), "ap50_phrase": overlap_precision(captions, match_phrases=True)}


CRITERIA: dict[str, Criterion] = {
    "image_segmentation": Criterion(measure_overlap, summarize_overlaps),
    "video_segmentation": Criterion(measure_tracks, summarize_tracks),
    "absent": Criterion(measure_absence, summarize_hits),
    "question": Criterion(measure_words, summarize_hits),
    "caption": Criterion(measure_caption, summarize_captions),
    "region": Criterion(measure_words, summarize_hits),
    "followup": Criterion(measure_words, summarize_hits),
}


def criterion_of(task: str, turn: Turn) -> str:
    """The key of `CRITERIA` by which a turn of a task is judged."""
    name = task.removeprefix("video_")
    if name in ("refer", "motion", "multi") or (name == "followup" and turn.targets):
        return "video_segmentation" if task in VIDEO_TASKS else "image_segmentation"
    return name


# ---------- running the model


def converse(
    model: Sa2VAChatModel, processor: Sa2VAProcessor, sample: SceneSample, **generate_kwargs
) -> Iterator[tuple[Turn, Sa2VAOutput]]:
    """Puts the questions of a scene to the model, each after the model's own answers to the earlier ones.

    Yields:
        Every turn with what the model made of it.
    """
    frames = [Image.fromarray(frame) for frame in sample.frames]
    picture = {"video": frames} if sample.task in VIDEO_TASKS else {"image": frames[0]}
    past_text = ""
    for turn in sample.turns:
        output = model.predict_forward(
            **picture,
            text=turn.question,
            past_text=past_text,
            mask_prompts=sample.regions,
            processor=processor,
            **generate_kwargs,
        )
        past_text = output.past_text
        yield turn, output


def evaluate(
    model: Sa2VAChatModel,
    processor: Sa2VAProcessor,
    seed: int,
    count: int,
    *,
    split: str = "test",
    tasks: Sequence[str] = TASKS,
    num_frames: int = 8,
    progress: bool = False,
    **generate_kwargs,
) -> dict[str, dict[str, Any]]:
    """Scores a model on fresh scenes.

    Args:
        model, processor: a loaded checkpoint.
        seed, split: which scenes; see `make_sample`.
        count: scenes of each task, >= 1.
        tasks: some of `TASKS`.
        num_frames: length of clips.
        progress: show a progress bar on stderr.
        **generate_kwargs: for `predict_forward`; `max_new_tokens` is 128 if not given.

    Returns:
        "scores": for every criterion that the tasks touch its scores in percent (all 0..100, more is better but for
        "false_absence"); "details": the same by criterion and task ("refer") or kind of question ("refer/largest");
        "counts": turns behind each criterion; "seconds": mean time of a scene of each task.

    Raises:
        ValueError: an unknown task or split, or a number out of range.
    """
    _check(tasks, count)
    generate_kwargs = {"max_new_tokens": MAX_NEW_TOKENS, **generate_kwargs}
    measured: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    seconds: dict[str, float] = {}
    for task in dict.fromkeys(tasks):
        started = time.perf_counter()
        for index in tqdm(range(count), desc=task, disable=not progress, file=sys.stderr):
            sample = make_sample(seed, index, split=split, task=task, num_frames=num_frames)
            for turn, output in converse(model, processor, sample, **generate_kwargs):
                criterion = criterion_of(task, turn)
                value = CRITERIA[criterion].measure(turn, output)
                for label in ("", task, f"{task}/{turn.kind}"):  # "" is all of them
                    measured[criterion][label].append(value)
        seconds[task] = round((time.perf_counter() - started) / count, 4)
    return {**_summarize(measured), "seconds": seconds}


def _summarize(measured: dict[str, dict[str, list]]) -> dict[str, dict[str, Any]]:
    table = {
        name: {label: _percent(criterion.summarize(values)) for label, values in measured[name].items()}
        for name, criterion in CRITERIA.items()
        if name in measured
    }
    return {
        "scores": {criterion: groups[""] for criterion, groups in table.items()},
        "details": {criterion: {k: v for k, v in groups.items() if k} for criterion, groups in table.items()},
        "counts": {criterion: len(measured[criterion][""]) for criterion in table},
    }


def _percent(scores: dict[str, float]) -> dict[str, float]:
    return {name: round(100 * score, 2) for name, score in scores.items()}


def _check(tasks: Sequence[str], count: int) -> None:
    if unknown := [task for task in tasks if task not in TASKS]:
        raise ValueError(f"Unknown tasks {unknown}; choose among {', '.join(TASKS)}.")
    if count < 1:
        raise ValueError(f"count is the number of scenes of each task and must be >= 1, got {count}.")


# ---------- command line


def load(name: str, device: str = "auto", dtype: str = "auto") -> tuple[Sa2VAChatModel, Sa2VAProcessor]:
    """Loads a checkpoint.

    Args:
        name: a folder (also one beside `evaluation/`, such as "sa2va-tiny"), or a name on the Hugging Face hub.
        device, dtype: see `demo.predict.load_model`.

    Raises:
        ValueError, OSError: as there.
    """
    beside = Path(__file__).resolve().parents[1] / name
    path = str(beside) if beside.is_dir() and not Path(name).is_dir() else name
    model = load_model(path, device, dtype)
    return model, model.load_processor()


def format_table(result: dict[str, dict[str, Any]]) -> str:
    """The scores of `evaluate` as lines: criterion, score, percent, and the number of turns."""
    lines = [f"{'criterion':20}{'score':16}{'%':>7}{'turns':>7}"]
    for criterion, scores in result["scores"].items():
        count = result["counts"][criterion]
        lines += [f"{criterion:20}{name:16}{score:7.2f}{count:7}" for name, score in scores.items()]
    return "\n".join(lines)


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="sa2va-tiny", help="folder or hub name (default: %(default)s)")
    parser.add_argument("--seed", type=at_least(0), default=0, help="names the scenes (default: %(default)s)")
    parser.add_argument("--count", type=at_least(1), default=200, help="scenes of each task (default: %(default)s)")
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--frames", type=at_least(1), default=8, help="length of clips (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=at_least(1), default=MAX_NEW_TOKENS, help="(default: %(default)s)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps...; auto is an accelerator if there is one")
    parser.add_argument("--dtype", choices=DTYPES, default="auto", help="auto: float32 on a CPU, else the checkpoint's")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the JSON object to a file")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after an error that the user can mend."""
    options = parse_arguments(argv)

    def work() -> None:
        report, table = run(options)
        print(report if options.json else table)

    return exit_code(work)


def run(options: argparse.Namespace) -> tuple[str, str]:
    """Does what the command line says; returns the scores as JSON, and as a table.

    Raises:
        ValueError, OSError: the model or the output can't be used.
    """
    model, processor = load(options.model, options.device, options.dtype)
    result = evaluate(
        model,
        processor,
        options.seed,
        options.count,
        split=options.split,
        tasks=options.tasks,
        num_frames=options.frames,
        progress=True,
        max_new_tokens=options.max_new_tokens,
    )
    report = json.dumps({**result, "settings": _settings(options, model)}, indent=2)
    if options.output:
        with replacing(options.output) as temporary:
            temporary.write_text(report + "\n")
    return report, format_table(result)


def _settings(options: argparse.Namespace, model: Sa2VAChatModel) -> dict[str, Any]:
    """All that is needed to get the same scores again."""
    names = ("model", "seed", "count", "split", "frames", "max_new_tokens")
    versions = {"sa2va": sa2va.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    return {
        **{name: getattr(options, name) for name in names},
        "tasks": list(options.tasks),
        "device": str(model.device),
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions,
    }


if __name__ == "__main__":
    sys.exit(main())

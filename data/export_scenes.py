"""Writes synthetic scenes in the JSONL format: `python data/export_scenes.py SEED COUNT OUT --tasks refer absent`.

OUT gets `<split>.jsonl`, lossless pictures and, for clips, a folder of frames each. Scenes are those of
`evaluation/scenes.py` with the same seed, split and count, task by task.
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sa2va.data.scenes import IMAGE_TASKS, SPLITS, VIDEO_TASKS, SceneSample, make_sample
from sa2va.demo.media import picture_writer, replacing
from sa2va.demo.predict import at_least, exit_code
from sa2va.processing_sa2va import masks_to_rle

TASKS = IMAGE_TASKS + VIDEO_TASKS


def export_scene(sample: SceneSample, name: str, out: Path) -> dict[str, Any]:
    """Writes the pictures of a scene below `out` and gives its line of JSONL.

    The objects of the scene come first among "objects", then the visual prompts. `info` holds "task" and, one entry a
    turn, "kind", "expected" (short truth or null) and "targets" (names of the objects that the answer points at).

    Raises:
        OSError: `out` can't be written to.
    """
    if sample.task in VIDEO_TASKS:
        paths = [f"clips/{name}/{frame:05}.png" for frame in range(len(sample.frames))]
        media = {"frames": paths}
    else:
        paths = [f"images/{name}.png"]
        media = {"image": paths[0]}
    for path, frame in zip(paths, sample.frames, strict=True):
        with picture_writer(out / path) as write:
            write(frame)
    regions = [] if sample.regions is None else [region[None] for region in sample.regions]
    first = len(sample.object_masks)
    return {
        "id": name,
        **media,
        "objects": [_object(masks) for masks in (*sample.object_masks, *regions)],
        "turns": [{"question": t.question, "answer": t.answer, "objects": list(t.targets)} for t in sample.turns],
        "regions": list(range(first, first + len(regions))),
        "info": {
            "task": sample.task,
            "kind": [turn.kind for turn in sample.turns],
            "expected": [turn.expected for turn in sample.turns],
            "targets": [[sample.objects[i].name for i in turn.targets] for turn in sample.turns],
        },
    }


def _object(masks: np.ndarray) -> dict[str, Any]:
    """An object's masks, bool [T, h, w], in the frames that show it."""
    return {"masks": {str(t): rle for t, rle in enumerate(masks_to_rle(masks)) if masks[t].any()}}


def export_scenes(
    seed: int, count: int, out: Path, *, split: str = "test", tasks: Sequence[str] = TASKS, num_frames: int = 8
) -> Path:
    """Writes `count` scenes of each task.

    Args:
        seed, split, num_frames: which scenes; see `make_sample`.
        count: scenes of each task.
        out: folder; it is made when needed.
        tasks: some of `TASKS`.

    Returns:
        The JSONL file.

    Raises:
        ValueError: an unknown task or split.
        OSError: `out` can't be written to.
    """
    file = out / f"{split}.jsonl"
    with replacing(file) as temporary, temporary.open("w") as lines:
        for name, sample in _scenes(seed, count, split, tasks, num_frames):
            lines.write(json.dumps(export_scene(sample, name, out)) + "\n")
    return file


def _scenes(
    seed: int, count: int, split: str, tasks: Sequence[str], num_frames: int
) -> Iterator[tuple[str, SceneSample]]:
    for task in tasks:
        for index in range(count):
            yield f"{task}_{index:05}", make_sample(seed, index, split=split, task=task, num_frames=num_frames)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seed", type=int)
    parser.add_argument("count", type=at_least(1), help="scenes of each task")
    parser.add_argument("out", type=Path)
    parser.add_argument("--split", choices=SPLITS, default="test", help="(default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--frames", type=at_least(1), default=8, help="length of clips (default: %(default)s)")
    o = parser.parse_args()
    print(export_scenes(o.seed, o.count, o.out, split=o.split, tasks=o.tasks, num_frames=o.frames))


if __name__ == "__main__":
    sys.exit(exit_code(main))

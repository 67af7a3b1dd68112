"""Checks a data set: `python data/check.py refcoco ~/data/refcoco --split val` names every broken line or record.

Every sample is made, every file looked for, and every mask decoded. A problem is one line, "file:line: what is wrong,
what is expected"; the command ends with status 1 if there are any.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from sa2va.data.records import BROKEN, Reader
from sa2va.data.registry import DATASETS, open_dataset
from sa2va.data.samples import Media, Sample, Size, annotated_frames
from sa2va.data.templates import SEG
from sa2va.demo.predict import at_least
from sa2va.processing_sa2va import Sa2VAProcessor, Sa2VAProcessorQwen

PICTURE_WORDS = (Sa2VAProcessor.image_token, Sa2VAProcessorQwen.image_token)
UNGROUPED = ("jsonl", "gcg", "region_captions", "llava", "chatunivi")  # all others draw from a sample's expressions


def validate(name: str, root: str | os.PathLike, split: str, *, limit: int | None = None, **options: Any) -> list[str]:
    """Looks for everything that is wrong with a data set.

    Args:
        name, root, split, **options: as in `open_dataset`; of grouped expressions all are looked at.
        limit: look at the first samples only.

    Returns:
        The problems, each with its place; none for a sound data set.

    Raises:
        ValueError: an unknown name.
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}; choose one of {', '.join(DATASETS)}.")
    everything = {} if name in UNGROUPED else {"max_expressions": sys.maxsize}
    try:
        dataset = open_dataset(name, root, split, **everything, **options)
    except (ValueError, OSError) as error:
        return [str(error)]
    problems, places = [], {}
    for index in range(len(dataset) if limit is None else min(limit, len(dataset))):
        where = _place(dataset, index)
        try:
            sample = dataset[index]
        except (ValueError, OSError) as error:
            problems.append(f"{where}: {error}" if isinstance(error, OSError) else str(error))
            continue
        if sample.id in places:
            problems.append(f"{where}: has the id {sample.id!r} of {places[sample.id]}; ids must be unique.")
        places.setdefault(sample.id, where)
        problems += [f"{where}: {problem}" for problem in _problems(sample, learned=split.startswith("train"))]
    return problems if len(dataset) else [f"{root}: split {split!r} has no samples."]


def _place(dataset: Any, index: int) -> str:
    return dataset.records[index].where if isinstance(dataset, Reader) else f"sample {index}"


def _problems(sample: Sample, learned: bool) -> Iterator[str]:
    """What is wrong with a sample that could be made, and maybe is to be learned from."""
    for number, turn in enumerate(sample.turns):
        if not turn.question.strip() or "<image>" in turn.question:
            yield f"turn {number}: a question needs words, without <image>; got {turn.question[:50]!r}."
        if used := [word for word in PICTURE_WORDS if word in f"{turn.question} {turn.answer or ''}"]:
            yield f"turn {number}: {used} stand for parts of a picture, and can't be said."
        if turn.answer is not None and turn.answer.count(SEG) != len(turn.objects):
            yield f"turn {number}: {turn.answer.count(SEG)} {SEG} in the answer, but {len(turn.objects)} objects."
        if learned and turn.answer is None and not turn.objects:
            yield f"turn {number}: neither answer nor objects say what is right."
    if not sample.turns:
        yield "there are no turns."
    missing = [path for path in sample.media.paths if not os.path.exists(path)]  # nor if no file can have that name
    if missing:
        yield f"there is no file {str(missing[0])!r}" + (f" (and {len(missing) - 1} more)." if missing[1:] else ".")
    elif sample.media:
        yield from _mask_problems(sample, learned)


def _mask_problems(sample: Sample, learned: bool) -> Iterator[str]:
    try:
        size, length = sample.media.size(), len(sample.media)
        sample.media.read([length - 1])  # a video may be shorter than its data set says
    except BROKEN as error:
        yield f"{sample.media.paths[0].name} can't be read: {error}"
        return
    if other := _other_size(sample.media, size):
        yield other
    named = [
        (f"turn {number}, object {place}", masks)
        for number, turn in enumerate(sample.turns)
        for place, masks in enumerate(turn.objects)
    ]
    yield from _annotation_problems(sample, length, learned)
    named += [(f"region {number}", masks) for number, masks in enumerate(sample.regions, 1)]
    for name, masks in named:
        if beyond := [frame for frame in masks.frames if not 0 <= frame < length]:
            yield f"{name}: a mask of frame {beyond[0]}, but there are {length} frames, numbered from 0."
            continue
        try:
            areas = [int(masks.read([frame], size).sum()) for frame in masks.frames]
        except BROKEN as error:
            yield f"{name}: {error}"
            continue
        if not any(areas) and not sample.media.is_video:
            yield f"{name}: the mask is empty; an object needs at least one pixel."


def _annotation_problems(sample: Sample, length: int, learned: bool) -> Iterator[str]:
    """Clips of which nothing can be learned or measured: all objects of a turn must be annotated in the same frames.

    To be learned, so must all of a conversation with turns that point at nothing, as its turns stay together.
    """
    whole = [thing for turn in sample.turns for thing in turn.objects]
    stays_whole = learned and not all(turn.objects for turn in sample.turns)
    if stays_whole and not annotated_frames(whole, length):
        yield "there is no frame in which all objects of the conversation are annotated."
    for number, turn in enumerate(sample.turns):
        counted = annotated_frames(turn.objects, length)
        if not counted:
            yield f"turn {number}: there is no frame in which all its objects are annotated."
        elif sample.regions and 0 not in counted:
            yield f"turn {number}: regions are shown on frame 0, in which not all its objects are annotated."


def _other_size(media: Media, size: Size) -> str | None:
    """The first frame of a clip that can't be read or is not as large as the first; only headers are read."""
    for path in media.paths[1:]:
        try:
            with Image.open(path) as frame:
                width, height = frame.size
        except BROKEN as error:
            return f"{path.name} can't be read: {error}"
        if (height, width) != size:
            return f"{path.name} is {height}x{width} (h x w), the first frame {size[0]}x{size[1]}."
    return None


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=DATASETS, metavar="NAME", help=", ".join(DATASETS))
    parser.add_argument("root", type=Path, help="folder of the data set")
    parser.add_argument("--split", default="train", help="(default: %(default)s)")
    parser.add_argument("--limit", type=at_least(1), metavar="N", help="look at the first N samples only")
    options = parser.parse_args(argv)
    problems = validate(options.name, options.root, options.split, limit=options.limit)
    print("\n".join([*problems, f"{len(problems) or 'no'} problem{'s' * (len(problems) != 1)}"]))
    raise SystemExit(1 if problems else 0)


if __name__ == "__main__":
    main()

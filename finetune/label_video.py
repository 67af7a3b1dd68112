"""Finds words for objects of videos that have masks but no words, in the manner of Ref-SAV (arXiv:2501.04001).

    python finetune/label_video.py --captioner VISION_MODEL --checker TEXT_MODEL --videos DIR --masks DIR
    python finetune/label_video.py --captioner VISION_MODEL --checker TEXT_MODEL --data mevis --root DIR --split train

Each stage sees more than the one before it:

1. object: the captioner describes the object twice, cut out with its surroundings and in a picture where all else is
   grey, both from the frame that shows most of it; the checker, a model that only reads, says whether both descriptions
   can be true of one object
2. scene: the captioner sees that whole frame, the object in a contour, and what the first stage found
3. video: the captioner sees 8 frames with the contour, and what the second stage found; its answer is the expression

The output (see docs/labelling.md) has one JSON line for each object, those that were rejected too, with the reason. Run
again after a stop, and what is there is not done again.
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer
from transformers.utils import logging

from sa2va.data.registry import open_dataset
from sa2va.data.samples import MaskFile, Media, ObjectMasks, Sample
from sa2va.demo.media import append_lines, finished_lines, replacing
from sa2va.demo.predict import at_least, exit_code
from sa2va.processing_sa2va import CORRUPT_FILE_ERRORS, masks_to_rle, natural_order

Captioner = Callable[[Sequence[Image.Image], str], str]
Checker = Callable[[str], str]

CROP_PROMPT = (
    "This picture was cut out around one object, which fills most of it. Describe that object in one or two sentences: "
    "what it is, its colours, its parts, and what it does. Do not describe what lies behind it."
)
MASKED_PROMPT = (
    "In this picture everything but one object has been painted grey. Describe that object in one or two sentences: "
    "what it is, its colours and its parts. Do not mention the grey."
)
CHECK_PROMPT = (
    "Two people described an object without seeing each other's words.\n"
    "First: {crop}\n"
    "Second: {masked}\n"
    "Can both be true of one and the same object? One may say more than the other; only contradictions count. "
    "Begin your answer with the word AGREE or the word CONFLICT, then give the reason in one sentence."
)
SCENE_PROMPT = (
    "One object of this picture has a yellow contour. Two descriptions of it:\n"
    "First: {crop}\n"
    "Second: {masked}\n"
    "Looking at the picture, describe the object so that nobody could take another one for it: what it is, what it "
    "looks like, where it is, and how it stands to the things around it. Write one or two sentences. Do not mention "
    "the contour."
)
VIDEO_PROMPT = (
    "These are {frames} frames of a video, in order. One object has a yellow contour. In one of the frames it was "
    "described like this: {scene}\n"
    "Write one description of the object that holds for the whole video: what it is and looks like, how it moves, "
    "what it does, and what it does it with or to. Write one to three sentences, and mention neither frames nor the "
    "contour."
)
VERDICT = re.compile(r"\W*(agree|conflict)\b[\W_]*(.*)", re.IGNORECASE | re.DOTALL)
THOUGHTS = re.compile(r".*</think>|<think>.*", re.DOTALL)  # the second: cut off before they ended
DRAWN = re.compile(r"\b(contour|outlined?|yellow (line|border|edge)|grey(ed)? out)\b", re.IGNORECASE)
YELLOW = (255, 255, 0)
GREY = 127
MARGIN = 0.15  # of the object's box, on each side of a crop
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")
VIDEO_SUFFIXES = (".mp4", ".mov", ".avi", ".mkv", ".webm")
VIDEO_DATA = ("mevis", "ref_youtube_vos", "revos", "ref_davis17", "ref_sav", "jsonl")
QUESTION = "Please segment the object that this describes: {}"

logger = logging.get_logger(f"transformers.{__name__}")


class Rejection(Exception):
    """An object gets no expression; `stage` is where this was found out."""

    def __init__(self, stage: str, reason: str):
        super().__init__(reason)
        self.stage = stage


@dataclass(frozen=True, eq=False)
class Target:
    """One object that is to be described.

    Attributes:
        id: unique and the same in every run.
        media: the video.
        masks: where the object is.
    """

    id: str
    media: Media
    masks: ObjectMasks


# ---------- where objects come from


def targets_in_dataset(samples: Iterable[Sample]) -> Iterator[Target]:
    """Every object of the videos in a data set once, however many of its expressions mean it.

    What means several objects at once in a frame is left out.
    """
    seen = set()
    for sample in samples:
        if not sample.media.is_video:
            continue
        objects = [masks for turn in sample.turns for masks in turn.objects]
        for number, masks in enumerate(objects):
            encoded = sorted(masks.frames.items())
            digest = hashlib.sha1(repr((sample.media.paths, encoded)).encode()).digest()
            if digest not in seen and not any(isinstance(parts, tuple) and len(parts) > 1 for _, parts in encoded):
                seen.add(digest)
                yield Target(f"{sample.id}/{number}", sample.media, masks)


def targets_in_folders(videos: Path, masks: Path) -> Iterator[Target]:
    """Every object that has masks. The folders are looked for at once, the files in them as objects are asked for.

    Args:
        videos: holds for each video a folder of frames, or a file; the name without suffix is the video's.
        masks: holds for each video a folder of its name. In it are PNG files whose values number the objects, 0 for
            none (as DAVIS and YouTube-VOS have them), or a folder of such files for each object, where all but 0 is
            the object (as SA-V has them). A mask is called like its frame; that of a file, by the frame's number.

    Raises:
        OSError: no such folders, or one without masks.
        ValueError: masks without a video or a frame.
    """
    for folder in (videos, masks):
        if not folder.is_dir():
            raise NotADirectoryError(f"There is no folder {str(folder)!r}. Give --videos and --masks, see --help.")
    names = sorted(entry.name for entry in masks.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{str(masks)!r} holds no folders. It needs one with masks for each video.")
    return (target for name in names for target in _targets_of(videos, masks / name))


def _targets_of(videos: Path, masks: Path) -> Iterator[Target]:
    """The objects of one video; `masks` is its folder of masks."""
    media = _video(videos, masks.name)
    try:
        objects = _objects(masks)
    except CORRUPT_FILE_ERRORS as error:
        logger.warning(f"The masks {str(masks)!r} are left out: {error}")
        return
    number_of = partial(_frame_of, media, {frame.stem: index for index, frame in enumerate(media.paths)})
    labelled = frozenset(map(number_of, masks.rglob("*.png")))
    for thing, files in objects.items():
        frames = {number_of(file.path): file for file in files}
        yield Target(f"{masks.name}/{thing}", media, ObjectMasks(frames, labelled))


def _video(videos: Path, name: str) -> Media:
    if (videos / name).is_dir():
        frames = [path for path in (videos / name).iterdir() if path.suffix.lower() in FRAME_SUFFIXES]
        if not frames:
            raise ValueError(f"{str(videos / name)!r} holds no frames ({', '.join(FRAME_SUFFIXES)}).")
        return Media(tuple(sorted(frames, key=natural_order)), is_video=True)
    files = [path for path in videos.iterdir() if path.stem == name and path.suffix.lower() in VIDEO_SUFFIXES]
    if len(files) != 1:
        raise ValueError(f"For the masks {name!r}, {str(videos)!r} holds {len(files)} videos of that name: give one.")
    return Media((files[0],), is_video=True)


def _objects(folder: Path) -> dict[str, list[MaskFile]]:
    """The mask files of each object."""
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    if parts:
        return {part.name: [MaskFile(path) for path in sorted(part.glob("*.png"))] for part in parts}
    objects: dict[str, list[MaskFile]] = {}
    for path in sorted(folder.glob("*.png")):
        with Image.open(path) as labels:
            values = np.unique(np.asarray(labels))
        for value in values:
            if value:
                objects.setdefault(str(value), []).append(MaskFile(path, int(value)))
    return objects


def _frame_of(media: Media, numbers: Mapping[str, int], mask: Path) -> int:
    try:
        return int(mask.stem) if media.is_file else numbers[mask.stem]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{str(mask)!r} is a mask of no frame of {str(media.paths[0])!r}. Masks are called like their frames; "
            "those of a video file, by the frame's number."
        ) from error


# ---------- what models see


def largest_view(target: Target, min_area: float) -> tuple[int, Image.Image, np.ndarray]:
    """The frame that shows most of the object.

    Args:
        target: the object.
        min_area: the least share of the picture, 0..1, that it must fill there.

    Returns:
        Index, picture and bool [h, w].

    Raises:
        Rejection: the object is nowhere, or too small everywhere.
    """
    size = target.media.size()
    areas = {index: int(target.masks.read([index], size).sum()) for index in sorted(target.masks.frames)}
    index = max(areas, key=areas.__getitem__, default=None)
    share = areas[index] / (size[0] * size[1]) if index is not None else 0.0
    if not share or share < min_area:
        raise Rejection("object", f"fills at most {share:.4%} of a frame")
    (picture,) = target.media.read([index])
    return index, picture, target.masks.read([index], size)[0]


def cut_out(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The object's box, of bool [h, w], with a margin."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    dy, dx = round(MARGIN * (bottom - top)), round(MARGIN * (right - left))
    box = max(0, left - dx), max(0, top - dy), min(picture.width, right + dx), min(picture.height, bottom + dy)
    return picture.crop(tuple(int(side) for side in box))


def hide_rest(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture, grey wherever bool [h, w] is False."""
    return Image.fromarray(np.where(mask[..., None], np.asarray(picture), np.uint8(GREY)))


def draw_contour(picture: Image.Image, mask: np.ndarray) -> Image.Image:
    """The picture with a yellow line around bool [h, w], two pixels wide or a 200th of the longer side."""
    pixels = np.array(picture)
    lines, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(pixels, lines, -1, YELLOW, thickness=max(2, round(max(picture.size) / 200)))
    return Image.fromarray(pixels)


def spread_frames(target: Target, number: int) -> list[int]:
    """Indices of up to `number` frames, evenly spread over those where the object's whereabouts are known."""
    labelled = target.masks.annotated
    known = range(len(target.media)) if labelled is None else sorted(labelled)
    return [known[place] for place in np.linspace(0, len(known) - 1, min(number, len(known))).round().astype(int)]


# ---------- the stages


def label(
    target: Target, captioner: Captioner, checker: Checker, num_frames: int = 8, min_area: float = 0.001
) -> dict[str, Any]:
    """Takes an object through all stages, as far as it gets.

    Args:
        target: the object.
        captioner: answers a prompt about pictures.
        checker: answers a prompt.
        num_frames: frames of the last stage.
        min_area: see `largest_view`.

    Returns:
        A line of the output: "id", "media" and "expression" (None if rejected); "rejected", None or "stage" and
        "reason"; what each stage said, as far as they went.

    Raises:
        ValueError: `num_frames` below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
    media = [str(path) for path in target.media.paths]
    record: dict[str, Any] = {"id": target.id, "media": media, "expression": None, "rejected": None}
    try:
        _describe(record, target, captioner, checker, num_frames, min_area)
    except Rejection as rejection:
        record["rejected"] = {"stage": rejection.stage, "reason": str(rejection)}
    return record


def _describe(
    record: dict[str, Any], target: Target, captioner: Captioner, checker: Checker, num_frames: int, min_area: float
) -> None:
    """Adds what each stage finds to the record."""
    with _reading():
        record["frame"], picture, mask = largest_view(target, min_area)
    record["crop"] = _said("object", captioner([cut_out(picture, mask)], CROP_PROMPT))
    record["masked"] = _said("object", captioner([hide_rest(picture, mask)], MASKED_PROMPT))
    record["check"] = _said("check", checker(CHECK_PROMPT.format(**record)))
    _require_agreement(record["check"])
    record["scene"] = _said("scene", captioner([draw_contour(picture, mask)], SCENE_PROMPT.format(**record)))
    with _reading():
        record["frames"] = spread_frames(target, num_frames)
        pictures = target.media.read(record["frames"])
        masks = target.masks.read(record["frames"], mask.shape)
        shown = [draw_contour(*pair) for pair in zip(pictures, masks, strict=True)]
    expression = _said("video", captioner(shown, VIDEO_PROMPT.format(scene=record["scene"], frames=len(shown))))
    if DRAWN.search(expression):
        raise Rejection("video", f"speaks of what was drawn into the picture: {expression}")
    record["expression"] = expression


@contextmanager
def _reading() -> Iterator[None]:
    """A damaged file costs its objects, not the whole run."""
    try:
        yield
    except (OSError, ValueError) as error:
        raise Rejection("read", str(error)) from error


def _said(stage: str, answer: str) -> str:
    """An answer on one line, without the thoughts that some models write before it."""
    answer = " ".join(THOUGHTS.sub("", answer).split())
    if not answer:
        raise Rejection(stage, "the model said nothing")
    return answer


def _require_agreement(verdict: str) -> None:
    match = VERDICT.match(verdict)
    if not match:
        raise Rejection("check", f"neither AGREE nor CONFLICT: {verdict}")
    if match[1].lower() == "conflict":
        raise Rejection("check", match[2] or "conflict")


# ---------- what was found


def finished(path: Path, models: dict[str, str]) -> dict[str, str | None]:
    """The expressions in the output by the id of their object; a last line that was torn by a stop is none.

    Args:
        path: the output; need not exist.
        models: what the lines must say of their models.

    Raises:
        ValueError: a line is broken, or by other models.
    """
    expressions = {}
    for number, (_, line) in enumerate(finished_lines(path) if path.is_file() else (), start=1):
        try:
            record = json.loads(line)
            expressions[record["id"]] = record["expression"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: no record of this command. Give another --output.") from error
        if any(record.get(role) != name for role, name in models.items()):
            raise ValueError(f"{path}, line {number}: written with other models. Give another --output.")
    return expressions


def training_line(target: Target, expression: str, root: Path) -> dict[str, Any]:
    """An object with its expression as a line of a "jsonl" data set (`data/conversations.py`).

    Args:
        target: the object.
        expression: what describes it.
        root: folder of the data set.

    Raises:
        ValueError: the video lies outside of the folder.
    """
    media, step = target.media, target.media.step
    try:
        paths = [path.resolve().relative_to(root.resolve()).as_posix() for path in media.paths]
    except ValueError as error:
        raise ValueError(
            f"{media.paths[0]} is not below {str(root)!r}: put the data set's file above its videos."
        ) from error
    size, masks = media.size(), {}
    for index in sorted(target.masks.frames):
        mask = target.masks.read([index], size)
        if mask.any():
            masks[index * step] = masks_to_rle(mask)[0]
    annotated = target.masks.annotated
    if annotated is None and step > 1:
        annotated = range(len(media))
    labelled = {} if annotated is None else {"annotated": [index * step for index in sorted(annotated)]}
    return {
        "id": target.id,
        **({"video": paths[0]} if media.is_file else {"frames": paths}),
        "objects": [{"masks": masks, **labelled}],
        "turns": [{"question": QUESTION.format(expression), "answer": "Sure, it is [SEG].", "objects": [0]}],
    }


# ---------- models


def load_captioner(name: str, dtype: str = "auto", device_map: str = "auto", max_new_tokens: int = 256) -> Captioner:
    """A model that answers about pictures.

    Args:
        name: folder or Hugging Face name of any image-text-to-text model of transformers with a chat template.
        dtype, device_map: as of `from_pretrained`.
        max_new_tokens: longest answer.

    Raises:
        OSError: no such model.
        ValueError: it is of another kind, or has no chat template.
    """
    processor = AutoProcessor.from_pretrained(name)
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{name!r} has no chat template, so it can't be asked. Take an instruction-tuned model.")
    model = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype, device_map=device_map).eval()

    def answer(pictures: Sequence[Image.Image], prompt: str) -> str:
        shown = [{"type": "image", "image": picture} for picture in pictures]
        return _generate(model, processor, [*shown, {"type": "text", "text": prompt}], max_new_tokens)

    return answer


def load_checker(name: str, dtype: str = "auto", device_map: str = "auto", max_new_tokens: int = 256) -> Checker:
    """A model that answers to words; arguments and errors as of `load_captioner`, for any text model."""
    tokenizer = AutoTokenizer.from_pretrained(name)
    if not tokenizer.chat_template:
        raise ValueError(f"{name!r} has no chat template, so it can't be asked. Take an instruction-tuned model.")
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, device_map=device_map).eval()
    return lambda prompt: _generate(model, tokenizer, prompt, max_new_tokens)


@torch.inference_mode()
def _generate(model: Any, processor: Any, content: str | list[dict[str, Any]], max_new_tokens: int) -> str:
    """The likeliest answer to one message."""
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    ).to(model.device)
    inputs = {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()}
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
    return processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


# ---------- the command


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0, or 2 after an error that the user can mend, which is told on stderr.
    """
    return exit_code(partial(run, _parser().parse_args(argv)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add(
        "--captioner", required=True, metavar="MODEL", help="folder or Hugging Face name of an image-text-to-text model"
    )
    add("--checker", required=True, metavar="MODEL", help="the same of a text model")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--videos", type=Path, metavar="DIR", help="NAME.mp4 or a folder NAME of frames for each video")
    source.add_argument("--data", choices=VIDEO_DATA, help="a data set that data/registry.py reads")
    add("--masks", type=Path, metavar="DIR", help="to --videos: NAME/FRAME.png or NAME/OBJECT/FRAME.png")
    add("--root", type=Path, metavar="DIR", help="to --data: where it is")
    add("--split", default="train", help="to --data; default: train")
    add("--output", type=Path, default=Path("labels.jsonl"), metavar="FILE", help="default: labels.jsonl")
    add("--train-file", type=Path, metavar="FILE", help="write what was accepted as a jsonl data set, above its videos")
    add("--limit", type=at_least(1), metavar="N", help="stop after so many new lines")
    add("--num-frames", type=at_least(1), default=8, metavar="N", help="frames of the last stage; default: 8")
    area = "of a frame that an object fills; default: 0.001"
    add("--min-area", type=_share, default=0.001, metavar="SHARE", help=area)
    add("--max-new-tokens", type=at_least(1), default=256, metavar="N", help="longest answer of a model; default: 256")
    add("--dtype", default="auto", help="of both models; auto (default) is what their checkpoints have")
    add("--device-map", default="auto", help="cpu, cuda:0...; auto (default) spreads them over what is there")
    return parser


def _share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share of a frame; give a number from 0 to below 1")
    return number


def run(arguments: argparse.Namespace) -> None:
    """Does what the parsed command line asks for.

    Raises:
        ValueError, OSError: the data, the output or a model can't be used.
    """
    models = {"captioner": arguments.captioner, "checker": arguments.checker}
    targets = _targets(arguments)
    done = finished(arguments.output, models)
    options = {name: getattr(arguments, name) for name in ("dtype", "device_map", "max_new_tokens")}
    captioner = load_captioner(arguments.captioner, **options)
    checker = load_checker(arguments.checker, **options)
    todo = (target for target in targets if target.id not in done)
    with append_lines(arguments.output) as file:
        for target in tqdm(itertools.islice(todo, arguments.limit), unit="object"):
            record = label(target, captioner, checker, arguments.num_frames, arguments.min_area)
            print(json.dumps(record | models, ensure_ascii=False), file=file, flush=True)
            done[target.id] = record["expression"]
    accepted = {id: expression for id, expression in done.items() if expression}
    print(f"{len(accepted)} expressions, {len(done) - len(accepted)} rejected: {arguments.output}")
    if arguments.train_file:
        _write_training_file(arguments, accepted)


def _targets(arguments: argparse.Namespace) -> Iterator[Target]:
    partner = "masks" if arguments.videos else "root"
    if getattr(arguments, partner) is None:
        raise ValueError(f"--{'videos' if arguments.videos else 'data'} needs --{partner} DIR too.")
    if arguments.videos:
        return targets_in_folders(arguments.videos, arguments.masks)
    options = {} if arguments.data == "jsonl" else {"one_per_expression": True}
    samples = open_dataset(arguments.data, arguments.root, arguments.split, **options)
    return targets_in_dataset(samples[index] for index in range(len(samples)))


def _write_training_file(arguments: argparse.Namespace, accepted: dict[str, str]) -> None:
    path = arguments.train_file
    found = (target for target in _targets(arguments) if target.id in accepted)
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for target in found:
            print(json.dumps(training_line(target, accepted[target.id], path.parent), ensure_ascii=False), file=file)
    print(f"Training data: {path} (--data jsonl:{path.parent}, split {path.stem})")


if __name__ == "__main__":
    sys.exit(main())

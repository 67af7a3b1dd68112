"""Asks Sa2VA about an image or a video: prints the answer, paints what it points at, saves the masks.

    python demo/predict.py demo/samples/shapes.png "Please segment the circle left of the red star in this image."
    python demo/predict.py demo/samples/shapes.mp4 "Can you segment the square moving right in this video?"
    python demo/predict.py photo.jpg "Please segment the dog." --model ByteDance/Sa2VA-1B --dtype bfloat16

For photo.jpg it writes photo-image.png and photo-image.json, for clip.mov clip-video.mp4 and clip-video.json. An
answer that points at nothing has no overlay, only the JSON file:

    {"question", "prediction", "phrases", "size": [height, width], "fps": number or null, "overlay": name or null,
     "objects": [{"phrase", "scores": {"iou": [...], "object": [...]}, "areas": [...], "rle": [...]}]}

with one number and one COCO run-length encoding for each frame (areas in pixels; an image is one frame). A video is
read, tracked and written frame by frame, so memory does not grow with its length.
"""

import argparse
import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AutoModel

from sa2va import Sa2VAChatModel, Sa2VAFrame
from sa2va.demo.media import Source, open_source, picture_writer, replacing, video_writer
from sa2va.processing_sa2va import FRAME_SAMPLINGS, draw_overlay, masks_to_rle, select_key_frames

DEFAULT_MODEL = Path(__file__).resolve().parents[1] / "sa2va-tiny"
DTYPES = ("auto", "float32", "bfloat16", "float16")
HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
USER_ERROR = 2


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0, or 2 after an error that the user can mend, which is told on stderr.
    """
    arguments = _parser().parse_args(argv)
    return exit_code(partial(run, arguments), "demo")


def exit_code(work: Callable[[], Any], extra: str | None = None) -> int:
    """Runs a command.

    Args:
        work: what it does.
        extra: the optional dependencies that it needs.

    Returns:
        0, or 2 after an error that the user can mend, which is told on stderr.
    """
    try:
        work()
    except (ValueError, TypeError, OSError, ImportError) as error:
        missing = extra is not None and isinstance(error, ModuleNotFoundError)
        hint = f'. More packages are needed: pip install "sa2va[{extra}]"' if missing else ""
        print(f"error: {error}{hint}", file=sys.stderr)
        return USER_ERROR
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("picture", metavar="IMAGE_OR_VIDEO", help="an image, a video, an animated gif or a folder of frames")
    add("text", metavar="TEXT", help="the question or request")
    add("--output", type=Path, default=Path("outputs"), metavar="DIR", help="where the files go; default: outputs")
    add("--json", action="store_true", help="print the JSON record and nothing else")
    add_model_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds what says which model answers, and how."""
    add_answer_options(parser.add_argument)
    parser.add_argument(
        "--threshold",
        type=probability,
        default=0.5,
        help="probability above which a pixel belongs to the object; default: 0.5",
    )


def add_answer_options(add: Callable[..., Any]) -> None:
    """Adds what says which model answers, of what it sees and for how long, by `add_argument` of a parser."""
    add("--model", default=str(DEFAULT_MODEL), help="folder or Hugging Face name of a checkpoint; default: sa2va-tiny")
    add("--device", default="auto", help="cpu, cuda, cuda:1, mps...; auto (default) is an accelerator if there is one")
    add("--dtype", default="auto", choices=DTYPES, help="auto (default): float32 on a CPU, else the checkpoint's")
    add("--num-frames", type=at_least(1), metavar="N", help="frames of a video the language model sees (released: 5)")
    add(
        "--frame-sampling",
        type=frame_sampling,
        metavar="first|uniform|I,J,K",
        help="which frames (default: the checkpoint's)",
    )
    add("--max-new-tokens", type=at_least(1), metavar="N", help="longest answer; default: 2048")


def check_regions_are_seen(sampling: str | Sequence[int] | None) -> None:
    """Regions of a video are marked on frame 0, and the model looks for them in the first frame that it sees.

    Args:
        sampling: `frame_sampling` of `predict_forward`.

    Raises:
        ValueError: frame numbers without 0.
    """
    if not isinstance(sampling, str | None) and 0 not in sampling:
        raise ValueError(f"Regions are marked on frame 0, so the model must see it: add 0 to {list(sampling)}.")


# ---------- types of options; a mistake is told before any model is loaded


def frame_sampling(text: str) -> str | list[int]:
    """ "first" and "uniform" as they are, "0,4,8" as numbers.

    Raises:
        argparse.ArgumentTypeError: neither of them, or a number below 0.
    """
    if text in FRAME_SAMPLINGS:
        return text
    try:
        return [at_least(0)(number) for number in text.split(",")]
    except ValueError as error:
        accepted = ", ".join(FRAME_SAMPLINGS)
        raise argparse.ArgumentTypeError(f"{text!r} is unknown; give {accepted} or numbers such as 0,4,8") from error


def at_least(minimum: int) -> Callable[[str], int]:
    """A type for whole numbers from `minimum` on; it raises argparse.ArgumentTypeError for smaller ones."""

    def whole_number(text: str) -> int:
        number = int(text)
        if number < minimum:
            raise argparse.ArgumentTypeError(f"{number} is too small, the least is {minimum}")
        return number

    return whole_number


def probability(text: str) -> float:
    """A number between 0 and 1, as `mask_threshold` has to be.

    Raises:
        argparse.ArgumentTypeError: another number.
    """
    number = float(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no probability; give a number between 0 and 1")
    return number


# ---------- asking


def run(arguments: argparse.Namespace) -> None:
    """Does what the parsed command line asks for.

    Raises:
        ValueError, TypeError, OSError: what was given can't be used; nothing is left half-written.
    """
    source, options = open_source(arguments.picture), predict_options(arguments)
    if arguments.output.exists() and not arguments.output.is_dir():
        raise NotADirectoryError(f"--output {arguments.output} is a file. Name a folder.")
    if source.is_video and isinstance(options.get("frame_sampling"), list):
        select_key_frames(source.frames, 1, options["frame_sampling"])  # raises before the model, which takes longer
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    answer = predict(model, source, arguments.text, options)
    picture, first = next(answer)
    if not arguments.json:
        print(_without_end_mark(first.prediction, model), flush=True)
    record = new_record(arguments.text, first, source)
    name = f"{Path(arguments.picture).expanduser().resolve().stem}-{'video' if source.is_video else 'image'}"
    overlay = arguments.output / f"{name}{'.mp4' if source.is_video else '.png'}"
    if first.phrases:
        frames = itertools.chain([(picture, first)], answer)
        bar = tqdm(frames, total=source.length, unit="frame", disable=not source.is_video)
        _save_overlay(overlay, source, bar, record)
    else:
        overlay.unlink(missing_ok=True)  # that of an earlier question would be taken for the answer
    with replacing(arguments.output / f"{name}.json") as temporary:
        temporary.write_text(json.dumps(record) + "\n", encoding="utf-8")
    _report(record, arguments)


def load_model(name: str, device: str = "auto", dtype: str = "auto") -> Sa2VAChatModel:
    """Loads a checkpoint for inference.

    Args:
        name: folder or Hugging Face name.
        device: a torch device; "auto" is the accelerator if there is one, else the CPU.
        dtype: one of `DTYPES`; "auto" is float32 on a CPU, where SAM 2 is several times faster than in half
            precision, and the checkpoint's own elsewhere.

    Raises:
        ValueError: no such device here.
        OSError: no such checkpoint, or the Hub can't be reached.
    """
    check_model_name(name)
    place = _device(device)
    if dtype == "auto" and place.type == "cpu":
        dtype = "float32"
    onto = None if place.type == "cpu" else place  # straight onto a GPU: weights never stand in this computer's memory
    return AutoModel.from_pretrained(name, dtype=dtype, device_map=onto).to(place).eval()


def check_model_name(name: str) -> None:
    """Refuses what is neither a folder nor can be a name on the Hub, of which that would complain in its own words.

    Raises:
        FileNotFoundError: that is so.
    """
    if not Path(name).is_dir() and not HUB_NAME.fullmatch(name):
        raise FileNotFoundError(
            f"There is no model folder {name!r}. As --model give the folder of a checkpoint, or its name on the "
            "Hugging Face Hub such as ByteDance/Sa2VA-1B."
        )


def _device(name: str) -> torch.device:
    if name == "auto":
        name = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    try:  # a number is added to cuda alone: other threads, such as those that load, take that for the first GPU
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises all of them
        reason = str(error).partition("\n")[0]
        raise ValueError(f"--device {name} can't be used here: {reason} Try cpu.") from error


def predict_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the command line says of `predict_stream`'s options; the checkpoint decides the others."""
    options = {
        "num_frames": arguments.num_frames,
        "frame_sampling": arguments.frame_sampling,
        "mask_threshold": arguments.threshold,
        "max_new_tokens": arguments.max_new_tokens,
    }
    return {name: value for name, value in options.items() if value is not None}


def weights_version(folder: Path) -> str | None:
    """Tells the weights in a folder from others that stood there before, by size and time; None if there are none."""
    files = ((file.name, file.stat()) for file in sorted(folder.glob("*.safetensors")))
    told = [(name, status.st_size, status.st_mtime_ns) for name, status in files]
    return hashlib.sha256(repr(told).encode()).hexdigest()[:16] if told else None


def predict(
    model: Sa2VAChatModel, source: Source, text: str, options: dict[str, Any]
) -> Iterator[tuple[Image.Image, Sa2VAFrame]]:
    """Pairs every picture of the source with what the model finds in it.

    Args:
        model: see `load_model`.
        source: image or video. It is read twice, in step: for the model and for the overlay.
        text: the question.
        options: arguments of `predict_stream`.

    Yields:
        RGB picture and `Sa2VAFrame` of frame 0, 1, 2...
    """
    given = {"video": source.frames} if source.is_video else {"image": source.frames[0]}
    return zip(source.frames, model.predict_stream(text=text, **given, **options), strict=True)


def _without_end_mark(prediction: str, model: Sa2VAChatModel) -> str:
    for mark in model.load_processor().stop_words:
        prediction = prediction.removesuffix(mark)
    return prediction.rstrip()


def new_record(question: str, first: Sa2VAFrame, source: Source) -> dict[str, Any]:
    """What the JSON file holds, before any frame is added."""
    return {
        "question": question,
        "prediction": first.prediction,
        "phrases": first.phrases,
        "size": list(first.masks.shape[1:]),
        "fps": source.fps,
        "overlay": None,
        "objects": [
            {"phrase": phrase, "scores": {"iou": [], "object": []}, "areas": [], "rle": []} for phrase in first.phrases
        ],
    }


def _save_overlay(
    path: Path, source: Source, frames: Iterator[tuple[Image.Image, Sa2VAFrame]], record: dict[str, Any]
) -> None:
    """Writes the overlay and adds every frame to the record."""
    labels = [phrase or f"object {number}" for number, phrase in enumerate(record["phrases"], start=1)]
    height, width = record["size"]
    writer = video_writer(path, (height, width), source.fps) if source.is_video else picture_writer(path)
    with writer as write:
        for picture, frame in frames:
            if picture.size != (width, height):  # a later frame of a folder; its masks have the first one's size
                picture = picture.resize((width, height))
            write(draw_overlay(picture, frame.masks, labels))
            add_frame(record["objects"], frame)
    record["overlay"] = path.name


def add_frame(objects: list[dict[str, Any]], frame: Sa2VAFrame) -> None:
    """Adds a frame's scores, areas and masks to the objects of a record."""
    for index, (thing, rle) in enumerate(zip(objects, masks_to_rle(frame.masks), strict=True)):
        for name, scores in thing["scores"].items():
            scores.append(round(float(frame.mask_scores[name][index]), 4))
        thing["areas"].append(int(frame.masks[index].sum()))
        thing["rle"].append(rle)


def _report(record: dict[str, Any], arguments: argparse.Namespace) -> None:
    """Prints the record, or a line for each object and where the files are."""
    if arguments.json:
        print(json.dumps(record))
        return
    for number, thing in enumerate(record["objects"], start=1):
        print(f"  {number}. {thing['phrase'] or '(no words)'}: {_describe(thing, record)}")
    if record["overlay"]:
        overlay = arguments.output / record["overlay"]
        print(f"Overlay: {overlay}\nMasks:   {overlay.with_suffix('.json')}")
    else:
        print("The answer points at nothing, so there is no overlay.")


def _describe(thing: dict[str, Any], record: dict[str, Any]) -> str:
    """An object in numbers; of a video the means of all scores and of the areas where the object is seen."""
    areas = [area for area in thing["areas"] if area]
    area = np.mean(areas) if areas else 0.0
    scores = [f"{name} {np.mean(values):.2f}" for name, values in thing["scores"].items()]
    parts = [*scores, f"area {area:.0f} px ({area / np.prod(record['size']):.1%})"]
    if record["fps"] is not None:
        parts.append(f"in {len(areas)} of {len(thing['areas'])} frames")
    return ", ".join(parts)


if __name__ == "__main__":
    sys.exit(main())

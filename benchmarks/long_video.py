"""Follows an object through a long video, frame by frame: memory must stay flat, speed and masks must not fall off.

    python benchmarks/long_video.py [--model sa2va-tiny] [--frames 10000] [--every 1000] [--json FILE]

The frames are drawn as they are asked for, 128 x 128, and nothing keeps them: a red disk runs in a circle around a blue
square. Every `--every` frames one line tells the memory of the process (RSS, 10^6 bytes), how many tensors are alive,
frames per second and the mean IoU with the disk since the line before.
"""

import argparse
import gc
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import torch
from PIL import Image, ImageDraw
from transformers import AutoModel

from sa2va.demo.media import write_json
from sa2va.demo.predict import DEFAULT_MODEL

QUESTION = "Please segment the red circle in this video."
SIDE, ORBIT, RADIUS, ROUND = 128, 40, 14, 240  # pixels, and frames of a full circle


def _disk(index: int) -> tuple[float, float, float, float]:
    angle = 2 * math.pi * index / ROUND
    x, y = SIDE / 2 + ORBIT * math.cos(angle), SIDE / 2 + ORBIT * math.sin(angle)
    return x - RADIUS, y - RADIUS, x + RADIUS, y + RADIUS


def draw_frames(count: int) -> Iterator[Image.Image]:
    """The video, one frame at a time."""
    for index in range(count):
        frame = Image.new("RGB", (SIDE, SIDE), (90, 90, 90))
        draw = ImageDraw.Draw(frame)
        draw.rectangle((50, 50, 78, 78), fill=(50, 80, 220))
        draw.ellipse(_disk(index), fill=(220, 40, 40))
        yield frame


def true_mask(index: int) -> np.ndarray:
    """Where the disk is in a frame: bool [128, 128]."""
    mask = Image.new("1", (SIDE, SIDE))
    ImageDraw.Draw(mask).ellipse(_disk(index), fill=1)
    return np.asarray(mask)


def measure(model: str, frames: int, every: int) -> Iterator[dict[str, float]]:
    """Runs the video through `predict_stream`; yields what is described above, "frame" being how many were seen.

    Raises:
        ValueError: the model found no object.
    """
    stream = AutoModel.from_pretrained(model).eval().predict_stream(video=draw_frames(frames), text=QUESTION)
    overlaps, begun = [], time.perf_counter()
    for seen, frame in enumerate(stream, start=1):
        if not len(frame.masks):
            raise ValueError(f"{model} found nothing to follow: it said {frame.prediction!r}.")
        found, true = frame.masks[0] > 0, true_mask(frame.frame_index)
        overlaps.append((found & true).sum() / (found | true).sum())
        if seen % every == 0 or seen == frames:
            gc.collect()
            yield {
                "frame": seen,
                "rss_mb": psutil.Process().memory_info().rss / 1e6,
                "tensors": sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()),
                "fps": len(overlaps) / (time.perf_counter() - begun),
                "iou": float(np.mean(overlaps)),
            }
            overlaps, begun = [], time.perf_counter()


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or hub name (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=10000, help="length of the video (default: %(default)s)")
    parser.add_argument("--every", type=int, default=1000, help="frames between two lines (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the lines to a file")
    options = parser.parse_args(argv)
    lines = []
    for line in measure(options.model, options.frames, options.every):
        lines.append(line)
        print("  ".join(f"{name} {value:g}" for name, value in line.items()), flush=True)
        if options.json:
            write_json(options.json, lines)


if __name__ == "__main__":
    main()

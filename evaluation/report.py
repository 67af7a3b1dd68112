"""What a run leaves behind: a table, a JSON file, and a page of the worst cases."""

import base64
import contextlib
import html
import importlib.metadata
import io
import math
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

import sa2va
from sa2va.data.samples import Sample
from sa2va.evaluation.predict import output_of
from sa2va.evaluation.protocols import Measurement, Scores
from sa2va.processing_sa2va import draw_overlay

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "opencv-python", "pycocotools", "pycocoevalcap", "scipy")
THUMBNAIL = 360  # pixels, longest side of a picture on the page
FRAMES_SHOWN = 4  # of a video
STYLE = "body{font:15px sans-serif;margin:2em} section{border-top:1px solid #ccc} img{margin:2px;vertical-align:top}"

# ---------- numbers


def percent(scores: Scores) -> Scores:
    """The scores in percent, two decimals; what has no value (nan) becomes None."""

    def rounded(score: float | None) -> float | None:
        return None if score is None or math.isnan(score) else round(100 * score, 2)

    return {group: {name: rounded(score) for name, score in part.items()} for group, part in scores.items()}


def format_table(scores: Scores) -> str:
    """Lines of group, score and percent; "-" where there is no value."""
    rows = [(group, name, score) for group, part in scores.items() for name, score in part.items()]
    width = max(len(group) for group in ("group", *scores)) + 2
    lines = [f"{'group':{width}}{'score':16}{'%':>8}"]
    return "\n".join(lines + [f"{group:{width}}{name:16}{_shown(score):>8}" for group, name, score in rows])


def _shown(score: float | None) -> str:
    return "-" if score is None else f"{score:.2f}"


def code_version() -> dict[str, str | None]:
    """The package's version and the git commit it runs from, "+" after it if files were changed; None without git."""
    root = Path(sa2va.__file__).resolve().parent
    commit = None
    if (root / ".git").exists():
        with contextlib.suppress(OSError, subprocess.CalledProcessError):  # no git, or somebody else's folder
            commit = _git(root, "rev-parse", "HEAD") + ("+" if _git(root, "status", "--porcelain", "-uno") else "")
    return {"sa2va": sa2va.__version__, "commit": commit}


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, check=True).stdout.strip()


def library_versions() -> dict[str, str | None]:
    """Versions of what computes masks and scores; None for what is not installed."""

    def version(name: str) -> str | None:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in LIBRARIES}


# ---------- the worst cases


def worst(measurements: Sequence[Measurement], count: int) -> list[Measurement]:
    """The measurements of least quality, the least first; those without quality are left out."""
    ranked = [item for item in measurements if not math.isnan(item.quality)]
    return sorted(ranked, key=lambda item: item.quality)[:count]


def worst_page(title: str, cases: Sequence[tuple[Measurement, Sample, Mapping[str, Any]]]) -> str:
    """A page of HTML that needs no other file: of each case the words, the truth and what was predicted.

    Args:
        title: of the page.
        cases: measurement, sample and its line of predictions.

    Raises:
        OSError, ValueError: pictures or masks that can't be read.
    """
    name = html.escape(title)
    head = f"<!doctype html><meta charset=utf-8><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>"
    return "\n".join([head, *(_section(*case) for case in cases)]) + "\n"


def _section(measured: Measurement, sample: Sample, record: Mapping[str, Any]) -> str:
    turn, answered = sample.turns[measured.turn], record["turns"][measured.turn]
    found = output_of(answered)
    frames = record["frames"]  # none of a conversation without a picture
    shown = sorted({round(place) for place in np.linspace(0, frames - 1, FRAMES_SHOWN)}) if frames else []
    pictures = sample.media.read(shown)
    truth = [thing.read(shown, tuple(record["size"])) for thing in turn.objects]
    lines = [f"<section><h3>{html.escape(sample.id)}: {100 * measured.quality:.1f} %</h3>"]
    lines.append(f"<p>{html.escape(turn.question)}</p>")
    for name, words, masks in (
        ("truth", turn.answer or "", truth),
        ("predicted", found.prediction, [mask[shown] for mask in found.prediction_masks]),
    ):
        images = "".join(f'<img src="{uri}" alt="{name}">' for uri in _overlays(pictures, masks))
        lines.append(f"<p>{name}: {html.escape(words)}</p><div>{images}</div>")
    return "\n".join([*lines, "</section>"])


def _overlays(pictures: Sequence[Image.Image], masks: Sequence[np.ndarray]) -> Iterator[str]:
    """A data URI for each picture with its masks, bool [pictures, h, w] of each object."""
    for index, picture in enumerate(pictures):
        layers = [mask[index] for mask in masks]
        if layers:
            picture = picture.resize(layers[0].shape[::-1])  # masks have the first frame's size
            picture = Image.fromarray(draw_overlay(picture, np.stack(layers)))
        thumbnail = ImageOps.contain(picture, (THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        thumbnail.save(buffer, format="jpeg", quality=85)
        yield f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"

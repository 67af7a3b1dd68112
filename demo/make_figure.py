"""Makes the picture of the README from what a model really answers: `python demo/make_figure.py [--model ...]`.

Three panels: a question about the sample picture, a grounded caption of it, and an object followed through the sample
video. Words that a mask belongs to stand in the colour of the mask.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sa2va import Sa2VAChatModel
from sa2va.data.scenes import CAPTION_QUESTION
from sa2va.demo.make_samples import SAMPLES
from sa2va.demo.media import open_source, picture_writer
from sa2va.demo.predict import DEFAULT_MODEL, load_model, predict
from sa2va.processing_sa2va import draw_overlay, object_color

FIGURE = Path(__file__).resolve().parents[1] / "docs" / "overview.png"
IMAGE_QUESTION = "Please segment the red star in this image."
VIDEO_QUESTION = "Segment the blue square in this video."
VIDEO_FRAMES = (0, 8, 14, 23)  # it starts, nears the cross, is behind it, has passed it

WIDTH, MARGIN, GAP = 1200, 24, 12  # pixels
HALF = (WIDTH - 3 * MARGIN) // 2
CAPTION_SIZE, QUESTION_SIZE, ANSWER_SIZE = 16, 20, 23
GREY, BLACK = (95, 95, 95), (20, 20, 20)

GROUNDED = re.compile(r"<p>\s*([^<>]*?)\s*</p>\s*\[SEG\]|\[SEG\]")
SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>|</?[A-Za-z_]+>")


class Word(NamedTuple):
    """A piece of an answer that is never broken: a word, or the phrase of a mask.

    Attributes:
        text: what to write.
        object_index: the mask it belongs to, None for plain words.
        glued: no space before it, as before a full stop.
    """

    text: str
    object_index: int | None = None
    glued: bool = False


def words_of(prediction: str) -> list[Word]:
    """Splits an answer; the phrase `<p> ... </p>` of a `[SEG]`, else the `[SEG]` itself, is one word."""
    words, end = [], 0
    for index, match in enumerate(GROUNDED.finditer(prediction)):
        words += _plain_words(prediction[end : match.start()])
        words.append(Word(match[1] or "[SEG]", index))
        end = match.end()
    return words + _plain_words(prediction[end:])


def _plain_words(text: str) -> list[Word]:
    text = SPECIAL_TOKEN.sub("", text)
    return [Word(word, glued=word[0] in ",.;:!?") for word in text.split()]


def draw_words(words: Sequence[Word], width: int, size: int, color: tuple[int, int, int]) -> Image.Image:
    """Writes words in as many lines as they need, those of masks on a tag of the mask's colour.

    Args:
        words: see `words_of`.
        width: of the result, in pixels.
        size: of the letters, in pixels.
        color: of plain words, RGB.

    Returns:
        RGB on white, as high as the text.
    """
    font, pad = ImageFont.load_default(size), size // 4
    line_height, space = round(1.6 * size), size // 3
    canvas = Image.new("RGB", (width, line_height * (len(words) + 1)), "white")
    draw = ImageDraw.Draw(canvas)
    x = y = 0
    for word in words:
        tag = word.object_index is not None
        length = round(draw.textlength(word.text, font=font)) + 2 * pad * tag
        x += 0 if not x else 2 if word.glued else space
        if x + length > width and x:
            x, y = 0, y + line_height
        middle = y + line_height // 2
        if tag:
            background = object_color(word.object_index)
            draw.rounded_rectangle((x, y + 2, x + length, y + line_height - 3), pad, fill=background)
        ink = readable_on(background) if tag else color
        draw.text((x + pad * tag, middle), word.text, font=font, fill=ink, anchor="lm")
        x += length
    return canvas.crop((0, 0, width, y + line_height))


def readable_on(color: tuple[int, int, int]) -> str:
    """The name of the color, black or white, in which words can be read on an RGB color."""
    return "black" if np.dot(color, (0.299, 0.587, 0.114)) > 140 else "white"


def overlay(picture: Image.Image, masks: np.ndarray, width: int, phrases: Sequence[str] | None = None) -> Image.Image:
    """A picture of this width with its masks, bool [N, h, w], drawn after resizing so that lines stay sharp."""
    size = (width, round(picture.height * width / picture.width))
    resized = [np.asarray(Image.fromarray(mask).convert("L").resize(size)) > 127 for mask in masks]
    masks = np.stack(resized) if resized else np.zeros((0, *size[::-1]), dtype=bool)
    return Image.fromarray(draw_overlay(picture.resize(size), masks, phrases))


def beside(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in a row on white, tops aligned."""
    width = sum(picture.width for picture in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, max(picture.height for picture in pictures)), "white")
    x = 0
    for picture in pictures:
        canvas.paste(picture, (x, 0))
        x += picture.width + gap
    return canvas


def below(pictures: Sequence[Image.Image], gap: int) -> Image.Image:
    """Pictures in a column on white, left sides aligned."""
    turned = [picture.transpose(Image.Transpose.TRANSPOSE) for picture in pictures]
    return beside(turned, gap).transpose(Image.Transpose.TRANSPOSE)


def panel(pictures: Image.Image, question: str, prediction: str) -> Image.Image:
    """Pictures with the question and the answer below them."""
    asked = draw_words(_plain_words(question), pictures.width, QUESTION_SIZE, GREY)
    return below([pictures, asked, draw_words(words_of(prediction), pictures.width, ANSWER_SIZE, BLACK)], GAP)


def image_panel(model: Sa2VAChatModel, question: str, *, labels: bool) -> Image.Image:
    """Asks about the sample picture; `labels` writes the phrases into the picture too."""
    ((picture, frame),) = predict(model, open_source(SAMPLES / "shapes.png"), question, {})
    phrases = frame.phrases if labels else None
    return panel(overlay(picture, frame.masks, HALF, phrases), question, frame.prediction)


def video_panel(model: Sa2VAChatModel, question: str) -> Image.Image:
    """Asks about the sample video and shows `VIDEO_FRAMES`."""
    frames = list(predict(model, open_source(SAMPLES / "shapes.mp4"), question, {}))
    width = (WIDTH - 2 * MARGIN - GAP * (len(VIDEO_FRAMES) - 1)) // len(VIDEO_FRAMES)
    shown = []
    for index in VIDEO_FRAMES:
        picture, frame = frames[index]
        caption = draw_words([Word(f"frame {index}")], width, CAPTION_SIZE, GREY)
        shown.append(below([overlay(picture, frame.masks, width), caption], 0))
    return panel(beside(shown, GAP), question, frames[0][1].prediction)


def make_figure(model: Sa2VAChatModel) -> Image.Image:
    """The whole picture, RGB, `WIDTH` pixels wide."""
    top = beside(
        [image_panel(model, IMAGE_QUESTION, labels=False), image_panel(model, CAPTION_QUESTION, labels=True)], MARGIN
    )
    inside = below([top, video_panel(model, VIDEO_QUESTION)], MARGIN)
    canvas = Image.new("RGB", (WIDTH, inside.height + 2 * MARGIN), "white")
    canvas.paste(inside, (MARGIN, MARGIN))
    return canvas


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: writes docs/overview.png, or the file that `--output` names. Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or name of a checkpoint; sa2va-tiny")
    parser.add_argument("--output", type=Path, default=FIGURE, help="default: docs/overview.png")
    arguments = parser.parse_args(argv)
    figure = make_figure(load_model(arguments.model))
    with picture_writer(arguments.output) as write:
        write(np.asarray(figure))
    print(arguments.output)
    return 0


if __name__ == "__main__":
    sys.exit(main())

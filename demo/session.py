"""What one visitor of the browser page has: a picture, a conversation about it, and the masks of every answer.

A `Session` is never changed; each function here takes one and gives a new one, or something to look at or keep:

* `open_session`, `ask`         a file -> session; a question -> the session with the answer, growing frame by frame
* `parse_marks`, `region_masks` points, boxes and brush strokes -> mask prompts
* `stage_html`, `answer_html`   a frame with masks as SVG; an answer with its phrases in the same colours
* `record`, `write_files`       COCO RLE and overlay to be kept

Masks are kept as probabilities in steps of 1/200, so that a threshold can be chosen afterwards without the model.
"""

import base64
import html
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from sa2va import Sa2VAChatModel, Sa2VAFrame
from sa2va.demo.make_figure import GROUNDED, SPECIAL_TOKEN, readable_on
from sa2va.demo.media import Source, open_source, picture_writer, replacing, video_writer
from sa2va.demo.predict import add_frame, check_regions_are_seen, new_record
from sa2va.processing_sa2va import draw_overlay, object_color

LEVELS = 200  # a threshold of n / LEVELS cuts the kept probabilities exactly where it would cut the model's own
MAX_PIXELS = 50_000_000  # of a picture: every mask of an answer takes four bytes for each while it is computed
MAX_MARKS = 16
MARK_KINDS = ("point", "box", "brush")
CANVAS = 512  # pixels along the longer side on which marks are drawn before they become cells
BRUSH = 40  # its width there, and the diameter of a point: about a cell of the released models' 16 x 16
MAX_SHOWN = 1280  # pixels along the longer side of a picture that is sent to the page


class Mark(NamedTuple):
    """What a visitor draws to point at a region.

    Attributes:
        kind: one of `MARK_KINDS`.
        points: (x, y) in pixels of the picture: one, two opposite corners, or those of a stroke.
    """

    kind: str
    points: tuple[tuple[float, float], ...]


@dataclass(frozen=True, eq=False)
class Turn:
    """A question and its answer.

    Attributes:
        question: the words.
        marks: what the question pointed at.
        reading: `num_frames` and `frame_sampling` with which a video was read.
        frames: what `predict_stream` gave so far; their masks are kept as one PNG for each object, uint8 in 0..LEVELS.
    """

    question: str
    marks: tuple[Mark, ...]
    reading: Mapping[str, Any]
    frames: tuple[Sa2VAFrame, ...] = ()

    @property
    def labels(self) -> list[str]:
        """What each object is called on the page: its `<p>` phrase, else its number."""
        found = enumerate(GROUNDED.finditer(self.frames[0].prediction), start=1)
        return [match[1] or f"object {number}" for number, match in found]


@dataclass(frozen=True, eq=False)
class Session:
    """One visitor's picture and conversation.

    Attributes:
        source: image or video; None at first.
        name: of its file, without the suffix.
        length: number of frames.
        size: (width, height).
        turns: the conversation about it.
    """

    source: Source | None = None
    name: str = ""
    length: int = 0
    size: tuple[int, int] = (0, 0)
    turns: tuple[Turn, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether it is about a video."""
        return self.source is not None and self.source.is_video

    def goes_on(self, marks: Sequence[Mark], reading: Mapping[str, Any]) -> bool:
        """Whether a question can follow the last answer: what the model has seen must stay as it was."""
        last = self.turns[-1] if self.turns else Turn("", (), reading)
        return (not last.marks or last.marks == tuple(marks)) and (not self.is_video or last.reading == reading)

    def picture(self, index: int) -> Image.Image:
        """A frame, RGB."""
        return self.source.frames.select([index])[0] if self.is_video else self.source.frames[0]

    def frame(self, number: int, index: int, threshold: float) -> Sa2VAFrame:
        """What turn `number` found in a frame, with masks bool [objects, h, w] of the pixels above `threshold`."""
        frame = self.turns[number].frames[index]
        maps = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in frame.masks]
        levels = np.stack(maps) if maps else np.zeros((0, *self.size[::-1]), np.uint8)
        return replace(frame, masks=levels > round(threshold * LEVELS))


def open_session(path: str, max_frames: int) -> Session:
    """Begins a conversation about a file.

    Raises:
        ValueError, OSError: it is neither an image nor a video, damaged, too large or too long.
    """
    source = open_source(path)
    length = source.frames.count(max_frames + 1) if source.is_video else 1
    if length > max_frames:
        raise ValueError(f"The video has more than {max_frames} frames. Cut it, or lower its frame rate.")
    session = Session(source, Path(path).stem, length)
    width, height = session.picture(0).size
    if width * height > MAX_PIXELS:
        raise ValueError(f"The picture is {width} x {height}; at most {MAX_PIXELS} pixels are accepted. Resize it.")
    return replace(session, size=(width, height))


def ask(
    model: Sa2VAChatModel,
    session: Session,
    question: str,
    reading: Mapping[str, Any],
    marks: Sequence[Mark] = (),
    past_text: str | None = None,
    **generate_kwargs: Any,
) -> Iterator[Session]:
    """Asks about the session's picture, in the conversation if it `goes_on`, else in a new one.

    Args:
        model: see `predict.load_model`.
        session: with a source.
        question: the words.
        reading: `num_frames` and `frame_sampling` of `predict_forward`.
        marks: regions that the question calls region1, region2...; on a video they lie in frame 0.
        past_text: of a conversation that the session doesn't hold.
        **generate_kwargs: as for `predict_forward`.

    Yields:
        The session with one more turn, when the words and a first frame are there and again after every frame more.
        An answer that points at nothing needs no more frames.

    Raises:
        ValueError, TypeError, OSError: the question or the marks can't be used.
    """
    turns = session.turns if session.goes_on(marks, reading) else ()
    if past_text is None:
        past_text = turns[-1].frames[0].past_text if turns else ""
    if marks and session.is_video:
        check_regions_are_seen(reading.get("frame_sampling"))
    regions = region_masks(marks, session.size, model.load_processor().region_grid) if marks else None
    given = {"video": session.source.frames} if session.is_video else {"image": session.source.frames[0]}
    asked = {"text": question, "past_text": past_text, "mask_prompts": regions, "return_raw_masks": True}
    turn = Turn(question, tuple(marks), reading)
    for frame in model.predict_stream(**given, **asked, **reading, **generate_kwargs):
        kept = replace(frame, masks=[_encode(probabilities) for probabilities in frame.masks])
        turn = replace(turn, frames=(*turn.frames, kept))
        yield replace(session, turns=(*turns, turn))
        if not frame.phrases:
            return


def _encode(probabilities: np.ndarray) -> bytes:
    """float32 [h, w] -> PNG of levels. p > n / LEVELS where ceil(p * LEVELS) > n: in float64 no rounding disturbs."""
    levels = np.ceil(probabilities.astype(np.float64) * LEVELS).astype(np.uint8)
    return cv2.imencode(".png", levels)[1].tobytes()


def parse_marks(value: Any) -> tuple[Mark, ...]:
    """Marks as a page or a program sends them: [{"kind": "box", "points": [[x, y], [x, y]]}, ...], or None.

    Raises:
        ValueError: something else, or more than `MAX_MARKS`.
    """
    try:
        marks = tuple(Mark(one["kind"], tuple((float(x), float(y)) for x, y in one["points"])) for one in value or ())
        most = {"point": 1, "box": 2, "brush": math.inf}
        usable = all(0 < len(points) <= most[kind] and np.isfinite(points).all() for kind, points in marks)
    except (TypeError, ValueError, KeyError, OverflowError):
        marks, usable = (), False
    if not usable or len(marks) > MAX_MARKS:
        raise ValueError(
            f'Marks are a list of at most {MAX_MARKS} {{"kind": one of {MARK_KINDS}, "points": [[x, y], ...]}}, a '
            f"point of one, a box of two; got {value!r:.100}."
        )
    return marks


def region_masks(marks: Sequence[Mark], size: tuple[int, int], grid: int) -> np.ndarray:
    """Marks -> mask prompts, each with at least one cell inside.

    A point stands for a disk, a box for all that is in it. SAM 2 could cut an object out around them first, but Sa2VA
    trains its mask decoder on language prompts only, and of a region it sees no more than the cells.

    Args:
        marks: see `Mark`.
        size: (width, height) of the picture.
        grid: cells along a side, `Sa2VAProcessor.region_grid`.

    Returns:
        bool [marks, grid, grid]: the cells that are covered at least by half, or else the most covered ones.

    Raises:
        ValueError: a mark lies beside the picture.
    """
    scale = CANVAS / max(size)
    width, height = (math.ceil(side * scale) for side in size)
    regions = []
    for mark in marks:
        low, high = np.min(mark.points, axis=0), np.max(mark.points, axis=0)
        if (high < 0).any() or (low > size).any():
            raise ValueError(f"{mark.kind} {mark.points} lies beside the picture of {size[0]}x{size[1]} pixels.")
        canvas = np.zeros((height, width), dtype=np.float32)
        points = np.clip(np.array(mark.points) * scale, 0, (width - 1, height - 1)).astype(np.int32)
        if mark.kind == "box":
            cv2.rectangle(canvas, points[0].tolist(), points[-1].tolist(), 1.0, cv2.FILLED)
        elif mark.kind == "point":
            cv2.circle(canvas, points[0].tolist(), BRUSH // 2, 1.0, cv2.FILLED)
        else:
            stroke = points[[0, *range(len(points))]]  # of a single point OpenCV draws nothing
            cv2.polylines(canvas, [stroke], False, 1.0, BRUSH)
        coverage = cv2.resize(canvas, (grid, grid), interpolation=cv2.INTER_AREA)
        regions.append(coverage >= min(0.5, coverage.max()))
    return np.stack(regions)


# ------------------------------------------------------------------------------------------------- to be looked at


def css_color(index: int) -> str:
    """`object_color` as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*object_color(index))


def answer_html(turn: Turn, number: int) -> str:
    """The answer without special tokens, its phrases in `<mark>`; Markdown. `number` is that of the turn."""
    prediction = turn.frames[0].prediction
    pieces, end = [], 0
    for index, (match, label) in enumerate(zip(GROUNDED.finditer(prediction), turn.labels, strict=True)):
        style = f"background: {css_color(index)}; color: {readable_on(object_color(index))}"
        mark = f'<mark class="{_class(number, index)}" style="{style}">{html.escape(label)}</mark>'
        pieces += [_plain(prediction[end : match.start()]), mark]
        end = match.end()
    return "".join([*pieces, _plain(prediction[end:])]).strip()


def _plain(text: str) -> str:
    return html.escape(re.sub(r" +(?=[,.;:!?])", "", SPECIAL_TOKEN.sub("", text)), quote=False)


def _class(number: int, index: int) -> str:
    """CSS class that the mask and the phrase of an object share."""
    return f"turn{number}-object{index}"


def stage_html(
    session: Session,
    index: int,
    number: int,
    threshold: float,
    shown: Collection[int],
    picture: Image.Image | None = None,
) -> str:
    """A frame with its masks: SVG whose unit is a pixel of the picture, and CSS that links masks and phrases.

    Args:
        session: with a source.
        index: of the frame.
        number: of the turn whose masks are shown; none are if it doesn't exist or hasn't come to this frame.
        threshold: probability above which a pixel belongs to an object.
        shown: indices of the objects that are not hidden.
        picture: the frame, where it is at hand: a video is read from its beginning for it.
    """
    picture = session.picture(index) if picture is None else picture
    width, height = session.size
    shapes, rules = [], []
    if number < len(session.turns) and index < len(session.turns[number].frames):
        masks, labels = session.frame(number, index, threshold).masks, session.turns[number].labels
        for i in sorted(shown, key=lambda i: -int(masks[i].sum())):  # small ones on top, where the pointer reaches them
            name, color, title = _class(number, i), css_color(i), f"<title>{html.escape(labels[i])}</title>"
            shapes.append(
                f'<path class="mask {name}" d="{_outline(masks[i])}" fill="{color}" stroke="{color}">{title}</path>'
            )
            hover = f"body:has(.{name}:hover)"
            rules.append(f"{hover} .mask:not(.{name}) {{ opacity: 0 }} {hover} mark.{name} {{ outline: 2px solid }}")
    image = f'<image href="{_data_url(picture)}" width="{width}" height="{height}"/>'
    drawn = "".join([image, *shapes, '<g class="marks"></g>'])
    svg = f'<svg viewBox="0 0 {width} {height}" data-frame="{index}">{drawn}</svg>'
    return f"{svg}<style>{' '.join(rules)}</style>"


def _outline(mask: np.ndarray) -> str:
    """SVG path around the pixels of a mask, bool [h, w], and around its holes."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    corners = ("L".join(f"{x + 0.5} {y + 0.5}" for x, y in contour[:, 0].tolist()) for contour in contours)
    return "".join(f"M{path}Z" for path in corners)


def _data_url(picture: Image.Image) -> str:
    shown = picture.copy()
    shown.thumbnail((MAX_SHOWN, MAX_SHOWN))
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(np.asarray(shown), cv2.COLOR_RGB2BGR))[1]
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


# ------------------------------------------------------------------------------------------------------- to be kept


def record(session: Session, number: int, threshold: float) -> dict[str, Any]:
    """A turn as `predict.py` writes it: the answer, and scores, areas and COCO RLE of every object in every frame."""
    turn = session.turns[number]
    output = new_record(turn.question, session.frame(number, 0, threshold), session.source)
    for index in range(len(turn.frames)):
        add_frame(output["objects"], session.frame(number, index, threshold))
    return output


def write_files(
    session: Session, number: int, threshold: float, shown: Collection[int], folder: Path
) -> tuple[Path | None, Path]:
    """Writes NAME-image.png or NAME-video.mp4 with the objects that are shown, and NAME-....json with all of them.

    Returns:
        Paths of the overlay, None if the answer points at nothing, and of the JSON file.

    Raises:
        OSError: a file can't be written.
    """
    turn, output = session.turns[number], record(session, number, threshold)
    overlay = folder / f"{session.name}-{'video.mp4' if session.is_video else 'image.png'}"
    if turn.labels:
        size = session.size[::-1]
        writer = video_writer(overlay, size, session.source.fps) if session.is_video else picture_writer(overlay)
        with writer as write:
            for index, picture in zip(range(len(turn.frames)), session.source.frames, strict=False):
                masks = session.frame(number, index, threshold).masks
                masks[[i for i in range(len(masks)) if i not in shown]] = False
                write(draw_overlay(picture, masks, turn.labels))
        output["overlay"] = overlay.name
    with replacing(overlay.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(output) + "\n", encoding="utf-8")
    return (overlay if turn.labels else None), overlay.with_suffix(".json")

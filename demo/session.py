"""What one visitor of the browser page has: a picture, a conversation about it, and the masks of every answer.

A `Session` is never changed; each function here takes one and gives a new one, or something to look at or keep:

* `open_session`, `ask`    a file -> session; a question -> the session with the answer, growing frame by frame
* `region_masks`           points, boxes and brush strokes -> mask prompts
* `stage_html`, `answer_html`   picture with masks as SVG, answer with its phrases in the same colours
* `record`, `write_files`  COCO RLE and overlay for the visitor to keep

Masks are kept as probabilities in 200 steps, so that a threshold can be chosen afterwards without the model.
"""

import base64
import html
import json
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from PIL import Image

from sa2va import Sa2VAChatModel, Sa2VAFrame
from sa2va.demo.make_figure import GROUNDED, SPECIAL_TOKEN, readable_on
from sa2va.demo.media import Source, open_source, picture_writer, replacing, video_writer
from sa2va.demo.predict import add_frame, new_record
from sa2va.processing_sa2va import draw_overlay, object_color

LEVELS = 200  # a threshold of n / LEVELS cuts the kept probabilities exactly where it would cut the model's own
MARK_KINDS = ("point", "box", "brush")
MAX_MARKS = 16
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


@dataclass(frozen=True)
class Limits:
    """What a visitor may bring.

    Attributes:
        frames: of a video.
        pixels: of a picture or of each frame.
    """

    frames: int = 300
    pixels: int = 50_000_000


@dataclass(frozen=True)
class Reading:
    """How the model reads a video: `num_frames` and `frame_sampling` of `predict_forward`."""

    num_frames: int
    frame_sampling: str | tuple[int, ...] = "first"


@dataclass(frozen=True, eq=False)
class Turn:
    """A question and its answer.

    Attributes:
        question, prediction, past_text, phrases: as in `Sa2VAOutput`.
        marks, reading: what the question pointed at, and how the picture was read.
        size: (h, w) of the masks.
        maps: for each frame so far, for each object its probabilities: uint8 [h, w] in 0..LEVELS, as PNG.
        scores: for each frame so far, `Sa2VAFrame.mask_scores`.
    """

    question: str
    prediction: str
    past_text: str
    phrases: list[str]
    marks: tuple[Mark, ...]
    reading: Reading
    size: tuple[int, int] = (0, 0)
    maps: tuple[tuple[bytes, ...], ...] = ()
    scores: tuple[dict[str, np.ndarray], ...] = ()

    def frame(self, index: int, threshold: float) -> Sa2VAFrame:
        """The answer in a frame, with masks bool [objects, h, w] of the pixels above `threshold`."""
        maps = [cv2.imdecode(np.frombuffer(png, np.uint8), cv2.IMREAD_GRAYSCALE) for png in self.maps[index]]
        masks = np.stack(maps) > round(threshold * LEVELS) if maps else np.zeros((0, *self.size), dtype=bool)
        return Sa2VAFrame(index, self.prediction, self.past_text, self.phrases, masks, self.scores[index])

    @property
    def labels(self) -> list[str]:
        """What each object is called on the page: its `<p>` phrase, else its number."""
        phrases = [match[1] for match in GROUNDED.finditer(self.prediction)]
        return [phrase or f"object {number}" for number, phrase in enumerate(phrases, start=1)]


@dataclass(frozen=True, eq=False)
class Session:
    """One visitor's picture and conversation.

    Attributes:
        source: the picture or video; None for a chat without one.
        name: of its file, without the suffix.
        length: number of frames.
        turns: the conversation about it.
    """

    source: Source | None = None
    name: str = ""
    length: int = 0
    turns: tuple[Turn, ...] = ()

    @property
    def is_video(self) -> bool:
        """Whether it is about a video."""
        return self.source is not None and self.source.is_video

    def goes_on(self, marks: Sequence[Mark], reading: Reading) -> bool:
        """Whether the next question can follow the last answer: what the model has seen must stay as it was."""
        if not self.turns:
            return False
        last = self.turns[-1]
        return (not last.marks or last.marks == tuple(marks)) and (not self.is_video or last.reading == reading)

    def picture(self, index: int) -> Image.Image:
        """A frame of the source, RGB."""
        frames = self.source.frames
        return frames.select([index])[0] if self.is_video else frames[0]


def open_session(path: str, limits: Limits) -> Session:
    """Begins a conversation about a file.

    Raises:
        ValueError, OSError: it is neither an image nor a video, damaged, too large or too long.
    """
    source = open_source(path)
    length = source.frames.count(limits.frames + 1) if source.is_video else 1
    if length > limits.frames:
        raise ValueError(f"The video has more than {limits.frames} frames. Cut it, or lower its frame rate.")
    session = Session(source, Path(path).stem, length)
    width, height = session.picture(0).size
    if width * height > limits.pixels:
        raise ValueError(f"The picture is {width} x {height}; at most {limits.pixels} pixels are accepted. Resize it.")
    return session


def ask(
    model: Sa2VAChatModel,
    session: Session,
    question: str,
    reading: Reading,
    marks: Sequence[Mark] = (),
    past_text: str | None = None,
    **generate_kwargs: Any,
) -> Iterator[Session]:
    """Asks about the session's picture, in the conversation if it `goes_on`, else in a new one.

    Args:
        model: see `predict.load_model`.
        session: it stays as it is.
        question: the words.
        reading: only a video needs it.
        marks: regions that the question calls region1, region2...; on a video they lie in its first key frame.
        past_text: of a conversation that the session doesn't hold.
        **generate_kwargs: as for `predict_forward`.

    Yields:
        The session with one more turn: when the words are there and a first frame has masks, and again for every
        frame more. An answer that points at nothing needs no further frames.

    Raises:
        ValueError, TypeError, OSError: the question or the marks can't be used.
    """
    turns = session.turns if session.goes_on(marks, reading) else ()
    if past_text is None:
        past_text = turns[-1].past_text if turns else ""
    asked = {"text": question, "past_text": past_text, **generate_kwargs}
    if session.source is None:
        out = model.predict_forward(**asked)
        yield replace(session, turns=(*turns, Turn(question, out.prediction, out.past_text, [], (), reading)))
        return
    asked |= {"return_raw_masks": True, "num_frames": reading.num_frames, "frame_sampling": reading.frame_sampling}
    if marks:
        grid = model.load_processor().region_grid
        asked["mask_prompts"] = region_masks(marks, session.picture(0).size, grid)
    given = {"video": session.source.frames} if session.is_video else {"image": session.source.frames[0]}
    turn = None
    for frame in model.predict_stream(**given, **asked):
        if turn is None:
            answer = (question, frame.prediction, frame.past_text, frame.phrases)
            turn = Turn(*answer, tuple(marks), reading, frame.masks.shape[1:])
        maps = tuple(_encode(probabilities) for probabilities in frame.masks)
        turn = replace(turn, maps=(*turn.maps, maps), scores=(*turn.scores, frame.mask_scores))
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
        marks = tuple(Mark(mark["kind"], tuple((float(x), float(y)) for x, y in mark["points"])) for mark in value or ())
    except (TypeError, ValueError, KeyError) as error:
        raise ValueError(f'Marks are a list of {{"kind": ..., "points": [[x, y], ...]}}; got {value!r:.100}.') from error
    if len(marks) > MAX_MARKS:
        raise ValueError(f"{len(marks)} marks are too many; at most {MAX_MARKS} are accepted.")
    for mark in marks:
        if mark.kind not in MARK_KINDS or not mark.points or not np.isfinite(mark.points).all():
            raise ValueError(f"A mark is one of {MARK_KINDS} with at least one point of two numbers; got {mark!r:.100}.")
    return marks


def region_masks(marks: Sequence[Mark], size: tuple[int, int], grid: int) -> np.ndarray:
    """Marks -> mask prompts, each with at least one cell inside.

    A point stands for a disk and a box for all that is in it: the model was trained on masks as region prompts, of
    which it sees only the cells, and its SAM 2 on language prompts only, so that it can't cut an object out around a
    point first.

    Args:
        marks: see `Mark`.
        size: (width, height) of the picture.
        grid: cells along a side, `Sa2VAProcessor.region_grid`.

    Returns:
        bool [marks, grid, grid]: the cells of which at least half is covered, or else the most covered ones.
    """
    scale = CANVAS / max(size)
    width, height = (math.ceil(side * scale) for side in size)
    regions = []
    for mark in marks:
        canvas = np.zeros((height, width), dtype=np.float32)
        _draw(canvas, mark.kind, np.clip(np.array(mark.points) * scale, 0, (width - 1, height - 1)).astype(np.int32))
        coverage = cv2.resize(canvas, (grid, grid), interpolation=cv2.INTER_AREA)
        regions.append(coverage >= min(0.5, coverage.max()))
    return np.stack(regions)


def _draw(canvas: np.ndarray, kind: str, points: np.ndarray) -> None:
    """Fills a mark, int32 points [n, 2], with ones."""
    if kind == "box":
        cv2.rectangle(canvas, points[0].tolist(), points[-1].tolist(), 1.0, cv2.FILLED)
    elif kind == "point":
        cv2.circle(canvas, points[0].tolist(), BRUSH // 2, 1.0, cv2.FILLED)
    else:
        cv2.polylines(canvas, [points], False, 1.0, BRUSH)


# ------------------------------------------------------------------------------------------------- to be looked at


def object_class(turn: int, index: int) -> str:
    """CSS class that the mask and the phrase of an object share."""
    return f"turn{turn}-object{index}"


def css_color(index: int) -> str:
    """`object_color` as CSS writes it."""
    return "#{:02x}{:02x}{:02x}".format(*object_color(index))


def answer_html(turn: Turn, number: int) -> str:
    """An answer without special tokens, Markdown with its phrases in `<mark>`; `number` is that of the turn."""
    pieces, end = [], 0
    for index, (match, label) in enumerate(zip(GROUNDED.finditer(turn.prediction), turn.labels, strict=True)):
        color, ink = css_color(index), readable_on(object_color(index))
        mark = f'<mark class="{object_class(number, index)}" style="background: {color}; color: {ink}">'
        pieces += [_plain(turn.prediction[end : match.start()]), f"{mark}{html.escape(label)}</mark>"]
        end = match.end()
    return "".join([*pieces, _plain(turn.prediction[end:])]).strip()


def _plain(text: str) -> str:
    return html.escape(SPECIAL_TOKEN.sub("", text), quote=False)


def stage_html(session: Session, index: int, number: int, threshold: float, shown: Collection[int]) -> str:
    """A frame with its masks: SVG whose unit is a pixel of the picture, and CSS that links masks and phrases.

    Args:
        session: with a source.
        index: of the frame.
        number: of the turn whose masks are shown; without such a turn, or before it reaches the frame, none are.
        threshold: probability above which a pixel belongs to an object.
        shown: indices of the objects that are not hidden.
    """
    picture = session.picture(index)
    width, height = picture.size
    shapes, rules = [], []
    if number < len(session.turns) and index < len(session.turns[number].maps):
        turn = session.turns[number]
        masks = turn.frame(index, threshold).masks
        # small objects on top, where the pointer reaches them
        for i in sorted(shown, key=lambda i: -int(masks[i].sum())):
            name, color = object_class(number, i), css_color(i)
            outline, label = _outline(masks[i]), html.escape(turn.labels[i])
            path = f'<path class="mask {name}" d="{outline}" fill="{color}" stroke="{color}" fill-rule="evenodd">'
            shapes.append(f"{path}<title>{label}</title></path>")
            rules.append(
                f"body:has(.{name}:hover) .mask:not(.{name}) {{ opacity: 0 }} "
                f"body:has(.{name}:hover) mark.{name} {{ outline: 2px solid }}"
            )
    image = f'<image href="{_data_url(picture)}" width="{width}" height="{height}"/>'
    view = f'<svg viewBox="0 0 {width} {height}" data-frame="{index}">{image}{"".join(shapes)}<g class="marks"></g></svg>'
    return f"{view}<style>{' '.join(rules)}</style>"


def _outline(mask: np.ndarray) -> str:
    """SVG path around the pixels of a mask, bool [h, w], with its holes."""
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    return "".join(
        "M" + "L".join(f"{x + 0.5:g} {y + 0.5:g}" for x, y in contour[:, 0].tolist()) + "Z" for contour in contours
    )


def _data_url(picture: Image.Image) -> str:
    shown = picture.copy()
    shown.thumbnail((MAX_SHOWN, MAX_SHOWN))
    jpeg = cv2.imencode(".jpg", cv2.cvtColor(np.asarray(shown), cv2.COLOR_RGB2BGR))[1]
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}"


# ------------------------------------------------------------------------------------------------------- to be kept


def record(session: Session, number: int, threshold: float) -> dict[str, Any]:
    """A turn as `predict.py` writes it: the answer and for every object scores, areas and COCO RLE of every frame."""
    turn = session.turns[number]
    if not turn.maps:
        return {"question": turn.question, "prediction": turn.prediction, "phrases": [], "objects": []}
    output = new_record(turn.question, turn.frame(0, threshold), session.source)
    for index in range(len(turn.maps)):
        add_frame(output["objects"], turn.frame(index, threshold))
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
    path = folder / f"{session.name or 'chat'}-{'video.mp4' if session.is_video else 'image.png'}"
    if turn.phrases:
        writer = video_writer(path, turn.size, session.source.fps) if session.is_video else picture_writer(path)
        with writer as write:
            for index, picture in zip(range(len(turn.maps)), session.source.frames, strict=False):
                masks = turn.frame(index, threshold).masks
                masks[[i for i in range(len(masks)) if i not in shown]] = False
                write(draw_overlay(picture, masks, turn.labels))
        output["overlay"] = path.name
    with replacing(path.with_suffix(".json")) as temporary:
        temporary.write_text(json.dumps(output) + "\n", encoding="utf-8")
    return (path if turn.phrases else None), path.with_suffix(".json")

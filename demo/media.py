"""What the demo reads and writes: an image or a video in, an overlay out.

* `open_source` decides what a path holds and opens it
* `picture_writer`, `video_writer` write an overlay as it is made; no half-written file ever bears the final name
* `write_json` writes a report, `append_lines` and `finished_lines` records of work that may be stopped, a line each
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from sa2va.processing_sa2va import CORRUPT_FILE_ERRORS, VideoFrames, load_image, open_video

DEFAULT_FPS = 8.0  # where the source says nothing
ANIMATIONS = frozenset({".gif", ".webp", ".apng"})
STREAMS = frozenset({".mjpeg", ".mjpg", ".m1v", ".m2v", ".mpv"})  # bare ones, which Pillow takes for single pictures
# H.264 plays everywhere, but OpenCV's Linux wheels hold no encoder for it; VP9 plays in browsers, VLC, mpv and
# Windows; the last, MPEG-4 part 2, is always there but browsers refuse it.
CODECS = ("avc1", "vp09", "mp4v")


@dataclass(frozen=True)
class Source:
    """An opened image or video.

    Attributes:
        frames: RGB pictures; an image is the only one. A video is read anew by every iteration, frame by frame.
        fps: frames per second of a video; None for an image.
        length: number of frames as far as the file says so (a video's header can be wrong); None if it doesn't.
    """

    frames: VideoFrames | list[Image.Image]
    fps: float | None = None
    length: int | None = None

    @property
    def is_video(self) -> bool:
        """Whether it is a video."""
        return self.fps is not None


def open_source(path: str | os.PathLike) -> Source:
    """Opens an image or a video; which of them is decided by what the file holds.

    Args:
        path: a picture that Pillow reads, a video that OpenCV reads, an animated gif, webp or apng, or a folder with
            one picture for each frame. "~" is the home folder.

    Raises:
        FileNotFoundError: no such path.
        ValueError: neither an image nor a video, or an empty one.
        OSError: a damaged image.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise FileNotFoundError(f"There is no file or folder {str(path)!r}. Give a local path (no URL).")
    if not _is_video(path):
        return Source([load_image(path)], length=1)
    try:
        with _silent_opencv():
            frames = open_video(path)
    except ValueError as error:
        if path.is_dir():
            raise
        raise ValueError(
            f"{str(path)!r} is neither an image that Pillow reads nor a video that OpenCV reads. Convert it, for "
            "instance to png or mp4."
        ) from error
    return Source(frames, *_timing(path, frames))


def _is_video(path: Path) -> bool:
    """Folders, animations and all files that are no picture to Pillow."""
    if path.is_dir() or path.suffix.lower() in STREAMS:
        return True
    try:
        with Image.open(path) as picture:
            # phones write photos of several pictures (mpo) too: those are no animations
            return path.suffix.lower() in ANIMATIONS and getattr(picture, "is_animated", False)
    except Image.DecompressionBombError:
        return False  # load_image tells what to do
    except UnidentifiedImageError:
        return True
    except CORRUPT_FILE_ERRORS:  # found in counting its frames: those that can be read are shown
        return path.suffix.lower() in ANIMATIONS


def _timing(path: Path, frames: VideoFrames) -> tuple[float, int | None]:
    """Frames per second and, if known without reading the whole video, their number."""
    if path.is_dir():
        return DEFAULT_FPS, len(frames)
    if path.suffix.lower() in ANIMATIONS:
        with Image.open(path) as animation:
            try:
                animation.load()
                length = getattr(animation, "n_frames", None)
            except CORRUPT_FILE_ERRORS:
                length = None
            milliseconds = animation.info.get("duration")
            return _plausible(1000 / milliseconds if milliseconds else 0), length
    import cv2

    capture = cv2.VideoCapture(os.path.abspath(path))  # a colon in a relative name would begin an address
    try:
        length = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
        return _plausible(capture.get(cv2.CAP_PROP_FPS)), length if length > 0 else None
    finally:
        capture.release()


def _plausible(fps: float) -> float:
    """Two decimals, because MPEG-4 can't count finer; the default for what no camera does (0, NaN, 90000)."""
    return round(fps, 2) if 0.01 <= fps <= 480 else DEFAULT_FPS


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a temporary path beside `path`, which takes its place at the end and vanishes after an error.

    Folders are made as needed.

    Raises:
        OSError: the folder can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}-{secrets.token_hex(4)}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any, **options: Any) -> None:
    """Writes JSON into a file, which takes the place of an older one once it is whole; folders are made as needed.

    Args:
        path: the file.
        content: what JSON can say.
        **options: of `json.dumps`; by default it indents by 2.

    Raises:
        OSError: the folder can't be written to.
        TypeError, ValueError: `json.dumps` can't write it.
    """
    text = json.dumps(content, **{"indent": 2, **options}) + "\n"
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def finished_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Each line of a file with the byte where it begins; a last one that a stop left unfinished is none.

    Raises:
        OSError: no such file, or it can't be read.
    """
    start = 0
    with path.open("rb") as file:
        for line in file:
            if line.endswith(b"\n"):
                yield start, line
            start += len(line)


def append_lines(path: Path) -> TextIO:
    """The file, opened in UTF-8 for more lines behind its finished ones; folders are made as needed.

    Raises:
        OSError: it can't be written to.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a", encoding="utf-8")
    os.truncate(path, sum(len(line) for _, line in finished_lines(path)))
    return file


@contextmanager
def picture_writer(path: Path) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that writes one picture, uint8 [h, w, 3] RGB; the suffix of `path` says the format."""
    with replacing(path) as temporary:
        yield lambda pixels: Image.fromarray(pixels).save(temporary)


@contextmanager
def video_writer(path: Path, size: tuple[int, int], fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Gives a function that adds a frame, uint8 [h, w, 3] RGB, to an MP4.

    Encoders want even sides, so an odd one grows by a copy of its last row or column.

    Args:
        path: file to be written.
        size: (h, w) of all frames.
        fps: frames per second.

    Raises:
        OSError: OpenCV can't encode MP4 here, or can't write the file.
    """
    import cv2

    more = [(0, side % 2) for side in size]
    with replacing(path) as temporary:
        encoder = _open_encoder(temporary, (size[1] + more[1][1], size[0] + more[0][1]), fps)

        def write(frame: np.ndarray) -> None:
            padded = np.pad(frame, (*more, (0, 0)), mode="edge")
            encoder.write(cv2.cvtColor(padded, cv2.COLOR_RGB2BGR))

        try:
            yield write
        finally:
            encoder.release()
        _check_readable(temporary, path)


def _open_encoder(path: Path, size: tuple[int, int], fps: float) -> Any:
    """A cv2.VideoWriter for frames of `size` (width, height), with the first codec that works."""
    import cv2

    with _silent_opencv():
        for codec in CODECS:
            writer = cv2.VideoWriter(os.path.abspath(path), cv2.VideoWriter_fourcc(*codec), fps, size)
            if writer.isOpened():
                return writer
            writer.release()
    raise OSError(
        f"OpenCV can't write {size[0]}x{size[1]} MP4 to {str(path.parent)!r}: it lacks an encoder (tried "
        f"{', '.join(CODECS)}) or may not write there."
    )


def _check_readable(written: Path, path: Path) -> None:
    """OpenCV doesn't say when writing fails (a full disk); but then the file has no end and can't be opened."""
    import cv2

    with _silent_opencv():
        capture = cv2.VideoCapture(os.path.abspath(written))
        readable = capture.isOpened()
        capture.release()
    if not readable:
        raise OSError(f"{str(path)!r} could not be written to its end. Is the disk full?")


@contextmanager
def _silent_opencv() -> Iterator[None]:
    """Hides what OpenCV prints while formats and encoders are tried out; errors are raised instead."""
    import cv2

    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "8")  # fatal only; read once, when OpenCV first opens a video
    logging = getattr(cv2.utils, "logging", cv2)  # OpenCV 5 moved it there
    level = logging.setLogLevel(0)
    try:
        yield
    finally:
        logging.setLogLevel(level)

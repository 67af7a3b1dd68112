"""What a user has -> what Sa2VA reads; what Sa2VA predicts -> what a user keeps.

* `load_image`     a picture of any kind -> RGB
* `open_video`     a video of any kind -> `VideoFrames`, decoded one at a time; `select_key_frames` picks some
* `ReadAhead`      the next frames are read while a model looks at this one
* `Sa2VAProcessor` picture + words -> `Sa2VAInputs`; frames -> SAM 2's input; logits -> masks; answer -> phrases
* `InternLM2Tokenizer` the tokenizer that Sa2VA-8B and -26B ship as a SentencePiece model
* `prepare_samples`, `collate_inputs`: several calls, one by one and as one batch
* `masks_to_rle`, `rle_to_masks`, `draw_overlay`: masks for files and for eyes

Tiling follows InternVL 1.5 (arXiv 2404.16821, "dynamic high resolution"); prompts and SAM 2's input follow
the released Sa2VA (arXiv 2501.04001).
"""

import colorsys
import inspect
import io
import itertools
import json
import math
import os
import re
import secrets
import struct
import tempfile
import zlib
from bisect import bisect_left
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache, partial
from operator import index as as_index
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub.errors import HFValidationError
from PIL import ExifTags, Image, ImageDraw, ImageFont, ImageOps, ImageSequence
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoTokenizer, BatchFeature, ProcessorMixin, TokenizersBackend
from transformers.utils import CONFIG_NAME, logging

from .configuration_sa2va import (
    FRAME_SAMPLINGS,
    Sa2VAChatConfig,
    Sa2VAInternLM2Config,
    blaming,
    copy_code,
    hub_arguments_in,
)

logger = logging.get_logger(f"transformers.{__name__}")  # so that transformers' verbosity holds for it

MAX_REGIONS = 1000  # each adds up to a tile's tokens
MAX_IMAGE_PIXELS = 178_956_970  # where Pillow stops too: a guard against decompression bombs
MAX_FRAME_NUMBER, MAX_KEY_FRAMES = 2**31, 10**6
MAX_SIDE = 2**13  # of a tile or of SAM 2's input
IMAGE_MEAN, IMAGE_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet, RGB in [0, 1]
IMAGE_TAG, SEG_TOKEN = "<image>", "[SEG]"
IMAGE_START, IMAGE_TOKEN, IMAGE_END = "<img>", "<IMG_CONTEXT>", "</img>"
REGION_START, REGION_END = "<vp>", "</vp>"

_ACCEPTED_IMAGES = "a PIL image, a path, or an array or tensor (HxW, HxWxC, CxHxW; uint8, bool, or float in [0, 1])"
_ACCEPTED_VIDEOS = (
    "images in a list or any iterable, a TxHxWxC or TxCxHxW array, or a path to a video or folder of frames"
)
_TO_COME = object()  # in place of a picture, in messages that are written down before it is given
_EXAMPLE_PARTS = '{"type": "text", "text": "Hi"} or {"type": "image", "image": "a.png"}'
_TEMPLATE_ARGUMENTS = ("chat_template", "tools", "documents", "continue_final_message", "return_assistant_tokens_mask")
_EMPTY_VIDEO = f"The video is empty. Give {_ACCEPTED_VIDEOS}, with at least one frame."
CORRUPT_FILE_ERRORS = (  # what Pillow's decoders raise
    *(OSError, SyntaxError, ValueError, EOFError, struct.error, zlib.error, Image.DecompressionBombError),
    *(AssertionError, IndexError, KeyError, TypeError, OverflowError, NotImplementedError),
    AttributeError,  # older ones, of a file that was closed
)
_PICTURE_SUFFIXES = {  # of files that Pillow reads; some hold several frames
    *(".jpg", ".jpeg", ".jfif", ".jp2", ".png", ".apng", ".bmp", ".ppm", ".pgm"),
    *(".gif", ".webp", ".avif", ".tif", ".tiff"),
}
_SLACK = 0.0019  # of a range, under half a grey level: bicubic resizing and undone normalisation miss its ends by less
_MOST_BROKEN = 10_000  # frames in a row that can't be decoded, after which a file counts as cut off
_FAILURES_AT_END = 64  # the same where the header tells no number of frames, or too low a one
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


# ---------------------------------------------------------------------------------------------------------- images


def load_image(image: Any, *, max_pixels: int = MAX_IMAGE_PIXELS) -> Image.Image:
    """Turns a picture of any kind into a new RGB PIL image, of the size and orientation in which a viewer shows it.

    Transparency is laid over white. An EXIF orientation is applied, so masks fit the upright picture. Greys of more
    than 8 bits are scaled. Arrays hold RGB, not BGR; their channels are the first or last axis, whichever has length
    3, else 4, else 1.

    Args:
        image: PIL image of any mode, path ("~" allowed), numpy array, torch tensor or decord's array: [H, W],
            [H, W, C] or [C, H, W] with C in 1, 3, 4; uint8 in 0..255, bool, or float in [0, 1].
        max_pixels: largest accepted width * height, checked before anything is decoded.

    Raises:
        TypeError: none of these types, or an array of another dtype.
        ValueError: too many or no pixels, an array of ambiguous or wrong shape, NaN, floats outside [0, 1] by more than
            half a grey level.
        OSError: the file is missing (FileNotFoundError) or is no readable image.
    """
    if isinstance(image, str | os.PathLike):
        return _load_file(_existing_path(image, "image"), max_pixels)
    if isinstance(image, Image.Image):
        return _opened_to_rgb(image, max_pixels, partial(_unreadable, image))
    if hasattr(image, "asnumpy"):  # decord's; what its bridges make of frames ends with the thread that set them
        image = image.asnumpy()
    if isinstance(image, np.ndarray | Tensor):
        return _array_to_pil(image, max_pixels)
    raise TypeError(f"An image can't be a {type(image).__name__}. Give {_ACCEPTED_IMAGES}.")


def _existing_path(path: str | os.PathLike, what: str) -> Path:
    try:
        found = Path(path).expanduser() if str(path) else None
    except RuntimeError as error:  # "~" of a user that isn't there
        raise FileNotFoundError(f"There is no {what} at {str(path)!r:.200}: {error}") from error
    if found is None or not os.path.exists(found):  # which takes any string
        raise FileNotFoundError(
            f"There is no {what} at {str(path)!r:.200}. Give the path of a local file (no URL, no base64), or what it "
            "holds as PIL images or arrays."
        )
    if not (found.is_file() or found.is_dir()):
        raise OSError(f"{str(path)!r} is no file or folder but a device or pipe. Save what it gives to a file.")
    return found


def check_area(width: int, height: int, max_pixels: int = MAX_IMAGE_PIXELS, what: str = "image") -> None:
    """Refuses a picture of no pixels, or of so many that they might fill the memory.

    Raises:
        ValueError: `width` or `height` is below 1, or `width * height` above `max_pixels`.
    """
    if min(width, height) < 1 or width * height > max_pixels:
        trusted = ", or call load_image(..., max_pixels=...) yourself if you trust it" if what == "image" else ""
        raise ValueError(
            f"The {what} is {width}x{height} = {width * height} pixels; 1 to {max_pixels} are accepted. Resize it"
            f"{trusted}."
        )


def _load_file(path: Path, max_pixels: int) -> Image.Image:
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder, not an image. Pass a folder of frames as video=.")
    try:
        image = Image.open(path)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # the second under python -W error
        raise ValueError(f"{str(path)!r}: {error} Resize it, or raise PIL.Image.MAX_IMAGE_PIXELS.") from error
    except CORRUPT_FILE_ERRORS as error:
        raise OSError(f"{str(path)!r} is no readable image: {error}. Pass a video file as video=.") from error
    with image:
        return _opened_to_rgb(
            image, max_pixels, lambda error: f"{str(path)!r} is a damaged image: {error}. Save it again."
        )


def _unreadable(image: Image.Image, error: Exception) -> str:
    return (
        f"The pixels of this {type(image).__name__} can't be read ({type(error).__name__}: {error}). Was its file "
        "closed? Use it inside its `with`, or call its load() there; save a damaged picture again."
    )


def _opened_to_rgb(image: Image.Image, max_pixels: int, describe: Callable[[Exception], str]) -> Image.Image:
    """RGB copy of an image whose pixels may still be in a file; `describe` says that they can't be read."""
    check_area(*image.size, max_pixels)
    try:
        _decode(image)
    except CORRUPT_FILE_ERRORS as error:
        raise OSError(describe(error)) from error
    return _to_rgb(image)


def _decode(image: Image.Image) -> None:
    """Reads the pixels of an opened file; what is damaged raises one of `CORRUPT_FILE_ERRORS`."""
    image.load()
    if image.mode == "P" and image.palette is None:
        raise OSError("its palette is gone")


def _to_rgb(image: Image.Image) -> Image.Image:
    """RGB copy of a PIL image of any mode, upright."""
    if _is_rotated(image):
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _deep_grey_to_8_bits(image)
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image  # Pillow has no direct way from La
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _is_rotated(image: Image.Image) -> bool:
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except CORRUPT_FILE_ERRORS:  # damaged metadata doesn't make the picture unreadable
        return False


def _deep_grey_to_8_bits(image: Image.Image) -> Image.Image:
    """Grey image with more than 8 bits -> mode L.

    I;16 spans 0..65535. For I and F, whose range Pillow leaves open, it is the smallest usual one that holds all
    values: 0..255 or 0..65535 for I, 0..1 or 0..255 for F.
    """
    values = np.asarray(image)
    tops = {"I": (255, 65535), "F": (1, 255)}.get(image.mode, (65535,))
    top = next((top for top in tops if values.max() < (1 + _SLACK) * top), None)  # NaN compares false
    if top is None or values.min() < -_SLACK * top:
        raise ValueError(
            f"A mode {image.mode} image holds values from {values.min()} to {values.max()}; 0 to {tops[-1]} is "
            "accepted, without NaN. Scale it first."
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _array_to_pil(array: np.ndarray | Tensor, max_pixels: int) -> Image.Image:
    array = _channels_last(_as_numpy(array))
    check_area(array.shape[1], array.shape[0], max_pixels)
    return _to_rgb(Image.fromarray(np.ascontiguousarray(_to_uint8(array))))


def _as_numpy(array: np.ndarray | Tensor) -> np.ndarray:
    """The values of an array or tensor; floats that NumPy lacks become float32."""
    if not isinstance(array, Tensor):
        return array
    try:
        array = array.detach().cpu()
        return (array.float() if array.is_floating_point() else array).numpy()
    except (RuntimeError, TypeError) as error:  # sparse, quantized, on the meta device...
        raise TypeError(
            f"A tensor of {array.dtype}, {array.layout} on {array.device} can't be read as an array: {error}. Give a "
            "dense tensor of numbers."
        ) from error


def _channels_last(array: np.ndarray) -> np.ndarray:
    """[H, W], [H, W, C] or [C, H, W] with C in 1, 3, 4 -> [H, W] or [H, W, C] with C in 3, 4."""
    if array.ndim == 2 or array.shape == (1, 1, 1):
        return array.reshape(array.shape[:2])
    if array.ndim != 3:
        raise ValueError(f"An image array has 2 or 3 axes, got shape {array.shape}. Give HxW, HxWxC or CxHxW.")
    first, last = array.shape[0], array.shape[2]
    for channels in (3, 4, 1):  # RGB is likelier than a picture so small: 1x1x3 is one pixel, not a grey row of three
        if first == last == channels:
            raise ValueError(
                f"An image array of shape {array.shape} is ambiguous: its channels may be first or last. Turn it "
                "into a PIL image (PIL.Image.fromarray) yourself."
            )
        if channels in (first, last):
            array = array if last == channels else np.moveaxis(array, 0, -1)
            return array[..., 0] if channels == 1 else array
    raise ValueError(f"An image array has 1, 3 or 4 channels, first or last; got shape {array.shape}.")


def _to_uint8(array: np.ndarray) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == np.bool_:
        return array.astype(np.uint8) * 255
    accepted = "Give float in [0, 1], uint8 in 0..255, or bool."
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"An image array of dtype {array.dtype} has no agreed range. {accepted}")
    low, high = array.min(), array.max()
    if not (low > -_SLACK and high < 1 + _SLACK):  # NaN compares false
        raise ValueError(f"An image array of floats holds values from {low:g} to {high:g}. {accepted}")
    return np.rint(array.astype(np.float32) * 255).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------- videos

_Decoders = Generator[Callable[[], Image.Image], None, None]  # one callable a frame, valid until the next is drawn


class VideoFrames:
    """Frames of a video as RGB PIL images, decoded one at a time; every iteration starts at frame 0.

    `len(frames)` is the number of frames that can really be read. The header of a file can be wrong, so the first
    call reads it to its end to count them; `list(frames)` calls it, too.

    Args:
        source: starts a new pass: a generator of one callable a frame, which decodes the frame. It releases what it
            holds when it is closed. Its argument says whether the frames drawn in this pass will be wanted again.
        length: number of frames, if known.
        problems: a list into which the source writes what it can't read.

    Attributes:
        problems: what could not be read of a damaged file, in words; complete once it was read to its end.
    """

    def __init__(
        self, source: Callable[[bool], _Decoders], length: int | None = None, problems: list[str] | None = None
    ):
        self._source = source
        self._length = length
        self.problems: list[str] = [] if problems is None else problems

    def __iter__(self) -> Iterator[Image.Image]:
        """Yields every frame from the first on and keeps none."""
        return self.read()

    def read(self, start: int = 0) -> Iterator[Image.Image]:
        """Yields every frame from number `start` on and keeps none; those before are passed over, not converted.

        Raises:
            ValueError: the video ends before.
        """
        seen = 0
        with closing(self._source(False)) as decoders:
            for decode in decoders:
                if seen >= start:
                    yield decode()
                seen += 1
        self._length = seen
        if seen < start:
            raise ValueError(f"The video has {seen} frames, so none after the first {start}. Is it the same video?")

    def __len__(self) -> int:
        return self.count()

    def __bool__(self) -> bool:
        return True  # a truth test must not count a file's frames

    def count(self, limit: int | None = None) -> int:
        """Number of frames, but at most `limit`, for which no more than `limit` frames are read."""
        if self._length is None:
            with closing(self._source(True)) as decoders:
                seen = sum(1 for _ in itertools.islice(decoders, limit))
            if seen == limit:
                return seen
            self._length = seen
        return self._length if limit is None else min(limit, self._length)

    def take(self, n: int) -> list[Image.Image]:
        """The first `n` frames, or all if there are fewer; reads no further."""
        with closing(self._source(True)) as decoders:
            return [decode() for decode in itertools.islice(decoders, n)]

    def select(self, indices: Sequence[int]) -> list[Image.Image]:
        """The frames of these numbers, in this order; decodes no others and reads no further than the last.

        Raises:
            ValueError: there is no such frame.
        """
        wanted, found = set(indices), {}
        with closing(self._source(True)) as decoders:
            for index, decode in enumerate(itertools.islice(decoders, max(wanted, default=-1) + 1)):
                if index in wanted:
                    found[index] = decode()
        if missing := wanted - found.keys():
            raise ValueError(f"The video has no frame {min(missing)}. It has {len(self)}, numbered from 0.")
        return [found[index] for index in indices]


class ReadAhead(Iterator):
    """Draws items in a thread of its own, at most `depth` of them before they are asked for, from now on.

    What the thread raises is raised here, behind the items before it. Closing waits for the item that is being drawn,
    stops the thread and closes `items`; so does the end.
    """

    def __init__(self, items: Iterable[Any], depth: int = 2):
        if depth < 1:
            raise ValueError(f"{depth=}: at least one item must be drawn before it is asked for.")
        self._items, self._end = iter(items), object()
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="read_ahead")
        self._ahead = deque(self._draw() for _ in range(depth))

    def _draw(self) -> Future:
        return self._reader.submit(next, self._items, self._end)

    def __next__(self) -> Any:
        if not self._ahead:
            raise StopIteration
        try:
            item = self._ahead.popleft().result()
        except BaseException:
            self.close()
            raise
        if item is self._end:
            self.close()
            raise StopIteration
        self._ahead.append(self._draw())
        return item

    def close(self) -> None:
        """Ends the iteration."""
        self._ahead.clear()
        self._reader.shutdown(cancel_futures=True)
        if hasattr(self._items, "close"):
            self._items.close()


class _OneShotSource:
    """Source of an iterable that can be read once: frames wanted again are kept, as 8-bit images, and replayed."""

    def __init__(self, images: Iterable[Any]):
        self._images = map(load_image, images)
        self._kept: list[Image.Image] = []
        self._let_go = False  # a frame was passed on without being kept: there is no way back to frame 0

    def __call__(self, keep: bool) -> _Decoders:
        for frame in self._kept:
            yield frame.copy
        if self._let_go:
            raise ValueError(
                "This video is an iterator that was read before and can't be read again. Open it anew, or give a list "
                "of frames or a path."
            )
        for frame in self._images:
            if keep:
                self._kept.append(frame)
            self._let_go = not keep
            yield frame.copy


def open_video(video: Any) -> VideoFrames:
    """Opens a video of any kind. Frames are read when asked for; a list, array, file or folder can be read repeatedly.

    Args:
        video: list of images (see `load_image`; sizes may differ), [T, H, W, C] or [T, C, H, W] array or tensor, path
            to a video file (whatever OpenCV reads: mp4, avi, webm, ...; what Pillow does: animated gif, webp, avif,
            pages of a tiff), path to a folder of frame images (in natural order: 2 before 10), any iterable of images,
            or `VideoFrames`. Of a damaged file all frames that can be decoded are used, numbered without gaps;
            `problems` and a warning tell of the others. A file of variable rate gives every frame that it stores once;
            one that is marked as rotated, upright frames.

    Raises:
        TypeError: something else.
        ValueError: no frames, a file that is no video, an array of wrong shape.
        FileNotFoundError: no such path.
        OSError: while frames are read: one that the decoder announced but can't convert.
    """
    frames = _frames_of(video)
    if frames is not video and frames.count(1) == 0:
        raise ValueError(_EMPTY_VIDEO)
    return frames


def _frames_of(video: Any) -> VideoFrames:
    """The frames, of which none is looked at yet."""
    if isinstance(video, VideoFrames):
        return video
    if isinstance(video, str | os.PathLike):
        return _frames_of_path(_existing_path(video, "video"))
    if isinstance(video, np.ndarray) and video.ndim == 1 and video.dtype.kind in "OU":
        video = list(video)  # paths, or images of several sizes
    if isinstance(video, np.ndarray | Tensor) and video.ndim != 4:
        raise ValueError(f"A video array has 4 axes, TxHxWxC or TxCxHxW; got shape {tuple(video.shape)}.")
    if isinstance(video, Image.Image):
        raise TypeError("A video can't be a single PIL image. Pass it as image=, or as a list of one frame.")
    is_sequence = hasattr(video, "__len__") and hasattr(video, "__getitem__")
    if is_sequence and hasattr(video, "keys") and not isinstance(video, Mapping):
        video = list(video)  # a pandas Series is indexed by its labels
    if isinstance(video, bytes | bytearray | Mapping | set) or not (is_sequence or isinstance(video, Iterable)):
        raise TypeError(f"A video can't be a {type(video).__name__}. Give {_ACCEPTED_VIDEOS}.")
    return _frames_of_sequence(video) if is_sequence else VideoFrames(_OneShotSource(video))


def _frames_of_sequence(items: Any) -> VideoFrames:
    return VideoFrames(partial(_read_sequence, items), len(items))


def _frame_of(picture: Image.Image) -> VideoFrames:
    """A picture that `load_image` made, as a video of one frame; it isn't copied again."""
    return VideoFrames(partial(_read_picture, picture), 1)


def _read_picture(picture: Image.Image, keep: bool = False) -> _Decoders:
    yield lambda: picture


def _read_sequence(items: Any, keep: bool = False) -> _Decoders:
    return (partial(_read_item, items, index) for index in range(len(items)))


def _read_item(items: Any, index: int) -> Image.Image:
    with _told_as(f"frame {index}"):
        return load_image(items[index])


def _frames_of_path(path: Path) -> VideoFrames:
    if path.is_dir():
        files = [file for file in path.iterdir() if file.suffix.lower() in _PICTURE_SUFFIXES and file.name[0] != "."]
        return _frames_of_sequence(sorted(files, key=natural_order))
    read = _read_animation if path.suffix.lower() in _PICTURE_SUFFIXES else _read_video_file
    problems: list[str] = []
    return VideoFrames(partial(read, path, problems), problems=problems)


def _report(problems: list[str], problem: str) -> None:
    """Notes and warns of something that can't be read, once however often it is met."""
    if problem not in problems:
        problems.append(problem)
        logger.warning_once(problem)


def natural_order(file: Path) -> tuple[list[int | str], str]:
    """Sort key that puts frame 2 before frame 10."""
    parts = re.split(r"(\d+)", file.name.lower())
    return [int(part) if place % 2 else part for place, part in enumerate(parts)], file.name


def _read_animation(path: Path, problems: list[str], keep: bool = False) -> _Decoders:
    """Frames of an animated gif or webp, pages of a tiff..., up to its end or to the first damaged frame."""
    try:
        clip = Image.open(path)
    except CORRUPT_FILE_ERRORS as error:
        raise ValueError(f"{str(path)!r} is no readable video: {error}. Convert it, for instance to mp4.") from error
    with clip:
        check_area(*clip.size, what="video")
        pages = ImageSequence.Iterator(clip)
        for index in itertools.count():
            try:
                if next(pages, None) is None:
                    return
                check_area(*clip.size, what="video")  # a page may be larger than those before
                _decode(clip)
            except CORRUPT_FILE_ERRORS as error:
                reason = str(error) or type(error).__name__
                _report(problems, f"{str(path)!r} is damaged at frame {index} ({reason}); {index} frames are used.")
                return
            yield partial(_to_rgb, clip)


def _read_video_file(path: Path, problems: list[str], keep: bool = False) -> _Decoders:
    """Frames of a video file, upright, without those that can't be decoded."""
    import cv2

    name = os.path.abspath(_existing_path(path, "video"))  # FFmpeg takes "12:30.mp4" for a protocol and its address
    try:
        name.encode()  # OpenCV dies of a name that is not UTF-8
    except UnicodeEncodeError as error:
        raise OSError(f"The path {name!r} is not in UTF-8, so OpenCV can't open it. Rename it.") from error
    capture = cv2.VideoCapture(name)
    try:
        if not capture.isOpened():
            raise ValueError(
                f"{str(path)!r} is no video that OpenCV can read, or one whose index was cut off. Convert it, for "
                "instance to mp4."
            )
        sides = (int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT))
        check_area(*(max(side, 1) for side in sides), what="video")  # 0 stands for unknown
        announced, seen, lost, failed = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0, 0, 0
        # Past a damaged frame the next call may succeed again, so a failure alone doesn't mean the end.
        while failed <= _patience(announced, seen):
            if capture.grab():
                lost, failed = lost + failed, 0
                yield partial(_retrieve, capture, path)
                seen += 1
            else:
                failed += 1
        if not seen:
            raise ValueError(
                f"OpenCV can decode no frame of {str(path)!r}: it is empty or damaged, or OpenCV was built without its "
                "codec, as AV1 often is. Convert it, for instance to H.264 in an mp4."
            )
        if seen < announced:
            _report(problems, f"{str(path)!r} announces {announced} frames, {seen} could be read and are used.")
        elif lost:
            _report(problems, f"{str(path)!r} is damaged in {lost} places; the {seen} frames between them are used.")
    finally:
        capture.release()


def _patience(announced: int, seen: int) -> int:
    """How many frames in a row may fail before a file has ended: those that a header still promises, if it knows."""
    return min(announced - seen, _MOST_BROKEN) if announced >= max(seen, 1) else _FAILURES_AT_END


def _retrieve(capture: Any, path: Path) -> Image.Image:
    import cv2

    decoded, bgr = capture.retrieve()
    if not decoded:
        raise OSError(f"A frame of {str(path)!r} can't be decoded. Repair the file or cut it before this frame.")
    return Image.fromarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2RGB))


def select_key_frames(video: Any, num_frames: int, frame_sampling: str | Sequence[int] = "first") -> list[int]:
    """Chooses the frames that the language model sees.

    Args:
        video: the frames, or what `open_video` takes.
        num_frames: how many, at least 1; a shorter video gives all it has. Unused with explicit frame numbers.
        frame_sampling: "first" (released behaviour; reads only these frames), "uniform" (from the first frame to the
            last, which needs the number of frames), or frame numbers, counted from 0.

    Returns:
        Frame numbers, ascending, none twice.

    Raises:
        TypeError: a number is not an integer, `frame_sampling` is neither a name nor numbers.
        ValueError: `num_frames` < 1, an unknown name, no frame number, or one outside the video.
    """
    frame_sampling, video = _checked_sampling(num_frames, frame_sampling), _frames_of(video)
    if isinstance(frame_sampling, list):
        wanted = sorted(set(frame_sampling))
        if wanted[-1] >= (available := video.count(wanted[-1] + 1)):
            raise ValueError(
                f"frame_sampling holds {wanted[-1]}, but the video has {available} frames (0 is the first)."
            )
        return wanted
    if frame_sampling == "first":
        return list(range(video.count(num_frames)))
    return np.unique(np.linspace(0, len(video) - 1, min(num_frames, len(video)), dtype=int)).tolist()


def _read_key_frames(
    video: VideoFrames, num_frames: int, frame_sampling: str | list[int]
) -> tuple[Image.Image, dict[int, Image.Image]]:
    """Frame 0, and by number those that `select_key_frames` chooses; the first ones in a single pass."""
    if frame_sampling == "first":
        if not (shown := dict(enumerate(video.take(num_frames)))):
            raise ValueError(_EMPTY_VIDEO)
        return shown[0], shown
    numbers = select_key_frames(video, num_frames, frame_sampling)
    first, *images = video.select([0, *numbers])
    return first, dict(zip(numbers, images, strict=True))


def _checked_sampling(num_frames: Any, frame_sampling: Any) -> str | list[int]:
    """The name of a choice of frames, or their numbers; what can be said about it without the video is checked."""
    accepted = f"Use one of {FRAME_SAMPLINGS} or a list of frame numbers, counted from 0."
    if not 1 <= _as_integer(num_frames, "num_frames") < MAX_FRAME_NUMBER:
        raise ValueError(f"num_frames={num_frames} is no number of frames: at least 1, below {MAX_FRAME_NUMBER}.")
    if isinstance(frame_sampling, str):
        if frame_sampling not in FRAME_SAMPLINGS:
            raise ValueError(f"frame_sampling={frame_sampling!r} is unknown. {accepted}")
        return frame_sampling
    is_list = isinstance(frame_sampling, Sequence | np.ndarray | Tensor) and not isinstance(
        frame_sampling, bytes | bytearray
    )
    if not is_list or getattr(frame_sampling, "ndim", 1) != 1:
        raise TypeError(
            f"frame_sampling can't be {frame_sampling!r:.100} ({type(frame_sampling).__name__}). {accepted}"
        )
    if len(frame_sampling) > MAX_KEY_FRAMES:
        raise ValueError(f"frame_sampling names {len(frame_sampling)} frames; at most {MAX_KEY_FRAMES} can be read.")
    numbers = [_as_integer(index, "a frame number") for index in frame_sampling]
    if not numbers or not 0 <= min(numbers) <= max(numbers) < MAX_FRAME_NUMBER:
        raise ValueError(f"frame_sampling={frame_sampling!r} is empty, or holds negative or absurd numbers. {accepted}")
    return numbers


def _as_integer(value: Any, name: str) -> int:
    try:
        return as_index(None if isinstance(value, bool) else value)
    except TypeError as error:
        raise TypeError(f"{name} must be an integer, got {value!r} ({type(value).__name__}).") from error


# ---------------------------------------------------------------------------------------------------------- prompts


@dataclass(frozen=True)
class PromptTemplate:
    """How one turn of a conversation is written.

    Attributes:
        instruction: format string with one field, `text`: the user's turn up to where the answer begins.
        stop_words: texts that end an answer.
    """

    instruction: str
    stop_words: tuple[str, ...]


_TURN = "<|im_start|>"
_CHATML = "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
TEMPLATES: Mapping[str, PromptTemplate] = MappingProxyType(
    {
        "qwen_chat": PromptTemplate(_CHATML, ("<|im_end|>", "<|endoftext|>")),
        "internlm2_chat": PromptTemplate(_CHATML, ("<|im_end|>",)),
        "phi3_chat": PromptTemplate("<|user|>\n{text}<|end|>\n<|assistant|>\n", ("<|end|>",)),
    }
)


def _find_template(name: str) -> PromptTemplate:
    template = TEMPLATES.get(str(name).replace("-", "_"))
    if template is None:
        raise ValueError(f"template={name!r} is unknown. Use one of {tuple(TEMPLATES)}.")
    return template


def _region_sentence(region_tokens: Sequence[int]) -> str:
    spans = (REGION_START + IMAGE_TOKEN * count + REGION_END for count in region_tokens)
    regions = ", ".join(f"region{number}{span}" for number, span in enumerate(spans, start=1))
    return f"\nThere are {len(region_tokens)} part regions in the picture: {regions}.\n"


def _token_counts(text: str, start: str, token: str, end: str) -> list[int]:
    """How often a token stands in every start...end block of a text that holds nothing else."""
    blocks = re.findall(f"{re.escape(start)}((?:{re.escape(token)})*){re.escape(end)}", text)
    return [len(block) // len(token) for block in blocks]


def _check_is_text(name: str, words: Any) -> None:
    if not isinstance(words, str):
        raise TypeError(f"{name} must be a string, got {type(words).__name__}. Give the words of this turn as text=.")
    try:
        words.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{name} holds half a character (a lone surrogate). Decode it as UTF-8 text first.") from error


def _check_words(text: Any, past_text: Any, reserved: Sequence[str], drops_tags: bool) -> None:
    _check_is_text("text", text)
    _check_is_text("past_text", past_text)
    if not text.replace(IMAGE_TAG, "").strip():
        raise ValueError(f"text={text!r} says nothing. Ask something, such as 'Please segment the red car.'")
    if not drops_tags and text.count(IMAGE_TAG) > 1:
        raise ValueError(
            f"text holds {text.count(IMAGE_TAG)} {IMAGE_TAG} tags. Write at most one: it stands for the whole image "
            "or video; without any it is put in front."
        )
    if used := [token for token in reserved if token in text]:
        raise ValueError(
            f"text holds {used}, which stand for image content. Give your words alone: the "
            "processor writes what surrounds them."
        )


def _check_no_picture(text: str, past_text: str, mask_prompts: Any, image_token: str) -> None:
    """A call without image and video must not speak of one."""
    if mask_prompts is not None:
        raise ValueError("mask_prompts point into a picture, but there is none. Give image= or video= too.")
    if IMAGE_TAG in text:  # the released code drops it without a word
        logger.warning_once(f"text holds {IMAGE_TAG}, but there is no image= or video=: the tag is left out.")
    if image_token in past_text:
        raise ValueError("past_text talks about a picture. Give the same image= or video= (and mask_prompts=) again.")


@dataclass(frozen=True, eq=False)
class Sa2VAInputs:
    """One call, ready for the model. What follows `attention_mask` is None, empty or False without a picture.

    Attributes:
        prompt: the whole text, image and region tokens expanded, `past_text` included.
        input_ids: int64 [1, L].
        attention_mask: int64 [1, L], ones.
        pixel_values: float32 [tiles, 3, image_size, image_size], normalised; a video has one tile per key frame.
            Qwen-VL: [patches, channels * temporal * patch * patch] of all pictures.
        image_grid_thw: int64 [pictures, 3], Qwen-VL's frames, rows and columns of patches; else None.
        prompt_masks: bool [R, g, g], the cells of each visual prompt in the last tile of an image, the first of a
            video. Their tokens in the prompt follow those of all tiles, region by region, row by row.
        frames: all frames; an image is a video of one.
        key_frames: numbers of the frames in `pixel_values`, ascending.
        is_video: whether a video was given.
        size: (height, width) of frame 0.
        key_images: a video's key frames, so that they need not be read again; empty once SAM 2 has seen them.
    """

    prompt: str
    input_ids: Tensor
    attention_mask: Tensor
    pixel_values: Tensor | None = None
    image_grid_thw: Tensor | None = None
    prompt_masks: Tensor | None = None
    frames: VideoFrames | None = None
    key_frames: list[int] = field(default_factory=list)
    is_video: bool = False
    size: tuple[int, int] | None = None
    key_images: list[Image.Image] = field(default_factory=list)


def prepare_samples(
    prepare: Callable[..., Sa2VAInputs], samples: Iterable[Mapping[str, Any]], name: str = "samples", **defaults: Any
) -> Iterator[Sa2VAInputs]:
    """Prepares calls one by one, as they are asked for; errors say which it was.

    Args:
        prepare: `Sa2VAProcessor.prepare`, or what takes its arguments.
        samples: its arguments.
        name: what the caller calls them, for errors.
        **defaults: arguments of all samples that don't have their own.

    Raises:
        TypeError, ValueError, OSError: see `Sa2VAProcessor.prepare`.
    """
    _, *accepted = inspect.signature(Sa2VAProcessor.prepare).parameters
    if isinstance(samples, Mapping | str) or not isinstance(samples, Iterable):
        raise TypeError(f"{name} can't be a {type(samples).__name__}. Give a list of dictionaries with {accepted}.")
    for number, sample in enumerate(samples):
        if wrong := [*sample.keys() - {*accepted}] if isinstance(sample, Mapping) else type(sample).__name__:
            raise TypeError(f"{name}[{number}] can't hold {wrong}. Give dictionaries with some of {accepted}.")
        with _told_as(f"{name}[{number}]"):
            inputs = prepare(**{**defaults, **sample})
        yield inputs


@contextmanager
def _told_as(item: str) -> Iterator[None]:
    """What is wrong in the block is told as that of an item."""
    try:
        yield
    except (TypeError, ValueError, OSError) as error:
        if len(error.args) == 1:
            error.args = (f"{item}: {error}",)
        raise


def collate_inputs(
    inputs: Sequence[Sa2VAInputs], pad_token_id: int = 0, padding_side: str = "left"
) -> dict[str, Tensor]:
    """Several prepared calls as one batch: the arguments of a model's `generate` and `forward`.

    Args:
        inputs: the calls, at least one.
        pad_token_id: fills up shorter texts; the attention mask hides it.
        padding_side: "left", so that all texts end together and can be continued, or "right".

    Returns:
        `input_ids` and `attention_mask`, int64 [B, L]. Of the calls that have them, one behind the other,
        `pixel_values`, `image_grid_thw` and `prompt_masks` (see `Sa2VAInputs`); with the last also
        `prompt_mask_tiles`, int64 [R]: which tile of the batch each region lies on.

    Raises:
        ValueError: no calls, or another side.
    """
    if not inputs or padding_side not in ("left", "right"):
        raise ValueError(f"{len(inputs)} calls, {padding_side=}: give at least one, and 'left' or 'right'.")
    fill = {"input_ids": pad_token_id, "attention_mask": 0}
    batch = {
        name: pad_sequence([getattr(x, name)[0] for x in inputs], True, value, padding_side)
        for name, value in fill.items()
    }
    for name in ("pixel_values", "image_grid_thw", "prompt_masks"):
        if given := [value for x in inputs if (value := getattr(x, name)) is not None]:
            batch[name] = torch.cat(given)
    if "prompt_masks" in batch:
        batch["prompt_mask_tiles"] = _region_tiles(inputs)
    return batch


def _region_tiles(inputs: Sequence[Sa2VAInputs]) -> Tensor:
    """The tile of each region, int64 [R], counted through all calls: an image's thumbnail, a video's first frame."""
    tiles, before = [], 0
    for call in inputs:
        count = 0 if call.pixel_values is None else len(call.pixel_values)
        regions = 0 if call.prompt_masks is None else len(call.prompt_masks)
        tiles += [before if call.is_video else before + count - 1] * regions
        before += count
    return torch.tensor(tiles, dtype=torch.long)


def _as_samples(texts: Sequence[str], **columns: Any) -> list[dict[str, Any]]:
    """Several texts and what goes with each, as arguments of `prepare`.

    A column is a list, or None for all; one `past_text` may be that of all.
    """
    if not texts:
        raise ValueError("text is an empty list. Give the user's words, or a list with those of each sample.")
    rows = {"text": texts}
    for name, column in columns.items():
        if column is None or (name == "past_text" and isinstance(column, str)):
            column = [column] * len(texts)
        items = column if isinstance(column, list | tuple) else [column]
        if len(items) != len(texts):
            given = f"{len(items)} in a list" if items is column else f"one {type(column).__name__}"
            raise ValueError(f"{name}={given}, but text is a list of {len(texts)}. Give a list with one for each text.")
        rows[{"images": "image", "videos": "video"}.get(name, name)] = items
    rows["image"] = [_one_image(image) for image in rows["image"]]
    rows["video"] = [_one_video(video) for video in rows["video"]]
    return [dict(zip(rows, sample, strict=True)) for sample in zip(*rows.values(), strict=True)]


def _single(value: Any) -> Any:
    """The only item of a one-item list, in which batch-minded callers wrap a sample."""
    return value[0] if isinstance(value, list | tuple) and len(value) == 1 else value


def _one_image(value: Any) -> Any:
    """The only item of a list, which may be nested; None for an empty one."""
    while isinstance(value, list | tuple) and len(value) < 2:
        value = value[0] if value else None
    return value


def _parts_of(content: Any, may_come: bool) -> dict[str, Any]:
    """The "text" of a message, and its "image" or "video", which are `_TO_COME` if they may and are not there."""
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not (isinstance(parts, list | tuple) and all(isinstance(part, Mapping) for part in parts)):
        raise TypeError(f"The content of a message is text or a list of dictionaries, got {content!r}.")
    found, text = {}, ""
    for part in parts:
        kind = part.get("type")
        is_picture = kind in ("image", "video")
        keys = (kind, "path", "url") if is_picture else ("text",) if kind == "text" else ()
        is_bare = all(value is None for name, value in part.items() if name != "type")
        later = _TO_COME if may_come and is_picture and is_bare else None
        given = next((part[key] for key in keys if part.get(key) is not None), later)
        if given is None or (kind == "text" and not isinstance(given, str)):
            raise ValueError(f"{dict(part)!r:.200} is no text, image or video with what it shows: {_EXAMPLE_PARTS}.")
        if kind in found and kind != "text":
            raise ValueError(f"A message holds more than one {kind}; a conversation is about one.")
        if kind == "text":
            text += given
        else:
            found[kind] = given
            text += IMAGE_TAG if text and IMAGE_TAG not in text else ""  # without a tag it stands first
    return {**found, "text": text}


def _one_video(value: Any) -> Any:
    """The only item of a one-item list, if that can only be a whole video: frames, or no picture's path."""
    item = _single(value)
    is_file = isinstance(item, str | os.PathLike) and not _is_still(Path(item))
    is_clip = isinstance(item, list | tuple | VideoFrames) or getattr(item, "ndim", 0) == 4
    return item if is_file or is_clip else value


def _is_still(path: Path) -> bool:
    """Whether a file holds one picture."""
    if path.suffix.lower() not in _PICTURE_SUFFIXES:
        return False
    try:
        with Image.open(path) as picture:
            return getattr(picture, "n_frames", 1) == 1
    except CORRUPT_FILE_ERRORS:
        return True  # what is wrong is told when it is read


# ------------------------------------------------------------------------------------------------- pixels and tiles


def _check_sides(**sizes: Any) -> None:
    """Refuses sizes in pixels, or numbers of tiles, that no checkpoint has."""
    for name, value in sizes.items():
        if not 1 <= _as_integer(value, name) <= MAX_SIDE:
            raise ValueError(f"{name}={value} must be from 1 to {MAX_SIDE}.")


def choose_tiling(
    width: int, height: int, image_size: int = 448, min_tiles: int = 1, max_tiles: int = 12
) -> tuple[int, int]:
    """Columns and rows of the grid of tiles whose shape is nearest to that of a width x height picture.

    Grids are tried from few tiles to many. Of two that are equally near, the larger wins if the picture fills more
    than half of its area (InternVL 1.5). The official code leaves the order of grids with equally many tiles to the
    iteration order of a set. It can't matter (for `min_tiles` 1): of c x r and c' x r' with c < c' and r > r', the
    shape of c x r', which has fewer tiles, lies strictly between theirs, so they are never both nearest.

    Raises:
        ValueError: `width` or `height` is below 1.
    """
    if min(width, height) < 1:
        raise ValueError(f"A picture of {width}x{height} has no pixels, so there is nothing to tile.")
    sides = range(1, max_tiles + 1)
    grids = [(c, r) for c in sides for r in range(1, max_tiles // c + 1) if min_tiles <= c * r]
    best, best_distance = (1, 1), float("inf")
    for columns, rows in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
        distance = abs(width / height - columns / rows)
        fills = width * height > 0.5 * image_size * image_size * columns * rows
        if distance < best_distance or (distance == best_distance and fills):
            best, best_distance = (columns, rows), distance
    return best


def _resized(pictures: Sequence[Image.Image], size: int) -> Tensor:
    """K RGB images -> uint8 [K, 3, size, size]; aspect ratios not kept."""
    side = (size, size)
    resized = [p if p.size == side else p.resize(side, Image.Resampling.BICUBIC) for p in pictures]
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in resized])).permute(0, 3, 1, 2)


def _normalized(pixels: Tensor, rounding: torch.dtype) -> Tensor:
    """Values [K, 3, h, w] in 0..255 -> by ImageNet's mean and std, which `rounding` holds; in place."""
    mean, std = _constants(pixels.shape[-1], rounding, pixels.dtype, pixels.device)
    return pixels.div_(255).sub_(mean).div_(std)


@lru_cache(maxsize=16)  # every frame needs them, on its device
def _constants(width: int, rounding: torch.dtype, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and std [3, 1, width], rounded to one dtype and held in another.

    They lie in memory as a row of pixels does, channels innermost: pixel by pixel, three at a time, a CPU takes thrice
    as long.
    """
    with torch.inference_mode(False):
        tensors = (torch.tensor(values, dtype=rounding, device="cpu") for values in (IMAGE_MEAN, IMAGE_STD))
        mean, std = (tensor.to(dtype).repeat(width, 1).to(device).T[:, None] for tensor in tensors)
    return mean, std


# ------------------------------------------------------------------------------------------------------ tokenizers


class InternLM2Tokenizer(TokenizersBackend):
    """Tokenizer of the checkpoints around InternLM2 (Sa2VA-8B, -26B), fast and under the name they give to theirs.

    They ship a SentencePiece model, `tokenizer.model`, and slow Python code that today's transformers can't run. The
    model is converted when loaded; `save_pretrained` writes `tokenizer.json`, which is read from then on.

    Text is cut at added tokens and every piece begins with a space of its own, so decoding does not just join tokens:
    see `_decode`.
    """

    model_input_names = ["input_ids", "attention_mask"]
    _auto_map = {"AutoTokenizer": ["processing_sa2va.InternLM2Tokenizer", None]}  # saved: (slow, fast), as released

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs) -> dict[str, Any]:
        """transformers' hook between a folder's files and the constructor's arguments.

        Raises:
            ValueError: `tokenizer.model` is no SentencePiece model of the kind that InternLM2 uses.
        """
        kwargs.pop("auto_map", None)  # the checkpoint's own code, not needed
        if kwargs.get("tokenizer_file") or not kwargs.get("vocab_file"):
            return super().convert_to_native_format(trust_remote_code=trust_remote_code, **kwargs)
        model = SentencePieceModel.read(kwargs["vocab_file"])
        added = cls._as_slow_tokenizers_have_them(**kwargs)
        kwargs |= {"tokenizer_object": model.to_tokenizer(added), "added_tokens_decoder": added}
        kwargs.setdefault("add_bos_token", True)
        return kwargs

    @staticmethod
    def _as_slow_tokenizers_have_them(added_tokens_decoder=None, **kwargs) -> dict[int, AddedToken]:
        """Added tokens by id, looked for in the text as it is; added_tokens.json doesn't say which are special."""
        lists = (kwargs.get("extra_special_tokens"), kwargs.get("additional_special_tokens"))
        special = {str(token) for tokens in lists for token in tokens or ()}
        added = {}
        for i, token in (added_tokens_decoder or {}).items():
            changes = {"normalized": False, "special": token.special or token.content in special}
            added[i] = AddedToken(**token.__getstate__() | changes)
        return added

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Text of tokens that the SentencePiece model has; every byte that is no UTF-8 becomes one U+FFFD."""
        runs = ((is_byte, list(run)) for is_byte, run in itertools.groupby(tokens, _is_byte))
        parts = ([_text_of_bytes(run)] if is_byte else run for is_byte, run in runs)
        return super().convert_tokens_to_string([*itertools.chain.from_iterable(parts)])

    def _decode(
        self,
        token_ids: int | list[int],
        skip_special_tokens: bool = False,
        spaces_between_special_tokens: bool = True,
        **kwargs,
    ) -> str:
        """What `decode` does with one sequence.

        Args:
            token_ids: ids, or one.
            skip_special_tokens: leave special tokens out.
            spaces_between_special_tokens: put spaces around added tokens, as the released code does:
                `Sure,  [SEG] . <|im_end|>`. False gives text that is encoded to the same ids.
        """
        added, size = self.added_tokens_decoder, len(self)
        skipped = {i for i, token in added.items() if token.special} if skip_special_tokens else set()
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        ids = [i for i in ids if i < size and i not in skipped]  # a model may have more rows than there are tokens
        if not spaces_between_special_tokens:
            return "".join(text for _, text in self._runs(ids))
        runs = [(kind, list(run)) for kind, run in itertools.groupby(ids, lambda i: i >= self.vocab_size)]
        texts = (" ".join(added[i].content for i in run) if kind else self._released_text(run) for kind, run in runs)
        return " ".join(filter(None, texts))

    def _released_text(self, ids: list[int]) -> str:
        """Text of tokens that the SentencePiece model has; one space before special ones and the words they end."""
        text = ""
        runs = self._runs(ids)
        for index, (is_special, words) in enumerate(runs):
            has_space = index == 0 if is_special else index + 1 < len(runs)
            text += f" {words}" if has_space else words
        return self.clean_up_tokenization(text)

    def _runs(self, ids: list[int]) -> list[tuple[bool, str]]:
        """Texts of neighbours of a kind: added tokens (True) as they are, words without the space they begin with."""
        runs = [(kind, list(run)) for kind, run in itertools.groupby(ids, self.added_tokens_decoder.__contains__)]
        tokens = ((kind, self.convert_ids_to_tokens(run)) for kind, run in runs)
        return [(kind, "".join(run) if kind else self.convert_tokens_to_string(run)) for kind, run in tokens]


def _is_byte(token: str) -> bool:
    return re.fullmatch("<0x[0-9A-F]{2}>", token) is not None


def _text_of_bytes(tokens: Sequence[str]) -> str:
    """Text of byte tokens; `tokenizers` would give up a whole run of them for one that is cut off or stray."""
    text = bytes(int(token[3:5], 16) for token in tokens).decode(errors="surrogateescape")
    return re.sub("[\udc80-\udcff]", "\N{REPLACEMENT CHARACTER}", text)


class Piece(NamedTuple):
    """A word or part of one in a SentencePiece model.

    Kinds: 1 is merged from others, 2 stands for what is unknown, 3 never comes from text, 4 is taken from text whole, 6
    is a byte.
    """

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class SentencePieceModel:
    """A byte-pair encoding made by SentencePiece, as its file (`tokenizer.model`) describes it.

    Attributes:
        pieces: by id.
        characters: normalisation of characters, compiled; empty if there is none.
        adds_prefix: whether a space is put before every text.
        collapses_spaces: whether spaces at the ends go away, and several become one.
    """

    pieces: list[Piece]
    characters: bytes = b""
    adds_prefix: bool = True
    collapses_spaces: bool = True

    @classmethod
    def read(cls, path: str | os.PathLike) -> "SentencePieceModel":
        """Reads a file, which is a protocol-buffer message; field numbers are those of `sentencepiece_model.proto`.

        Raises:
            OSError: there is no such file.
            ValueError: it holds something else, for instance a Git LFS pointer.
        """
        try:
            fields = list(_message_fields(Path(path).read_bytes()))
            trainer, normalizer = (dict(_message_fields(dict(fields)[number])) for number in (2, 3))
            pieces = [_piece(dict(_message_fields(value))) for number, value in fields if number == 1]
        except (KeyError, TypeError, ValueError, OverflowError, struct.error) as error:
            raise ValueError(f"{str(path)!r} is no SentencePiece model. Download the file again.") from error
        if trainer.get(3) != 2 or trainer.get(24) or not normalizer.get(5, True):  # another model, or spaces elsewhere
            raise ValueError(f"{str(path)!r} is a SentencePiece model, but no byte-pair encoding as InternLM2 has it.")
        return cls(pieces, normalizer.get(2, b""), bool(normalizer.get(3, True)), bool(normalizer.get(4, True)))

    def to_tokenizer(self, added: Mapping[int, AddedToken]) -> Tokenizer:
        """The same encoding for the `tokenizers` library.

        Args:
            added: tokens that are not in the model, or take a piece's place, by id.

        Raises:
            ValueError: the ids of added tokens leave a gap.
        """
        names = [str(added.get(i, piece.text)) for i, piece in enumerate(self.pieces)]
        vocab = {name: i for i, name in enumerate(names)}
        unknown = next((name for name, piece in zip(names, self.pieces, strict=True) if piece.kind == 2), None)
        whole = sorted((piece.text for piece in self.pieces if piece.kind == 4), key=len, reverse=True)
        # What is taken whole is cut out first, and then found in the vocabulary without merging.
        options = {"fuse_unk": True, "byte_fallback": True, "ignore_merges": bool(whole)}
        tokenizer = Tokenizer(models.BPE(vocab, self._merges(), unk_token=unknown, **options))
        if whole:
            tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(map(re.escape, whole))), "isolated")
        tokenizer.normalizer = normalizers.Sequence(self._normalizers())
        steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
        most = 2**16 if self.collapses_spaces else int(self.adds_prefix)  # spaces a text can't begin with
        tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", most, 0)])
        for token_id, token in sorted(added.items()):
            tokenizer.add_special_tokens([token]) if token.special else tokenizer.add_tokens([token])
            if tokenizer.token_to_id(token.content) != token_id:
                raise ValueError(
                    f"Added token {token.content!r} has id {token_id}, but the next free one is "
                    f"{tokenizer.get_vocab_size() - 1}. Complete added_tokens_decoder in tokenizer_config.json."
                )
        return tokenizer

    def _normalizers(self) -> list[normalizers.Normalizer]:
        steps = [normalizers.Precompiled(self.characters)] if self.characters else []
        if self.collapses_spaces:
            ends = Regex(r"\A +|[ \u2581]+\z")  # of the text, not of its lines
            steps += [normalizers.Replace(ends, ""), normalizers.Replace(Regex(" {2,}"), " ")]
        prefix = [normalizers.Prepend("\u2581")] if self.adds_prefix else []
        return [*steps, *prefix, normalizers.Replace(" ", "\u2581")]

    def _merges(self) -> list[tuple[str, str]]:
        """Pairs of pieces that make up a piece, those of the highest score first."""
        pieces = sorted((piece for piece in self.pieces if piece.kind == 1), key=lambda piece: -piece.score)
        known = {piece.text for piece in pieces}
        cuts = ((text[:i], text[i:]) for text, _, _ in pieces for i in range(1, len(text)))
        return [(left, right) for left, right in cuts if left in known and right in known]


def _piece(fields: Mapping[int, Any]) -> Piece:
    (score,) = struct.unpack("<f", fields.get(2, bytes(4)))
    return Piece(fields[1].decode(), score, fields.get(3, 1))


def _message_fields(message: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Numbers and values of a protocol-buffer message's fields; what is no integer stays bytes."""
    stream = io.BytesIO(message)
    while key := _variable_length_integer(stream):
        if (kind := key & 7) == 0:
            yield key >> 3, _variable_length_integer(stream)
        else:
            yield key >> 3, stream.read(_variable_length_integer(stream) if kind == 2 else {1: 8, 5: 4}[kind])


def _variable_length_integer(stream: io.BytesIO) -> int:
    """The next integer of a message, 7 bits a byte, lowest first; 0 at the end."""
    value = 0
    for shift in range(0, 64, 7):
        byte = int.from_bytes(stream.read(1), "little")
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value
    raise ValueError("An integer of a message has more than 64 bits.")


# By the name in their tokenizer_config.json, so that AutoTokenizer takes it rather than the code it points to.
AutoTokenizer.register(Sa2VAInternLM2Config, InternLM2Tokenizer, exist_ok=True)


# ------------------------------------------------------------------------------------------------------- processor


def find_token(tokenizer: Any, token: str) -> int | None:
    """Id of a word that is one token, else None; tokenizers without an unknown token would give another token's id."""
    token_id = tokenizer.convert_tokens_to_ids(token)
    return token_id if token_id is not None and tokenizer.convert_ids_to_tokens(token_id) == token else None


def _check_tokenizer_is_there(folder: Path) -> None:
    """What transformers says of a folder without a tokenizer speaks of packages that are missing."""
    if folder.is_dir() and not any((folder / name).exists() for name in _TOKENIZER_FILES):
        raise OSError(
            f"{folder} holds no tokenizer. Save one there, processor.save_pretrained(folder), or give the processor of "
            "the checkpoint it comes from: processor=."
        )


class Sa2VAProcessor(ProcessorMixin):
    """Everything between a user and `Sa2VAChatModel` that needs no weights.

    The family of vision-language model decides `preprocess_picture`, `build_prompt`, `preprocess_mask_prompts` and the
    tokens that stand for a picture. Here they are the InternVL family's; `Sa2VAProcessorQwen` overrides them. No call
    leaves anything behind: threads may share a processor.

    Args:
        tokenizer: the checkpoint's tokenizer.
        template: name of a prompt template in `TEMPLATES`.
        image_size, patch_size: side of a tile and of a ViT patch, in pixels.
        downsample_ratio: tokens per patch, along one side (pixel shuffle).
        min_dynamic_patch, max_dynamic_patch: least and most tiles of an image.
        use_thumbnail: add the whole image as a last tile when there are several.
        grounding_image_size: side of SAM 2's input.
        num_key_frames, frame_sampling: how frames of a video are chosen, see `select_key_frames`.
        chat_template: kept and saved for transformers; prompts are built from `template`.

    Raises:
        TypeError: `tokenizer` is no tokenizer.
        ValueError: unknown template or sampling, impossible sizes.
    """

    image_start, image_token, image_end = IMAGE_START, IMAGE_TOKEN, IMAGE_END
    _reserved_words = (image_start, image_token, image_end, REGION_START, REGION_END)
    _between_blocks = "\n"  # of a picture's tokens
    _drops_tags = False  # whether `<image>` in a question says nothing, as the picture stands first anyway

    def __init__(
        self,
        tokenizer=None,
        template: str = "qwen_chat",
        image_size: int = 448,
        patch_size: int = 14,
        downsample_ratio: float = 0.5,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 12,
        use_thumbnail: bool = True,
        grounding_image_size: int = 1024,
        num_key_frames: int = 5,
        frame_sampling: str | Sequence[int] = "first",
        chat_template: str | None = None,
        **kwargs,
    ):
        _find_template(template)
        self.frame_sampling = _checked_sampling(num_key_frames, frame_sampling)
        _check_sides(image_size=image_size, patch_size=patch_size, grounding_image_size=grounding_image_size)
        _check_sides(min_dynamic_patch=min_dynamic_patch, max_dynamic_patch=max_dynamic_patch)
        if max_dynamic_patch * image_size**2 > MAX_IMAGE_PIXELS:
            raise ValueError(
                f"max_dynamic_patch={max_dynamic_patch} tiles of {image_size}x{image_size} have more pixels than the "
                f"{MAX_IMAGE_PIXELS} that are accepted. Lower one of them."
            )
        if min_dynamic_patch > max_dynamic_patch:
            raise ValueError(f"Tiles from {min_dynamic_patch} to {max_dynamic_patch}: need 1 <= min <= max.")
        grid = image_size / patch_size * downsample_ratio
        if grid < 1 or grid % 1:
            raise ValueError(
                f"image_size={image_size}, patch_size={patch_size} and downsample_ratio={downsample_ratio} make "
                f"{grid:g} tokens a side. It must be a whole number."
            )
        self.template = template
        self.image_size = image_size
        self.patch_size = patch_size
        self.downsample_ratio = downsample_ratio
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.use_thumbnail = use_thumbnail
        self.grounding_image_size = grounding_image_size
        self.num_key_frames = num_key_frames
        super().__init__(tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_config(
        cls, config: Sa2VAChatConfig, tokenizer, image_processor=None, chat_template: str | None = None
    ) -> "Sa2VAProcessor":
        """The processor of a checkpoint, from its configuration and tokenizer.

        Args:
            config, tokenizer: of the checkpoint.
            image_processor, chat_template: Qwen-VL's; without a template the tokenizer's holds.
        """
        if config.is_qwen_vl:
            settings = Sa2VAProcessorQwen._settings_of(config) | {"chat_template": chat_template}
            return Sa2VAProcessorQwen(image_processor=image_processor, tokenizer=tokenizer, **settings)
        return cls(tokenizer, **cls._settings_of(config))

    @staticmethod
    def _settings_of(config: Sa2VAChatConfig) -> dict[str, Any]:
        return {
            "template": config.template,
            "image_size": config.force_image_size or config.vision_config.image_size,
            "patch_size": config.vision_config.patch_size,
            "downsample_ratio": config.downsample_ratio,
            "min_dynamic_patch": config.min_dynamic_patch,
            "max_dynamic_patch": config.max_dynamic_patch,
            "use_thumbnail": config.use_thumbnail,
            "grounding_image_size": config.grounding_config.image_size,
            "num_key_frames": config.grounding_config.num_key_frames,
            "frame_sampling": config.grounding_config.frame_sampling,
        }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs) -> "Sa2VAProcessor":
        """Loads the processor of a checkpoint; one without processor_config.json is read from its config.json.

        Args:
            pretrained_model_name_or_path: folder, or name on the Hugging Face Hub.
            **kwargs: as in transformers; settings of the processor win over those of the files. Of a `config`, such as
                that of a model, those do in which it differs from the checkpoint's config.json.

        Raises:
            OSError: neither file is there, or no tokenizer; or they can't be read.
        """
        hub_kwargs = hub_arguments_in(kwargs)
        settings = kwargs.keys() - hub_kwargs.keys() - {"config"}
        stored = cls._find_config(pretrained_model_name_or_path, **hub_kwargs)
        if (config := kwargs.get("config")) is None:
            config = kwargs["config"] = stored
        fault = f"The processor of {pretrained_model_name_or_path} can't be read"
        advice = "Are processor_config.json and the files of the tokenizer whole? Download them again."
        passes = (TypeError,) if settings else ()  # it may be about those
        with blaming(OSError, fault, advice, passes):
            if cls is Sa2VAProcessor and cls._is_of_qwen(pretrained_model_name_or_path, config, hub_kwargs):
                return Sa2VAProcessorQwen.from_pretrained(pretrained_model_name_or_path, **kwargs)
            if stored is not None:
                before = cls._settings_of(stored)
                kwargs = {k: v for k, v in cls._settings_of(config).items() if v != before.get(k)} | kwargs
                _check_tokenizer_is_there(Path(pretrained_model_name_or_path, hub_kwargs.get("subfolder") or ""))
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def _is_of_qwen(cls, name_or_path: str | os.PathLike, config: Sa2VAChatConfig | None, hub_kwargs: dict) -> bool:
        """Whether a processor is of the other family: its model's config says so, or if that is not there its own."""
        if config is not None:
            return config.is_qwen_vl
        saved, _ = cls.get_processor_dict(name_or_path, **hub_kwargs)
        return saved.get("processor_class") == Sa2VAProcessorQwen.__name__

    @staticmethod
    def _find_config(pretrained_model_name_or_path: str | os.PathLike, **hub_kwargs) -> Sa2VAChatConfig | None:
        """The checkpoint's config.json; None for a processor that was saved on its own."""
        try:
            found, _ = Sa2VAChatConfig.get_config_dict(pretrained_model_name_or_path, **hub_kwargs)
        except OSError:
            return None
        name = str(pretrained_model_name_or_path)
        return Sa2VAChatConfig.from_dict(found, name_or_path=name, hub_arguments=hub_kwargs)

    @classmethod
    def get_processor_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """transformers' hook that reads processor_config.json; what that lacks comes from `config`.

        Raises:
            OSError: neither is there.
        """
        config, saved = kwargs.pop("config", None), {}
        with suppress(HFValidationError):  # neither a folder nor a name of the Hub
            saved, kwargs = super().get_processor_dict(pretrained_model_name_or_path, **kwargs)
        if config is None and "grounding_image_size" not in saved:
            raise OSError(
                f"{str(pretrained_model_name_or_path)!r} holds neither a processor_config.json nor a config.json of "
                "Sa2VA. Give the folder or Hub name of a checkpoint."
            )
        return ({} if config is None else cls._settings_of(config)) | saved, kwargs

    def to_dict(self) -> dict[str, Any]:
        """As stored in processor_config.json, with what AutoProcessor needs to find this class.

        A subclass is saved as the class of this file that it is of, but for one with `register_for_auto_class`.
        """
        saved = type(self)
        if self._auto_class is None:
            saved = next(kind for kind in type(self).__mro__ if kind.__module__ == __name__)
        auto_map = {"AutoProcessor": f"{saved.__module__.rpartition('.')[2]}.{saved.__name__}"}
        return {**super().to_dict(), "processor_class": saved.__name__, "auto_map": auto_map}

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
        """transformers' `save_pretrained`, which also saves this code: the folder loads with `trust_remote_code`.

        Files take the places of older ones once all are written.
        """
        with replacing_files(save_directory) as temporary:
            written = super().save_pretrained(str(temporary))
            copy_code(temporary)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", Path(save_directory).name), **kwargs)
        return [str(Path(save_directory) / Path(path).relative_to(temporary)) for path in written]

    @property
    def feature_extractor(self) -> "Sa2VAProcessor":
        """Where transformers' pipelines look up how pixels are padded (not at all), or they make no batches."""
        return self

    @property
    def region_grid(self) -> int:
        """Tokens along one side of a tile."""
        return int(self.image_size / self.patch_size * self.downsample_ratio)

    @property
    def num_image_token(self) -> int:
        """Tokens of one tile."""
        return self.region_grid**2

    @property
    def stop_words(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return _find_template(self.template).stop_words

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns."""
        return [*super().model_input_names, "pixel_values", "prompt_masks", "prompt_mask_tiles"]

    def image_tokens(self, num_tiles: int, is_video: bool) -> list[int]:
        """Tokens in each block of a picture: all tiles of an image in one block, or a block for each key frame."""
        blocks, tiles = (num_tiles, 1) if is_video else (1, num_tiles)
        return [tiles * self.num_image_token] * blocks

    def picture_tokens(self, image_tokens: Sequence[int]) -> str:
        """What stands for a picture in a prompt."""
        blocks = (self.image_start + self.image_token * count + self.image_end for count in image_tokens)
        return self._between_blocks.join(blocks)

    def build_prompt(
        self,
        text: str,
        *,
        image_tokens: Sequence[int] | None = None,
        region_tokens: Sequence[int] | None = None,
        past_text: str = "",
    ) -> str:
        """Writes the conversation up to where the answer begins, byte for byte as the released code does.

        The picture replaces the tag `<image>`, or stands first if there is none. Regions are named right after it (of
        a video: after all key frames), so their tokens follow those of all tiles. If `past_text` shows the picture
        (and names the regions) already, it isn't shown again; a tag in `text` is dropped then.

        Args:
            text: the user's words.
            image_tokens: see the method of this name; None without a picture.
            region_tokens: number of tokens of each visual prompt.
            past_text: earlier turns, verbatim, image tokens expanded.
        """
        regions = "" if region_tokens is None else _region_sentence(region_tokens)
        if image_tokens is None:
            turn = text.replace(IMAGE_TAG, "")
        elif self._pictures_in(past_text):
            regions = "" if self._regions_in(past_text) else regions.lstrip("\n")
            turn = regions + text.replace(f"{IMAGE_TAG}\n", "").replace(IMAGE_TAG, "")
        else:
            turn = text if IMAGE_TAG in text else IMAGE_TAG + text
            turn = turn.replace(IMAGE_TAG, self.picture_tokens(image_tokens) + regions)
        return past_text + _find_template(self.template).instruction.format(text=turn)

    def preprocess_image(self, image: Image.Image) -> Tensor:
        """RGB image -> float32 [tiles, 3, image_size, image_size], row by row, thumbnail last, ImageNet-normalised."""
        size = self.image_size
        columns, rows = choose_tiling(*image.size, size, self.min_dynamic_patch, self.max_dynamic_patch)
        resized = image.resize((columns * size, rows * size), Image.Resampling.BICUBIC)
        corners = [(column * size, row * size) for row in range(rows) for column in range(columns)]
        tiles = [resized.crop((left, top, left + size, top + size)) for left, top in corners]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(image)
        return self.preprocess_key_frames(tiles)

    def preprocess_key_frames(self, frames: Sequence[Image.Image]) -> Tensor:
        """K RGB frames -> float32 [K, 3, image_size, image_size]: one tile each, aspect ratio not kept."""
        return _normalized(_resized(frames, self.image_size).float(), torch.float32)

    def preprocess_mask_prompts(self, mask_prompts: Any) -> Tensor:
        """Masks that point at regions -> the tokens they cover.

        Args:
            mask_prompts: array or tensor [R, H, W], or a list with just that; bool or numbers, nonzero is inside. H
                and W need not be the picture's.

        Returns:
            bool [R, g, g] with g = `region_grid`, by nearest neighbour, as released: a region that lies between
            the points looked at is empty, which is logged.

        Raises:
            TypeError: no array of numbers.
            ValueError: several arrays, wrong shape, no region or absurdly many or large ones, NaN.
        """
        wanted = "Give one array of numbers or bools [regions, height, width], or a list with just that."
        if isinstance(mask_prompts, list | tuple) and len(mask_prompts) != 1:
            raise ValueError(f"mask_prompts are a list of {len(mask_prompts)}. {wanted} np.stack joins masks.")
        masks = _as_numpy(_single(mask_prompts))
        if not (isinstance(masks, np.ndarray) and masks.dtype.kind in "biuf"):
            kind = f"{masks.dtype} array" if isinstance(masks, np.ndarray) else type(masks).__name__
            raise TypeError(f"mask_prompts hold a {kind}. {wanted}")
        if masks.ndim != 3 or 0 in masks.shape:
            raise ValueError(f"mask_prompts have shape {tuple(masks.shape)}. {wanted} No side may be 0.")
        if len(masks) > MAX_REGIONS:
            raise ValueError(f"mask_prompts are {len(masks)} regions, more than {MAX_REGIONS}. {wanted}")
        check_area(masks.shape[2], masks.shape[1], what="mask prompt")
        if not np.isfinite(masks).all():
            raise ValueError(f"mask_prompts hold NaN or infinite values. {wanted} 0 is outside.")
        inside = torch.from_numpy(np.ascontiguousarray(masks != 0)).to(torch.uint8)[:, None]
        cells = F.interpolate(inside, size=self.region_grid, mode="nearest")[:, 0].bool()
        if unseen := (1 + (~cells.flatten(1).any(dim=1)).nonzero()[:, 0]).tolist():
            logger.warning_once(
                f"mask_prompts: regions {unseen} hold none of the {self.region_grid}x{self.region_grid} points at "
                "which regions are looked up, so the model sees nothing of them. Draw them larger, or crop the image."
            )
        return cells

    def resize_for_grounding(self, frames: Sequence[Image.Image]) -> Tensor:
        """T RGB frames of any sizes -> uint8 [T, 3, S, S], bicubic, aspect ratio not kept: what SAM 2 looks at."""
        return _resized(frames, self.grounding_image_size)

    def grounding_pixel_values(
        self,
        frames: Sequence[Image.Image | Tensor],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        is_video: bool = False,
    ) -> Tensor:
        """SAM 2's input [T, 3, S, S] of `dtype`: T RGB frames of any sizes, or what `resize_for_grounding` made.

        Normalised with ImageNet's constants as bfloat16 rounds them, which the released models were trained on. As
        there, an image is computed in `dtype` throughout, a video in float32 and rounded at the end.
        """
        is_resized = isinstance(next(iter(frames), None), Tensor)
        pixels = torch.cat(tuple(frames)) if is_resized else self.resize_for_grounding(frames)
        if device is not None and torch.device(device).type == "cuda" and pixels.device.type == "cpu":
            pixels = pixels.pin_memory().to(device, non_blocking=True)  # else it waits for what the GPU has yet to do
        pixels = pixels.to(device)
        return _normalized(pixels.to(torch.float32 if is_video else dtype), torch.bfloat16).to(dtype)

    def prepare(
        self,
        image: Any = None,
        video: Any = None,
        text: str | None = None,
        past_text: str | None = "",
        mask_prompts: Any = None,
        num_frames: int | None = None,
        frame_sampling: str | Sequence[int] | None = None,
    ) -> Sa2VAInputs:
        """Checks and prepares one call.

        Args:
            image: see `load_image`. At most one of `image` and `video` is given; with neither it is a text-only chat.
            video: see `open_video`.
            text: the user's words. A tag `<image>` says where the picture stands; without one it stands first.
            past_text: what the previous call returned, for the next turn. The same picture (and `mask_prompts`, if the
                conversation has some) is given again. A picture that it doesn't show is shown in this turn.
            mask_prompts: regions to talk about, see `preprocess_mask_prompts`; on a video, in its first key frame.
            num_frames, frame_sampling: see `select_key_frames`; None takes the processor's own.

        Raises:
            TypeError, ValueError, OSError: what was given, what is accepted and what to do.
        """
        past_text = "" if past_text is None else past_text
        _check_words(text, past_text, self._reserved_words, self._drops_tags)
        sampling = self._sampling(num_frames, frame_sampling)
        if image is None and video is None:
            _check_no_picture(text, past_text, mask_prompts, self.image_token)
            return self._tokenize(self.build_prompt(text, past_text=past_text))
        picture = self._prepare_picture(image, video, *sampling, mask_prompts)
        return self._tokenize(self._picture_prompt(text, past_text, picture), **picture)

    def _prepare_prompt(self, prompt: str, picture: dict[str, Any] | None) -> Sa2VAInputs:
        """A call whose words are a whole prompt, in which one token may stand for all of a picture."""
        needed = [] if picture is None else self._image_tokens_of(picture)
        if needed and self._pictures_in(prompt) == [1]:
            prompt = prompt.replace(self.picture_tokens([1]), self.picture_tokens(needed))
        if prompt.count(self.image_token) != sum(needed) or self._pictures_in(prompt) != needed:
            raise ValueError(
                f"text is a prompt with pictures of {self._pictures_in(prompt)} tokens, those of the picture given are "
                f"{needed or 'none'}. Give the image or video that the messages are about, and no other."
            )
        return self._tokenize(prompt, **(picture or {}))

    def _prepare_words(
        self, image: Any, video: Any, text: Any, past_text: Any, mask_prompts: Any, num_frames: Any, frame_sampling: Any
    ) -> Sa2VAInputs:
        """`prepare`, where `text` may also be a whole prompt, as `apply_chat_template` writes it."""
        head, tail = self.build_prompt("\0").split("\0")
        if not (isinstance(text, str) and text.startswith(head) and text.endswith(tail)):
            return self.prepare(image, video, text, past_text, mask_prompts, num_frames, frame_sampling)
        _check_is_text("text", text)
        if past_text or mask_prompts is not None:
            raise ValueError("text is a whole prompt, so past_text and mask_prompts come too late. Give words alone.")
        sampling = self._sampling(num_frames, frame_sampling)
        has_picture = image is not None or video is not None
        return self._prepare_prompt(text, self._prepare_picture(image, video, *sampling) if has_picture else None)

    def _sampling(self, num_frames: Any, frame_sampling: Any) -> tuple[int, str | list[int]]:
        """How a call chooses frames, else this processor."""
        num_frames = self.num_key_frames if num_frames is None else num_frames
        frame_sampling = self.frame_sampling if frame_sampling is None else frame_sampling
        return num_frames, _checked_sampling(num_frames, frame_sampling)

    def _prepare_picture(
        self,
        image: Any,
        video: Any,
        num_frames: int,
        frame_sampling: str | list[int],
        mask_prompts: Any = None,
    ) -> dict[str, Any]:
        """The fields of `Sa2VAInputs` that don't depend on the words."""
        if image is not None and video is not None:
            raise ValueError("Both image and video are given. Give one of them.")
        is_video = video is not None
        frames = _frames_of(video) if is_video else _frame_of(load_image(image))
        masks = None if mask_prompts is None else self.preprocess_mask_prompts(mask_prompts)
        first, shown = _read_key_frames(frames, num_frames, frame_sampling if is_video else "first")
        images = list(shown.values())
        return {
            **self.preprocess_picture(images, is_video),
            "prompt_masks": masks,
            "frames": frames,
            "key_frames": list(shown),
            "is_video": is_video,
            "size": (first.height, first.width),
            "key_images": images if is_video else [],
        }

    def preprocess_picture(self, pictures: Sequence[Image.Image], is_video: bool) -> dict[str, Tensor]:
        """What the vision tower reads of an image (one picture) or of a video's key frames, by its name in a call."""
        pixels = self.preprocess_key_frames(pictures) if is_video else self.preprocess_image(pictures[0])
        return {"pixel_values": pixels}

    def _image_tokens_of(self, picture: Mapping[str, Any]) -> list[int]:
        return self.image_tokens(len(picture["pixel_values"]), picture["is_video"])

    def _picture_prompt(self, text: str, past_text: str, picture: Mapping[str, Any]) -> str:
        image_tokens, masks = self._image_tokens_of(picture), picture["prompt_masks"]
        regions = None if masks is None else masks.flatten(1).sum(1).tolist()
        self._check_past_picture(past_text, image_tokens, regions)
        return self.build_prompt(text, image_tokens=image_tokens, region_tokens=regions, past_text=past_text)

    def _pictures_in(self, text: str) -> list[int]:
        return [count for count in _token_counts(text, self.image_start, self.image_token, self.image_end) if count]

    def _regions_in(self, text: str) -> list[int]:
        known = REGION_START in self._reserved_words
        return _token_counts(text, REGION_START, self.image_token, REGION_END) if known else []

    def _check_past_picture(self, past_text: str, given: list[int], given_regions: list[int] | None) -> None:
        """What earlier turns show must be what is given now: its features take the place of their tokens."""
        shown, regions = self._pictures_in(past_text), self._regions_in(past_text)
        if not shown and IMAGE_TAG in past_text:
            raise ValueError(
                f"past_text holds {IMAGE_TAG}, where it should show the picture. Give it as the previous call returned "
                "it, or start anew with past_text=''."
            )
        if past_text.count(self.image_token) != sum(shown) + sum(regions):
            raise ValueError("past_text is cut inside a picture. Give it as the previous call returned it, unchanged.")
        if shown and shown != given:
            raise ValueError(
                f"past_text shows a picture of {shown} tokens, the one given takes {given}. Give the image or video "
                "(and num_frames, frame_sampling) of the previous turn again, or start anew with past_text=''."
            )
        if regions and regions != given_regions:
            raise ValueError(
                f"past_text names regions of {regions} tokens, mask_prompts give {given_regions}. Give the "
                "mask_prompts of the previous turn again, or start anew with past_text=''."
            )

    def _tokenize(self, prompt: str, **picture: Any) -> Sa2VAInputs:
        """The call of a whole prompt. A run of image tokens, often thousands, is tokenized as one and then repeated."""
        run = re.compile(f"(?:{re.escape(self.image_token)})+")
        repeats = [len(found) // len(self.image_token) for found in run.findall(prompt)]
        encoded = self.tokenizer(run.sub(lambda _: self.image_token, prompt), return_tensors="pt")
        image_token_id = self.image_token_id
        places = [place for place, token_id in enumerate(encoded.input_ids[0].tolist()) if token_id == image_token_id]
        if len(places) != len(repeats):
            raise ValueError(f"{self.image_token} is not one token of this tokenizer. Use the checkpoint's own.")
        times = torch.ones_like(encoded.input_ids[0])
        times[places] = times.new_tensor(repeats)
        input_ids, mask = (x.repeat_interleave(times, dim=1) for x in (encoded.input_ids, encoded.attention_mask))
        return Sa2VAInputs(prompt, input_ids, mask, **picture)

    def __call__(
        self,
        images: Any = None,
        text: str | list[str] | None = None,
        videos: Any = None,
        past_text: str | None = "",
        mask_prompts: Any = None,
        num_frames: int | None = None,
        frame_sampling: str | Sequence[int] | None = None,
        return_tensors: str | None = None,
        padding: bool | str = True,
        padding_side: str = "left",
        audio: None = None,
        **unknown: Any,
    ) -> BatchFeature:
        """`prepare` in the manner of transformers: the arguments of the model's `generate` and `forward`.

        A list of texts is a batch, be it of one, with as many images, videos, `past_text` and `mask_prompts`, each in a
        list that may hold None. Masks come from the model's `predict_*`, which prepare by themselves.

        Args:
            images: one image, or a list with one for each text.
            text: the user's words, or a list of them. Also a whole prompt that `apply_chat_template` wrote.
            videos: one video (a list is taken for its frames); in a batch a list of videos.
            past_text, mask_prompts, num_frames, frame_sampling: see `prepare`; the last two are the same for all.
            return_tensors: "pt" (also None), or "np", which the model does not take.
            padding: True or "longest" fills shorter texts up; False refuses a batch that would need it.
            padding_side: "left" to `generate`, "right" for `forward`.
            audio: None, as transformers' pipelines pass it.
            **unknown: whatever else transformers' processors take must be None. Prompts are never cut (`truncation`),
                since that would cut their picture.

        Returns:
            `input_ids`, `attention_mask` and what there is of `pixel_values`, `image_grid_thw`, `prompt_masks`,
            `prompt_mask_tiles`: see `collate_inputs`.

        Raises:
            TypeError, ValueError, OSError: see `prepare`.
            ValueError: not as many of something as texts, texts of different lengths that may not be padded, or
                another kind of padding.
        """
        if given := sorted(name for name, value in unknown.items() if value is not None):
            accepted = "images, text, videos, past_text, mask_prompts, num_frames, frame_sampling, return_tensors"
            raise TypeError(f"A call has no {given}: it takes {accepted}, padding and padding_side.")
        if padding not in (True, False, "longest") or padding_side not in ("left", "right"):
            raise ValueError(f"{padding=}, {padding_side=}: padding is True or False, on the 'left' or 'right'.")
        if audio is not None:
            raise ValueError("audio is not supported. Leave it out.")
        shared = {"num_frames": num_frames, "frame_sampling": frame_sampling}
        given = {"images": images, "videos": videos, "past_text": past_text, "mask_prompts": mask_prompts}
        if isinstance(text, list | tuple):
            samples = _as_samples(text, **given)
            inputs = list(prepare_samples(self._prepare_words, samples, "text", **shared))
        else:
            one = _one_image(images), _one_video(videos), text, past_text, mask_prompts
            inputs = [self._prepare_words(*one, **shared)]
        lengths = {x.input_ids.shape[1] for x in inputs}
        if len(lengths) > 1 and not padding:
            raise ValueError(f"Texts of {sorted(lengths)} tokens need padding=True to make one batch.")
        return BatchFeature(collate_inputs(inputs, self.pad_token_id, padding_side), tensor_type=return_tensors)

    def apply_chat_template(
        self,
        conversation: Sequence[Any],
        *,
        tokenize: bool = False,
        return_dict: bool = False,
        add_generation_prompt: bool = True,
        num_frames: int | None = None,
        frame_sampling: str | Sequence[int] | None = None,
        processor_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> BatchFeature | Tensor | str | list[str]:
        """Conversations as other models of transformers take them, written as `predict_forward` writes them.

        Args:
            conversation: messages {"role": "user" or "assistant", "content": words or a list of parts}, in turns, the
                last one the user's; or a list of such conversations, which is a batch. Parts are {"type": "text",
                "text": words} and, in one turn of the user, {"type": "image" or "video", "image", "video", "path" or
                "url": see `load_image`, `open_video`}. Texts are joined as they are; a picture behind one stands
                there (around Qwen-VL it always stands first).
            tokenize: True gives what a call of the processor does, False the prompts, which a call takes as `text`
                together with the pictures. Messages for them need not hold what a part shows: {"type": "image"} is one
                token there, and becomes as many as the picture takes.
            return_dict: False gives the `input_ids` alone.
            add_generation_prompt: always True: a prompt ends where the answer begins.
            num_frames, frame_sampling: see `prepare`.
            processor_kwargs: more arguments of a call, as transformers' pipelines give them.
            **kwargs: other arguments of a call: `return_tensors`, `padding`, `padding_side`. What changes templates
                (`chat_template`, `tools`, `documents`, `continue_final_message`, `return_assistant_tokens_mask`) must
                be None or False: the words around a question are those that the checkpoint was trained with.

        Raises:
            TypeError, ValueError, OSError: no such conversation; see also `prepare`.
        """
        is_list = isinstance(conversation, list | tuple)
        is_one = is_list and (not conversation or isinstance(conversation[0], Mapping))
        conversations = [conversation] if is_one else conversation
        if not is_list or not all(isinstance(turns, list | tuple) for turns in conversations):
            raise TypeError(
                f"A conversation is a list of messages, or a list of such lists; got {conversation!r:.100}."
            )
        if changed := [name for name in _TEMPLATE_ARGUMENTS if kwargs.pop(name, None)]:
            raise ValueError(f"{changed} must be left out: checkpoints were trained with one way of asking.")
        if not add_generation_prompt:
            raise ValueError("Prompts end where the answer begins: leave add_generation_prompt=False out.")
        kwargs |= {"num_frames": num_frames, "frame_sampling": frame_sampling, **(processor_kwargs or {})}
        sampling = {name: kwargs.pop(name) for name in ("num_frames", "frame_sampling")}
        if unknown := sorted(kwargs.keys() - {"return_tensors", "padding", "padding_side"}):
            accepted = "return_tensors, padding, padding_side, num_frames and frame_sampling"
            raise TypeError(f"A call has no {unknown}: it takes {accepted}.")
        asked = [self._last_question(turns, not tokenize, **sampling) for turns in conversations]
        if not tokenize:
            prompts = [self._prompt_of(question, **sampling) for question in asked]
            return prompts[0] if is_one else prompts
        images, videos, texts, past = ([q[name] for q in asked] for name in ("image", "video", "text", "past_text"))
        batch = self(images, texts, videos, past, **sampling, **kwargs)
        return batch if return_dict else batch["input_ids"]

    def _prompt_of(self, question: Mapping[str, Any], **sampling: Any) -> str:
        """The prompt that `prepare` makes of its arguments; a picture that is yet to come is one token."""
        if not any(question[kind] is _TO_COME for kind in ("image", "video")):
            return self.prepare(**question, **sampling).prompt
        _check_words(question["text"], question["past_text"], self._reserved_words, self._drops_tags)
        return self.build_prompt(question["text"], image_tokens=[1], past_text=question["past_text"])

    def _last_question(
        self, conversation: Sequence[Mapping[str, Any]], may_come: bool, **sampling: Any
    ) -> dict[str, Any]:
        """The last turn of a conversation as arguments of `prepare`, the others as its `past_text`.

        If it `may_come` later, what a part does not show is `_TO_COME`.
        """
        question: dict[str, Any] = {"image": None, "video": None, "past_text": ""}
        for number, message in enumerate(conversation):
            role = ("user", "assistant")[number % 2]
            if not isinstance(message, Mapping) or message.get("role") != role:
                given = message.get("role") if isinstance(message, Mapping) else message
                raise ValueError(f"Message {number} is of {given!r}; user and assistant take turns, the user begins.")
            parts = _parts_of(message.get("content"), may_come)
            words = parts.pop("text")
            if role == "user":
                if len(parts) + sum(question[kind] is not None for kind in ("image", "video")) > 1:
                    raise ValueError("A conversation is about one image or one video.")
                once = {"image": load_image, "video": open_video}  # every turn looks at it again
                shown = {k: given if given is _TO_COME else once[k](given) for k, given in parts.items()}
                question |= {"text": words, **shown}
            elif parts:
                raise ValueError(f"Message {number}, of the assistant, holds {sorted(parts)}. Answers are words.")
            else:
                prompt = self._prompt_of(question, **sampling)
                if (ended := words.rstrip("\n")).endswith(self.stop_words):
                    words = ended
                question["past_text"] = f"{prompt}{words}{self.missing_end(words)}\n"
        if len(conversation) % 2 == 0:
            raise ValueError("A conversation ends with what the user asks.")
        return question

    def missing_end(self, answer: str) -> str:
        """The end mark that an answer lacks, or ""."""
        return "" if answer.endswith(self.stop_words) else self.stop_words[0]

    @property
    def image_token_id(self) -> int | None:
        """The token in whose places the features of a picture are put; None if the tokenizer lacks it."""
        return find_token(self.tokenizer, self.image_token)

    @property
    def pad_token_id(self) -> int:
        """The token that fills up shorter texts of a batch: the tokenizer's own, else its end mark, else 0."""
        known = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        return next(token_id for token_id in known if token_id is not None)

    def resize_logits(self, logits: Tensor, size: tuple[int, int], two_steps: bool = True) -> Tensor:
        """Mask logits [N, 1, s, s] -> float32 [N, h, w] for size (h, w).

        Bilinear in two steps, by way of SAM 2's input size, as the released models do; or in one, as Sa2VA-i does with
        the masks of prompted frames.
        """
        logits = logits.float()
        if two_steps:
            logits = F.interpolate(logits, size=self.grounding_image_size, mode="bilinear", align_corners=False)
        if logits.shape[-2:] != tuple(size):  # else it would be a copy
            logits = F.interpolate(logits, size=tuple(size), mode="bilinear", align_corners=False)
        return logits[:, 0]

    def binarize(self, logits: Tensor, mask_threshold: float = 0.5) -> Tensor:
        """Logits of any shape -> bool: probability above `mask_threshold`.

        Raises:
            ValueError: `mask_threshold` is not between 0 and 1.
        """
        if not 0 < mask_threshold < 1:
            raise ValueError(f"mask_threshold={mask_threshold} is a probability: give a number between 0 and 1.")
        return logits.sigmoid() > mask_threshold

    def decode_continuation(self, prompt_ids: Tensor, new_ids: Tensor) -> str:
        """Text of generated tokens that, put behind the prompt, is tokenized to the same ids again.

        `decode` alone may not give that: InternLM2's tokenizer drops a space in front of the first word and adds some
        around special tokens.

        Args:
            prompt_ids: int64 [1, L].
            new_ids: int64 [n], what followed.
        """
        last = prompt_ids[0, -1:].tolist()
        exactly = {"skip_special_tokens": False, "spaces_between_special_tokens": False}
        whole = self.tokenizer.decode(last + new_ids.tolist(), **exactly)
        return whole.removeprefix(self.tokenizer.decode(last, **exactly))

    def phrases(self, prediction: str) -> list[str]:
        """What each `[SEG]` of an answer stands for.

        It is the `<p> phrase </p>` right before it, which neighbouring `[SEG]` share, else the sentence that it stands
        in (or follows, if that has no words), without special tokens; "" if there are no words.
        """
        return [_phrase_at(prediction, match.start()) for match in re.finditer(re.escape(SEG_TOKEN), prediction)]


class Sa2VAProcessorQwen(Sa2VAProcessor):
    """The processor around Qwen2.5-VL or Qwen3-VL: transformers' image processor and the checkpoint's template.

    A picture is resized twice, as released: to multiples of 28 by Pillow (what `qwen_vl_utils` does while reading it,
    for both families), then by the image processor, within `min_pixels` and `max_pixels`. Key frames of a video are
    shown as pictures one after the other. The picture always stands first.

    Args:
        image_processor: transformers' `Qwen2VLImageProcessor`.
        tokenizer: the checkpoint's tokenizer.
        grounding_image_size, num_key_frames, frame_sampling: as for `Sa2VAProcessor`.
        min_pixels, max_pixels: area that the image processor resizes every picture to.
        chat_template: the checkpoint's; default is the tokenizer's.

    What `Sa2VAProcessor` says of tiles and regions (`image_tokens`, `region_grid`, `preprocess_image`,
    `preprocess_key_frames`, `preprocess_mask_prompts`) is not for this family.

    Raises:
        ValueError: unknown sampling, or there is no chat template.
    """

    image_start, image_token, image_end = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"
    _reserved_words = (image_start, image_token, image_end)
    stop_words = ("<|im_end|>",)
    _between_blocks = ""
    _drops_tags = True

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        grounding_image_size: int = 1024,
        num_key_frames: int = 5,
        frame_sampling: str | Sequence[int] = "first",
        min_pixels: int = 512 * 28 * 28,
        max_pixels: int = 2048 * 28 * 28,
        chat_template: str | None = None,
        **kwargs,
    ):
        self.frame_sampling = _checked_sampling(num_key_frames, frame_sampling)
        _check_sides(grounding_image_size=grounding_image_size)
        if not 1 <= _as_integer(min_pixels, "min_pixels") <= _as_integer(max_pixels, "max_pixels") <= MAX_IMAGE_PIXELS:
            raise ValueError(f"Pixels from {min_pixels} to {max_pixels}: need 1 <= min <= max <= {MAX_IMAGE_PIXELS}.")
        self.grounding_image_size = grounding_image_size
        self.num_key_frames = num_key_frames
        self.min_pixels = min_pixels
        self.max_pixels = max_pixels
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template, **kwargs)
        if not (self.chat_template or getattr(self.tokenizer, "chat_template", None)):
            raise ValueError("This checkpoint has no chat template. Put its chat_template.jinja beside the tokenizer.")

    @staticmethod
    def _settings_of(config: Sa2VAChatConfig) -> dict[str, Any]:
        grounding = config.grounding_config
        return {
            "grounding_image_size": grounding.image_size,
            "num_key_frames": grounding.num_key_frames,
            "frame_sampling": grounding.frame_sampling,
        }

    @property
    def model_input_names(self) -> list[str]:
        """Keys of what a call returns."""
        return ["input_ids", "attention_mask", "pixel_values", "image_grid_thw"]

    def preprocess_picture(self, pictures: Sequence[Image.Image], is_video: bool) -> dict[str, Tensor]:
        """RGB pictures -> `pixel_values` float32 [patches, values] and `image_grid_thw` int64 [pictures, 3].

        Raises:
            ValueError: a picture is more than 200 times longer than wide.
        """
        read = [picture.resize(_qwen_size(*picture.size), Image.Resampling.BICUBIC) for picture in pictures]
        limits = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        encoded = self.image_processor(images=read, size=limits, return_tensors="pt")
        return {"pixel_values": encoded["pixel_values"], "image_grid_thw": encoded["image_grid_thw"]}

    def _image_tokens_of(self, picture: Mapping[str, Any]) -> list[int]:
        return (picture["image_grid_thw"].prod(dim=-1) // self.image_processor.merge_size**2).tolist()

    def build_prompt(
        self,
        text: str,
        *,
        image_tokens: Sequence[int] | None = None,
        region_tokens: Sequence[int] | None = None,
        past_text: str = "",
    ) -> str:
        """Writes the conversation up to where the answer begins, by the checkpoint's chat template.

        If `past_text` shows the picture already, it isn't shown again. A `past_text` without turns is taken for words
        that stand before `text`, as released.

        Args:
            text: the user's words; their `<image>` tag is dropped.
            image_tokens: tokens of each picture; None without one.
            region_tokens: must be None, see `preprocess_mask_prompts`.
            past_text: earlier turns, verbatim, image tokens expanded.
        """
        goes_on = _TURN in past_text
        words = text.replace(IMAGE_TAG, "")
        shown = [] if image_tokens is None or self._pictures_in(past_text) else image_tokens
        turn = self._turn(words if goes_on else past_text + words, len(shown), first=not goes_on)
        turn = turn.replace(self.picture_tokens([1] * len(shown)), self.picture_tokens(shown), 1) if shown else turn
        return past_text + turn if goes_on else turn

    def _turn(self, words: str, num_pictures: int, first: bool) -> str:
        """The template's text of one turn of the user; only the first has what the template says before it."""
        content = [{"type": "image"}] * num_pictures + [{"type": "text", "text": words}]
        turn = {"role": "user", "content": content}
        if first:
            return self._render([turn], add_generation_prompt=True)
        before = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        whole = self._render([*before, turn], add_generation_prompt=True)
        # A question follows here too: some templates write a last answer in another way than earlier ones.
        said = self._render([*before, {"role": "user", "content": ""}])
        return whole.removeprefix(said[: said.rindex(_TURN)])

    def _render(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        template = self.chat_template or self.tokenizer.chat_template
        return self.tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **kwargs)

    def preprocess_mask_prompts(self, mask_prompts: Any) -> Tensor:
        """Not for this family.

        Raises:
            ValueError: always. These checkpoints never saw `<vp>` regions in training, so that any way of showing
                them one would be a guess; the released code drops the masks without a word.
        """
        raise ValueError(
            "mask_prompts need a checkpoint of the InternVL family (Sa2VA-1B, -4B, -8B, -26B, -InternVL3-*): those "
            "around Qwen-VL were not trained on regions. Crop the picture to the region, or drop mask_prompts."
        )


def _qwen_size(width: int, height: int, factor: int = 28) -> tuple[int, int]:
    """Width and height, multiples of `factor`, at which `qwen_vl_utils` reads a picture: 4 to 16384 cells in area."""
    least, most = 4 * factor**2, 16384 * factor**2
    sides = [max(factor, round(side / factor) * factor) for side in (width, height)]
    area = sides[0] * sides[1]
    if area > most:  # divided, below multiplied: where a side falls on a multiple, the last bit decides
        scale = math.sqrt(width * height / most)
        sides = [max(factor, math.floor(side / scale / factor) * factor) for side in (width, height)]
    elif area < least:
        scale = math.sqrt(least / (width * height))
        sides = [math.ceil(side * scale / factor) * factor for side in (width, height)]
    if any(max(read) > 200 * min(read) for read in ((width, height), sides)):
        raise ValueError(
            f"The picture is {width}x{height}. Qwen-VL reads sides of at most 200 to 1: crop it, or use a checkpoint "
            "of the InternVL family."
        )
    return sides[0], sides[1]


_SHARED_PHRASE = re.compile(r"<p>((?:(?!<p>|</p>).)*)</p>(?:\s|,|;|&|\band\b|\[SEG\])*$", re.DOTALL)
_WIDE_STOPS = "\u3002\uff01\uff1f"  # full stop, exclamation and question mark of Chinese and Japanese
_ABBREVIATIONS = ("Mr", "Mrs", "Ms", "Dr", "Prof", "St", "Jr", "Sr", "vs", "e.g", "i.e", "approx")  # end no sentence
_NOT_ABBREVIATED = "".join(rf"(?<!\b{re.escape(word)}\.)" for word in _ABBREVIATIONS)
_SENTENCE_END = re.compile(rf"(?<=[.!?]){_NOT_ABBREVIATED}\s+|(?<=[{_WIDE_STOPS}])|\n")
_SPECIAL_TOKEN = re.compile(r"<\|[^<>|]*\|>|\[SEG\]|</?[A-Za-z_]+>")


def _phrase_at(prediction: str, position: int) -> str:
    """The words that the `[SEG]` at this position belongs to."""
    if shared := _SHARED_PHRASE.search(prediction[:position]):
        return _plain_words(shared[1])
    starts = [0, *(match.end() for match in _SENTENCE_END.finditer(prediction)), len(prediction)]
    sentences = [prediction[start:end] for start, end in itertools.pairwise(starts) if start <= position]
    return next(filter(None, map(_plain_words, reversed(sentences))), "")


def _plain_words(text: str) -> str:
    text = re.sub(r"\s+", " ", _SPECIAL_TOKEN.sub(" ", text))
    return re.sub(r" (?=[,.;:!?])", "", text).strip(f" ,.;:!?{_WIDE_STOPS}")


# ---------------------------------------------------------------------------------------------------------- saving

_WEIGHT_FILE = re.compile(
    r"model(\.[^.]+?)?(-\d{8})?(-\d{5}-of-\d{5})?\.safetensors|model\.safetensors\.index(\.[^.]+)?\.json"
)


@contextmanager
def replacing_files(folder: str | os.PathLike) -> Iterator[Path]:
    """A folder to save into, whose files move to `folder` when the block has ended without an error.

    A process that is killed leaves the old weights or the new, never a mixture, and no half file. Files are replaced
    one by one, weights after the rest; shards get names that no older ones have, and one last step makes the new
    weights, or their variant, those that are read: `model.safetensors` or the index. Right before it config.json is
    replaced: only a model of another shape, saved over another by a process that dies between the two, leaves a folder
    that doesn't load. What a killed process leaves behind, `.saving-*`, may be deleted. While saving, the disk holds
    both.

    Raises:
        NotADirectoryError: `folder` is a file.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file. Name a folder to save into.")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".saving-", dir=folder) as temporary:
        yield Path(temporary)
        _publish(Path(temporary), folder)


def _publish(new: Path, folder: Path) -> None:
    """Moves a finished save into place, and removes the weights that it replaces."""
    variants = {variant for path in new.iterdir() if (variant := _variant_of(path.name)) is not None}
    order = [name for variant in variants for name in _names_of_weights(variant)]
    for name in order:
        if name.endswith(".json") and (new / name).exists():
            _rename_shards(new / name, folder)
    files = [path.relative_to(new) for path in new.rglob("*") if path.is_file()]
    # The config last but for what makes the weights current: so close that hardly anything ends a process between them.
    for file in sorted(files, key=lambda f: (str(f) in order, str(f) == CONFIG_NAME, f.suffix == ".safetensors")):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (new / file).replace(folder / file)
    names = {str(file) for file in files}
    if names.isdisjoint(order):
        return  # an adapter or a processor
    # A single file is what readers prefer to an index, so it goes first.
    stale = {path.name for path in folder.iterdir() if _variant_of(path.name) in variants} - names
    for name in sorted(stale, key=lambda name: order.index(name) if name in order else len(order)):
        (folder / name).unlink()


def _variant_of(name: str) -> str | None:
    """Of the name of a file with weights, or their index, the variant: "" if it has none; None of other files."""
    found = _WEIGHT_FILE.fullmatch(name)
    return None if found is None else (found[1] or found[4] or "")


def _names_of_weights(variant: str) -> tuple[str, str]:
    """The file, and the index, that make weights of a variant, such as ".fp16", those that are read."""
    return f"model{variant}.safetensors", f"model.safetensors.index{variant}.json"


def _rename_shards(index: Path, folder: Path) -> None:
    """Gives the shards of an index names of their own if `folder` has some of the same names."""
    values = json.loads(index.read_text(encoding="utf-8"))
    shards = sorted(set(values["weight_map"].values()))
    if not any((folder / shard).exists() for shard in shards):
        return
    number = f"{secrets.randbelow(10**8):08d}"
    own = {shard: re.sub(r"-(?=\d{5}-of-)", f"-{number}-", shard) for shard in shards}
    for shard, name in own.items():
        (index.parent / shard).rename(index.parent / name)
    values["weight_map"] = {key: own[shard] for key, shard in values["weight_map"].items()}
    index.write_text(json.dumps(values, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------- masks to be kept


def coco_masks() -> ModuleType:
    """`pycocotools.mask`.

    Raises:
        ImportError: it is not installed.
    """
    try:
        from pycocotools import mask  # guarded, or transformers would demand it before it loads this file
    except ImportError as error:
        raise ImportError("Run-length encoding needs pycocotools: pip install pycocotools") from error
    return mask


def masks_to_rle(masks: np.ndarray | Tensor) -> list[dict[str, Any]]:
    """One object's masks, bool [T, h, w] -> COCO run-length encodings, which JSON can hold.

    Returns:
        For every frame {"size": [h, w], "counts": str}, as pycocotools reads it.

    Raises:
        ValueError: not bool, or not three axes.
    """
    coco = coco_masks()
    pixels = _as_bool_masks(masks).transpose(1, 2, 0).astype(np.uint8, order="F")
    encoded = coco.encode(pixels) if pixels.shape[2] else []
    return [{**rle, "counts": rle["counts"].decode("ascii")} for rle in encoded]


def rle_to_masks(rles: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """Inverse of `masks_to_rle`: bool [T, h, w]; no encodings give [0, 0, 0].

    Raises:
        ValueError: the masks differ in size, or an encoding is damaged.
    """
    masks = [decode_rle(rle) for rle in rles]
    if len({mask.shape for mask in masks}) > 1:
        raise ValueError("The run-length encoded masks differ in size. Decode frames of one size at a time.")
    return np.stack(masks) if masks else np.zeros((0, 0, 0), dtype=bool)


def decode_rle(rle: Mapping[str, Any]) -> np.ndarray:
    """The mask, bool [h, w], of one run-length encoding as COCO has it.

    Args:
        rle: "size" [h, w] and "counts", compressed (text or bytes) or as a list of numbers.

    Raises:
        ValueError: another thing, or run lengths that don't fill the size. (pycocotools believes what it is given, and
            reads and writes outside its memory where run lengths are cut off.)
    """
    coco = coco_masks()
    try:
        height, width = map(_as_count, rle["size"])
        counts = rle["counts"]
        check_area(width, height, what="mask")
        is_text = isinstance(counts, str | bytes)
        lengths = _run_lengths(counts) if is_text else np.array([*map(_as_count, counts)], dtype=np.int64)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError('A run-length encoded mask is {"size": [h, w], "counts": text or list}, not this.') from error
    is_possible = len(lengths) and 0 <= lengths.min() <= lengths.max() <= height * width  # else the sum may overflow
    if not is_possible or lengths.sum() != height * width:
        raise ValueError(
            f"Run lengths must be >= 0 and add up to {height}x{width} = {height * width}, not {lengths.sum()}."
        )
    plain = {"size": [height, width], "counts": counts if is_text else lengths.tolist()}
    return coco.decode(plain if is_text else coco.frPyObjects(plain, height, width)) > 0


def _as_count(value: Any) -> int:
    """An integer, also one that a tool wrote as 2.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else as_index(value)


def _run_lengths(counts: str | bytes) -> np.ndarray:
    """Compressed run lengths as int64 [runs], as rleFrString of COCO's maskApi.c reads them.

    A character holds five bits, least first, and whether more follow; behind the third, numbers are differences to the
    one two before.
    """
    # Half a character becomes bytes, too, which are refused like all others that COCO's code never writes.
    data = counts.encode(errors="surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(data, dtype=np.uint8).astype(np.int64) - 48
    if not len(codes) or codes.min() < 0 or codes.max() > 63 or codes[-1] & 32:
        raise ValueError(f"The run lengths {counts[:40]!r}... are cut off, or were never compressed by COCO's code.")
    ends = np.flatnonzero(codes & 32 == 0)
    starts = np.concatenate([[0], ends[:-1] + 1])
    place = np.arange(len(codes)) - np.repeat(starts, ends - starts + 1)
    if place.max() > 6:
        raise ValueError(f"The run lengths {counts[:40]!r}... hold a number beyond any mask.")
    lengths = np.add.reduceat((codes & 31) << 5 * place, starts)
    lengths -= np.where(codes[ends] & 16, 1 << 5 * (place[ends] + 1), 0)  # the sign
    for first in (1, 2):
        lengths[first::2] = lengths[first::2].cumsum()
    return lengths


def _as_bool_masks(masks: np.ndarray | Tensor) -> np.ndarray:
    if isinstance(masks, list | tuple) and len(sizes := set(map(np.shape, masks))) > 1:
        raise ValueError(f"Masks must have one size, got {sorted(sizes)}. Give those of each in a call of its own.")
    masks = np.asarray(_as_numpy(masks))
    if masks.dtype != np.bool_ or masks.ndim != 3:
        raise ValueError(f"Masks must be bool [N, height, width], got {masks.dtype} of shape {masks.shape}.")
    return masks


_MOST_LETTERS = 500  # of a label, more than fit into a picture
_NO_LETTER = "\U0010ffff"  # for which fonts draw what they draw for letters that they lack
_SYSTEM_FONTS = (  # Pillow looks for them where Linux, macOS and Windows keep fonts
    *("NotoSansCJK-Regular.ttc", "NotoSans-Regular.ttf", "wqy-microhei.ttc", "DejaVuSans.ttf"),
    *("PingFang.ttc", "Arial Unicode.ttf", "msyh.ttc", "malgun.ttf", "segoeui.ttf"),
)


def object_color(index: int) -> tuple[int, int, int]:
    """RGB colour (0..255) of an object: hues a golden ratio apart, so that objects near in number look different."""
    hue = (0.02 + index * 0.6180339887) % 1.0
    red, green, blue = colorsys.hsv_to_rgb(hue, 0.8, (1.0, 0.8, 0.9)[index % 3])
    return round(255 * red), round(255 * green), round(255 * blue)


def draw_overlay(
    image: Any, masks: np.ndarray | Tensor, phrases: Sequence[str] | None = None, alpha: float = 0.5
) -> np.ndarray:
    """Paints objects over a picture: a colour and a contour each, and a label with its phrase, inside the picture.

    Args:
        image: see `load_image`; h x w pixels.
        masks: bool [N, h, w]. A mask without pixels gets no label.
        phrases: N labels, or None. Letters that Pillow's font lacks are written in one of the system's; an object's
            number, from 1, stands for a phrase that none of those can write.
        alpha: opacity of the colour, 0..1.

    Returns:
        uint8 [h, w, 3], RGB.

    Raises:
        ValueError: masks that are not bool [N, h, w], not N phrases, or another `alpha`.
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha={alpha} is an opacity: give a number from 0 to 1.")
    picture, masks = load_image(image), _as_bool_masks(masks)
    if masks.shape[1:] != (picture.height, picture.width):
        raise ValueError(f"Masks are {masks.shape[1:]}, the picture is {(picture.height, picture.width)} (h, w).")
    labels = [""] * len(masks) if phrases is None else phrases
    is_list = not isinstance(labels, str)
    if not (is_list and len(labels) == len(masks) and all(isinstance(label, str) for label in labels)):
        raise ValueError(f"Phrases {phrases!r:.200} for {len(masks)} masks. Give a list with a string for each.")
    canvas = Image.fromarray(_paint(np.array(picture), masks, alpha))
    taken: list[tuple[int, int, int, int]] = []
    for index, phrase in enumerate(labels):
        if phrase.strip() and masks[index].any():
            label, size = " ".join(phrase[:_MOST_LETTERS].split()), max(11, round(min(canvas.size) / 30))
            if (font := _font_for(label, size)) is None:
                label, font = str(index + 1), ImageFont.load_default(size=size)
            _write_label(canvas, masks[index], label, font, object_color(index), taken)
    return np.array(canvas)


@lru_cache(maxsize=256)  # looking for fonts goes through folders, and every frame has the same labels
def _font_for(text: str, size: int) -> Any:
    """Pillow's own font, or one of the system's with letters that it lacks; None if no font has all of them."""
    for load in (ImageFont.load_default, *(partial(ImageFont.truetype, name) for name in _SYSTEM_FONTS)):
        try:
            font = load(size=size)
        except OSError:  # not installed
            continue
        missing = bytes(font.getmask(_NO_LETTER))
        if all(bytes(font.getmask(letter)) != missing for letter in set(text) - {" "}):
            return font
    return None


def _paint(pixels: np.ndarray, masks: np.ndarray, alpha: float) -> np.ndarray:
    """Tints each mask in a uint8 [h, w, 3] array and draws its contour, in place."""
    import cv2

    thickness = max(1, round(min(pixels.shape[:2]) / 300))
    for index, mask in enumerate(masks):
        color = object_color(index)
        pixels[mask] = np.rint((1 - alpha) * pixels[mask] + alpha * np.array(color)).astype(np.uint8)
        contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(pixels, contours, -1, color, thickness)
    return pixels


def _write_label(
    canvas: Image.Image, mask: np.ndarray, phrase: str, font: Any, color: tuple[int, int, int], taken: list
) -> None:
    """Writes a phrase above its object, moved and shortened to stay inside; nothing where no letter fits.

    `taken` lists the boxes (left, top, right, bottom) of earlier labels, which are avoided if there is room.
    """
    draw, pad = ImageDraw.Draw(canvas), 2
    phrase = _shorten(phrase, lambda words: draw.textlength(words, font=font) < canvas.width - 2 * pad)
    left, top, right, bottom = draw.textbbox((0, 0), phrase, font=font)
    width, height = round(right - left) + 2 * pad, round(bottom - top) + 2 * pad
    if not phrase or height > canvas.height or width > canvas.width:
        return
    rows, columns = np.nonzero(mask)
    x = min(int(columns.min()), canvas.width - width)
    lowest = canvas.height - height
    preferred = min(max(int(rows.min()) - height, 0), lowest)
    boxes = [(x, y, x + width - 1, y + height - 1) for y in range(preferred, lowest + 1)]
    box = next((box for box in boxes if not any(_overlap(box, other) for other in taken)), boxes[0])
    taken.append(box)
    draw.rectangle(box, fill=color)
    luminance = np.dot(color, (0.299, 0.587, 0.114))
    draw.text((x + pad - left, box[1] + pad - top), phrase, font=font, fill="black" if luminance > 140 else "white")


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] <= b[2] and b[0] <= a[2] and a[1] <= b[3] and b[1] <= a[3]


def _shorten(text: str, fits: Callable[[str], bool]) -> str:
    """The longest beginning of a text that fits, with dots if something is missing; "" if nothing does."""
    if fits(text):
        return text

    def cut(length: int) -> str:
        return text[:length].rstrip() + "..."

    length = bisect_left(range(1, len(text)), True, key=lambda length: not fits(cut(length)))
    return cut(length) if length else ""


__all__ = [
    "TEMPLATES",
    "InternLM2Tokenizer",
    "PromptTemplate",
    "ReadAhead",
    "Sa2VAInputs",
    "Sa2VAProcessor",
    "Sa2VAProcessorQwen",
    "VideoFrames",
    "check_area",
    "choose_tiling",
    "collate_inputs",
    "decode_rle",
    "draw_overlay",
    "find_token",
    "load_image",
    "masks_to_rle",
    "natural_order",
    "object_color",
    "open_video",
    "prepare_samples",
    "replacing_files",
    "rle_to_masks",
    "select_key_frames",
]

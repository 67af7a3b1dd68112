"""What every reader of a data set gives: pictures, conversations about them, and masks, none of it decoded yet.

* `Sample`       one picture or clip with its conversation, as `open_dataset(...)[index]` makes it
* `Media`        the picture or clip: files, read frame by frame when asked
* `ObjectMasks`  one object through the frames, each frame's mask still encoded
* `Polygons`, `PaintedPolygons`, `MaskFile`, COCO run lengths: the encodings; `decode_mask` is the way out of them
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from sa2va.processing_sa2va import CORRUPT_FILE_ERRORS, decode_rle, load_image, open_video

Size: TypeAlias = tuple[int, int]  # (h, w) in pixels

# ---------- pictures


@dataclass(frozen=True, eq=False)
class Media:
    """What is looked at. Nothing is read before `len` or `read`.

    Attributes:
        paths: one image; or the frames of a clip in order; or one video file (or folder of frames). None at all is a
            conversation without a picture.
        is_video: whether it is a clip; a clip may have a single frame.
        step: of a video file, only every `step`-th frame counts (SA-V labels every fourth).
        length: number of frames of a video file, where a data set knows it; without it, `len` reads to the end.
    """

    paths: tuple[Path, ...]
    is_video: bool = False
    step: int = 1
    length: int | None = None

    @property
    def is_file(self) -> bool:
        """Whether the frames have to be taken out of one video file."""
        return self.is_video and len(self.paths) == 1 and not _is_picture(self.paths[0])

    def __len__(self) -> int:
        """Number of frames: 1 for an image."""
        if not self.is_file:
            return len(self.paths)
        if self.length is not None:
            return self.length
        path, stat = self.paths[0], self.paths[0].stat()
        return -(-_count_frames(path, stat.st_size, stat.st_mtime_ns) // self.step)

    def __bool__(self) -> bool:
        """Whether there is a picture; a truth test must not count a file's frames."""
        return bool(self.paths)

    def read(self, indices: Sequence[int] | None = None) -> list[Image.Image]:
        """Decodes frames, and no others.

        Args:
            indices: their numbers from 0, in any order; None gives all.

        Returns:
            RGB pictures.

        Raises:
            OSError: a file is missing or can't be read.
            ValueError: there is no such frame.
        """
        if self.is_file:
            video = open_video(self.paths[0])
            return video.select(
                range(0, len(video), self.step) if indices is None else [i * self.step for i in indices]
            )
        wanted = range(len(self.paths)) if indices is None else indices
        if beyond := [index for index in wanted if not 0 <= index < len(self.paths)]:
            raise ValueError(f"There is no frame {beyond[0]}; there are {len(self.paths)}, numbered from 0.")
        return [load_image(self.paths[index]) for index in wanted]

    def size(self) -> Size:
        """Height and width of the first frame in pixels; errors as in `read`."""
        width, height = self.read([0])[0].size
        return height, width


@lru_cache(maxsize=100_000)
def _count_frames(path: Path, *version: int) -> int:
    """Number of frames of a video file (of this size and time), which is read to its end for that, once."""
    return len(open_video(path))


def _is_picture(path: Path) -> bool:
    return path.suffix.lower() in (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff")


# ---------- masks


@dataclass(frozen=True, eq=False)
class Polygons:
    """The area inside any of some polygons, filled as COCO does.

    Attributes:
        points: corners x0, y0, x1, y1, ... in pixels, of each polygon; three corners or more.
    """

    points: tuple[tuple[float, ...], ...]

    @classmethod
    def box(cls, left: float, top: float, right: float, bottom: float) -> "Polygons":
        """A rectangle; its right and bottom edges lie outside of it."""
        return cls(((left, top, right, top, right, bottom, left, bottom),))

    def decode(self, size: Size) -> np.ndarray:
        """Bool [h, w]; ValueError for a polygon of less than three corners."""
        from pycocotools import mask as coco

        if short := [len(points) for points in self.points if len(points) < 6 or len(points) % 2]:
            raise ValueError(f"A polygon is x0, y0, x1, y1, ... of 3 corners or more; got {short[0]} numbers.")
        if not self.points:
            return np.zeros(size, dtype=bool)
        return coco.decode(coco.merge(coco.frPyObjects([list(map(float, p)) for p in self.points], *size))).astype(bool)


@dataclass(frozen=True, eq=False)
class PaintedPolygons:
    """Labelled polygons painted one over the other, the largest first, as LISA (arXiv:2308.00692) reads ReasonSeg.

    Attributes:
        layers: label (1..255) and corners ((x, y), ...) of each polygon.
        label: the label whose pixels are the mask.
    """

    layers: tuple[tuple[int, tuple[tuple[float, float], ...]], ...]
    label: int = 1

    def decode(self, size: Size) -> np.ndarray:
        """Bool [h, w]."""
        painted = [self._paint(size, points) for _, points in self.layers]
        canvas = np.zeros(size, dtype=np.uint8)
        for index in np.argsort([int(mask.sum()) for mask in painted])[::-1]:
            canvas[painted[index]] = self.layers[index][0]
        return canvas == self.label

    @staticmethod
    def _paint(size: Size, points: Sequence[tuple[float, float]]) -> np.ndarray:
        """A polygon with its outline, as OpenCV draws it."""
        import cv2

        canvas = np.zeros(size, dtype=np.uint8)
        corners = np.array([points], dtype=np.int32)
        cv2.polylines(canvas, corners, True, 1, 1)
        cv2.fillPoly(canvas, corners, 1)
        return canvas.astype(bool)


@dataclass(frozen=True, eq=False)
class MaskFile:
    """A picture of labels, palette or grey.

    Attributes:
        path: a file without loss (PNG).
        value: palette index or grey value of the object; None takes all that is not black.
    """

    path: Path
    value: int | None = None

    def decode(self, size: Size) -> np.ndarray:
        """Bool [h, w]; ValueError for colours where a single value is sought, OSError for no readable picture."""
        try:
            with Image.open(self.path) as picture:
                has_colors = picture.mode in ("RGBA", "LA", "PA", "CMYK", *(("P",) if self.value is None else ()))
                labels = np.asarray(picture.convert("RGB") if has_colors else picture)
        except OSError:
            raise
        except CORRUPT_FILE_ERRORS as error:
            raise OSError(f"{str(self.path)!r} is no readable picture: {error}") from error
        if labels.ndim == 3 and self.value is not None:
            raise ValueError(f"{str(self.path)!r} holds colours; value {self.value} needs a palette or grey picture.")
        found = labels.any(-1) if labels.ndim == 3 else labels != 0 if self.value is None else labels == self.value
        return _of_size(found, size)


Encoded: TypeAlias = Polygons | PaintedPolygons | MaskFile | Mapping[str, Any]


def decode_mask(encoded: Encoded, size: Size) -> np.ndarray:
    """Decodes a mask.

    Args:
        encoded: one of the classes above, or a COCO dictionary of "size" [h, w] and "counts": run lengths as a list,
            or compressed as text or bytes.
        size: (h, w) of the picture.

    Returns:
        Bool [h, w].

    Raises:
        ValueError: an encoding that is broken or of another size.
        OSError: a mask file that can't be read.
    """
    return _of_size(decode_rle(encoded), size) if isinstance(encoded, Mapping) else encoded.decode(size)


def _of_size(mask: np.ndarray, size: Size) -> np.ndarray:
    if mask.shape != tuple(size):
        raise ValueError(f"The mask is {mask.shape[0]}x{mask.shape[1]} (h x w), its picture {size[0]}x{size[1]}.")
    return mask


@dataclass(frozen=True, eq=False)
class ObjectMasks:
    """One object through the frames.

    Attributes:
        frames: its mask in each frame that shows it, by the frame's number; one for each mask encoding above. Several
            encodings (a tuple) are joined: an expression may mean several objects at once.
        annotated: frames that were labelled at all; None is all of them.
    """

    frames: Mapping[int, Encoded | tuple[Encoded, ...]]
    annotated: frozenset[int] | None = None

    def read(self, indices: Sequence[int], size: Size) -> np.ndarray:
        """Decodes the masks of some frames.

        Args:
            indices: numbers of the frames.
            size: (h, w) of the frames.

        Returns:
            Bool [len(indices), h, w]; all False where the object is not visible (or nothing was annotated).

        Raises:
            ValueError, OSError: as in `decode_mask`.
        """
        masks = np.zeros((len(indices), *size), dtype=bool)
        for mask, index in zip(masks, indices, strict=True):
            encoded = self.frames.get(index, ())
            for part in encoded if isinstance(encoded, tuple) else (encoded,):
                mask |= decode_mask(part, size)
        return masks


def annotated_frames(objects: Sequence[ObjectMasks], length: int) -> list[int]:
    """Numbers of those of `length` frames in which all of some objects were labelled, in order."""
    marked = [thing.annotated for thing in objects if thing.annotated is not None]
    return sorted(frozenset(range(length)).intersection(*marked))


# ---------- conversations


@dataclass(frozen=True, eq=False)
class Turn:
    """One question and what is to be answered.

    Attributes:
        question: in words, without `<image>` tag.
        answer: what to learn, with one `[SEG]` for each of `objects`; None where a data set has masks only, or keeps
            even those to itself (then there are no objects).
        objects: what the answer points at; none where nothing fits the question or nothing is asked for.
    """

    question: str
    answer: str | None
    objects: tuple[ObjectMasks, ...] = ()


@dataclass(frozen=True, eq=False)
class Sample:
    """A picture or clip with its conversation.

    Attributes:
        id: unique and stable within its data set.
        media: what is looked at.
        turns: the conversation; in readers of referring expressions they do not depend on each other.
        regions: visual prompts, on frame 0.
        info: what metrics group by, such as "expression", "video", "kind"; each reader names its own.
    """

    id: str
    media: Media
    turns: tuple[Turn, ...]
    regions: tuple[ObjectMasks, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)


def resolve(root: str | os.PathLike, *parts: str) -> Path:
    """A path below `root`; `parts` that lead out of it are refused, as files from elsewhere can say anything.

    Raises:
        ValueError: an absolute part, or one with "..".
    """
    path = Path(root, *parts)
    if any(Path(part).is_absolute() or ".." in Path(part).parts for part in parts):
        raise ValueError(f"{'/'.join(parts)!r} must lie below the data set's folder: no absolute path, no '..'.")
    return path

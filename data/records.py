"""What the readers share: records with their place in a file, checked fields, safe ways to read files.

A reader is a list of records, found when a data set is opened, and a function that turns one of them into a `Sample`
when it is asked for. Whatever is wrong with a record comes out as a ValueError that begins with the record's place, so
the readers are the validators, too (`check.py` asks for every sample and lists the errors).
"""

import json
import os
import pickle
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .samples import Encoded, MaskFile, Polygons, Sample, resolve

FARTHEST = 100_000  # pixels; corners beyond are no places in a picture (and would exhaust COCO's filling)
# What bad data can lead to.
BROKEN = (ValueError, OSError, KeyError, IndexError, TypeError, AttributeError, OverflowError)


class Record(NamedTuple):
    """A part of a file: where it stands ("train.jsonl:7", "annotations.json[3]"), and what it says."""

    where: str
    data: Any


class Reader:
    """A lazy data set.

    Args:
        records: what there is; may read lazily itself.
        build: makes the sample of a record. Chance (which template, which expressions) comes from its generator alone.
        seed: names what chance does.
    """

    def __init__(
        self, records: Sequence[Record], build: Callable[[Record, np.random.Generator], Sample], seed: int = 0
    ) -> None:
        self.records, self.build, self.seed = records, build, seed

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> Sample:
        return self.at(index)

    def at(self, index: int, visit: int = 0) -> Sample:
        """Sample `index` as it looks when it comes for the `visit`-th time: other templates, other expressions.

        Raises:
            IndexError: an index beyond the length.
            ValueError: a broken record; the message begins with its place.
        """
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is outside 0..{len(self) - 1}.")
        record = self.records[index]
        with located(record.where):
            return self.build(record, np.random.default_rng([self.seed, index, visit]))


@contextmanager
def located(where: str) -> Iterator[None]:
    """Turns whatever broken data leads to into a ValueError that begins with `where`."""
    try:
        yield
    except BROKEN as error:
        detail = f"lacks {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{where}: {detail}") from error


def field(data: Any, name: str, *kinds: type, default: Any = ...) -> Any:
    """The entry `name` of a JSON object, when it is of one of some types; `default`, if given, when it is not there.

    Raises:
        ValueError: it is missing or something else.
    """
    expected = " or ".join(_JSON_NAMES[kind] for kind in kinds)
    if not isinstance(data, Mapping):
        raise ValueError(f'expected an object with "{name}", got {_shortened(data)}.')
    if name not in data and default is not ...:
        return default
    if name not in data:
        raise ValueError(f'lacks "{name}" ({expected}); it has {", ".join(map(str, data)) or "nothing"}.')
    if not isinstance(data[name], kinds):
        raise ValueError(f'"{name}" must be {expected}, got {_shortened(data[name])}.')
    return data[name]


_JSON_NAMES = {dict: "an object", list: "a list", str: "text", int: "a whole number", bool: "true or false"}
_JSON_NAMES |= {bytes: "bytes", type(None): "null"}


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 60 else f"{text[:56]} ..."


# ---------- files


def read_json(path: Path) -> Any:
    """Reads a JSON file, in UTF-8 or, as some of ReasonSeg, in Windows-1252.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no JSON; names the line.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. See docs/data.md for the layout.")
    content = path.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        text = content.decode("cp1252", errors="replace")
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: no JSON: {error.msg} (column {error.colno}).") from error


def json_records(path: Path, items: Any = None) -> list[Record]:
    """The items of a file that holds a JSON list (or of a list read from it), each with its place.

    Raises:
        ValueError: no list.
    """
    items = read_json(path) if items is None else items
    if not isinstance(items, list):
        raise ValueError(f"{path}: expected a list, got {_shortened(items)}.")
    return [Record(f"{path.name}[{index}]", item) for index, item in enumerate(items)]


class JsonLines(Sequence):
    """The lines of a JSONL file as records, parsed when asked for; empty lines do not count.

    Args:
        path: the file.

    Raises:
        FileNotFoundError: no such file.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(f"There is no file {str(path)!r}. See docs/data.md for the layout.")
        self.path = path
        self.places: list[tuple[int, int]] = []  # line number from 1, offset in bytes
        offset = 0
        with path.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    self.places.append((number, offset))
                offset += len(line)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Record:
        number, offset = self.places[index]
        with self.path.open("rb") as lines:
            lines.seek(offset)
            return Record(f"{self.path.name}:{number}", lines.readline())


class _PlainUnpickler(pickle.Unpickler):
    """Loads containers, numbers and text; refuses everything that could run code."""

    def find_class(self, module: str, name: str) -> Any:
        raise ValueError(f"it refers to {module}.{name}, but only plain lists, dicts, numbers and text are accepted")


def read_plain_pickle(path: Path) -> Any:
    """Reads a pickle of plain containers, numbers and text, and nothing else: a pickle may run any code.

    Raises:
        FileNotFoundError: no such file.
        ValueError: no pickle, or one with other things in it.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {str(path)!r}. See docs/data.md for the layout.")
    with path.open("rb") as file:
        try:
            return _PlainUnpickler(file, encoding="utf-8").load()
        except (*BROKEN, pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path}: no plain pickle: {error}.") from error


def find_below(root: Path, candidates: Sequence[str], what: str) -> Path:
    """The first of some paths below `root` that exists: data sets are laid out in several ways.

    Raises:
        FileNotFoundError: none does.
    """
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise FileNotFoundError(f"Found no {what} below {str(root)!r}; looked for {', '.join(candidates)}.")


def file_in(folders: Sequence[Path], *names: str) -> Path:
    """The first existing file of these names in these folders, or the first of all where none exists."""
    paths = [resolve(folder, name) for name in names for folder in folders]
    return next((path for path in paths if path.is_file()), paths[0])


def one_of(split: str, splits: Sequence[str], what: str) -> str:
    """`split`, when it is one of `splits`.

    Raises:
        ValueError: it is not.
    """
    if split not in splits:
        raise ValueError(f"{what} has no split {split!r}; choose one of {', '.join(splits)}.")
    return split


# ---------- masks


def parse_mask(value: Any, folder: str | os.PathLike = ".") -> Encoded:
    """Reads how a mask is written in JSON.

    Args:
        value: run lengths {"size": [h, w], "counts": ...}; polygons [[x0, y0, x1, y1, ...], ...]; a box [left, top,
            right, bottom] in pixels; a file "mask.png" (all that is not black) or {"file": "mask.png", "value": 3}.
        folder: what paths are relative to.

    Raises:
        ValueError: none of these.
    """
    if isinstance(value, Mapping) and "counts" in value:
        return {"size": field(value, "size", list), "counts": field(value, "counts", str, list, bytes)}
    if isinstance(value, str):
        return MaskFile(resolve(folder, value))
    if isinstance(value, Mapping) and "file" in value:
        return MaskFile(resolve(folder, field(value, "file", str)), field(value, "value", int, default=None))
    if _is_numbers(value) and len(value) == 4:
        return Polygons.box(*value)
    if isinstance(value, list) and value and all(_is_numbers(polygon) for polygon in value):
        if short := [polygon for polygon in value if len(polygon) < 6 or len(polygon) % 2]:
            raise ValueError(f"a polygon is [x0, y0, x1, y1, x2, y2, ...], got {_shortened(short[0])}.")
        return Polygons(tuple(map(tuple, value)))
    raise ValueError(f"a mask is run lengths, polygons, a box or a file (docs/data.md), got {_shortened(value)}.")


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(x, int | float) and abs(x) <= FARTHEST for x in value)


def parse_coco_segmentation(value: Any) -> Encoded | tuple[Encoded, ...]:
    """A COCO "segmentation": polygons (those without area left out), run lengths, or a list of run lengths."""
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return tuple(parse_mask(part) for part in value)
    if not isinstance(value, list):
        return parse_mask(value)
    polygons = [polygon for polygon in value if len(polygon) >= 6]
    return parse_mask(polygons) if polygons else Polygons(())

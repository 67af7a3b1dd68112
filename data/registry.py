"""All data sets by name: `open_dataset("refcoco", "~/data/coco", "val")`."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from .samples import Sample


class Dataset(Protocol):
    """A lazy sequence of samples: the index is in memory, pixels and masks are read by who needs them."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


Opener = Callable[..., Dataset]

DATASETS: Mapping[str, Opener] = {}


def open_dataset(name: str, root: str | os.PathLike, split: str, **options: Any) -> Dataset:
    """Opens a data set.

    Args:
        name: a key of `DATASETS`.
        root: its folder ("~" allowed), laid out as published; see `docs/data.md`.
        split: such as "train", "val", "testA"; each reader names its own.
        **options: what the reader takes besides.

    Raises:
        ValueError: an unknown name or split, or files that break the format.
        FileNotFoundError: files are missing.
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}; choose one of {', '.join(DATASETS)}.")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r} for {name}. See docs/data.md for its layout.")
    return DATASETS[name](folder, split, **options)

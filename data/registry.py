"""All data sets by name: `open_dataset("refcoco", "~/data/coco", "val")`."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from . import conversations, referring_images, referring_videos
from .samples import Sample


class Dataset(Protocol):
    """A lazy sequence of samples: the index is in memory, pixels and masks are read by who needs them.

    A data set may also have `at(index, visit)`: sample `index` with other random choices for each visit.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Sample: ...


Opener = Callable[..., Dataset]

DATASETS: Mapping[str, Opener] = {
    "finetune": conversations.open_finetune,
    "jsonl": conversations.open_jsonl,
    **{name: partial(referring_images.open_refcoco, name) for name in ("refcoco", "refcoco+", "refcocog", "grefcoco")},
    "reasonseg": referring_images.open_reasonseg,
    "mevis": referring_videos.open_mevis,
    "ref_youtube_vos": referring_videos.open_ref_youtube_vos,
    "revos": referring_videos.open_revos,
    "ref_davis17": referring_videos.open_ref_davis17,
    "ref_sav": referring_videos.open_ref_sav,
    "gcg": conversations.open_gcg,
    "region_captions": conversations.open_region_captions,
    "llava": conversations.open_llava,
    "chatunivi": conversations.open_chatunivi,
}


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
        TypeError: an option that the reader does not take.
    """
    if name not in DATASETS:
        raise ValueError(f"Unknown data set {name!r}; choose one of {', '.join(DATASETS)}.")
    folder = Path(root).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {str(root)!r} for {name}. See docs/data.md for its layout.")
    return DATASETS[name](folder, split, **options)

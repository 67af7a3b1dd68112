"""Zips for the servers that keep the truth of MeViS and Ref-YouTube-VOS to themselves.

Both want one grey PNG for each frame of each expression, 255 where the object is:

* MeViS            VIDEO/EXPRESSION/FRAME.png
* Ref-YouTube-VOS  Annotations/VIDEO/EXPRESSION/FRAME.png
"""

import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sa2va.data.samples import Sample
from sa2va.demo.media import replacing
from sa2va.evaluation.predict import join_masks, output_of

FOLDERS: Mapping[str, str] = {"mevis": "", "ref_youtube_vos": "Annotations/"}


def write_submission(
    path: Path, data: str, samples: Iterable[Sample], predictions: Mapping[str, Mapping[str, Any]], merge: str
) -> int:
    """Writes the zip for a data set's server.

    Args:
        path: the file, ".zip".
        data: a key of `FOLDERS`.
        samples: all expressions of the split, one each, with "video", "frames" and "expression_id" in `info`.
        predictions: their lines (`predict`). An answer without mask gives black pictures.
        merge: "official" keeps the first mask of an answer, "union" joins them.

    Returns:
        The number of expressions in it.

    Raises:
        ValueError: a data set without server, or an expression without prediction.
    """
    if data not in FOLDERS:
        raise ValueError(f"There is no server for {data!r}; there is one for {', '.join(FOLDERS)}.")
    count = 0
    with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for sample in samples:
            if sample.id not in predictions:
                raise ValueError(f"{sample.id!r} has no prediction, and the server wants all: predict without --limit.")
            folder = f"{FOLDERS[data]}{sample.info['video']}/{sample.info['expression_id']}"
            record = predictions[sample.id]
            found = output_of(record["turns"][0]).prediction_masks[: 1 if merge == "official" else None]
            masks = join_masks(found, record["size"], record["frames"])
            for frame, mask in zip(sample.info["frames"], masks, strict=True):
                archive.writestr(f"{folder}/{frame}.png", _png(mask))
            count += 1
    return count


def _png(mask: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8) * 255).save(buffer, format="png")
    return buffer.getvalue()

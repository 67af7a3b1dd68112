"""Predictions on disk: made by any number of processes, resumable, read one at a time.

A folder holds one JSON Lines file for each process, `process-0.jsonl` ..., with one line for each sample:

    {"id", "media", "size": [height, width], "frames", "seconds",
     "turns": [{"question", "prediction", "phrases", "masks": [[rle, ...], ...], "scores": [{"iou": [...], ...}, ...]}]}

For each `[SEG]` of an answer there is one COCO run-length encoding and one score of each kind for every frame. "media"
tells the pictures from others that get their sample's id when the data change.
"""

import hashlib
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sa2va import Sa2VAChatModel, Sa2VAOutput, Sa2VAProcessor
from sa2va.data.records import located
from sa2va.data.registry import Dataset
from sa2va.data.samples import Media, Sample
from sa2va.demo.media import append_lines, finished_lines
from sa2va.demo.predict import check_regions_are_seen
from sa2va.processing_sa2va import IMAGE_TAG, rle_to_masks

# ---------- one sample


def answer_sample(
    model: Sa2VAChatModel,
    processor: Sa2VAProcessor,
    sample: Sample,
    dialogue: bool = False,
    before: str = "",
    **options: Any,
) -> dict[str, Any]:
    """Puts a sample's questions to the model.

    Args:
        model, processor: a loaded checkpoint.
        sample: of any data set.
        dialogue: each question comes after the model's own answers to the earlier ones; else each is asked afresh.
        before: what stands between the picture and a question.
        **options: for `predict_forward`, such as num_frames, frame_sampling, max_new_tokens.

    Returns:
        A line as described above, but for "seconds".

    Raises:
        ValueError: the sample can't be read; the message names it.
        OSError: a frame can't be read.
    """
    with located(f"sample {sample.id!r}"):
        size, frames = (sample.media.size(), len(sample.media)) if sample.media else ((0, 0), 0)
        regions = [region.read([0], size)[0] for region in sample.regions]
        if regions and sample.media.is_video:
            check_regions_are_seen(options.get("frame_sampling"))
    turns, past_text = [], ""
    head = IMAGE_TAG + before if before and sample.media else ""
    for turn in sample.turns:
        output = model.predict_forward(
            **_picture(sample.media),
            text=("" if past_text else head) + turn.question,
            past_text=past_text,
            mask_prompts=np.stack(regions) if regions else None,
            processor=processor,
            output_format="rle",
            **options,
        )
        past_text = output.past_text if dialogue else ""
        turns.append(_turn_record(turn.question, output))
    stamp = media_stamp(sample.media)
    return {"id": sample.id, "media": stamp, "size": list(size), "frames": frames, "turns": turns}


def media_stamp(media: Media) -> str:
    """Tells pictures from others, wherever they are: by the names and sizes of their files."""
    files = [(path.name, path.stat().st_size if path.is_file() else None) for path in media.paths]
    return hashlib.sha256(repr(files).encode(errors="surrogateescape")).hexdigest()[:16]


def _picture(media: Media) -> dict[str, Any]:
    """The argument of `predict_forward`; frames are left to it to read, as they are needed."""
    if not media:
        return {}
    if not media.is_video:
        return {"image": media.paths[0]}
    if not media.is_file:
        return {"video": list(media.paths)}
    return {"video": media.paths[0] if media.step == 1 else media.read()}


def _turn_record(question: str, output: Sa2VAOutput) -> dict[str, Any]:
    scores = [{name: values.tolist() for name, values in score.items()} for score in output.mask_scores]
    return {
        "question": question,
        "prediction": output.prediction,
        "phrases": output.phrases,
        "masks": output.prediction_masks,
        "scores": scores,
    }


def output_of(turn: Mapping[str, Any]) -> Sa2VAOutput:
    """What the model gave in a turn of a line: prediction, phrases, masks (bool [frames, h, w]) and their scores.

    Raises:
        KeyError, TypeError, ValueError: it is none of our turns.
    """
    if not isinstance(turn["prediction"], str):
        raise TypeError(f"its words are {turn['prediction']!r}")
    return Sa2VAOutput(
        prediction=turn["prediction"],
        prediction_masks=[rle_to_masks(rles) for rles in turn["masks"]],
        phrases=turn["phrases"],
        mask_scores=[
            {name: np.array(values, dtype=np.float32) for name, values in score.items()} for score in turn["scores"]
        ],
    )


def join_masks(masks: Sequence[np.ndarray], size: tuple[int, int], frames: int) -> np.ndarray:
    """What any of some masks, bool [frames, h, w], has; nothing if there are none. `size` is (h, w)."""
    joined = np.zeros((frames, *size), dtype=bool)
    for mask in masks:
        joined |= mask
    return joined


# ---------- many samples


class Predictions(Mapping[str, dict[str, Any]]):
    """The lines of a folder by the samples' ids, read from disk when asked for; of an id twice, the last one.

    Args:
        folder: as described above. A last line that a stopped process left unfinished is not there.

    Raises:
        ValueError: a finished line that is none of ours; the message names file and line.
    """

    def __init__(self, folder: Path):
        self._places: dict[str, tuple[Path, int]] = {}
        for path in sorted(folder.glob("process-*.jsonl")):
            for number, (start, line) in enumerate(finished_lines(path), start=1):
                try:
                    self._places[json.loads(line)["id"]] = path, start
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(f"{str(path)!r}, line {number} is no prediction: {error!r}. Remove it.") from error

    def __getitem__(self, key: str) -> dict[str, Any]:
        path, start = self._places[key]
        with path.open("rb") as file:
            file.seek(start)
            return json.loads(file.readline())

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def missing(dataset: Dataset, indices: Sequence[int], folder: Path) -> list[int]:
    """Those of some samples that a folder has no prediction of.

    Raises:
        ValueError: two samples of one id, or as in `Predictions`.
    """
    done, seen, todo = set(Predictions(folder)), set(), []
    for index in indices:
        name = dataset[index].id
        if name in seen:
            raise ValueError(f"Two samples have the id {name!r}. Ids must differ, or predictions would be mixed up.")
        seen.add(name)
        if name not in done:
            todo.append(index)
    return todo


def predict_dataset(
    model: Sa2VAChatModel,
    processor: Sa2VAProcessor,
    dataset: Dataset,
    indices: Sequence[int],
    folder: Path,
    process: int = 0,
    progress: bool = False,
    **options: Any,
) -> None:
    """Adds predictions to a folder, each as soon as it is there.

    Args:
        model, processor: a loaded checkpoint.
        dataset: what `open_dataset` gives.
        indices: which of its samples.
        folder: made if need be.
        process: number of this process, which names its file.
        progress: show a bar on stderr.
        **options: as in `answer_sample`.

    Raises:
        OSError, ValueError: a sample can't be read; what was predicted before it is kept.
    """
    with append_lines(folder / f"process-{process}.jsonl") as file:
        for index in tqdm(indices, disable=not progress, file=sys.stderr, unit="sample"):
            started = time.perf_counter()
            record = answer_sample(model, processor, dataset[index], **options)
            record["seconds"] = round(time.perf_counter() - started, 3)
            file.write(json.dumps(record) + "\n")
            file.flush()


def subset(length: int, limit: int | None, seed: int) -> list[int]:
    """Numbers of samples in rising order: all, or `limit` of them, drawn at random.

    Args:
        length: of the data set.
        limit: how many, >= 1; None, or more than there are: all.
        seed: names the draw; a smaller limit of the same seed draws some of the same samples.

    Raises:
        ValueError: a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit is a number of samples and must be >= 1, got {limit}.")
    if limit is None or limit >= length:
        return list(range(length))
    return sorted(np.random.default_rng(seed).permutation(length)[:limit].tolist())

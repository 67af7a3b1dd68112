"""From synthetic scenes to training batches: which task comes when, and the tensors that `forward` takes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from sa2va import Sa2VAProcessor
from sa2va.data.scenes import (
    COLORS,
    EXTREMES,
    ORDER_GAP,
    SHAPES,
    SIZE_MARGIN,
    VIDEO_TASKS,
    SceneSample,
    Turn,
    make_sample,
)
from sa2va.data.shapes import MOTIONS, SceneObject
from sa2va.modeling_sa2va import IGNORE_INDEX

COLOR_NAMES = tuple(COLORS)
MOTION_NAMES = tuple(MOTIONS)
MAX_COUNT = 5  # objects in a scene
NUM_GROUPS = 3  # an object stands among those of its colour, those of its shape, and all
NUM_FLAGS = 2 + len(EXTREMES)  # largest, smallest, leftmost, ...
CLEAR_POSITION = 0.05  # short sides between an extreme and the next one, for the flags


_ALL_VIDEO_TASKS = dict.fromkeys(VIDEO_TASKS, 1.0) | {"video_interview": 2.0}


@dataclass(frozen=True)
class Stage:
    """A part of the curriculum.

    Attributes:
        until: fraction of all steps at which it ends.
        tasks: weights of the image tasks; with none, there are no words in this stage.
        video_share: fraction of the steps that train on clips.
        video_tasks: weights of their tasks.
    """

    until: float
    tasks: Mapping[str, float]
    video_share: float = 0.0
    video_tasks: Mapping[str, float] = field(default_factory=lambda: _ALL_VIDEO_TASKS)

    @property
    def looks_only(self) -> bool:
        """Whether only the vision tower learns, from single objects seen close up."""
        return not self.tasks


# Seeing shapes close up; naming what is there and drawing it; relations, absence, questions; motion and memory.
_ALL_IMAGE_TASKS = {
    "refer": 3.0, "multi": 3.0, "followup": 2.0, "question": 1.5, "caption": 1.0, "region": 0.7, "absent": 0.7,
    "interview": 4.0,
}  # fmt: skip
CURRICULUM = (
    Stage(0.22, {}),
    Stage(0.35, {"refer": 2, "multi": 1, "caption": 2, "region": 1}),
    Stage(0.6, _ALL_IMAGE_TASKS),
    Stage(1.0, _ALL_IMAGE_TASKS, video_share=0.4),
)
CURRICULA_OF_PARTS: Mapping[str, Sequence[Stage]] = {  # what serves a part best that learns alone
    "mask_decoder": (Stage(1.0, {"refer": 3, "multi": 1, "caption": 1}),),
    "sight": (Stage(1.0, {"interview": 1}),),
    "words": (
        Stage(
            1.0,
            {"interview": 8, "multi": 3, "caption": 1, "region": 1, "followup": 2},
            video_share=0.6,
            video_tasks={"video_interview": 1},
        ),
    ),
    "tracking": (
        Stage(
            1.0,
            {"refer": 3, "multi": 1},
            video_share=0.8,
            video_tasks={"video_refer": 1, "video_motion": 1, "video_multi": 2},
        ),
    ),
}


class ScheduledScenes:
    """Map-style dataset of `steps * batch_size` scenes in the order of a curriculum; read it in sequence.

    A batch holds either pictures or clips, so that no step waits for a single clip. A batch of clips is
    `clips_per_batch` long; its other places are None.

    Args:
        seed: names the stream; the same seed gives the same scenes at the same step, however often training stops.
        steps, batch_size: optimizer steps (of one process) and scenes in each.
        clips_per_batch, num_frames: clips in a batch of clips, and frames in each.
        curriculum: see `Stage`.
    """

    def __init__(
        self,
        seed: int,
        steps: int,
        batch_size: int,
        clips_per_batch: int,
        num_frames: int,
        curriculum: Sequence[Stage] = CURRICULUM,
    ):
        self.seed, self.steps, self.batch_size = seed, steps, batch_size
        self.clips_per_batch, self.num_frames = clips_per_batch, num_frames
        self.curriculum = tuple(curriculum)

    def __len__(self) -> int:
        return self.steps * self.batch_size

    @property
    def first_words(self) -> int:
        """The step at which the stages that only look are over."""
        return round(self.steps * max((stage.until for stage in self.curriculum if stage.looks_only), default=0))

    def __getitem__(self, index: int) -> SceneSample | list[SceneSample] | None:
        step, place = divmod(int(index), self.batch_size)
        stage = next(s for s in self.curriculum if step < s.until * self.steps or s is self.curriculum[-1])
        is_video = np.random.default_rng([self.seed, step]).random() < stage.video_share
        if is_video and place >= self.clips_per_batch:
            return None
        if stage.looks_only:
            return close_ups(make_sample(self.seed, int(index), task="caption"), self.seed + int(index))
        weights = stage.video_tasks if is_video else stage.tasks
        shares = np.array(list(weights.values())) / sum(weights.values())
        task = np.random.default_rng([self.seed, step, place]).choice(list(weights), p=shares)
        return make_sample(self.seed, int(index), task=str(task), num_frames=self.num_frames)


def close_ups(sample: SceneSample, seed: int) -> list[SceneSample]:
    """The scene itself and each of its objects cut out with little around it; no words."""
    rng = np.random.default_rng([seed, 1])
    height, width = sample.frames.shape[1:3]
    views = [replace(sample, turns=())]
    for thing, masks in zip(sample.objects, sample.object_masks, strict=True):
        rows, columns = np.nonzero(masks[0])
        side = max(np.ptp(rows), np.ptp(columns)) * rng.uniform(1.1, 2.0)
        middle = [(line.min() + line.max()) / 2 + rng.uniform(-0.1, 0.1) * side for line in (rows, columns)]
        top, left = (max(0, int(centre - side / 2)) for centre in middle)
        bottom, right = (min(end, int(c + side / 2) + 1) for c, end in zip(middle, (height, width), strict=True))
        cut = (slice(None), slice(top, bottom), slice(left, right))
        seen = {"frames": sample.frames[cut], "objects": (thing,), "object_masks": masks[cut][None]}
        views.append(replace(sample, turns=(), **seen))
    return views


class SceneCollator:
    """Turns scenes into the arguments of `forward`, and the classes that training-only heads learn.

    Returned beside the arguments: `seg_classes` int64 [M, 2], colour and shape of every `[SEG]`; `seg_boxes` float32
    [M, 4], its box as centre and size in 0..1, the mean of the key frames that show it; `cell_classes` int64 [tiles,
    tokens, 2] and `cell_boxes` float32 [tiles, tokens, 4], colour, shape and box of the object that covers most of each
    image token (all 0 is background); `cell_objects` int64 [tiles, tokens], its number (-1 is background);
    `cell_standings` int64 [tiles, tokens, 3, 7], see `_standings`, and `cell_ranks` int64 [tiles, tokens, 3], see
    `_ranks` (`IGNORE_INDEX` for background); for clips, `cell_motions` int64 [tiles, tokens] (`IGNORE_INDEX` where
    unknown) and `cell_pasts` float32 [tiles, tokens, 2], the object's mean place in earlier frames (NaN where unknown);
    `seg_cells` float32 [M, tiles * tokens], how much of each image token of its sample a `[SEG]`'s object covers;
    `is_told` bool [B, L], the tokens whose next one tells how an object moves, and `told_cells` float32 [K, tiles *
    tokens], how much of each image token behind the first key frame its object covers.

    Args:
        processor: of the model that learns.
        masks: False leaves out what SAM 2 would see.
        words: False leaves only what the vision tower sees.
    """

    def __init__(self, processor: Sa2VAProcessor, masks: bool = True, words: bool = True):
        self.processor, self.masks, self.words = processor, masks, words

    def __call__(self, samples: Sequence[SceneSample | None]) -> dict[str, Tensor | list[Tensor]]:
        if isinstance(samples[0], list):
            return self._looks([view for views in samples for view in views])
        if not self.words:
            return self._looks(samples)
        rows = [self._row(sample) for sample in samples if sample is not None]
        ids, labels = ([torch.from_numpy(row[name]) for row in rows] for name in ("input_ids", "labels"))
        batch = {
            "input_ids": pad_sequence(ids, True, self.processor.pad_token_id),
            "labels": pad_sequence(labels, True, IGNORE_INDEX),
            "attention_mask": pad_sequence([torch.ones_like(row) for row in ids], True),
            "pixel_values": torch.cat([row["pixel_values"] for row in rows]),
            "seg_classes": torch.tensor([pair for row in rows for pair in row["seg_classes"]]).reshape(-1, 2),
            "seg_boxes": torch.cat([self._mean_boxes(row["mask_labels"]) for row in rows]),
            "seg_cells": _joined([row["seg_cells"] for row in rows]),
            "is_told": pad_sequence([row["is_told"] for row in rows], True),
            "told_cells": _joined([row["told_cells"] for row in rows]),
            **_stacked([row["cells"] for row in rows]),
        }
        if self.masks:
            batch["grounding_pixel_values"] = [row["grounding_pixel_values"] for row in rows]
            batch["mask_labels"] = [row["mask_labels"] for row in rows]
        tiles = np.cumsum([0] + [len(row["pixel_values"]) for row in rows])
        regions = [(tile, row["regions"]) for tile, row in zip(tiles, rows, strict=False) if row["regions"] is not None]
        if regions:
            batch["prompt_masks"] = torch.cat([masks for _, masks in regions])
            batch["prompt_mask_tiles"] = torch.tensor([tile for tile, masks in regions for _ in masks])
        return batch

    def _looks(self, views: Sequence[SceneSample]) -> dict[str, Tensor]:
        """Only pixels and what each image token shows."""
        pictures = [Image.fromarray(view.frames[0]) for view in views]
        grid = self.processor.region_grid
        pixel_values = torch.cat([self.processor.preprocess_image(picture) for picture in pictures])
        return {"pixel_values": pixel_values, **_stacked([_cells(view, 1, grid) for view in views])}

    def _mean_boxes(self, masks: Tensor) -> Tensor:
        """Masks [S, T, H, W] -> boxes [S, 4]: one prompt serves all key frames, so it should name a place amid them."""
        key_frames = masks[:, : self.processor.num_key_frames]
        boxes = _boxes(key_frames.flatten(0, 1)).unflatten(0, key_frames.shape[:2])
        visible = (boxes[..., 2:3] > 0).float()
        return (boxes * visible).sum(dim=1) / visible.sum(dim=1).clamp(min=1)

    def _covered(self, masks: Tensor) -> Tensor:
        """Masks [M, tiles, H, W] -> how much of each image token each object covers, [M, tiles * tokens]."""
        grid = self.processor.region_grid
        return F.interpolate(masks.float(), size=(grid, grid), mode="area").flatten(1)

    def _row(self, sample: SceneSample) -> dict:
        frames = [Image.fromarray(frame) for frame in sample.frames]
        is_video = len(frames) > 1
        shown = frames[: self.processor.num_key_frames]
        processor = self.processor
        pixel_values = processor.preprocess_key_frames(shown) if is_video else processor.preprocess_image(frames[0])
        regions = None if sample.regions is None else processor.preprocess_mask_prompts(sample.regions)
        input_ids, labels, told = self._conversation(sample, len(pixel_values), is_video, regions)
        masks = torch.from_numpy(np.concatenate([turn.masks for turn in sample.turns]))
        told_masks = torch.from_numpy(sample.object_masks[told[told >= 0], : len(pixel_values)])
        told_masks[:, 0] = False  # nobody can tell from the first frame
        seen = processor.grounding_pixel_values(frames, is_video=is_video) if self.masks else None
        return {
            "input_ids": input_ids,
            "labels": labels,
            "pixel_values": pixel_values,
            "grounding_pixel_values": seen,
            "mask_labels": masks,
            "seg_cells": self._covered(masks[:, : len(pixel_values)]),
            "is_told": torch.from_numpy(told >= 0),
            "told_cells": self._covered(told_masks),
            "regions": regions,
            "seg_classes": [_classes(sample.objects[i]) for turn in sample.turns for i in turn.targets],
            "cells": _cells(sample, len(pixel_values), processor.region_grid),
        }

    def _conversation(
        self, sample: SceneSample, num_tiles: int, is_video: bool, regions: Tensor | None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """All turns as token ids, as labels with only the answers kept, and as `_told`; int64 [L] each."""
        tokenizer, end = self.processor.tokenizer, self.processor.stop_words[0]
        region_tokens = None if regions is None else regions.flatten(1).sum(1).tolist()
        past_text, input_ids, labels, told = "", [], [], []
        for turn in sample.turns:
            prompt = self.processor.build_prompt(
                turn.question,
                image_tokens=self.processor.image_tokens(num_tiles, is_video),
                region_tokens=region_tokens,
                past_text=past_text,
            )
            asked = tokenizer(prompt[len(past_text) :]).input_ids
            answered = tokenizer(turn.answer + end).input_ids
            newline = tokenizer("\n").input_ids
            input_ids += asked + answered + newline
            labels += [IGNORE_INDEX] * len(asked) + answered + [IGNORE_INDEX] * len(newline)
            told += [-1] * len(asked) + self._told(turn, sample.objects, len(answered)) + [-1] * len(newline)
            past_text = f"{prompt}{turn.answer}{end}\n"
        return np.array(input_ids), np.array(labels), np.array(told)

    def _told(self, turn: Turn, objects: Sequence[SceneObject], length: int) -> list[int]:
        """For each token of an answer the number of the object of which the next one tells how it moves, else -1."""
        told = [-1] * length
        if turn.kind == "direction":
            subject = turn.answer.split(" is ")[0]
            number = next(i for i, thing in enumerate(objects) if thing.name in subject)
            place = len(self.processor.tokenizer(f"{subject} is").input_ids)
            for token in range(place - 1, place if turn.expected == "still" else place + 1):  # "is", "moving"
                told[token] = number
        return told


def _classes(thing) -> tuple[int, int]:
    return COLOR_NAMES.index(thing.color), SHAPES.index(thing.shape)


def _boxes(masks: Tensor) -> Tensor:
    """Masks [S, H, W] -> boxes [S, 4]: centre x, centre y, width, height, in 0..1; zeros for an empty mask."""
    spans = []
    for axis in (1, 2):  # rows folded away leave x, columns folded away leave y
        line = masks.any(dim=axis).float()
        length = line.shape[1]
        first, last = line.argmax(dim=1), length - line.flip(1).argmax(dim=1)
        seen = line.any(dim=1)
        spans.append((((first + last) / 2 / length) * seen, ((last - first) / length) * seen))
    (x, width), (y, height) = spans
    return torch.stack([x, y, width, height], dim=1)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """[M, tokens] of each sample as one tensor; zeros fill up the tokens of short samples."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, longest - part.shape[1])) for part in parts])


def _stacked(rows: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def _cells(sample: SceneSample, num_tiles: int, grid: int) -> dict[str, Tensor]:
    """What each token shows: the object that covers most of it, if it covers a quarter of it.

    Returns:
        What `SceneCollator` says, of one sample.
    """
    is_clip = len(sample.frames) > 1
    classes = torch.tensor([(0, 0), *((c + 1, s + 1) for c, s in map(_classes, sample.objects))])
    standings = torch.full((1 + len(sample.objects), NUM_GROUPS, 1 + NUM_FLAGS), IGNORE_INDEX)
    ranks = torch.full((1 + len(sample.objects), NUM_GROUPS), IGNORE_INDEX)
    if len(sample.objects) == len(sample.object_masks) and sample.turns:
        standings[1:] = torch.tensor([_standings(i, sample.objects, is_clip) for i in range(len(sample.objects))])
        if not is_clip:
            ranks[1:] = torch.tensor([_ranks(i, sample.objects) for i in range(len(sample.objects))])
    winners, boxes = [], []
    for t in range(num_tiles):
        masks = sample.object_masks[:, t]
        covered = [cv2.resize(mask.astype(np.float32), (grid, grid), interpolation=cv2.INTER_AREA) for mask in masks]
        covered = np.stack([np.full((grid, grid), 0.25, np.float32), *covered])
        winners.append(torch.from_numpy(covered.argmax(axis=0).ravel()))
        boxes.append(torch.cat([torch.zeros(1, 4), _boxes(torch.from_numpy(masks))]))
    winner, boxes = torch.stack(winners), torch.stack(boxes)
    tiles = torch.arange(num_tiles)[:, None]
    cells = {
        "cell_classes": classes[winner],
        "cell_boxes": boxes[tiles, winner],
        "cell_standings": standings[winner],
        "cell_ranks": ranks[winner],
        "cell_objects": winner - 1,
    }
    if is_clip:
        motions = [IGNORE_INDEX, *(MOTION_NAMES.index(thing.motion) for thing in sample.objects)]
        cells["cell_motions"] = torch.tensor(motions)[winner]
        cells["cell_motions"][0] = IGNORE_INDEX  # nobody can tell from the first frame
        cells["cell_pasts"] = _pasts(boxes)[tiles, winner]
    return cells


def _pasts(boxes: Tensor) -> Tensor:
    """Boxes [T, N, 4] -> where an object was in the frames before, on average: [T, N, 2]; NaN where it was nowhere."""
    visible = (boxes[..., 2:3] > 0).float()
    places, times = (boxes[..., :2] * visible).cumsum(dim=0), visible.cumsum(dim=0)
    pasts = places[:-1] / times[:-1]
    return torch.cat([torch.full_like(pasts[:1], torch.nan), pasts])


def _rivals(index: int, objects: Sequence[SceneObject]) -> list[list[SceneObject]]:
    """The other objects of an object's colour, those of its shape, and all others."""
    thing, others = objects[index], [other for i, other in enumerate(objects) if i != index]
    sames = (lambda o: o.color == thing.color, lambda o: o.shape == thing.shape, lambda o: True)
    return [[other for other in others if same(other)] for same in sames]


def _ranks(index: int, objects: Sequence[SceneObject]) -> list[int]:
    """How many of an object's colour, of its shape, and of all lie left of it; `IGNORE_INDEX` where that is not plain.

    It is the order in which answers list objects.
    """
    thing, ranks = objects[index], []
    for rivals in _rivals(index, objects):
        gaps = [thing.x - other.x for other in rivals]
        plain = all(abs(gap) >= ORDER_GAP for gap in gaps)
        ranks.append(min(sum(gap > 0 for gap in gaps), MAX_COUNT - 1) if plain else IGNORE_INDEX)
    return ranks


def _standings(index: int, objects: Sequence[SceneObject], is_clip: bool) -> list[list[int]]:
    """How an object stands among those of its colour, those of its shape, and all.

    Returns:
        For each of these groups how many they are, from 0 for it alone, then 1 where it is the largest, smallest,
        leftmost, rightmost, topmost, bottommost of them, 0 where not, `IGNORE_INDEX` where that is not plain.
    """
    thing, rows = objects[index], []
    for rivals in _rivals(index, objects):
        leads = [[sign * np.log(thing.radius / other.radius) for other in rivals] for sign in (1, -1)]
        leads = [[lead / np.log(SIZE_MARGIN) for lead in line] for line in leads]
        for dx, dy in EXTREMES.values():
            ahead = [(dx * (thing.x - other.x) + dy * (thing.y - other.y)) / CLEAR_POSITION for other in rivals]
            leads.append([0.0] if is_clip else ahead)
        flags = [IGNORE_INDEX if not line or -0.5 < min(line) < 0.5 else int(min(line) > 0) for line in leads]
        rows.append([min(len(rivals), MAX_COUNT - 1), *flags])
    return rows

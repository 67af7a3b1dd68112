"""From samples of any data set to the arguments of `forward`, for every family of Sa2VA.

What is seen of a long clip, and which of many expressions are asked for, is drawn anew each time a sample comes, but
by nothing else than the seed and the sample's place in the stream (`Numbered`): training can stop and go on anywhere,
on any number of processes and workers.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.utils.rnn import pad_sequence

from sa2va import Sa2VAProcessor
from sa2va.data import templates
from sa2va.data.registry import Dataset
from sa2va.data.samples import Media, ObjectMasks, Sample, Turn, annotated_frames
from sa2va.data.templates import SEG
from sa2va.modeling_sa2va import IGNORE_INDEX
from sa2va.processing_sa2va import Sa2VAInputs, collate_inputs


class Numbered:
    """A data set whose samples come with their place in it, from which `SampleCollator` draws its numbers."""

    def __init__(self, dataset: Dataset):
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Sample]:
        return index, self.dataset[index]


class SampleCollator:
    """Turns samples into the arguments of `Sa2VAChatModel.forward`.

    A batch may hold pictures, clips, regions and chat without a picture, in any order. Questions are written as
    `predict_forward` writes them; labels cover the answers and their end marks only. A turn without an answer of its
    own gets one: "Sure, it is [SEG]." as in the released models' training.

    Args:
        processor: of the model that is trained.
        seed: names what is drawn.
        num_frames: frames of a clip, in order of time; a shorter clip is seen whole. Only those beyond the model's
            number of key frames are tracked.
        max_objects: independent questions beyond so many objects are left out.
        max_length: tokens after which a conversation is cut.

    Raises:
        ValueError: a sample that can't be learned from, by its id: a file can't be read, its `[SEG]` are not as many as
            its objects, or `processor.prepare` refuses it.
    """

    def __init__(
        self,
        processor: Sa2VAProcessor,
        seed: int = 0,
        num_frames: int = 5,
        max_objects: int = 5,
        max_length: int = 8192,
    ):
        self.processor = processor
        self.seed, self.num_frames, self.max_objects, self.max_length = seed, num_frames, max_objects, max_length

    def __call__(self, samples: Sequence[tuple[int, Sample]]) -> dict[str, Any]:
        rows = [self._named_row(index, sample) for index, sample in samples]
        inputs, labels = ([row[name] for row in rows] for name in ("inputs", "labels"))
        return {
            **collate_inputs(inputs, self.processor.pad_token_id, padding_side="right"),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "grounding_pixel_values": [row["grounding_pixel_values"] for row in rows],
            "mask_labels": [row["mask_labels"] for row in rows],
        }

    def _named_row(self, index: int, sample: Sample) -> dict[str, Any]:
        try:
            return self._row(sample, np.random.default_rng([self.seed, index]))
        except (OSError, TypeError, ValueError) as error:
            raise ValueError(f"Sample {sample.id!r} can't be learned from: {error}") from error

    def _row(self, sample: Sample, rng: np.random.Generator) -> dict[str, Any]:
        """What one sample adds to a batch."""
        if sample.info.get("captions"):
            raise ValueError("there are only captions to compare with. Use a split with answers; see docs/data.md.")
        turns = choose_turns(sample.turns, self.max_objects, rng)
        turns = seen_together(turns, len(sample.media), rng) if sample.media else turns
        objects = [thing for turn in turns for thing in turn.objects]
        frames, pictures = [], []
        if sample.media:
            frames = choose_frames(sample.media, objects, self.num_frames, rng, with_first=bool(sample.regions))
            pictures = sample.media.read(frames)
        picture = self._picture(sample, pictures)
        inputs, labels = self._conversation(turns, picture)
        kept = labels.count(self.processor.tokenizer.convert_tokens_to_ids(SEG))  # fewer in a conversation cut short
        row = {
            "inputs": inputs,
            "labels": torch.tensor(labels),
            "grounding_pixel_values": None,
            "mask_labels": None,
        }
        if kept:
            size = (pictures[0].height, pictures[0].width)
            masks = np.stack([thing.read(frames, size) for thing in objects[:kept]])
            row["mask_labels"] = torch.from_numpy(masks)
            row["grounding_pixel_values"] = self.processor.grounding_pixel_values(pictures, is_video=inputs.is_video)
        return row

    def _picture(self, sample: Sample, pictures: list[Image.Image]) -> dict[str, Any]:
        """What is seen, as arguments of `processor.prepare`."""
        if not pictures:
            return {}
        if not sample.media.is_video:
            arguments: dict[str, Any] = {"image": pictures[0]}
        else:
            arguments = {"video": pictures, "frame_sampling": "first"}
        if sample.regions:
            size = (pictures[0].height, pictures[0].width)
            arguments["mask_prompts"] = np.concatenate([region.read([0], size) for region in sample.regions])
        return arguments

    def _conversation(self, turns: Sequence[Turn], picture: dict[str, Any]) -> tuple[Sa2VAInputs, list[int]]:
        """All turns, at most `max_length` tokens, with the picture of the first, and their labels."""
        processor, tokenizer = self.processor, self.processor.tokenizer
        first, past_text, input_ids, labels = None, "", [], []
        if not turns:
            raise ValueError("there are no turns.")
        for turn in turns:
            if processor.image_token in f"{turn.question} {turn.answer or ''}":
                raise ValueError(f"{processor.image_token} stands for a part of a picture, and can't be said.")
            if first is None:
                first = processor.prepare(text=turn.question, **picture)
                prompt, asked = first.prompt, first.input_ids[0].tolist()
            else:  # the picture is in the text already: that it is there is all that is still asked
                shown = [1] if picture else None
                prompt = processor.build_prompt(turn.question, image_tokens=shown, past_text=past_text)
                asked = tokenizer(prompt[len(past_text) :], add_special_tokens=False).input_ids
            answer = answer_of(turn, first.is_video) + processor.stop_words[0]
            answered, newline = (tokenizer(text, add_special_tokens=False).input_ids for text in (answer, "\n"))
            input_ids += asked + answered + newline
            labels += [IGNORE_INDEX] * len(asked) + answered + [IGNORE_INDEX] * len(newline)
            past_text = f"{prompt}{answer}\n"
        self._check_cut(input_ids, labels)
        ids = torch.tensor([input_ids[: self.max_length]])
        whole = replace(first, prompt=past_text, input_ids=ids, attention_mask=torch.ones_like(ids))
        return whole, labels[: self.max_length]

    def _check_cut(self, input_ids: list[int], labels: list[int]) -> None:
        """Refuses a conversation that is cut off in its picture, or before the first answer."""
        image = self.processor.tokenizer.convert_tokens_to_ids(self.processor.image_token)
        begins = next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), 0)
        needed = max(begins + 1, len(input_ids) - input_ids[::-1].index(image) if image in input_ids else 0)
        if needed > self.max_length:
            raise ValueError(
                f"max_length={self.max_length} leaves nothing to learn: raise it to {needed} tokens at least."
            )


def answer_of(turn: Turn, is_video: bool) -> str:
    """What is to be answered: the turn's own answer, or one that points at its objects.

    Raises:
        ValueError: nothing says what is right; the answer's `[SEG]` are not as many as the objects.
    """
    if turn.answer is None:
        if not turn.objects:
            raise ValueError(
                f"{turn.question!r} has neither answer nor objects: the truth of a benchmark's split is not "
                "published. Where nothing fits, write an answer that says so."
            )
        return templates.ANSWERS[0].replace(SEG, ", ".join([SEG] * len(turn.objects)))
    if turn.answer.count(SEG) != len(turn.objects):
        raise ValueError(
            f"the answer {turn.answer!r} has {turn.answer.count(SEG)} {SEG}, but there are masks of "
            f"{len(turn.objects)} objects. There must be one {SEG} for each, in their order."
        )
    return turn.answer


def choose_turns(turns: Sequence[Turn], max_objects: int, rng: np.random.Generator) -> list[Turn]:
    """As many turns as have at most `max_objects` objects together, at least one, in their order.

    Turns that all point at objects are expressions that don't depend on each other, so that any of them may stay; of
    other conversations the beginning does.
    """
    if sum(len(turn.objects) for turn in turns) <= max_objects:
        return list(turns)
    independent = all(turn.objects for turn in turns)
    order = rng.permutation(len(turns)) if independent else np.arange(len(turns))
    counts = np.cumsum([len(turns[i].objects) for i in order])
    return [turns[i] for i in sorted(order[: max(1, int((counts <= max_objects).sum()))])]


def seen_together(turns: Sequence[Turn], length: int, rng: np.random.Generator) -> list[Turn]:
    """Of independent turns, as in `choose_turns`, some whose objects are all annotated in one of `length` frames."""

    def annotated_together(some: Sequence[int]) -> bool:
        return bool(annotated_frames([thing for i in some for thing in turns[i].objects], length))

    kept = list(range(len(turns)))
    if not annotated_together(kept) and all(turn.objects for turn in turns):
        kept = []
        for i in rng.permutation(len(turns)).tolist():
            kept += [i] if annotated_together([*kept, i]) else []
    return [turns[i] for i in sorted(kept)] or list(turns)


def choose_frames(
    media: Media, objects: Sequence[ObjectMasks], num_frames: int, rng: np.random.Generator, with_first: bool = False
) -> list[int]:
    """Numbers of `num_frames` frames of a clip in order, drawn from those where all objects are annotated; [0] of a
    picture. `with_first` makes frame 0, on which regions are marked, one of them.

    Raises:
        ValueError: there is no frame in which all are annotated, or frame 0 is none and has to be seen.
    """
    if not media.is_video:
        return [0]
    known = annotated_frames(objects, len(media))
    if not known:
        raise ValueError("A clip has no frame in which all objects of its conversation are annotated.")
    if with_first and 0 not in known:
        raise ValueError("Regions are shown on frame 0, in which not all objects of the conversation are annotated.")
    first = [0] if with_first else []
    known = [frame for frame in known if frame not in first]
    drawn = rng.choice(known, min(num_frames - len(first), len(known)), replace=False) if known else []
    return first + sorted(int(frame) for frame in drawn)

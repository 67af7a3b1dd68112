"""Pictures of what a model answers while it learns."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from PIL import Image, ImageDraw
from transformers import TrainerCallback

from sa2va import Sa2VAChatModel, Sa2VAProcessor
from sa2va.data.samples import Sample
from sa2va.demo.media import picture_writer
from sa2va.finetune.collator import answer_of
from sa2va.processing_sa2va import draw_overlay

MAX_NEW_TOKENS = 256
LINE, MIN_WIDTH = 14, 640  # pixels: height of a line of text, and its least width


class Previews(TrainerCallback):
    """Every `every` steps answers the first question of each sample, on the main process.

    Args:
        samples: whose answers to show.
        processor: of the model.
        folder: where "step-000100-0.png" and so on are written.
        every: steps.
        accelerator: the trainer's, for its autocast.
    """

    def __init__(
        self, samples: Sequence[Sample], processor: Sa2VAProcessor, folder: Path, every: int, accelerator: Accelerator
    ):
        self.samples, self.processor, self.folder = tuple(samples), processor, folder
        self.every, self.accelerator = every, accelerator

    def on_step_end(self, args, state, control, model=None, **kwargs):
        """Called by `Trainer`; leaves random numbers and the model's mode as they were."""
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        model.eval()
        for number, sample in enumerate(self.samples):
            with torch.random.fork_rng(), self.accelerator.autocast():
                pixels = draw_preview(model, self.processor, sample)
            with picture_writer(self.folder / f"step-{state.global_step:06d}-{number}.png") as write:
                write(pixels)
        model.train()


def draw_preview(model: Sa2VAChatModel, processor: Sa2VAProcessor, sample: Sample) -> np.ndarray:
    """The first question and what is answered, in words and masks, below what was to be answered; key frames side by
    side.

    Returns:
        uint8 [h, w, 3].
    """
    turn = sample.turns[0]
    count = processor.num_key_frames
    frames = np.unique(np.linspace(0, len(sample.media) - 1, count, dtype=int)).tolist() if sample.media else []
    pictures = sample.media.read(frames)
    size = (pictures[0].height, pictures[0].width) if pictures else (0, 0)
    arguments = {"text": turn.question, "processor": processor, "max_new_tokens": MAX_NEW_TOKENS}
    if pictures:
        arguments |= {"video": pictures, "frame_sampling": "first"} if sample.media.is_video else {"image": pictures[0]}
    if sample.regions:
        arguments["mask_prompts"] = np.concatenate([region.read([0], size) for region in sample.regions])
    output = model.predict_forward(**arguments)
    wanted = [thing.read(frames, size) for thing in turn.objects]
    rows = [(f"Q: {turn.question}", None), (f"wanted: {answer_of(turn, sample.media.is_video)}", wanted)]
    rows.append((f"answered: {output.prediction}", output.prediction_masks))
    width = max(MIN_WIDTH, sum(picture.width for picture in pictures))
    return np.concatenate([part for words, masks in rows for part in _row(words, masks, pictures, width)])


def _row(words: str, masks: Sequence[np.ndarray] | None, pictures: Sequence[Image.Image], width: int):
    """A line of text and, if there are masks [T, h, w] of objects, the frames with them; each as wide as the whole."""
    line = Image.new("RGB", (width, LINE), "white")
    ImageDraw.Draw(line).text((2, 1), words.encode("latin-1", "replace").decode("latin-1"), fill="black")
    yield np.array(line)
    if masks is not None and pictures:
        empty = np.zeros((0, pictures[0].height, pictures[0].width), dtype=bool)
        shown = [draw_overlay(p, np.stack([m[t] for m in masks]) if masks else empty) for t, p in enumerate(pictures)]
        strip = np.concatenate(shown, axis=1)
        yield np.pad(strip, ((0, 0), (0, width - strip.shape[1]), (0, 0)), constant_values=255)

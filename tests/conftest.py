"""Shared fixtures: the golden checkpoint and its recordings, loaded once."""

import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_XET", "1")  # Git LFS, but where a test asks for Xet; read at the client's import

import numpy as np
import PIL
import pytest
import torch
from packaging.version import Version
from PIL import Image
from transformers import AutoModel, AutoProcessor
from transformers.utils import logging as transformers_logging

import sa2va  # noqa: F401  registers the Auto classes

GOLDEN = Path(__file__).parent / "golden"
# Recorded with Pillow 13. Older ones round some pixels of the large picture, as Qwen-VL resizes it, to the next of 256.
RESIZES_AS_RECORDED = Version(PIL.__version__) >= Version("13")

if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has a core, and so have the processes that its tests start
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")


class Prescribed:
    """Logits processor that makes generation write fixed tokens, whatever the weights and the picture."""

    def __init__(self, token_ids: Sequence[int]):
        self.token_ids = list(token_ids)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Scores [B, vocab] that leave only the next token."""
        forced = torch.full_like(scores, -1e4)  # beams add scores up
        forced[:, self.token_ids[min(input_ids.shape[1], len(self.token_ids) - 1)]] = 0
        return forced


class Heard(logging.Handler):
    """Keeps what transformers' logger is told."""

    def __init__(self):
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record):
        self.messages.append(record.getMessage())


@pytest.fixture
def heard():
    transformers_logging.warning_once.cache_clear()
    handler = Heard()
    transformers_logging.add_handler(handler)
    yield handler.messages
    transformers_logging.remove_handler(handler)


@dataclass(frozen=True)
class GoldenCase:
    """One recorded call of the official implementation: its arguments, and what it computed."""

    name: str
    arguments: dict[str, Any]
    meta: dict[str, Any]
    arrays: dict[str, np.ndarray]

    def decoder_row(self, row: int) -> int:
        """Row of "dec" that scores row `row` of "low"; Sa2VA-i prompts all key frames in another decoder first."""
        key_frames = len(self.meta.get("sample_idx", ()))
        return row if row < key_frames else row + key_frames

    def mask(self, index: int) -> np.ndarray:
        """The recorded mask of `[SEG]` number `index`: bool [frames, h, w]."""
        shape = tuple(self.arrays[f"mask{index}_shape"])
        return np.unpackbits(self.arrays[f"mask{index}"])[: np.prod(shape)].reshape(shape).astype(bool)


class GoldenFamily:
    """A checkpoint with official recordings, and the arguments that reproduce each of them."""

    INPUTS = {"img2seg": "imgB", "imgD1seg": "imgD", "vid8": "vid8", "vid3": "vid3", "vid1": "vid3", "vid20": "vid20"}

    def __init__(self, name: str):
        self.folder = GOLDEN / name
        self.meta = json.loads((self.folder / "golden.json").read_text())
        self.arrays = np.load(self.folder / "golden.npz")
        self.inputs = np.load(GOLDEN / "inputs.npz")

    @property
    def cases(self) -> list[str]:
        """Names of the recorded calls."""
        return [name for name in self.meta if name != "_meta"]

    def case(self, name: str) -> GoldenCase:
        """A recorded call."""
        meta = self.meta[name]
        arrays = {key.partition("__")[2]: self.arrays[key] for key in self.arrays if key.startswith(f"{name}__")}
        arguments = {"text": meta["text"], **self._picture(name, meta)}
        if not meta["input"] and meta["past_text"]:  # beside a picture the recording only describes it
            arguments["past_text"] = meta["past_text"]
        return GoldenCase(name, arguments, meta, arrays)

    def _picture(self, name: str, meta: dict[str, Any]) -> dict[str, Any]:
        pixels = self.inputs[self.INPUTS.get(name, self.INPUTS.get(name.partition("_")[0], "imgA"))]
        if "video" in meta["input"]:
            frames = [Image.fromarray(frame) for frame in pixels]
            return {"video": frames[:1] if name.startswith("vid1_") else frames}
        arguments = {"image": Image.fromarray(pixels)} if "image" in meta["input"] else {}
        if "mask_prompts" in meta["input"]:
            arguments["mask_prompts"] = [self.inputs["vpA"]]
        if name == "img_multiturn":
            first = self.meta["img1seg"]
            tokens = "<IMG_CONTEXT>" * 1792
            asked = first["prompt_decoded_collapsed"].replace("<IMG_CONTEXT>*1792", tokens)
            arguments["past_text"] = f"{asked}{first['prediction']}\n"
        return arguments


def training_batch(processor, picture) -> dict[str, Any]:
    """Arguments of `forward` for a picture of 97 x 61 pixels with one object, in any family."""
    inputs = processor.prepare(picture, None, "Segment it.")
    answer = processor.tokenizer("Sure, [SEG].<|im_end|>", return_tensors="pt", add_special_tokens=False).input_ids
    input_ids = torch.cat([inputs.input_ids, answer], dim=1)
    batch = {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "labels": torch.cat([torch.full_like(inputs.input_ids, -100), answer], dim=1),
        "pixel_values": inputs.pixel_values,
        "image_grid_thw": inputs.image_grid_thw,
        "grounding_pixel_values": [processor.grounding_pixel_values(list(inputs.frames))],
        "mask_labels": [torch.ones(1, 61, 97)],
    }
    return {name: value for name, value in batch.items() if value is not None}


@pytest.fixture(scope="session")
def golden() -> GoldenFamily:
    """The InternVL + Qwen2 family."""
    return GoldenFamily("ivl_qwen2")


@pytest.fixture(scope="session")
def golden_model(golden):
    """The golden checkpoint, ready to predict; tests must not change it."""
    return AutoModel.from_pretrained(golden.folder, dtype=torch.float32).eval()


@pytest.fixture(scope="session")
def golden_processor(golden):
    """The processor of the golden checkpoint."""
    return AutoProcessor.from_pretrained(golden.folder)


@pytest.fixture(scope="session")
def clip(golden) -> list[Image.Image]:
    """Eight frames of 121 x 87 pixels."""
    return [Image.fromarray(frame) for frame in golden.inputs["vid8"]]


@pytest.fixture(scope="session")
def picture(golden) -> Image.Image:
    """A picture of 97 x 61 pixels."""
    return Image.fromarray(golden.inputs["imgA"])

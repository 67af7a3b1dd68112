"""What a question takes of a card's memory: computed from the sizes in a config, not measured.

    python benchmarks/memory.py tests/released/*.json            # a table; weights in 16 bits
    python benchmarks/memory.py tests/released/ByteDance--Sa2VA-4B.json --frames 16 --objects 8 --encode_batch_size 4

Counted are the weights; keys and values of prompt and answer; the largest layer of the vision tower and of the prompt's
pass; SAM 2's first stage for the frames that are encoded together; and what tracking remembers of each object. A
library's own buffers and the fragmentation of its allocator come on top: leave a tenth of the card free.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from sa2va import Sa2VAChatConfig, Sa2VAChatModel

ANSWER_TOKENS = 256
QWEN_PICTURE_TOKENS = 2048  # the most that preprocessing leaves of a picture
CARDS = (8, 16, 24, 80)


@dataclass(frozen=True)
class Estimate:
    """Memory of one question in bytes.

    Attributes:
        weights: all parameters.
        cache: keys and values of prompt and answer.
        activations: the larger of what vision tower, prompt and SAM 2's image encoder hold at once; they take turns.
        tracking: memory features and pointers of all objects, and what one frame's memory attention makes of them.
        tokens: length of the prompt.
    """

    weights: int
    cache: int
    activations: int
    tracking: int
    tokens: int

    @property
    def total(self) -> int:
        """Bytes in all."""
        return self.weights + self.cache + self.activations + self.tracking


def estimate(
    config: Sa2VAChatConfig,
    frames: int | None = None,
    objects: int = 1,
    encode_batch_size: int = 1,
    element: int = 2,
    answer_tokens: int = ANSWER_TOKENS,
) -> Estimate:
    """What a question takes.

    Args:
        config: of the checkpoint.
        frames: key frames of a video that the language model sees; None is one image in the most tiles it can have.
        objects: how many `[SEG]` are tracked, at most `max_objects_per_batch` of them at once.
        encode_batch_size: frames that SAM 2 encodes together.
        element: bytes of a number.
        answer_tokens: tokens written.
    """
    with torch.device("meta"):
        weights = sum(p.numel() for p in Sa2VAChatModel(config).parameters()) * element
    text = config.get_text_config()
    tokens, seen = _prompt(config, frames)
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim * (tokens + answer_tokens) * element
    # A layer of a transformer holds its input and residual, queries, keys, values and output, and its wide middle.
    prompt = tokens * (6 * text.hidden_size + 3 * text.intermediate_size) * element
    vision = config.vision_config
    tower = seen * (6 * vision.hidden_size + 2 * vision.intermediate_size) * element
    sam2 = config.grounding_config
    # The same of Hiera's first stage, whose map has a cell for 4 x 4 pixels and whose middle is four times as wide.
    encoding = encode_batch_size * (sam2.image_size // 4) ** 2 * sam2.embed_dim * (6 + 2 * 4) * element
    tracking = 0 if frames is None else _tracking(sam2, frames, objects, element)
    return Estimate(weights, cache, max(prompt, tower, encoding), tracking, tokens)


def _prompt(config: Sa2VAChatConfig, frames: int | None) -> tuple[int, int]:
    """Tokens of the prompt with 100 of words, and tokens that the vision tower takes at once."""
    if config.is_qwen_vl:
        pictures = frames or 1
        # The merger makes one token of 2 x 2 patches.
        return pictures * QWEN_PICTURE_TOKENS + 100, pictures * QWEN_PICTURE_TOKENS * 4
    tiles = frames or config.max_dynamic_patch + (config.use_thumbnail and config.max_dynamic_patch > 1)
    cells = (config.force_image_size // config.vision_config.patch_size) ** 2
    return int(tiles * cells * config.downsample_ratio**2) + 100, tiles * (cells + 1)


def _tracking(sam2, frames: int, objects: int, element: int) -> int:
    cells = (sam2.image_size // 16) ** 2
    maps = frames + sam2.num_maskmem - 1
    remembered = objects * maps * cells * sam2.mem_dim * element
    together = min(objects, sam2.max_objects_per_batch)
    # One layer: memory and positions side by side, its keys and values at full width, and their rotation in float32.
    attended = together * maps * cells * (2 * sam2.mem_dim * element + sam2.d_model * (2 * element + 4))
    return remembered + attended


def format_table(names: Sequence[str], estimates: Sequence[Estimate]) -> str:
    """A Markdown table in 10^9 bytes, with the smallest usual card that holds the total and a tenth more."""
    lines = ["| checkpoint | tokens | weights | cache | activations | tracking | GB in all | card |", "|---" * 8 + "|"]
    for name, found in zip(names, estimates, strict=True):
        parts = (found.weights, found.cache, found.activations, found.tracking, found.total)
        card = next((f"{size} GB" for size in CARDS if found.total * 1.1 <= size * 1e9), "several")
        sizes = (f"{part / 1e9:.2f}" for part in parts)
        lines.append("| " + " | ".join([name, str(found.tokens), *sizes, card]) + " |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", type=Path, nargs="+", help="config.json files, or files of tests/released")
    parser.add_argument("--frames", type=int, help="key frames of a video (default: an image in the most tiles)")
    parser.add_argument("--objects", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--encode_batch_size", type=int, default=1, help="(default: %(default)s)")
    parser.add_argument("--bytes", type=int, default=2, help="of a number: 2 or 4 (default: %(default)s)")
    options = parser.parse_args(argv)
    described = {path.stem: json.loads(path.read_text()) for path in options.configs if path.stem[0] != "_"}
    found = [
        estimate(
            Sa2VAChatConfig(**values.get("config", values)),
            options.frames,
            options.objects,
            options.encode_batch_size,
            options.bytes,
        )
        for values in described.values()
    ]
    print(format_table(list(described), found))


if __name__ == "__main__":
    main()

"""Makes one small checkpoint of two that `finetune/scenes.py` trained from the same start.

    python finetune/blend.py runs/words runs/tracking --take "grounding_encoder|memory_head" --output runs/both
    python finetune/blend.py runs/first runs/second --output runs/mean

With `--take` it is the first, but for what that names, which is the second's: so two sittings can teach different parts
side by side. Without, every weight is the mean of both, which often does better than either (model soups, arXiv
2203.05482). Heads that only training needs are blended, too, so that a sitting can go on with `--init OUTPUT/final`.
"""

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

from sa2va import Sa2VAChatModel
from sa2va.demo.media import replacing
from sa2va.demo.predict import exit_code
from sa2va.finetune.scenes import HEADS


def blend(first: Mapping[str, Tensor], second: Mapping[str, Tensor], take: str | None) -> dict[str, Tensor]:
    """Weights by name: the first's, but for those whose names begin as the pattern `take` says; or the means of both.

    Raises:
        ValueError: the two don't have the same weights.
    """
    shapes = [{name: tensor.shape for name, tensor in weights.items()} for weights in (first, second)]
    if shapes[0] != shapes[1]:
        differing = sorted(name for name in first.keys() | second.keys() if shapes[0].get(name) != shapes[1].get(name))
        raise ValueError(f"The two have other weights: {', '.join(differing[:5])}. Give checkpoints of one model.")
    if take is None:
        return {name: (tensor + second[name]) / 2 for name, tensor in first.items()}
    return {name: second[name] if re.match(take, name) else tensor for name, tensor in first.items()}


def main(argv: Sequence[str] | None = None) -> Path:
    """Writes OUTPUT/final and the heads beside it; returns the former.

    Raises:
        ValueError, OSError: one of the two is no such checkpoint, or not of the same model.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sittings", type=Path, nargs=2, metavar="OUTPUT_DIR", help="of a sitting, which holds final/")
    parser.add_argument("--take", metavar="PATTERN", help="weights of the second: how their names begin")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args(argv)
    finals = [folder / "final" for folder in options.sittings]
    if missing := [str(folder) for folder in finals if not folder.is_dir()]:
        raise NotADirectoryError(f"There is no {' and no '.join(missing)}. Give OUTPUT_DIRs of finished sittings.")
    model, other = map(Sa2VAChatModel.from_pretrained, finals)
    model.load_state_dict(blend(model.state_dict(), other.state_dict(), options.take))
    final = options.output / "final"
    model.load_processor().save_pretrained(final)
    model.save_pretrained(final)
    heads = [folder / HEADS for folder in options.sittings]
    if all(file.is_file() for file in heads):
        with replacing(options.output / HEADS) as temporary:
            save_file(blend(*map(load_file, heads), options.take), temporary)
    return final


if __name__ == "__main__":
    sys.exit(exit_code(main, "train"))

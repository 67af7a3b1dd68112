"""Trains: a checkpoint on one's own data, or a small model from nothing on drawn scenes.

    python finetune/train.py --model sa2va-tiny --data finetune:FOLDER --output_dir runs/mine    # see recipe.py
    python finetune/train.py --preset ten-minutes --output_dir runs/quick                        # see scenes.py

With --model or --data it is the recipe of the paper, else the scenes. Add --help to either for its arguments.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Hands over to `recipe.main` or `scenes.main`; returns the folder with the result.

    Args:
        argv: arguments without the program's name; default those of the process.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv in (["-h"], ["--help"]):
        print(__doc__)
        return None
    if any(word.partition("=")[0] in ("--model", "--data") for word in argv):
        from sa2va.finetune.recipe import main as train
    else:
        from sa2va.finetune.scenes import main as train
    return train(argv)


if __name__ == "__main__":
    from sa2va.demo.predict import exit_code

    sys.exit(exit_code(main, "train"))

"""The `sa2va` command: everything this package does at a terminal, under one name.

    sa2va predict photo.jpg "Please segment the dog."          sa2va COMMAND --help

The commands are those that also run as scripts; here they are found and called. Exit codes: 0 all went well, 1 the work
failed (one line on stderr says why), 2 the command line is wrong.

This is a package of its own, `sa2va_cli`, because `import sa2va` takes seconds (it registers the model with
transformers), which `sa2va --help` should not.
"""

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import NamedTuple

FAILED = 1
STOPPED = 130  # as a shell reports Ctrl+C


class Command(NamedTuple):
    """Where a command is found.

    Attributes:
        module: has `main(argv)`, which returns an exit code or something else that is no failure.
        extra: the optional dependencies it needs, None if it needs none.
        summary: what it does, for --help.
        inner: whether it is one of several commands of its module, whose name `main` wants too.
    """

    module: str
    extra: str | None
    summary: str
    inner: bool = False


COMMANDS = {
    "predict": Command("sa2va.demo.predict", "demo", "ask about an image or a video: words, masks, overlay"),
    "app": Command("sa2va.demo.app", "app", "the same in a browser"),
    "check": Command("sa2va.hub_upload", None, "is a checkpoint whole? Reads no weights", inner=True),
    "convert": Command("sa2va.hub_upload", None, "pickled weights to safetensors", inner=True),
    "pack": Command("sa2va.hub_upload", None, "a checkpoint, code and card as a model repository", inner=True),
    "push": Command("sa2va.hub_upload", None, "send it to the Hugging Face Hub", inner=True),
    "train": Command("sa2va.finetune.train", "train", "fine-tune on your own data"),
    "eval": Command("sa2va.evaluation.run", "eval", "score a model on a data set"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0, 1 after a failure that was told on stderr, 130 after Ctrl+C.

    Raises:
        SystemExit: 2 for a wrong command line, 0 after --help and --version.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    name = _parser().parse_args(words[:1]).command
    try:
        return run(name, words[1:])
    except ImportError as error:
        extra = COMMANDS[name].extra if isinstance(error, ModuleNotFoundError) else None
        return _fail(
            f"{error}." + (f' sa2va {name} needs more packages: pip install "sa2va[{extra}]"' if extra else "")
        )
    except (ValueError, TypeError, OSError) as error:
        return _fail(str(error))
    except KeyboardInterrupt:
        return _fail("stopped", STOPPED)


def _parser() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS))
    parser = argparse.ArgumentParser(
        prog="sa2va",
        usage="sa2va COMMAND ...",
        description="Sa2VA: ask in words about an image or a video, get words and masks.",
        epilog="commands:\n"
        + "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
        + "\n\nsa2va COMMAND --help says more. Exit codes: 0 done, 1 failed, 2 wrong command line, 130 stopped.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", metavar="COMMAND", choices=COMMANDS, help="one of those below")
    parser.add_argument("--version", action="version", version=f"sa2va {version('sa2va')}")
    return parser


def run(name: str, argv: Sequence[str]) -> int:
    """Calls a command.

    Args:
        name: a key of `COMMANDS`.
        argv: its arguments.

    Returns:
        0, or 1 where its own exit code is not 0: as scripts, some tell kinds of failures apart.

    Raises:
        Exception: what the command itself does not report.
    """
    command = COMMANDS[name]
    module = importlib.import_module(command.module)
    with _called("sa2va" if command.inner else f"sa2va {name}", argv):
        result = module.main([name, *argv] if command.inner else list(argv))
    return FAILED if isinstance(result, int) and result else 0


@contextmanager
def _called(program: str, argv: Sequence[str]) -> Iterator[None]:
    """Gives the process a command line of its own, from which parsers take the name for their help."""
    before = sys.argv
    sys.argv = [program, *argv]
    try:
        yield
    finally:
        sys.argv = before


def _fail(reason: str, code: int = FAILED) -> int:
    """Tells on one line what went wrong."""
    print(f"error: {' '.join(reason.split())}", file=sys.stderr)
    return code


if __name__ == "__main__":
    sys.exit(main())

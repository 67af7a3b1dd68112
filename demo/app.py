"""Sa2VA in the browser: chat about an image or a video, with masks in the colours of the words they belong to.

    python demo/app.py
    python demo/app.py --model ByteDance/Sa2VA-4B --device cuda --port 7861

It can be reached from this computer only, unless --share makes a public link through gradio's servers, or
GRADIO_SERVER_NAME names another address to answer at, as in a container or a Space: 0.0.0.0 is all. The same address
answers programs: see docs/app.md.
"""

import argparse
import os
import re
import sys
from collections.abc import Sequence
from functools import partial

from sa2va.demo.predict import add_model_options, at_least, exit_code, load_model, predict_options

LOCALHOST = "127.0.0.1"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: serves the page until it is interrupted.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code: 0, or 2 after an error that the user can mend, which is told on stderr.
    """
    arguments = parse(argv)
    return exit_code(partial(launch, arguments), "app")


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; see `python demo/app.py --help`."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add_model_options(parser)
    add("--port", type=port, help="default: the first free one from 7860 on")
    add("--share", action="store_true", help="make a public link through gradio's servers")
    add("--max-file-size", type=file_size, default="200mb", metavar="N", help="of an upload; default: 200mb")
    add("--max-frames", type=at_least(1), default=300, metavar="N", help="of a video; default: 300")
    add(
        "--concurrency",
        type=at_least(1),
        default=1,
        metavar="N",
        help="questions answered at the same time; default: 1",
    )
    add("--queue", type=at_least(1), default=20, metavar="N", help="questions that may wait; default: 20")
    return parser.parse_args(argv)


def port(text: str) -> int:
    """The number of a port.

    Raises:
        argparse.ArgumentTypeError: there is no such port.
    """
    number = at_least(1)(text)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"{number} is no port; the greatest is 65535")
    return number


def file_size(text: str) -> str:
    """A size as gradio takes it, such as 200mb.

    Raises:
        argparse.ArgumentTypeError: something else.
    """
    if not re.fullmatch(r"\d+ *[kmgt]?b", text, flags=re.IGNORECASE):
        raise argparse.ArgumentTypeError(f"{text} is no size; give one such as 200mb")
    return text


def launch(arguments: argparse.Namespace, wait: bool = True) -> str:
    """Serves the page that the parsed command line asks for.

    Args:
        arguments: see `parse`.
        wait: until the process is interrupted; else the server goes on in a thread.

    Returns:
        The page's address.

    Raises:
        ValueError, TypeError, OSError: the model, an option or the port can't be used.
        ImportError: gradio is missing.
    """
    from sa2va.demo.page import CSS, THEME, Page  # gradio takes seconds to import, and --help needs it not

    options = predict_options(arguments)
    model = load_model(arguments.model, arguments.device, arguments.dtype)
    page = Page(
        model,
        num_frames=options.pop("num_frames", model.load_processor().num_key_frames),
        frame_sampling=options.pop("frame_sampling", model.load_processor().frame_sampling),
        threshold=options.pop("mask_threshold"),
        max_frames=arguments.max_frames,
        concurrency=arguments.concurrency,
        queue_size=arguments.queue,
        generate_kwargs=options,
    )
    _, address, _ = page.blocks.launch(
        server_name=os.environ.get("GRADIO_SERVER_NAME", LOCALHOST),
        server_port=arguments.port,
        share=arguments.share,
        max_file_size=arguments.max_file_size,
        prevent_thread_lock=not wait,
        quiet=not wait,
        theme=THEME,
        css=CSS,
    )
    return address


if __name__ == "__main__":
    sys.exit(main())

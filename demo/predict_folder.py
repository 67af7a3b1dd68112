"""Asks Sa2VA the same about every image and video of a folder, with as many processes as there are devices.

    python demo/predict_folder.py videos "Please segment the dog." --output dogs.jsonl
    accelerate launch --multi_gpu --num_processes 2 demo/predict_folder.py videos "Please segment the dog."

The second also works with no GPU at all (accelerate's own --cpu starts one process). Each process takes every n-th
file. The output has one line for each file, in the order of their names:

    {"file", "settings", "question", "prediction", "phrases", "size": [height, width], "fps": number or null,
     "objects": [{"phrase", "scores": {"iou": [...], "object": [...]}, "areas": [...], "rle": [...]}]}

with one number and one COCO run-length encoding for each frame. A file that can't be read gets
`{"file", "question", "error"}`, and the exit code is 1. Run again after a stop, and only files without an answer are
done. Processes on several machines need a file system in common.
"""

import argparse
import glob
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from sa2va import Sa2VAChatModel
from sa2va.demo.media import append_lines, finished_lines, open_source, replacing
from sa2va.demo.predict import (
    USER_ERROR,
    add_frame,
    add_model_options,
    load_model,
    new_record,
    predict,
    predict_options,
    weights_version,
)

SOME_FAILED = 1
PATIENCE = timedelta(days=7)  # a process waits for the others as long as their videos take


def main(argv: Sequence[str] | None = None) -> int:
    """The command line.

    Args:
        argv: arguments without the program's name; default those of the process.

    Returns:
        Exit code of this process: 0; 1 if files could not be read (of the first process); 2 after an error that the
        user can mend. Both are told on stderr.
    """
    arguments = _parser().parse_args(argv)
    on_cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    try:
        failed = run(arguments, state)
    except (ValueError, TypeError, OSError, ImportError) as error:
        process = f" in process {state.process_index}" if state.num_processes > 1 else ""
        print(f"error{process}: {error}", file=sys.stderr)
        return USER_ERROR
    for record in failed:
        print(f"{record['file']}: {record['error']}", file=sys.stderr)
    return SOME_FAILED if failed else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("folder", type=Path, metavar="FOLDER", help="images and videos; hidden files and folders are left out")
    add("text", metavar="TEXT", help="the question or request")
    add("--output", type=Path, default=Path("results.jsonl"), metavar="FILE", help="default: results.jsonl")
    add_model_options(parser)
    return parser


def run(arguments: argparse.Namespace, state: PartialState) -> list[dict[str, Any]]:
    """Does this process's share; the first process merges what all have done.

    Returns:
        The records of files that could not be read, in the first process; nothing in the others.

    Raises:
        ValueError, OSError: the folder, the output or the model can't be used.
    """
    if not arguments.text.strip():
        raise ValueError("TEXT says nothing. Ask something, such as 'Please segment the red car.'")
    names = _file_names(arguments.folder, arguments.output)
    settings = _settings(arguments)  # once: the weights may be replaced meanwhile
    done = {name for name, record in _results(arguments, settings).items() if "error" not in record}
    state.wait_for_everyone()  # all have read the same results before anyone adds to them
    todo = [name for name in names if name not in done]
    if todo:  # also those whose share is empty: all have to wait equally often
        _answer_all(todo[state.process_index :: state.num_processes], arguments, settings, state)
    elif state.is_main_process:
        print(f"{str(arguments.output)!r} has an answer for every file; remove it to ask again.", file=sys.stderr)
    state.wait_for_everyone()
    failed = _merge(names, arguments, settings) if state.is_main_process else []
    state.wait_for_everyone()  # a launcher stops all processes when one ends with an error
    return failed


def _file_names(folder: Path, output: Path) -> list[str]:
    folder = folder.expanduser()
    if not folder.is_dir():
        raise NotADirectoryError(f"There is no folder {str(folder)!r}. Give one that holds images and videos.")
    # A link that leads nowhere stays: it gets an error of its own.
    files = [f for f in folder.iterdir() if (f.is_file() or not f.exists()) and not f.name.startswith(".")]
    names = sorted(file.name for file in files if file.resolve() != output.resolve())
    if not names:
        raise FileNotFoundError(f"The folder {str(folder)!r} holds no files. Folders inside it are not searched.")
    return names


def _parts(output: Path) -> list[Path]:
    """What the processes of this run, or of one that was stopped, have written."""
    return sorted(output.parent.glob(f".{glob.escape(output.name)}.[0-9]*.part"))


def _results(arguments: argparse.Namespace, settings: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All records so far by file name, later ones over earlier, but no failure over an answer.

    Raises:
        ValueError: they answer another question, are of another model or other options, or are no records.
    """
    results: dict[str, dict[str, Any]] = {}
    for path in (arguments.output, *_parts(arguments.output)):
        for record in _read(path):
            if not isinstance(record, dict) or not isinstance(record.get("file"), str):
                raise ValueError(f"{str(path)!r} holds other lines than answers. Give another --output, or remove it.")
            if record.get("question") != arguments.text:
                raise ValueError(
                    f"{str(path)!r} holds answers to {record.get('question')!r}. Give another --output, or remove it."
                )
            if (made_with := record.get("settings", settings)) != settings:
                raise ValueError(
                    f"{str(path)!r} holds answers made with {made_with}, now asked for are {settings}. Give another "
                    "--output, or remove it."
                )
            if "error" not in record or "error" in results.get(record["file"], record):
                results[record["file"]] = record
    return results


def _settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """What answers depend on besides the question."""
    folder = Path(arguments.model).expanduser()
    model = {"model": str(folder.resolve()) if folder.is_dir() else arguments.model, "weights": weights_version(folder)}
    return {**model, "dtype": arguments.dtype, **predict_options(arguments)}


def _read(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a file; a line that a stopped process left unfinished is none."""
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a folder. Give --output the name of a file.")
    for _, line in finished_lines(path) if path.is_file() else ():
        try:
            yield json.loads(line)
        except ValueError as error:
            raise ValueError(f"{str(path)!r} holds no JSON lines ({error}). Give another --output.") from error


def _answer_all(names: list[str], arguments: argparse.Namespace, settings: dict[str, Any], state: PartialState) -> None:
    """Appends a record for each file to this process's part, as soon as it is known."""
    device = str(state.device) if arguments.device == "auto" else arguments.device
    with state.main_process_first():  # which downloads the checkpoint for all
        model = load_model(arguments.model, device, arguments.dtype) if names else None
    with append_lines(arguments.output.with_name(f".{arguments.output.name}.{state.process_index}.part")) as file:
        for name in names:
            print(json.dumps(_answer(name, model, arguments, settings)), file=file, flush=True)


def _answer(
    name: str, model: Sa2VAChatModel, arguments: argparse.Namespace, settings: dict[str, Any]
) -> dict[str, Any]:
    """The record of one file."""
    try:
        source = open_source(arguments.folder / name)
        record: dict[str, Any] = {}
        for _, frame in predict(model, source, arguments.text, predict_options(arguments)):
            if not record:
                record = new_record(arguments.text, frame, source)
                del record["overlay"]
            add_frame(record["objects"], frame)
        return {"file": name, "settings": settings, **record}
    except (ValueError, TypeError, OSError, torch.OutOfMemoryError) as error:
        return {"file": name, "question": arguments.text, "error": str(error)}


def _merge(names: list[str], arguments: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Writes all records in the order of file names, removes the parts and returns the failures.

    Records of files that are gone stay, at the end.
    """
    results = _results(arguments, settings)
    order = [*(name for name in names if name in results), *sorted(results.keys() - set(names))]
    with replacing(arguments.output) as temporary:
        temporary.write_text("".join(json.dumps(results[name]) + "\n" for name in order), encoding="utf-8")
    for part in _parts(arguments.output):
        part.unlink()
    return [results[name] for name in names if "error" in results.get(name, {})]


if __name__ == "__main__":
    sys.exit(main())

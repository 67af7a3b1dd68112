"""Predicts a data set and scores the predictions.

    python -m evaluation.run --model ByteDance/Sa2VA-4B --data refcoco --root data/ref_seg --split val
    accelerate launch --multi_gpu --num_processes 8 evaluation/run.py --data mevis --root data/mevis --split valid_u
    python -m evaluation.run --data refcoco --root data/ref_seg --split val --output DIR --metrics_only

It prints a table (what is measured of which data set: `evaluation/protocols.py`) and fills a folder: `predictions/`
(`evaluation/predict.py`), `scores.json`, `worst.html` and, for the splits whose truth a server keeps,
`submission.zip`. Run again after a stop, it goes on where it was.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from tqdm import tqdm
from transformers.utils import logging

from sa2va.data.registry import DATASETS, Dataset, open_dataset
from sa2va.demo.media import replacing, write_json
from sa2va.demo.predict import add_answer_options, at_least, exit_code, load_model, weights_version
from sa2va.evaluation.captions import TEXT_ENCODER
from sa2va.evaluation.predict import Predictions, missing, predict_dataset, subset
from sa2va.evaluation.protocols import (
    BEFORE_QUESTIONS,
    PROTOCOL_OF,
    PROTOCOLS,
    Measurement,
    Protocol,
    measure_sample,
    protocol_of,
    summarize_grounding,
)
from sa2va.evaluation.report import code_version, format_table, library_versions, percent, worst, worst_page
from sa2va.evaluation.submissions import FOLDERS, write_submission

logger = logging.get_logger(f"transformers.{__name__}")

OUTPUTS = Path("outputs/evaluation")
SETTINGS, PREDICTIONS = "settings.json", "predictions"
NO_TRUTH = "Nothing to score: the truth of this split is not published."
NO_PREDICTIONS = "Nothing to score: no sample has a prediction."
PATIENCE = timedelta(days=7)  # a process waits for the others as long as their samples take


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line's options; names of several words may be written with - or _."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)

    def add(name: str, **options: Any) -> None:
        name = name.removeprefix("--").replace("-", "_")
        parser.add_argument(*dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")), **options)

    add_answer_options(add)
    add("data", required=True, choices=sorted(DATASETS), help="which data set")
    add("root", required=True, type=Path, metavar="DIR", help="its folder, as docs/data.md has it")
    add("split", default="val", help="such as val, testA or valid_u; default: val")
    add("metric", choices=sorted(PROTOCOLS), help="default: that of the data set")
    add("before", metavar="TEXT", help="between a picture and the question; default: as in Sa2VA's evaluation")
    add("merge", default="official", choices=("official", "union"), help="masks of a video's answer: the first, or all")
    add("text_encoder", default=TEXT_ENCODER, help="compares phrases of gcg as GLaMM does; '' leaves it out")
    add("limit", type=at_least(1), metavar="N", help="that many samples, drawn at random")
    add("seed", type=int, default=0, help="names the draw")
    add("output", type=Path, metavar="DIR", help="default: outputs/evaluation/MODEL/DATA-SPLIT")
    add("metrics_only", action="store_true", help="score the predictions that are there, and make none")
    add("worst", type=at_least(0), default=20, metavar="N", help="cases on the page of the worst; default: 20")
    add("json", action="store_true", help="print what scores.json holds, and no table")
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace, state: PartialState) -> dict[str, Any] | None:
    """Does what the command line says.

    Returns:
        In the first process what `scores.json` holds, else None.

    Raises:
        ValueError, OSError: data, model or output can't be used.
    """
    protocol = protocol_of(arguments.data, arguments.metric)
    dataset = open_dataset(arguments.data, arguments.root, arguments.split)
    indices = subset(len(dataset), arguments.limit, arguments.seed)
    output = arguments.output or OUTPUTS / Path(arguments.model).name / f"{arguments.data}-{arguments.split}"
    if protocol in (PROTOCOLS["gcg"], PROTOCOLS["words"]):
        import pycocoevalcap  # noqa: F401 (told before predictions are made, which take long)
    if not arguments.metrics_only:
        before = BEFORE_QUESTIONS.get(arguments.data, "") if arguments.before is None else arguments.before
        asked = {"dialogue": protocol.dialogue, **({"before": before} if before else {})}
        _predict(arguments, asked, dataset, indices, output, state)
    return _score(arguments, protocol, dataset, indices, output) if state.is_main_process else None


# ---------- predictions


def _predict(
    arguments: argparse.Namespace,
    options: dict[str, Any],
    dataset: Dataset,
    indices: Sequence[int],
    output: Path,
    state: PartialState,
) -> None:
    """Adds what is missing to the predictions, shared among the processes."""
    names = ("num_frames", "frame_sampling", "max_new_tokens")
    options = options | {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    asked = {name: getattr(arguments, name) for name in ("data", "split", "dtype")} | options
    folder = Path(arguments.model).expanduser()
    asked |= {"model": str(folder.resolve()) if folder.is_dir() else arguments.model}
    asked |= {"root": str(arguments.root.resolve()), "weights": weights_version(folder)}
    _check_settings(asked, output)
    todo = missing(dataset, indices, output / PREDICTIONS)
    state.wait_for_everyone()  # all have read the same before anyone writes
    if todo:
        device = str(state.device) if arguments.device == "auto" else arguments.device
        with state.main_process_first():  # which downloads the checkpoint for all
            model = load_model(arguments.model, device, arguments.dtype)
        if state.is_main_process:
            ran = {"device": str(model.device), "dtype": str(model.dtype).removeprefix("torch.")}
            write_json(output / SETTINGS, {"settings": asked, "made_with": ran | _versions()}, allow_nan=False)
        share = todo[state.process_index :: state.num_processes]
        place = {"process": state.process_index, "progress": state.is_main_process}
        predict_dataset(model, model.load_processor(), dataset, share, output / PREDICTIONS, **place, **options)
    state.wait_for_everyone()


def _check_settings(asked: dict[str, Any], output: Path) -> None:
    """Predictions made in different ways must not be mixed."""
    if not (output / SETTINGS).is_file():
        if any((output / PREDICTIONS).glob("*.jsonl")):
            raise ValueError(
                f"{str(output)!r} holds predictions, but no {SETTINGS}. Give another --output, or remove it."
            )
        return
    before = _saved(output)["settings"]
    if differing := [name for name in asked | before if asked.get(name) != before.get(name)]:
        told = ", ".join(f"{name} {before.get(name)!r} and not {asked.get(name)!r}" for name in differing)
        raise ValueError(f"{str(output)!r} holds predictions with {told}. Give another --output, or remove it.")


def _versions() -> dict[str, Any]:
    return {"code": code_version(), "libraries": library_versions()}


def _saved(output: Path) -> dict[str, Any]:
    path = output / SETTINGS
    if not path.is_file():
        raise FileNotFoundError(f"There are no predictions: {str(path)!r} is not there. Run without --metrics_only.")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged: {error}. Give another --output, or remove its folder.") from error


# ---------- scores


def _score(
    arguments: argparse.Namespace, protocol: Protocol, dataset: Dataset, indices: Sequence[int], output: Path
) -> dict[str, Any]:
    """Measures the predictions that are there and writes all that is told about them."""
    saved = _saved(output)
    if other := [name for name in ("data", "split") if saved["settings"].get(name) != getattr(arguments, name)]:
        told = ", ".join(f"{name} {saved['settings'].get(name)!r}" for name in other)
        raise ValueError(f"{str(output)!r} holds predictions of {told}. Give their --data and --split.")
    predictions = Predictions(output / PREDICTIONS)
    there = {sample.id: index for index, sample in ((i, dataset[i]) for i in indices) if sample.id in predictions}
    if len(there) < len(indices):
        logger.warning(f"{len(indices) - len(there)} of {len(indices)} samples have no prediction and are left out.")
    measurements: list[Measurement] = []
    for name, index in tqdm(there.items(), desc="scores", file=sys.stderr):
        measurements += measure_sample(protocol, dataset[index], predictions[name], arguments.merge)
    options = {"text_encoder": arguments.text_encoder} if protocol.summarize is summarize_grounding else {}
    names, root = ("merge", "limit", "seed", *options), str(arguments.root.resolve())
    result = {
        "scores": percent(protocol.summarize(measurements, **options)) if measurements else {},
        "samples": {"data_set": len(dataset), "drawn": len(indices), "predicted": len(there)},
        "turns": len(measurements),
        "metric": arguments.metric or PROTOCOL_OF[arguments.data],
        "settings": saved["settings"] | {name: getattr(arguments, name) for name in names} | {"root": root},
        "predictions_made_with": saved["made_with"],
        "scored_with": _versions(),
    }
    write_json(output / "scores.json", result, allow_nan=False)
    cases = [(item, dataset[there[item.sample_id]]) for item in worst(measurements, arguments.worst)]
    page = worst_page(f"{output.name}: the worst", [(*case, predictions[case[1].id]) for case in cases])
    with replacing(output / "worst.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    if arguments.data in FOLDERS and len(there) == len(dataset) and not measurements:
        samples = (dataset[index] for index in indices)
        write_submission(output / "submission.zip", arguments.data, samples, predictions, arguments.merge)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or 2 after an error that the user can mend."""
    arguments = parse_arguments(argv)
    on_cpu = arguments.device == "cpu" or not torch.accelerator.is_available()
    state = PartialState(cpu=on_cpu, timeout=PATIENCE)
    return exit_code(lambda: _tell(run(arguments, state), arguments.json), "eval")


def _tell(result: dict[str, Any] | None, as_json: bool) -> None:
    """Prints what `run` gave."""
    if result and as_json:
        print(json.dumps(result))
    elif result:
        count = result["samples"]
        nothing = NO_TRUTH if count["predicted"] else NO_PREDICTIONS
        print(format_table(result["scores"]) if result["scores"] else nothing)
        print(f"{count['predicted']} of {count['data_set']} samples")


if __name__ == "__main__":
    sys.exit(main())

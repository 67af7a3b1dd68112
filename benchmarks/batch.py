"""What `predict_batch` gains: answers per second by batch size, beside `predict_forward` on one sample after the other.

    python benchmarks/batch.py [--model sa2va-tiny] [--batch-sizes 1 4 16] [--samples 48] [--repeats 3] [--device cpu]

Samples are synthetic scenes of different sizes, a third each: requests for masks in pictures, questions about them, and
captions with a mask for every shape. All ways answer the same samples, in turns; printed are medians, with the range
over rounds, and how many answers have other words than those given one by one (none should).
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image
from transformers import AutoModel

from sa2va.benchmarks.stages import clock, median_ratio
from sa2va.data.scenes import make_sample
from sa2va.demo.media import write_json
from sa2va.demo.predict import DEFAULT_MODEL

TASKS = ("refer", "question", "caption")
ONE_BY_ONE = "one by one"


def make_samples(count: int) -> list[dict[str, Any]]:
    """Arguments of `predict_forward`: a picture and the first question about it."""
    scenes = (make_sample(0, index, split="test", task=TASKS[index % len(TASKS)]) for index in range(count))
    return [{"image": Image.fromarray(scene.frames[0]), "text": scene.turns[0].question} for scene in scenes]


def measure(
    model: Any, samples: Sequence[dict[str, Any]], batch_sizes: Sequence[int], repeats: int
) -> list[dict[str, Any]]:
    """Answers all samples in every way, in turns, after one round that warms up.

    Returns:
        For `ONE_BY_ONE` and each batch size: "way", "per_second" (of each round) and "different", the number of
        answers whose words differ from the first way's.
    """
    ways: dict[Any, Callable[[], list]] = {ONE_BY_ONE: lambda: [model.predict_forward(**sample) for sample in samples]}
    for size in batch_sizes:
        ways[size] = lambda size=size: model.predict_batch(samples, batch_size=size)
    words = {way: [output.prediction for output in answer()] for way, answer in ways.items()}
    rates: dict[Any, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, answer in ways.items():
            rates[way].append(len(samples) / clock(answer, model.device))
    reference = words[ONE_BY_ONE]
    different = {way: sum(a != b for a, b in zip(found, reference, strict=True)) for way, found in words.items()}
    return [{"way": way, "per_second": rates[way], "different": different[way]} for way in ways]


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as Markdown; the ratio is the median over rounds of that to the first way."""
    lines = ["| batch size | answers per second | ratio | different |", "|---|---|---|---|"]
    for row in rows:
        rates = row["per_second"]
        spread = f"{median(rates):.1f} ({min(rates):.1f}-{max(rates):.1f})"
        ratio = median_ratio(rates, rows[0]["per_second"])
        lines.append(f"| {row['way']} | {spread} | {ratio:.2f} | {row['different']} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(DEFAULT_MODEL), help="folder or hub name (default: %(default)s)")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=(1, 4, 16), help="(default: %(default)s)")
    parser.add_argument("--samples", type=int, default=48, help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    options = parser.parse_args(argv)
    model = AutoModel.from_pretrained(options.model, dtype=options.dtype).eval().to(options.device)
    rows = measure(model, make_samples(options.samples), options.batch_sizes, options.repeats)
    print(format_table(rows))
    if options.json:
        machine = {"torch": torch.__version__, "device": options.device, "threads": torch.get_num_threads()}
        write_json(options.json, {**machine, "rows": rows})


if __name__ == "__main__":
    main()

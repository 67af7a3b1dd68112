"""What `compile_parts` gains: seconds of each part plain and compiled, taken in turns, and what compiling took.

    python benchmarks/compile.py [--parts NAME ...] [--device cpu] [--repeats 5] [--cpu-time] [--json FILE]

Parts: the image encoder of SAM 2 on one frame, and the language model on one more token (a mean over an answer of 32);
each of `sa2va-tiny`, and at the sizes of Sa2VA-1B with random weights. On a busy CPU `--cpu-time` with one thread
(OMP_NUM_THREADS=1) is steadier than the wall clock.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModel

from sa2va import Sa2VAChatConfig, Sa2VAChatModel
from sa2va.benchmarks.stages import synchronize
from sa2va.demo.media import write_json

ROOT = Path(__file__).parents[1]
DESCRIPTION = ROOT / "tests" / "released" / "ByteDance--Sa2VA-1B.json"
PROMPT, ANSWER = 64, 32  # tokens
PARTS = ("tiny image encoder", "tiny decode step", "real image encoder", "real decode step")


def load(part: str, device: str) -> Sa2VAChatModel:
    """The model that holds a part, in float32; at true size all that the part does not need is made small."""
    if part.startswith("tiny"):
        return AutoModel.from_pretrained(ROOT / "sa2va-tiny", dtype=torch.float32).eval().to(device)
    described = json.loads(DESCRIPTION.read_text())["config"]
    described["vision_config"]["num_hidden_layers"] = 1
    if part.endswith("image encoder"):
        described["llm_config"] |= {"num_hidden_layers": 1, "vocab_size": 1024}
    else:
        tiny = json.loads((ROOT / "sa2va-tiny" / "config.json").read_text())
        described["grounding_config"] = tiny["grounding_config"]
    return AutoModel.from_config(Sa2VAChatConfig(**described), dtype=torch.float32).eval().to(device)


def work_of(part: str, model: Sa2VAChatModel) -> Callable[[], Any]:
    """What is timed."""
    if part.endswith("image encoder"):
        frame = torch.zeros(1, 3, *[model.config.grounding_config.image_size] * 2, device=model.device)
        return lambda: model.grounding_encoder.encode(frame)
    embeds = model.get_input_embeddings()(torch.arange(PROMPT, device=model.device)[None])
    settings = {"max_new_tokens": ANSWER, "min_new_tokens": ANSWER, "do_sample": False, "pad_token_id": 0}
    return lambda: model.causal_model.generate(inputs_embeds=embeds, **settings)


def seconds_of(work: Callable[[], Any], device: torch.device, cpu_time: bool) -> float:
    """Seconds until everything is computed, by the wall clock or of CPU in this process and those it waited for."""
    clock = (lambda: time.process_time() + sum(os.times()[2:4])) if cpu_time else time.perf_counter
    begun = clock()
    work()
    synchronize(device)
    return clock() - begun


@torch.no_grad()
def measure(part: str, device: str, repeats: int, cpu_time: bool) -> dict:
    """Medians over plain and compiled runs in turns.

    Returns:
        "part", "plain_seconds", "compiled_seconds", "ratio", the lowest and highest of each ("spread") and
        "compile_seconds", what the first compiled run took longer.
    """
    model = load(part, device)
    work, wanted = work_of(part, model), "image_encoder" if part.endswith("image encoder") else "decode_step"
    off = {"image_encoder": False, "decode_step": False}
    seconds: dict[bool, list[float]] = {False: [], True: []}
    for round_number in range(repeats + 1):
        for compiled in (False, True):
            model.compile_parts(**{**off, wanted: compiled}, fullgraph=True)
            taken = seconds_of(work, model.device, cpu_time)
            if round_number:
                seconds[compiled].append(taken)
            else:
                first = taken
    per_run = ANSWER if wanted == "decode_step" else 1
    plain, fast = (median(seconds[compiled]) / per_run for compiled in (False, True))
    return {
        "part": part,
        "plain_seconds": plain,
        "compiled_seconds": fast,
        "ratio": fast / plain,
        "spread": [[min(taken) / per_run, max(taken) / per_run] for taken in seconds.values()],
        "compile_seconds": first - fast * per_run,
    }


def format_table(rows: Sequence[dict]) -> str:
    """Rows as Markdown."""
    lines = ["| part | plain | compiled | ratio | compiling |", "|---|---|---|---|---|"]
    for row in rows:
        plain, fast = (f"{1000 * row[name]:.1f} ms" for name in ("plain_seconds", "compiled_seconds"))
        lines.append(f"| {row['part']} | {plain} | {fast} | {row['ratio']:.2f} | {row['compile_seconds']:.0f} s |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="(default: all)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind (default: %(default)s)")
    parser.add_argument("--cpu-time", action="store_true", help="seconds of CPU instead of the wall clock")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    options = parser.parse_args(argv)
    rows = [measure(part, options.device, options.repeats, options.cpu_time) for part in options.parts]
    print(format_table(rows))
    if options.json:
        machine = {
            "torch": torch.__version__,
            "device": options.device,
            "threads": torch.get_num_threads(),
            "cpu_time": options.cpu_time,
        }
        write_json(options.json, {**machine, "rows": rows})


if __name__ == "__main__":
    main()

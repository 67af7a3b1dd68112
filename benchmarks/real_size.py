"""What a checkpoint of true size costs on this machine: memory to load it, seconds for each stage of one picture.

    python benchmarks/real_size.py CONFIG_JSON [--dtype float32] [--device cpu] [--json]

CONFIG_JSON describes a released checkpoint, such as `tests/released/ByteDance--Sa2VA-1B.json`, or is its config.json.
The weights are random: they are written once to a temporary file in bfloat16, and a process of its own loads them and
answers, so that its peak memory is that of a user. The words of the answer are prescribed, as random weights would not
write `[SEG]`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from sa2va import Sa2VAChatConfig
from sa2va.benchmarks.stages import Stages, peak_memory, prescribed

ANSWER = "Sure, it is [SEG].<|im_end|>"
TOKENIZER = Path(__file__).parents[1] / "tests" / "golden" / "ivl_qwen2"
PICTURE_SIZE = (448, 448)  # one tile


def write_random_checkpoint(config: dict, folder: Path) -> int:
    """Writes a checkpoint of the InternVL family with random bfloat16 weights; returns its number of parameters."""
    model = AutoModel.from_config(Sa2VAChatConfig(**config), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(TOKENIZER).save_pretrained(folder)
    return model.num_parameters()


def measure(folder: str, dtype: str, device: str) -> dict:
    """Loads a checkpoint and answers about one picture.

    Returns:
        "load_seconds", "peak_load_gb" and "peak_gb" (`peak_memory`, 10^9 bytes), "threads", "total_seconds" of the
        answer, "stage_seconds" by stage, "mask_shape".
    """
    begun = time.perf_counter()
    model = AutoModel.from_pretrained(folder, dtype=dtype, device_map=device).eval()
    loaded = {"load_seconds": time.perf_counter() - begun, "peak_load_gb": peak_memory(model.device) / 1e3}
    processor = model.load_processor()
    tokens = processor.tokenizer(ANSWER).input_ids
    picture = Image.radial_gradient("L").resize(PICTURE_SIZE)
    begun = time.perf_counter()
    with prescribed(model, tokens), Stages(model, processor) as stages:
        output = model.predict_forward(image=picture, text="Please segment the disk.")
    total = time.perf_counter() - begun
    (mask,) = output.prediction_masks
    return {
        **loaded,
        "threads": torch.get_num_threads(),
        "peak_gb": peak_memory(model.device) / 1e3,
        "total_seconds": total,
        "stage_seconds": {**stages.seconds, "other": total - sum(stages.seconds.values())},
        "mask_shape": list(mask.shape),
    }


def run(config_json: Path, dtype: str = "float32", device: str = "cpu", threads: int | None = None) -> dict:
    """Writes a random checkpoint, measures it in a process of its own and throws it away.

    Args:
        config_json: see the command line.
        dtype, device: what the weights are loaded as, and where.
        threads: CPU threads of the measuring process; None leaves it to PyTorch.

    Returns:
        What `measure` returns, and what was measured.

    Raises:
        RuntimeError: the measuring process failed; the message holds what it wrote.
    """
    described = json.loads(config_json.read_text())
    with tempfile.TemporaryDirectory() as folder:
        parameters = write_random_checkpoint(described.get("config", described), Path(folder))
        command = [sys.executable, __file__, "--measure", folder, "--dtype", dtype, "--device", device]
        command += ["--threads", str(threads)] if threads else []
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"The measuring process failed:\n{done.stderr}")
    return {
        "checkpoint": config_json.stem,
        "parameters": parameters,
        "dtype": dtype,
        "device": device,
        **json.loads(done.stdout.splitlines()[-1]),
    }


def format_table(result: dict) -> str:
    """A result as lines of text."""
    lines = [
        f"{result['checkpoint']}, {result['parameters'] / 1e9:.2f} billion parameters, {result['dtype']} on "
        f"{result['device']}, {result['threads']} threads",
        f"load: {result['load_seconds']:.1f} s, peak {result['peak_load_gb']:.2f} GB; "
        f"answer: {result['total_seconds']:.1f} s, peak {result['peak_gb']:.2f} GB",
    ]
    return "\n".join([*lines, *(f"  {name:14}{value:8.2f} s" for name, value in result["stage_seconds"].items())])


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, nargs="?", help="config.json or a file of tests/released")
    parser.add_argument("--dtype", default="float32", help="(default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: PyTorch's)")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--measure", metavar="FOLDER", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.measure:
        if options.threads:
            torch.set_num_threads(options.threads)
        print(json.dumps(measure(options.measure, options.dtype, options.device)))
        return
    if options.config is None:
        parser.error("CONFIG_JSON is missing.")
    result = run(options.config, options.dtype, options.device, options.threads)
    print(json.dumps(result, indent=2) if options.json else format_table(result))


if __name__ == "__main__":
    main()

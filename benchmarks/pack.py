"""What it costs to pack a checkpoint of true size: seconds, and peak memory of the process that does it.

    python benchmarks/pack.py CONFIG_JSON [--layout native] [--max_shard_size 5GB] [--json]

CONFIG_JSON describes a released checkpoint, such as `tests/released/ByteDance--Sa2VA-4B.json`, or is its config.json.
The checkpoint is a sparse file: it has all its size in bfloat16, and no bytes on the disk. In the released layout it is
only linked; in the native one every tensor is read, fused where the released layout wants it, and written.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from sa2va import Sa2VAChatConfig, Sa2VAChatModel

GOLDEN = Path(__file__).parents[1] / "tests" / "golden"
TOKENIZERS = {False: GOLDEN / "ivl_qwen2", True: GOLDEN / "qwen3vl"}
PACK = """
import json, sys, time
from pathlib import Path
import sa2va
from sa2va.hub_upload import pack_checkpoint

def peak():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) * 1024

source, out, size = sys.argv[1:]
before, start, busy = peak(), time.perf_counter(), time.process_time()
report = pack_checkpoint(source, out, max_shard_size=size, skip_test=True)
seconds, busy = time.perf_counter() - start, time.process_time() - busy
values = {"weights": report.weights, "seconds": seconds, "cpu_seconds": busy, "before": before, "peak": peak()}
print(json.dumps(values))
"""


def write_sparse_checkpoint(config: dict, folder: Path, layout: str) -> int:
    """Writes config, tokenizer and weights without bytes; returns the bytes that the weights would have."""
    config = Sa2VAChatConfig(**config)
    with torch.device("meta"):
        model = Sa2VAChatModel(config).to(torch.bfloat16)
    weights = model.state_dict()
    if layout == "released":
        from transformers.core_model_loading import revert_weight_conversion

        weights = revert_weight_conversion(model, weights)
    header, end = {}, 0
    for name, tensor in weights.items():
        begin, end = end, end + tensor.nbytes
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    path = folder / "model.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, 8 + len(text) + end)
    config.save_pretrained(folder)
    for file in TOKENIZERS[config.is_qwen_vl].iterdir():
        if file.name != "config.json" and file.suffix in (".json", ".jinja", ".txt") and "golden" not in file.name:
            shutil.copy(file, folder)
    return end


def measure(config: dict, layout: str, max_shard_size: str) -> dict:
    """Packs a sparse checkpoint in a process of its own; sizes are in bytes.

    Raises:
        OSError: the disk has no room, or packing failed.
    """
    with tempfile.TemporaryDirectory() as place:
        source, out = Path(place) / "source", Path(place) / "out"
        source.mkdir()
        size = write_sparse_checkpoint(config, source, layout)
        if layout == "native" and shutil.disk_usage(place).free < 1.1 * size:
            raise OSError(f"Packing writes {size / 1e9:.1f} GB, for which {place} has no room. Set TMPDIR.")
        arguments = [sys.executable, "-c", PACK, str(source), str(out), max_shard_size]
        done = subprocess.run(arguments, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise OSError(done.stderr)
        return {"layout": layout, "bytes": size, **json.loads(done.stdout.splitlines()[-1])}


def main(argv: list[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path, help="config.json, or a description of tests/released")
    parser.add_argument("--layout", choices=("native", "released"), default="native")
    parser.add_argument("--max_shard_size", default="5GB")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args(argv)
    values = json.loads(arguments.config.read_text())
    result = measure(values.get("config", values), arguments.layout, arguments.max_shard_size)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"{result['bytes'] / 1e9:.2f} GB, {result['layout']} layout: {result['weights']}")
    print(f"{result['seconds']:.1f} s, of which the processor was busy {result['cpu_seconds']:.1f} s")
    print(
        f"peak memory {result['peak'] / 1e6:.0f} MB, {result['before'] / 1e6:.0f} MB of it before anything was packed"
    )


if __name__ == "__main__":
    main()

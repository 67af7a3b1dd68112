"""`hub_upload.py check` and `convert`: released files of true size, damage of every kind, pickles."""

import contextlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sa2va import Sa2VAChatConfig, Sa2VAChatModel
from sa2va.hub_upload import CheckpointError, check_checkpoint, convert_pickles, main

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"
RELEASED = ROOT / "tests" / "released"
FAMILIES = {
    "ByteDance--Sa2VA-1B": "InternVL + Qwen2",
    "ByteDance--Sa2VA-4B": "InternVL + Qwen2",
    "ByteDance--Sa2VA-8B": "InternVL + InternLM2",
    "ByteDance--Sa2VA-26B": "InternVL + InternLM2",
    "ByteDance--Sa2VA-InternVL3-2B": "InternVL + Qwen2",
    "ByteDance--Sa2VA-InternVL3-8B": "InternVL + Qwen2",
    "ByteDance--Sa2VA-Qwen2_5-VL-3B": "Qwen2.5-VL",
    "ByteDance--Sa2VA-Qwen3-VL-4B": "Qwen3-VL",
    "kumuji--Sa2VA-i-1B": "InternVL + Qwen2 (Sa2VA-i)",
    "kumuji--Sa2VA-i-4B": "InternVL + Qwen2 (Sa2VA-i)",
    "kumuji--Sa2VA-i-8B": "InternVL + InternLM2 (Sa2VA-i)",
}
GOLDEN_FAMILIES = {
    "ivl_qwen2": "InternVL + Qwen2",
    "ivl_internlm2": "InternVL + InternLM2",
    "qwen25vl": "Qwen2.5-VL",
    "qwen3vl": "Qwen3-VL",
    "sa2vai_qwen2": "InternVL + Qwen2 (Sa2VA-i)",
}
NORM = "vision_model.encoder.layers.3.norm1.weight"
LANGUAGE_TABLES = ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight")
FUSED = "vision_model.encoder.layers.3.attn.qkv.weight"


def released_shapes(name: str) -> dict[str, list[int]]:
    """All keys of a released checkpoint with their shapes; `{0..23}` in a key stands for every layer."""
    description = json.loads((RELEASED / f"{name}.json").read_text())
    sam2 = json.loads((RELEASED / description["grounding_encoder_keys"]).read_text())
    shapes = {}
    for key, shape in (description["keys"] | sam2).items():
        layers = re.search(r"\{(\d+)\.\.(\d+)\}", key)
        numbers = range(int(layers[1]), int(layers[2]) + 1) if layers else [None]
        shapes |= {key if n is None else key.replace(layers[0], str(n)): shape for n in numbers}
    return shapes


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A safetensors file of bfloat16 tensors with all its size and none of its bytes."""
    header, end = {}, 0
    for key, shape in shapes.items():
        begin, end = end, end + 2 * torch.Size(shape).numel()
        header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    write_file(path, json.dumps(header).encode(), end)


def write_file(path: Path, header: bytes, data: int, length: int | None = None) -> None:
    """A safetensors file from its header; `length` is what it claims for the header's."""
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + data)


def write_checkpoint(folder: Path, name: str, shapes: dict[str, list[int]], shards: int = 1) -> Path:
    """A sparse checkpoint with the released config."""
    config = json.loads((RELEASED / f"{name}.json").read_text())["config"]
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_sparse(folder / "model.safetensors", shapes)
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(shapes.items())[i::shards])
        write_sparse(folder / file, part)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.fixture
def shapes() -> dict[str, list[int]]:
    """Keys of Sa2VA-1B."""
    return released_shapes("ByteDance--Sa2VA-1B")


@pytest.fixture
def sharded(tmp_path, shapes) -> Path:
    """Sa2VA-1B in three shards."""
    return write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes, shards=3)


def index_of(folder: Path) -> dict[str, str]:
    """Which file holds which key."""
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_every_released_description_is_checked():
    assert {path.stem for path in RELEASED.glob("[!_]*.json")} == FAMILIES.keys()


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_released_checkpoint_of_true_size_is_right(tmp_path, name, shards):
    shapes = released_shapes(name)
    report = check_checkpoint(write_checkpoint(tmp_path, name, shapes, shards))
    assert report.ok, str(report)
    assert (report.family, report.layout) == (FAMILIES[name], "released")
    assert report.num_parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert report.num_bytes == 2 * report.num_parameters and report.dtypes == {"BF16": report.num_parameters}


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_a_golden_checkpoint_is_right(family):
    report = check_checkpoint(GOLDEN / family)
    assert report.ok, str(report)
    assert (report.family, report.layout) == (GOLDEN_FAMILIES[family], "released")


def test_the_small_checkpoint_is_right():
    assert check_checkpoint(ROOT / "sa2va-tiny").ok


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_the_native_layout_is_right_too(tmp_path, family):
    model = AutoModel.from_pretrained(GOLDEN / family)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / family / "config.json", tmp_path)
    report = check_checkpoint(tmp_path)
    assert report.ok, str(report)
    assert report.layout == "native" and report.family == GOLDEN_FAMILIES[family]


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_what_was_loaded_from_the_native_layout_is_saved_in_the_released_one(tmp_path, family):
    model = AutoModel.from_pretrained(GOLDEN / family)
    (tmp_path / "native").mkdir()
    save_file(model.state_dict(), tmp_path / "native" / "model.safetensors")
    shutil.copy(GOLDEN / family / "config.json", tmp_path / "native")
    AutoModel.from_pretrained(tmp_path / "native").save_pretrained(tmp_path / "released")
    saved, released = (load_file(folder / "model.safetensors") for folder in (tmp_path / "released", GOLDEN / family))
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)


def test_a_key_is_judged_in_the_layout_it_has(tmp_path):
    """Half native, half released loads, so it is right; what is missing of a fused key has its native name."""
    weights = load_file(GOLDEN / "ivl_qwen2" / "model.safetensors")
    prefix = "vision_model.encoder.layers.0.attn.qkv.weight"
    query, key, value = weights.pop(prefix).chunk(3)
    native = "vision_model.encoder.layer.0.attention"
    weights |= {f"{native}.q_proj.weight": query.clone(), f"{native}.k_proj.weight": key.clone()}
    shutil.copy(GOLDEN / "ivl_qwen2" / "config.json", tmp_path)
    save_file(weights, tmp_path / "model.safetensors")
    report = check_checkpoint(tmp_path)
    assert (report.layout, report.missing_keys) == ("mixed", (f"{native}.v_proj.weight",))

    save_file(weights | {f"{native}.v_proj.weight": value.clone()}, tmp_path / "model.safetensors")
    assert check_checkpoint(tmp_path).ok
    _, loaded = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not loaded["missing_keys"] and not loaded["unexpected_keys"] and not loaded["mismatched_keys"]


def test_missing_unexpected_and_misshaped_keys_are_named(tmp_path, shapes):
    del shapes[NORM]
    shapes["vision_model.extra"] = [3]
    shapes[FUSED] = [3072, 1000]
    report = check_checkpoint(write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes))
    assert not report.ok and not report.problems
    assert report.missing_keys == (NORM,) and report.unexpected_keys == ("vision_model.extra",)
    assert report.mismatched_keys == ((FUSED, (3072, 1024), (3072, 1000)),)
    assert all(name in str(report) for name in (NORM, FUSED, "vision_model.extra", "[3072, 1024]", "[3072, 1000]"))


def test_the_config_says_how_many_rows_a_token_table_has(tmp_path, shapes):
    shapes["language_model.lm_head.weight"] = [151674, 896]
    report = check_checkpoint(write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes))
    assert report.mismatched_keys == (("language_model.lm_head.weight", (151679, 896), (151674, 896)),)


def test_a_key_that_the_config_ties_to_another_may_be_left_out(golden, tmp_path):
    config = json.loads((golden.folder / "config.json").read_text())
    config["llm_config"]["tie_word_embeddings"] = True
    model = Sa2VAChatModel(Sa2VAChatConfig.from_dict(config))
    model.save_pretrained(tmp_path)
    assert check_checkpoint(tmp_path).ok
    weights = load_file(tmp_path / "model.safetensors")
    (embedding,) = [name for name in weights if name in LANGUAGE_TABLES]
    save_file({name: weights[name] for name in weights if name != embedding}, tmp_path / "model.safetensors")
    assert len(check_checkpoint(tmp_path).missing_keys) == 1


@pytest.mark.parametrize("family", GOLDEN_FAMILIES)
def test_a_model_made_from_a_config_is_saved_in_the_released_layout(tmp_path, family):
    Sa2VAChatModel(Sa2VAChatConfig.from_pretrained(GOLDEN / family)).save_pretrained(tmp_path)
    report = check_checkpoint(tmp_path)
    assert report.ok, str(report)
    assert report.layout == "released"


def test_a_missing_key_of_a_native_checkpoint_has_its_native_name(tmp_path, golden_model):
    weights = golden_model.state_dict()
    del weights["vision_model.encoder.layer.1.layernorm_before.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "ivl_qwen2" / "config.json", tmp_path)
    assert check_checkpoint(tmp_path).missing_keys == ("vision_model.encoder.layer.1.layernorm_before.weight",)


def test_a_weight_of_whole_numbers_is_named(tmp_path):
    weights = load_file(GOLDEN / "ivl_qwen2" / "model.safetensors")
    weights["mlp1.1.weight"] = weights["mlp1.1.weight"].to(torch.int8)
    save_file(weights, tmp_path / "model.safetensors")
    shutil.copy(GOLDEN / "ivl_qwen2" / "config.json", tmp_path)
    report = check_checkpoint(tmp_path)
    assert not report.ok and len(report.problems) == 1 and report.problems[0].startswith("mlp1.1.weight is I8")


def test_a_shard_that_is_not_there_is_named(sharded):
    lost = index_of(sharded)[NORM]
    (sharded / lost).unlink()
    report = check_checkpoint(sharded)
    assert any(lost in problem for problem in report.problems) and NORM in report.missing_keys


def test_a_key_that_the_index_puts_elsewhere_is_named(sharded, shapes):
    """Both ways: a shard lacks a key that it should have, and has one that the index does not name."""
    file = index_of(sharded)[NORM]
    part = {key: shapes[key] for key, where in index_of(sharded).items() if where == file and key != NORM}
    write_sparse(sharded / file, part | {"stray": [2]})
    report = check_checkpoint(sharded)
    assert len(report.problems) == 2 and all(problem.startswith(file) for problem in report.problems)
    assert NORM in report.problems[0] and "stray" in report.problems[1]
    assert report.missing_keys == (NORM,) and report.unexpected_keys == ("stray",)


def test_a_key_that_two_shards_hold_is_named(sharded, shapes):
    other = next(file for file in set(index_of(sharded).values()) if file != index_of(sharded)[NORM])
    part = {key: shapes[key] for key, where in index_of(sharded).items() if where == other}
    write_sparse(sharded / other, part | {NORM: shapes[NORM]})
    (problem,) = check_checkpoint(sharded).problems
    assert other in problem and NORM in problem


@pytest.mark.parametrize("index", ["{", "[]", "{}", '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_weight_map_is_a_problem(sharded, index):
    (sharded / "model.safetensors.index.json").write_text(index)
    (problem,) = check_checkpoint(sharded).problems
    assert "model.safetensors.index.json" in problem


@pytest.mark.parametrize("metadata", [None, [], "pt"])
def test_an_index_without_metadata_is_a_problem(sharded, metadata):
    """It is not read."""
    file = sharded / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index_of(sharded), "metadata": metadata}))
    (problem,) = check_checkpoint(sharded).problems
    assert problem.startswith(f"{file.name} has no metadata")


def test_an_index_of_files_with_other_endings_is_a_problem(sharded):
    """They are not read, though they may hold what they should."""
    file, index = index_of(sharded)[NORM], sharded / "model.safetensors.index.json"
    (sharded / file).rename(sharded / "weights.bin")
    index.write_text(index.read_text().replace(file, "weights.bin"))
    (problem,) = check_checkpoint(sharded).problems
    assert problem.startswith("weights.bin: is no .safetensors file")


@pytest.mark.parametrize(
    ("header", "length", "told"),
    [
        (b'{"a": ', None, "JSON"),
        (b"[1]", None, "JSON object"),
        (b"[" * 100_000, None, "JSON"),
        (b"\xff\xfe", None, "JSON"),
        (b"{}", 2**63, "header"),
        (b"{}", 200_000_000, "header"),
        (b"{}", 3_000, "cut off"),
        (b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}', None, "entry of a"),
        (b'{"a": {"dtype": "F32", "shape": 3}}', None, "entry of a"),
        (b'{"a": {"dtype": "F32", "shape": [%d, %d], "data_offsets": [0, 4]}}' % (2**62, 2**62), None, "entry of a"),
        (b'{"a": {"dtype": "Q9", "shape": [1], "data_offsets": [0, 8]}}', None, "unknown dtype"),
        (b'{"a": {"dtype": "F32", "shape": [5], "data_offsets": [0, 8]}}', None, "a is said to be"),
        (b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]}}', None, "a is said to be"),
    ],
    ids=lambda value: None if isinstance(value, int) else str(value)[:40],
)
def test_a_damaged_header_is_told_and_not_believed(tmp_path, shapes, header, length, told):
    write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes)
    write_file(tmp_path / "model.safetensors", header, 8, length)
    problems = check_checkpoint(tmp_path).problems
    assert any(problem.startswith("model.safetensors") and told in problem for problem in problems), problems


@pytest.mark.parametrize(
    ("metadata", "is_read"), [("null", True), ('{"format": "pt"}', True), ('{"step": 1}', False), ("[]", False)]
)
def test_metadata_that_safetensors_refuses_is_told(tmp_path, metadata, is_read):
    file = tmp_path / "model.safetensors"
    shutil.copy(GOLDEN / "ivl_qwen2" / "config.json", tmp_path)
    data = (GOLDEN / "ivl_qwen2" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    entries = json.loads(data[8 : 8 + length]) | {"__metadata__": json.loads(metadata)}
    header = json.dumps(entries).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + data[8 + length :])
    report = check_checkpoint(tmp_path)
    assert report.ok is is_read and all("__metadata__" in problem for problem in report.problems)
    with contextlib.nullcontext() if is_read else pytest.raises(SafetensorError), safe_open(file, framework="pt"):
        pass


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_too_short_for_any_header_is_told(tmp_path, shapes, size):
    os.truncate(write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes) / "model.safetensors", size)
    assert "cut off" in check_checkpoint(tmp_path).problems[0]


@pytest.mark.parametrize("change", [-1, -1_000_000, 1])
def test_a_file_of_another_length_than_its_header_says_is_told(tmp_path, shapes, change):
    file = write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes) / "model.safetensors"
    os.truncate(file, file.stat().st_size + change)
    report = check_checkpoint(tmp_path)
    (problem,) = report.problems
    assert f"{file.stat().st_size:,} bytes" in problem and not report.missing_keys


def test_a_git_lfs_pointer_is_recognised(tmp_path, shapes):
    write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes)
    (tmp_path / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert "git lfs pull" in check_checkpoint(tmp_path).problems[0]


def test_a_config_that_is_not_there_or_no_json_is_told(sharded):
    (sharded / "config.json").write_text("{")
    assert "config.json" in check_checkpoint(sharded).problems[0]
    (sharded / "config.json").unlink()
    report = check_checkpoint(sharded)
    assert report.problems == ("config.json is not there.",)
    assert report.family is None and report.num_parameters > 1e9


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "llama"}, "llama"),
        ({"llm_config": {"model_type": "no_such_model"}}, "no_such_model"),
        ({"llm_config": 3}, "config.json"),
        ({"downsample_ratio": 0}, "config.json"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantized"),
    ],
)
def test_a_config_of_no_sa2va_is_told(sharded, change, told):
    config = json.loads((sharded / "config.json").read_text())
    (sharded / "config.json").write_text(json.dumps(config | change))
    (problem,) = check_checkpoint(sharded).problems
    assert told in problem


def test_a_folder_without_weights_is_told(tmp_path):
    shutil.copy(GOLDEN / "ivl_qwen2" / "config.json", tmp_path)
    report = check_checkpoint(tmp_path)
    assert report.family == "InternVL + Qwen2" and "no weights" in report.problems[0] and not report.ok


def test_a_name_that_is_nothing_is_an_error(tmp_path, capsys):
    for name in (tmp_path / "nothing here", "nothing", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="neither a folder nor a repository"):
            check_checkpoint(name)
    assert main(["check", str(tmp_path / "nothing here")]) == 2
    assert "neither a folder" in capsys.readouterr().err


def test_a_revision_of_a_folder_is_an_error():
    with pytest.raises(ValueError, match="revision"):
        check_checkpoint(GOLDEN / "ivl_qwen2", revision="main")


def test_json_holds_the_whole_report(tmp_path, shapes, capsys):
    shapes[FUSED] = [3072, 1000]
    write_checkpoint(tmp_path, "ByteDance--Sa2VA-1B", shapes)
    assert main(["check", str(tmp_path), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["ok"] is False and report["family"] == "InternVL + Qwen2" and report["language_model"] == "qwen2"
    assert report["mismatched_keys"] == [{"name": FUSED, "expected": [3072, 1024], "found": [3072, 1000]}]
    assert report.keys() >= {"layout", "num_parameters", "num_bytes", "dtypes", "missing_keys", "unexpected_keys"}


@pytest.mark.slow
def test_the_script_runs_from_a_folder_without_the_package(tmp_path):
    """0: right, 1: not right, 2: no checkpoint named."""
    for name in ("configuration_sa2va", "hub_upload", "modeling_sa2va", "processing_sa2va", "sam2_decoder"):
        shutil.copy(ROOT / f"{name}.py", tmp_path)
    script = [sys.executable, "-P", str(tmp_path / "hub_upload.py")]
    environment = os.environ | {"PYTHONPATH": ""}

    def run(*arguments):
        return subprocess.run([*script, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True)

    done = run("check", str(GOLDEN / "ivl_qwen2"))
    assert done.returncode == 0 and "InternVL + Qwen2" in done.stdout, done.stderr
    assert run("check", str(tmp_path)).returncode == 1
    assert run("check").returncode == 2


HUB_SCRIPT = """
import json
from transformers import AutoModel
import sa2va
from sa2va.hub_upload import check_checkpoint

def error_of(function, *arguments):
    try:
        return function(*arguments)
    except OSError as error:
        return str(error)

results = {
    "report": check_checkpoint("someone/model").to_dict(),
    "main": check_checkpoint("someone/model", revision="main").ok,
    "absent": error_of(check_checkpoint, "someone/absent"),
    "pickled": error_of(AutoModel.from_pretrained, "someone/pickled"),
    "pickled_report": check_checkpoint("someone/pickled").problems,
}
print(json.dumps(results))
"""


class HubHandler(BaseHTTPRequestHandler):
    """As much of the Hub as serves the folders in `server.folder` as repositories of `someone`."""

    def do_GET(self):
        path = self.path.partition("?")[0]
        name = re.match(r"/(?:api/models/)?someone/([^/]+)", path)
        folder = self.server.folder / (name[1] if name else "")
        if not name or not folder.is_dir():
            self._refuse("RepoNotFound")
        elif "/resolve/" in path:
            self._send_file(folder / path.rpartition("/")[2])
        elif "/tree/" in path or "/paths-info/" in path:
            files = [{"type": "file", "path": p.name, "size": p.stat().st_size, "oid": "0"} for p in folder.iterdir()]
            self._send(200, json.dumps(files).encode())
        else:
            self._send(200, json.dumps({"id": f"someone/{name[1]}", "sha": "0" * 40}).encode())

    def do_HEAD(self):
        self.do_GET()

    def do_POST(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.do_GET()

    def log_message(self, *args):
        """No lines on stderr."""

    def _send_file(self, path):
        if not path.exists():
            return self._refuse("EntryNotFound")
        size = path.stat().st_size
        wanted = re.match(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or f"bytes=0-{size - 1}")
        begin, end = int(wanted[1]), min(int(wanted[2]) + 1, size)
        with path.open("rb") as file:
            file.seek(begin)
            self._send(206 if "Range" in self.headers else 200, file.read(end - begin))

    def _refuse(self, code):
        self._send(404, b"", {"X-Error-Code": code})

    def _send(self, status, body, headers=None):
        self.send_response(status)
        for header, value in {"ETag": '"0"', "X-Repo-Commit": "0" * 40, **(headers or {})}.items():
            self.send_header(header, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.server.sent.append(len(body))
            with contextlib.suppress(BrokenPipeError):
                self.wfile.write(body)


@pytest.mark.slow
def test_a_hub_repository_is_read_by_ranges_and_its_pickles_not_at_all(tmp_path, shapes):
    (tmp_path / "model").mkdir()
    write_checkpoint(tmp_path / "model", "ByteDance--Sa2VA-1B", shapes, shards=2)
    (tmp_path / "pickled").mkdir()
    shutil.copy(GOLDEN / "ivl_qwen2" / "config.json", tmp_path / "pickled")
    (tmp_path / "pickled" / "pytorch_model.bin").write_bytes(bytes(8_000_000))
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubHandler)
    server.folder, server.sent = tmp_path, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
    }
    done = subprocess.run([sys.executable, "-c", HUB_SCRIPT], env=environment, capture_output=True, text=True)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    assert results["report"]["ok"] and results["report"]["num_bytes"] > 2e9 and results["main"]
    assert "neither a folder nor a repository" in results["absent"]
    command = "hf download someone/pickled --local-dir pickled && python hub_upload.py convert pickled"
    assert command in results["pickled"] and command in results["pickled_report"][0]
    assert sum(server.sent) < 8e6


def test_a_hub_that_cannot_be_reached_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(OSError, match="can't be reached"):
        check_checkpoint("someone/model")


@pytest.fixture
def pickled(golden, tmp_path) -> Path:
    """The golden checkpoint as older code saved it: two pickles and their index."""
    folder = tmp_path / "old model"
    shutil.copytree(golden.folder, folder, ignore=shutil.ignore_patterns("*.safetensors", "golden*"))
    weights = load_file(golden.folder / "model.safetensors")
    names = list(weights)
    weight_map = {}
    for i, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"pytorch_model-{i:05d}-of-00002.bin"
        torch.save({name: weights[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class RunsWhenRead:
    """A pickle of this makes a file when it is read by anything but a weights-only reader."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickled_weights_are_refused_unread_with_the_command_that_converts_them(golden, tmp_path):
    folder = tmp_path / "old model"
    folder.mkdir()
    shutil.copy(golden.folder / "config.json", folder)
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(RunsWhenRead(tmp_path / "ran"), protocol=2))
    command = re.escape(f"python hub_upload.py convert '{folder}' '{folder}-safetensors'")
    for arguments in ({}, {"use_safetensors": False}):
        with pytest.raises(OSError, match=command):
            AutoModel.from_pretrained(folder, **arguments)
    with pytest.raises(OSError, match=command):
        Sa2VAChatModel.from_pretrained(folder / "pytorch_model.bin", config=Sa2VAChatConfig.from_pretrained(folder))
    assert re.search(command, check_checkpoint(folder).problems[0])
    assert not (tmp_path / "ran").exists()


def test_pickles_beside_safetensors_do_not_matter(golden, tmp_path):
    shutil.copytree(golden.folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden*"))
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    assert AutoModel.from_pretrained(tmp_path, use_safetensors=False).num_parameters() > 0
    assert check_checkpoint(tmp_path).ok


def test_converted_pickles_are_the_same_checkpoint(golden, pickled, tmp_path):
    out = tmp_path / "new"
    assert [path.name for path in convert_pickles(pickled, out)] == sorted(
        path.name for path in out.glob("*.safetensors")
    )
    assert check_checkpoint(out).ok and len(set(index_of(out).values())) == 2
    assert {path.name for path in out.iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert not [path for path in out.iterdir() if path.suffix in (".bin", ".tmp")]
    converted = {name: tensor for file in out.glob("*.safetensors") for name, tensor in load_file(file).items()}
    released = load_file(golden.folder / "model.safetensors")
    assert converted.keys() == released.keys()
    assert all(torch.equal(converted[name], released[name]) for name in released)


def test_a_single_pickle_becomes_a_single_file(tmp_path, capsys):
    shared = torch.arange(6.0)
    weights = {"a": shared, "b": shared, "part": shared[2:4], "turned": torch.arange(6).view(2, 3).T}
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    torch.save(weights, old / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert main(["convert", str(old), str(new), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"files": [str(new / "model.safetensors")]}
    converted = load_file(new / "model.safetensors")
    assert converted.keys() == weights.keys()
    assert all(torch.equal(converted[name], weights[name]) for name in weights)
    with safe_open(new / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_pickle_that_holds_code_is_not_run(tmp_path, capsys):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "pytorch_model.bin").write_bytes(pickle.dumps(RunsWhenRead(tmp_path / "ran"), protocol=2))
    with pytest.raises(CheckpointError, match="not converted"):
        convert_pickles(tmp_path / "old", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert main(["convert", str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert not (tmp_path / "ran").exists() and not list((tmp_path / "new").glob("*.safetensors*"))


@pytest.mark.parametrize(
    "damage",
    [lambda data: b"b" + data[1:], lambda data: re.sub(rb"\d(\d{9,})", rb"x\1", data, count=1)],
    ids=["an empty stack", "a storage that is not there"],
)
def test_a_damaged_pickle_is_told_whatever_reading_it_raises(tmp_path, capsys, damage):
    file = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(1)}, file, _use_new_zipfile_serialization=False)
    file.write_bytes(damage(file.read_bytes()))
    assert main(["convert", str(tmp_path), str(tmp_path / "new")]) == 1
    assert "can't be read as tensors" in capsys.readouterr().err


CONVERT_ON_A_FULL_DISK = """
import resource, sys
from sa2va.hub_upload import main
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(main(["convert", *sys.argv[1:]]))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="files can't be limited there")
def test_a_disk_that_takes_no_more_is_told_and_nothing_is_left(tmp_path):
    (tmp_path / "old").mkdir()
    torch.save({"a": torch.ones(10_000)}, tmp_path / "old" / "pytorch_model.bin")
    command = [sys.executable, "-c", CONVERT_ON_A_FULL_DISK, str(tmp_path / "old"), str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "can't be written" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_tensor_of_a_kind_that_safetensors_cannot_hold_is_told(tmp_path):
    torch.save({"a": torch.ones(1, dtype=torch.complex128)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"holds a tensor of torch\.complex128"):
        convert_pickles(tmp_path, tmp_path / "new")


@pytest.mark.parametrize(
    "content",
    [
        {"model": {"a": torch.ones(1)}, "step": 3},
        {0: torch.ones(1)},
        {"a": torch.ones(2, 2).to_sparse()},
        {"a": torch.ones(2, device="meta")},
    ],
    ids=["more", "numbered", "sparse", "meta"],
)
def test_a_pickle_of_more_than_tensors_is_refused(tmp_path, content):
    torch.save(content, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="state_dict"):
        convert_pickles(tmp_path, tmp_path / "new")


def test_convert_needs_all_pickles_and_a_folder_without_weights(pickled, tmp_path):
    (pickled / "pytorch_model-00002-of-00002.bin").rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match="pytorch_model-00002-of-00002"):
        convert_pickles(pickled, tmp_path / "new")
    (tmp_path / "elsewhere").rename(pickled / "pytorch_model-00002-of-00002.bin")
    with pytest.raises(FileExistsError, match="already has weights"):
        convert_pickles(pickled, GOLDEN / "ivl_qwen2")
    with pytest.raises(FileNotFoundError, match="no pickled weights"):
        convert_pickles(GOLDEN / "ivl_qwen2", tmp_path / "new")
    with pytest.raises(NotADirectoryError, match="hf download"):
        convert_pickles("someone/model", tmp_path / "new")

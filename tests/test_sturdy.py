"""What must hold in a process that runs for long or dies early: saving, leaks, output, strangers' configs."""

import gc
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import training_batch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel
from transformers.utils import logging as transformers_logging

from sa2va import Sa2VAChatConfig, Sa2VAChatModel
from sa2va.benchmarks.stages import prescribed
from sa2va.processing_sa2va import Sa2VAProcessor, replacing_files

TESTS = Path(__file__).parent
GOLDEN, TINY, SHAPES = TESTS / "golden", TESTS.parent / "sa2va-tiny", TESTS.parent / "demo" / "samples" / "shapes.png"
ASK = "Please segment the red square."

# ------------------------------------------------------------------------------------------------- saving and dying


def write_weights(folder: Path, number: float, shards: int) -> None:
    """A checkpoint of four tensors that hold a number, as transformers lays it out."""
    weights = {name: torch.full((2,), number) for name in "abcd"}
    (folder / "config.json").write_text(json.dumps({"number": number}))
    if shards == 1:
        save_file(weights, folder / "model.safetensors")
        return
    files = [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    for i, file in enumerate(files):
        save_file(dict(list(weights.items())[i::shards]), folder / file)
    weight_map = {name: files[i % shards] for i, name in enumerate(weights)}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def numbers_read(folder: Path) -> set[float]:
    """The numbers in the weights that transformers would load: one if they are whole, none without weights."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.exists():
        return {number for tensor in load_file(single).values() for number in tensor.flatten().tolist()}
    if not index.exists():
        return set()
    weight_map = json.loads(index.read_text())["weight_map"]
    shards = {file: load_file(folder / file) for file in set(weight_map.values())}
    return {number for name, file in weight_map.items() for number in shards[file][name].flatten().tolist()}


class Died(BaseException):
    """What stands for the end of the process."""


@pytest.fixture
def dying(monkeypatch):
    """Sets after how many more moves and removals of files the process "dies"."""
    left = [0]

    def step(change):
        def changed(*args):
            if not left[0]:
                raise Died
            left[0] -= 1
            return change(*args)

        return changed

    for name in ("replace", "unlink"):
        monkeypatch.setattr(Path, name, step(getattr(Path, name)))
    return left


@pytest.mark.parametrize(("before", "after"), [(0, 1), (0, 3), (1, 1), (1, 2), (2, 1), (2, 2), (3, 2), (2, 3)])
def test_a_save_that_dies_at_any_step_leaves_the_old_weights_or_the_new(before, after, tmp_path, dying):
    seen, configs = [], []
    for steps in range(14):
        folder = tmp_path / str(steps)
        folder.mkdir()
        if before:
            write_weights(folder, 1.0, before)
        dying[0] = steps
        try:
            with replacing_files(folder) as temporary:
                write_weights(temporary, 2.0, after)
        except Died:
            pass
        seen.append(numbers_read(folder))
        config = folder / "config.json"
        configs.append(json.loads(config.read_text())["number"] if config.exists() else None)
    old = {1.0} if before else set()
    assert seen[0] == old and seen[-1] == {2.0}
    assert all(numbers in (old, {2.0}) for numbers in seen)
    assert sum(config not in numbers for config, numbers in zip(configs, seen, strict=True) if numbers) <= 2
    assert not list(folder.glob(".saving-*"))
    assert len(list(folder.glob("*.safetensors"))) == after


def test_an_error_while_saving_changes_nothing(tmp_path):
    write_weights(tmp_path, 1.0, 2)
    names = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="full"), replacing_files(tmp_path) as temporary:
        write_weights(temporary, 2.0, 2)
        raise RuntimeError("the disk is full")
    assert numbers_read(tmp_path) == {1.0} and sorted(path.name for path in tmp_path.iterdir()) == names


def test_shards_have_names_of_their_own_only_where_others_are_replaced(tmp_path):
    with replacing_files(tmp_path) as temporary:
        write_weights(temporary, 1.0, 2)
        names = {path.name for path in temporary.iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_saving_leaves_the_files_of_others_alone(golden_processor, tmp_path):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "checkpoint-5").mkdir()
    names = [Path(name).name for name in golden_processor.save_pretrained(tmp_path)]
    assert names == ["processor_config.json"] and (tmp_path / "tokenizer.json").exists()
    assert (tmp_path / "README.md").read_text() == "mine" and (tmp_path / "checkpoint-5").is_dir()


@pytest.mark.parametrize("shards", [1, 2])
def test_a_processor_saved_beside_weights_leaves_them_there(golden_processor, tmp_path, shards):
    write_weights(tmp_path, 1.0, shards)
    names = {path.name for path in tmp_path.iterdir()}
    golden_processor.save_pretrained(tmp_path)
    assert numbers_read(tmp_path) == {1.0} and names <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("content", [b"[1]", b"3", b"null", b"{", b"\xff"])
@pytest.mark.parametrize("file", ["processor_config.json", "tokenizer_config.json", "tokenizer.json"])
def test_files_of_a_processor_that_hold_something_else_are_told(file, content, golden_processor, tmp_path):
    golden_processor.save_pretrained(tmp_path)
    (tmp_path / file).write_bytes(content)
    with pytest.raises(OSError, match=r"Download them again|not a valid JSON"):
        Sa2VAProcessor.from_pretrained(tmp_path)


def test_a_wrong_setting_of_a_processor_is_not_blamed_on_its_files(golden_processor, tmp_path):
    golden_processor.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match="image_size must be an integer"):
        Sa2VAProcessor.from_pretrained(tmp_path, image_size="large")


# Run in a process of its own, that makes a child for each save and kills it.
KILLED = """
import json, os, random, signal, sys, time
from pathlib import Path
import torch
from sa2va import Sa2VAChatModel
from sa2va.hub_upload import convert_pickles

torch.set_num_threads(1)
golden, folder = Path(sys.argv[1]), Path(sys.argv[2])
model = Sa2VAChatModel.from_pretrained(golden)
processor = model.load_processor()
pickles = folder / "pickles"
pickles.mkdir(parents=True)
weights = {name: torch.zeros(1000, 1000) for name in "abcd"}
for i, name in enumerate(weights, start=1):
    torch.save({name: weights[name]}, pickles / f"pytorch_model-{i:05d}-of-00004.bin")

def save(number):
    for tensor in model.state_dict().values():
        tensor.fill_(number)
    model.save_pretrained(folder / "model", max_shard_size="1MB")

def run(work, seconds=None):
    start, child = time.time(), os.fork()
    if not child:
        work()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] in (0, signal.SIGKILL)
    return time.time() - start

save(0)
random.seed(0)
works = {
    "model": lambda number: save(number),
    "processor": lambda number: processor.save_pretrained(folder / "processor"),
    "out": lambda number: convert_pickles(pickles, folder / f"out-{number}"),
}
for name, work in works.items():
    whole = run(lambda: work(1))
    for number in range(2, 8):
        run(lambda: work(number), random.uniform(0, whole))
        print(name, number, flush=True)
        if name == "model":
            sys.stdin.readline()
"""


@pytest.mark.parametrize("sizes", [("1GB", "3MB"), ("3MB", "1GB"), ("3MB", "2MB")])
def test_a_variant_that_is_saved_again_is_read_and_others_stay(sizes, tmp_path):
    model = AutoModel.from_pretrained(GOLDEN / "ivl_qwen2")
    model.save_pretrained(tmp_path)
    weight = model.text_hidden_fcs[0].bias.data
    for number, size in enumerate(sizes, 1):
        weight.fill_(number)
        model.save_pretrained(tmp_path, variant="fp16", max_shard_size=size)
    found = AutoModel.from_pretrained(tmp_path, variant="fp16")
    assert (found.text_hidden_fcs[0].bias == 2).all()
    assert not (AutoModel.from_pretrained(tmp_path).text_hidden_fcs[0].bias == weight).all()
    index = tmp_path / "model.safetensors.index.fp16.json"
    shards = json.loads(index.read_text())["weight_map"].values() if index.exists() else ["model.fp16.safetensors"]
    assert {path.name for path in tmp_path.glob("*.safetensors")} == {"model.safetensors", *shards}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="needs fork")
def test_a_killed_process_leaves_the_old_state_or_the_new(tmp_path):
    command = [sys.executable, "-c", KILLED, str(GOLDEN / "ivl_qwen2"), str(tmp_path)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    states, rounds = [1.0], 0
    for line in process.stdout:
        name, number = line.split()
        rounds += 1
        if name == "model":
            (state,) = numbers_read(tmp_path / "model")
            assert state in (states[-1], float(number))
            states.append(state)
            print(file=process.stdin, flush=True)
        elif name == "processor":
            assert all(json.loads(path.read_text()) for path in (tmp_path / "processor").glob("*.json"))
        else:
            assert numbers_read(tmp_path / f"out-{number}") in (set(), {0.0})
    assert process.wait() == 0 and rounds == 18


# -------------------------------------------------------------------------------------------------------- long running


def held() -> tuple[int, int, int]:
    """How many objects and how many tensors there are, and bytes of memory."""
    gc.collect()
    things = gc.get_objects()
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in things)
    return len(things), tensors, psutil.Process().memory_info().rss


@pytest.mark.slow
def test_five_hundred_calls_leave_nothing_behind(clip):
    model = AutoModel.from_pretrained(TINY).eval()
    image = {"image": SHAPES, "text": "Please segment the red star in this image."}
    video = {"video": clip[:2], "text": ASK}
    assert model.predict_forward(**image).prediction_masks

    def call(number):
        if number % 25 == 0:
            list(model.predict_stream(**video, max_new_tokens=4))
            model.predict_batch([image, video], max_new_tokens=4)
        else:
            model.predict_forward(**image)

    for number in range(50):
        call(number)
    objects, tensors, size = held()
    for number in range(500):
        call(number)
    more_objects, more_tensors, more_size = held()
    assert more_tensors == tensors and more_objects - objects < 100
    assert more_size - size < 20e6  # 500 masks of this picture would be 86e6


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl"])
def test_inference_mode_changes_no_mask_and_leaves_a_model_that_can_learn(family, picture, clip):
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()
    processor = model.load_processor()
    words = processor.tokenizer("[SEG]<|im_end|>", add_special_tokens=False).input_ids
    question = {"video": clip[:7], "text": ASK, "num_frames": 2, "max_new_tokens": len(words)}
    with torch.inference_mode(), prescribed(model, words):  # first, so that whatever is kept is made in it
        first = next(stream := model.predict_stream(**question))
        state = stream.state()
    (mask,) = first.masks
    with prescribed(model, words):
        (wanted,) = model.predict_forward(**question).prediction_masks
    rest = list(model.predict_stream(video=clip[:7], resume=state))
    assert (np.stack([mask, *(frame.masks[0] for frame in rest)]) == wanted).all()
    model(**training_batch(processor, picture)).loss.backward()
    assert model.text_hidden_fcs[0].weight.grad is not None


def test_calls_print_nothing(golden, golden_model, golden_processor, tmp_path, capfd):
    golden_model.predict_forward(**golden.case("imgD1seg").arguments)
    list(golden_model.predict_stream(**golden.case("vid3_1seg").arguments))
    golden_model.predict_batch([golden.case(name).arguments for name in ("imgD1seg", "vid3_1seg")])
    assert capfd.readouterr() == ("", "")
    AutoModel.from_pretrained(golden.folder).save_pretrained(tmp_path)
    golden_processor.save_pretrained(tmp_path)
    assert capfd.readouterr().out == ""  # transformers' progress bars go to stderr


def test_a_warning_comes_once_and_by_transformers_logger(golden, heard):
    for _ in range(2):
        AutoModel.from_pretrained(golden.folder, config=config_in_half_precision(golden))
    assert len([message for message in heard if "On a CPU float32" in message]) == 1


def test_transformers_verbosity_silences_warnings(golden, heard):
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        AutoModel.from_pretrained(golden.folder, config=config_in_half_precision(golden))
    finally:
        transformers_logging.set_verbosity(verbosity)
    assert not [message for message in heard if "On a CPU float32" in message]


def config_in_half_precision(golden) -> Sa2VAChatConfig:
    config = Sa2VAChatConfig.from_pretrained(golden.folder)
    config.dtype = torch.bfloat16
    return config


# ------------------------------------------------------------------------------------------- configs from strangers


@pytest.fixture
def strange(tmp_path):
    """Writes a copy of the golden config with other values, beside code that leaves a trace when it runs."""

    def write(**changes) -> Path:
        folder = tmp_path / "strange"
        shutil.copytree(GOLDEN / "ivl_qwen2", folder, ignore=shutil.ignore_patterns("golden*"))
        config = json.loads((folder / "config.json").read_text())
        for part, values in changes.items():
            config[part] = config[part] | values if isinstance(config.get(part), dict) else values
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
        return folder

    return write


CODE = {"AutoConfig": "evil.Config", "AutoModel": "evil.Model", "AutoModelForCausalLM": "evil.Model"}


def test_code_that_a_config_names_is_not_run(strange, tmp_path):
    folder = strange(auto_map=CODE, llm_config={"auto_map": CODE}, vision_config={"auto_map": CODE})
    model = AutoModel.from_pretrained(folder)
    assert type(model) is Sa2VAChatModel and not (tmp_path / "ran").exists()
    assert not hasattr(model.config.llm_config, "auto_map")


def test_paths_and_kernels_that_a_config_names_are_not_followed(strange, tmp_path):
    elsewhere = str(tmp_path / "elsewhere")
    named = {
        **{"_name_or_path": elsewhere, "transformers_weights": f"{elsewhere}.safetensors"},
        **{"attn_implementation": "someone/attention", "trust_remote_code": True},
    }
    config = AutoConfig.from_pretrained(strange(**named, llm_config=named, grounding_config=named))
    assert config.name_or_path == str(tmp_path / "strange") and elsewhere not in json.dumps(config.to_dict())
    assert "someone/" not in json.dumps(config.to_dict()) and config._attn_implementation is None
    values = json.loads((tmp_path / "strange" / "config.json").read_text())
    assert Sa2VAChatConfig.from_dict(values).name_or_path == ""

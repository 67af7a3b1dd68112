"""`hub_upload.py pack`, `save_pretrained`: what they write loads anywhere and keeps every bit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, GoldenFamily
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_check import released_shapes, write_checkpoint
from transformers import AutoModel

from sa2va import Sa2VAChatConfig, hub_upload
from sa2va.configuration_sa2va import CODE_FILES
from sa2va.hub_upload import (
    LINEAGE,
    REQUIREMENTS,
    TEMPLATE,
    CardFacts,
    CheckpointError,
    check_checkpoint,
    main,
    pack_checkpoint,
    read_results,
)

ROOT = Path(__file__).parents[1]
FAMILIES = ("ivl_internlm2", "qwen25vl", "qwen3vl", "sa2vai_qwen2")
families = pytest.mark.parametrize("family", FAMILIES)
RESULTS = ({"dataset_name": "Shapes", "dataset_split": "test", "metric_type": "cIoU", "metric_value": 62.9},)


def pack(source, out, **options):
    """Packs without the trial, which takes a process of its own."""
    return pack_checkpoint(source, out, **{"skip_test": True, **options})


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def same_weights(one: Path, other: Path) -> bool:
    """Whether two checkpoints have the same keys with the same bits."""
    ours, theirs = weights_of(one), weights_of(other)
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.fixture
def source(tmp_path) -> Path:
    """A copy of the golden checkpoint, to be changed."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "ivl_qwen2", folder, ignore=shutil.ignore_patterns("golden*"))
    return folder


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """Every golden checkpoint, packed, in a folder by its name."""
    place = tmp_path_factory.mktemp("packed")
    for family in FAMILIES:
        pack(GOLDEN / family, place / family, facts=CardFacts(license="apache-2.0"))
    return place


LOAD = """
import json, sys
from pathlib import Path
import numpy as np
from PIL import Image
from transformers import AutoModel, AutoProcessor, AutoTokenizer

frames = [Image.fromarray(frame) for frame in np.load(sys.argv[2])["vid3"]]
answers = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
    output = model.predict_forward(image=frames[0], text="Please segment it.", processor=processor, max_new_tokens=6)
    parts = (tokenizer, processor, model)
    answers[folder.name] = {
        "remote": [type(part).__module__.startswith("transformers_modules.") for part in parts],
        "names": [type(part).__name__ for part in parts],
        "ids": tokenizer("Segment it, [SEG]. Ünï").input_ids,
        "prediction": output.prediction,
    }
model.save_pretrained(sys.argv[3])
processor.save_pretrained(sys.argv[3])
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def loaded(packed, tmp_path_factory) -> dict:
    """What a process without this package made of the packed folders; the last one it saved again."""
    place = tmp_path_factory.mktemp("clean")
    (place / "sa2va.py").write_text("raise ImportError('hidden')")
    environment = os.environ | {"PYTHONPATH": str(place), "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "m")}
    arguments = [str(packed), str(GOLDEN / "inputs.npz"), str(place / "again")]
    done = subprocess.run(
        [sys.executable, "-c", LOAD, *arguments], cwd=place, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]) | {"again": place / "again"}


@pytest.mark.slow
@families
def test_a_packed_folder_loads_with_its_own_code_and_answers_as_before(loaded, family):
    found = loaded[family]
    ending = "Qwen" if family.startswith("qwen") else ""
    assert found["names"][1:] == [f"Sa2VAProcessor{ending}", f"Sa2VAChatModel{ending}"]
    assert found["remote"] == [family == "ivl_internlm2", True, True]
    golden = GoldenFamily(family)
    frame = golden.inputs["vid3"][0]
    model = AutoModel.from_pretrained(golden.folder, dtype=torch.float32).eval()
    output = model.predict_forward(image=frame, text="Please segment it.", max_new_tokens=6)
    assert found["prediction"] == output.prediction
    assert found["ids"] == model.load_processor().tokenizer("Segment it, [SEG]. Ünï").input_ids


@pytest.mark.slow
def test_what_remote_code_saves_is_complete_again(loaded, packed):
    again = loaded["again"]
    assert all((again / name).read_bytes() == (ROOT / name).read_bytes() for name in CODE_FILES)
    assert json.loads((again / "config.json").read_text())["auto_map"]["AutoModel"] == "modeling_sa2va.Sa2VAChatModel"
    assert check_checkpoint(again).ok and same_weights(again, packed / FAMILIES[-1])


@families
def test_weights_that_are_right_are_linked_and_all_files_are_there(packed, family):
    (ours, theirs) = (folder / family / "model.safetensors" for folder in (packed, GOLDEN))
    assert ours.samefile(theirs) or ours.stat().st_dev != theirs.stat().st_dev
    names = {path.name for path in (packed / family).iterdir()}
    assert names >= {*CODE_FILES, "config.json", "generation_config.json", "tokenizer.json", "processor_config.json"}
    assert names >= {"tokenizer_config.json", "requirements.txt", "README.md", "LICENSE"}
    assert not names & {"golden.json", "golden.npz", "preprocessor_config.json", "tokenizer.model"}
    processor = json.loads((packed / family / "processor_config.json").read_text())
    assert processor["auto_map"] == {"AutoProcessor": f"processing_sa2va.{processor['processor_class']}"}


@families
def test_the_config_keeps_every_value_and_says_what_the_weights_told(packed, family):
    old, new = (json.loads((folder / family / "config.json").read_text()) for folder in (GOLDEN, packed))
    assert {module.partition(".")[0] + ".py" for module in new["auto_map"].values()} <= set(CODE_FILES)
    assert new["grounding_config"].pop("separate_prompt_decoder") is family.startswith("sa2vai")
    assert {**old, "auto_map": 0, "architectures": 0} == {**new, "auto_map": 0, "architectures": 0}


@pytest.mark.parametrize("family", ["ivl_internlm2", "qwen3vl"])
def test_a_native_checkpoint_is_rewritten_bit_for_bit(family, tmp_path):
    native, released, out = (tmp_path / name for name in ("native", "released", "out"))
    shutil.copytree(GOLDEN / family, native, ignore=shutil.ignore_patterns("golden*"))
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.bfloat16)
    model.save_pretrained(released)
    assert all((released / name).is_file() for name in CODE_FILES)
    auto_map = json.loads((released / "config.json").read_text())["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == f"modeling_sa2va.{type(model).__name__}"
    save_file(model.state_dict(), native / "model.safetensors")
    report = pack(native, out, max_shard_size="2MB")
    files = sorted(out.glob("*.safetensors"))
    assert report.weights == "rewritten" and len(files) > 2 and same_weights(out, released)
    for path in files:
        assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0  # as the format's own writer aligns
        with safe_open(path, framework="pt") as file:
            assert file.metadata() == {"format": "pt"}


def test_packing_needs_little_memory(tmp_path):
    """400 MB of weights in the native layout pass through a process that grows by less than 100 MB."""
    folder = tmp_path / "source"
    shutil.copytree(GOLDEN / "ivl_qwen2", folder, ignore=shutil.ignore_patterns("golden*", "*.safetensors"))
    values = json.loads((folder / "config.json").read_text())
    values["llm_config"]["vocab_size"] = 625_000
    (folder / "config.json").write_text(json.dumps(values))
    with torch.device("meta"):
        model = AutoModel.from_config(Sa2VAChatConfig.from_pretrained(folder), dtype=torch.bfloat16)
    header, end = {}, 0
    for name, tensor in model.state_dict().items():
        begin, end = end, end + tensor.numel() * 2
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(folder / "model.safetensors", 8 + len(text) + end)
    assert end > 4e8
    child = os.fork()
    if child == 0:
        before = peak_memory()
        report = pack(folder, tmp_path / "out", max_shard_size="150MB")
        os._exit(0 if report.weights == "rewritten" and peak_memory() - before < 1e8 else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    shutil.rmtree(tmp_path / "out")


def peak_memory() -> int:
    """Bytes that this process has had in memory at most."""
    return 1024 * int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def test_nothing_is_left_of_a_pack_that_fails(source, tmp_path):
    weights = load_file(source / "model.safetensors")
    weights.pop("mlp1.1.weight")
    save_file(weights, source / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"mlp1\.1\.weight"):
        pack(source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(
    ("trial", "told"),
    [
        ("import sys; sys.exit('no such class')", "does not load with trust_remote_code:\nno such class"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "stopped by signal 9"),
    ],
)
def test_a_trial_that_fails_leaves_nothing_and_says_why(source, tmp_path, monkeypatch, trial, told):
    monkeypatch.setattr(hub_upload, "TRIAL", trial)
    with pytest.raises(CheckpointError, match=told):
        pack(source, tmp_path / "out", skip_test=False)
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_a_folder_may_be_packed_into_itself_when_told(source):
    before = weights_of(source)
    with pytest.raises(FileExistsError, match="--overwrite"):
        pack(source, source)
    pack(source, source, overwrite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights_of(source).items())
    assert (source / "hub_upload.py").exists() and not list(source.parent.glob(".*"))


def test_overwriting_removes_nothing_but_a_repository(source, tmp_path, monkeypatch):
    home = tmp_path / "work"
    (home / "photos").mkdir(parents=True)
    (home / "photos" / "thesis.txt").write_text("years")
    with pytest.raises(FileExistsError, match="also holds photos"):
        pack(source, home, overwrite=True)
    monkeypatch.chdir(source)
    with pytest.raises(FileExistsError, match="current or home folder"):
        pack(source, ".", overwrite=True)
    assert (home / "photos" / "thesis.txt").exists() and (source / "config.json").exists()


def test_secrets_and_local_paths_are_found(source, tmp_path):
    (source / "README.md").write_text("# Mine\n\nfrom /home/me/runs/7\ntoken hf_" + "a" * 34 + "\n")
    (source / "LICENSE").write_text("-----BEGIN RSA PRIVATE KEY-----\n")
    (source / "generation_config.json").write_text('{"trained_in": "/data7/me/run"}')
    with pytest.raises(CheckpointError) as error:
        pack(source, tmp_path / "out")
    told = [line.strip() for line in str(error.value).splitlines()[1:]]
    assert told == [
        "LICENSE:1: a secret (-----B...)",
        "README.md:3: a path of this machine (/home/me/runs/7)",
        "README.md:4: a secret (hf_aaa...)",
        "generation_config.json:2: a path of this machine (/data7/me/run)",
    ]
    assert not (tmp_path / "out").exists()


def test_places_that_transformers_notes_are_left_out(source, tmp_path):
    values = json.loads((source / "config.json").read_text()) | {"_name_or_path": "/data/me/run"}
    values["llm_config"]["_name_or_path"] = "/data/me/qwen"
    (source / "config.json").write_text(json.dumps(values))
    (source / "optimizer.pt").write_bytes(b"state")
    (source / ".env").write_text("TOKEN=1")
    pack(source, tmp_path / "out")
    assert "/data" not in (tmp_path / "out" / "config.json").read_text()
    assert not {"optimizer.pt", ".env"} & {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("released", [False, True], ids=["adapter of ours", "adapter of the released code"])
def test_an_adapter_is_merged(tmp_path, released, picture):
    peft = pytest.importorskip("peft")
    model = AutoModel.from_pretrained(GOLDEN / "ivl_internlm2", dtype=torch.float32)
    torch.manual_seed(0)
    run = tmp_path / "run"
    adapter = run / "adapter"
    if released:
        rows = 320
        module = "language_model.model.layers.0.attention.wqkv"
        weights = {"lora_A.weight": torch.randn(4, 160), "lora_B.weight": torch.randn(rows, 4)}
        peft.LoraConfig(r=4, lora_alpha=8, target_modules=[module]).save_pretrained(adapter)
        save_file(
            {f"base_model.model.{module}.{k}": v for k, v in weights.items()}, adapter / "adapter_model.safetensors"
        )
    else:
        options = {"init_lora_weights": False, "modules_to_save": ["text_hidden_fcs"]}
        wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], **options))
        wrapped.save_pretrained(adapter)
        wanted = wrapped.predict_forward(image=picture, text="?", max_new_tokens=4)
    values = json.loads((adapter / "adapter_config.json").read_text())
    values["base_model_name_or_path"] = str(GOLDEN / "ivl_internlm2")
    (adapter / "adapter_config.json").write_text(json.dumps(values))
    (adapter / "training.json").write_text('{"steps": 7, "data": "/home/me/data"}')
    (adapter / "optimizer.pt").write_bytes(b"state")
    report = pack(run if released else adapter, tmp_path / "out")  # the folder of a training run stands for its adapter
    assert report.weights == "merged" and check_checkpoint(tmp_path / "out").ok
    text = (tmp_path / "out" / "README.md").read_text()
    assert "- steps: 7" in text and "- adapter: LORA, merged" in text and "/home/me" not in text
    assert not {"optimizer.pt", "adapter_config.json"} & set(report.files)
    if released:
        new, old = weights_of(tmp_path / "out"), weights_of(GOLDEN / "ivl_internlm2")
        changed = {name for name in old if not torch.equal(new[name], old[name].to(new[name].dtype))}
        assert changed == {"language_model.model.layers.0.attention.wqkv.weight"}
    else:
        merged = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
        output = merged.predict_forward(image=picture, text="?", max_new_tokens=4)
        assert output.prediction == wanted.prediction


def test_an_adapter_beside_the_weights_it_was_trained_on_is_merged_once(source, tmp_path):
    peft = pytest.importorskip("peft")
    model = AutoModel.from_pretrained(source, dtype=torch.float32)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False))
    wrapped.save_pretrained(source)
    assert pack(source, tmp_path / "out").weights == "merged"
    merged = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32).state_dict()
    wanted = wrapped.merge_and_unload().state_dict()
    assert all(torch.allclose(merged[name], wanted[name], rtol=1e-2, atol=1e-3) for name in wanted)
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out"} and (source / "adapter_config.json").exists()


@pytest.mark.parametrize("base", ["/gone/base", "", None, 5, ["me/base"], {"name": "me/base"}])
def test_an_adapter_whose_base_is_not_here_is_told(tmp_path, base):
    values = {"base_model_name_or_path": base, "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(values))
    with pytest.raises(FileNotFoundError, match=re.escape(f"the base model {base!r}, which is not here")):
        pack(tmp_path, tmp_path / "out")


def card_of(folder: Path) -> ModelCard:
    """The model card of a repository."""
    return ModelCard.load(folder / "README.md")


def test_a_card_has_the_metadata_that_the_hub_knows(source, tmp_path):
    facts = CardFacts(base_model=("ByteDance/Sa2VA-1B",), license="mit", datasets=("me/shapes",), results=RESULTS)
    pack(source, tmp_path / "my-model", facts=facts)
    card = card_of(tmp_path / "my-model")
    assert (card.data.license, card.data.library_name, card.data.pipeline_tag) == (
        "mit",
        "transformers",
        "image-text-to-text",
    )
    assert (card.data.base_model, card.data.base_model_relation) == (["ByteDance/Sa2VA-1B"], "finetune")
    assert card.data.language == ["en"] and "sa2va" in card.data.tags and card.data.datasets == ["me/shapes"]
    (result,) = card.data.eval_results
    assert (result.dataset_type, result.metric_type, result.metric_value) == ("shapes", "cIoU", 62.9)
    assert "| Shapes (test) | cIoU | 62.9 |" in card.text and 'from_pretrained("my-model"' in card.text


def test_the_base_models_of_the_released_sizes_are_known():
    for path in (ROOT / "tests" / "released").glob("[!_]*.json"):
        name = json.loads(path.read_text())["checkpoint"]
        config = json.loads(path.read_text())["config"]
        text = Sa2VAChatConfig(**config).get_text_config()
        released, base = LINEAGE[text.model_type, text.hidden_size]
        assert released == name.replace("kumuji/Sa2VA-i", "ByteDance/Sa2VA") and base.partition("/")[0] in (
            "OpenGVLab",
            "Qwen",
        )


@pytest.mark.parametrize(
    ("described", "bases", "relation"),
    [
        ("ByteDance--Sa2VA-1B", ["OpenGVLab/InternVL2_5-1B", "facebook/sam2-hiera-large"], "merge"),
        ("ByteDance--Sa2VA-26B", ["OpenGVLab/InternVL2_5-26B", "facebook/sam2-hiera-large"], "merge"),
        ("ByteDance--Sa2VA-Qwen3-VL-4B", ["Qwen/Qwen3-VL-4B-Instruct", "facebook/sam2-hiera-large"], "merge"),
        ("kumuji--Sa2VA-i-1B", ["ByteDance/Sa2VA-1B"], "finetune"),
    ],
)
def test_the_card_of_a_released_checkpoint_names_what_it_was_made_from(tmp_path, described, bases, relation):
    source, words = tmp_path / "source", GOLDEN / ("qwen3vl" if "Qwen" in described else "ivl_qwen2")
    shutil.copytree(words, source, ignore=shutil.ignore_patterns("golden*", "*.safetensors"))
    write_checkpoint(source, described, released_shapes(described), shards=2)
    pack(source, tmp_path / "out")
    data = card_of(tmp_path / "out").data
    assert (data.base_model, data.base_model_relation) == (bases, relation)
    assert data.license is None and data.language == ["multilingual"]  # what it is under, its own card says


def test_a_card_is_kept_once_somebody_has_changed_it(packed, tmp_path):
    source, out = packed / "sa2vai_qwen2", shutil.copytree(packed / "sa2vai_qwen2", tmp_path / "out")
    pack(source, out, overwrite=True, facts=CardFacts(license="mit"))
    assert card_of(out).data.license == "mit"  # made anew, as nobody had touched it
    text = (out / "README.md").read_text().replace("# out", "# My own words")
    (out / "README.md").write_text(text)
    report = pack(source, out, overwrite=True, facts=CardFacts(license="apache-2.0"))
    assert report.card == "kept" and (out / "README.md").read_text() == text
    assert any("license did not change it" in note for note in report.notes)


def test_a_card_of_the_hub_speaks_of_the_new_repository(source, tmp_path, monkeypatch):
    (source / "README.md").write_text(
        '# Theirs\n`AutoModel.from_pretrained("me/base")`, [x](https://huggingface.co/me/base)\n'
    )
    monkeypatch.setattr(hub_upload, "_download", lambda *_: source)
    pack("me/base", tmp_path / "out", model_id="you/new")
    text = (tmp_path / "out" / "README.md").read_text()
    assert 'from_pretrained("you/new")' in text and "huggingface.co/me/base)" in text


@pytest.mark.parametrize("shown", [True, False])
def test_pictures_go_along_by_their_whole_names(source, tmp_path, shown):
    (source / "README.md").write_text("# Mine\n![](fat-cat.png)" + " ![](cat.png)" * shown)
    for name in ("fat-cat.png", "cat.png"):
        (source / name).write_bytes(b"png")
    assert ("cat.png" in pack(source, tmp_path / "out").files) is shown


def test_a_link_stays_a_link_to_what_is_replaced(source, tmp_path):
    place, link = shutil.copytree(source, tmp_path / "place"), tmp_path / "link"
    link.symlink_to(place)
    pack(source, link, overwrite=True)
    assert link.is_symlink() and (place / "README.md").is_file() and not list(tmp_path.glob(".*"))


def test_a_card_in_another_encoding_is_named(source, tmp_path):
    (source / "README.md").write_bytes("# Modèle".encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"README.md is not in UTF-8"):
        pack(source, tmp_path / "out")


def test_what_a_process_that_died_was_replacing_comes_back(packed, tmp_path, monkeypatch):
    source, out = packed / "sa2vai_qwen2", shutil.copytree(packed / "sa2vai_qwen2", tmp_path / "out")
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMy own words\n")
    before, rename = weights_of(out), Path.rename

    def dies_after_the_first(self, target):
        if self.name == ".out.packing":
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(Path, "rename", dies_after_the_first)
        pack(source, out, overwrite=True)
    assert not out.exists()
    with pytest.raises(FileExistsError):
        pack(source, out)
    assert "My own words" in (out / "README.md").read_text() and weights_of(out).keys() == before.keys()
    pack(source, out, overwrite=True)
    assert "My own words" in (out / "README.md").read_text() and not list(tmp_path.glob(".*"))


def test_a_card_that_somebody_wrote_goes_along_with_its_picture_or_into_a_new_one(source, tmp_path):
    header = (
        "---\nlicense: cc-by-4.0\nbase_model: me/base\nbase_model_relation: finetune\nlanguage: [de]\n---\n# Mine\n"
    )
    (source / "README.md").write_text(header + '![](curve.png)\n`AutoModel.from_pretrained("source")`\n')
    for name in ("curve.png", "holiday.png"):
        (source / name).write_bytes(b"png")
    report = pack(source, tmp_path / "7b")
    assert '`AutoModel.from_pretrained("7b")`' in (tmp_path / "7b" / "README.md").read_text()
    assert report.card == "kept" and "curve.png" in report.files and "holiday.png" not in report.files
    pack(source, tmp_path / "new", facts=CardFacts(new_card=True))
    data = card_of(tmp_path / "new").data
    assert (data.license, data.base_model, data.base_model_relation) == ("cc-by-4.0", ["me/base"], "finetune")
    assert data.language == ["de"] and not (tmp_path / "new" / "LICENSE").exists()


@pytest.mark.parametrize("base", ["5", "{name: me/base}", "[me/base, 5]"])
def test_a_card_whose_base_model_is_no_name_is_told(source, tmp_path, base):
    (source / "README.md").write_text(f"---\nbase_model: {base}\n---\n# Mine\n")
    with pytest.raises(CheckpointError, match=r"README\.md has the base_model .* --base-model"):
        pack(source, tmp_path / "out", facts=CardFacts(new_card=True))
    pack(source, tmp_path / "out", facts=CardFacts(new_card=True, base_model=("me/base",)))
    assert card_of(tmp_path / "out").data.base_model == ["me/base"]


def test_a_card_of_nothing_but_metadata_says_what_the_license_is(tmp_path):
    """As a page of the Hub makes it; it was Apache-2.0 for every checkpoint of a released size."""
    source, described = tmp_path / "source", "ByteDance--Sa2VA-1B"
    shutil.copytree(GOLDEN / "ivl_qwen2", source, ignore=shutil.ignore_patterns("golden*", "*.safetensors"))
    write_checkpoint(source, described, released_shapes(described))
    (source / "README.md").write_text("---\nlicense: mit\nlanguage: [de]\n---\n")
    assert pack(source, tmp_path / "out").card == "generated"
    data = card_of(tmp_path / "out").data
    assert (data.license, data.language) == ("mit", ["de"]) and not (tmp_path / "out" / "LICENSE").exists()


def test_facts_of_a_packed_folder_stay_when_it_is_packed_with_more(source, tmp_path):
    pack(source, tmp_path / "one", facts=CardFacts(license="mit", base_model=("me/base",)))
    pack(tmp_path / "one", tmp_path / "two", facts=CardFacts(datasets=("me/shapes",)))
    data = card_of(tmp_path / "two").data
    assert (data.license, data.base_model, data.datasets) == ("mit", ["me/base"], ["me/shapes"])


def test_what_was_packed_before_says_nothing_about_another_source(source, tmp_path):
    pack(source, tmp_path / "out", facts=CardFacts(license="mit", base_model=("me/base",)))
    pack(source, tmp_path / "out", overwrite=True)
    assert (card_of(tmp_path / "out").data.license, card_of(tmp_path / "out").data.base_model) == (None, None)


def test_a_card_written_into_the_source_replaces_one_that_was_made(source, tmp_path):
    pack(source, tmp_path / "out")
    (source / "README.md").write_text("# Mine\n")
    assert pack(source, tmp_path / "out", overwrite=True).card == "kept"
    assert (tmp_path / "out" / "README.md").read_text() == "# Mine\n"


def test_the_license_text_is_that_of_the_card(source, tmp_path):
    """Ours goes when the card says another; what somebody put there stays."""
    out = tmp_path / "out"
    pack(source, out, facts=CardFacts(license="apache-2.0"))
    assert (out / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()
    pack(source, out, overwrite=True, facts=CardFacts(license="mit"))
    assert not (out / "LICENSE").exists()
    (out / "LICENSE").write_text("MIT License")
    pack(source, out, overwrite=True, facts=CardFacts(license="mit"))
    assert (out / "LICENSE").read_text() == "MIT License"


def test_a_form_that_a_library_filled_in_is_no_card(source, tmp_path):
    (source / "README.md").write_text("---\nlibrary_name: peft\n---\n# Model\n[More Information Needed]\n")
    assert pack(source, tmp_path / "out").card == "generated"


def test_metadata_that_cannot_be_read_is_told(source, tmp_path):
    (source / "README.md").write_text("---\nlicense: [\n---\n# Mine\n")
    with pytest.raises(CheckpointError, match="metadata that can't be read"):
        pack(source, tmp_path / "out")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("dataset_name: Shapes", "no list of results"),
        ("- dataset_name: Shapes\n  metric_type: cIoU", "lacks metric_value"),
        ("- {dataset_name: S, metric_type: c, metric_value: 1, score: 2}", "has score"),
        ("- {1: 2, score: 3}", "has 1, score"),
        ("- [", "neither YAML nor JSON"),
    ],
)
def test_results_that_are_none_are_told(tmp_path, text, told):
    (tmp_path / "results.yaml").write_text(text)
    with pytest.raises(ValueError, match=told):
        read_results(tmp_path / "results.yaml")


def test_facts_the_hub_does_not_know_are_told():
    with pytest.raises(ValueError, match="the Hub knows adapter"):
        CardFacts(base_model_relation="copy")


@pytest.mark.parametrize("name", ["base_model", "language", "datasets", "tags"])
def test_one_text_where_several_belong_is_told(name):
    with pytest.raises(ValueError, match=rf"{name}='me/one' must be a tuple: \('me/one',\)"):
        CardFacts(**{name: "me/one"})


def test_the_command_packs_and_reports(source, tmp_path, capsys, caplog):
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    arguments = ["--skip-test", "--license", "mit", "--results", str(tmp_path / "results.json"), "--json"]
    assert main(["pack", str(source), str(tmp_path / "out"), *arguments]) == 0
    report, warnings = json.loads(capsys.readouterr().out), [record.message for record in caplog.records]
    assert not [warning for warning in warnings if "metadata" in warning]  # that there is no card is nothing to tell
    assert report["card"] == "generated" and report["files"]["model.safetensors"] > 7e6 and not report["tested"]
    assert main(["pack", str(source), str(tmp_path / "out"), *arguments]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main(["pack", str(source), str(tmp_path / "new"), "--max-shard-size", "many"]) == 2
    assert main(["pack", str(tmp_path / "nothing"), str(tmp_path / "new")]) == 2


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[]"])
@pytest.mark.parametrize(
    "name", ["generation_config.json", "tokenizer_config.json", "processor_config.json", "tokenizer.json"]
)
def test_a_damaged_file_of_settings_is_named(source, tmp_path, capsys, name, content):
    (source / name).write_bytes(content)
    assert main(["pack", str(source), str(tmp_path / "out"), "--skip-test"]) == 1
    assert f"error: {name} is not" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_tokenizer_that_is_none_is_the_fault_of_the_checkpoint(source, tmp_path, capsys):
    (source / "tokenizer.json").write_text("{}")
    assert main(["pack", str(source), str(tmp_path / "out"), "--skip-test"]) == 1
    assert "files of the tokenizer" in capsys.readouterr().err


def test_requirements_are_those_of_the_package():
    project = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    assert list(REQUIREMENTS) == re.findall(r'"(.*?)"', listed)
    assert re.search(r'^package-data = .*"sa2va" = \["docs/model_card.md"\]', project, re.MULTILINE)
    assert TEMPLATE.is_file()

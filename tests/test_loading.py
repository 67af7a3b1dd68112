"""Both doors: the installed package `sa2va`, and transformers' module loader on a flat folder; layouts; configs."""

import importlib
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from hub_server import running_hub
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoProcessor
from transformers.dynamic_module_utils import get_imports

from sa2va import Sa2VAChatConfig, Sa2VAChatModel, Sa2VAProcessor, hub_upload

ROOT = Path(__file__).parents[1]
FAMILIES = ("ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl")
CORE_FILES = (
    "configuration_sa2va.py",
    "hub_upload.py",
    "modeling_sa2va.py",
    "processing_sa2va.py",
    "sam2_decoder.py",
)
AUTO_MAP = {
    "AutoConfig": "configuration_sa2va.Sa2VAChatConfig",
    "AutoModel": "modeling_sa2va.Sa2VAChatModel",
    "AutoModelForCausalLM": "modeling_sa2va.Sa2VAChatModel",
    "AutoProcessor": "processing_sa2va.Sa2VAProcessor",
}

FLAT_SCRIPT = """
import pickle
import sys
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM, AutoProcessor
try:
    import sa2va
    sys.exit("the package can be imported, so this proves nothing")
except ImportError:
    pass
folder = sys.argv[1]
model = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert type(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)) is type(model)
pickle.dumps(type(model))
AutoProcessor.from_pretrained(folder, trust_remote_code=True)
output = model.predict_forward(image=Image.new("RGB", (40, 30)), text="Can you segment the person?", max_new_tokens=8)
print(type(model).__module__.split(".")[0], output["prediction"], len(output["prediction_masks"]))
"""


@pytest.fixture(params=["ivl_qwen2", "ivl_internlm2", "qwen25vl", "qwen3vl", "sa2vai_qwen2"])
def flat_folder(request, tmp_path) -> Path:
    """The core files, config and weights in one folder with dots and spaces in its name."""
    folder = tmp_path / "my model v1.0 (copy)"
    shutil.copytree(ROOT / "tests" / "golden" / request.param, folder, ignore=shutil.ignore_patterns("golden*"))
    for name in CORE_FILES:
        shutil.copy(ROOT / name, folder)
    config = json.loads((folder / "config.json").read_text())
    ending = "Qwen" if "text_config" in config else ""  # around Qwen-VL the classes are named as those released
    auto_map = {name: f"{reference}{ending}" for name, reference in AUTO_MAP.items()}
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": auto_map}))
    return folder


@pytest.mark.slow
def test_a_flat_folder_loads_offline_with_trust_remote_code(flat_folder, tmp_path):
    # -P and a foreign working directory hide a checkout; an editable install is hidden by shadowing its name.
    shadow = tmp_path / "shadow"
    shadow.mkdir()
    (shadow / "sa2va.py").write_text("raise ImportError('hidden')")
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "PYTHONPATH": str(shadow),
    }
    done = subprocess.run(
        [sys.executable, "-c", FLAT_SCRIPT, str(flat_folder)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    module, *_ = done.stdout.split()
    assert module == "transformers_modules"


def test_weights_outside_the_folder_are_neither_loaded_nor_found_right(golden, tmp_path):
    shutil.copy(golden.folder / "model.safetensors", tmp_path / "w.safetensors")
    folder = shutil.copytree(golden.folder, tmp_path / "model", ignore=shutil.ignore_patterns("golden*", "model.*"))
    weight_map = dict.fromkeys(load_file(tmp_path / "w.safetensors"), "../w.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map, "metadata": {}}))
    with pytest.raises(OSError, match=r"'\.\./w\.safetensors', but only safetensors files beside it"):
        AutoModel.from_pretrained(folder)
    assert not hub_upload.check_checkpoint(folder).ok


HUB_SCRIPT = """
import sys
import sa2va
from transformers import AutoModel
for name in sys.argv[1:]:
    try:
        print("read", len(AutoModel.from_pretrained(name).state_dict()))
    except Exception as error:
        print(type(error).__name__, str(error).replace(chr(10), " "))
"""


@pytest.mark.slow
def test_an_index_on_the_hub_is_followed_to_files_beside_it_alone(golden, tmp_path):
    files = {name: (golden.folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    weights = files.pop("model.safetensors")
    names = list(load_file(golden.folder / "model.safetensors"))
    indices = {
        "me/good": {"weight_map": dict.fromkeys(names, "w.safetensors"), "metadata": {}},
        "me/climbs": {"weight_map": {"a": "../w.safetensors"}, "metadata": {}},
        "me/lists": {"weight_map": ["a"]},
        "me/lacks": {"weight_map": dict.fromkeys(names, "w.safetensors")},
    }
    with running_hub() as hub:
        for repo, index in indices.items():
            index = {"model.safetensors.index.json": json.dumps(index).encode(), "w.safetensors": weights}
            hub.add_repo(repo, files=files | index)
        environment = os.environ | {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        command = [sys.executable, "-c", HUB_SCRIPT, *indices]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    good, climbs, lists, lacks = done.stdout.splitlines()
    assert good.startswith("read")
    assert climbs.startswith("OSError") and "'../w.safetensors'" in climbs
    assert lists.startswith("OSError") and "weight_map" in lists
    assert lacks.startswith("OSError") and '"metadata": {}' in lacks


@pytest.mark.parametrize("name", CORE_FILES)
def test_a_checkpoint_with_this_code_asks_for_no_more_than_its_requirements(name):
    """transformers demands all that a file imports unguarded, functions included, before it runs code."""
    packages = {re.match(r"[\w-]+", requirement)[0] for requirement in hub_upload.REQUIREMENTS}
    imported = set(get_imports(ROOT / name))
    imported = {{"PIL": "pillow", "cv2": "opencv-python"}.get(module, module) for module in imported}
    assert imported - sys.stdlib_module_names <= packages | {"numpy", "tokenizers", "yaml"}  # which these bring along


def test_the_package_wins_over_an_auto_map_that_points_elsewhere(golden):
    assert "auto_map" in json.loads((golden.folder / "config.json").read_text())
    for trust in (False, True):
        assert type(AutoModel.from_pretrained(golden.folder, trust_remote_code=trust)) is Sa2VAChatModel
        assert type(AutoProcessor.from_pretrained(golden.folder, trust_remote_code=trust)) is Sa2VAProcessor


def test_a_model_keeps_to_its_checkpoint_wherever_the_process_goes(golden, golden_model, tmp_path, monkeypatch):
    folder = tmp_path / "here" / "model"
    golden_model.save_pretrained(folder)
    golden_model.load_processor().save_pretrained(folder)
    monkeypatch.chdir(folder.parent)
    model = AutoModel.from_pretrained("model")
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    assert model.load_processor().tokenizer.get_vocab() == golden_model.load_processor().tokenizer.get_vocab()
    model = AutoModel.from_pretrained("here/model")
    shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"model is gone.*set_processor"):
        model.special_token_ids()


def test_a_pickled_model_holds_no_token(golden, picture):
    model = AutoModel.from_pretrained(golden.folder, token="hf_of_somebody")
    pickled = pickle.dumps(model)
    assert b"hf_of_somebody" not in pickled
    ours, theirs = (
        m.predict_forward(image=picture, text="?", max_new_tokens=3) for m in (model, pickle.loads(pickled))
    )
    assert ours.prediction == theirs.prediction


def test_loading_a_released_folder_reports_no_missing_or_unexpected_key(golden):
    _, report = AutoModel.from_pretrained(golden.folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]


@pytest.mark.parametrize("shard_size", ["1GB", "1MB"])
def test_saving_gives_the_released_layout_bit_for_bit(golden, golden_model, tmp_path, shard_size):
    golden_model.save_pretrained(tmp_path, max_shard_size=shard_size)
    saved = {}
    for file in tmp_path.glob("*.safetensors"):
        saved |= load_file(file)
    released = load_file(golden.folder / "model.safetensors")
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)


def test_a_saved_checkpoint_loads_to_the_same_model(golden, golden_model, golden_processor, tmp_path):
    golden_model.save_pretrained(tmp_path)
    golden_processor.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path)
    case = golden.case("imgD1seg")
    assert again.predict_forward(**case.arguments).prediction == case.meta["prediction"]


@pytest.mark.parametrize("family", FAMILIES)
def test_loaded_weights_share_no_memory(family):
    model = AutoModel.from_pretrained(ROOT / "tests" / "golden" / family)
    places = [weight.untyped_storage().data_ptr() for weight in model.state_dict().values()]
    tied = [*model.all_tied_weights_keys]
    assert len(set(places)) == len(places) - len(tied)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_saved_is_taken_by_load_state_dict(family, tmp_path):
    """As transformers' `Trainer` goes on from a checkpoint; strict, so that no name may be left over."""
    model = AutoModel.from_pretrained(ROOT / "tests" / "golden" / family)
    model.save_pretrained(tmp_path)
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    torch.nn.ModuleDict({"inner": model}).load_state_dict(
        {f"inner.{name}": weight for name, weight in load_file(tmp_path / "model.safetensors").items()}
    )
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_state_of_accelerate_comes_back(golden, tmp_path):
    accelerator = Accelerator(cpu=True)
    model = accelerator.prepare(AutoModel.from_pretrained(golden.folder))
    expected = {name: weight.clone() for name, weight in model.state_dict().items()}
    accelerator.save_state(tmp_path)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    accelerator.load_state(tmp_path)
    assert all(torch.equal(weight, expected[name]) for name, weight in model.state_dict().items())


def test_a_released_config_keeps_every_value_through_saving(golden, tmp_path):
    released = json.loads((golden.folder / "config.json").read_text())
    Sa2VAChatConfig.from_pretrained(golden.folder).save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    for section in ("vision_config", "llm_config", "grounding_config"):
        for name, value in released[section].items():
            if name != "torch_dtype":  # today's name is dtype
                assert saved[section][name] == value, f"{section}.{name}"
    for name in ("template", "select_layer", "downsample_ratio", "ps_version", "max_dynamic_patch", "hidden_size"):
        assert saved[name] == released[name]


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen25vl"])
def test_configs_are_equal_if_all_they_hold_is(golden, family):
    first, second = (AutoConfig.from_pretrained(golden.folder.parent / family) for _ in range(2))
    assert first == second
    second.grounding_config.num_key_frames += 1
    assert first != second
    second.grounding_config.num_key_frames -= 1
    second.mask_loss_weight += 1
    assert first != second


def test_a_config_without_grounding_config_means_sam2_hiera_l_at_1024(golden):
    released = json.loads((golden.folder / "config.json").read_text())
    released.pop("grounding_config")
    grounding = Sa2VAChatConfig(**released).grounding_config
    assert (grounding.image_size, grounding.embed_dim, grounding.d_model) == (1024, 144, 256)
    assert grounding.stages == [2, 6, 36, 4] and grounding.backbone_channel_list == [1152, 576, 288, 144]


def test_every_layer_of_the_vision_tower_may_be_selected():
    for layer in (-25, 24):  # of 24 layers, before the first and behind the last
        assert Sa2VAChatConfig(select_layer=layer).select_layer == layer
    for layer in (-26, 25):
        with pytest.raises(ValueError, match="the vision tower has 24 layers"):
            Sa2VAChatConfig(select_layer=layer)


def test_sam2_may_have_no_global_attention_and_windows_that_tile_its_input():
    assert Sa2VAChatConfig(grounding_config={"global_att_blocks": []}).grounding_config.global_att_blocks == []
    with pytest.raises(ValueError, match="multiple of 64"):
        Sa2VAChatConfig(grounding_config={"image_size": 96, "window_spec": [16, 4, 16, 8]})


def test_a_large_model_of_a_million_positions_is_no_attack(golden):
    config = json.loads((golden.folder / "config.json").read_text())
    config["llm_config"] = {
        **{"model_type": "qwen2", "hidden_size": 8192, "intermediate_size": 29568, "num_hidden_layers": 80},
        **{"num_attention_heads": 64, "num_key_value_heads": 8, "max_position_embeddings": 2**20},
    }
    with torch.device("meta"):
        model = Sa2VAChatModel(Sa2VAChatConfig.from_dict(config))
    model._move_missing_keys_from_meta_to_device(set(), None, None, None)
    assert model.num_parameters() > 70e9


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_a_config_is_made_of_dictionaries_or_of_configs(golden, family):
    whole = Sa2VAChatConfig.from_pretrained(golden.folder.parent / family)
    made = Sa2VAChatConfig(**{name: getattr(whole, name) for name in whole.sub_configs})
    assert type(made) is type(whole) and all(getattr(made, name) == getattr(whole, name) for name in whole.sub_configs)


def test_a_vision_tower_beside_a_text_config_is_one_of_qwen_vl():
    with pytest.raises(ValueError, match="'siglip' beside a text_config"):
        Sa2VAChatConfig(text_config={}, vision_config={"model_type": "siglip"})


def test_auto_config_knows_the_model_type(golden):
    assert type(AutoConfig.from_pretrained(golden.folder)) is Sa2VAChatConfig


def test_a_qwen3_language_model_builds_and_answers(golden, golden_processor, picture):
    config = Sa2VAChatConfig.from_pretrained(golden.folder).to_dict()
    sizes = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    llm = {name: config["llm_config"][name] for name in (*sizes, "num_key_value_heads")}
    config = Sa2VAChatConfig(**(config | {"llm_config": llm | {"model_type": "qwen3", "head_dim": 40}}))
    model = Sa2VAChatModel(config).eval()
    output = model.predict_forward(image=picture, text="?", processor=golden_processor, max_new_tokens=3)
    assert type(model.language_model).__name__ == "Qwen3ForCausalLM" and isinstance(output.prediction, str)


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_a_subclass_reads_and_writes_the_released_layout(family, tmp_path):
    folder = ROOT / "tests" / "golden" / family
    plain = AutoModel.from_pretrained(folder)

    class Mine(type(plain)):
        pass

    mine, report = Mine.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    mine.save_pretrained(tmp_path)
    released, written = (load_file(path / "model.safetensors") for path in (folder, tmp_path))
    assert all(torch.equal(written[name], tensor) for name, tensor in released.items())


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_a_subclass_of_the_config_knows_its_fields_and_those_of_the_checkpoint(family, tmp_path):
    folder = ROOT / "tests" / "golden" / family
    plain = AutoConfig.from_pretrained(folder)

    class Mine(type(plain)):
        flag: bool = False

    mine = Mine.from_pretrained(folder, flag=True)
    assert mine.flag and mine.get_text_config() == plain.get_text_config()
    assert mine.grounding_config == plain.grounding_config and not Mine().flag and Mine().grounding_config.d_model
    mine.save_pretrained(tmp_path)
    assert Mine.from_pretrained(tmp_path).flag and Mine.from_pretrained(tmp_path) != plain


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "qwen3vl"])
@pytest.mark.parametrize("mean_resizing", [True, False])
def test_a_vocabulary_may_grow(family, mean_resizing, tmp_path, picture):
    """New rows are drawn as the language model draws its own, or from the others' mean."""
    model = AutoModel.from_pretrained(ROOT / "tests" / "golden" / family).eval()
    before = model.get_input_embeddings().num_embeddings
    inputs = model.load_processor()(picture, "Where is it?")
    wanted = model(**inputs).logits
    model.resize_token_embeddings(before + 8, mean_resizing=mean_resizing)
    assert model.get_input_embeddings().weight[before:].std() < 0.2
    torch.testing.assert_close(model(**inputs).logits[..., :before], wanted)
    model.save_pretrained(tmp_path)
    model.load_processor().save_pretrained(tmp_path)
    grown = AutoModel.from_pretrained(tmp_path).eval()
    assert grown.config.get_text_config().vocab_size == before + 8
    torch.testing.assert_close(grown(**inputs).logits, model(**inputs).logits)


def test_another_image_encoder_in_the_place_of_sam2s_is_told(golden, tmp_path):
    """Else it would be drawn at random, and give masks of nothing."""
    shutil.copytree(golden.folder, tmp_path, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden*"))
    weights = load_file(golden.folder / "model.safetensors")
    other = {name.replace("image_encoder.trunk", "image_encoder.vision_backbone"): w for name, w in weights.items()}
    save_file(other, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"is not SAM 2\.0's, which is the only one known here"):
        AutoModel.from_pretrained(tmp_path)


def test_saving_a_config_replaces_links_and_follows_none(golden, tmp_path):
    """They may lead into a cache, or to another's code."""
    for name in ("config.json", "modeling_sa2va.py"):
        (tmp_path / f"other {name}").write_text("untouched")
        (tmp_path / name).symlink_to(tmp_path / f"other {name}")
    AutoConfig.from_pretrained(golden.folder).save_pretrained(tmp_path)
    for name in ("config.json", "modeling_sa2va.py"):
        assert (tmp_path / f"other {name}").read_text() == "untouched" and not (tmp_path / name).is_symlink()
    assert AutoConfig.from_pretrained(tmp_path).model_type == "sa2va_chat" and not list(tmp_path.glob(".*"))


def test_a_subclass_of_the_processor_is_saved_as_the_one_it_is_of(tmp_path):
    class OwnProcessor(Sa2VAProcessor):
        pass

    OwnProcessor.from_pretrained(ROOT / "tests" / "golden" / "ivl_qwen2").save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "processor_config.json").read_text())
    assert saved["processor_class"] == "Sa2VAProcessor"
    assert saved["auto_map"] == {"AutoProcessor": "processing_sa2va.Sa2VAProcessor"}
    assert type(AutoProcessor.from_pretrained(tmp_path)) is Sa2VAProcessor


OWN_CODE = """
from sa2va import Sa2VAChatModel, Sa2VAProcessor
class OwnModel(Sa2VAChatModel): pass
class OwnProcessor(Sa2VAProcessor): pass
"""


def test_registered_code_comes_with_what_is_saved(tmp_path, monkeypatch):
    (tmp_path / "own_code.py").write_text(OWN_CODE)
    monkeypatch.syspath_prepend(tmp_path)
    own = importlib.import_module("own_code")
    own.OwnModel.register_for_auto_class("AutoModel")
    own.OwnProcessor.register_for_auto_class("AutoProcessor")
    for kind in (own.OwnModel, own.OwnProcessor):
        kind.from_pretrained(ROOT / "tests" / "golden" / "ivl_qwen2").save_pretrained(tmp_path / "saved")
    config, processor = (
        json.loads((tmp_path / "saved" / name).read_text()) for name in ("config.json", "processor_config.json")
    )
    assert config["auto_map"]["AutoModel"] == "own_code.OwnModel"
    assert processor["auto_map"]["AutoProcessor"] == "own_code.OwnProcessor"
    assert (tmp_path / "saved" / "own_code.py").is_file()


@pytest.mark.parametrize("dtype", ["torch.bfloat16", "bfloat16"])
def test_a_dtype_may_be_spelled_as_torch_prints_it(dtype):
    assert AutoModel.from_pretrained(ROOT / "tests" / "golden" / "ivl_qwen2", dtype=dtype).dtype is torch.bfloat16


def test_a_folder_without_config_is_told(tmp_path):
    with pytest.raises(OSError, match=r"holds no config\.json"):
        Sa2VAChatModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["../nowhere", "a/b/c"])
def test_a_processor_that_is_nowhere_is_told(name):
    with pytest.raises(OSError, match="holds neither"):
        Sa2VAProcessor.from_pretrained(name)

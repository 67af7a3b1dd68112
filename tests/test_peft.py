"""Adapters: what they train, merging, saving, and the names of the released code's modules."""

import importlib.metadata
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, GoldenFamily, training_batch
from packaging.version import Version
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.dynamic_module_utils import get_imports
from transformers.integrations import peft as integration

from sa2va import Sa2VAChatModel, modeling_sa2va
from sa2va.modeling_sa2va import merged_with_adapter

peft = pytest.importorskip("peft")
FAMILIES = ("ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl")
families = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture(autouse=True)
def _released_peft(monkeypatch):
    """transformers 5.24 asks for a PEFT newer than any there is; with the newest there is, what we use works."""
    installed = importlib.metadata.version("peft")
    if Version(installed) < Version(integration.MIN_PEFT_VERSION):
        monkeypatch.setattr(integration, "MIN_PEFT_VERSION", installed)


def load(family):
    torch.manual_seed(0)
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()
    model.config.num_points = 0  # else points are drawn at random
    return model


def lora(*targets, **options):
    """A LoRA that changes the model from the start (by default PEFT's does nothing until it is trained)."""
    return peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(targets), init_lora_weights=False, **options)


def adapted(model):
    """Names of the modules that carry a LoRA."""
    return {name.partition(".lora_A")[0] for name, _ in model.named_modules() if name.endswith("lora_A.default")}


@families
def test_a_training_step_changes_nothing_but_the_adapter(family, picture):
    model = load(family)
    wrapped = peft.get_peft_model(model, lora("q_proj", "v_proj", modules_to_save=["text_hidden_fcs"]))
    before = {name: p.detach().clone() for name, p in wrapped.named_parameters()}
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    wrapped(**training_batch(model.load_processor(), picture)).loss.backward()
    optimizer.step()
    changed = {name for name, p in wrapped.named_parameters() if not torch.equal(p, before[name])}
    assert changed and all("lora_" in name or "modules_to_save" in name for name in changed)
    for part in ("self_attn.q_proj.lora_A", "text_hidden_fcs.modules_to_save"):
        assert any(part in name for name in changed)


@families
def test_a_causal_lm_adapter_trains_with_what_its_wrapper_passes(family, picture):
    wrapped = peft.get_peft_model(load(family), lora("q_proj", task_type="CAUSAL_LM"))
    batch = training_batch(wrapped.get_base_model().load_processor(), picture)
    assert wrapped(**batch, use_cache=False).loss.requires_grad


@families
def test_a_merged_model_answers_as_the_adapted_one(family):
    golden = GoldenFamily(family)
    case = golden.case(next(name for name in golden.cases if name.endswith("1seg")))
    wrapped = peft.get_peft_model(load(family), lora("q_proj", "v_proj", "o_proj", modules_to_save=["text_hidden_fcs"]))
    first = wrapped.predict_forward(**case.arguments, max_new_tokens=8)
    merged = wrapped.merge_and_unload()
    second = merged.predict_forward(**case.arguments, max_new_tokens=8)
    assert isinstance(merged, Sa2VAChatModel) and not any("lora_" in name for name in merged.state_dict())
    assert first.prediction == second.prediction


@pytest.mark.slow
@pytest.mark.skipif(Version(transformers.__version__) < Version("5.20"), reason="can't load modules_to_save")
@families
def test_an_adapter_is_added_saved_and_loaded(family, picture, tmp_path):
    model = load(family)
    batch = training_batch(model.load_processor(), picture)
    plain = model(**batch).loss.detach()
    model.add_adapter(lora("q_proj", "up_proj", modules_to_save=["text_hidden_fcs"]))
    model.save_pretrained(tmp_path)
    assert {f.name for f in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load(family)
    report = again.load_adapter(tmp_path)
    assert not report.missing_keys and not report.unexpected_keys
    ours, theirs = model.eval()(**batch).loss, again.eval()(**batch).loss
    torch.testing.assert_close(ours, theirs)
    assert (ours - plain).abs() > 1e-3
    torch.testing.assert_close(peft.PeftModel.from_pretrained(load(family), tmp_path)(**batch).loss, ours)
    again.disable_adapters()
    torch.testing.assert_close(again(**batch).loss, plain)


def test_the_official_recipe_trains_the_mask_decoder_beside_the_adapter(picture):
    model = load("ivl_qwen2")
    config = lora("q_proj", modules_to_save=["text_hidden_fcs", "sam_mask_decoder", "lm_head", "embed_tokens"])
    wrapped = peft.get_peft_model(model, config)
    wrapped(**training_batch(model.load_processor(), picture)).loss.backward()
    trained = {name for name, p in wrapped.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    for part in ("sam_mask_decoder", "text_hidden_fcs", "lm_head", "embed_tokens"):
        assert any(f"{part}.modules_to_save" in name for name in trained)


INTERNLM2_NAMES = {
    "wqkv": {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
    "attention.wo": {"self_attn.o_proj"},
    "w1": {"mlp.gate_proj"},
    "w2": {"mlp.down_proj"},
    "w3": {"mlp.up_proj"},
}


@pytest.mark.parametrize("released", INTERNLM2_NAMES)
def test_released_names_of_internlm2_find_their_modules(released):
    model = load("ivl_internlm2")
    model.add_adapter(lora(released))
    wanted = {f"language_model.model.layers.{i}.{name}" for i in range(2) for name in INTERNLM2_NAMES[released]}
    assert adapted(model) == wanted


@pytest.mark.parametrize(
    ("released", "names"),
    [("qkv", ("q_proj", "k_proj", "v_proj")), ("proj", ("projection_layer",))],
)
def test_released_names_of_internvit_find_their_modules(released, names):
    model = load("ivl_qwen2")
    model.add_adapter(lora(*(f"vision_model.encoder.layers.{i}.attn.{released}" for i in range(2))))
    assert adapted(model) == {f"vision_model.encoder.layer.{i}.attention.{name}" for i in range(2) for name in names}


def test_regular_expressions_and_layer_numbers_work_with_released_names():
    model = load("ivl_internlm2")
    config = model.adapter_config(peft.LoraConfig(target_modules=r"language_model\..*layers\.1\.attention\.w(qkv|o)"))
    assert sorted(config.target_modules) == [
        f"language_model.model.layers.1.self_attn.{name}_proj" for name in ("k", "o", "q", "v")
    ]
    config = lora("wqkv", "w2", layers_to_transform=[0], rank_pattern={"wqkv": 2})
    model.add_adapter(config)
    assert adapted(model) == {
        *(f"language_model.model.layers.0.self_attn.{name}_proj" for name in "qkv"),
        "language_model.model.layers.0.mlp.down_proj",
    }
    assert model.get_decoder().layers[0].self_attn.k_proj.r == {"default": 2}
    assert config.target_modules == {"wqkv", "w2"}  # the user's own stays


@families
def test_a_saved_adapter_means_the_same_as_tensors_and_merged(family, tmp_path):
    wrapped = peft.get_peft_model(load(family), lora("q_proj", "v_proj"))
    wrapped.save_pretrained(tmp_path)
    config = peft.LoraConfig.from_pretrained(tmp_path)
    again = load(family)
    again.load_adapter(peft_config=config, adapter_state_dict=load_file(tmp_path / "adapter_model.safetensors"))
    merged = merged_with_adapter(load(family), tmp_path)
    names = sorted(adapted(again))
    assert names
    for name in names:
        plain, module = wrapped.get_base_model().get_submodule(name), again.get_submodule(name)
        torch.testing.assert_close(module.get_delta_weight("default"), plain.get_delta_weight("default"))
        wanted = plain.base_layer.weight + plain.get_delta_weight("default")
        torch.testing.assert_close(merged.get_submodule(name).weight, wanted)


def test_an_adapter_that_lacks_a_trained_module_is_refused():
    config = lora("q_proj", modules_to_save=["text_hidden_fcs"])
    with pytest.raises(ValueError, match="text_hidden_fcs"):
        load("ivl_qwen2").load_adapter(peft_config=config, adapter_state_dict={})


def test_a_checkpoint_with_this_code_loads_without_peft():
    """transformers demands all that a file imports unguarded before it runs code from a checkpoint."""
    assert "peft" not in get_imports(Path(modeling_sa2va.__file__))


def test_loading_an_adapter_loads_its_base_model(tmp_path):
    model = load("ivl_internlm2")
    model.add_adapter(lora("w1"))
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    assert adapted(again) == adapted(model) != set()
    case = GoldenFamily("ivl_internlm2").case("text_only")
    answers = [m.eval().predict_forward(**case.arguments, max_new_tokens=8).prediction for m in (model, again)]
    assert answers[0] == answers[1]


def test_a_config_without_released_names_is_left_alone():
    model = load("ivl_internlm2")
    for targets in (["q_proj", "w9"], "all-linear", r".*self_attn\.q_proj"):
        config = peft.LoraConfig(target_modules=targets)
        assert model.adapter_config(config) is config


def released_adapter(family, module, fused_rows, folder, **options):
    """Saves a LoRA of one module of the first layer, as training with the official code leaves it."""
    torch.manual_seed(1)
    width = 160 if module.startswith("language_model") else 64
    weights = {"lora_A.weight": torch.randn(4, width), "lora_B.weight": torch.randn(fused_rows, 4)}
    save_file({f"base_model.model.{module}.{k}": v for k, v in weights.items()}, folder / "adapter_model.safetensors")
    peft.LoraConfig(r=4, lora_alpha=8, target_modules=[module], base_model_name_or_path=family).save_pretrained(folder)
    return 2 * weights["lora_B.weight"] @ weights["lora_A.weight"]  # alpha / r


def test_an_adapter_trained_on_wqkv_loads_and_means_the_same(tmp_path):
    model = load("ivl_internlm2")
    attention = model.get_decoder().layers[0].self_attn
    names = [f"{name}_proj" for name in "qkv"]
    before = {name: getattr(attention, name).weight.clone() for name in names}
    rows = sum(len(weight) for weight in before.values())
    change = released_adapter("ivl_internlm2", "language_model.model.layers.0.attention.wqkv", rows, tmp_path)
    report = model.load_adapter(tmp_path)
    assert not report.missing_keys and not report.unexpected_keys
    wanted = modeling_sa2va.SplitGroupedHeads().convert({"wqkv": change}, ["wqkv"], names, config=model.config)
    for name in names:
        module = getattr(attention, name)
        torch.testing.assert_close(module.get_delta_weight("default"), wanted[name])


def test_an_adapter_trained_on_internvits_qkv_loads_and_means_the_same(tmp_path):
    model = load("ivl_qwen2")
    change = released_adapter("ivl_qwen2", "vision_model.encoder.layers.0.attn.qkv", 192, tmp_path)
    model.load_adapter(tmp_path)
    attention = model.vision_model.encoder.layer[0].attention
    for name, wanted in zip(("q_proj", "k_proj", "v_proj"), change.chunk(3), strict=True):
        torch.testing.assert_close(getattr(attention, name).get_delta_weight("default"), wanted)


def test_a_fused_adapter_that_is_no_lora_is_refused():
    model = load("ivl_internlm2")
    weights = {"base_model.model.language_model.model.layers.0.attention.wqkv.ia3_l": torch.ones(320, 1)}
    with pytest.raises(ValueError, match="Only LoRA and DoRA"):
        model.load_adapter(peft_config=peft.IA3Config(target_modules=["wqkv"]), adapter_state_dict=weights)


@pytest.mark.parametrize("targets", [["q_proj"], ["q_proj", "v_proj"]])
def test_fused_weights_are_not_put_into_what_an_adapter_left_of_them(targets):
    model = peft.get_peft_model(load("ivl_internlm2"), lora(*targets))
    missing, unexpected = model.base_model.model.load_state_dict(
        load_file(GOLDEN / "ivl_internlm2" / "model.safetensors"), strict=False
    )
    assert any(name.endswith("attn.qkv.weight") for name in unexpected)
    assert any(name.endswith("k_proj.weight") for name in missing)


def test_a_merged_internlm2_is_saved_in_the_released_layout(golden, tmp_path):
    model = load("ivl_internlm2")
    merged = peft.get_peft_model(model, model.adapter_config(lora("wqkv"))).merge_and_unload()
    merged.save_pretrained(tmp_path)
    saved, released = (load_file(f / "model.safetensors") for f in (tmp_path, GOLDEN / "ivl_internlm2"))
    changed = {name for name in released if not torch.equal(saved[name], released[name])}
    assert saved.keys() == released.keys()
    assert changed == {f"language_model.model.layers.{i}.attention.wqkv.weight" for i in range(2)}
    assert np.isfinite(saved["language_model.model.layers.0.attention.wqkv.weight"].numpy()).all()


@pytest.mark.parametrize("placed", [{}, {"device_map": {"": "cpu"}}], ids=["plain", "placed"])
def test_the_class_itself_takes_the_folder_of_an_adapter(tmp_path, placed):
    """And its tokenizer from the checkpoint that the adapter belongs to, as AutoModel."""
    peft.get_peft_model(load("ivl_qwen2"), lora("q_proj")).save_pretrained(tmp_path)
    model = Sa2VAChatModel.from_pretrained(tmp_path, **placed)
    assert adapted(model) and model.predict_forward(text="Hi", max_new_tokens=2).prediction


def test_a_whole_checkpoint_beside_an_adapters_config_is_that_checkpoint(tmp_path):
    """As transformers has it; the base is for an adapter alone."""
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "someone/base"}')
    assert modeling_sa2va._base_of(tmp_path) == "someone/base"
    (tmp_path / "config.json").write_text("{}")
    assert modeling_sa2va._base_of(tmp_path) == tmp_path


@pytest.mark.parametrize("words", ["{", "[]", "{}"])
def test_a_damaged_config_of_an_adapter_is_named(tmp_path, words):
    (tmp_path / "adapter_config.json").write_text(words)
    with pytest.raises(OSError, match=r"adapter_config\.json can't be read"):
        Sa2VAChatModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "qwen3vl"])
def test_a_model_inside_a_peft_model_is_not_saved_over_a_whole_one(family, tmp_path):
    model = AutoModel.from_pretrained(GOLDEN / family)
    model.save_pretrained(tmp_path)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="merge_and_unload"):
        model.save_pretrained(tmp_path)
    wrapped.merge_and_unload().save_pretrained(tmp_path)
    assert AutoModel.from_pretrained(tmp_path)

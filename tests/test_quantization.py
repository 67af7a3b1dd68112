"""Quantized language models: what is quantized and what never is, answers, and what is saved.

Of the recordings only one is compared, in 8 bits: their language models are random numbers, which rounding garbles.
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GoldenFamily
from torch import nn
from transformers import AutoModel, BitsAndBytesConfig, EetqConfig, QuantoConfig, TorchAoConfig

from sa2va.modeling_sa2va import _language_model_only

ROOT = Path(__file__).parents[1]
TINY, SHAPES = ROOT / "sa2va-tiny", ROOT / "demo" / "samples" / "shapes.png"
STAR = "Please segment the red star in this image."
FAMILIES = ("ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl")
bitsandbytes = pytest.importorskip("bitsandbytes.functional")
has_avx512bf16, dequantize_4bit = bitsandbytes.has_avx512bf16, bitsandbytes.dequantize_4bit
pack = bitsandbytes._convert_weight_packed_for_cpu
quantization = pytest.importorskip("torchao.quantization")


def int4_config():
    """4 bits in the one of torchao's formats that needs no GPU; groups of 32 fit the small models."""
    return quantization.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=quantization.PerGroup(32))


CONFIGS = {
    "bitsandbytes-8": BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes-4": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
    "torchao-8": TorchAoConfig(quantization.Int8WeightOnlyConfig()),
    "torchao-4": TorchAoConfig(int4_config()),
}
configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
families = pytest.mark.parametrize("family", FAMILIES)


def load(folder, **options):
    return AutoModel.from_pretrained(folder, dtype=torch.float32, **options).eval()


def quantized_modules(model):
    """Names of the modules whose weights are something else than floating point numbers."""
    plain = (nn.Parameter, torch.Tensor)
    weights = {name: getattr(module, "weight", None) for name, module in model.named_modules()}
    return {name for name, weight in weights.items() if weight is not None and type(weight) not in plain}


def language_layers(model):
    """Names of the linear modules in the language model's layers."""
    inside = {id(module) for layer in model.get_decoder().layers for module in layer.modules()}
    return {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and id(m) in inside}


@configs
@families
def test_only_the_layers_of_the_language_model_are_quantized(family, config):
    model = load(GOLDEN / family, quantization_config=config)
    assert quantized_modules(model) == language_layers(model) != set()


@configs
def test_masks_are_those_of_full_precision_for_the_same_prompts(golden, golden_model, config):
    model = load(golden.folder, quantization_config=config)
    frames, prompts = torch.randn(1, 3, 256, 256), torch.randn(2, 64)
    decoders = [m.grounding_encoder for m in (model, golden_model)]
    with torch.no_grad():
        quantized, full = (decoder.decode(decoder.encode(frames), prompts) for decoder in decoders)
    assert torch.equal(quantized.logits, full.logits)


@families
def test_torchao_quantizes_all_that_comes_out_of_a_fused_tensor(family):
    """transformers itself would keep the queries of InternLM2's `wqkv` and lose keys and values."""
    full, model = load(GOLDEN / family), load(GOLDEN / family, quantization_config=CONFIGS["torchao-8"])
    states = torch.randn(3, 160)
    for name in language_layers(model):
        parts = [m.get_submodule(name) for m in (model, full)]
        if parts[0].in_features == 160:
            quantized, exact = (part(states) for part in parts)
            assert torch.cosine_similarity(quantized.flatten(), exact.flatten(), dim=0) > 0.999


@pytest.mark.parametrize("options", [{"quantization_config": CONFIGS["torchao-8"]}, {"load_in_8bit": True}], ids=str)
def test_eight_bits_give_the_recorded_answer(options):
    case = GoldenFamily("qwen3vl").case("img1seg")
    output = load(GOLDEN / "qwen3vl", **options).predict_forward(**case.arguments)
    assert output.prediction == case.meta["prediction"]
    mask, recorded = output.prediction_masks[0], case.mask(0)
    assert (mask & recorded).sum() / (mask | recorded).sum() > 0.9


@configs
def test_a_trained_model_answers_as_in_full_precision(config):
    full, quantized = (
        load(TINY, quantization_config=c).predict_forward(image=SHAPES, text=STAR) for c in (None, config)
    )
    assert quantized.prediction == full.prediction and len(full.prediction_masks) == 1
    mask, wanted = quantized.prediction_masks[0], full.prediction_masks[0]
    assert (mask & wanted).sum() / (mask | wanted).sum() > 0.9


@pytest.mark.parametrize(("length", "masks"), [(64, 1), (3, 0)])
def test_linear_layers_that_torch_quantizes_answer_as_in_full_precision(length, masks):
    model, asked = load(TINY), {"image": SHAPES, "text": STAR, "max_new_tokens": length}
    full = model.predict_forward(**asked)
    quantized = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8).predict_forward(**asked)
    assert quantized.prediction == full.prediction
    assert len(quantized.prediction_masks) == len(full.prediction_masks) == masks


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_four_bits_are_packed_where_this_cpu_can_and_widths_allow(dtype):
    """bitsandbytes fails at the 352 columns of `down_proj` unless that layer is left as it is."""
    model = AutoModel.from_pretrained(
        TINY, dtype=dtype, device_map="cpu", quantization_config=CONFIGS["bitsandbytes-4"]
    )
    assert len(model.predict_forward(image=SHAPES, text=STAR).prediction_masks) == 1
    layers = {name: model.get_submodule(name).weight.quant_state for name in language_layers(model)}
    packed = {name for name, state in layers.items() if getattr(state, "packing_format_for_cpu", False)}
    fitting = {name for name in layers if not name.endswith("down_proj")}
    assert packed == (fitting if has_avx512bf16() else set())


def test_layers_of_odd_widths_are_packed_on_no_cpu(monkeypatch):
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = load(TINY, quantization_config=CONFIGS["bitsandbytes-4"])
    left = {name for name in language_layers(model) if not model.get_submodule(name).support_avx512bf16_for_cpu}
    assert left == {name for name in language_layers(model) if name.endswith("down_proj")}


def test_a_model_that_was_packed_is_saved_and_answers_the_same(tmp_path):
    model = load(TINY, quantization_config=CONFIGS["bitsandbytes-4"])
    first = model.predict_forward(image=SHAPES, text=STAR)
    model.save_pretrained(tmp_path)
    second = load(tmp_path).predict_forward(image=SHAPES, text=STAR, processor=model.load_processor())
    assert first.prediction == second.prediction
    mask, again = first.prediction_masks[0], second.prediction_masks[0]
    assert (mask & again).sum() / (mask | again).sum() > 0.95


def test_weights_that_were_packed_are_saved_in_order():
    model = load(TINY, quantization_config=CONFIGS["bitsandbytes-4"])
    layers = {name: model.get_submodule(name) for name in language_layers(model) if not name.endswith("down_proj")}
    before = {name: dequantize_4bit(layer.weight.data, layer.weight.quant_state) for name, layer in layers.items()}
    for layer in layers.values():  # as a CPU with bfloat16 instructions does at its first use
        layer.weight.data, _ = pack(layer.weight.data, layer.weight.quant_state)
    saved = model.state_dict()
    for name, layer in layers.items():
        after = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        torch.testing.assert_close(after, before[name], rtol=2**-8, atol=0)  # packed scales are bfloat16
        assert torch.equal(saved[f"{name}.weight.absmax"], layer.weight.quant_state.absmax)


@configs
@pytest.mark.parametrize("family", ["ivl_internlm2", "qwen3vl"])
def test_a_quantized_model_is_saved_and_loads_again(family, config, tmp_path):
    model = load(GOLDEN / family, quantization_config=config)
    model.save_pretrained(tmp_path)
    model.load_processor().save_pretrained(tmp_path)
    again = load(tmp_path)
    assert quantized_modules(again) == quantized_modules(model)
    case = GoldenFamily(family).case("img1seg")
    first, second = (m.predict_forward(**case.arguments, max_new_tokens=6) for m in (model, again))
    assert first.prediction == second.prediction
    assert np.array_equal(first.prediction_masks, second.prediction_masks)


def test_a_skip_list_of_the_users_own_counts_too(golden):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["down_proj"])
    given = copy.deepcopy(config)
    model = load(golden.folder, quantization_config=config)
    assert quantized_modules(model) == {name for name in language_layers(model) if not name.endswith("down_proj")}
    assert config.to_dict() == given.to_dict()  # what the user holds stays as it was


def test_a_skip_list_may_use_released_names():
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["attention.wqkv", "feed_forward.w2"])
    model = load(GOLDEN / "ivl_internlm2", quantization_config=config)
    skipped = ("q_proj", "k_proj", "v_proj", "down_proj")
    assert quantized_modules(model) == {name for name in language_layers(model) if not name.endswith(skipped)}


def test_a_dictionary_will_do(golden):
    model = load(golden.folder, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    assert quantized_modules(model) == language_layers(model)


@pytest.mark.parametrize(
    ("asked", "dtype"),
    [(None, torch.bfloat16), ("auto", torch.bfloat16), ("float16", torch.float16), (torch.float32, torch.float32)],
)
def test_four_bits_are_multiplied_in_the_dtype_of_the_model(asked, dtype):
    assert _language_model_only(BitsAndBytesConfig(load_in_4bit=True), asked).bnb_4bit_compute_dtype is dtype
    chosen = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float16)
    assert _language_model_only(chosen, asked).bnb_4bit_compute_dtype is torch.float16


@pytest.mark.parametrize("config", [QuantoConfig(weights="int8"), EetqConfig()], ids=lambda c: type(c).__name__)
def test_configs_of_other_backends_get_the_same_list(config):
    skipped = _language_model_only(config, None).modules_to_not_convert
    assert {"vision_model", "grounding_encoder", "text_hidden_fcs"} <= set(skipped)

"""Placing a model: by layers, on disk, over devices. The answers are those of the model in one piece."""

from itertools import product

import numpy as np
import pytest
import torch
import transformers
from accelerate import dispatch_model
from conftest import GOLDEN, GoldenFamily, training_batch
from packaging.version import Version
from pretend_devices import pretend_devices
from safetensors.torch import load_file
from transformers import AutoModel, CompileConfig, GenerationConfig, StaticCache
from transformers.integrations.accelerate import infer_auto_device_map

from sa2va import modeling_sa2va

FAMILIES = ("ivl_qwen2", "ivl_internlm2", "qwen25vl", "qwen3vl")
SPLIT = {
    "ivl_qwen2": {
        "vision_model.embeddings": "disk",
        "vision_model.encoder.layer.0": "cpu",
        "vision_model.encoder.layer.1": "disk",
        "vision_model.layernorm": "cpu",
        "mlp1": "disk",
        "language_model.model.embed_tokens": "disk",
        "language_model.model.layers.0": "cpu",
        "language_model.model.layers.1": "disk",
        "language_model.model.norm": "disk",
        "language_model.model.rotary_emb": "cpu",
        "language_model.lm_head": "disk",
        "grounding_encoder": "disk",
        "text_hidden_fcs": "disk",
    },
    "qwen3vl": {
        "model.model.visual": "disk",
        "model.model.language_model.embed_tokens": "cpu",
        "model.model.language_model.layers.0": "disk",
        "model.model.language_model.layers.1": "cpu",
        "model.model.language_model.layers.2": "disk",
        "model.model.language_model.norm": "disk",
        "model.model.language_model.rotary_emb": "cpu",
        "model.lm_head": "disk",
        "grounding_encoder": "disk",
        "text_hidden_fcs": "cpu",
    },
}


def load(family, **options):
    return AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32, **options).eval()


def assert_answers_as_recorded(model, case):
    output = model.predict_forward(**case.arguments)
    assert output.prediction == case.meta["prediction"]
    assert len(output.prediction_masks) == case.meta["n_masks"]
    for i, mask in enumerate(output.prediction_masks):
        recorded = case.mask(i)
        assert isinstance(mask, np.ndarray)
        assert (mask & recorded).sum() / (mask | recorded).sum() >= 0.999


def one_device_each(model):
    """A device map that gives every part a device of its own."""
    decoder = model.get_decoder()
    parts = [model._first_module, getattr(model, "mlp1", None), model.get_input_embeddings(), decoder.rotary_emb]
    parts += [*decoder.layers, decoder.norm, model.get_output_embeddings()]
    parts += [model.text_hidden_fcs, model.grounding_encoder]
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(part)]: f"ipu:{i}" for i, part in enumerate(part for part in parts if part is not None)}


@pytest.mark.parametrize(
    ("family", "case"),
    [*product(["ivl_qwen2"], ["img2seg", "vid8_1seg", "text_only"]), *product(["qwen3vl"], ["img2seg", "vid3_1seg"])],
)
def test_layers_split_over_cpu_and_disk_answer_alike(family, case, tmp_path):
    model = load(family, device_map=SPLIT[family], offload_folder=tmp_path)
    assert {p.device.type for p in model.grounding_encoder.parameters()} == {"meta"}  # so they are on disk
    assert_answers_as_recorded(model, GoldenFamily(family).case(case))


@pytest.mark.parametrize("family", FAMILIES)
def test_memory_limits_spill_to_disk_and_change_nothing(family, tmp_path):
    model = load(family, device_map="auto", max_memory={"cpu": "6MB"}, offload_folder=tmp_path)
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    assert_answers_as_recorded(model, GoldenFamily(family).case("img1seg"))


def test_released_module_names_place_a_model(tmp_path):
    parts = dict.fromkeys(("vision_model", "mlp1", "language_model", "grounding_encoder"), "disk")
    model = load("ivl_qwen2", device_map={**parts, "text_hidden_fcs": "cpu"}, offload_folder=tmp_path)
    assert_answers_as_recorded(model, GoldenFamily("ivl_qwen2").case("img1seg"))


def test_a_config_may_be_a_folder_beside_a_device_map():
    folder = str(GOLDEN / "ivl_qwen2")
    model = AutoModel.from_pretrained(folder, config=folder, device_map={"": "cpu"}, dtype=torch.float32)
    assert_answers_as_recorded(model, GoldenFamily("ivl_qwen2").case("img1seg"))


RELEASED_SPLIT = {
    "vision_model.embeddings": "cpu",
    "vision_model.encoder.layers.0": "disk",
    "vision_model.encoder.layers.1": "cpu",
    "mlp1": "cpu",
    "language_model.model.tok_embeddings": "cpu",
    "language_model.model.layers.0": "cpu",
    "language_model.model.layers.1": "disk",
    "language_model.model.norm": "cpu",
    "language_model.output": "disk",
    "text_hidden_fcs": "cpu",
    "grounding_encoder": "disk",
}


def test_released_names_place_single_layers_too(tmp_path):
    model = load("ivl_internlm2", device_map=RELEASED_SPLIT, offload_folder=tmp_path)
    assert model.hf_device_map["language_model.lm_head"] == "disk"
    assert_answers_as_recorded(model, GoldenFamily("ivl_internlm2").case("img1seg"))


def test_both_mask_decoders_of_sa2va_i_come_from_disk(tmp_path):
    parts = dict.fromkeys(("vision_model", "mlp1", "language_model", "text_hidden_fcs"), "cpu")
    model = load("sa2vai_qwen2", device_map={**parts, "grounding_encoder": "disk"}, offload_folder=tmp_path)
    assert_answers_as_recorded(model, GoldenFamily("sa2vai_qwen2").case("vid8_1seg"))


def test_a_stream_comes_from_disk_too(golden, golden_model, tmp_path):
    model = load("ivl_qwen2", device_map=SPLIT["ivl_qwen2"], offload_folder=tmp_path)
    arguments = golden.case("vid3_1seg").arguments
    expected_frames = golden_model.predict_stream(**arguments)
    for frame, expected in zip(model.predict_stream(**arguments), expected_frames, strict=True):
        assert np.array_equal(frame.masks, expected.masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_automatic_maps_split_neither_sam2_nor_a_layer_nor_embeddings(family):
    model = load(family)
    whole = [model.grounding_encoder, *model.get_decoder().layers]
    if family.startswith("ivl"):
        whole += [model.vision_model.embeddings, *model.vision_model.encoder.layer]
    else:
        whole += model.model.model.visual.blocks
    names = {id(module): name for name, module in model.named_modules()}
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    for share in range(1, 100):
        memory = {0: total * share // 100, "cpu": total}
        placed = infer_auto_device_map(model, max_memory=memory, no_split_module_classes=model._no_split_modules)
        assert not [key for key in placed for module in whole if key.startswith(f"{names[id(module)]}.")]


@pytest.mark.parametrize("case", ["img1seg", "vid3_1seg", "text_only"])
@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_every_part_on_a_device_of_its_own_answers_alike(family, case):
    model = load(family)
    with pretend_devices():
        dispatch_model(model, one_device_each(model), skip_keys=model._skip_keys_device_placement)
        assert model.execution_device == torch.device("ipu:0")
        assert_answers_as_recorded(model, GoldenFamily(family).case(case))


def test_a_stream_is_taken_up_where_sam2_computes(golden, golden_model):
    arguments = {**golden.case("vid3_1seg").arguments, "num_frames": 1}
    wanted = [frame.masks for frame in golden_model.predict_stream(**arguments)]
    stream = golden_model.predict_stream(**arguments)
    next(stream)
    state, model = stream.state(), load("ivl_qwen2")
    with pretend_devices():
        dispatch_model(model, one_device_each(model), skip_keys=model._skip_keys_device_placement)
        resumed = model.predict_stream(video=arguments["video"], resume=state)
        assert all(np.array_equal(f.masks, masks) for f, masks in zip(resumed, wanted[1:], strict=True))


def test_visual_prompts_go_with_the_picture_from_device_to_device(golden):
    model = load("ivl_qwen2")
    with pretend_devices():
        dispatch_model(model, one_device_each(model), skip_keys=model._skip_keys_device_placement)
        assert_answers_as_recorded(model, golden.case("img_vp"))


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_of_parts_on_devices_of_their_own_are_those_of_one(family, picture):
    model = load(family)
    model.config.num_points = 0  # else points are drawn at random
    batch = training_batch(model.load_processor(), picture)
    expected = model(**batch)
    with pretend_devices():
        dispatch_model(model, one_device_each(model), skip_keys=model._skip_keys_device_placement)
        output = model(**batch)
        for name in ("loss", "lm_loss", "mask_loss", "dice_loss"):
            torch.testing.assert_close(output[name], expected[name], rtol=1e-4, atol=1e-5)


def test_generate_compiles_no_offloaded_step(tmp_path):
    settings = GenerationConfig(compile_config=CompileConfig())
    settings.compile_config._compile_all_devices = True  # as on a GPU
    for places, compiles in (({"": "cpu"}, True), (SPLIT["ivl_qwen2"], False)):
        writer = load("ivl_qwen2", device_map=places, offload_folder=tmp_path).language_model
        cache = {modeling_sa2va._CACHE: StaticCache(config=writer.config, max_cache_len=8)}
        assert writer._valid_auto_compile_criteria(cache, settings) is compiles


def test_devices_that_meet_are_noticed():
    with pretend_devices():
        first, second = torch.ones(2, device="ipu:0"), torch.ones(2, device="ipu:1")
        assert (first + second.to(first.device)).tolist() == [2, 2]
        with pytest.raises(RuntimeError, match="meets tensors on"):
            first + second


@pytest.mark.skipif(Version(transformers.__version__) < Version("5.14"), reason="can't find renamed weights on disk")
def test_an_offloaded_model_is_saved_in_the_released_layout(golden, tmp_path):
    model = load("ivl_qwen2", device_map=SPLIT["ivl_qwen2"], offload_folder=tmp_path / "offload")
    model.save_pretrained(tmp_path / "saved")
    saved, released = (load_file(f / "model.safetensors") for f in (tmp_path / "saved", golden.folder))
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)

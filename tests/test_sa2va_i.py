"""Sa2VA-i: recognised from its weights, prompted in one mask decoder and tracked by another.

The recordings of the official code are compared stage by stage in `test_golden.py`; here is what they don't cover.
"""

import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import GOLDEN, GoldenFamily
from hub_server import running_hub
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel

from sa2va.processing_sa2va import Sa2VAProcessor, open_video, select_key_frames

FOLDER = GOLDEN / "sa2vai_qwen2"
CACHE_SCRIPT = """
import sys
import httpx
from huggingface_hub import snapshot_download
from sa2va import Sa2VAProcessor

where = {"cache_dir": sys.argv[1]}
print(Sa2VAProcessor.from_pretrained("me/i", **where).frame_sampling)
snapshot_download("me/i", **where)
asked = []
send = httpx.Client.send
httpx.Client.send = lambda client, *args, **kwargs: asked.append(args) or send(client, *args, **kwargs)
print(Sa2VAProcessor.from_pretrained("me/i", local_files_only=True, **where).frame_sampling, len(asked))
"""


@pytest.fixture(scope="module")
def model():
    return AutoModel.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture
def absent_object(model):
    """The plain decoder finds no object anywhere while the test runs."""
    bias = model.grounding_encoder.sam2_model.sam_mask_decoder.pred_obj_score_head.layers[-1].bias
    before = bias.detach().clone()
    bias.data -= 1000
    yield
    bias.data = before


def case(name):
    return GoldenFamily("sa2vai_qwen2").case(name)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_it_is_recognised_from_its_weights(model, tmp_path, layout):
    """Its config.json is that of Sa2VA; loaded as such, its masks would be wrong without a word."""
    assert "separate_prompt_decoder" not in json.loads((FOLDER / "config.json").read_text())["grounding_config"]
    if layout == "single":
        shutil.copy(FOLDER / "model.safetensors", tmp_path)
    else:
        model.save_pretrained(tmp_path, max_shard_size="1MB")
    shutil.copy(FOLDER / "config.json", tmp_path)
    grounding = AutoConfig.from_pretrained(tmp_path).grounding_config
    assert grounding.separate_prompt_decoder and grounding.frame_sampling == "uniform"


def test_of_two_sets_of_weights_those_are_asked_that_are_loaded(tmp_path):
    """transformers prefers model.safetensors to an index beside it."""
    shutil.copy(GOLDEN / "ivl_qwen2" / "model.safetensors", tmp_path)
    shutil.copy(FOLDER / "config.json", tmp_path)
    names = load_file(FOLDER / "model.safetensors").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert not AutoConfig.from_pretrained(tmp_path).grounding_config.separate_prompt_decoder


@pytest.mark.parametrize("place", ["subfolder", "variant"])
def test_it_is_recognised_where_its_weights_are_found_late(tmp_path, place):
    folder = tmp_path / "inner" if place == "subfolder" else tmp_path
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("golden*"))
    if place == "variant":
        (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    where = {"subfolder": "inner"} if place == "subfolder" else {"variant": "fp16"}
    late, report = AutoModel.from_pretrained(tmp_path, output_loading_info=True, **where)
    assert late.config.grounding_config.separate_prompt_decoder and not report["unexpected_keys"]
    assert late.load_processor().frame_sampling == "uniform"


def test_a_processor_by_itself_is_recognised_in_a_subfolder(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "inner", ignore=shutil.ignore_patterns("golden*"))
    assert Sa2VAProcessor.from_pretrained(tmp_path, subfolder="inner").frame_sampling == "uniform"


def test_a_processor_by_itself_is_recognised_in_a_cache_without_network(tmp_path):
    """No other place is looked into, and nobody is asked."""
    files = {path.name: path.read_bytes() for path in FOLDER.iterdir() if not path.name.startswith("golden")}
    with running_hub() as hub:
        hub.add_repo("me/i", files=files)
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
        environment["PYTHONPATH"] = os.pathsep.join(sys.path)
        command = [sys.executable, "-c", CACHE_SCRIPT, str(tmp_path / "cache")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["uniform", "uniform", "0"], done.stderr


def test_saving_gives_the_released_layout_bit_for_bit(model, tmp_path):
    model.save_pretrained(tmp_path)
    saved, released = load_file(tmp_path / "model.safetensors"), load_file(FOLDER / "model.safetensors")
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)


def test_a_saved_checkpoint_says_so_in_its_config(model, tmp_path):
    model.config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["grounding_config"]["separate_prompt_decoder"]


@pytest.mark.parametrize("name", ["vid8_1seg", "vid3_1seg", "vid1_1seg", "vid20_5f_2seg"])
def test_key_frames_are_those_of_the_recording_without_duplicates(model, name):
    recorded = case(name)
    inputs = model.load_processor().prepare(**recorded.arguments)
    assert inputs.key_frames == sorted(set(recorded.meta["sample_idx"]))


def test_twelve_of_twenty_frames_are_those_of_the_official_evaluation():
    clip = open_video(np.zeros((20, 8, 8, 3), np.uint8))
    assert select_key_frames(clip, 12, "uniform") == [0, 1, 3, 5, 6, 8, 10, 12, 13, 15, 17, 19]


@pytest.mark.parametrize("name", ["vid8_1seg", "vid3_1seg", "vid20_5f_2seg"])
def test_first_stage_logits_and_masks_are_those_of_the_recording(model, name):
    recorded = case(name)
    processor = model.load_processor()
    inputs = processor.prepare(**recorded.arguments)
    decoder = model.grounding_encoder
    with torch.no_grad():
        prompts = model.text_hidden_fcs(torch.from_numpy(recorded.arrays["seg_hidden"]))
        for frame, row in {frame: row for row, frame in enumerate(recorded.meta["sample_idx"])}.items():
            pixels = processor.grounding_pixel_values(list(inputs.frames)[frame : frame + 1], is_video=True)
            prediction = decoder.decode(decoder.encode(pixels), prompts)
            masks = torch.nn.functional.interpolate(prediction.logits, inputs.size, mode="bilinear") > 0
            for i in range(recorded.meta["n_masks"]):
                np.testing.assert_allclose(
                    prediction.logits[i], recorded.arrays[f"first_low{i}"][row], atol=2e-4, rtol=2e-4
                )
                shape = tuple(recorded.arrays[f"firstmask{i}_shape"])
                first = np.unpackbits(recorded.arrays[f"firstmask{i}"])[: np.prod(shape)].reshape(shape)
                assert (masks[i, 0].numpy() != first.reshape(-1, *inputs.size)[row]).mean() < 0.002


def test_every_frame_is_encoded_once(model):
    counts = []
    encoder = model.grounding_encoder.sam2_model.image_encoder
    handle = encoder.register_forward_hook(lambda module, args, output: counts.append(len(args[0])))
    model.predict_forward(**case("vid20_5f_2seg").arguments)
    handle.remove()
    assert sum(counts) == 20


def test_an_image_gets_the_mask_of_the_prompted_decoder(model, picture):
    output = model.predict_forward(image=picture, text="Please segment the person.", return_mask_logits=True)
    assert {mask.shape for mask in output.prediction_masks} == {(1, picture.height, picture.width)}
    assert output.prediction_masks[0].any() and np.unique(output.mask_logits[0]).size > 100  # not cut out to +-10


def test_an_images_logits_are_resized_as_those_of_prompted_frames(model, picture):
    output = model.predict_forward(image=picture, text="Please segment the person.", return_mask_logits=True)
    processor, decoder = model.load_processor(), model.grounding_encoder
    kept = []
    handle = model.text_hidden_fcs.register_forward_hook(lambda module, args, output: kept.append(output))
    model.predict_forward(image=picture, text="Please segment the person.")
    handle.remove()
    with torch.no_grad():
        low_res = decoder.decode(decoder.encode(processor.grounding_pixel_values([picture])), kept[0]).logits
    direct = torch.nn.functional.interpolate(low_res, (picture.height, picture.width), mode="bilinear")
    np.testing.assert_allclose(np.concatenate(output.mask_logits), direct[:, 0], atol=1e-5)


def test_tracked_frames_of_an_absent_object_are_blank_and_key_frames_are_not(model, absent_object):
    output = model.predict_forward(**case("vid8_1seg").arguments, return_mask_logits=True)
    (masks,), (logits,) = output.prediction_masks, output.mask_logits
    tracked = [t for t in range(8) if t not in output.sample_idx]
    assert not masks[tracked].any() and (logits[tracked] == -1024).all()
    assert all(masks[t].any() for t in output.sample_idx)


def test_a_prompted_mask_is_not_blanked_either_by_its_own_decoder(model, monkeypatch):
    decoder = model.grounding_encoder
    head = decoder.sam2_model.sam_mask_decoder_modified.pred_obj_score_head.layers[-1]
    monkeypatch.setattr(head.bias, "data", head.bias.data - 1000)
    with torch.no_grad():
        found = decoder.decode(decoder.encode(torch.zeros(1, 3, 256, 256)), torch.randn(2, 64))
    assert (found.object_scores < 0).all() and (found.logits > -1024).any()


def test_frames_before_the_first_key_frame_are_tracked_backwards(model, clip):
    output = model.predict_forward(video=clip, text="Please segment the person.", frame_sampling=[4, 6])
    assert output.sample_idx == [4, 6] and output.prediction_masks[0].shape[0] == 8
    assert output.prediction_masks[0][:4].any(axis=(1, 2)).all()


def test_training_reaches_the_prompted_decoder_and_through_memory_the_plain_one(model):
    decoder = model.grounding_encoder
    frames = torch.randn(1, 6, 3, 256, 256)
    prompts = torch.randn(2, 64, requires_grad=True)
    predictions = decoder.segment_clips(frames, prompts, torch.zeros(2, dtype=torch.long), 5)
    sum(p.multimask_logits.clamp(-50, 50).mean() for p in predictions).backward()
    sam = decoder.sam2_model
    assert prompts.grad.abs().sum() > 0
    for part in (sam.sam_mask_decoder_modified, sam.sam_mask_decoder, sam.memory_encoder):
        assert sum(p.grad.abs().sum() for p in part.parameters() if p.grad is not None) > 0
    model.zero_grad()


def test_its_own_name_for_the_number_of_key_frames_is_understood(model, clip):
    call = {"video": clip, "text": "Please segment the person."}
    output = model.predict_forward(**call, sample_num_frames=3)
    (in_a_batch,) = model.predict_batch([call], sample_num_frames=3)
    assert output.sample_idx == in_a_batch.sample_idx == [0, 3, 7]
    with model.predict_stream(**call, sample_num_frames=3) as stream:
        assert next(stream).past_text == output.past_text


def test_the_pointer_of_a_key_frame_without_the_object_is_that_of_no_object(model):
    decoder = model.grounding_encoder
    with torch.no_grad():
        features = decoder.encode(torch.zeros(1, 3, 256, 256))
        found = decoder.decode(features, torch.randn(2, 64))
        empty = found._replace(logits=-found.logits.abs() - 1)
        pointers = decoder._to_track(features, empty).object_pointers
    assert torch.equal(pointers, decoder.sam2_model.no_obj_ptr.expand(2, -1))

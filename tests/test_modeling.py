"""What `Sa2VAChatModel` promises beside the official numbers: cost, sampling of frames, outputs, threads, losses."""

import copy
import gc
import json
import random
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from conftest import GOLDEN, Prescribed
from PIL import Image
from sam2.modeling.position_encoding import PositionEmbeddingRandom
from sam2.modeling.sam2_utils import LayerNorm2d
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    GenerationConfig,
    PreTrainedTokenizerFast,
    StaticCache,
    TextIteratorStreamer,
    pipeline,
)
from transformers.trainer_utils import align_special_tokens

from sa2va import Sa2VAChatModel, Sa2VAOutput, Sa2VAProcessor, modeling_sa2va
from sa2va.modeling_sa2va import _prompt_cache, _WrittenStates
from sa2va.processing_sa2va import rle_to_masks


@pytest.fixture
def encoded_frames(golden_model):
    """Counts frames that enter SAM 2's image encoder while the test runs."""
    counts = []
    encoder = golden_model.grounding_encoder.sam2_model.image_encoder
    handle = encoder.register_forward_hook(lambda module, args, output: counts.append(len(args[0])))
    yield counts
    handle.remove()


def answer_with(model, text: str) -> dict:
    """Generation arguments under which the answer is `text`."""
    ids = model.load_processor().tokenizer(text).input_ids
    return {"logits_processor": [Prescribed(ids)]}


THREE = "[SEG] and [SEG] and [SEG]<|im_end|>"


def iou(a, b) -> float:
    """IoU of two boolean arrays."""
    return (a & b).sum() / max((a | b).sum(), 1)


# ------------------------------------------------------------------------------------------------------------ cost


def test_each_frame_is_encoded_once_for_three_objects(golden_model, clip, encoded_frames):
    output = golden_model.predict_forward(video=clip, text="all", **answer_with(golden_model, THREE))
    assert len(output.prediction_masks) == 3
    assert encoded_frames == [1] * 8


def test_an_image_is_encoded_once_for_two_objects(golden_model, golden, encoded_frames):
    golden_model.predict_forward(**golden.case("img2seg").arguments)
    assert sum(encoded_frames) == 1


@pytest.fixture
def readings(golden_model):
    """Counts the tokens in each call of the language model while the test runs."""
    counts = []
    handle = golden_model.get_decoder().norm.register_forward_hook(lambda *args: counts.append(args[-1].shape[1]))
    yield counts
    handle.remove()


def test_seg_states_cost_no_call_of_their_own(golden_model, clip, readings):
    golden_model.predict_forward(video=clip, text="all", **answer_with(golden_model, THREE))
    (written,) = answer_with(golden_model, THREE)["logits_processor"]
    assert readings[1:] == [1] * (len(written.token_ids) - 1)


def test_seg_states_of_a_batch_cost_no_call_of_their_own(golden_model, golden, readings):
    names = ("imgD1seg", "img_noseg", "img2seg")
    outputs = golden_model.predict_batch([golden.case(name).arguments for name in names])
    assert [len(output.prediction_masks) for output in outputs] == [1, 0, 2]
    assert set(readings[1:]) == {1}


def test_an_answer_of_beams_is_read_again(golden_model, golden, monkeypatch):
    held, kept = [], _WrittenStates.of
    monkeypatch.setattr(_WrittenStates, "of", lambda self, answers: held.append(self._steps) or kept(self, answers))
    arguments = golden.case("img2seg").arguments | answer_with(golden_model, THREE) | {"return_mask_logits": True}
    expected = golden_model.predict_forward(**arguments).mask_logits
    found = golden_model.predict_forward(**arguments, num_beams=2).mask_logits
    assert held[0] and not held[1]
    for ours, others in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, others, atol=1e-3)


def test_an_offloaded_static_cache_is_not_read_on(golden_model):
    """Its layers lie on the CPU, whatever computes."""
    cache = StaticCache(golden_model.config.get_text_config(), max_cache_len=8)
    cache.early_initialization(1, 2, 16, torch.float32, torch.device("cpu"))
    assert _prompt_cache(cache, 1, 4) is not None
    cache.offloading = True
    assert _prompt_cache(cache, 1, 4) is None


def test_a_seg_that_ends_a_cut_answer_is_read_once_more(golden_model, golden, readings):
    arguments = golden.case("imgD1seg").arguments | answer_with(golden_model, THREE) | {"max_new_tokens": 1}
    output = golden_model.predict_forward(**arguments)
    assert len(output.prediction_masks) == 1 and readings[1:] == [1]


def test_an_answer_without_seg_encodes_nothing(golden_model, golden, encoded_frames):
    golden_model.predict_forward(**golden.case("img_noseg").arguments)
    assert encoded_frames == []


def test_objects_in_chunks_give_the_same_masks(golden_model, clip, monkeypatch):
    arguments = {"video": clip, "text": "all", "return_mask_logits": True, **answer_with(golden_model, THREE)}
    monkeypatch.setattr(golden_model.grounding_encoder.config, "memory_dtype", None)  # bf16 magnifies rounding
    together = golden_model.predict_forward(**arguments)
    monkeypatch.setattr(golden_model.grounding_encoder.config, "max_objects_per_batch", 2)
    chunked = golden_model.predict_forward(**arguments)
    np.testing.assert_allclose(chunked.mask_logits, together.mask_logits, atol=1e-3)


@pytest.mark.parametrize("output_format", ["numpy", "torch", "rle"])
@pytest.mark.parametrize("most", [1, 2 * 256**2], ids=["one by one", "two"])
def test_masks_of_few_objects_at_a_time_are_the_same(golden_model, clip, monkeypatch, most, output_format):
    """A large picture of many objects must not need all their logits at once."""
    arguments = {"video": clip[:6], "text": "all", "output_format": output_format, **answer_with(golden_model, THREE)}
    wanted = golden_model.predict_forward(**arguments, return_mask_logits=True)
    sizes, resize = [], Sa2VAProcessor.resize_logits

    def noted(self, logits, *args, **kwargs):
        sizes.append(len(logits))
        return resize(self, logits, *args, **kwargs)

    monkeypatch.setattr(Sa2VAProcessor, "resize_logits", noted)
    monkeypatch.setattr(modeling_sa2va, "_MOST_MASK_PIXELS", most)
    found = golden_model.predict_forward(**arguments, return_mask_logits=True)
    assert sizes == ([1, 1, 1] if most == 1 else [2, 1]) * 6
    streamed = [frame.masks for frame in golden_model.predict_stream(**arguments)]
    for i, masks in enumerate(wanted.prediction_masks):
        np.testing.assert_array_equal(found.mask_logits[i], wanted.mask_logits[i])
        np.testing.assert_array_equal(found.prediction_masks[i], masks)
        for t in range(6):
            np.testing.assert_array_equal(streamed[t][i], masks[t])


def test_three_objects_get_the_masks_each_gets_alone(golden_model, golden_processor, clip, monkeypatch):
    decoder = golden_model.grounding_encoder
    monkeypatch.setattr(decoder.config, "memory_dtype", None)  # bf16 magnifies rounding
    inputs = golden_processor.prepare(video=clip, text="x")
    frames = golden_processor.grounding_pixel_values(list(inputs.frames), is_video=True).split(1)
    prompts = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))

    def track(prompts):
        with torch.no_grad():
            state = decoder.condition(((i, frames[i]) for i in inputs.key_frames), prompts, inputs.size)
            return [prediction.logits for _, prediction in decoder.propagate(state, frames, torch.cat)]

    together = torch.stack(track(prompts))
    alone = torch.cat([torch.stack(track(prompts[i : i + 1])) for i in range(3)], dim=1)
    torch.testing.assert_close(together, alone, atol=1e-3, rtol=1e-3)


# ---------------------------------------------------------------------------------------------------- generation


def test_a_seg_cut_off_by_max_new_tokens_keeps_its_mask(golden_model, golden):
    case = golden.case("img1seg")
    seg_id = golden_model.special_token_ids().seg
    until_seg = case.arrays["gen_ids"].tolist().index(seg_id) + 1
    cut = golden_model.predict_forward(**case.arguments, max_new_tokens=until_seg, return_mask_logits=True)
    assert cut.prediction.endswith("[SEG]")
    np.testing.assert_allclose(cut.mask_logits[0], case.arrays["final_logits0"], atol=1e-3)


def test_a_seg_in_the_prompt_gives_no_mask(golden_model, picture):
    output = golden_model.predict_forward(image=picture, text="[SEG]?", **answer_with(golden_model, "No.<|im_end|>"))
    assert output.prediction_masks == []


def test_beam_search_gives_the_state_of_the_best_beam(golden_model, picture):
    arguments = {"image": picture, "text": "x", **answer_with(golden_model, "Sure, [SEG].<|im_end|>")}
    greedy = golden_model.predict_forward(**arguments, return_mask_logits=True)
    beams = golden_model.predict_forward(**arguments, num_beams=3, return_mask_logits=True)
    assert beams.prediction == greedy.prediction
    np.testing.assert_allclose(beams.mask_logits[0], greedy.mask_logits[0], atol=1e-3)


def test_words_looked_up_in_a_prompt_change_no_answer(picture):
    model = AutoModel.from_pretrained(GOLDEN / "qwen3vl")
    plain = model.predict_forward(picture, text="Segment it.", max_new_tokens=8)
    quick = model.predict_forward(picture, text="Segment it.", max_new_tokens=8, prompt_lookup_num_tokens=3)
    assert "[SEG]" in plain.prediction and quick.prediction == plain.prediction
    np.testing.assert_array_equal(quick.prediction_masks, plain.prediction_masks)


def test_no_cache_gives_the_same_masks(golden_model, golden):
    case = golden.case("imgD1seg")
    output = golden_model.predict_forward(**case.arguments, use_cache=False)
    assert output.prediction == case.meta["prediction"]
    assert iou(output.prediction_masks[0], case.mask(0)) >= 0.999


def test_sampling_arguments_reach_generate(golden_model, picture):
    texts = set()
    for seed in range(4):
        torch.manual_seed(seed)
        sampled = golden_model.predict_forward(
            image=picture, text="?", do_sample=True, temperature=50.0, top_k=0, max_new_tokens=4
        )
        texts.add(sampled.prediction)
    assert len(texts) > 1


def test_a_streamer_sees_the_answer(golden_model, golden_processor, golden):
    streamer = TextIteratorStreamer(golden_processor.tokenizer)
    output = golden_model.predict_forward(**golden.case("imgD1seg").arguments, streamer=streamer)
    assert "".join(streamer) == output.prediction


def test_generation_config_is_the_default_of_a_call(golden_model, golden, monkeypatch):
    monkeypatch.setattr(golden_model, "generation_config", GenerationConfig(max_new_tokens=2, do_sample=False))
    short = golden_model.predict_forward(**golden.case("imgD1seg").arguments)
    assert 0 < len(short.prediction) < len("It is [SEG]")
    longer = golden_model.predict_forward(**golden.case("imgD1seg").arguments, max_new_tokens=20)
    assert longer.prediction == "It is [SEG].<|im_end|>"


def test_a_partial_generation_config_is_filled_up(golden_model, golden):
    """On its own it would end answers after transformers' 20 tokens."""
    arguments = golden.case("imgD1seg").arguments
    script = answer_with(golden_model, "never said, " * 20)
    partial = golden_model.predict_forward(**arguments, generation_config=GenerationConfig(num_beams=1), **script)
    assert partial.prediction == golden_model.predict_forward(**arguments, **script).prediction
    assert len(golden_model.load_processor().tokenizer(partial.prediction).input_ids) > 30


def test_a_limit_of_none_is_none_that_was_given(golden_model):
    """As programs pass it on that leave it open; transformers would end answers after 20 tokens."""
    arguments = golden_model._generation_arguments(golden_model.load_processor(), {"max_new_tokens": None})
    assert arguments["generation_config"].max_new_tokens == golden_model.generation_config.max_new_tokens > 20


def test_what_the_generation_config_of_a_call_leaves_open_is_the_models(golden_model, monkeypatch):
    monkeypatch.setattr(golden_model, "generation_config", GenerationConfig(max_new_tokens=3, repetition_penalty=1.5))
    given = {"generation_config": GenerationConfig(num_beams=2, max_new_tokens=9)}
    config = golden_model._generation_arguments(golden_model.load_processor(), given)["generation_config"]
    assert (config.num_beams, config.max_new_tokens, config.repetition_penalty) == (2, 9, 1.5)


def test_the_models_settings_are_saved_and_obeyed(golden, tmp_path):
    model = AutoModel.from_pretrained(golden.folder, dtype=torch.float32).eval()
    model.generation_config.max_new_tokens = 2
    model.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path).eval()
    assert again.gen_config is again.generation_config and again.generation_config.max_new_tokens == 2
    again.set_processor(model.load_processor())
    short = [m.predict_forward(**golden.case("imgD1seg").arguments).prediction for m in (model, again)]
    assert short[0] == short[1] and 0 < len(short[0]) < len("It is [SEG]")
    inputs = model.load_processor()(text=["Hi"])
    assert model.generate(**inputs).shape[1] == 2


@pytest.mark.parametrize("origin", [{"transformers_version": "4.57.1"}, {"_from_model_config": True}])
def test_settings_that_came_with_the_released_code_are_not_read(golden, tmp_path, origin):
    """Their generate, which never saw the file, was greedy and stopped at 2048 tokens."""
    model = AutoModel.from_pretrained(golden.folder)
    model.save_pretrained(tmp_path)
    old = {"do_sample": True, "max_new_tokens": 3, "transformers_version": "5.24.0", **origin}
    (tmp_path / "generation_config.json").write_text(json.dumps(old))
    settings = AutoModel.from_pretrained(tmp_path).generation_config
    assert settings.max_new_tokens == 2048 and not settings.do_sample


def test_of_a_strangers_settings_only_sound_ones_are_taken(golden, tmp_path, heard):
    AutoModel.from_pretrained(golden.folder).save_pretrained(tmp_path)
    strange = {"max_new_tokens": 10**12, "num_beams": 10**9, "cache_implementation": "static", "max_cache_len": 10**10}
    strange |= {"eos_token_id": float("inf"), "prefill_chunk_size": -3, "stop_strings": ["a", 5], "temperature": 0.5}
    strange |= {"top_k": True, "do_sample": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(strange | {"transformers_version": "5.24.0"}))
    settings = AutoModel.from_pretrained(tmp_path).generation_config
    assert (settings.max_new_tokens, settings.num_beams, settings.temperature) == (2048, None, 0.5)
    assert settings.cache_implementation is settings.eos_token_id is settings.stop_strings is settings.top_k is None
    assert settings.do_sample is False
    assert any("num_beams=1000000000 is not used" in message for message in heard)


def test_settings_that_are_given_while_loading_are_all_taken(golden):
    given = GenerationConfig(stop_strings=["!"], max_new_tokens=3)
    settings = AutoModel.from_pretrained(golden.folder, generation_config=given).generation_config
    assert (settings.stop_strings, settings.max_new_tokens) == (["!"], 3)


@pytest.mark.parametrize("text", ['{"watermarking_config": "x"}', '{"__dict__": {}}', "[]"])
def test_a_generation_config_that_is_none_is_an_error(golden, tmp_path, text):
    AutoModel.from_pretrained(golden.folder).save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises((ValueError, OSError)):
        AutoModel.from_pretrained(tmp_path)


def test_settings_of_the_model_or_of_a_call_without_a_length_have_the_released_one(golden_model, monkeypatch):
    processor = golden_model.load_processor()
    monkeypatch.setattr(golden_model, "generation_config", GenerationConfig(num_beams=2))
    config = golden_model._generation_arguments(processor, {})["generation_config"]
    assert (config.num_beams, config.max_new_tokens, config.max_length) == (2, 2048, None)
    config = golden_model._generation_arguments(processor, {"max_length": 9})["generation_config"]
    assert (config.max_new_tokens, config.max_length) == (None, 9)


def test_what_trainer_writes_into_the_models_settings_leaves_the_templates_end_marks(golden_model, monkeypatch):
    monkeypatch.setattr(golden_model, "generation_config", copy.deepcopy(golden_model.generation_config))
    processor = golden_model.load_processor()
    before = golden_model._generation_arguments(processor, {})["generation_config"].eos_token_id
    align_special_tokens(golden_model, processor)
    assert golden_model.generation_config.eos_token_id is not None
    for given in ({}, {"generation_config": copy.deepcopy(golden_model.generation_config)}):
        assert golden_model._generation_arguments(processor, given)["generation_config"].eos_token_id == before
    chosen = golden_model._generation_arguments(processor, {"eos_token_id": 7})["generation_config"]
    assert chosen.eos_token_id == 7


def test_forward_gives_what_it_is_asked_for(golden_model, golden_processor, picture):
    inputs = golden_processor(picture, "Hi")
    whole = golden_model(**inputs, output_hidden_states=True)
    last = golden_model(**inputs, logits_to_keep=1)
    assert len(whole.hidden_states) == golden_model.config.llm_config.num_hidden_layers + 1
    torch.testing.assert_close(last.logits, whole.logits[:, -1:], atol=1e-3, rtol=1e-4)
    assert last.hidden_states is None


def test_preparing_for_generation_is_harmless(golden_model, golden_processor, monkeypatch):
    monkeypatch.setattr(golden_model, "generation_config", copy.deepcopy(golden_model.generation_config))
    golden_model.preparing_for_generation(tokenizer=golden_processor.tokenizer, torch_dtype=torch.float32)
    assert golden_model.gen_config.max_new_tokens == 2048 and not golden_model.gen_config.do_sample


def test_a_generation_config_of_a_call_with_a_length_has_no_other(golden_model):
    given = {"generation_config": GenerationConfig(max_length=9)}
    config = golden_model._generation_arguments(golden_model.load_processor(), given)["generation_config"]
    assert (config.max_new_tokens, config.max_length) == (None, 9)


def test_only_beams_set_room_aside_for_all_their_tokens(golden_model, golden_processor):
    golden_model._generation_arguments(golden_processor, {"max_new_tokens": 10**8})
    with pytest.raises(ValueError, match="room is set aside"):
        golden_model._generation_arguments(golden_processor, {"max_new_tokens": 10**8, "num_beams": 2})


def test_a_call_changes_neither_the_models_settings_nor_its_tokenizer(golden_model, golden_processor):
    settings, tokenizer = golden_model.generation_config.to_dict(), golden_model.load_processor().tokenizer
    golden_model.predict_forward(text="Hi", max_new_tokens=1, tokenizer=golden_processor.tokenizer)
    assert golden_processor.tokenizer is not tokenizer
    assert golden_model.generation_config.to_dict() == settings
    assert golden_model.load_processor().tokenizer is tokenizer


@pytest.mark.parametrize("end", ["the model's", "the tokenizer's", "the template's"])
def test_an_answer_ends_at_the_marks_of_model_tokenizer_and_template(golden_model, golden_processor, monkeypatch, end):
    processor, own = copy.deepcopy(golden_processor), copy.deepcopy(golden_model.generation_config)
    processor.template = "phi3_chat" if end == "the tokenizer's" else "qwen_chat"
    marks = {"the model's": "!", "the tokenizer's": processor.tokenizer.eos_token, "the template's": "<|endoftext|>"}
    (own.eos_token_id,) = processor.tokenizer("!").input_ids
    monkeypatch.setattr(golden_model, "generation_config", own)
    script = answer_with(golden_model, f"Yes{marks[end]} never said")
    assert golden_model.predict_forward(text="?", processor=processor, **script).prediction == f"Yes{marks[end]}"


def test_an_end_mark_of_several_tokens_stops_the_answer(golden_model, golden_processor, picture):
    processor = copy.deepcopy(golden_processor)
    processor.template = "phi3_chat"
    script = answer_with(golden_model, "Yes.<|end|>never said, never said, never said")
    output = golden_model.predict_forward(image=picture, text="?", processor=processor, **script)
    assert output.prediction == "Yes.<|end|>"


def test_stop_strings_of_a_call_are_added_to_such_an_end_mark(golden_model, golden_processor, picture):
    processor = copy.deepcopy(golden_processor)
    processor.template = "phi3_chat"
    script = answer_with(golden_model, "Yes.<|end|>never said, never said, never said")
    output = golden_model.predict_forward(image=picture, text="?", processor=processor, stop_strings="seY", **script)
    assert output.prediction == "Yes.<|end|>"  # none of the letters alone is a stop string


def test_generate_stops_where_predict_forward_does(golden_model, golden_processor, golden):
    case = golden.case("imgD1seg")
    inputs = golden_processor(case.arguments["image"], case.arguments["text"])
    (ids,) = golden_model.generate(**inputs)
    assert golden_processor.tokenizer.decode(ids) == case.meta["prediction"]
    assert golden_model.generate(**inputs, max_new_tokens=2, num_beams=2, num_return_sequences=2).shape == (2, 2)


def test_generate_calls_tokens_inputs_too_and_takes_stacked_tiles(golden_model, golden_processor, picture):
    inputs = golden_processor(picture, "Hi")
    written = golden_model.generate(**inputs, max_new_tokens=4)
    stacked = {"inputs": inputs.pop("input_ids"), "pixel_values": inputs["pixel_values"][None]}
    assert torch.equal(golden_model.generate(**{**inputs, **stacked}, max_new_tokens=4), written)


def test_end_marks_may_be_a_tensor(golden_model, golden_processor, picture):
    inputs = golden_processor(picture, "Hi")
    (first,) = golden_model.generate(**inputs, max_new_tokens=1)[0].tolist()
    settings = {"max_new_tokens": 9, "eos_token_id": torch.tensor([first])}
    assert golden_model.generate(**inputs, **settings).tolist() == [[first]]
    output = golden_model.predict_forward(image=picture, text="Hi", **settings)
    assert output.prediction == golden_processor.tokenizer.decode([first])


def test_an_offloaded_cache_needs_a_place_to_be_away_from(golden_model, picture, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs an accelerator"):
        golden_model.predict_forward(image=picture, text="Hi", cache_implementation="offloaded")


def test_temperature_zero_counts_only_while_sampling(golden_model, picture):
    call = {"image": picture, "text": "Hi", "max_new_tokens": 2}
    assert golden_model.predict_forward(**call, temperature=0).prediction == (
        golden_model.predict_forward(**call).prediction
    )


def test_a_processor_that_was_set_can_be_taken_back(golden):
    model = AutoModel.from_pretrained(golden.folder)
    own = model.load_processor()
    model.set_processor(other := copy.deepcopy(own))
    assert model.load_processor() is other
    model.set_processor(None)
    assert model.load_processor().to_dict() == own.to_dict() and model.load_processor() is not other


@pytest.mark.parametrize("name", ["tokenizer", "processor"])
@pytest.mark.parametrize("give", ["processor", "its tokenizer"])
def test_tokenizer_and_processor_may_be_passed_as_either(golden_model, golden_processor, golden, name, give):
    case = golden.case("imgD1seg")
    given = golden_processor if give == "processor" else golden_processor.tokenizer
    assert golden_model.predict_forward(**case.arguments, **{name: given}).prediction == case.meta["prediction"]


def test_a_processor_goes_before_a_tokenizer(golden_model, golden_processor):
    processor = copy.deepcopy(golden_processor)
    processor.template = "phi3_chat"
    call = {"text": "Hi", "max_new_tokens": 1, "tokenizer": golden_processor.tokenizer}
    assert golden_model.predict_forward(**call, processor=processor).past_text.startswith("<|user|>")


def test_regions_lie_on_the_last_tile_unless_told_otherwise(golden_model, golden_processor, golden):
    given = golden.case("img_vp").arguments
    batch = golden_processor(given["image"], given["text"], mask_prompts=given["mask_prompts"])
    told = golden_model(**batch, logits_to_keep=1).logits
    assert set(batch.pop("prompt_mask_tiles").tolist()) == {len(batch["pixel_values"]) - 1}
    assert torch.equal(golden_model(**batch, logits_to_keep=1).logits, told)


def test_a_tokenizer_of_a_call_does_where_the_checkpoints_own_is_damaged(golden, golden_processor, tmp_path, heard):
    shutil.copytree(golden.folder, tmp_path, ignore=shutil.ignore_patterns("golden*"), dirs_exist_ok=True)
    (tmp_path / "tokenizer.json").write_text("{")
    model = AutoModel.from_pretrained(tmp_path)
    for _ in range(2):
        output = model.predict_forward(text="Hi", max_new_tokens=1, tokenizer=golden_processor.tokenizer)
        assert output.past_text.startswith("<|im_start|>user\nHi")
    assert sum("so config.json's settings hold" in message for message in heard) == 1


def test_the_highest_token_that_a_model_knows_is_the_last_of_its_vocabulary(golden_model):
    known, special = golden_model.config.llm_config.vocab_size, golden_model.special_token_ids()
    golden_model._check_vocabulary(torch.tensor([[known - 1]]), special)
    with pytest.raises(ValueError, match=f"gives token {known}"):
        golden_model._check_vocabulary(torch.tensor([[known]]), special)


def test_a_length_must_leave_room_behind_the_prompt(golden_model, golden_processor):
    inputs = golden_processor(text="Hi")
    length = inputs["input_ids"].shape[1]
    assert golden_model.generate(**inputs, max_length=length + 1).shape == (1, 1)
    with pytest.raises(ValueError, match="counts the prompt"):
        golden_model.generate(**inputs, max_length=length)


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_a_tokenizer_that_lacks_seg_is_of_another_model(family):
    foreign = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"?": 0}, unk_token="?")), unk_token="?")
    with pytest.raises(ValueError, match=r"lacks .*\[SEG\]"):
        AutoModel.from_pretrained(GOLDEN / family).special_token_ids(foreign)


def test_regions_in_the_text_without_their_masks_are_refused(golden_model, golden):
    inputs = golden_model.load_processor().prepare(**golden.case("img_vp").arguments)
    with pytest.raises(ValueError, match="placeholders"):
        golden_model.generate(inputs.input_ids, pixel_values=inputs.pixel_values)


# ------------------------------------------------------------------------------------------------------ multi-turn


def test_past_text_continues_the_conversation(golden_model, golden):
    first = golden_model.predict_forward(**golden.case("img1seg").arguments)
    second = golden.case("img_multiturn")
    arguments = second.arguments | {"past_text": first.past_text}
    assert golden_model.predict_forward(**arguments).prediction == second.meta["prediction"]


def test_a_truncated_answer_is_closed_in_past_text(golden_model, picture):
    output = golden_model.predict_forward(image=picture, text="?", max_new_tokens=1)
    assert output.past_text.endswith("<|im_end|>\n")


def test_text_alone_gives_no_masks_even_with_seg(golden_model):
    output = golden_model.predict_forward(text="Hello", **answer_with(golden_model, "[SEG]<|im_end|>"))
    assert output["prediction_masks"] == [] and output["phrases"] == []


# ---------------------------------------------------------------------------------------------------------- video


@pytest.mark.parametrize("length", [1, 3, 8])
def test_every_frame_of_a_short_video_gets_a_mask(golden_model, clip, length):
    output = golden_model.predict_forward(video=clip[:length], text="x", **answer_with(golden_model, "[SEG]<|im_end|>"))
    assert output.prediction_masks[0].shape == (length, 87, 121)


@pytest.mark.parametrize("sampling", ["first", "uniform", [3, 5], [7]])
def test_any_key_frames_give_a_mask_in_every_frame(golden_model, clip, encoded_frames, sampling):
    script = answer_with(golden_model, "[SEG]<|im_end|>")
    output = golden_model.predict_forward(video=clip, text="x", frame_sampling=sampling, num_frames=3, **script)
    assert output.prediction_masks[0].shape == (8, 87, 121)
    assert encoded_frames == [1] * 8


def test_frames_before_the_first_key_frame_are_tracked_as_if_the_video_ran_backwards(golden_model, clip):
    script = answer_with(golden_model, "[SEG]<|im_end|>")
    forwards = golden_model.predict_forward(
        video=clip[:4], text="x", frame_sampling=[3], return_mask_logits=True, **script
    )
    backwards = golden_model.predict_forward(
        video=clip[3::-1], text="x", frame_sampling=[0], return_mask_logits=True, **script
    )
    np.testing.assert_allclose(forwards.mask_logits[0], backwards.mask_logits[0][::-1], atol=1e-3)


def test_masks_are_not_blanked_by_a_score_that_says_the_object_is_absent(golden_model, clip, monkeypatch):
    head = golden_model.grounding_encoder.sam2_model.sam_mask_decoder.pred_obj_score_head.layers[-1]
    monkeypatch.setattr(head.bias, "data", head.bias.data - 1000)
    script = answer_with(golden_model, "[SEG]<|im_end|>") | {"num_frames": 1, "return_mask_logits": True}
    output = golden_model.predict_forward(video=clip[:3], text="x", **script)
    assert (output.mask_scores[0]["object"] < 0.5).all() and (output.mask_logits[0] > -1024).any(axis=(1, 2)).all()


def test_frames_behind_a_key_frame_do_not_look_at_those_tracked_backwards_from_it(golden_model, clip):
    script = answer_with(golden_model, "[SEG]<|im_end|>") | {"return_mask_logits": True}
    whole = golden_model.predict_forward(video=clip, text="x", frame_sampling=[3], **script)
    rest = golden_model.predict_forward(video=clip[3:], text="x", frame_sampling=[0], **script)
    np.testing.assert_allclose(whole.mask_logits[0][3:], rest.mask_logits[0], atol=1e-3)


def test_a_one_shot_iterator_gives_the_masks_of_the_list(golden_model, golden, clip):
    case = golden.case("vid8_1seg")
    output = golden_model.predict_forward(video=iter(clip), text=case.arguments["text"])
    assert iou(output.prediction_masks[0], case.mask(0)) >= 0.999


def test_stream_gives_the_masks_of_predict_forward(golden_model, golden):
    case = golden.case("vid8_1seg")
    frames = list(golden_model.predict_stream(**case.arguments))
    assert [frame.frame_index for frame in frames] == list(range(8))
    assert frames[0].prediction == case.meta["prediction"]
    assert iou(np.stack([frame.masks[0] for frame in frames]), case.mask(0)) >= 0.999


def test_a_stream_without_objects_still_brings_the_answer(golden_model, clip):
    frames = list(golden_model.predict_stream(video=clip[:2], text="?", **answer_with(golden_model, "No.<|im_end|>")))
    assert [frame.masks.shape for frame in frames] == [(0, 87, 121)] * 2
    assert frames[0].prediction == "No.<|im_end|>"


def live_tensor_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in gc.get_objects() if _is_tensor(t)}
    return sum(storages.values())


def _is_tensor(thing) -> bool:
    return issubclass(type(thing), torch.Tensor) and thing.layout == torch.strided and not thing.is_meta


@pytest.mark.slow
def test_streaming_memory_is_flat_in_the_length_of_the_video(golden_model):
    generator = np.random.default_rng(0)
    frames = (Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)) for _ in range(125))
    script = answer_with(golden_model, "[SEG] [SEG]<|im_end|>")
    alive = {}
    for frame in golden_model.predict_stream(video=frames, text="x", **script):
        if frame.frame_index in (30, 120):
            alive[frame.frame_index] = live_tensor_bytes()
    assert alive[120] == alive[30]


# --------------------------------------------------------------------------------------------------------- outputs


def test_output_is_a_dict_and_has_attributes(golden_model, golden):
    output = golden_model.predict_forward(**golden.case("imgD1seg").arguments)
    assert isinstance(output, Sa2VAOutput) and output["prediction"] == output.prediction
    assert output.phrases == ["It is"] and output.mask_logits is None
    scores = output.mask_scores[0]
    assert scores["iou"].shape == scores["object"].shape == (1,)
    assert 0 <= scores["iou"][0] <= 1 and 0 <= scores["object"][0] <= 1


def test_raw_masks_are_probabilities_that_the_threshold_cuts(golden_model, golden):
    arguments = golden.case("img1seg").arguments
    raw = golden_model.predict_forward(**arguments, return_raw_masks=True).prediction_masks[0]
    assert raw.dtype == np.float32 and raw.min() >= 0 and raw.max() <= 1
    strict = golden_model.predict_forward(**arguments, mask_threshold=0.9).prediction_masks[0]
    np.testing.assert_array_equal(strict, raw > 0.9)


def test_rle_and_torch_formats_hold_the_same_masks(golden_model, golden):
    case = golden.case("vid3_1seg")
    options = {"mask_threshold": 0.9, "return_mask_logits": True}
    rle = golden_model.predict_forward(**case.arguments, **options, output_format="rle")
    tensor = golden_model.predict_forward(**case.arguments, **options, output_format="torch")
    assert tensor.prediction_masks[0].dtype == torch.bool
    np.testing.assert_array_equal(rle_to_masks(rle.prediction_masks[0]), tensor.prediction_masks[0].numpy())
    assert isinstance(rle.mask_logits[0], np.ndarray)  # which run-length encoding can't hold
    np.testing.assert_array_equal(rle.mask_logits[0], tensor.mask_logits[0].numpy())


def test_mixed_frame_sizes_share_the_first_frames_size_or_keep_their_own(golden_model, clip):
    frames = [clip[0], clip[1].resize((50, 40))]
    script = answer_with(golden_model, "[SEG]<|im_end|>")
    shared = golden_model.predict_forward(video=frames, text="x", **script)
    own = golden_model.predict_forward(video=frames, text="x", mask_sizes="own", **script)
    assert shared.prediction_masks[0].shape == (2, 87, 121)
    assert [mask.shape for mask in own.prediction_masks[0]] == [(87, 121), (40, 50)]


def test_a_pipeline_answers_messages(golden_model, golden_processor, picture):
    script = answer_with(golden_model, "Yes.<|im_end|>")
    pipe = pipeline("image-text-to-text", model=golden_model, processor=golden_processor, device="cpu")
    parts = [{"type": "image", "image": picture}, {"type": "text", "text": "A square?"}]
    (said,) = pipe([{"role": "user", "content": parts}], return_full_text=False, generate_kwargs=script)
    assert said["generated_text"] == "Yes."


def test_a_pipeline_for_anything_answers_about_a_picture(golden_model, golden_processor, picture):
    script = answer_with(golden_model, "Yes.<|im_end|>")
    pipe = pipeline("any-to-any", model=golden_model, processor=golden_processor, device="cpu")
    (said,) = pipe(images=[picture], text=["A square?"], return_full_text=False, generate_kwargs=script)
    assert said["generated_text"] == "Yes."


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_a_pipeline_answers_a_batch_as_it_does_one_by_one(family):
    model = AutoModel.from_pretrained(GOLDEN / family)
    pictures = [Image.new("RGB", size, "red") for size in ((60, 40), (130, 30), (40, 40))]  # of unlike numbers of tiles
    words = ["A square?", "What is in this picture, and where?", "Hm"]
    talks = [
        [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": text}]}]
        for picture, text in zip(pictures, words, strict=True)
    ]
    pipe = pipeline("image-text-to-text", model=model, processor=model.load_processor(), device="cpu")
    alone = [pipe(talk, max_new_tokens=6, return_full_text=False) for talk in talks]
    assert pipe(talks, batch_size=3, max_new_tokens=6, return_full_text=False) == alone


# ------------------------------------------------------------------------------------------- loading and sharing


@pytest.mark.parametrize(
    "auto_class", [AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM]
)
def test_all_auto_classes_load_a_released_folder(golden, auto_class):
    assert isinstance(auto_class.from_pretrained(golden.folder), Sa2VAChatModel)


def test_arguments_that_users_of_the_released_code_pass_are_accepted(golden):
    model = AutoModel.from_pretrained(
        golden.folder, torch_dtype=torch.bfloat16, use_flash_attn=True, low_cpu_mem_usage=True, load_in_8bit=False
    )
    assert model.dtype == torch.bfloat16
    assert model.config.llm_config.num_hidden_layers == 2


def attention_of(model) -> list[str]:
    """What runs in the language model and in what sees."""
    seeing = model.config.vision_config if model.config.is_qwen_vl else model.vision_model.config
    return [model.get_decoder().layers[0].self_attn.config._attn_implementation, seeing._attn_implementation]


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
@pytest.mark.parametrize("name", ["llm_config", "text_config"])
def test_attention_of_the_language_model_goes_by_either_name(family, name, heard):
    words = {name: "eager"}
    model = AutoModel.from_pretrained(GOLDEN / family, attn_implementation=words)
    assert attention_of(model) == ["eager", "sdpa"]
    assert attention_of(AutoModel.from_config(model.config, attn_implementation={name: "sdpa"})) == ["sdpa", "sdpa"]
    model.set_attn_implementation("sdpa")
    assert attention_of(model) == ["sdpa", "sdpa"]
    model.set_attn_implementation(words)
    assert attention_of(model) == ["eager", "sdpa"]
    model.set_attn_implementation("eager")
    assert attention_of(model) == ["eager", "eager"]
    with pytest.raises(ValueError, match="magic"):
        model.set_attn_implementation("magic")
    assert not [message for message in heard if "undefined behavior" in message]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_runs_image_and_video(golden, golden_processor, picture, clip, dtype, attention):
    model = AutoModel.from_pretrained(golden.folder, dtype=dtype, attn_implementation=attention)
    script = {"logits_processor": [Prescribed(golden_processor.tokenizer("[SEG]<|im_end|>").input_ids)]}
    still = model.predict_forward(image=picture, text="x", **script)
    moving = model.predict_forward(video=clip[:7], text="x", **script)
    assert still.prediction_masks[0].shape == (1, 61, 97) and moving.prediction_masks[0].shape == (7, 87, 121)


def test_a_model_cast_after_loading_still_runs(golden_model, golden, picture):
    cast = copy.deepcopy(golden_model).to(torch.bfloat16)
    script = answer_with(golden_model, "[SEG]<|im_end|>")
    assert cast.predict_forward(image=picture, text="x", **script).prediction_masks[0].shape == (1, 61, 97)


def test_sixteen_threads_that_share_a_model_get_the_serial_results(golden_model, golden):
    names = ["imgD1seg", "vid3_1seg", "text_only", "vid1_1seg"] * 4

    def call(name):
        return golden_model.predict_forward(**golden.case(name).arguments, return_mask_logits=True)

    serial = {name: call(name) for name in set(names)}
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(call, names))
    for name, result in zip(names, results, strict=True):
        assert result.prediction == serial[name].prediction
        for got, wanted in zip(result.mask_logits, serial[name].mask_logits, strict=True):
            np.testing.assert_allclose(got, wanted, atol=1e-3)


def test_threads_share_a_model_that_was_cast_after_loading(golden_model):
    cast = copy.deepcopy(golden_model.grounding_encoder).to(torch.bfloat16)
    like = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    with ThreadPoolExecutor(4) as pool:
        positions = list(pool.map(cast._dense_position, [like] * 2000))
    assert all(torch.equal(position, positions[0]) for position in positions)


def test_norms_of_maps_take_values_whose_squares_float16_can_not_hold(golden_model):
    norms = [m for m in golden_model.grounding_encoder.sam2_model.modules() if isinstance(m, LayerNorm2d)]
    assert len(norms) > 3
    for norm in norms:
        far = 1000 * torch.randn(1, len(norm.weight), 2, 2)
        found = copy.deepcopy(norm).half()(far.half())
        assert found.dtype == torch.float16
        torch.testing.assert_close(found.float(), norm(far), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_places_are_encoded_in_float32_whatever_the_dtype_of_the_model(golden_model, dtype):
    layer = copy.deepcopy(golden_model.grounding_encoder.sam2_model.sam_prompt_encoder.pe_layer).to(dtype)
    plain = PositionEmbeddingRandom(layer.positional_encoding_gaussian_matrix.shape[1])
    plain.positional_encoding_gaussian_matrix = layer.positional_encoding_gaussian_matrix.float()
    with torch.autocast("cpu", torch.bfloat16):
        found = layer((5, 7))
    assert torch.equal(found, plain((5, 7)))


def random_states() -> tuple:
    """What draws the next random numbers of PyTorch, NumPy and Python."""
    return torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()


def test_calls_leave_mode_dtype_and_random_state_alone(golden_model, golden):
    state = random_states()
    dtypes = [p.dtype for p in golden_model.parameters()]
    image, video = (golden.case(name).arguments for name in ("imgD1seg", "vid3_1seg"))
    golden_model.predict_forward(**image)
    list(golden_model.predict_stream(**video))
    golden_model.predict_batch([image, video])
    assert random_states() == state
    assert [p.dtype for p in golden_model.parameters()] == dtypes
    assert not any(module.training for module in golden_model.modules())


def test_a_model_that_trains_goes_on_training_after_a_call(golden_model, golden):
    golden_model.train()
    try:
        golden_model.predict_forward(**golden.case("imgD1seg").arguments)
        assert all(module.training for module in golden_model.modules())
    finally:
        golden_model.eval()


@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_generate_passes_over_labels_and_forward_takes_masks_of_four_axes(family, picture):
    model = AutoModel.from_pretrained(GOLDEN / family)
    batch = dict(model.load_processor()(images=[picture], text=["Hi"]))
    expected = model.generate(**batch, max_new_tokens=2)
    for_losses = {"labels": batch["input_ids"], "grounding_pixel_values": [None], "mask_labels": [None]}
    assert torch.equal(model.generate(**batch, **for_losses, max_new_tokens=2), expected)
    if family == "ivl_qwen2":
        length = batch["input_ids"].shape[1]
        causal = torch.full((1, 1, length, length), -torch.inf).triu(1)
        logits = model(**batch).logits
        torch.testing.assert_close(model(**{**batch, "attention_mask": causal}).logits, logits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_videos_are_tracked_under_autocast(golden_model, clip, dtype):
    with torch.autocast("cpu", dtype=dtype):
        out = golden_model.predict_forward(video=clip[:7], text="x", **answer_with(golden_model, "[SEG]<|im_end|>"))
    assert out.prediction_masks[0].shape == (7, 87, 121)


@pytest.mark.parametrize("part", ["language_model", "vision_model", "mlp1", "text_hidden_fcs", "grounding_encoder"])
def test_parts_may_differ_in_dtype(golden_model, picture, part):
    mixed = copy.deepcopy(golden_model)
    getattr(mixed, part).to(torch.bfloat16)
    out = mixed.predict_forward(image=picture, text="x", **answer_with(golden_model, "[SEG]<|im_end|>"))
    assert out.prediction_masks[0].shape == (1, 61, 97)


def test_an_answer_that_holds_a_picture_token_can_be_gone_on_with(golden_model, picture):
    script = answer_with(golden_model, "So <IMG_CONTEXT> it is<|im_end|>")
    first = golden_model.predict_forward(image=picture, text="x", **script)
    assert "<IMG_CONTEXT>" in first.prediction
    assert golden_model.predict_forward(image=picture, text="y", past_text=first.past_text, max_new_tokens=1)


def test_an_empty_list_of_stop_strings_stops_nothing(golden_model, picture):
    plain = golden_model.predict_forward(image=picture, text="x", max_new_tokens=3)
    assert (
        golden_model.predict_forward(image=picture, text="x", max_new_tokens=3, stop_strings=[]).prediction
        == plain.prediction
    )

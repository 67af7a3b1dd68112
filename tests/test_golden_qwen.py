"""The official recordings of the Qwen2.5-VL and Qwen3-VL families, and what differs there from the InternVL family.

Two recordings show input that the official code drops or doubles, where ours does not follow: `past_text` beside a
picture (recorded as if it were empty), and `[SEG]` in the question (recorded with a mask of its own, before the
answer's).
"""

import copy
import inspect
import json

import numpy as np
import pytest
import torch
import transformers
from conftest import GOLDEN, RESIZES_AS_RECORDED, GoldenFamily
from packaging.version import Version
from PIL import Image
from transformers import AutoModel

from sa2va import Sa2VAChatModel, Sa2VAChatModelQwen, Sa2VAProcessor, Sa2VAProcessorQwen
from sa2va.modeling_sa2va import _WrittenStates
from sa2va.processing_sa2va import _qwen_size

FAMILIES = ("qwen25vl", "qwen3vl")
CASES = [(family, name) for family in FAMILIES for name in GoldenFamily(family).cases]
# A memory feature that lies between two bfloat16 values may be rounded the other way: up to 7e-3 on tracked frames.
TOLERANCE, TRACKED_TOLERANCE, RELATIVE = 2e-4, 3e-3, 2e-4
ONE_LEVEL = 0.015  # in normalised units
PICTURES_IN_PARTS = Version(transformers.__version__) >= Version("5.23")


@pytest.fixture(scope="module")
def models():
    return {name: AutoModel.from_pretrained(GOLDEN / name, dtype=torch.float32).eval() for name in FAMILIES}


def arguments_of(case):
    past = {"past_text": case.meta["past_text"]} if case.name == "text_past" else {}
    return {**case.arguments, **past}


@pytest.fixture(scope="module")
def runs(models):
    """Every case, run once: (case, prepared inputs, output, `[SEG]` states)."""
    results = {}
    for family, name in CASES:
        case, model, states = GoldenFamily(family).case(name), models[family], []
        handle = model.text_hidden_fcs.register_forward_hook(
            lambda module, args, output, states=states: states.append(args[0])
        )
        output = model.predict_forward(**arguments_of(case), return_mask_logits=True)
        handle.remove()
        results[family, name] = (case, model.load_processor().prepare(**arguments_of(case)), output, states[0])
    return results


@pytest.mark.parametrize("key", CASES, ids="-".join)
def test_input_ids_and_text_are_equal(runs, key):
    case, inputs, output, _ = runs[key]
    np.testing.assert_array_equal(inputs.input_ids[0].numpy(), case.arrays["input_ids"])
    assert output.prediction == case.meta["prediction"]


@pytest.mark.parametrize("key", [key for key in CASES if not key[1].startswith("text")], ids="-".join)
def test_pixel_values_are_equal(runs, key):
    case, inputs, _, _ = runs[key]
    atol = 1e-6 if RESIZES_AS_RECORDED else ONE_LEVEL
    np.testing.assert_allclose(inputs.pixel_values[::97, ::49], case.arrays["mm_pixel_values_sub"], atol=atol)
    np.testing.assert_array_equal(inputs.image_grid_thw, case.arrays["mm_image_grid_thw"])


@pytest.mark.parametrize("key", [key for key in CASES if key[1].split("_")[-1].endswith("seg")], ids="-".join)
def test_seg_states_logits_and_masks_are_close(runs, key):
    case, _, output, states = runs[key]
    if key[1] == "img2seg" and not RESIZES_AS_RECORDED:
        pytest.skip("the picture is not read as it was recorded")
    answered = len(states)
    if not answered:
        assert case.meta["n_masks"] == 0
        return
    first = case.meta["n_masks"] - answered  # a [SEG] of the question, recorded before the answer's
    recorded = case.arrays["seg_hidden"][first:]
    np.testing.assert_allclose(states, recorded, atol=TOLERANCE, rtol=RELATIVE)
    for i, (mask, logits) in enumerate(zip(output.prediction_masks, output.mask_logits, strict=True), start=first):
        wanted = case.mask(i)
        assert mask.dtype == np.bool_ and mask.shape == wanted.shape
        assert (mask & wanted).sum() / (mask | wanted).sum() >= 0.999
        if f"final_logits{i}" in case.arrays:
            np.testing.assert_allclose(logits, case.arrays[f"final_logits{i}"], atol=TRACKED_TOLERANCE, rtol=RELATIVE)


def test_a_seg_in_the_question_gives_no_mask(runs):
    _, _, output, _ = runs["qwen25vl", "img_segprompt"]
    assert len(output.prediction_masks) == output.prediction.count("[SEG]") == 1


@pytest.mark.parametrize("family", FAMILIES)
def test_a_second_turn_shows_the_picture_once(models, picture, family):
    model = models[family]
    first = model.predict_forward(image=picture, text="Please segment the red square.")
    processor = model.load_processor()
    second = processor.prepare(picture, None, "And now the car?", past_text=first.past_text)
    assert second.prompt.startswith(first.past_text) and second.prompt.count("<|vision_start|>") == 1
    assert second.prompt.endswith("<|im_end|>\n<|im_start|>user\nAnd now the car?<|im_end|>\n<|im_start|>assistant\n")
    assert model.predict_forward(image=picture, text="And now?", past_text=first.past_text).prediction


@pytest.mark.parametrize("family", FAMILIES)
def test_every_image_tag_is_dropped(models, picture, family):
    processor = models[family].load_processor()
    plain = processor.prepare(picture, text=" Where is the car?")
    assert processor.prepare(picture, text="<image> Where is <image>the car?").prompt == plain.prompt


def test_a_template_that_writes_the_last_answer_in_another_way_continues_a_conversation(models):
    """Qwen's templates for models that think put an empty thought before an answer that nothing follows."""
    own = models["qwen3vl"].load_processor()
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}"
        "{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}"
        "{% if m.content is string %}{{ m.content }}{% else %}{{ m.content[-1].text }}{% endif %}{{ '<|im_end|>\\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    processor = Sa2VAProcessorQwen(own.image_processor, own.tokenizer, chat_template=template)
    first = processor.build_prompt("Hi.") + "Hello.<|im_end|>\n"
    turn = "<|im_start|>user\nWho?<|im_end|>\n<|im_start|>assistant\n"
    assert processor.build_prompt("Who?", past_text=first) == first + turn


@pytest.mark.parametrize("family", FAMILIES)
def test_states_without_the_prompts_cache_are_the_same(models, runs, family):
    """What is read on the prompt's keys and values equals one pass over everything, rotary positions included."""
    model, (_, inputs, output, states) = models[family], runs[family, "vid3_1seg"]
    tokenizer = model.load_processor().tokenizer
    new_ids = tokenizer(output.prediction, return_tensors="pt").input_ids[0]
    ids = model.special_token_ids()
    with torch.no_grad():
        (again,) = model._seg_states(model._prompt(ids, [inputs]), [new_ids], ids.seg, None)
    torch.testing.assert_close(again, states, atol=TOLERANCE, rtol=RELATIVE)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_cache_nothing_is_kept_and_the_answer_is_read_again(models, picture, monkeypatch, family):
    held, kept = [], _WrittenStates.of
    monkeypatch.setattr(_WrittenStates, "of", lambda self, answers: held.append(self._steps) or kept(self, answers))
    arguments = {"image": picture, "text": "Please segment the red square.", "return_mask_logits": True}
    expected, found = (models[family].predict_forward(**arguments, use_cache=use) for use in (True, False))
    assert held[0] and held[1] is None
    np.testing.assert_allclose(found.mask_logits[0], expected.mask_logits[0], atol=1e-3)


@pytest.mark.skipif(not PICTURES_IN_PARTS, reason="transformers' generate loses pictures and positions")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("last", [1, 5])
def test_a_prompt_read_in_parts_gives_the_same_masks(models, picture, family, last):
    """However many tokens the last part has: one looks like a token of the answer."""
    arguments = {"image": picture, "text": "Please segment the red square."}
    length = models[family].load_processor().prepare(**arguments).input_ids.shape[1]
    arguments["return_mask_logits"] = True
    whole = models[family].predict_forward(**arguments)
    parts = models[family].predict_forward(**arguments, prefill_chunk_size=length - last)
    assert parts.prediction == whole.prediction and "[SEG]" in whole.prediction
    np.testing.assert_allclose(parts.mask_logits[0], whole.mask_logits[0], atol=1e-3)


@pytest.mark.skipif(PICTURES_IN_PARTS, reason="transformers' generate reads them well")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_in_parts_is_refused_where_pictures_would_be_lost(models, picture, family):
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        models[family].predict_forward(image=picture, text="Please segment the red square.", prefill_chunk_size=8)


@pytest.mark.parametrize("family", FAMILIES)
def test_forward_names_what_a_trainer_must_keep(models, family):
    """It drops the columns of a data set that the signature does not name."""
    model = models[family]
    names = set(model.load_processor().model_input_names)
    assert names <= inspect.signature(model.forward).parameters.keys()


def test_mask_prompts_name_the_families_that_know_regions(models, picture):
    with pytest.raises(ValueError, match="InternVL family"):
        models["qwen3vl"].predict_forward(image=picture, text="What is region1?", mask_prompts=np.ones((1, 61, 97)))


def test_regions_are_refused_in_training_too(models, picture):
    inputs = models["qwen3vl"].load_processor()(picture, "Hi")
    with pytest.raises(ValueError, match="only the InternVL family knows regions"):
        models["qwen3vl"](**inputs, prompt_masks=torch.ones(1, 16, 16, dtype=torch.bool))


@pytest.mark.parametrize("family", FAMILIES)
def test_words_alone_are_read_as_they_are_continued(models, family):
    inputs = models[family].load_processor()(text="Hi")
    (written,) = models[family].generate(**inputs, max_new_tokens=1)
    assert models[family](**inputs).logits[0, -1].argmax() == written[-1]


def test_pictures_are_read_at_the_recorded_sizes():
    for name, size in json.loads((GOLDEN / "qwen_image_sizes.json").read_text()).items():
        if isinstance(size, dict):
            width, height = map(int, name.split("_")[1].split("x"))
            assert list(_qwen_size(width, height)) == size["fetch"]


@pytest.mark.parametrize(
    ("size", "read"),
    [
        ((5000, 5000), (3556, 3556)),
        ((3613, 3613), (3584, 3584)),
        ((4832, 2718), (4760, 2660)),
        ((2000, 10), (1988, 28)),
        ((3590, 3584), (3584, 3584)),  # not beyond once its sides are rounded
        ((60, 56), (56, 56)),
    ],
)
def test_pictures_beyond_the_limits_are_read_as_qwen_vl_utils_rounds(size, read):
    """Worked out by its formula: the square root of area / limit divides, and the quotient is rounded down."""
    assert _qwen_size(*size) == read


@pytest.mark.parametrize("size", [(6000, 30), (30, 6000), (5990, 30)])
def test_pictures_that_rounding_makes_too_long_are_told_with_their_own_size(size):
    with pytest.raises(ValueError, match=f"{size[0]}x{size[1]}.*at most 200 to 1"):
        _qwen_size(*size)


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_gives_the_released_layout_and_loads_again(models, runs, tmp_path, family):
    from safetensors.torch import load_file

    models[family].save_pretrained(tmp_path)
    models[family].load_processor().save_pretrained(tmp_path)
    saved, released = (load_file(folder / "model.safetensors") for folder in (tmp_path, GOLDEN / family))
    assert saved.keys() == released.keys()
    assert all(torch.equal(saved[name], released[name]) for name in released)
    config = json.loads((tmp_path / "config.json").read_text())
    assert (
        config["architectures"] == ["Sa2VAChatModelQwen"] and "mrope_section" in config["text_config"]["rope_scaling"]
    )
    case, _, output, _ = runs[family, "img1seg"]
    again = Sa2VAChatModel.from_pretrained(tmp_path)
    assert isinstance(again, Sa2VAChatModelQwen)
    assert np.array_equal(again.predict_forward(**case.arguments).prediction_masks, output.prediction_masks)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_losses_reach_the_language_model(models, family):
    model = Sa2VAChatModel.from_pretrained(GOLDEN / family)
    processor = model.load_processor()
    inputs = processor.prepare(Image.new("RGB", (97, 61)), None, "Segment it.")
    answer = processor.tokenizer("Sure, [SEG].<|im_end|>", return_tensors="pt").input_ids
    input_ids = torch.cat([inputs.input_ids, answer], dim=1)
    labels = torch.cat([torch.full_like(inputs.input_ids, -100), answer], dim=1)
    output = model(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        labels=labels,
        pixel_values=inputs.pixel_values,
        image_grid_thw=inputs.image_grid_thw,
        grounding_pixel_values=[processor.grounding_pixel_values(list(inputs.frames))],
        mask_labels=[torch.ones(1, 61, 97)],
    )
    output.loss.backward()
    assert output.mask_loss > 0 and model.get_decoder().layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
def test_messages_are_written_as_calls_are(models, family):
    processor, picture = models[family].load_processor(), np.zeros((56, 84, 3), np.uint8)
    asked = [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": "Hi"}]}]
    asked += [{"role": "assistant", "content": "Ho."}, {"role": "user", "content": "Why?"}]
    past_text = processor.prepare(picture, text="Hi").prompt + "Ho.<|im_end|>\n"
    alone = processor.prepare(picture, text="Why?", past_text=past_text)
    found = processor.apply_chat_template(asked, tokenize=True, return_dict=True)
    assert torch.equal(found["input_ids"], alone.input_ids)
    assert torch.equal(found["pixel_values"], alone.pixel_values)


@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
def test_image_features_are_those_of_transformers(models, family):
    model = models[family]
    inputs = model.load_processor()(np.zeros((56, 84, 3), np.uint8), "Hi")
    with torch.no_grad():
        found, wanted = (
            m.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]) for m in (model, model.model)
        )
    assert torch.equal(found.last_hidden_state, wanted.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_processor_of_a_config_is_of_its_family(models, family):
    own = models[family].load_processor()
    made = Sa2VAProcessor.from_config(models[family].config, own.tokenizer, own.image_processor, own.chat_template)
    assert type(made) is Sa2VAProcessorQwen and made.to_dict() == own.to_dict()


def test_what_a_call_gives_is_named(models, picture):
    processor = models["qwen3vl"].load_processor()
    assert set(processor(picture, "Hi")) == set(processor.model_input_names)


@pytest.mark.parametrize("limits", [(0, 10), (10, 9), (1, 10**9)])
def test_areas_that_no_picture_can_have_are_refused(models, limits):
    own = models["qwen3vl"].load_processor()
    with pytest.raises(ValueError, match="need 1 <= min <= max"):
        Sa2VAProcessorQwen(own.image_processor, own.tokenizer, min_pixels=limits[0], max_pixels=limits[1])


def test_a_processor_needs_a_chat_template(models):
    own = copy.deepcopy(models["qwen3vl"].load_processor())
    own.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        Sa2VAProcessorQwen(own.image_processor, own.tokenizer)


def test_arguments_of_a_processor_count_in_a_template_too(models):
    processor, clip = models["qwen3vl"].load_processor(), np.zeros((4, 56, 84, 3), np.uint8)
    asked = [{"role": "user", "content": [{"type": "video", "video": clip}, {"type": "text", "text": "Hi"}]}]
    wanted = processor.prepare(video=clip, text="Hi", num_frames=2)
    chosen = {"processor_kwargs": {"num_frames": 2}}
    assert processor.apply_chat_template(asked, **chosen) == wanted.prompt
    assert torch.equal(processor.apply_chat_template(asked, tokenize=True, **chosen), wanted.input_ids)


@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
def test_a_processor_saved_on_its_own_is_of_its_family(models, family, tmp_path):
    own = models[family].load_processor()
    own.save_pretrained(tmp_path)
    loaded = Sa2VAProcessor.from_pretrained(tmp_path)
    assert type(loaded) is Sa2VAProcessorQwen and loaded.to_dict() == own.to_dict()


@pytest.mark.parametrize("call", ["generate", "forward"])
@pytest.mark.parametrize("family", ["qwen25vl", "qwen3vl"])
def test_a_picture_without_its_pixels_is_refused(models, family, call):
    model = models[family]
    inputs = model.load_processor()(np.zeros((56, 84, 3), np.uint8), "Hi")
    with pytest.raises(ValueError, match="no pixel_values"):
        getattr(model, call)(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])

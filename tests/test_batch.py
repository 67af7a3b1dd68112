"""`predict_batch`: what samples get together is what each gets alone."""

import pytest
import torch
from conftest import GOLDEN, RESIZES_AS_RECORDED, GoldenFamily
from transformers import AutoModel, GenerationConfig, TextStreamer

from sa2va.modeling_sa2va import _without_padding, _WrittenStates
from sa2va.sam2_decoder import in_batches

FAMILIES = ("ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl")
LONG = ("vid20", "vid8")  # clips are tracked one by one anyway


def cases_of(family):
    """The recorded calls of a family but the long ones, in an order that mixes pictures, clips and words."""
    recorded = GoldenFamily(family)
    return [recorded.case(name) for name in recorded.cases if not name.startswith(LONG)]


def arguments_of(case):
    past = {"past_text": case.meta["past_text"]} if case.name == "text_past" else {}
    return {**case.arguments, **past}


@pytest.fixture(scope="module")
def loaded(golden_model):
    """Loads the checkpoint of a family, once."""
    models = {"ivl_qwen2": golden_model}

    def load(family):
        if family not in models:
            models[family] = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()
        return models[family]

    return load


def iou(a, b):
    return (a & b).sum() / max((a | b).sum(), 1)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_all_recorded_calls_of_a_family_in_one_batch_give_the_recorded_text_and_masks(loaded, family):
    model, cases = loaded(family), cases_of(family)
    calls = []
    hook = model.causal_model.register_forward_pre_hook(lambda *_: calls.append(1))
    outputs = model.predict_batch([arguments_of(case) for case in cases], batch_size=len(cases))
    hook.remove()
    assert len({model.load_processor().prepare(**arguments_of(case)).input_ids.shape for case in cases}) > 2
    assert len(calls) <= max(len(case.arrays["gen_ids"]) for case in cases if "gen_ids" in case.arrays) + 1
    for case, output in zip(cases, outputs, strict=True):
        assert output.prediction == case.meta["prediction"], case.name
        recorded = [case.mask(i) for i in range(case.meta["n_masks"])]
        recorded = recorded[len(recorded) - len(output.prediction_masks) :]  # a [SEG] of the question gives none
        assert len(output.prediction_masks) == output.prediction.count("[SEG]") * bool(output.sample_idx)
        if family.startswith("qwen") and case.name == "img2seg" and not RESIZES_AS_RECORDED:
            recorded = model.predict_forward(**arguments_of(case)).prediction_masks
        for mask, wanted in zip(output.prediction_masks, recorded, strict=True):
            assert mask.shape == wanted.shape and iou(mask, wanted) >= 0.999, case.name


@pytest.mark.parametrize("family", FAMILIES)
def test_generate_continues_a_batch_of_the_processor_as_predict_forward_does_each(loaded, family):
    model, cases = loaded(family), {case.name: case for case in cases_of(family)}
    processor = model.load_processor()
    names = [name for name in cases if "past" not in name and "multiturn" not in name]
    given = [cases[name].arguments for name in names]
    regions = [one.get("mask_prompts") for one in given]
    batch = processor(
        images=[one.get("image") for one in given],
        text=[one["text"] for one in given],
        videos=[one.get("video") for one in given],
        mask_prompts=regions if any(region is not None for region in regions) else None,
    )
    written = model.generate(**batch)
    begin = batch["input_ids"].shape[1] if family.startswith("qwen") else 0  # those sequences begin with the prompt
    for name, ids in zip(names, written[:, begin:], strict=True):
        written_ids = ids[: int((ids != processor.pad_token_id).nonzero()[-1]) + 1]
        assert processor.tokenizer.decode(written_ids).strip() == cases[name].meta["prediction"], name


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "qwen25vl", "qwen3vl"])
def test_texts_may_be_padded_behind(loaded, family, picture, heard):
    model, processor = loaded(family), loaded(family).load_processor()
    given = {"images": [None, picture, None], "text": ["Hi", "What is this?", "Tell me a story about a red star."]}
    batch = processor(**given)
    behind = processor(**given, padding_side="right")
    assert not behind["attention_mask"][:, -1].all()
    written = model.generate(**batch, max_new_tokens=8)
    assert torch.equal(model.generate(**behind, max_new_tokens=8), written)
    assert not [message for message in heard if "padding" in message]


# Words alone are enough to see whether rows disturb each other: an untrained model writes something else at once.
QUESTIONS = ["Hi", "What can you do, and why would anyone want it?", "Tell me a story about a red star. " * 3]
SETTINGS = {
    "greedy": {},
    "beams": {"num_beams": 3},
    "stop strings": {"stop_strings": ["e", "o"]},
    "looks at the prompt": {"repetition_penalty": 1.7},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_states_seen_while_writing_are_those_of_reading_the_answers_again(loaded, family, monkeypatch):
    model, seen = loaded(family), []
    cases = [case for case in cases_of(family) if "[SEG]" in case.meta["prediction"]]
    cases.sort(key=lambda case: "video" in case.arguments)  # pictures are quicker
    samples = [arguments_of(case) for case in cases[:3]]
    hook = model.text_hidden_fcs.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.predict_batch(samples)
    monkeypatch.setattr(_WrittenStates, "of", lambda self, answers: None)
    model.predict_batch(samples)
    hook.remove()
    assert len(samples) > 1 and len(seen[0]) == sum(case.meta["prediction"].count("[SEG]") for case in cases[:3])
    torch.testing.assert_close(*seen, atol=1e-3, rtol=1e-3)


def words_of(outputs):
    return [(output.prediction, output.past_text) for output in outputs]


def one_by_one(model, **options):
    return [model.predict_forward(text=question, **options) for question in QUESTIONS]


def together(model, **options):
    return model.predict_batch([{"text": question} for question in QUESTIONS], **options)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("family", ["ivl_qwen2", "qwen3vl"])
def test_settings_of_generate_mean_the_same_for_every_row(loaded, family, name):
    model, options = loaded(family), {"max_new_tokens": 10, **SETTINGS[name]}
    assert words_of(together(model, **options)) == words_of(one_by_one(model, **options))


def test_settings_of_the_language_model_itself_keep_questions_apart_too(golden_model, monkeypatch):
    monkeypatch.setattr(golden_model.causal_model.generation_config, "repetition_penalty", 1.7)
    arguments = golden_model._generation_arguments(golden_model.load_processor(), {})
    assert golden_model._groups([10, 20], arguments) == [[0], [1]]


def test_a_streamer_hears_one_answer_after_the_other(golden_model, golden_processor, capsys):
    streamer = TextStreamer(golden_processor.tokenizer, skip_prompt=False)
    outputs = together(golden_model, max_new_tokens=4, streamer=streamer)
    assert capsys.readouterr().out.split("\n")[:-1] == [output.prediction for output in outputs]


def test_nothing_at_the_end_of_a_single_answer_is_padding():
    """A tokenizer without padding has a word's token in its place, with which a cut answer may end."""
    written = torch.tensor([[5, 0, 0]])
    (answer,) = _without_padding(written, GenerationConfig(eos_token_id=7, pad_token_id=0))
    assert torch.equal(answer, written[0])


@pytest.mark.parametrize("family", ["ivl_qwen2", "ivl_internlm2", "qwen3vl"])
def test_an_answer_that_a_stop_string_ends_is_not_padded_with_an_end_mark(loaded, family):
    model = loaded(family)
    options = {
        "max_new_tokens": 10,
        "stop_strings": ["e", "o"],
        "pad_token_id": model.load_processor().tokenizer.eos_token_id,
    }
    assert words_of(together(model, **options)) == words_of(one_by_one(model, **options))


@pytest.fixture
def outgrown(loaded, monkeypatch):
    """InternLM2 whose rotary base grows from the second question on."""
    model = loaded("ivl_internlm2")
    config = model.language_model.model.rotary_emb.config
    monkeypatch.setattr(config, "max_position_embeddings", 40)
    monkeypatch.setattr(config, "rope_parameters", {**config.rope_parameters, "rope_type": "dynamic", "factor": 3.0})
    monkeypatch.setattr(model.language_model.model.rotary_emb, "rope_type", "dynamic")
    assert model.config.get_text_config() is config
    return model


def test_a_long_text_does_not_change_the_answers_beside_it(outgrown):
    assert words_of(together(outgrown, max_new_tokens=10)) == words_of(one_by_one(outgrown, max_new_tokens=10))


def test_without_that_care_it_would(outgrown, monkeypatch):
    monkeypatch.setattr(type(outgrown), "_fixed_rope_length", lambda self: None)
    assert words_of(together(outgrown, max_new_tokens=10)) != words_of(one_by_one(outgrown, max_new_tokens=10))


def test_texts_that_cross_the_switch_of_long_rope_stay_alone(golden_model, monkeypatch):
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 4096}
    monkeypatch.setattr(golden_model.config.get_text_config(), "rope_parameters", rope)
    arguments = golden_model._generation_arguments(golden_model.load_processor(), {"max_new_tokens": 96})
    assert golden_model._groups([10, 4001, 4000, 9000, 20], arguments) == [[0, 2, 4], [1], [3]]


def test_out_of_memory_halves_the_batch_and_says_so(monkeypatch):
    said, sizes = [], []
    monkeypatch.setattr("sa2va.sam2_decoder.logger.warning_once", said.append)

    def work(batch):
        sizes.append(len(batch))
        if len(batch) > 2:
            torch.empty(2**50)  # a petabyte
        return list(batch)

    assert list(in_batches(work, iter(range(9)), 8, "samples")) == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    assert said == [f"Out of memory with {n} samples at once. Going on with {n // 2}." for n in (8, 4)]


@pytest.mark.parametrize("part", ["language model", "image encoder"])
def test_a_batch_out_of_memory_gives_the_same_answers(golden_model, golden, monkeypatch, part):
    """Images whose words or frames don't fit together, and a clip whose frames don't."""
    sam2 = golden_model.grounding_encoder.sam2_model
    module = golden_model.causal_model if part == "language model" else sam2.image_encoder
    sizes = []

    def small(module, args, kwargs):
        given = [*args, *kwargs.values()]
        sizes.append(max(len(x) for x in given if isinstance(x, torch.Tensor)))
        if sizes[-1] > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    samples = [golden.case(name).arguments for name in ("img1seg", "imgD1seg", "vid8_1seg")]
    alone = [golden_model.predict_forward(**sample) for sample in samples]
    hook = module.register_forward_pre_hook(small, with_kwargs=True)
    try:
        together = golden_model.predict_batch(samples, encode_batch_size=4)
    finally:
        hook.remove()
    assert max(sizes) > 1
    for one, other in zip(together, alone, strict=True):
        assert one.prediction == other.prediction
        assert all(iou(*pair) > 0.999 for pair in zip(one.prediction_masks, other.prediction_masks, strict=True))


def test_a_batch_that_was_not_full_is_halved_too():
    sizes = []

    def work(batch):
        sizes.append(len(batch))
        return torch.empty(2**50 if len(batch) > 1 else 1)

    assert len(list(in_batches(work, iter(range(3)), 8, "samples"))) == 3
    assert sizes == [3, 1, 1, 1]


def test_out_of_memory_with_one_sample_is_an_error():
    with pytest.raises(RuntimeError, match="allocate"):
        list(in_batches(lambda batch: torch.empty(2**50), iter(range(4)), 4, "samples"))


def test_other_errors_are_not_taken_for_it():
    with pytest.raises(RuntimeError, match="shape"):
        list(in_batches(lambda batch: torch.zeros(2).view(3), iter(range(4)), 4, "samples"))


BAD_SAMPLES = {
    "no dictionary": (["Hi"], TypeError, r"samples\[0\] can't hold str"),
    "unknown word": ([{"text": "Hi", "img": 3}], TypeError, r"samples\[0\] can't hold \['img'\]"),
    "bad sample": ([{"text": "Hi"}, {"text": ""}], ValueError, r"samples\[1\]: text='' says nothing"),
    "missing file": ([{"image": "none.png", "text": "Hi"}], FileNotFoundError, r"samples\[0\]: There is no image"),
}


@pytest.mark.parametrize("name", BAD_SAMPLES)
def test_a_bad_sample_is_named(golden_model, name):
    samples, error, words = BAD_SAMPLES[name]
    with pytest.raises(error, match=words):
        golden_model.predict_batch(samples)


def test_sizes_below_one_are_refused(golden_model):
    with pytest.raises(ValueError, match="batch_size=0"):
        golden_model.predict_batch([], batch_size=0)
    with pytest.raises(ValueError, match="encode_batch_size=0"):
        golden_model.predict_batch([], encode_batch_size=0)


def test_no_samples_give_no_outputs(golden_model):
    assert golden_model.predict_batch([]) == []


@pytest.mark.parametrize(("encode_batch_size", "encodes"), [(None, [1, 1, 1]), (2, [2, 1]), (8, [3])])
def test_images_are_encoded_as_many_at_a_time_as_wanted(golden_model, golden, monkeypatch, encode_batch_size, encodes):
    seen = []
    encode = golden_model.grounding_encoder.encode
    monkeypatch.setattr(golden_model.grounding_encoder, "encode", lambda x: seen.append(len(x)) or encode(x))
    outputs = golden_model.predict_batch([golden.case("imgD1seg").arguments] * 3, encode_batch_size=encode_batch_size)
    assert seen == encodes
    assert all(len(output.prediction_masks) == 1 for output in outputs)

"""`compile_parts`: the same answers from compiled parts, in whole graphs, and no trace in what is saved."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModel

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"
IMAGE = {"image": ROOT / "demo/samples/shapes.png", "text": "Please segment the red star in this image."}
QUESTION = {"image": ROOT / "demo/samples/shapes.png", "text": "How many shapes are there?"}
CLIP = {"video": ROOT / "demo/samples/shapes.mp4", "text": "Please segment the square in this video."}
QUESTIONS = (IMAGE, CLIP, QUESTION)
FAST = {"fullgraph": True, "backend": "eager"}  # the graphs of any backend; a graph break is an error


def answer(model, question: dict):
    return model.predict_forward(**question, max_new_tokens=16, return_mask_logits=True)


def same(a, b) -> bool:
    """Whether two outputs agree: text exactly, logits to a thousandth (memory in bfloat16 spreads what is rounded)."""
    masks = zip(a.mask_logits, b.mask_logits, strict=True)
    return a.prediction == b.prediction and all(abs(x - y).mean() < 1e-3 * abs(y).mean() for x, y in masks)


def load() -> torch.nn.Module:
    return AutoModel.from_pretrained(ROOT / "sa2va-tiny", dtype=torch.float32).eval()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


@pytest.fixture(scope="module")
def expected() -> list:
    """What the plain model answers about an image, a clip, and in words."""
    model = load()
    return [answer(model, question) for question in QUESTIONS]


@pytest.fixture(scope="module")
def compiled():
    """A model whose parts are compiled and were used on shapes of two kinds."""
    torch._dynamo.reset()
    model = load()
    model.compile_parts(**FAST)
    counters.clear()  # of the graph that shows whether anything can be compiled
    for question in QUESTIONS:
        answer(model, question)
    return model


def test_compiled_parts_answer_and_mask_as_plain_ones_do(compiled, expected):
    assert [len(output.mask_logits) for output in expected] == [1, 1, 0]
    for question, want in zip(QUESTIONS, expected, strict=True):
        assert same(answer(compiled, question), want)


def test_each_part_is_one_graph_and_after_two_shapes_none_is_added(compiled):
    assert not counters["graph_break"]
    assert 2 <= graphs() <= 4  # of each part that of its first shape and that of any
    with torch.no_grad():
        compiled.grounding_encoder.encode(torch.zeros(2, 3, 128, 128))
        before = graphs()
        compiled.grounding_encoder.encode(torch.zeros(3, 3, 128, 128))
    answer(compiled, {**IMAGE, "text": "Please, be so kind and segment the red star in this image."})
    assert graphs() == before <= 5


def test_batches_are_answered_as_single_questions_are(compiled, expected):
    outputs = compiled.predict_batch([IMAGE, QUESTION, IMAGE], max_new_tokens=16, return_mask_logits=True)
    assert all(same(out, want) for out, want in zip(outputs, (expected[0], expected[2], expected[0]), strict=True))


def test_generate_uses_the_compiled_step_too(compiled, expected):
    inputs = compiled.load_processor().prepare(**{name: IMAGE[name] for name in ("image", "text")})
    given = {"input_ids": inputs.input_ids, "pixel_values": inputs.pixel_values, "max_new_tokens": 4}
    before = compiled.generate(**given, cache_implementation="dynamic")
    assert compiled.generate(**given).tolist() == before.tolist()


def test_a_cache_that_found_no_room_is_not_asked_for_again(compiled, expected, monkeypatch):
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(compiled.language_model), "_sample", no_room)
        with pytest.raises(torch.OutOfMemoryError):
            compiled.predict_forward(**IMAGE, max_new_tokens=2000)
    assert compiled.language_model._previous_max_cache_length < 2000
    assert same(answer(compiled, IMAGE), expected[0])


def test_threads_share_compiled_parts(compiled, expected):
    with ThreadPoolExecutor(3) as pool:
        outputs = list(pool.map(lambda question: answer(compiled, question), [IMAGE, QUESTION, IMAGE]))
    assert all(same(out, want) for out, want in zip(outputs, (expected[0], expected[2], expected[0]), strict=True))


def test_weights_keep_their_names_and_files_load(compiled, expected, tmp_path):
    assert compiled.state_dict().keys() == load().state_dict().keys()
    compiled.save_pretrained(tmp_path)
    again = AutoModel.from_pretrained(tmp_path, dtype=torch.float32).eval()
    again.set_processor(compiled.load_processor())
    assert again.language_model.generation_config.cache_implementation is None
    assert same(answer(again, IMAGE), expected[0])


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_answers_with_its_own_weights(duplicate, compiled, expected):
    other = duplicate(compiled)
    other.language_model.lm_head.weight.data.zero_()  # all words are equally likely
    assert answer(other, QUESTION).prediction != expected[2].prediction
    assert same(answer(compiled, QUESTION), expected[2])


def test_what_is_compiled_can_be_taken_back(expected):
    model = load()
    encoder, settings = model.grounding_encoder.sam2_model.image_encoder, model.language_model.generation_config
    plain = settings.to_dict()
    for _ in range(2):
        model.compile_parts(**FAST)
        assert encoder._compiled_call_impl is not None and settings.cache_implementation == "static"
    model.compile_parts(image_encoder=False, decode_step=False)
    assert encoder._compiled_call_impl is None
    assert settings.to_dict() == plain
    before = graphs()
    assert same(answer(model, IMAGE), expected[0])
    assert graphs() == before


@pytest.mark.parametrize("family", ["ivl_internlm2", "qwen25vl", "qwen3vl"])
def test_decode_steps_of_every_language_model_are_whole_graphs(family, picture):
    model = AutoModel.from_pretrained(GOLDEN / family, dtype=torch.float32).eval()
    question = {"image": picture, "text": "Please segment it."}
    want = answer(model, question)
    torch._dynamo.reset()
    model.compile_parts(image_encoder=False, **FAST)
    counters.clear()
    assert same(answer(model, question), want)
    assert graphs() and not counters["graph_break"]


def test_a_missing_compiler_is_told_at_once():
    with torch._inductor.config.patch({"cpp.cxx": ("no-such-compiler",), "force_disable_caches": True}):
        torch._dynamo.reset()
        with pytest.raises(OSError, match="C\\+\\+ compiler"):
            load().compile_parts()


def test_wrong_options_are_told():
    model = load()
    with pytest.raises(TypeError, match="fullgraph"):
        model.compile_parts(full_graph=True)
    with pytest.raises(ValueError, match="no-such-backend"):
        model.compile_parts(backend="no-such-backend")
    with pytest.raises(ValueError, match="no-such-mode"):
        model.compile_parts(mode="no-such-mode")
    with pytest.raises(ValueError, match="no-such-option"):
        model.compile_parts(options={"no-such-option": 1})
    with pytest.raises(ValueError, match="mode or options"):
        model.compile_parts(mode="default", options={"max_autotune": False})


@pytest.mark.parametrize(
    "option", [{"dynamic": "x"}, {"fullgraph": "x"}, {"backend": None}, {"mode": 5}, {"options": 5}], ids=str
)
def test_options_of_other_types_are_told(option):
    with pytest.raises(TypeError, match=f"{next(iter(option))}="):
        load().compile_parts(**option)


def test_offloaded_parts_are_refused(tmp_path):
    from accelerate import cpu_offload

    model = load()
    cpu_offload(model.language_model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="offloaded"):
        model.compile_parts(**FAST)
    model.compile_parts(decode_step=False, **FAST)


@pytest.mark.slow
def test_inductor_answers_the_same(expected):
    torch._dynamo.reset()
    model = load()
    model.compile_parts(fullgraph=True)
    assert same(answer(model, IMAGE), expected[0])

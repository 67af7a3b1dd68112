"""`predict_batch`: what samples get together is what each gets alone."""

import pytest
import torch
from conftest import GOLDEN, GoldenFamily
from transformers import AutoModel

FAMILIES = ("ivl_qwen2", "ivl_internlm2", "sa2vai_qwen2", "qwen25vl", "qwen3vl")
LONG = ("vid20", "vid8_3seg")  # what is tracked one by one anyway


def cases_of(family):
    """The recorded calls of a family but the long ones, in an order that mixes pictures, clips and words."""
    recorded = GoldenFamily(family)
    return [recorded.case(name) for name in recorded.cases if not name.startswith(LONG)]


def arguments_of(case):
    past = {"past_text": case.meta["past_text"]} if case.name == "text_past" else {}
    return {**case.arguments, **past}


@pytest.fixture(scope="module")
def loaded(golden_model):
    """Loads a family's checkpoint, the last one only."""
    models = {"ivl_qwen2": golden_model}

    def load(family):
        if family not in models:
            models.clear()
            models["ivl_qwen2"] = golden_model
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
        for mask, wanted in zip(output.prediction_masks, recorded, strict=True):
            assert mask.shape == wanted.shape and iou(mask, wanted) >= 0.999, case.name

"""Measures of benchmarks against sums done by hand, rules of the official code, and an independent implementation."""

import math

import numpy as np
import pytest

from sa2va.evaluation import captions, metrics
from sa2va.evaluation.metrics import Overlaps, PhraseMasks

SIDE = 64


def box(top, left, height, width):
    mask = np.zeros((SIDE, SIDE), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def blobs(seed, frames=3):
    """Two clips of blobs, from sparse to dense, sometimes empty or full; bool [2, frames, SIDE, SIDE]."""
    rng = np.random.default_rng(seed)
    density = rng.choice([0.0, 0.2, 0.5, 0.8, 1.0], size=(2, frames, 1, 1))
    return (rng.random((2, frames, 8, 8)) < density).repeat(SIDE // 8, axis=-2).repeat(SIDE // 8, axis=-1)


SEEDS = range(8)

# ---------- properties of all measures of two masks


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("measure", [metrics.region_similarity, lambda a, b: metrics.video_quality(a, b).f])
def test_j_and_f_are_symmetric_bounded_and_one_for_the_truth(measure, seed):
    one, other = blobs(seed)
    assert measure(one, other) == pytest.approx(measure(other, one))
    assert 0 <= measure(one, other) <= 1
    assert measure(one, one) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_images_scores_are_symmetric_bounded_and_one_for_the_truth(seed):
    one, other = blobs(seed, frames=6)
    there, back, same = (metrics.intersection_union(*pair) for pair in ((one, other), (other, one), (one, one)))
    for score in (metrics.cumulative_iou, metrics.mean_iou):
        assert score(*there) == score(*back)
        assert 0 <= score(*there) <= 1
        assert score(*same) == 1


@pytest.mark.parametrize("seed", SEEDS)
def test_robustness_is_bounded_and_one_for_the_truth(seed):
    one, other = blobs(seed)
    assert 0 <= metrics.robustness(one, other, one | other) <= 1
    assert metrics.robustness(other, other, other) == 1


# ---------- J and F by another implementation


@pytest.mark.parametrize("seed", SEEDS)
def test_j_and_f_equal_those_of_vos_benchmark(seed):
    evaluator = pytest.importorskip("vos_benchmark.evaluator").Evaluator()
    predicted, target = blobs(seed)
    target[0, 20:40, 20:40] = True  # vos-benchmark scores only what is in the truth at all, and from then on
    for found, wanted in zip(predicted, target, strict=True):
        evaluator.feed_frame(found.astype(np.uint8), wanted.astype(np.uint8))
    (j,), (f,) = (scores.values() for scores in evaluator.conclude())
    quality = metrics.video_quality(predicted, target)
    assert (100 * quality.j, 100 * quality.f) == pytest.approx((j, f), abs=1e-9)


# ---------- gRefCOCO


def test_generalized_scores_are_the_sums_done_by_hand():
    # a hit, a half hit, a target not found, nothing rightly found nowhere, something found where nothing is
    scores = metrics.generalized_scores(
        intersections=[90, 50, 0, 0, 0],
        unions=[100, 100, 40, 0, 10],
        found=[True, True, False, False, True],
        wanted=[True, True, True, False, False],
    )
    assert scores == pytest.approx(
        {
            "giou": (0.9 + 0.5 + 0 + 1 + 0) / 5,
            "ciou": 140 / 250,
            "n_acc": 1 / 2,
            "t_acc": 2 / 3,
            "pr@0.5": 2 / 3,
            "pr@0.6": 1 / 3,
            "pr@0.7": 1 / 3,
            "pr@0.8": 1 / 3,
            "pr@0.9": 1 / 3,
        }
    )


def test_accuracies_of_what_is_not_asked_have_no_value():
    scores = metrics.generalized_scores([1], [1], [True], [True])
    assert math.isnan(scores["n_acc"]) and scores["t_acc"] == 1


# ---------- robustness


def test_robustness_weighs_what_is_wrong_against_all_objects():
    target, other = box(0, 0, 10, 10), box(0, 20, 10, 30)
    found = target | box(0, 20, 10, 10)  # a third of the other object, 100 of 400 pixels of objects
    assert metrics.robustness(found[None], target[None], (target | other)[None]) == pytest.approx(0.75)


def test_robustness_of_frames_without_objects():
    nothing = np.zeros((2, SIDE, SIDE), dtype=bool)
    half_wrong = np.stack([nothing[0], box(0, 0, 1, 1)])
    assert metrics.robustness(half_wrong, nothing, nothing) == 0.5


# ---------- Ref-DAVIS17


def test_masks_of_a_label_map_are_disjoint_and_the_first_wins():
    masks = np.stack([box(0, 0, 10, 10), box(0, 5, 10, 10), box(0, 0, 10, 20)])
    first, second, third = metrics.disjoint(masks)
    assert (first == masks[0]).all()
    assert (second == box(0, 10, 10, 5)).all()
    assert (third == box(0, 15, 10, 5)).all()


def test_objects_are_scored_by_the_best_matching():
    truth = np.stack([box(0, 0, 10, 10), box(40, 40, 10, 10)])[:, None]
    assert metrics.matched_quality(truth[::-1], truth) == [(1, 1), (1, 1)]
    assert metrics.matched_quality(truth[1:], truth) == [(0, 0), (1, 1)]  # one is missing


# ---------- grounded captions


def image(ious, phrases, target_phrases, scores=None):
    ious = np.array(ious, dtype=float).reshape(len(phrases), len(target_phrases))
    return Overlaps(ious, np.ones(len(phrases)) if scores is None else np.array(scores), phrases, target_phrases)


PHRASES = ["a dog", "a cat", "a hat"]


def exact(one, other):
    return float(one == other)


@pytest.mark.parametrize("mode", captions.MODES)
def test_the_truth_gets_full_marks(mode):
    masks = PhraseMasks(np.stack([box(0, 0, 9, 9), box(20, 20, 9, 9), box(40, 40, 9, 9)]), PHRASES)
    scores = captions.grounding_scores([Overlaps.of(masks, masks)], mode, exact)
    assert set(scores.values()) == {1.0}


def test_only_strict_miou_counts_what_was_missed_and_what_is_surplus():
    missed = image([[0.8, 0, 0]], PHRASES[:1], PHRASES)
    surplus = image([[0.8], [0], [0]], PHRASES, PHRASES[:1])
    strict, glamm = (captions.grounding_scores([missed, surplus], mode)["miou"] for mode in captions.MODES)
    assert strict == pytest.approx(0.8 / 3)
    assert glamm == pytest.approx(0.8)


def test_strict_miou_takes_the_best_assignment_and_glamm_the_best_pair_first():
    tied = image([[0.9, 0.8], [0.7, 0.0]], PHRASES[:2], PHRASES[:2])
    strict, glamm = (captions.grounding_scores([tied], mode)["miou"] for mode in captions.MODES)
    assert strict == pytest.approx((0.8 + 0.7) / 2)
    assert glamm == pytest.approx(0.9)  # which leaves a pair that does not overlap, and that is not counted


def test_glamm_recall_stops_at_the_first_bad_pair():
    # the best pair says something else; the second would do
    mixed = image([[0.9, 0], [0, 0.8]], ["a hat", "a cat"], PHRASES[:2])
    assert captions.grounding_scores([mixed], "strict")["recall"] == 0.5
    assert captions.grounding_scores([mixed], "glamm", exact)["recall"] == 0
    assert captions.grounding_scores([mixed], "glamm", lambda one, other: 0.5)["recall"] == 1
    assert captions.grounding_scores([mixed], "glamm")["recall"] is None


def test_recall_wants_half_an_overlap():
    assert captions.grounding_scores([image([[0.5]], ["a dog"], ["the dog"])])["recall"] == 1
    assert captions.grounding_scores([image([[0.49]], ["a dog"], ["the dog"])])["recall"] == 0


def test_only_strict_precision_ranks_by_sureness():
    # the wrong mask comes first, but is less sure
    ranked = image([[0.0], [0.9]], PHRASES[:2], PHRASES[1:2], scores=[0.1, 0.9])
    strict, glamm = (captions.grounding_scores([ranked], mode)["ap50"] for mode in captions.MODES)
    assert (strict, glamm) == pytest.approx((1.0, 0.5))


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="strict, glamm"):
        captions.grounding_scores([], "lenient")


def test_phrases_are_compared_by_the_mean_states_of_a_text_encoder(tmp_path):
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "dog", "cat"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    BertTokenizer(str(tmp_path / "vocab.txt")).save_pretrained(tmp_path)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(tmp_path)
    similarity = captions.bert_similarity(str(tmp_path))
    assert similarity("a red dog", "a red dog") == pytest.approx(1)
    assert similarity("a red dog", "a cat") == pytest.approx(similarity("a cat", "a red dog"))
    assert -1 <= similarity("a red dog", "a cat") < 0.999


def test_captions_lose_tags_and_masks():
    answer = "<p> A dog </p> [SEG] runs.<|im_end|>"
    assert captions.plain_caption(answer) == "A dog runs."


TEXTS = ["a dog runs on the grass.", "A red car is parked near a house", "two people, standing"]


def test_without_java_only_a_cider_of_another_name_is_given(monkeypatch, heard):
    monkeypatch.setenv("PATH", "")
    scores = captions.text_scores(TEXTS, [[text.upper()] for text in TEXTS])
    assert "install a Java" in heard[0]
    assert scores["meteor"] is None and scores["cider"] is None
    assert scores["cider_plain"] > 5


@pytest.mark.slow
@pytest.mark.skipif(not captions.has_java(), reason="METEOR and COCO's tokenizer are Java programs")
def test_the_right_words_get_full_meteor_and_wrong_ones_less():
    right = captions.text_scores(TEXTS, [[text, "something else"] for text in TEXTS])
    assert right["meteor"] == 1 and right["cider"] > 2


def test_captions_need_references():
    with pytest.raises(ValueError, match="one or more for each"):
        captions.text_scores(["a dog"], [[]])

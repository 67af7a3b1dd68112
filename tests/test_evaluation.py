"""The measures against sums done by hand, DAVIS' and COCO's rules, and the run over scenes that uses them."""

import contextlib
import copy
import io
import json
import math

import numpy as np
import pytest
import torch

from sa2va import Sa2VAOutput
from sa2va.data.scenes import make_sample
from sa2va.evaluation import metrics, scenes
from sa2va.evaluation.metrics import PhraseMasks
from sa2va.finetune.tiny import build_model

SEED = 1  # its first follow-up asks for words, too
SIDE = 100  # a picture of this side has a boundary tolerance of ceil(0.008 * 141.4) = 2 pixels


def box(top, left, height, width, side=SIDE):
    """A mask with one filled rectangle."""
    mask = np.zeros((side, side), dtype=bool)
    mask[top : top + height, left : left + width] = True
    return mask


def blank(*shape):
    return np.zeros(shape, dtype=bool)


def random_masks(seed, shape):
    """Two masks of blobs, from sparse to dense, sometimes empty or full."""
    rng = np.random.default_rng(seed)
    coarse = rng.random((2, *shape[:-2], 4, 4)) < rng.choice([0.0, 0.2, 0.5, 0.8, 1.0], size=(2, *[1] * len(shape)))
    repeats = [side // 4 for side in shape[-2:]]
    return coarse.repeat(repeats[0], axis=-2).repeat(repeats[1], axis=-1)


# ---------- cIoU, gIoU


def test_intersection_and_union_are_counted_for_each_mask_of_a_stack():
    predicted = np.stack([box(0, 0, 2, 5), box(0, 0, 4, 4)])
    target = np.stack([box(0, 3, 2, 5), box(50, 50, 1, 1)])
    intersections, unions = metrics.intersection_union(predicted, target)
    assert intersections.tolist() == [4, 0]
    assert unions.tolist() == [16, 17]


# intersections, unions -> cIoU, gIoU
TABLE = {
    "one sample": ([3], [4], 0.75, 0.75),
    "a large and a small one": ([90, 0], [100, 10], 90 / 110, 0.45),
    "three": ([1, 2, 3], [2, 4, 4], 0.6, (0.5 + 0.5 + 0.75) / 3),
    "an empty union counts 1, and only in gIoU": ([1, 0], [4, 0], 0.25, 0.625),
    "all unions empty": ([0, 0], [0, 0], 1.0, 1.0),
    "all wrong": ([0, 0], [7, 9], 0.0, 0.0),
}


@pytest.mark.parametrize("name", TABLE)
def test_cumulative_and_mean_iou_are_the_sums_done_by_hand(name):
    intersections, unions, ciou, giou = TABLE[name]
    assert metrics.cumulative_iou(intersections, unions) == pytest.approx(ciou)
    assert metrics.mean_iou(intersections, unions) == pytest.approx(giou)


def test_no_samples_have_no_score():
    assert math.isnan(metrics.cumulative_iou([], []))
    assert math.isnan(metrics.mean_iou([], []))


@pytest.mark.parametrize("measure", [metrics.intersection_union, metrics.boundary_accuracy, metrics.video_quality])
def test_masks_of_different_shapes_are_refused(measure):
    with pytest.raises(ValueError, match=r"\(1, 4, 4\) predicted, \(1, 4, 5\) wanted"):
        measure(blank(1, 4, 4), blank(1, 4, 5))


@pytest.mark.parametrize("measure", [metrics.intersection_union, metrics.boundary_accuracy, metrics.video_quality])
def test_masks_that_are_not_boolean_are_refused(measure):
    with pytest.raises(TypeError, match="threshold"):
        measure(blank(1, 4, 4).astype(float), blank(1, 4, 4))


def test_video_quality_of_a_single_mask_is_refused():
    with pytest.raises(ValueError, match=r"\[T, H, W\]"):
        metrics.video_quality(blank(4, 4), blank(4, 4))


# ---------- J, F


def test_region_similarity_is_the_mean_over_frames_with_empty_frames_right():
    target = np.stack([box(0, 0, 10, 10), blank(SIDE, SIDE), box(0, 0, 10, 10)])
    predicted = np.stack([box(0, 5, 10, 10), blank(SIDE, SIDE), blank(SIDE, SIDE)])
    assert metrics.region_similarity(predicted, target) == pytest.approx((50 / 150 + 1 + 0) / 3)


def test_a_boundary_lies_between_pixels_that_differ_and_is_no_wider_than_one_pixel():
    drawn = ["......", "......", "..##..", "..##..", "......"]
    wanted = ["......", ".###..", ".#.#..", ".###..", "......"]
    mask, boundary = (np.array([[sign == "#" for sign in row] for row in rows]) for rows in (drawn, wanted))
    assert (metrics.boundary_map(mask) == boundary).all()


def test_the_edge_of_the_picture_is_no_boundary():
    assert not metrics.boundary_map(np.ones((5, 7), dtype=bool)).any()
    assert metrics.boundary_map(box(0, 0, 5, 3, side=5)).sum(axis=0).tolist() == [0, 0, 5, 0, 0]


# offset of a 30 x 30 box in pixels -> F; up to the tolerance of 2 all is right
@pytest.mark.parametrize("offset, accuracy", [(0, 1.0), (1, 1.0), (2, 1.0)])
def test_boundary_accuracy_forgives_shifts_within_the_tolerance(offset, accuracy):
    assert metrics.boundary_accuracy(box(20, 20 + offset, 30, 30), box(20, 20, 30, 30)) == accuracy


def test_boundary_accuracy_of_a_shift_beyond_the_tolerance_is_the_sum_done_by_hand():
    # The boundary of a 30 x 30 box is a ring around 31 x 31 pixels: 120 of them. Shifted by 3, its top and bottom rows
    # keep 30 of 31 pixels each. Its left column, now inside, keeps those 1 and 2 pixels away from the other's top and
    # bottom rows; its right column, outside, keeps none.
    found = 2 * 30 + 2 * 2
    assert metrics.boundary_accuracy(box(20, 23, 30, 30), box(20, 20, 30, 30)) == pytest.approx(found / 120)


def test_boundary_accuracy_is_zero_for_boxes_apart():
    assert metrics.boundary_accuracy(box(5, 5, 20, 20), box(60, 60, 20, 20)) == 0


def test_boundary_accuracy_of_empty_masks():
    assert metrics.boundary_accuracy(blank(SIDE, SIDE), blank(SIDE, SIDE)) == 1
    assert metrics.boundary_accuracy(box(5, 5, 20, 20), blank(SIDE, SIDE)) == 0
    assert metrics.boundary_accuracy(blank(SIDE, SIDE), box(5, 5, 20, 20)) == 0


def test_boundary_accuracy_weighs_precision_and_recall():
    one, two = box(5, 5, 20, 20), box(5, 5, 20, 20) | box(60, 60, 20, 20)
    assert metrics.boundary_accuracy(one, two) == pytest.approx(2 * 1 * 0.5 / 1.5)


def test_video_quality_takes_the_mean_of_j_and_f():
    target = np.stack([box(20, 20, 30, 30), box(20, 20, 30, 30)])
    predicted = np.stack([box(20, 21, 30, 30), blank(SIDE, SIDE)])
    quality = metrics.video_quality(predicted, target)
    assert quality.j == pytest.approx((29 / 31 + 0) / 2)
    assert quality.f == pytest.approx(0.5)
    assert quality.j_and_f == pytest.approx((quality.j + quality.f) / 2)


@pytest.mark.parametrize("seed", range(25))
def test_measures_stay_in_bounds_and_do_not_mind_which_mask_comes_first(seed):
    one, other = random_masks(seed, (2, 24, 32))
    quality = metrics.video_quality(one, other)
    assert quality == pytest.approx(metrics.video_quality(other, one))
    assert all(0 <= value <= 1 for value in quality)
    assert metrics.video_quality(one, one) == (1, 1)
    intersections, unions = metrics.intersection_union(one, other)
    ious = metrics.iou(intersections, unions)
    assert (intersections >= 0).all() and (intersections <= unions).all()
    assert ious.min() <= metrics.cumulative_iou(intersections, unions) <= ious.max()
    assert quality.j == pytest.approx(metrics.mean_iou(intersections, unions))


# ---------- AP50


def strips(*lefts):
    """Masks of boxes 10 x 10 at these columns."""
    return np.stack([box(0, left, 10, 10) for left in lefts]) if lefts else blank(0, SIDE, SIDE)


def test_average_precision_is_the_sum_done_by_hand():
    targets = [PhraseMasks(strips(0, 20)), PhraseMasks(strips(0))]
    predictions = [
        # surest first: a hit, then a second one on the same target (wrong), then IoU 8/12 (a hit)
        PhraseMasks(strips(0, 1, 22), scores=np.array([0.9, 0.8, 0.7])),
        PhraseMasks(strips(60), scores=np.array([0.6])),  # wrong
    ]
    # Recall 1/3 at precision 1, recall 2/3 at precision 2/3, no more: 34 levels (0 to .33) and 33 levels (.34 to .66).
    wanted = (34 * 1 + 33 * 2 / 3) / 101
    assert metrics.average_precision(predictions, targets) == pytest.approx(wanted)


def test_an_overlap_of_exactly_the_threshold_is_a_hit():
    half = PhraseMasks(box(0, 0, 10, 5)[None])
    assert metrics.average_precision([half], [PhraseMasks(strips(0))]) == 1


def test_empty_masks_never_match():
    empty = PhraseMasks(blank(1, SIDE, SIDE))
    assert metrics.average_precision([empty], [empty], iou_threshold=0.0) == 0


def test_phrase_match_forgives_article_and_case_only():
    target = [PhraseMasks(strips(0, 20), ["a red star", "an orange cross"])]
    right = [PhraseMasks(strips(0, 20), ["The  Red star", "orange cross"])]
    swapped = [PhraseMasks(strips(0, 20), ["an orange cross", "a red star"])]
    assert metrics.average_precision(right, target, match_phrases=True) == 1
    assert metrics.average_precision(swapped, target) == 1
    assert metrics.average_precision(swapped, target, match_phrases=True) == 0


def test_a_wrong_phrase_leaves_the_target_to_others():
    target = [PhraseMasks(strips(0), ["a red star"])]
    predicted = [PhraseMasks(strips(0, 1), ["a red cross", "a red star"], np.array([0.9, 0.8]))]
    assert metrics.average_precision(predicted, target, match_phrases=True) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "phrase, plain",
    [("A red  star", "red star"), ("an Apple", "apple"), ("the", "the"), ("another one", "another one")],
)
def test_phrases_lose_article_case_and_spaces(phrase, plain):
    assert metrics.normalize_phrase(phrase) == plain


def test_nothing_predicted_scores_zero_and_nothing_wanted_has_no_score():
    nothing, something = PhraseMasks(strips()), PhraseMasks(strips(0))
    assert metrics.average_precision([nothing], [something]) == 0
    assert math.isnan(metrics.average_precision([something], [nothing]))


@pytest.mark.parametrize(
    "predicted, options, words",
    [
        ([], {}, "0 predictions for 1 images"),
        ([PhraseMasks(blank(1, 4, 4))], {}, "one size"),
        ([PhraseMasks(strips(0), scores=np.ones(2))], {}, "one number for each"),
        ([PhraseMasks(strips(0))], {"match_phrases": True}, "0 phrases for 1 masks"),
    ],
)
def test_average_precision_refuses_what_does_not_fit_together(predicted, options, words):
    with pytest.raises(ValueError, match=words):
        metrics.average_precision(predicted, [PhraseMasks(strips(0), ["a star"])], **options)


def random_images(seed):
    """Predictions and targets of six images: boxes here and there, some predictions near a target."""
    rng = np.random.default_rng(seed)
    predictions, targets = [], []
    for _ in range(6):
        places = rng.integers(0, 70, (rng.integers(1, 5), 2))
        wanted = np.stack([box(top, left, 20, 25) for top, left in places])
        moved = places[rng.integers(len(places), size=rng.integers(1, 6))]
        moved = moved + rng.integers(-8, 9, moved.shape)
        found = np.stack([box(max(top, 0), max(left, 0), 20, 23) for top, left in moved])
        predictions.append(PhraseMasks(found, scores=rng.random(len(found)).round(1)))
        targets.append(PhraseMasks(wanted))
    return predictions, targets


def coco_ap50(predictions, targets):
    """The same by pycocotools."""
    from pycocotools import mask as rle
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def entry(image, mask, **more):
        encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
        place = {"area": int(rle.area(encoded)), "bbox": rle.toBbox(encoded).tolist()}
        return {"image_id": image, "category_id": 1, "segmentation": encoded, **place, **more}

    truth = COCO()
    wanted = [entry(i, mask, iscrowd=0) for i, target in enumerate(targets) for mask in target.masks]
    truth.dataset = {
        "info": {},
        "images": [{"id": i, "height": SIDE, "width": SIDE} for i in range(len(targets))],
        "annotations": [{**annotation, "id": i + 1} for i, annotation in enumerate(wanted)],
        "categories": [{"id": 1, "name": "phrase"}],
    }
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        pairs = [(i, m, s) for i, p in enumerate(predictions) for m, s in zip(p.masks, p.scores, strict=True)]
        evaluation = COCOeval(truth, truth.loadRes([entry(i, m, score=float(s)) for i, m, s in pairs]), "segm")
        evaluation.params.iouThrs = np.array([0.5])
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation.eval["precision"][0, :, 0, 0, -1].mean()


@pytest.mark.parametrize("seed", range(6))
def test_average_precision_equals_that_of_pycocotools(seed):
    pytest.importorskip("pycocotools")
    predictions, targets = random_images(seed)
    assert metrics.average_precision(predictions, targets) == pytest.approx(coco_ap50(predictions, targets), abs=1e-12)


# ---------- scoring turns


@pytest.fixture(scope="module")
def tiny():
    """The small model and its processor, untrained."""
    model, processor = build_model(0)
    return model.eval(), processor


def answered(processor, turn, answer=None, masks=None):
    """An output with this answer and these masks, by default the true ones."""
    answer = turn.answer if answer is None else answer
    masks = list(turn.masks if masks is None else masks)
    score = {"iou": np.ones(len(turn.masks[0]) if len(turn.masks) else 1, dtype=np.float32)}
    return Sa2VAOutput(
        prediction=f"{answer}<|im_end|>",
        prediction_masks=masks,
        phrases=processor.phrases(answer),
        mask_scores=[score] * len(masks),
    )


def scores_of(processor, task, spoil=lambda turn: {}, count=4):
    """Scores by criterion of answers to some scenes of a task, true but for what `spoil` changes."""
    values = {}
    for index in range(count):
        for turn in make_sample(3, index, split="test", task=task, num_frames=3).turns:
            name = scenes.criterion_of(task, turn)
            output = answered(processor, turn, **spoil(turn))
            values.setdefault(name, []).append(scenes.CRITERIA[name].measure(turn, output))
    return {name: scenes.CRITERIA[name].summarize(group) for name, group in values.items()}


PERFECT = {"false_absence": 0.0}  # all other scores are 1


@pytest.mark.parametrize("task", scenes.TASKS)
def test_true_answers_get_full_marks(tiny, task):
    for scores in scores_of(tiny[1], task).values():
        assert scores == {name: PERFECT.get(name, 1.0) for name in scores}


@pytest.mark.parametrize("task", [task for task in scenes.TASKS if "absent" not in task])
def test_answers_without_words_and_masks_get_nothing(tiny, task):
    for name, scores in scores_of(tiny[1], task, lambda turn: {"answer": "", "masks": []}).items():
        assert scores.pop("false_absence", 1.0) == 1
        if name == "video_segmentation":  # frames in which the object is away are right without a mask
            assert max(scores.values()) < 0.5
        else:
            assert set(scores.values()) == {0}


def test_pointing_at_something_absent_is_wrong(tiny):
    scores = scores_of(tiny[1], "absent", lambda turn: {"answer": "Sure, it is the red star [SEG]."})
    assert scores == {"absent": {"accuracy": 0.0}}


def test_empty_masks_for_things_that_are_there_score_zero(tiny):
    scores = scores_of(tiny[1], "multi", lambda turn: {"masks": np.zeros_like(turn.masks)})
    assert scores == {"image_segmentation": {"ciou": 0.0, "giou": 0.0, "false_absence": 0.0}}


def turn_of(task, kind):
    """A turn with two targets and its scene."""
    samples = (make_sample(3, index, split="test", task=task, num_frames=3) for index in range(100))
    return next(sample.turns[0] for sample in samples if sample.turns[0].kind == kind)


def test_a_missing_mask_of_an_image_counts_as_empty(tiny):
    turn = turn_of("multi", "pair")
    first, second = (int(mask.sum()) for mask in turn.masks)
    overlap = scenes.measure_overlap(turn, answered(tiny[1], turn, masks=turn.masks[:1]))
    assert overlap == (first, first + second, True)


def test_a_mask_too_many_adds_to_the_union_of_an_image(tiny):
    turn = turn_of("refer", "color")
    area = int(turn.masks.sum())
    surplus = ~turn.masks[0]
    overlap = scenes.measure_overlap(turn, answered(tiny[1], turn, masks=[*turn.masks, surplus]))
    assert overlap == (area, turn.masks.size, True)


def test_masks_are_paired_in_order(tiny):
    turn = turn_of("multi", "pair")
    assert scenes.measure_overlap(turn, answered(tiny[1], turn, masks=turn.masks[::-1])).intersection == 0


def test_a_missing_mask_of_a_video_counts_as_empty(tiny):
    turn = turn_of("video_multi", "pair")
    tracks = scenes.measure_tracks(turn, answered(tiny[1], turn, masks=turn.masks[:1]))
    alone = metrics.video_quality(np.zeros_like(turn.masks[1]), turn.masks[1])
    assert tracks.quality == pytest.approx(((1 + alone.j) / 2, (1 + alone.f) / 2))


def test_a_mask_too_many_in_a_video_scores_zero_even_if_empty(tiny):
    turn = turn_of("video_refer", "color")
    surplus = np.zeros_like(turn.masks[0])
    assert scenes.measure_tracks(turn, answered(tiny[1], turn, masks=[*turn.masks, surplus])).quality == (0.5, 0.5)


@pytest.mark.parametrize("answer, right", [("There are 3 stars.", True), ("3", True), ("There are 13.", False)])
def test_an_expected_word_must_be_a_word_of_its_own(tiny, answer, right):
    turns = (make_sample(3, index, split="test", task="question").turns[0] for index in range(200))
    turn = next(turn for turn in turns if turn.expected == "3")
    assert scenes.measure_words(turn, answered(tiny[1], turn, answer=answer)) is right


def test_turns_of_a_followup_are_judged_by_what_they_ask(tiny):
    samples = [make_sample(3, index, split="test", task="followup") for index in range(10)]
    for turn in (turn for sample in samples for turn in sample.turns):
        wanted = "image_segmentation" if turn.targets else "followup"
        assert scenes.criterion_of("followup", turn) == wanted


# ---------- the whole run


@pytest.fixture(scope="module")
def result(tiny):
    """A run over one scene of every task."""
    return scenes.evaluate(*tiny, seed=SEED, count=1, num_frames=6, max_new_tokens=8)


def test_a_run_scores_every_criterion_in_percent(result):
    assert set(result) == {"scores", "details", "counts", "seconds"}
    assert set(result["scores"]) == set(result["counts"]) == set(result["details"]) == set(scenes.CRITERIA)
    assert set(result["seconds"]) == set(scenes.TASKS)
    for scores in result["scores"].values():
        assert all(0 <= score <= 100 for score in scores.values())


def test_a_run_tells_scores_by_task_and_kind(result):
    assert {"absent", "video_absent"} <= set(result["details"]["absent"])
    assert any(label.startswith("video_question/") for label in result["details"]["question"])
    json.dumps(result, allow_nan=False)


def test_a_model_that_always_points_at_two_things_is_scored_so(tiny):
    model, processor = tiny
    bias = {(processor.tokenizer.convert_tokens_to_ids("[SEG]"),): 1e4}
    tasks = ["refer", "video_refer", "absent", "question", "caption"]
    options = {"num_frames": 6, "max_new_tokens": 2, "sequence_bias": bias}
    scores = scenes.evaluate(model, processor, SEED, 1, tasks=tasks, **options)["scores"]
    assert scores["image_segmentation"]["false_absence"] == scores["video_segmentation"]["false_absence"] == 0
    assert scores["video_segmentation"]["j"] <= 50  # one mask is too many
    assert scores["absent"]["accuracy"] == scores["question"]["accuracy"] == 0
    assert scores["caption"]["ap50_phrase"] == 0


def test_a_run_can_be_repeated_and_narrowed_to_some_tasks(tiny, result):
    again = scenes.evaluate(*tiny, seed=SEED, count=1, num_frames=6, max_new_tokens=8, tasks=["absent", "region"])
    assert set(again["scores"]) == {"absent", "region"}
    assert again["scores"]["region"] == result["scores"]["region"]
    assert again["details"]["absent"]["absent"] == result["details"]["absent"]["absent"]


@pytest.mark.parametrize("options", [{"tasks": ["refere"]}, {"count": 0}, {"split": "dev"}, {"num_frames": 0}])
def test_a_run_refuses_what_it_does_not_know(tiny, options):
    with pytest.raises(ValueError, match="|".join(("Unknown tasks", "count", "Unknown split", "num_frames"))):
        scenes.evaluate(*tiny, **{"seed": 0, "count": 1, **options})


def test_the_command_prints_and_saves_one_json_object(tiny, tmp_path, capsys):
    model, processor = tiny
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    file = tmp_path / "new" / "scores.json"
    arguments = ["--model", str(tmp_path), "--seed", "5", "--count", "1", "--tasks", "question", "--device", "cpu"]
    assert scenes.main([*arguments, "--max-new-tokens", "4", "--json", "--output", str(file)]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(file.read_text())
    assert printed["settings"]["seed"] == 5 and printed["settings"]["split"] == "test"
    assert printed["settings"]["versions"].keys() == {"sa2va", "torch", "transformers"}


@pytest.mark.parametrize("options", [["--model", "nope"], ["--device", "abacus"]], ids=str)
def test_the_command_tells_in_one_line_what_it_can_not_use(options, capsys):
    assert scenes.main(["--count", "1", *options]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and options[1] in told[0]


def test_a_model_is_loaded_as_in_the_demo(tiny, tmp_path):
    model, processor = tiny
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert scenes.load(str(tmp_path), "cpu")[0].dtype == torch.float32
    assert scenes.load(str(tmp_path), "cpu", "bfloat16")[0].dtype == torch.bfloat16


def test_the_table_has_a_line_for_every_score(result):
    lines = scenes.format_table(result).splitlines()
    assert len(lines) == 1 + sum(len(scores) for scores in result["scores"].values())

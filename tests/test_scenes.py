"""The synthetic world: what it promises about words, masks, motion and repeatability."""

import re
from collections import Counter

import numpy as np
import pytest

from sa2va.data import scenes
from sa2va.data.scenes import IMAGE_TASKS, SPLITS, VIDEO_TASKS, make_sample

TASKS = IMAGE_TASKS + VIDEO_TASKS
WORDS = {**dict.fromkeys(scenes.COLORS, "color"), **dict.fromkeys(scenes.SHAPES, "shape")}
TOWARDS = {  # the key by which an object comes first
    "largest": lambda thing: thing.radius,
    "smallest": lambda thing: -thing.radius,
    "leftmost": lambda thing: -thing.x,
    "rightmost": lambda thing: thing.x,
    "topmost": lambda thing: -thing.y,
    "bottommost": lambda thing: thing.y,
}
BESIDE = {"left of": TOWARDS["leftmost"], "right of": TOWARDS["rightmost"]}
BESIDE |= {"above": TOWARDS["topmost"], "below": TOWARDS["bottommost"]}


@pytest.fixture(scope="module")
def samples():
    """Forty samples of every task, by task."""
    return {task: [make_sample(11, index, split="test", task=task) for index in range(40)] for task in TASKS}


@pytest.fixture(scope="module")
def everything(samples):
    """All samples in one list."""
    return [sample for group in samples.values() for sample in group]


def of_class(objects, words):
    """Indices of the objects that "red star", "stars" or "red shapes" can mean."""
    words = [re.sub(r"(?<=cross)es$|(?<!s)s$", "", word) for word in words.split() if not word.startswith("shape")]
    assert all(word in WORDS for word in words), words
    return [i for i, thing in enumerate(objects) if all(getattr(thing, WORDS[word]) == word for word in words)]


def meant(objects, words):
    """Indices of the objects that a phrase without its article refers to, by reading it afresh."""
    if match := re.fullmatch(r"(.+) (left of|right of|above|below) the (.+)", words):
        (anchor,) = of_class(objects, match[3])
        key = BESIDE[match[2]]
        return [i for i in of_class(objects, match[1]) if i != anchor and key(objects[i]) > key(objects[anchor])]
    if match := re.fullmatch(r"(.+) moving (\w+)", words):
        return [i for i in of_class(objects, match[1]) if objects[i].motion == match[2]]
    first, _, rest = words.partition(" ")
    if first == "still":
        return [i for i in of_class(objects, rest) if objects[i].speed == 0]
    if first in TOWARDS:
        group = sorted(of_class(objects, rest), key=lambda i: TOWARDS[first](objects[i]))
        return group[-1:]
    return of_class(objects, words)


def phrases(question):
    """What a request asks for: ["red star", "blue circle"] or ["all circles"]."""
    words = re.sub(r" in this (image|video)", "", question).rstrip(".?")
    words = re.sub(r"^(Please segment|Can you segment|Now segment|Segment|Where is) ", "", words)
    parts = words.split(" and ")
    return [part.removeprefix("the ") for part in parts]


def requests(samples):
    """Every (objects, turn) that asks for masks of something it describes."""
    for sample in samples:
        for turn in sample.turns:
            if re.match(r"(Please|Can you|Now|Segment|Where)", turn.question) and turn.kind not in (
                "it_segment",
                "them",
            ):
                yield sample.objects, turn


def same(a, b):
    """Whether two samples are equal to the byte."""
    words = [[(t.question, t.answer, t.targets, t.expected, t.kind) for t in sample.turns] for sample in (a, b)]
    return words[0] == words[1] and a.objects == b.objects and a.frames.tobytes() == b.frames.tobytes()


@pytest.mark.parametrize("task", TASKS)
def test_same_arguments_give_the_same_bytes(task):
    first, again = (make_sample(3, 5, split="validation", task=task) for _ in range(2))
    assert same(first, again)
    assert np.array_equal(first.object_masks, again.object_masks)


def test_splits_seeds_and_indices_give_different_pictures():
    names = [(split, seed, index) for split in SPLITS for seed in range(6) for index in range(6)]
    pictures = {make_sample(seed, index, split=split).frames.tobytes() for split, seed, index in names}
    assert len(pictures) == len(names)


def test_arrays_have_the_documented_shapes_and_types(everything):
    for sample in everything:
        frames, height, width, _ = sample.frames.shape
        assert frames == (8 if sample.task in VIDEO_TASKS else 1)
        assert 96 <= height <= 160 and 96 <= width <= 160
        assert sample.frames.dtype == np.uint8
        assert sample.object_masks.dtype == bool
        assert sample.object_masks.shape == (len(sample.objects), frames, height, width)
        assert all(turn.masks.shape == (len(turn.targets), frames, height, width) for turn in sample.turns)


def test_size_and_length_can_be_given():
    assert make_sample(0, 0, task="video_refer", size=(48, 80), num_frames=3).frames.shape == (3, 48, 80, 3)


def test_every_seg_has_its_mask_and_names_its_object(everything):
    for sample in everything:
        for turn in sample.turns:
            assert turn.answer.count("[SEG]") == len(turn.masks)
            before = turn.answer.split("[SEG]")[:-1]
            for words, target, mask in zip(before, turn.targets, turn.masks, strict=True):
                assert words.removesuffix(" </p> ").rstrip().endswith(sample.objects[target].name)
                assert np.array_equal(mask, sample.object_masks[target])


def test_masks_do_not_overlap_and_show_the_color_of_their_object(everything):
    for sample in everything:
        assert sample.object_masks.sum(axis=0).max() == 1
        for thing, mask in zip(sample.objects, sample.object_masks, strict=True):
            paint = np.quantile(sample.frames[mask], 0.7, axis=0)  # past the dark rim
            assert np.abs(paint - thing.rgb).max() <= 6
            assert np.abs(np.subtract(thing.rgb, scenes.COLORS[thing.color])).max() <= 14


def test_no_pixel_outside_the_masks_has_the_color_of_an_object(everything):
    for sample in everything:
        vivid = np.ptp(sample.frames, axis=-1) > 120  # more than half covered by any of the colours
        stray = vivid & ~sample.object_masks.any(axis=0)  # only where the soft edges of two objects meet
        assert stray.sum() <= 0.005 * vivid.sum()


def test_every_object_is_mostly_visible_at_first(everything):
    for sample in everything:
        scale = min(sample.frames.shape[1:3])
        for thing, mask in zip(sample.objects, sample.object_masks, strict=True):
            assert mask[0].sum() >= 0.58 * 2.4 * (thing.radius * scale) ** 2


def test_every_reference_means_exactly_its_target(everything):
    checked = Counter()
    for objects, turn in requests(everything):
        if not turn.answer.startswith("There is no") and "all " not in turn.question:
            assert [meant(objects, words) for words in phrases(turn.question)] == [[i] for i in turn.targets], (
                turn.question
            )
            checked[turn.kind] += 1
    assert {"color_shape", "shape", "color", "largest", "smallest", "relation", "position", "pair", "up"} <= set(
        checked
    )


def test_superlatives_are_plain_to_see(everything):
    for objects, turn in requests(everything):
        first, _, noun = phrases(turn.question)[0].partition(" ")
        if first in TOWARDS and turn.targets:
            *_, second, best = sorted(of_class(objects, noun), key=lambda i: TOWARDS[first](objects[i]))
            ratio = objects[best].radius / objects[second].radius
            gap = TOWARDS[first](objects[best]) - TOWARDS[first](objects[second])
            assert max(ratio, 1 / ratio) >= 1.25 if first in ("largest", "smallest") else gap >= 0.15


def test_absent_objects_are_absent_and_get_no_mask(samples):
    for task in ("absent", "video_absent"):
        for sample in samples[task]:
            (turn,) = sample.turns
            assert meant(sample.objects, phrases(turn.question)[0]) == []
            assert turn.answer.startswith("There is no ") and turn.targets == ()


def test_all_of_a_class_are_listed_from_left_to_right(samples):
    for sample in samples["multi"] + samples["video_multi"]:
        (turn,) = sample.turns
        if turn.kind == "all":
            listed = of_class(sample.objects, phrases(turn.question)[0].removeprefix("all "))
            assert list(turn.targets) == sorted(listed, key=lambda i: sample.objects[i].x)


def test_captions_name_every_object_from_left_to_right(samples):
    for sample in samples["caption"]:
        (turn,) = sample.turns
        order = sorted(sample.objects, key=lambda thing: thing.x)
        named = re.findall(r"<p> an? (\w+ \w+) </p> \[SEG\]", turn.answer)
        assert named == [thing.name for thing in order]
        assert turn.question == scenes.CAPTION_QUESTION


def test_answers_in_words_are_true(samples):
    for sample in samples["question"] + samples["video_question"]:
        (turn,) = sample.turns
        question = turn.question.replace(" in this video", "").rstrip("?")
        if turn.kind == "count":
            noun = re.fullmatch(r"How many (.+) are there", question)[1]
            assert turn.expected == str(len(of_class(sample.objects, noun)))
        elif turn.kind == "exists":
            noun = re.fullmatch(r"Is there an? (.+)", question)[1]
            assert turn.expected == ("yes" if of_class(sample.objects, noun) else "no")
        else:
            noun = (
                re.search(r"the (\w+(?: \w+)?) ?(?:moving)?$", question)[1].removesuffix(" moving").replace(" one", "")
            )
            (index,) = of_class(sample.objects, noun)
            assert turn.expected == getattr(sample.objects[index], turn.kind.replace("direction", "motion"))
        assert turn.expected in turn.answer.lower()


def test_regions_are_visible_masks_and_named_rightly(samples):
    for sample in samples["region"]:
        (turn,) = sample.turns
        asked = int(re.search(r"region(\d)", turn.question)[1])
        region = sample.regions[asked - 1]
        (index,) = [i for i, mask in enumerate(sample.object_masks) if np.array_equal(mask[0], region)]
        assert turn.expected == sample.objects[index].name
        assert turn.answer.startswith(f"Region{asked} is a") and turn.answer.endswith(f" {turn.expected}.")


def test_follow_ups_speak_of_the_first_turn(samples):
    for sample in samples["followup"]:
        first, second = sample.turns
        if second.kind in ("it_color", "it_shape"):
            assert second.expected == getattr(sample.objects[first.targets[0]], second.kind.removeprefix("it_"))
        elif second.kind == "it_segment":
            assert first.expected in sample.objects[second.targets[0]].name
        elif second.kind == "them":
            assert first.expected == str(len(second.targets))
        else:
            assert first.targets != second.targets


def test_clips_move_as_said(samples):
    for sample in samples["video_motion"]:
        height, width = sample.frames.shape[1:3]
        for thing, mask in zip(sample.objects, sample.object_masks, strict=True):
            whole = 2.4 * (thing.radius * min(height, width)) ** 2
            seen = [t for t in range(5) if mask[t].sum() > 0.985 * whole]
            if len(seen) < 2:
                continue
            centers = [np.argwhere(mask[t]).mean(axis=0)[::-1] for t in (seen[0], seen[-1])]
            moved = (centers[1] - centers[0]) / min(height, width) / (seen[-1] - seen[0])
            assert moved == pytest.approx(np.multiply(scenes.MOTIONS[thing.motion], thing.speed), abs=0.015)


def test_some_objects_leave_and_come_back():
    clips = [make_sample(0, index, task="video_refer", num_frames=16, size=(96, 96)) for index in range(20)]
    seen = [mask.any(axis=(1, 2)) for clip in clips for mask in clip.object_masks]
    assert any(row[0] and not row[t] and row[t:].any() for row in seen for t in range(16))


def test_positions_agree_with_masks():
    sample = make_sample(4, 0, task="video_refer", size=(120, 150))
    for thing, mask in zip(sample.objects, sample.object_masks[:, 0], strict=True):
        if mask.sum() > 0.98 * 2.4 * (thing.radius * 120) ** 2:
            y, x = np.argwhere(mask).mean(axis=0) + 0.5
            assert (x / 120, y / 120) == pytest.approx((thing.x, thing.y), abs=0.01)


def test_kinds_colors_and_answers_are_balanced():
    turns = [turn for i in range(400) for turn in make_sample(8, i, task="question", size=(64, 64)).turns]
    kinds, answers = Counter(t.kind for t in turns), Counter(t.expected for t in turns)
    counts = [answers[str(number)] for number in range(6)]
    assert all(60 <= kinds[kind] <= 140 for kind in scenes.KINDS["question"])
    assert 0.35 <= answers["yes"] / (answers["yes"] + answers["no"]) <= 0.65
    assert max(counts) <= 0.4 * sum(counts)


def test_absence_cannot_be_told_from_the_kind_of_question(samples):
    def kinds(task):
        return {turn.kind for sample in samples[task] for turn in sample.turns}

    assert kinds("absent") - {"near_miss"} <= kinds("refer")


def test_the_corpus_holds_every_word_of_the_samples(everything):
    def words(text):
        return set(re.findall(r"[\w<>/\[\]]+|[.,?]", text))

    known = set().union(*(words(sentence) for sentence in scenes.corpus(6000)))
    used = set().union(*(words(f"{t.question} {t.answer}") for sample in everything for t in sample.turns))
    assert used <= known


def test_the_corpus_stops_at_its_limit_and_repeats_itself():
    assert list(scenes.corpus(50)) == list(scenes.corpus(50))
    assert len(list(scenes.corpus(50))) == 50


@pytest.mark.parametrize(
    "wrong",
    [{"split": "dev"}, {"task": "draw"}, {"size": (10, 100)}, {"num_frames": 0}, {"seed": -1}],
)
def test_wrong_arguments_are_explained(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_sample(**{"seed": 0, "index": 0, **wrong})


@pytest.mark.parametrize("task", scenes.INTERVIEWS)
def test_an_interview_asks_different_things_about_one_scene(task):
    samples = [make_sample(0, index, task=task) for index in range(20)]
    for sample in samples:
        questions = [turn.question for turn in sample.turns]
        assert len(set(questions)) == len(questions) <= scenes.INTERVIEW_TURNS
        assert all(turn.answer.count("[SEG]") == len(turn.masks) for turn in sample.turns)
    assert np.mean([len(sample.turns) for sample in samples]) > 4
    assert len({turn.kind for sample in samples for turn in sample.turns}) > 10

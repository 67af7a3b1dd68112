"""Mixtures of data sets: shares, order, resuming, and what is said of broken samples."""

from collections import Counter

import pytest

from sa2va.data.make_samples import EXAMPLES
from sa2va.data.mixture import Mixture
from sa2va.data.registry import open_dataset

LETTERS = {"small": "ab", "large": "ABCDEFGHIJ"}


def test_data_sets_come_by_weight():
    mixture = Mixture(LETTERS, {"small": 3, "large": 1}, length=4000, seed=0)

    names = Counter(mixture.source(index)[0] for index in range(len(mixture)))

    assert names["small"] / 4000 == pytest.approx(0.75, abs=0.03)


def test_without_weights_every_sample_counts_the_same():
    mixture = Mixture(LETTERS, None, length=6000, seed=0)

    counts = Counter(mixture[index] for index in range(len(mixture)))

    assert len(counts) == 12 and max(counts.values()) < 1.3 * min(counts.values())


def test_no_sample_comes_again_before_all_have_come():
    mixture = Mixture(LETTERS, {"small": 0, "large": 1}, length=30, seed=3)
    rounds = ["".join(mixture[index] for index in range(start, start + 10)) for start in (0, 10, 20)]

    assert all(sorted(order) == list(LETTERS["large"]) for order in rounds)
    assert len(set(rounds)) == 3


def test_the_order_follows_from_the_seed_and_can_be_resumed_anywhere():
    def tail(seed, length):
        mixture = Mixture(LETTERS, None, length=length, seed=seed)
        return [mixture[index] for index in range(57, 100)]

    assert tail(1, 100) == tail(1, 100) == tail(1, 5000)
    assert tail(1, 100) != tail(2, 100)


def test_nothing_is_read_before_it_is_asked_for():
    class Untouchable:
        def __len__(self):
            return 3

        def __getitem__(self, index):
            raise AssertionError("read")

    assert len(Mixture({"a": Untouchable()}, None, length=10, seed=0)) == 10


def test_templates_differ_from_visit_to_visit():
    dataset = open_dataset("reasonseg", EXAMPLES / "reasonseg", "train")
    mixture = Mixture({"reasonseg": dataset}, None, length=40, seed=0)

    talks = {
        (sample.id, sample.turns[0].question, sample.turns[0].answer) for sample in map(mixture.__getitem__, range(40))
    }

    assert len(talks) > 10


def test_broken_samples_are_named():
    class Broken(str):
        def __getitem__(self, index):
            raise ValueError("lines.jsonl:7: no JSON.")

    mixture = Mixture({"mine": Broken("abc")}, None, length=5, seed=0)
    place = mixture.source(2)[1]

    with pytest.raises(
        ValueError, match=rf"sample {place} of data set 'mine' \(index 2 of the mixture\): lines.jsonl:7"
    ):
        mixture[2]
    with pytest.raises(IndexError, match=r"index 5 is outside 0..4"):
        mixture[5]


@pytest.mark.parametrize(
    ("datasets", "weights", "length", "message"),
    [
        ({"a": ""}, None, 1, "without samples can't be mixed: a"),
        ({}, None, 1, "not all zero"),
        ({"a": "x"}, {"b": 1}, 1, "one weight for each of"),
        ({"a": "x"}, {"a": 0}, 1, "not all zero"),
        ({"a": "x", "b": "y"}, {"a": 2, "b": -1}, 1, "must be >= 0"),
        ({"a": "x"}, None, 0, "length is the number of samples"),
    ],
)
def test_mixtures_that_make_no_sense_are_refused(datasets, weights, length, message):
    with pytest.raises(ValueError, match=message):
        Mixture(datasets, weights, length, seed=0)

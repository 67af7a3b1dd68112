"""The benchmarks measure what they say: the official way gives our masks with more encodes, and sums are right."""

import json
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from sa2va import Sa2VAChatConfig
from sa2va.benchmarks import batch
from sa2va.benchmarks.memory import estimate
from sa2va.benchmarks.speed import (
    Answering,
    build_model,
    draw_frames,
    measure_part,
    parse_arguments,
    row,
    run_case,
    write_media,
)
from sa2va.benchmarks.stages import Stages, median_ratio, replay

RELEASED = Path(__file__).parent / "released"


@pytest.fixture(scope="module")
def model():
    return build_model("small", "cpu", "float32")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_media(tmp_path_factory.mktemp("clip"), 8, (128, 128))


@pytest.mark.parametrize(("num_objects", "encodes"), [(1, 13), (3, 39)])
def test_the_official_way_gives_our_masks_with_more_encodes(model, clip, num_objects, encodes):
    asked = Answering(model, clip, is_video=True, num_objects=num_objects)
    with Stages(model) as ours:
        expected = asked.ours()
    with Stages(model) as official:
        found = asked.official()
    assert len(found) == num_objects
    np.testing.assert_array_equal(found, expected)
    assert (ours.counts["frames_encoded"], official.counts["frames_encoded"]) == (8, encodes)


def test_the_floor_replays_every_network_call_of_an_answer_once(model, clip):
    asked = Answering(model, clip, is_video=True, num_objects=1)
    with Stages(model, record=math.inf) as recorded:
        asked.ours()
    with Stages(model) as replayed:
        assert replay(recorded, model.device) > 0
    assert recorded.counts == replayed.counts
    assert (replayed.counts["prefill"], replayed.counts["memory_attention"], replayed.counts["mask_decoder"]) == (
        1,
        3,
        8,
    )


def test_calls_that_are_kept_stand_for_the_others_of_their_kind(model, clip):
    with Stages(model, record=2) as recorded:
        Answering(model, clip, is_video=True, num_objects=1).ours()
    encoder = model.grounding_encoder.sam2_model.image_encoder
    kept = [call for call in recorded.calls if call.module is encoder]
    assert (len(kept), recorded.kinds[kept[0].kind]) == (2, 8)
    with Stages(model) as replayed:
        seconds = replay(recorded, model.device)
    assert replayed.counts["frames_encoded"] == 2
    assert seconds > 3 * replayed.seconds["sam2_encode"]  # eight calls, of which two were run


def test_stages_leave_nothing_behind(model, clip):
    processor = model.load_processor()
    before = dict(vars(processor))
    with Stages(model, processor) as stages:
        Answering(model, clip, is_video=True, num_objects=1).ours()
    assert min(stages.seconds[name] for name in ("preprocess", "vision_tower", "sam2_encode", "postprocess")) > 0
    assert vars(processor) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.vision_model.modules())


@pytest.mark.slow
def test_a_case_is_measured_in_a_process_of_its_own():
    options = parse_arguments(["--repeats", "2", "--seconds", "0", "--device", "cpu"])
    result = run_case(options, "small", 1, 3)
    assert [len(result[name]) for name in ("ours", "floor", "official")] == [2, 2, 2]
    assert sum(result["stages"].values()) - result["stages"]["read"] == pytest.approx(result["ours"][0])
    assert row(result)[:3] == ("small", "1", "3")
    assert result["encodes"] == {"ours": 1, "official": 3}


def test_an_answer_can_be_taken_in_parts_that_are_added_up(model, clip, tmp_path):
    options = parse_arguments(["--frames", "8", "--objects", "2", "--state", str(tmp_path / "state"), "--minutes", "0"])
    asked = Answering(model, clip, is_video=True, num_objects=2)
    parts = [measure_part(asked, options) for _ in range(9)]
    assert [part["next_frame"] for part in parts] == [1, 2, 3, 4, 5, 6, 7, 8, None]
    assert [part["encodes"]["ours"] for part in parts] == [5, 5, 5, 5, 5, 6, 7, 8, 8]  # key frames first
    for part in parts:
        assert sum(part["stages"].values()) == pytest.approx(part["ours"][0])
    tracked = [part["floor"] for part in parts[4:8]]  # what key frames took is in the first part
    assert all(before < after for before, after in pairwise(tracked))
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize(
    "cases", [["--frames", "1"], ["--frames", "8", "64"], ["--frames", "8", "--objects", "1", "3"]]
)
def test_only_a_single_video_can_be_taken_in_parts(tmp_path, capsys, cases):
    with pytest.raises(SystemExit):
        parse_arguments(["--objects", "1", "--state", str(tmp_path / "state"), *cases])
    assert "--state takes one case" in capsys.readouterr().err


def test_frames_of_a_benchmark_move():
    first, *_, last = draw_frames(8, (128, 128))
    assert (first != last).any()


def test_memory_is_the_sum_of_weights_cache_activations_and_tracking():
    described = json.loads((RELEASED / "ByteDance--Sa2VA-4B.json").read_text())
    found = estimate(Sa2VAChatConfig(**described["config"]), frames=5, objects=3)
    assert found.weights == pytest.approx(7.88e9, rel=1e-3)  # 3.94 billion parameters in 16 bits
    assert found.tokens == 5 * 256 + 100
    assert found.cache == 2 * 36 * 2 * 128 * (found.tokens + 256) * 2  # keys and values, layers, heads, width, bytes
    assert found.total == found.weights + found.cache + found.activations + found.tracking


def test_tracking_grows_with_objects_and_an_image_tracks_nothing():
    config = Sa2VAChatConfig()
    with torch.device("meta"):
        image, one, eight = (estimate(config, *case) for case in ((None, 1), (5, 1), (5, 8)))
    assert image.tracking == 0 < one.tracking < eight.tracking


def test_batches_are_measured_beside_samples_one_by_one(model):
    rows = batch.measure(model, batch.make_samples(3), batch_sizes=[3], repeats=2)
    assert [(row["way"], row["different"], len(row["per_second"])) for row in rows] == [("one by one", 0, 2), (3, 0, 2)]
    assert batch.format_table(rows).splitlines()[2].endswith("| 1.00 | 0 |")


def test_a_ratio_is_taken_of_what_was_measured_side_by_side():
    assert median_ratio([1.0, 9.0, 2.0], [2.0, 9.0, 4.0]) == 0.5

"""The general harness: what counts in each data set, predictions that survive stops, and what a run leaves behind."""

import functools
import io
import json
import re
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import PartialState, debug_launcher
from PIL import Image

from sa2va.data.export_scenes import export_scenes
from sa2va.data.registry import open_dataset
from sa2va.data.samples import ObjectMasks
from sa2va.evaluation import run, scenes
from sa2va.evaluation.predict import Predictions, answer_sample, subset
from sa2va.evaluation.protocols import measure_sample, protocol_of
from sa2va.evaluation.report import worst, worst_page
from sa2va.evaluation.submissions import write_submission
from sa2va.processing_sa2va import masks_to_rle

EXAMPLES = Path(__file__).parents[1] / "data" / "examples"
SPLITS = {
    "refcoco": "val",
    "refcocog": "val",
    "grefcoco": "val",
    "reasonseg": "val",
    "finetune": "val",
    "mevis": "valid_u",
    "revos": "valid",
    "ref_davis17": "val",
    "ref_sav": "valid",
    "gcg": "val",
}


@functools.cache
def samples_of(data, split=None):
    dataset = open_dataset(data, EXAMPLES / data, split or SPLITS[data])
    return [dataset[index] for index in range(len(dataset))]


def record_of(sample, answers):
    """A line of predictions: for each turn the masks, bool [frames, h, w], of its `[SEG]`."""
    turns = [
        {
            "question": turn.question,
            "prediction": " ".join(["[SEG]"] * len(masks)) or "Nothing.",
            "phrases": sample.info.get("phrases", ["it"] * len(masks))[: len(masks)],
            "masks": [masks_to_rle(mask) for mask in masks],
            "scores": [{"iou": [1.0] * len(mask), "object": [1.0] * len(mask)} for mask in masks],
        }
        for turn, masks in zip(sample.turns, answers, strict=True)
    ]
    size, frames = sample.media.size(), len(sample.media)
    return {"id": sample.id, "size": list(size), "frames": frames, "turns": turns, "seconds": 0.0}


def true_masks(sample):
    size, frames = sample.media.size(), range(len(sample.media))
    return [[thing.read(frames, size) for thing in turn.objects] for turn in sample.turns]


def scores_of(data, answer=true_masks, merge="official", split=None, metric=None):
    """The scores of a data set's example, answered by a function of the sample."""
    protocol = protocol_of(data, metric)
    records = [(sample, record_of(sample, answer(sample))) for sample in samples_of(data, split)]
    measurements = [item for sample, record in records for item in measure_sample(protocol, sample, record, merge)]
    return protocol.summarize(measurements)


# ---------- protocols


@pytest.mark.parametrize("data", SPLITS)
def test_the_truth_gets_full_marks(data, monkeypatch):
    monkeypatch.setenv("PATH", "")  # no Java: words are tested elsewhere
    scores = scores_of(data)
    scores.pop("caption", None)
    assert scores
    for group in scores.values():
        assert {name: score for name, score in group.items() if score is not None} == dict.fromkeys(
            [name for name, score in group.items() if score is not None], 1.0
        )


def test_nothing_found_is_right_only_where_nothing_is_meant():
    scores = scores_of("grefcoco", lambda sample: [[] for _ in sample.turns])["all"]
    assert (scores["n_acc"], scores["t_acc"], scores["ciou"], scores["pr@0.5"]) == (1, 0, 0, 0)
    assert scores["giou"] == pytest.approx(1 / 3)  # one expression of three


def test_objects_of_a_turn_and_masks_of_an_answer_are_joined():
    sample = samples_of("refcoco")[0]
    mask = true_masks(sample)[0][0]
    left = np.zeros_like(mask)
    left[..., : mask.any((0, 1)).argmax() + 3] = True  # its first columns
    record = record_of(sample, [[mask & left, mask & ~left]])
    assert measure_sample(protocol_of("refcoco"), sample, record)[0].quality == 1


def test_of_a_videos_answer_the_first_mask_counts_unless_all_are_asked_for():
    sample = samples_of("mevis")[0]
    mask = true_masks(sample)[0][0]
    record = record_of(sample, [[mask, ~mask]])
    official, union = (measure_sample(protocol_of("mevis"), sample, record, m)[0] for m in ("official", "union"))
    assert official.quality == 1 > union.quality


def test_areas_to_be_ignored_do_not_count():
    (sample,) = samples_of("reasonseg")
    mask, ignored = true_masks(sample)[0][0], sample.info["ignore"].read([0], sample.media.size())
    assert ignored.any()
    record = record_of(sample, [[mask | ignored]])
    assert measure_sample(protocol_of("reasonseg"), sample, record)[0].quality == 1


def test_frames_that_nobody_labelled_do_not_count():
    sample = samples_of("mevis")[0]
    turn = sample.turns[0]
    labelled = ObjectMasks({0: turn.objects[0].frames[0]}, annotated=frozenset({0}))
    sample = replace(sample, turns=(replace(turn, objects=(labelled,)),))
    mask = np.ones((len(sample.media), *sample.media.size()), dtype=bool)
    mask[0] = true_masks(sample)[0][0][0]
    assert measure_sample(protocol_of("mevis"), sample, record_of(sample, [[mask]]))[0].quality == 1


def test_a_turn_without_a_frame_that_counts_is_left_out_and_told(heard):
    sample = samples_of("mevis")[0]
    turn = sample.turns[0]
    apart = [replace(thing, annotated=frozenset({frame})) for frame, thing in enumerate(turn.objects * 2)]
    sample = replace(sample, turns=(replace(turn, objects=tuple(apart)),))
    assert measure_sample(protocol_of("mevis"), sample, record_of(sample, true_masks(sample))) == []
    assert "no frame has all its objects annotated" in heard[-1]


@pytest.mark.parametrize(("data", "key"), [("refcoco", "ignore"), ("mevis", "foreground")])
def test_what_is_noted_beside_a_sample_may_have_any_name(data, key):
    sample = samples_of(data)[0]
    sample = replace(sample, info={**sample.info, key: True})
    assert measure_sample(protocol_of(data), sample, record_of(sample, true_masks(sample)))[0].quality == 1


def test_overall_is_the_mean_of_two_kinds_however_many_expressions_they_have():
    found = {"referring": true_masks, "reasoning": lambda sample: [[] for _ in sample.turns]}
    scores = scores_of("revos", lambda sample: found.get(sample.info["kind"], true_masks)(sample))
    assert scores["referring"]["j"] == scores["hallucination"]["j"] == 1
    assert scores["overall"]["j"] == pytest.approx((1 + scores["reasoning"]["j"]) / 2)


@pytest.mark.parametrize(("data", "group"), [("revos", "all"), ("ref_sav", "all"), ("ref_davis17", "per expression")])
def test_training_splits_which_join_all_expressions_have_scores_too(data, group):
    scores = scores_of(data, split="train")
    assert list(scores) == [group] and scores[group]["j_and_f"] == 1


@pytest.mark.parametrize("data", ["revos", "ref_sav"])
def test_nothing_measured_has_no_scores(data):
    assert protocol_of(data).summarize([]) == {}


def test_ones_own_data_may_call_anything_a_kind():
    assert any(isinstance(sample.info.get("kind"), list) for sample in samples_of("jsonl", "train"))
    scores = scores_of("jsonl", merge="union", split="train", metric="video")
    assert list(scores) == ["all"] and scores["all"]["j_and_f"] == 1


def test_what_is_no_scene_is_told():
    with pytest.raises(ValueError, match=r"no scene of data/export_scenes\.py"):
        scores_of("jsonl", split="train", metric="scenes")


def test_official_davis_forgives_expressions_that_find_each_others_object():
    others = {}  # object -> the next one, of the same annotator
    samples = {(s.info["annotator"], int(s.info["object_id"])): s for s in samples_of("ref_davis17")}
    count = max(number for _, number in samples)
    for (annotator, number), sample in samples.items():
        others[sample.id] = samples[annotator, number % count + 1]
    scores = scores_of("ref_davis17", lambda sample: true_masks(others[sample.id]))
    assert scores["official"]["j_and_f"] == 1 > scores["per expression"]["j_and_f"]


def test_official_davis_leaves_out_videos_that_lack_an_annotator():
    protocol = protocol_of("ref_davis17")
    drawn = [sample for sample in samples_of("ref_davis17") if sample.info["annotator"] < 3]
    records = [(sample, record_of(sample, true_masks(sample))) for sample in drawn]
    scores = protocol.summarize([item for pair in records for item in measure_sample(protocol, *pair)])
    assert set(scores) == {"per expression"}


def test_data_sets_without_metric_and_unknown_metrics_are_named():
    with pytest.raises(ValueError, match="no metric for 'llava'"):
        protocol_of("llava")
    with pytest.raises(ValueError, match="referring, generalized"):
        protocol_of("refcoco", "accuracy")


def test_the_truth_that_a_server_keeps_is_not_scored():
    sample = samples_of("mevis", "valid")[0]
    assert measure_sample(protocol_of("mevis"), sample, record_of(sample, [[]])) == []


# ---------- submissions


@pytest.mark.parametrize("data, folder", [("mevis", ""), ("ref_youtube_vos", "Annotations/")])
def test_submissions_have_the_servers_layout(data, folder, tmp_path):
    samples = samples_of(data, "valid")
    shape = len(samples[0].media), *samples[0].media.size()
    found = np.zeros(shape, dtype=bool)
    found[:, :4] = True
    answers = {sample.id: record_of(sample, [[found] if index else []]) for index, sample in enumerate(samples)}
    assert write_submission(tmp_path / "all.zip", data, samples, answers, "official") == len(samples)
    with zipfile.ZipFile(tmp_path / "all.zip") as archive:
        wanted = [f"{folder}{s.info['video']}/{s.info['expression_id']}/{t:05}.png" for s in samples for t in range(6)]
        assert archive.namelist() == wanted
        first, last = (np.array(Image.open(io.BytesIO(archive.read(name)))) for name in (wanted[0], wanted[-1]))
    assert first.dtype == last.dtype == np.uint8 and first.max() == 0
    assert (last == 255 * found[-1]).all()


def test_a_submission_must_be_complete(tmp_path):
    with pytest.raises(ValueError, match="has no prediction"):
        write_submission(tmp_path / "all.zip", "mevis", samples_of("mevis", "valid"), {}, "official")
    assert not list(tmp_path.iterdir())


# ---------- draws and pages


def test_a_limit_draws_samples_that_the_seed_names():
    assert subset(50, 5, seed=1) == subset(50, 5, seed=1) == sorted(subset(50, 5, seed=1))
    assert subset(50, 5, seed=1) != subset(50, 5, seed=2)
    assert set(subset(50, 5, seed=1)) < set(subset(50, 9, seed=1))
    assert subset(3, None, seed=0) == subset(3, 9, seed=0) == [0, 1, 2]
    with pytest.raises(ValueError, match=">= 1, got 0"):
        subset(3, 0, seed=0)


@pytest.mark.parametrize("data", ["refcoco", "mevis"])
def test_the_page_of_the_worst_is_one_file_with_pictures_in_it(data):
    pairs = [(sample, record_of(sample, [[]])) for sample in samples_of(data)[:3]]
    pairs[1] = pairs[1][0], record_of(pairs[1][0], true_masks(pairs[1][0]))
    measured = [measure_sample(protocol_of(data), *pair)[0] for pair in pairs]
    bad = worst(measured, 2)
    assert {item.sample_id for item in bad} == {pairs[0][0].id, pairs[2][0].id}
    assert bad[0].quality <= bad[1].quality < measured[1].quality
    page = worst_page("a <title>", [(measured[0], *pairs[0]), (measured[2], *pairs[2])])
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 2 * 2 * (4 if data == "mevis" else 1)
    assert all(source.startswith("data:image/jpeg;base64,") for source in sources)
    assert "a &lt;title&gt;" in page and "href" not in page


# ---------- the whole run


@pytest.fixture(scope="module")
def tiny():
    return scenes.load("sa2va-tiny", "cpu")


@pytest.fixture
def command(tiny, monkeypatch):
    """The command line, with one checkpoint for all."""
    monkeypatch.setattr(run, "load_model", lambda *_: tiny[0])

    def call(data, output, *more, split="val", root=None):
        place = ["--data", data, "--root", str(root or EXAMPLES / data), "--split", split, "--output", str(output)]
        return run.main([*place, "--device", "cpu", "--max_new_tokens", "128", *more])

    return call


def result_of(output):
    return json.loads((output / "scores.json").read_text())


def test_scenes_get_the_scores_of_their_own_evaluation(tiny, command, tmp_path):
    options = {"seed": 1, "count": 2, "num_frames": 4}
    export_scenes(out=tmp_path, **options)
    assert command("jsonl", tmp_path / "out", "--metric", "scenes", split="test", root=tmp_path) == 0
    wanted = scenes.evaluate(*tiny, **options)
    details = wanted["details"].items()
    everything = wanted["scores"] | {f"{name}: {kind}": s for name, part in details for kind, s in part.items()}
    assert result_of(tmp_path / "out")["scores"] == everything


def test_a_run_tells_all_that_is_needed_to_repeat_it(command, tmp_path, capsys):
    assert command("refcoco", tmp_path, "--limit", "2", "--seed", "3") == 0
    result = result_of(tmp_path)
    assert result["samples"] == {"data_set": len(samples_of("refcoco")), "drawn": 2, "predicted": 2}
    wanted = {"data": "refcoco", "split": "val", "limit": 2, "seed": 3, "max_new_tokens": 128, "merge": "official"}
    assert wanted.items() <= result["settings"].items() and result["settings"]["model"].endswith("sa2va-tiny")
    assert result["predictions_made_with"]["dtype"] == "float32"
    assert result["scored_with"]["code"]["sa2va"] and result["scored_with"]["libraries"]["torch"]
    printed = capsys.readouterr().out
    assert "ciou" in printed and f"{result['scores']['all']['ciou']:.2f}" in printed
    assert (tmp_path / "worst.html").read_text().count("<section>") == 2


def test_predictions_are_kept_and_torn_lines_made_again(command, tmp_path):
    command("refcoco", tmp_path, "--limit", "2")
    file = tmp_path / "predictions" / "process-0.jsonl"
    first, second = file.read_text().splitlines()
    known = json.dumps(json.loads(first) | {"seconds": 1234.5})
    file.write_text(f"{known}\n{second[:200]}")
    assert len(Predictions(file.parent)) == 1
    command("refcoco", tmp_path, "--limit", "2")
    again = file.read_text().splitlines()
    assert again[0] == known
    assert json.loads(again[1])["turns"] == json.loads(second)["turns"]


def test_scores_can_be_computed_again_without_a_model(command, tmp_path, monkeypatch):
    command("refcoco", tmp_path, "--limit", "2")
    before = result_of(tmp_path)
    monkeypatch.setattr(run, "load_model", None)
    assert command("refcoco", tmp_path, "--limit", "2", "--metrics-only", "--model", "elsewhere") == 0
    assert result_of(tmp_path)["scores"] == before["scores"]
    assert result_of(tmp_path)["settings"]["model"] == before["settings"]["model"]


def test_predictions_made_in_different_ways_are_not_mixed(command, tmp_path, capsys):
    command("refcoco", tmp_path, "--limit", "1")
    assert command("refcoco", tmp_path, "--limit", "1", "--num_frames", "3") == 2
    assert "num_frames None and not 3" in capsys.readouterr().err


def test_predictions_of_other_weights_data_or_questions_are_not_scored_as_these(command, tmp_path, capsys):
    root, model = tmp_path / "data", tmp_path / "model"
    shutil.copytree(EXAMPLES / "refcoco", root)
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"1")
    arguments = ("refcoco", tmp_path / "out", "--limit", "1", "--model", str(model))
    assert command(*arguments, root=root) == 0
    assert command(*arguments) == 2
    (model / "model.safetensors").write_bytes(b"22")
    assert command(*arguments, root=root) == 2
    errors = capsys.readouterr().err
    assert "predictions with root" in errors and "predictions with weights" in errors
    path = tmp_path / "out" / "predictions" / "process-0.jsonl"
    record = json.loads(path.read_text())
    record["turns"][0]["question"] = "Who?"
    path.write_text(json.dumps(record) + "\n")
    assert command(*arguments, "--metrics_only", root=root) == 2
    assert "its prediction answers 'Who?'" in capsys.readouterr().err
    record["media"] = "another"
    path.write_text(json.dumps(record) + "\n")
    assert command(*arguments, "--metrics_only", root=root) == 2
    assert "The picture of sample" in capsys.readouterr().err
    assert command(*arguments, "--metrics_only", root=root, split="train") == 2
    assert "predictions of split 'val'" in capsys.readouterr().err


def test_predictions_are_not_scored_as_those_of_pictures_that_took_their_place(command, tmp_path, capsys):
    root = shutil.copytree(EXAMPLES / "finetune", tmp_path / "data")
    items = json.loads((root / "annotations.json").read_text())
    same = [item | {"text": ["it"] * len(item["text"])} for item in items]
    (root / "annotations_val.json").write_text(json.dumps(same))
    assert command("finetune", tmp_path / "out", root=root) == 0
    (root / "annotations_val.json").write_text(json.dumps(same[::-1]))
    assert command("finetune", tmp_path / "out", root=root) == 2
    assert "The picture of sample" in capsys.readouterr().err


def test_a_metric_that_looks_at_what_the_data_lack_is_refused(command, tmp_path, capsys):
    assert command("refcoco", tmp_path, "--metric", "gcg") == 2
    assert "only 'gcg' has" in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_samples_without_a_prediction_are_told(command, tmp_path, capsys, heard):
    assert command("refcoco", tmp_path, "--limit", "2") == 0
    path = tmp_path / "predictions" / "process-0.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text(lines[0])
    assert command("refcoco", tmp_path, "--limit", "2", "--metrics_only") == 0
    assert "1 of 2 samples have no prediction" in heard[-1]
    path.write_text("")
    assert command("refcoco", tmp_path, "--limit", "2", "--metrics_only") == 0
    assert "no sample has a prediction" in capsys.readouterr().out


@pytest.mark.parametrize(
    "damage",
    [
        {"turns": None},
        {"turns": [{"prediction": None}]},
        {"turns": [{"prediction": "[SEG]", "masks": [[{"size": [2, 2], "counts": "zz"}]]}]},
        {"size": [3, 3]},
    ],
    ids=str,
)
def test_a_damaged_prediction_is_named(command, tmp_path, capsys, damage):
    assert command("refcoco", tmp_path, "--limit", "1") == 0
    path = tmp_path / "predictions" / "process-0.jsonl"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | damage) + "\n")
    assert command("refcoco", tmp_path, "--limit", "1", "--metrics_only") == 2
    assert f"prediction of sample {record['id']!r} is damaged" in capsys.readouterr().err


def test_predictions_that_nobody_says_how_they_were_made_are_not_added_to(command, tmp_path, capsys):
    assert command("refcoco", tmp_path, "--limit", "1") == 0
    (tmp_path / "settings.json").write_text("{")
    assert command("refcoco", tmp_path, "--limit", "1") == 2
    (tmp_path / "settings.json").unlink()
    assert command("refcoco", tmp_path, "--limit", "1") == 2
    errors = capsys.readouterr().err
    assert "settings.json' is damaged" in errors and "holds predictions, but no settings.json" in errors


def test_samples_of_one_id_and_pictures_that_are_missing_are_named(command, tmp_path, capsys):
    line = {"id": "a", "image": "none.png", "turns": [{"question": "Why?", "answer": "So."}]}
    for count, message in ((2, "Two samples have the id 'a'"), (1, "sample 'a': There is no image")):
        (tmp_path / "test.jsonl").write_text(f"{json.dumps(line)}\n" * count)
        assert command("jsonl", tmp_path / "out", split="test", root=tmp_path) == 2
        assert message in capsys.readouterr().err


def test_a_conversation_without_picture_is_scored_and_shown(command, tmp_path):
    line = {"turns": [{"question": "How many sides has a square?", "answer": "Four."}]}
    (tmp_path / "test.jsonl").write_text(f"{json.dumps(line)}\n")
    assert command("jsonl", tmp_path / "out", split="test", root=tmp_path) == 0
    assert "nothing to point at" in result_of(tmp_path / "out")["scores"]
    assert "How many sides" in (tmp_path / "out" / "worst.html").read_text()


def test_what_is_not_there_is_named(command, tmp_path, capsys):
    assert command("refcoco", tmp_path / "none", "--metrics_only") == 2
    assert command("refcoco", tmp_path, split="testZ") == 2
    errors = capsys.readouterr().err
    assert "without --metrics_only" in errors and "testZ" in errors


def test_a_split_whose_truth_is_kept_gives_a_submission(command, tmp_path, capsys):
    assert command("ref_youtube_vos", tmp_path, split="valid") == 0
    assert "not published" in capsys.readouterr().out
    assert (tmp_path / "submission.zip").is_file()


def test_turns_of_a_dialogue_hear_the_earlier_answers_and_others_do_not(tiny):
    (sample,) = [sample for sample in samples_of("jsonl", "train") if sample.info.get("task") == "followup"]
    alone, after = (answer_sample(*tiny, sample, dialogue=d, max_new_tokens=32)["turns"] for d in (False, True))
    assert alone[0] == after[0]
    assert alone[1] != after[1]


@pytest.mark.parametrize(
    "data, more, asked",
    [
        ("refcoco", [], "<image>\n Please segment"),
        ("mevis", [], "<image>\nPlease segment"),
        ("refcoco", ["--before", ""], "Please segment"),
        ("jsonl", [], ""),
    ],
)
def test_questions_stand_behind_the_picture_as_in_sa2vas_evaluation(tiny, tmp_path, monkeypatch, data, more, asked):
    """The released models were trained with the newline."""
    texts = []

    def noted(**given):
        texts.append(given["text"])
        return tiny[0].predict_forward(**given)

    model = SimpleNamespace(predict_forward=noted, load_processor=tiny[0].load_processor, device="cpu", dtype="float32")
    monkeypatch.setattr(run, "load_model", lambda *_: model)
    split = SPLITS.get(data, "train")
    place = ["--data", data, "--root", str(EXAMPLES / data), "--split", split, "--output", str(tmp_path)]
    assert run.main([*place, "--device", "cpu", "--max_new_tokens", "8", "--limit", "1", *more]) == 0
    assert texts[0].startswith(asked) and ("<image>" in texts[0]) == ("<image>" in asked)
    assert "<image>" not in (tmp_path / "predictions" / "process-0.jsonl").read_text()


def _one_of_two(tiny, output):
    PartialState._reset_state()  # this process was made by a fork
    run.load_model = lambda *_: tiny[0]
    place = ["--data", "refcoco", "--root", str(EXAMPLES / "refcoco"), "--output", str(output)]
    code = run.main([*place, "--device", "cpu", "--max_new_tokens", "128", "--limit", "3"])
    if code:
        raise RuntimeError(f"exit code {code}")


def test_two_processes_share_the_work_of_one(tiny, command, tmp_path):
    debug_launcher(_one_of_two, (tiny, tmp_path / "two"), num_processes=2)
    command("refcoco", tmp_path / "one", "--limit", "3")
    files = sorted((tmp_path / "two" / "predictions").iterdir())
    assert [len(file.read_text().splitlines()) for file in files] == [2, 1]
    assert result_of(tmp_path / "two")["scores"] == result_of(tmp_path / "one")["scores"]

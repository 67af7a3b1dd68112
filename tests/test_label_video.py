"""Labelling of videos: what each stage sees and says, what is rejected and why, and going on after a stop."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    AutoTokenizer,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from sa2va.data.registry import open_dataset
from sa2va.data.samples import MaskFile, Media, ObjectMasks, Sample, Turn
from sa2va.demo.media import video_writer
from sa2va.finetune import label_video
from sa2va.finetune.label_video import VIDEO_DATA, Target, label, targets_in_dataset, targets_in_folders

GOLDEN = Path(__file__).parent / "golden" / "qwen3vl"
EXAMPLES = Path(__file__).parents[1] / "data" / "examples"
SIZE = (48, 64)
FRAMES = 10
AGREE = "AGREE. Both say red square."
YELLOW, GREY = (255, 255, 0), (127, 127, 127)


class Scripted:
    """A model that says what stands in its script; remembers what it was asked."""

    def __init__(self, *answers):
        self.answers, self.prompts, self.pictures = list(answers), [], []

    def __call__(self, *question):
        *pictures, prompt = question
        self.pictures.append(pictures[0] if pictures else None)
        self.prompts.append(prompt)
        return self.answers.pop(0)


def square(index):
    """Mask of a square that grows until frame 6 and is away in frame 9."""
    mask = np.zeros(SIZE, dtype=bool)
    side = 8 + 2 * min(index, 12 - index)
    mask[10 : 10 + side, 4 + 2 * index : 4 + 2 * index + side] = index != 9
    return mask


def pixels(index):
    return np.where(square(index)[..., None], (200, 20, 20), (20, 60, 90)).astype(np.uint8)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """Folders "frames" and "masks" with one video: the square has value 3 and, up to frame 4, a dot has value 7."""
    root = tmp_path_factory.mktemp("clip")
    for folder in ("frames/car", "masks/car"):
        (root / folder).mkdir(parents=True)
    for index in range(FRAMES):
        Image.fromarray(pixels(index)).save(root / "frames" / "car" / f"{index}.png")
        labels = 3 * square(index).astype(np.uint8)
        labels[45, 60] = 7 if index <= 4 else 0
        Image.fromarray(labels).save(root / "masks" / "car" / f"{index}.png")
    return root


@pytest.fixture
def target(clip):
    return next(targets_in_folders(clip / "frames", clip / "masks"))


def has(picture, colour):
    return bool((np.asarray(picture) == colour).all(axis=-1).any())


# ---------- the stages


def test_each_stage_sees_its_pictures_and_what_was_said_before(target):
    see, read = Scripted("A red box.", "A red square.", "Left, on blue.", "It grows\n and leaves."), Scripted(AGREE)
    record = label(target, see, read)
    assert record["expression"] == "It grows and leaves." and record["rejected"] is None
    assert record["frame"] == 6 and [len(pictures) for pictures in see.pictures] == [1, 1, 1, 8]
    (crop,), (masked,), (scene,), shown = see.pictures
    assert crop.size == (26, 26) and not has(crop, YELLOW)  # a square of 20 and its margins
    assert has(masked, GREY) and not has(masked, (20, 60, 90)) and has(masked, (200, 20, 20))
    assert has(scene, YELLOW) and scene.size == SIZE[::-1]
    assert record["frames"] == [0, 1, 3, 4, 5, 6, 8, 9]
    assert [has(picture, YELLOW) for picture in shown] == [True] * 7 + [False]  # away in frame 9
    assert all(said in read.prompts[0] and said in see.prompts[2] for said in ("A red box.", "A red square."))
    assert "Left, on blue." in see.prompts[3] and "8 frames" in see.prompts[3]


REJECTED = {
    "conflict": (["a", "b"], ["Conflict: one is red."], "check", "one is red."),
    "no verdict": (["a", "b"], ["They agree, no doubt."], "check", "neither AGREE nor CONFLICT: They agree, no doubt."),
    "silence": (["a", " "], [], "object", "the model said nothing"),
    "only thoughts": (["a", "<think>Hm.</think>"], [], "object", "the model said nothing"),
    "endless thoughts": (["a", "b", "<think>Well"], [AGREE], "scene", "the model said nothing"),
    "contour": (["a", "b", "c", "The outlined car."], [AGREE], "video", "speaks of what was drawn"),
}


@pytest.mark.parametrize("case", REJECTED)
def test_rejected_objects_keep_what_was_said_and_the_reason(target, case):
    said, verdict, stage, reason = REJECTED[case]
    see, read = Scripted(*said), Scripted(*verdict)
    record = label(target, see, read)
    assert record["expression"] is None and record["crop"] == "a"
    assert record["rejected"]["stage"] == stage and record["rejected"]["reason"].startswith(reason)
    assert not see.answers and not read.answers


def test_thoughts_are_no_part_of_a_verdict(target):
    thinking = Scripted("<think>Do they CONFLICT? No.</think>\n\n**AGREE** - both say square.")
    record = label(target, Scripted("a", "b", "c", "d"), thinking)
    assert record["expression"] == "d" and record["check"] == "**AGREE** - both say square."


def test_small_objects_and_damaged_files_are_rejected_without_asking(clip, tmp_path):
    dot = list(targets_in_folders(clip / "frames", clip / "masks"))[1]
    record = label(dot, Scripted(), Scripted())
    assert record["rejected"] == {"stage": "object", "reason": "fills at most 0.0326% of a frame"}
    (tmp_path / "0.png").write_text("no picture")
    damaged = Target("x", Media((tmp_path / "0.png",), is_video=True), dot.masks)
    assert label(damaged, Scripted(), Scripted())["rejected"]["stage"] == "read"


def test_a_model_that_fails_is_no_rejection(target):
    def fails(*question):
        raise ValueError("too many pictures")

    with pytest.raises(ValueError, match="too many pictures"):
        label(target, fails, Scripted())


# ---------- where objects come from


def test_masks_in_folders_of_objects_and_a_video_file_are_the_same_object(clip, target, tmp_path):
    with video_writer(tmp_path / "videos" / "car.mp4", SIZE, 8) as write:
        for index in range(FRAMES):
            write(pixels(index))
    (tmp_path / "videos" / "car.v2.mp4").touch()  # another video
    for index in (0, 4, 8):  # as SA-V: every fourth frame is labelled
        path = tmp_path / "masks" / "car" / "000" / f"{index:05}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 * square(index).astype(np.uint8)).save(path)
    (other,) = targets_in_folders(tmp_path / "videos", tmp_path / "masks")
    assert (target.id, other.id) == ("car/3", "car/000")
    assert np.array_equal(other.masks.read([4], SIZE), target.masks.read([4], SIZE))
    record = label(other, Scripted("a", "b", "c", "d"), Scripted(AGREE))
    assert record["expression"] == "d" and record["frame"] in (4, 8) and record["frames"] == [0, 4, 8]


def test_a_damaged_mask_costs_its_video_only(clip, tmp_path, heard):
    for name in ("car", "van"):
        shutil.copytree(clip / "frames" / "car", tmp_path / "frames" / name)
        shutil.copytree(clip / "masks" / "car", tmp_path / "masks" / name)
    mask = tmp_path / "masks" / "car" / "0.png"
    mask.write_bytes(mask.read_bytes()[:60])
    found = list(targets_in_folders(tmp_path / "frames", tmp_path / "masks"))
    assert {target.id.partition("/")[0] for target in found} == {"van"}
    assert "car' are left out" in heard[-1]


def test_masks_without_a_video_or_frame_are_errors(clip, tmp_path):
    with pytest.raises(ValueError, match="0 videos of that name"):
        list(targets_in_folders(tmp_path, clip / "masks"))
    (tmp_path / "car").mkdir()
    with pytest.raises(ValueError, match="is a mask of no frame"):
        (tmp_path / "car" / "first.png").write_bytes((clip / "masks" / "car" / "0.png").read_bytes())
        list(targets_in_folders(clip / "frames", tmp_path))


def test_an_object_that_many_expressions_mean_is_described_once(clip):
    media = Media(tuple(sorted((clip / "frames" / "car").iterdir())), is_video=True)
    files = [MaskFile(clip / "masks" / "car" / "0.png", value) for value in (3, 7)]
    square, dot = (ObjectMasks({0: file}) for file in files)
    again, both = ObjectMasks({0: files[0]}), ObjectMasks({0: tuple(files)})
    samples = [
        Sample(f"s{number}", media, (Turn("?", None, objects),))
        for number, objects in enumerate([(square,), (again, dot), (both,), ()])
    ]
    assert [target.id for target in targets_in_dataset(samples)] == ["s0/0", "s1/1"]
    assert not list(targets_in_dataset([Sample("picture", Media(media.paths[:1]), (Turn("?", None, (square,)),))]))


@pytest.mark.parametrize("name", VIDEO_DATA)
def test_every_video_data_set_gives_objects_that_can_be_described(name):
    split = "valid" if name == "ref_davis17" else "train"
    options = {} if name == "jsonl" else {"one_per_expression": True}
    samples = open_dataset(name, EXAMPLES / name, split, **options)
    target = next(targets_in_dataset(samples[index] for index in range(len(samples))))
    assert label(target, Scripted("a", "b", "c", "d"), Scripted(AGREE))["expression"] == "d"


# ---------- what was found


def test_accepted_objects_become_training_data(clip, target, tmp_path):
    write = label_video.training_line(target, "a car", clip)
    (clip / "labels.jsonl").write_text(json.dumps(write) + "\n")
    (sample,) = open_dataset("jsonl", clip, "labels")
    (again,) = targets_in_dataset([sample])
    assert (sample.id, again.media.paths) == ("car/3", target.media.paths)
    assert sample.turns[0].question.endswith(": a car") and sample.turns[0].answer.count("[SEG]") == 1
    assert np.array_equal(again.masks.read(range(FRAMES), SIZE), target.masks.read(range(FRAMES), SIZE))
    assert 9 not in again.masks.frames and 9 in again.masks.annotated
    with pytest.raises(ValueError, match="is not below"):
        label_video.training_line(target, "a car", tmp_path)


def test_frames_of_a_video_file_are_numbered_as_in_the_file(clip, tmp_path):
    with video_writer(tmp_path / "car.mp4", SIZE, 8) as write:
        for index in range(FRAMES):
            write(pixels(index))
    every_fourth = ObjectMasks({1: MaskFile(clip / "masks" / "car" / "4.png", 3)})
    line = label_video.training_line(Target("x", Media((tmp_path / "car.mp4",), True, 4), every_fourth), "a", tmp_path)
    (entry,) = line["objects"]
    assert line["video"] == "car.mp4" and list(entry["masks"]) == [4] and entry["annotated"] == [0, 4, 8]


# ---------- the command


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of an untrained Qwen3-VL and an untrained Qwen2 that writes a few words."""
    seen, read = tmp_path_factory.mktemp("see"), tmp_path_factory.mktemp("read")
    torch.manual_seed(0)
    config = json.loads((GOLDEN / "config.json").read_text())
    names = ("vision_config", "text_config", "image_token_id", "video_token_id")
    names += ("vision_start_token_id", "vision_end_token_id")
    Qwen3VLForConditionalGeneration(Qwen3VLConfig(**{name: config[name] for name in names})).save_pretrained(seen)
    processor = AutoProcessor.from_pretrained(GOLDEN)
    processor.image_processor.size = {"shortest_edge": 32 * 32, "longest_edge": 64 * 64}
    processor.save_pretrained(seen)
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN)
    tiny = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    Qwen2ForCausalLM(Qwen2Config(**tiny, num_key_value_heads=2, vocab_size=len(tokenizer))).save_pretrained(read)
    tokenizer.save_pretrained(read)
    return str(seen), str(read)


@pytest.fixture
def run(clip, models, tmp_path):
    """Runs the command on the clip; gives its exit code and the output file."""

    def run(*options, models=models):
        output = tmp_path / "labels.jsonl"
        names = ["--captioner", models[0], "--checker", models[1], "--output", str(output), "--max-new-tokens", "4"]
        folders = ["--videos", str(clip / "frames"), "--masks", str(clip / "masks")]
        return label_video.main([*names, *folders, "--device-map", "cpu", *options]), output

    return run


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_models_given_by_folder_are_asked_and_every_object_gets_a_line(run, models, capsys):
    code, output = run()
    square, dot = lines_of(output)
    assert code == 0 and [square["id"], dot["id"]] == ["car/3", "car/7"]
    assert square["crop"] and square["masked"] and square["check"]  # four tokens of an untrained model
    assert square["rejected"]["stage"] == "check" and dot["rejected"]["stage"] == "object"
    assert [square["captioner"], square["checker"]] == list(models)
    assert f"0 expressions, 2 rejected: {output}" in capsys.readouterr().out


def test_a_captioner_sees_all_pictures_of_a_question(models, target):
    captioner = label_video.load_captioner(models[0], device_map="cpu", max_new_tokens=4)
    pictures = target.media.read([0, 3, 6])
    assert captioner(pictures, "What moves?") == captioner(pictures, "What moves?") != captioner(pictures[:1], "Why?")


def test_a_stopped_run_goes_on_after_its_last_whole_line(run):
    _, output = run("--limit", "1")
    (first,) = output.read_text().splitlines(keepends=True)
    output.write_text(first.replace('"frame": 6', '"frame": "kept"') + '{"id": "car/7", "med')
    assert run() == (0, output)
    square, dot = lines_of(output)
    assert square["frame"] == "kept" and dot["id"] == "car/7" and dot["rejected"]["stage"] == "object"


def test_lines_of_other_models_or_of_no_model_are_not_added_to(run, models, capsys):
    _, output = run("--limit", "1")
    line = json.loads(output.read_text())
    output.write_text(json.dumps(line | {"checker": "another"}) + "\n")
    assert run()[0] == 2 and "written with other models" in capsys.readouterr().err
    output.write_text("{}\n")
    assert run()[0] == 2 and "line 1: no record" in capsys.readouterr().err


def test_objects_of_a_data_set_are_labelled(models, tmp_path):
    output, train_file = tmp_path / "labels.jsonl", tmp_path / "train.jsonl"
    names = ["--captioner", models[0], "--checker", models[1], "--max-new-tokens", "4", "--output", str(output)]
    options = ["--data", "mevis", "--root", str(EXAMPLES / "mevis"), "--train-file", str(train_file)]
    assert label_video.main([*names, *options]) == 0
    records = lines_of(output)
    assert [record["id"] for record in records] == [f"clip/{number}/0" for number in range(4)]  # the fifth means two
    assert all(record["crop"] for record in records)
    assert train_file.read_text() == ""  # an untrained checker agrees to nothing


def test_wrong_calls_say_what_to_do(run, models, capsys):
    assert run(models=(models[1], models[1]))[0] == 2  # a text model can't see
    assert "error: " in capsys.readouterr().err
    names = ["--captioner", models[0], "--checker", models[1]]
    assert label_video.main([*names, "--data", "mevis"]) == 2
    assert "--data needs --root DIR too" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--limit=-1", "--num-frames=0", "--min-area=2", "--max-new-tokens=0"])
def test_impossible_numbers_are_refused_by_the_command_line(option, capsys):
    with pytest.raises(SystemExit, match="2"):
        label_video.main(["--captioner", "a", "--checker", "b", "--data", "mevis", option])
    assert option.partition("=")[0] in capsys.readouterr().err


def test_folders_are_looked_for_before_any_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(label_video, "load_captioner", None)  # would be called in vain
    folders = ["--videos", str(tmp_path / "clips"), "--masks", str(tmp_path)]
    assert label_video.main(["--captioner", "a", "--checker", "b", *folders]) == 2
    assert "There is no folder" in capsys.readouterr().err

"""The demo: what a user finds on the screen and in the output folder after asking about a good or a bad file."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from PIL import Image

from sa2va.demo import make_figure, make_samples, predict
from sa2va.demo.media import open_source, video_writer
from sa2va.demo.predict import main
from sa2va.finetune.tiny import build_model
from sa2va.processing_sa2va import open_video, rle_to_masks

IMAGE, VIDEO = make_samples.SAMPLES / "shapes.png", make_samples.SAMPLES / "shapes.mp4"
ANSWER = "Sure, it is the red star [SEG]."
PHRASE = "Sure, it is the red star"


@torch.no_grad()
def teach_to_say(model, tokenizer, answer):
    """Makes an untrained language model say `answer`, which has no token twice, to whatever it is asked.

    Its layers add nothing, so that the state at each token is the token's own embedding, and its head knows which
    token comes next.
    """
    for layer in model.language_model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    tokens = [tokenizer("assistant\n").input_ids[-1], *tokenizer(answer + tokenizer.eos_token).input_ids]
    states = model.language_model.model.norm(model.get_input_embeddings().weight[tokens])
    model.language_model.lm_head.weight.zero_()
    model.language_model.lm_head.weight[tokens[1:]] = states[:-1]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """Folder of a small model that answers `ANSWER` to everything; its masks are those of an untrained SAM 2."""
    model, processor = build_model(seed=0)
    teach_to_say(model, processor.tokenizer, ANSWER)
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def ask(checkpoint, tmp_path):
    """Runs the command on a file; gives its exit code and the output folder."""

    def run(path, *options, text="Please segment the red star."):
        output = tmp_path / "out"
        return main([str(path), text, "--model", str(checkpoint), "--output", str(output), *options]), output

    return run


def record_of(output, name):
    return json.loads((output / f"{name}.json").read_text())


def shape_of_masks(record):
    return [rle_to_masks(thing["rle"]).shape for thing in record["objects"]]


def pixels_of(path):
    return np.stack(list(open_source(path).frames)).astype(float)


def folder_of_frames(folder, sizes):
    folder.mkdir()
    for number, size in enumerate(sizes):
        Image.new("RGB", size, (40 * number, 90, 90)).save(folder / f"{number}.png")
    return folder


def test_answer_is_printed_without_its_end_mark(ask, capsys):
    code, _ = ask(IMAGE)
    assert code == 0
    assert capsys.readouterr().out.splitlines()[0] == ANSWER


def test_each_object_is_printed_with_phrase_scores_and_area(ask, capsys):
    ask(IMAGE)
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"  1. {PHRASE}: iou 0.")
    assert "object 0." in line
    assert " px (" in line


def test_image_gives_overlay_of_its_size(ask):
    _, output = ask(IMAGE)
    with Image.open(IMAGE) as given, Image.open(output / "shapes-image.png") as overlay:
        assert overlay.size == given.size


def test_image_gives_masks_of_its_size_as_rle(ask):
    _, output = ask(IMAGE)
    record = record_of(output, "shapes-image")
    assert record["prediction"] == f"{ANSWER}<|im_end|>"
    assert record["phrases"] == [PHRASE]
    assert record["size"] == [360, 480]
    assert shape_of_masks(record) == [(1, 360, 480)]
    assert rle_to_masks(record["objects"][0]["rle"]).sum() == record["objects"][0]["areas"][0]


def test_video_gives_mp4_with_all_frames_at_its_size_and_speed(ask):
    _, output = ask(VIDEO)
    frames = list(open_video(output / "shapes-video.mp4"))
    assert len(frames) == 24
    assert {frame.size for frame in frames} == {(240, 180)}
    capture = cv2.VideoCapture(str(output / "shapes-video.mp4"))
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(8)
    capture.release()


def test_video_gives_mask_and_scores_of_every_frame(ask, capsys):
    _, output = ask(VIDEO, "--num-frames", "3", "--frame-sampling", "uniform")
    record = record_of(output, "shapes-video")
    assert shape_of_masks(record) == [(24, 180, 240)]
    assert [len(values) for values in record["objects"][0]["scores"].values()] == [24, 24]
    assert "of 24 frames" in capsys.readouterr().out


def test_progress_of_a_video_goes_to_stderr(ask, capsys):
    ask(VIDEO)
    captured = capsys.readouterr()
    assert "24/24" in captured.err
    assert "24/24" not in captured.out


def test_json_option_prints_what_the_file_holds_and_nothing_else(ask, capsys):
    _, output = ask(IMAGE, "--json")
    assert json.loads(capsys.readouterr().out) == record_of(output, "shapes-image")


def test_nothing_but_the_results_is_left_in_the_output_folder(ask):
    ask(IMAGE)
    _, output = ask(VIDEO)
    names = {"shapes-image.png", "shapes-image.json", "shapes-video.mp4", "shapes-video.json"}
    assert {file.name for file in output.iterdir()} == names


def test_answer_without_objects_removes_the_overlay_of_the_last_one(ask, capsys):
    ask(IMAGE)
    code, output = ask(IMAGE, "--max-new-tokens", "2")
    assert code == 0
    assert {file.name for file in output.iterdir()} == {"shapes-image.json"}
    assert record_of(output, "shapes-image")["objects"] == []
    assert "points at nothing" in capsys.readouterr().out


def test_folder_of_frames_with_odd_and_mixed_sizes_is_a_video(ask, tmp_path):
    code, output = ask(folder_of_frames(tmp_path / "clip", [(65, 47), (64, 48), (80, 50)]))
    assert code == 0
    assert {frame.size for frame in open_video(output / "clip-video.mp4")} == {(66, 48)}
    assert shape_of_masks(record_of(output, "clip-video")) == [(3, 47, 65)]


def test_animated_gif_is_a_video_of_its_own_speed(ask, tmp_path):
    frames = [Image.new("RGB", (64, 48), (60 * number, 0, 0)) for number in range(4)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=200)
    _, output = ask(tmp_path / "a.gif")
    record = record_of(output, "a-video")
    assert record["fps"] == 5
    assert shape_of_masks(record) == [(4, 48, 64)]


def test_gif_of_one_frame_is_an_image(ask, tmp_path):
    Image.new("RGB", (64, 48)).save(tmp_path / "a.gif")
    _, output = ask(tmp_path / "a.gif")
    assert (output / "a-image.png").exists()


# file that can't be used -> what it holds (None: it isn't there) and what the user is told
BAD_FILES = {
    "missing.png": (None, "There is no file"),
    "notes.txt": (b"some words", "neither an image"),
    "broken.mp4": (VIDEO.read_bytes()[:9000], "neither an image"),
    "broken.png": (IMAGE.read_bytes()[:9000], "damaged image"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_unusable_file_is_told_and_nothing_is_written(ask, tmp_path, capsys, name):
    content, message = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code, output = ask(tmp_path / name)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert message in captured.err
    assert not output.exists()


BAD_WORDS = {
    "threshold": (["--threshold", "2"], "2 is no probability"),
    "threshold that is no number": (["--threshold", "nan"], "nan is no probability"),
    "no frames": (["--num-frames", "0"], "0 is too small"),
    "a frame before the first": (["--frame-sampling", "0,-1"], "-1 is too small"),
    "a sampling that is not known": (["--frame-sampling", "often"], "first, uniform or numbers"),
    "no words": (["--max-new-tokens", "0"], "0 is too small"),
}


@pytest.mark.parametrize("case", BAD_WORDS)
def test_a_wrong_command_line_is_told(ask, capsys, case):
    options, message = BAD_WORDS[case]
    with pytest.raises(SystemExit) as exit:
        ask(VIDEO, *options)
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


BAD_OPTIONS = {
    "frames beyond the end": (["--frame-sampling", "0,99"], "99"),
    "device": (["--device", "abacus"], "--device abacus"),
    "model": (["--model", "no-such-folder"], "no-such-folder"),
}


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_unusable_option_is_told_and_nothing_is_loaded_or_written(ask, capsys, monkeypatch, case):
    monkeypatch.setattr(predict, "AutoModel", None)
    options, message = BAD_OPTIONS[case]
    code, output = ask(VIDEO, *options)
    assert code == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


def test_empty_question_is_told(ask, capsys):
    code, _ = ask(IMAGE, text=" ")
    assert code == 2
    assert "says nothing" in capsys.readouterr().err


def test_video_that_fails_halfway_leaves_no_part_of_an_overlay(ask, tmp_path):
    clip = folder_of_frames(tmp_path / "clip", [(64, 48)] * 8)
    (clip / "7.png").write_bytes(b"no picture")
    code, output = ask(clip)
    assert code == 2
    assert list(output.iterdir()) == []


def test_shipped_samples_are_what_make_samples_draws(tmp_path):
    make_samples.write_samples(tmp_path)
    for name in ("shapes.png", "shapes.mp4"):
        drawn, shipped = (pixels_of(folder / name) for folder in (tmp_path, make_samples.SAMPLES))
        assert drawn.shape == shipped.shape
        assert np.abs(drawn - shipped).mean() < 3  # encoders differ


def test_figure_shows_the_answers_of_a_model(checkpoint, tmp_path):
    assert make_figure.main(["--model", str(checkpoint), "--output", str(tmp_path / "figure.png")]) == 0
    with Image.open(tmp_path / "figure.png") as figure:
        assert figure.width == make_figure.WIDTH


def test_figure_puts_the_phrase_of_a_mask_into_one_word():
    words = make_figure.words_of("<p> a red star </p> [SEG] , and a circle [SEG] .<|im_end|>")
    assert [(word.text, word.object_index) for word in words] == [
        ("a red star", 0), (",", None), ("and", None), ("a", None), ("circle", None), ("[SEG]", 1), (".", None),
    ]  # fmt: skip
    assert [word.text for word in words if word.glued] == [",", "."]


def test_output_never_replaces_the_file_asked_about(ask, tmp_path):
    (tmp_path / "out").mkdir()
    given = shutil.copy(IMAGE, tmp_path / "out" / "shapes.png")
    before = IMAGE.read_bytes()
    _, output = ask(given)
    assert (output / "shapes.png").read_bytes() == before
    assert (output / "shapes-image.png").exists()


def test_weights_go_straight_onto_a_gpu_and_onto_the_one_that_is_current(monkeypatch):
    """Else all stand in the computer's memory first; and a `cuda` without number is the first GPU to threads."""
    asked, empty = [], torch.empty

    class Loaded:
        def from_pretrained(self, name, **options):
            asked.append(options)
            return self

        def to(self, place):
            assert place == (asked[-1]["device_map"] or torch.device("cpu"))
            return self

        def eval(self):
            return self

    def as_on_the_second_of_two_gpus(size, device):
        number = {"cuda": 1, "cuda:0": 0}.get(device)
        return empty(size, device=device) if number is None else SimpleNamespace(device=torch.device("cuda", number))

    monkeypatch.setattr(predict, "AutoModel", Loaded())
    monkeypatch.setattr(torch, "empty", as_on_the_second_of_two_gpus)
    predict.load_model("me/model", "cpu")
    for found in (True, False):
        monkeypatch.setattr(torch.accelerator, "is_available", lambda found=found: found)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
        predict.load_model("me/model")
    predict.load_model("me/model", "cuda", "float16")
    predict.load_model("me/model", "cuda:0")
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    assert [options["device_map"] for options in asked] == [None, second, None, second, first]
    assert [options["dtype"] for options in asked] == ["float32", "auto", "float32", "float16", "auto"]


def test_a_bare_stream_of_jpegs_is_a_video(tmp_path):
    """To Pillow it is the first picture."""
    frames = [cv2.imencode(".jpg", np.full((32, 48, 3), 50 * number, np.uint8))[1] for number in range(4)]
    (tmp_path / "clip.mjpeg").write_bytes(b"".join(frame.tobytes() for frame in frames))
    source = open_source(tmp_path / "clip.mjpeg")
    assert source.is_video and len(list(source.frames)) == 4


def test_a_video_is_written_into_a_folder_named_by_the_time(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = Path("12:30:00", "clip.mp4")
    path.parent.mkdir()
    with video_writer(path, (32, 48), 8.0) as write:
        write(Image.new("RGB", (48, 32)))
    assert open_source(path).length == 1


def test_what_a_video_named_by_the_time_says_of_itself_is_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copy(VIDEO, "2024-05-01T12:30:00.mp4")
    assert open_source("2024-05-01T12:30:00.mp4").length == open_source(VIDEO).length == 24

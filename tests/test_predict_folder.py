"""The demo for folders: a line for every file, whatever the number of processes and stops."""

import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from accelerate import PartialState
from PIL import Image

from sa2va.demo import predict_folder
from sa2va.demo.make_samples import SAMPLES
from sa2va.demo.predict_folder import main
from sa2va.processing_sa2va import open_video

ROOT = Path(__file__).parents[1]
QUESTION = "Please segment the red star in this image."


@pytest.fixture
def folder(tmp_path):
    """Two pictures, a clip of three frames (an animation) and a file that is nothing, with a folder beside them."""
    folder = tmp_path / "in"
    (folder / "more").mkdir(parents=True)
    shutil.copy(SAMPLES / "shapes.png", folder / "b.png")
    Image.new("RGB", (40, 30), "red").save(folder / "d.jpg")
    frames = [frame for frame, _ in zip(open_video(SAMPLES / "shapes.mp4"), range(3), strict=False)]
    frames[0].save(folder / "a.gif", save_all=True, append_images=frames[1:])
    (folder / "c.mp4").write_text("no video")
    return folder


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_write_what_one_does(folder, tmp_path):
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    assert main([str(folder), QUESTION, "--output", str(one), "--device", "cpu"]) == 1
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    command = ["demo/predict_folder.py", str(folder), QUESTION, "--output", str(two), "--device", "cpu"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([*launch, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "c.mp4: " in done.stderr, done.stderr
    assert two.read_text() == one.read_text()
    records = lines_of(two)
    assert [record["file"] for record in records] == ["a.gif", "b.png", "c.mp4", "d.jpg"]
    assert "neither an image" in records[2]["error"]
    assert len(records[1]["objects"][0]["rle"]) == 1 and records[0]["fps"]
    assert not list(tmp_path.glob(".*"))


class OneOfTwo:
    """What a command asks of `PartialState` in one of two threads, which stand for processes."""

    num_processes, device = 2, "cpu"

    def __init__(self, index, barrier):
        self.process_index, self.is_main_process, self.barrier = index, index == 0, barrier

    def wait_for_everyone(self):
        self.barrier.wait(timeout=10)  # then it is broken

    @contextmanager
    def main_process_first(self):
        yield from PartialState._goes_first(self, self.is_main_process)


@pytest.mark.parametrize("done", [0, 2, 3, 4])
def test_a_process_without_files_waits_as_often_as_the_others(folder, tmp_path, monkeypatch, done):
    names, loaded = ["a.gif", "b.png", "c.mp4", "d.jpg"], []
    record = {"question": QUESTION, "prediction": "known"}
    output, barrier = tmp_path / "out.jsonl", threading.Barrier(2)
    output.write_text("".join(json.dumps({"file": name, **record}) + "\n" for name in names[:done]))
    monkeypatch.setattr(predict_folder, "load_model", lambda *_: loaded.append(1))
    monkeypatch.setattr(predict_folder, "_answer", lambda name, *_: {"file": name, **record})
    parsed = predict_folder._parser().parse_args([str(folder), QUESTION, "--output", str(output)])
    with ThreadPoolExecutor(2) as pool:
        runs = [pool.submit(predict_folder.run, parsed, OneOfTwo(index, barrier)) for index in (0, 1)]
    assert [run.result() for run in runs] == [[], []]
    assert len(loaded) == min(4 - done, 2)  # nobody loads a model for nothing
    assert [line["file"] for line in lines_of(output)] == names and not list(tmp_path.glob(".*"))


def test_files_with_an_answer_are_not_asked_again_and_failures_are(folder, tmp_path):
    output = tmp_path / "out.jsonl"
    known = [{"file": name, "question": QUESTION, "prediction": "known"} for name in ("a.gif", "d.jpg")]
    output.write_text("".join(json.dumps(record) + "\n" for record in known))
    stopped = {"file": "b.png", "question": QUESTION, "prediction": "from a process that was stopped"}
    (tmp_path / ".out.jsonl.7.part").write_text(json.dumps(stopped) + '\n{"file": "c.m')
    (folder / "c.mp4").unlink()
    assert main([str(folder), QUESTION, "--output", str(output)]) == 0
    assert lines_of(output) == [known[0], stopped, known[1]]
    failed = {"file": "d.jpg", "question": QUESTION, "error": "once"}
    output.write_text("".join(json.dumps(record) + "\n" for record in (known[0], stopped, failed)))
    assert main([str(folder), QUESTION, "--output", str(output)]) == 0
    assert lines_of(output)[2]["prediction"].endswith("<|im_end|>")


def test_an_answer_of_the_second_run_stays_whatever_process_failed_in_the_first(folder, tmp_path):
    """The file may have been mended meanwhile, and have gone to another process."""
    answer, failure = {"prediction": "of the second run"}, {"error": "of the first"}
    for process, found in ((0, answer), (1, failure)):
        part = tmp_path / f".out.jsonl.{process}.part"
        part.write_text(json.dumps({"file": "b.png", "question": QUESTION, **found}) + "\n")
    main([str(folder), QUESTION, "--output", str(tmp_path / "out.jsonl")])
    assert lines_of(tmp_path / "out.jsonl")[1]["prediction"] == "of the second run"


@pytest.mark.parametrize("option", [("--model", "elsewhere"), ("--threshold", "0.7"), ("--num-frames", "2")])
def test_answers_made_in_different_ways_are_not_mixed(folder, tmp_path, capsys, option):
    command = [str(folder), QUESTION, "--output", str(tmp_path / "out.jsonl")]
    main(command)
    assert main([*command, *option]) == 2
    assert "holds answers made with" in capsys.readouterr().err


def test_a_run_that_is_stopped_as_it_begins_keeps_all_answers(folder, tmp_path, monkeypatch):
    part = tmp_path / ".out.jsonl.0.part"
    part.write_text(json.dumps({"file": "b.png", "question": QUESTION, "prediction": "kept"}) + "\n")

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(predict_folder, "_answer", stop)
    with pytest.raises(KeyboardInterrupt):
        predict_folder.main([str(folder), QUESTION, "--output", str(tmp_path / "out.jsonl")])
    assert [record["prediction"] for record in lines_of(part)] == ["kept"]


@pytest.mark.parametrize("size", [300, 2000, 20000])
def test_a_damaged_animation_costs_no_other_file_its_answer(folder, tmp_path, size):
    (folder / "a.gif").write_bytes((folder / "a.gif").read_bytes()[:size])
    main([str(folder), QUESTION, "--output", str(tmp_path / "out.jsonl")])
    assert [record["file"] for record in lines_of(tmp_path / "out.jsonl")] == ["a.gif", "b.png", "c.mp4", "d.jpg"]


def test_an_output_may_have_any_name_and_other_runs_keep_their_parts(folder, tmp_path):
    (folder / "a.gif").unlink()
    (folder / "c.mp4").unlink()
    other = tmp_path / ".a.jsonl.0.part"
    other.write_text(json.dumps({"file": "e.png", "question": QUESTION, "prediction": "of a.jsonl"}) + "\n")
    for name in ("out[1].jsonl", "a"):
        assert main([str(folder), QUESTION, "--output", str(tmp_path / name)]) == 0
        assert [record["file"] for record in lines_of(tmp_path / name)] == ["b.png", "d.jpg"]
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".")] == [other]


def test_that_nothing_was_asked_is_told(folder, tmp_path, capsys):
    known = [
        {"file": name, "question": QUESTION, "prediction": "known"} for name in ("a.gif", "b.png", "c.mp4", "d.jpg")
    ]
    (tmp_path / "out.jsonl").write_text("".join(json.dumps(record) + "\n" for record in known))
    assert main([str(folder), QUESTION, "--output", str(tmp_path / "out.jsonl"), "--model", "elsewhere"]) == 0
    assert "an answer for every file" in capsys.readouterr().err


def test_results_of_another_question_are_not_touched(folder, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    output.write_text('{"file": "a.gif", "question": "Another?"}\n')
    assert main([str(folder), QUESTION, "--output", str(output)]) == 2
    assert "Another?" in capsys.readouterr().err and output.read_text() == '{"file": "a.gif", "question": "Another?"}\n'


@pytest.mark.parametrize("content", ["[1]\n", '{"question": "What?"}\n', "words\n", "\udcff\n"])
def test_a_file_of_something_else_is_not_touched(folder, tmp_path, capsys, content):
    output = tmp_path / "out.jsonl"
    output.write_text(content, errors="surrogateescape")
    assert main([str(folder), QUESTION, "--output", str(output)]) == 2
    assert "another --output" in capsys.readouterr().err
    assert output.read_text(errors="surrogateescape") == content


def test_a_link_that_leads_nowhere_gets_an_error_and_a_pipe_is_passed_over(folder, tmp_path):
    (folder / "e.png").symlink_to(tmp_path / "nowhere.png")
    os.mkfifo(folder / "f.png")
    assert main([str(folder), QUESTION, "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]) == 1
    found = {record["file"]: "error" in record for record in lines_of(tmp_path / "out.jsonl")}
    assert found == {"a.gif": False, "b.png": False, "c.mp4": True, "d.jpg": False, "e.png": True}


def test_an_empty_question_is_refused_before_the_model_is_loaded(folder, tmp_path, capsys):
    assert main([str(folder), " ", "--output", str(tmp_path / "out.jsonl"), "--device", "cpu"]) == 2
    assert "TEXT says nothing" in capsys.readouterr().err and not (tmp_path / "out.jsonl").exists()


def test_folders_without_files_are_named(tmp_path, capsys):
    for folder, message in ((tmp_path, "holds no files"), (tmp_path / "none", "no folder")):
        assert main([str(folder), QUESTION]) == 2
        assert message in capsys.readouterr().err

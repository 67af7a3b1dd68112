"""The `sa2va` command: it finds the commands, speaks for them, and its exit codes mean the same for all."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAR = ["demo/samples/shapes.png", "Please segment the red star in this image."]
WRONG = [
    [],
    ["nothing"],
    ["predict"],
    ["predict", "a.png", "?", "--nothing"],
    ["predict", *STAR, "--threshold", "2"],
    ["check"],
]


def load_command():
    """The package `sa2va_cli`, from this checkout even if another one is installed."""
    spec = importlib.util.spec_from_file_location("sa2va_cli", ROOT / "demo" / "cli" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


cli = load_command()


@pytest.fixture(autouse=True)
def in_checkout(monkeypatch):
    """As `sa2va` itself runs: from the checkout, and by no module's name (which Python 3.14 puts into the usage)."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", None)


def test_help_lists_the_commands_without_loading_the_model():
    code = (
        "import runpy, sys\n"
        "sys.argv = ['sa2va', '--help']\n"
        "try:\n"
        "    runpy.run_path('demo/cli/__init__.py', run_name='__main__')\n"
        "finally:\n"
        "    print(sorted({'torch', 'transformers', 'sa2va', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in cli.COMMANDS)
    assert done.stdout.endswith("[]\n")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_under_its_own_name(name, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main([name, "--model", "m", "--help"] if name == "train" else [name, "--help"])
    assert exit.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: sa2va {name} ")


@pytest.mark.parametrize("argv", WRONG)
def test_wrong_command_lines_are_told_by_2_and_the_right_name(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(argv)
    assert exit.value.code == 2
    name = " ".join(["sa2va", *[word for word in argv[:1] if word != "nothing"]])
    assert capsys.readouterr().err.startswith(f"usage: {name} ")


@pytest.fixture
def raising(tmp_path, monkeypatch):
    """A command whose `main` reports nothing itself; with a message of two lines."""
    (tmp_path / "raising.py").write_text("def main(argv):\n    raise OSError(f'There is no\\n  {argv[0]}')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(cli.COMMANDS, "raising", cli.Command("raising", None, "fails"))


@pytest.mark.usefixtures("raising")
@pytest.mark.parametrize("argv", [["predict", "no.png", "?"], ["check", "no-folder"], ["raising", "folder"]])
def test_failures_are_told_by_1_and_one_line(argv, capsys):
    assert cli.main(argv) == 1
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 1 and told[0].startswith("error: ") and "no" in told[0]


def test_predict_is_the_demo(tmp_path, capsys):
    assert cli.main(["predict", *STAR, "--output", str(tmp_path), "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["phrases"] == ["Sure, it is the red star"]
    assert record == json.loads((tmp_path / "shapes-image.json").read_text())


def test_check_is_that_of_hub_upload(capsys):
    assert cli.main(["check", "sa2va-tiny", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"]


def test_eval_prints_what_it_writes(tmp_path, capsys):
    words = ["--data", "refcoco", "--root", "data/examples/refcoco", "--split", "val", "--limit", "1", "--json"]
    assert cli.main(["eval", *words, "--output", str(tmp_path), "--device", "cpu"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert scores["scores"] and scores == json.loads((tmp_path / "scores.json").read_text())


def test_a_checkpoint_that_is_not_whole_is_a_failure(tmp_path, capsys):
    (tmp_path / "config.json").write_bytes((ROOT / "sa2va-tiny" / "config.json").read_bytes())
    assert cli.main(["check", str(tmp_path)]) == 1


def test_a_missing_package_is_told_with_the_extra_that_has_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tqdm", None)  # as if it were not installed
    monkeypatch.delitem(sys.modules, "sa2va.demo.predict", raising=False)
    assert cli.main(["predict", *STAR]) == 1
    assert "tqdm" in (told := capsys.readouterr().err) and 'pip install "sa2va[demo]"' in told


def test_the_process_keeps_its_own_command_line():
    before = list(sys.argv)
    cli.main(["check", "no-folder"])
    assert sys.argv == before

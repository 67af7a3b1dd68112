"""The notebook: clean in git, true to docs/checkpoints.md, and every cell runs on a CPU."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from hub_server import running_hub
from nbclient import NotebookClient
from safetensors.torch import load_file

from sa2va import hub_upload

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "demo" / "sa2va_colab.ipynb"


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def rows_of(text):
    """The cells of the tables in Markdown."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]


def test_it_is_valid_and_holds_no_outputs(notebook):
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert code and not any(cell.outputs or cell.execution_count for cell in code)


def test_memory_is_computed_from_the_numbers_of_parameters(notebook):
    known = {row[0]: row[1] for row in rows_of((ROOT / "docs" / "checkpoints.md").read_text()) if len(row) > 2}
    (table,) = [cell.source for cell in notebook.cells if "16 bits" in cell.source and cell.cell_type == "markdown"]
    rows = [row for row in rows_of(table) if row[0].startswith("ByteDance/")]
    assert len(rows) == 10
    for name, parameters, half, full, _ in rows:
        assert parameters == known[name]
        billions = float(re.sub("[~ B]", "", parameters))
        assert (half, full) == (f"{2 * billions:.1f} GB", f"{4 * billions:.1f} GB"), name


@pytest.mark.parametrize("is_colab", [True, False])
def test_colabs_torchao_goes(notebook, monkeypatch, is_colab):
    """peft raises ImportError for every adapter where a torchao older than 0.16 is installed, as it is there."""
    (install,) = [cell.source for cell in notebook.cells if '"install"' in cell.source and cell.cell_type == "code"]
    ran = []
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(subprocess, "run", lambda words, check: ran.append(words))
    if is_colab:
        monkeypatch.setitem(sys.modules, "google.colab", None)
    with pytest.raises(ValueError, match="REPOSITORY"):  # nobody knows yet where this will be
        exec(install, {})
    exec(install.replace("com/OWNER", "com/somebody"), {})
    assert [words[-1] for words in ran] == ["sa2va", "./sa2va[demo,train]", *["torchao"] * is_colab]
    assert not is_colab or "uninstall" in ran[-1]


@pytest.mark.slow
def test_every_cell_runs_on_a_cpu(notebook, tmp_path, monkeypatch):
    (pushing,) = [cell for cell in notebook.cells if "YOUR-NAME/" in cell.source and cell.cell_type == "code"]
    pushing.source = pushing.source.replace("YOUR-NAME/sa2va-mine", "me/sa2va-mine", 1)
    with running_hub() as hub:
        for name, value in {"CUDA_VISIBLE_DEVICES": "", "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me"}.items():
            monkeypatch.setenv(name, value)
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = [kind for output in shown for kind in output.get("data", ())]
    words = "".join(output.get("text", "") for output in shown)
    assert "it is the red star [SEG]" in words and "Region1 is a red star" in words
    assert kinds.count("image/png") >= 5
    assert any("<video" in output.get("data", {}).get("text/html", "") for output in shown)
    final, packed = tmp_path / "taught" / "final", tmp_path / "packed"
    hub_upload.pack_checkpoint(tmp_path / "taught" / "adapter", packed, skip_test=True)
    learned, merged = (load_file(folder / "model.safetensors") for folder in (final, packed))
    assert learned.keys() == merged.keys()
    assert all(torch.allclose(learned[name].float(), merged[name].float(), atol=1e-5) for name in learned)
    repo = hub.repos["model", "me/sa2va-mine"]
    assert repo.private and repo.history() == ["Upload Sa2VA", "initial commit"]
    assert {"model.safetensors", "modeling_sa2va.py", "README.md"} <= repo.at().files.keys()

"""The README's Python snippets run, in order, on the small checkpoint."""

import re
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SNIPPETS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


@pytest.fixture(scope="module")
def namespace():
    """What earlier snippets defined."""
    return {}


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_snippet_runs(number, namespace, monkeypatch):
    monkeypatch.chdir(ROOT)
    snippet = SNIPPETS[number].replace("ByteDance/Sa2VA-4B", "sa2va-tiny")
    exec(compile(snippet, f"README.md, snippet {number + 1}", "exec"), namespace)
    if number == 0:  # the promise of the first one: a mask for the object it asks for
        assert [mask.shape for mask in namespace["masks"]] == [(1, 360, 480)]


def test_the_example_of_the_small_checkpoints_card_finds_its_circle(monkeypatch):
    monkeypatch.chdir(ROOT)
    (snippet,) = re.findall(r"```python\n(.*?)```", (ROOT / "sa2va-tiny" / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(compile(snippet, "sa2va-tiny/README.md", "exec"), names)
    circle = (np.asarray(names["picture"]) == (255, 0, 0)).all(axis=-1)
    ((mask,),) = names["masks"]
    assert (mask & circle).sum() > 0.9 * (mask | circle).sum()


def test_every_local_file_the_readme_names_exists():
    text = (ROOT / "README.md").read_text()
    for name in set(re.findall(r"(?:demo|docs|finetune|evaluation|data|tests)/[\w./-]+\.(?:py|png|mp4)", text)):
        assert (ROOT / name).exists(), name

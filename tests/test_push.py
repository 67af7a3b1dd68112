"""`hub_upload.py push` and `push_to_hub` against a Hub on localhost, driven by the real client."""

import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hub_server import Blob, Fault, HubServer, running_hub
from huggingface_hub import HfApi
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from sa2va import hub_upload
from sa2va.hub_upload import CardFacts, CheckpointError, HubError, pack_checkpoint, push_checkpoint

ROOT = Path(__file__).parents[1]
TINY = ROOT / "sa2va-tiny"
COMMIT = r"POST /api/models/me/tiny/commit/"


@pytest.fixture
def hub(monkeypatch) -> HubServer:
    """An empty Hub, which is asked again without waiting."""
    monkeypatch.setattr(hub_upload, "FIRST_WAIT", 0.0)
    with running_hub() as server:
        yield server


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The small checkpoint as a model repository in three shards; it was tried out."""
    out = tmp_path_factory.mktemp("packed") / "tiny"
    report = pack_checkpoint(TINY, out, facts=CardFacts(license="apache-2.0", new_card=True), max_shard_size="5MB")
    assert report.tested and report.weights == "rewritten"
    return out


@pytest.fixture
def folder(packed, tmp_path) -> Path:
    """A copy of the packed checkpoint, to be changed."""
    return shutil.copytree(packed, tmp_path / "tiny")


def push(source, hub, repo_id="me/tiny", token="hf_me", **options):
    """Pushes to a Hub on localhost."""
    return push_checkpoint(source, repo_id, token=token, endpoint=hub.url, **{"skip_test": True, **options})


def content(hub, path, repo_id="me/tiny", revision="main") -> bytes:
    """The bytes of a file on the Hub."""
    blob = hub.repos["model", repo_id].at(revision).files[path]
    return hub.store[blob.sha256] if blob.content is None else blob.content


def holds(hub, folder, repo_id="me/tiny", revision="main") -> bool:
    """Whether a repository has the files of a folder, the card aside, with their bytes, and no other weights."""
    names = {path.name for path in folder.iterdir()} - {"README.md"}
    there = hub.repos["model", repo_id].at(revision).files
    return names | {"README.md"} == there.keys() - {".gitattributes"} and all(
        content(hub, name, repo_id, revision) == (folder / name).read_bytes() for name in names
    )


def test_everything_arrives_in_one_commit(hub, packed):
    report = push(packed, hub, tag="v1")
    repo = hub.repos["model", "me/tiny"]
    assert holds(hub, packed) and repo.history() == ["Upload Sa2VA", "initial commit"]
    assert repo.tags == {"v1": report.commit} and report.url == f"{hub.url}/me/tiny/commit/{report.commit}"
    assert b'from_pretrained("me/tiny"' in content(hub, "README.md")
    assert report.creates and not report.deleted and set(report.uploaded) == set(report.files)


def test_nothing_is_sent_twice(hub, packed):
    first = push(packed, hub, tag="v1")
    sent = hub.count("PUT /store/")
    again = push(packed, hub, tag="v1")
    assert again.commit == first.commit and again.uploaded == () and not again.creates
    assert hub.count("PUT /store/") == sent == 3 and hub.count(COMMIT) == 1


def test_only_what_changed_is_sent_and_what_it_replaces_goes(hub, folder):
    repo = hub.add_repo(
        "me/tiny",
        files={
            "config.json": b'{"model_type": "sa2va_chat"}',
            "modeling_sa2va_chat.py": b"",
            "model.safetensors": b"old",
            "pytorch_model.bin": b"",
            "notes.md": b"mine",
        },
    )
    report = push(folder, hub)
    assert set(report.deleted) == {"modeling_sa2va_chat.py", "model.safetensors", "pytorch_model.bin"}
    assert "notes.md" in repo.at().files and not set(report.deleted) & set(repo.at().files)
    (folder / "generation_config.json").write_text('{"use_cache": false}')
    assert push(folder, hub).uploaded == ("generation_config.json",)
    assert len(repo.history()) == 3


def test_a_dry_run_shows_everything_and_does_nothing(hub, folder):
    (folder / "optimizer.pt").write_bytes(b"state")
    (folder / "runs").mkdir()
    shown = []
    report = push(folder, hub, dry_run=True, show=shown.append)
    assert shown[0] == report and report.dry_run and report.left_out == ("optimizer.pt", "runs")
    assert "model-00001-of-00003.safetensors" in str(report) and "not uploaded     optimizer.pt" in str(report)
    assert hub.repos == {} and not hub.count("PUT") and report.url is None
    assert sum(report.files.values()) > 11e6


def test_a_card_that_somebody_changed_keeps_its_words_and_loads_what_was_pushed(hub, folder):
    text = (folder / "README.md").read_text().replace("# tiny", "# My own words, and tiny ones")
    (folder / "README.md").write_text(text)
    report = push(folder, hub)
    addressed = text.replace('from_pretrained("tiny"', 'from_pretrained("me/tiny"')
    addressed = addressed.replace("huggingface.co/tiny/", "huggingface.co/me/tiny/")
    assert report.card == "kept" and report.notes == () and text != addressed
    assert content(hub, "README.md").decode() == addressed


def test_what_a_card_lacks_is_told(hub, folder):
    (folder / "README.md").write_text(
        "---\nlibrary_name: transformers\n---\n# Mine\n`x.from_pretrained('other/one')`\n"
    )
    told = str(push(folder, hub, dry_run=True))
    assert "note: The card says nothing about license, pipeline_tag" in told
    assert "note: The card's examples load something else than me/tiny" in told


def test_a_card_that_somebody_changed_on_the_hub_stays(hub, packed):
    push(packed, hub)
    repo = hub.repos["model", "me/tiny"]
    repo.add("main", "Edit", {**repo.at().files, "README.md": Blob(6, b"# Mine")})
    report = push(packed, hub)
    assert report.card == "kept" and report.uploaded == () and content(hub, "README.md") == b"# Mine"
    assert "note: The card on the Hub was written or changed there, and stays" in str(report)


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer_config.json"])
def test_a_damaged_file_of_settings_is_not_sent(hub, folder, name):
    (folder / name).write_text("[]")
    with pytest.raises(CheckpointError, match=f"{name} is not a JSON object"):
        push(folder, hub)
    assert hub.repos == {}


def test_a_packed_folder_whose_weights_no_longer_fit_is_not_sent(hub, folder):
    file = folder / "model-00001-of-00003.safetensors"
    weights, index = load_file(file), folder / "model.safetensors.index.json"
    lost = next(iter(weights))
    del weights[lost]
    save_file(weights, file)
    values = json.loads(index.read_text())
    del values["weight_map"][lost]
    index.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=re.escape(lost)):
        push(folder, hub)
    assert hub.repos == {}


def test_weights_of_any_names_arrive_under_those_that_the_hub_knows(hub, folder):
    """An index may name files as it likes; what belongs into a repository is told by names."""
    index, files = folder / "model.safetensors.index.json", sorted(folder.glob("model-*.safetensors"))
    for number, file in enumerate(files):
        file.rename(folder / f"part-{number}.safetensors")
        index.write_text(index.read_text().replace(file.name, f"part-{number}.safetensors"))
    push(folder, hub)
    sent = {name for name in hub.repos["model", "me/tiny"].at().files if name.endswith(".safetensors")}
    assert sent == {file.name for file in files}
    assert set(json.loads(content(hub, index.name))["weight_map"].values()) == sent
    for number, file in enumerate(files):
        assert content(hub, file.name) == (folder / f"part-{number}.safetensors").read_bytes()


def test_secrets_stay_at_home(hub, folder):
    with (folder / "README.md").open("a") as card:
        card.write("hf_" + "x" * 34)
    with pytest.raises(CheckpointError, match=r"README.md:.*a secret"):
        push(folder, hub)
    assert hub.repos == {}


def test_any_other_source_is_packed_first(hub):
    report = push(TINY, hub, private=True)
    repo = hub.repos["model", "me/tiny"]
    assert repo.private and report.card == "kept" and report.notes == () and "hub_upload.py" in repo.at().files
    assert b'from_pretrained("me/tiny", trust_remote_code=True)' in content(hub, "README.md")
    assert content(hub, "model.safetensors") == (TINY / "model.safetensors").read_bytes()
    assert not list(ROOT.glob(".sa2va-tiny*"))


@pytest.mark.parametrize("file", ["config.json", "processor_config.json"])
@pytest.mark.parametrize(
    "change",
    [lambda own: ["x"], lambda own: own | {"AutoTokenizer": ["a", None]}, lambda own: own | {"AutoTokenizer": None}],
    ids=["a list", "a list of classes", "null"],
)
def test_a_folder_that_maps_to_other_code_is_packed_first(hub, folder, file, change):
    values = json.loads((folder / file).read_text())
    own = values["auto_map"]
    (folder / file).write_text(json.dumps(values | {"auto_map": change(own)}))
    push(folder, hub)
    assert json.loads(content(hub, file))["auto_map"] == own


def test_a_branch_is_made_if_need_be(hub, packed):
    hub.add_repo("me/tiny")
    report = push(packed, hub, revision="experiment")
    assert report.revision == "experiment" and holds(hub, packed, revision="experiment")
    assert hub.repos["model", "me/tiny"].history() == ["initial commit"]


def test_a_pull_request_is_open_when_it_is_whole(hub, packed):
    hub.add_repo("other/tiny")
    report = push(packed, hub, repo_id="other/tiny", create_pr=True)
    repo = hub.repos["model", "other/tiny"]
    assert report.url == f"{hub.url}/other/tiny/discussions/1" and holds(hub, packed, "other/tiny", "refs/pr/1")
    assert repo.history() == ["initial commit"] and repo.discussions[0]["status"] == "open"


def test_a_description_goes_with_commit_and_pull_request(hub, packed, monkeypatch):
    said = []

    def heard(method, argument):
        return lambda self, *args, **kwargs: said.append(kwargs[argument]) or method(self, *args, **kwargs)

    for name, argument in {"create_commit": "commit_description", "create_pull_request": "description"}.items():
        monkeypatch.setattr(HfApi, name, heard(getattr(HfApi, name), argument))
    hub.add_repo("other/tiny")
    push(packed, hub, repo_id="other/tiny", create_pr=True, commit_description="Why")
    assert said == ["Why", "Why"]


def test_an_interrupted_pull_request_is_taken_up_again(hub, packed):
    hub.add_repo("other/tiny")
    hub.faults = [Fault("POST /api/models/other/tiny/commit/", status=400)]
    with pytest.raises(HubError):
        push(packed, hub, repo_id="other/tiny", create_pr=True)
    assert hub.repos["model", "other/tiny"].discussions[0]["status"] == "draft"
    push(packed, hub, repo_id="other/tiny", create_pr=True)
    (discussion,) = hub.repos["model", "other/tiny"].discussions
    assert discussion["status"] == "open" and hub.count("PUT /store/") == 3


PASSING = {
    "first question": Fault("GET /api/whoami-v2", status=503),
    "creating": Fault("POST /api/repos/create", status=500),
    "creating, answer lost": Fault("POST /api/repos/create", late=True),
    "card check": Fault("POST /api/validate-yaml", status=502),
    "preupload": Fault("POST .*/preupload/", status=500),
    "upload": Fault("PUT /store/", status=500),
    "upload cut": Fault("PUT /store/"),
    "upload, answer lost": Fault("PUT /store/", late=True),
    "verify": Fault("POST .*/info/lfs/verify", status=504),
    "rate limit": Fault("POST .*/objects/batch", status=429),
    "commit": Fault(COMMIT, status=500, times=2),
    "commit cut": Fault(COMMIT),
    "commit, answer lost": Fault(COMMIT, late=True),
    "commit beside another": Fault(COMMIT, status=412),
    "listing": Fault("GET .*/tree/", status=500, times=2),
    "tag, answer lost": Fault("POST .*/tag/", late=True),
}


@pytest.mark.parametrize("fault", PASSING)
def test_passing_faults_are_sat_out(hub, packed, fault):
    hub.faults = [Fault(**vars(PASSING[fault]))]
    report = push(packed, hub, tag="v1")
    repo = hub.repos["model", "me/tiny"]
    assert holds(hub, packed) and repo.history() == ["Upload Sa2VA", "initial commit"]
    assert repo.tags == {"v1": report.commit} and hub.faults[0].times == 0


REFUSED = {
    "no such token": ({"token": "hf_unknown"}, [], "does not accept this token"),
    "a token that reads": ({"token": "hf_reader"}, [], "can only read"),
    "another's name": ({"repo_id": "other/new"}, [], "may not write to other/new.*--create-pr"),
    "storage": ({}, [Fault(COMMIT, status=403, message="Private repository storage limit reached")], "no room"),
    "payment": ({}, [Fault("POST .*/objects/batch", status=402)], "no room"),
    "Hub down": ({}, [Fault(COMMIT, status=500, times=99)], "answered with an error.*goes on from there"),
    "busy": ({}, [Fault("GET /api/models/me/tiny$", status=429, times=99)], "fewer requests"),
    "connection": ({}, [Fault(COMMIT, times=99)], "can't be reached, or the connection broke"),
    "moving": ({}, [Fault(COMMIT, status=409, times=99)], "changed by somebody else"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_pass_is_explained_and_nothing_is_visible(hub, packed, case):
    options, hub.faults, told = REFUSED[case]
    with pytest.raises(HubError, match=f"(?s){told}"):
        push(packed, hub, **options)
    assert all(repo.history() == ["initial commit"] for repo in hub.repos.values())


def test_a_hub_that_is_not_there_is_told(packed):
    with pytest.raises(HubError, match="can't be reached"):
        push_checkpoint(packed, "me/tiny", token="hf_me", endpoint="http://127.0.0.1:9")


def test_being_offline_by_will_is_told(packed):
    command = [sys.executable, str(ROOT / "hub_upload.py"), "push", str(packed), "me/tiny", "--token", "hf_me"]
    done = subprocess.run(command, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True)
    assert done.returncode == 2 and "HF_HUB_OFFLINE is set" in done.stderr


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config.json": b'{"model_type": "llama"}'}, "model of type 'llama'"),
        ({"config.json": b"{"}, "model of type None"),
        ({"weights.gguf": b"x", "README.md": b"mine"}, "no Sa2VA but weights.gguf"),
    ],
)
def test_a_repository_of_something_else_is_not_overwritten(hub, packed, files, told):
    repo = hub.add_repo("me/tiny", files=files)
    with pytest.raises(HubError, match=told):
        push(packed, hub)
    assert repo.history() == ["initial commit"]


@pytest.mark.parametrize("kind", ["dataset", "space"])
def test_a_name_of_another_kind_is_refused(hub, packed, kind):
    hub.add_repo("me/tiny", kind)
    with pytest.raises(HubError, match=f"is a {kind}, and no model"):
        push(packed, hub)
    with pytest.raises(ValueError, match=f"one of the {kind}s"):
        push(packed, hub, repo_id=f"{kind}s/me/tiny")
    assert not hub.count("POST")


def test_a_repository_with_a_card_only_may_be_filled(hub, packed):
    hub.add_repo("me/tiny", files={"README.md": b"# to come", "LICENSE": b""})
    push(packed, hub)
    assert holds(hub, packed) and content(hub, "README.md") == b"# to come"


def test_a_tag_of_another_commit_is_refused_before_anything_is_sent(hub, packed):
    repo = hub.add_repo("me/tiny")
    repo.tags["v1"] = repo.at().oid
    with pytest.raises(HubError, match="v1 of me/tiny names another commit"):
        push(packed, hub, tag="v1")
    assert repo.history() == ["initial commit"] and not hub.count("PUT")


def test_other_bytes_on_the_hub_are_noticed(hub, packed):
    hub.spoils = {"requirements.txt"}
    with pytest.raises(HubError, match=r"holds other bytes of requirements\.txt"):
        push(packed, hub)
    hub.spoils = set()
    assert push(packed, hub).uploaded == ("requirements.txt",) and holds(hub, packed)


def test_a_commit_by_somebody_else_right_after_does_not_matter(hub, packed, monkeypatch):
    send = hub_upload._Hub._send

    def send_and_be_edited(self, *args):
        commit = send(self, *args)
        repo = hub.repos["model", "me/tiny"]
        repo.add("main", "Edit", {**repo.at().files, "README.md": Blob(6, b"# Mine")})
        return commit

    monkeypatch.setattr(hub_upload._Hub, "_send", send_and_be_edited)
    report = push(packed, hub, tag="v1")
    repo = hub.repos["model", "me/tiny"]
    assert repo.tags["v1"] == report.commit != repo.at().oid and repo.history()[0] == "Edit"


def test_arguments_that_do_not_go_together_are_told(hub, packed):
    with pytest.raises(ValueError, match="leave out --revision or --create-pr"):
        push(packed, hub, create_pr=True, revision="dev")
    with pytest.raises(HubError, match=r"no me/tiny .* to open a pull request on"):
        push(packed, hub, create_pr=True)


def test_a_push_that_is_killed_goes_on_where_it_stopped(hub, packed):
    hub.stall_after = 1
    process = multiprocessing.get_context("fork").Process(target=push, args=(packed, hub))
    process.start()
    deadline = time.monotonic() + 60
    while hub.count("PUT /store/") < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    (stored,) = hub.store
    assert hub.repos["model", "me/tiny"].history() == ["initial commit"]
    hub.stall_after = None
    hub.log.clear()
    push(packed, hub)
    assert holds(hub, packed) and hub.count("PUT /store/") == 2 and not hub.count(f"PUT /store/{stored}")


COMMANDS = """
import json, os, sys
from transformers import AutoModel
import sa2va
from sa2va.hub_upload import main

packed, tiny = sys.argv[1:]
codes = [main(["push", packed, "me/cli"])]
os.environ["HF_TOKEN"] = "hf_me"
codes.append(main(["push", packed, "me/cli", "--tag", "v1", "--private", "--json"]))
codes.append(main(["push", packed, "me/cli", "--dry-run"]))
codes.append(main(["push", tiny, "me/own", "--skip-test"]))
codes.append(main(["pack", "me/cli", "fetched", "--skip-test"]))
model = AutoModel.from_pretrained(tiny)
url = model.push_to_hub("me/method", tags="mine", max_shard_size="5MB", commit_description="Why")
model.load_processor().push_to_hub("me/words")
print(json.dumps([codes, url]))
"""

USE = """
import json, sys
import numpy as np
from huggingface_hub import ModelCard
from PIL import Image
from transformers import AutoProcessor

result, image = {}, Image.open("picture.jpg")
for name in ("me/cli", "me/method", "me/own"):
    names = {}
    for block in ModelCard.load(name).text.split("```python\\n")[1:]:
        exec(block.partition("```")[0], names)
    model = names["model"]
    result[name] = [type(model).__module__, [mask.ndim for mask in names["masks"]]]
    output = model.predict_forward(image=image, text=sys.argv[1])
    np.save(f"{name.replace('/', '-')}.npy", np.stack(output.prediction_masks))
result["processor"] = type(AutoProcessor.from_pretrained("me/words", trust_remote_code=True)).__name__
result["again"] = model.push_to_hub("me/again", token="hf_me", max_shard_size="5MB")
print(json.dumps(result))
"""


def run(script: str, *arguments, hub, cwd, **environment) -> subprocess.CompletedProcess:
    """A process whose Hub is the one on localhost, with an empty cache."""
    own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(cwd / "hf"), "HF_MODULES_CACHE": str(cwd / "modules"), **environment}
    kept = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    script = [sys.executable, "-c", script, *arguments]
    return subprocess.run(script, cwd=cwd, env=kept | own, capture_output=True, text=True)


PUSH_ADAPTER = """
import importlib.metadata, sys
import peft
import sa2va
from transformers import AutoModel
from transformers.integrations import peft as integration

integration.MIN_PEFT_VERSION = importlib.metadata.version("peft")
model = AutoModel.from_pretrained(sys.argv[1])
model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"]))
model.push_to_hub("me/adapter", token="hf_me")
"""


@pytest.mark.slow
def test_an_adapter_alone_is_pushed_as_transformers_does(hub, tmp_path):
    pytest.importorskip("peft")
    done = run(PUSH_ADAPTER, TINY, hub=hub, cwd=tmp_path, PYTHONPATH=os.pathsep.join(sys.path))
    assert done.returncode == 0, done.stderr
    assert {"adapter_config.json", "adapter_model.safetensors"} <= hub.repos["model", "me/adapter"].at().files.keys()


MERGE = "import sys; from sa2va.hub_upload import main; sys.exit(main(['pack', 'adapter', 'out', '--skip-test']))"


@pytest.mark.slow
def test_an_adapter_is_merged_into_the_revision_of_its_base_that_it_names(hub, tmp_path):
    peft = pytest.importorskip("peft")
    base = {path.name: path.read_bytes() for path in TINY.iterdir() if path.is_file()}
    repo = hub.add_repo("me/base", files=base)
    config = {"base_model_name_or_path": "me/base", "revision": repo.at().oid, "target_modules": ["q_proj"], "r": 4}
    repo.add("main", "Another model", {**repo.at().files, "config.json": Blob(2, b"{}")})
    model = AutoModel.from_pretrained(TINY, dtype=torch.float32)
    peft.get_peft_model(model, peft.LoraConfig(**config)).save_pretrained(tmp_path / "adapter")
    values = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(values | config))
    done = run(MERGE, hub=hub, cwd=tmp_path, HF_TOKEN="hf_me")
    assert done.returncode == 0 and "me/base" in (tmp_path / "out" / "README.md").read_text(), done.stderr


OVER_XET = """
import json, sys
from sa2va.hub_upload import push_checkpoint

url, plain, folder = sys.argv[1:]
told = []
for name, endpoint in (
    ("me/tiny", url), ("me/tiny", url), ("me/cut", url), ("me/cut", url), ("me/shut", url), ("me/plain", plain)
):
    try:
        report = push_checkpoint(folder, name, token="hf_me", endpoint=endpoint, skip_test=True)
        told.append(len(report.uploaded))
    except OSError as error:
        told.append(f"{type(error).__name__}: {error}")
print(json.dumps(told))
"""
XET = {"HF_HUB_DISABLE_XET": "0", "HF_XET_XORB_COMPRESSION_POLICY": "none", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


@pytest.mark.slow
def test_large_files_go_by_xet_where_the_hub_has_it_else_by_git_lfs(packed, tmp_path):
    pytest.importorskip("hf_xet", reason="the Hub's own storage protocol: pip install hf_xet")
    with running_hub() as hub, running_hub() as plain:
        plain.has_xet = False
        hub.faults = [
            Fault("POST /xet/me/cut/v1/shards", status=400),
            Fault("GET /api/models/me/shut/xet-write-token/", status=403, times=9),
        ]
        done = run(OVER_XET, hub.url, plain.url, str(packed), hub=hub, cwd=tmp_path, **XET)
        assert done.returncode == 0, done.stderr
        first, again, cut, continued, shut, by_lfs = json.loads(done.stdout.splitlines()[-1])
        files = len([*packed.iterdir()])
        assert (first, again, continued, by_lfs) == (files, 0, files, files)
        assert cut.startswith("HubError: ") and "goes on from there" in cut
        assert shut.startswith("HubError: This token may not write to me/shut")
        assert holds(hub, packed) and holds(hub, packed, "me/cut") and holds(plain, packed, "me/plain")
        assert hub.repos["model", "me/cut"].history() == ["Upload Sa2VA", "initial commit"]
        assert hub.xorbs and not hub.count("PUT /store/") and plain.count("PUT /store/") == 3 and not plain.xorbs


@pytest.mark.slow
def test_what_was_pushed_is_used_by_anybody_with_the_same_masks(packed, tmp_path):
    """Commands and methods push; a process without this package and with an empty cache runs the cards' examples."""
    question = "Please segment the red star in this image."
    shutil.copy(ROOT / "demo" / "samples" / "shapes.mp4", tmp_path / "clip.mp4")
    image = Image.open(ROOT / "demo" / "samples" / "shapes.png").convert("RGB")
    image.save(tmp_path / "picture.jpg", format="png")
    with running_hub() as hub:
        done = run(COMMANDS, str(packed), str(TINY), hub=hub, cwd=tmp_path, **XET)
        assert done.returncode == 0, done.stderr
        codes, url = json.loads(done.stdout.splitlines()[-1])
        assert codes == [2, 0, 0, 0, 0] and "hf auth login" in done.stderr
        assert url.startswith(f"{hub.url}/me/method/commit/") and b"- mine" in content(hub, "README.md", "me/method")
        assert hub.repos["model", "me/cli"].private and "v1" in hub.repos["model", "me/cli"].tags
        hub.repos["model", "me/cli"].private = False
        fetched = {path.name: path.read_bytes() for path in (tmp_path / "fetched").glob("*.safetensors")}
        assert len(fetched) == 3 and all((packed / name).read_bytes() == data for name, data in fetched.items())

        (tmp_path / "sa2va.py").write_text("raise ImportError('hidden')")
        done = run(USE, question, hub=hub, cwd=tmp_path, PYTHONPATH=str(tmp_path), HF_HOME=str(tmp_path / "empty"))
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout.splitlines()[-1])
        assert result["processor"] == "Sa2VAProcessor" and result["again"].startswith(f"{hub.url}/me/again/commit/")
        for name in ("me/cli", "me/method", "me/own"):
            assert result[name][0].startswith("transformers_modules.") and set(result[name][1]) <= {3}
        assert hub.repos["model", "me/again"].at().files.keys() >= hub.repos["model", "me/method"].at().files.keys() - {
            "LICENSE"
        }
    model = AutoModel.from_pretrained(TINY, dtype=torch.float32).eval()
    wanted = np.stack(model.predict_forward(image=image, text=question).prediction_masks)
    assert wanted.any()
    for name in ("me-cli", "me-method", "me-own"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), wanted)

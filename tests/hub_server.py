"""A small Hub on localhost: as much of its HTTP API as huggingface_hub uses to push, pull and propose models.

It keeps what the real one keeps: commits that change all their files at once, branches, tags, drafts, a store of large
files by their SHA-256 that nobody sees before a commit names them, and tokens with rights. `HubServer.faults` makes
requests fail.

Large files come by Git LFS, or by Xet (https://huggingface.co/docs/xet) if `HubServer.has_xet`: pieces of files in
"xorbs", then "shards" that say how files are put together. Pieces must not be compressed, which the real client does
unless HF_XET_XORB_COMPRESSION_POLICY=none. Files go out by plain HTTP only. Which of both the client speaks is decided
by HF_HUB_DISABLE_XET when huggingface_hub is imported.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

DATE = "2025-01-01T00:00:00.000Z"
LARGE = 200_000  # bytes, from which any file goes to the store of large files


@dataclass(frozen=True)
class Blob:
    """A file in a commit: small ones with their bytes, large ones by the SHA-256 of theirs."""

    size: int
    content: bytes | None = None
    sha256: str | None = None

    @property
    def oid(self) -> str:
        """git's hash, of a large file's that of the pointer that git keeps."""
        text = self.content
        if text is None:
            text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {self.size}\n".encode()
        return hashlib.sha1(b"blob %d\0" % len(text) + text).hexdigest()


@dataclass(frozen=True)
class Commit:
    """All files at one moment."""

    oid: str
    title: str
    parent: str | None
    files: dict[str, Blob]


@dataclass
class Repo:
    """A repository: commits, and the names of some of them."""

    kind: str
    name: str
    private: bool = False
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    discussions: list[dict[str, Any]] = field(default_factory=list)

    def add(self, branch: str, title: str, files: dict[str, Blob]) -> Commit:
        """Makes a commit the head of a branch."""
        parent = self.branches.get(branch)
        oid = hashlib.sha1(f"{self.name} {branch} {title} {len(self.commits)}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, parent, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def at(self, revision: str = "main") -> Commit:
        """The commit that a branch, tag or id names.

        Raises:
            Refusal: there is none.
        """
        oid = self.branches.get(revision) or self.tags.get(revision) or revision
        if oid not in self.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return self.commits[oid]

    def history(self, revision: str = "main") -> list[str]:
        """Titles of the commits of a branch, the newest first."""
        commit, titles = self.at(revision), []
        while commit is not None:
            titles.append(commit.title)
            commit = self.commits.get(commit.parent)
        return titles


class Refusal(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, code: str = "", message: str = ""):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


@dataclass
class Fault:
    """What goes wrong with requests.

    Attributes:
        request: regular expression for "METHOD /path".
        status: answer with it; None cuts the connection.
        times: how many requests suffer.
        late: do what was asked before.
        skip: how many requests are spared first.
        message, headers: of the answer.
    """

    request: str
    status: int | None = None
    times: int = 1
    late: bool = False
    skip: int = 0
    message: str = "fault"
    headers: dict[str, str] = field(default_factory=dict)


class HubServer(ThreadingHTTPServer):
    """The Hub.

    Attributes:
        tokens: for each token the user's name, role ("write", "read") and organizations.
        repos: by kind ("model", "dataset", "space") and name.
        store: large files by SHA-256.
        faults: see `Fault`; tried in order.
        log: "METHOD /path" of every request.
        has_xet: whether large files may come by Xet.
        xorbs: the pieces of files that came so, by the xorb's hash.
        stall_after: large files that are taken before uploads hang, until it is None again; those that hung are lost.
        spoils: paths of which a commit keeps other bytes than it was sent.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.tokens = {
            "hf_me": ("me", "write", ["team"]),
            "hf_reader": ("me", "read", []),
            "hf_other": ("other", "write", []),
        }
        self.repos: dict[tuple[str, str], Repo] = {}
        self.store: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.has_xet = True
        self.xorbs: dict[str, list[bytes]] = {}
        self.stall_after: int | None = None
        self.spoils: set[str] = set()
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        """Address, for HF_ENDPOINT."""
        return f"http://127.0.0.1:{self.server_port}"

    def add_repo(self, name: str, kind: str = "model", files: dict[str, bytes] | None = None, **options) -> Repo:
        """Makes a repository with an initial commit."""
        repo = self.repos[kind, name] = Repo(kind, name, **options)
        blobs = {path: Blob(len(content), content) for path, content in (files or {}).items()}
        repo.add("main", "initial commit", {".gitattributes": Blob(0, b"")} | blobs)
        return repo

    def count(self, request: str) -> int:
        """How many requests there were that match a regular expression."""
        return sum(re.match(request, line) is not None for line in self.log)

    def due(self, request: str) -> Fault | None:
        """The fault that a request suffers."""
        with self.lock:
            for fault in self.faults:
                if re.match(fault.request, request):
                    fault.skip -= 1
                    if fault.skip < 0 and fault.times > 0:
                        fault.times -= 1
                        return fault
        return None

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


@contextmanager
def running_hub() -> Iterator[HubServer]:
    """A Hub for as long as the block lasts."""
    server = HubServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request: the fault that is due, else the route that fits."""

    protocol_version = "HTTP/1.1"
    server: HubServer

    def handle_any(self) -> None:
        """Answers, whatever the method."""
        url = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(url.query).items()}
        request = f"{self.command} {unquote(url.path)}"
        self.server.log.append(request)
        fault = self.server.due(request)
        if fault is not None and fault.status is None and not fault.late:
            return self._fail(fault)  # before the body has arrived
        self.body = (
            self._chunks() if self._is_chunked() else self.rfile.read(int(self.headers.get("Content-Length") or 0))
        )
        if fault is not None and not fault.late:
            return self._fail(fault)
        try:
            status, answer, headers = self._route(request)
        except Refusal as refusal:
            status, answer = refusal.status, {"error": refusal.message}
            headers = {"X-Error-Code": refusal.code, "X-Error-Message": refusal.message}
        if fault is not None:
            return self._fail(fault)
        self._send(status, answer, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_any

    def _is_chunked(self) -> bool:
        return self.headers.get("Transfer-Encoding", "").lower() == "chunked"

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline().strip(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *args) -> None:
        """No lines on stderr."""

    def _fail(self, fault: Fault) -> None:
        self.close_connection = True
        if fault.status is None:
            self.connection.shutdown(socket.SHUT_RDWR)
        else:
            self._send(fault.status, {"error": fault.message}, {"X-Error-Message": fault.message, **fault.headers})

    def _send(self, status: int, answer: Any, headers: dict[str, str]) -> None:
        body = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            if value:
                self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _route(self, request: str) -> tuple[int, Any, dict[str, str]]:
        for pattern, method in ROUTES:
            if match := re.fullmatch(pattern, request):
                with nullcontext() if request.startswith("PUT") else self.server.lock:  # uploads don't wait
                    answer = method(self, **match.groupdict())
                return answer if isinstance(answer, tuple) else (200, answer, {})
        raise Refusal(404, "", f"no such route: {request}")

    # ------------------------------------------------------------------------------------------------------- rights

    @property
    def account(self) -> tuple[str, str, list[str]] | None:
        """Name, role and organizations of who asks; None without a token."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise Refusal(401, "", "Invalid credentials in Authorization header")
        return self.server.tokens.get(token)

    def _may_write(self, namespace: str) -> bool:
        return (
            self.account is not None and self.account[1] == "write" and namespace in (self.account[0], *self.account[2])
        )

    def _demand_write(self, name: str) -> None:
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        if not self._may_write(name.partition("/")[0]):
            raise Refusal(403, "", "Forbidden: pass `create_pr=1` as a query parameter to create a Pull Request")

    def _repo(self, name: str, kind: str = "models") -> Repo:
        repo = self.server.repos.get((kind[:-1], name))
        if repo is None or (repo.private and not self._may_write(name.partition("/")[0])):
            raise Refusal(404 if self.account else 401, "RepoNotFound", "Repository not found")
        return repo

    # ------------------------------------------------------------------------------------------------------- routes

    def whoami(self):
        """Who holds this token?"""
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        name, role, organizations = self.account
        orgs = [{"name": organization} for organization in organizations]
        return {"type": "user", "name": name, "orgs": orgs, "auth": {"accessToken": {"role": role}}}

    def create(self):
        """A new repository, empty but for .gitattributes."""
        wanted = json.loads(self.body)
        if self.account is None:
            raise Refusal(401, "", "Invalid username or password.")
        name = f"{wanted.get('organization') or self.account[0]}/{wanted['name']}"
        kind, url = wanted.get("type", "model"), f"{self.server.url}/{name}"
        if (kind, name) in self.server.repos:
            return 409, {"error": "You already created this repo", "url": url}, {}
        self._demand_write(name)
        self.server.add_repo(name, kind, private=wanted.get("visibility") == "private")
        return {"url": url, "name": name}

    def info(self, kind, name, revision="main"):
        """What a revision is."""
        commit = self._repo(name, kind).at(revision)
        siblings = [{"rfilename": path} for path in commit.files]
        return {"id": name, "modelId": name, "sha": commit.oid, "private": False, "tags": [], "siblings": siblings}

    def tree(self, kind, name, revision):
        """All files of a revision."""
        return [_entry(path, blob) for path, blob in self._repo(name, kind).at(revision).files.items()]

    def paths_info(self, kind, name, revision):
        """Some files of a revision."""
        wanted = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())["paths"]
        return [
            _entry(path, blob) for path, blob in self._repo(name, kind).at(revision).files.items() if path in wanted
        ]

    def refs(self, kind, name):
        """Branches and tags."""
        repo = self._repo(name, kind)

        def listing(refs, where):
            return [{"name": ref, "ref": f"refs/{where}/{ref}", "targetCommit": oid} for ref, oid in refs.items()]

        branches = {ref: oid for ref, oid in repo.branches.items() if not ref.startswith("refs/pr/")}
        return {"branches": listing(branches, "heads"), "converts": [], "tags": listing(repo.tags, "tags")}

    def validate_yaml(self):
        """Whether the Hub understands a card's metadata."""
        metadata = json.loads(self.body)["content"].split("---")
        if len(metadata) < 3 or "base_model_relation: nonsense" in metadata[1]:
            return 400, {"errors": [{"message": "base_model_relation is not one of those known"}], "warnings": []}, {}
        return {"errors": [], "warnings": []}

    def preupload(self, kind, name, revision):
        """Which files are large, and what the revision has of them."""
        files = self._repo(name, kind).at(revision).files
        answers = []
        for wanted in json.loads(self.body)["files"]:
            is_large = wanted["path"].endswith(".safetensors") or wanted["size"] > LARGE
            there = files.get(wanted["path"])
            oid = there and (there.sha256 or there.oid)
            mode = "lfs" if is_large else "regular"
            answers.append({"path": wanted["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return {"files": answers}

    def lfs_batch(self, name):
        """Where to send which large files; those that are there need not be sent."""
        self._demand_write_or_draft(name)
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            upload = {"href": f"{self.server.url}/store/{wanted['oid']}", "header": {}}
            verify = {"href": f"{self.server.url}/{name}.git/info/lfs/verify"}
            known = wanted["oid"] in self.server.store
            objects.append(wanted | ({} if known else {"actions": {"upload": upload, "verify": verify}}))
        return {"transfer": "basic", "objects": objects}

    def _demand_write_or_draft(self, name: str) -> None:
        """Large files are also taken for a pull request of one's own."""
        if not any(
            discussion["author"]["name"] == (self.account or [""])[0] for discussion in self._repo(name).discussions
        ):
            self._demand_write(name)

    def store(self, oid):
        """Takes a large file, if its bytes are those that were announced."""
        if self.server.stall_after is not None and len(self.server.store) >= self.server.stall_after:
            while self.server.stall_after is not None:
                time.sleep(0.01)
            raise Refusal(503, "", "too late")
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refusal(400, "", "checksum mismatch")
        self.server.store[oid] = self.body
        return b""

    def lfs_verify(self, name):
        """Whether a large file has arrived whole."""
        wanted = json.loads(self.body)
        if len(self.server.store.get(wanted["oid"], b"")) != wanted["size"]:
            raise Refusal(404, "", "object not found")
        return {}

    def xet_token(self, kind, name, revision):
        """Where and how to send large files by Xet."""
        if not self.server.has_xet:
            raise Refusal(404, "", "no such route")
        self._demand_write_or_draft(name)
        url = f"{self.server.url}/xet/{name}"
        return {"accessToken": f"xet-{name}", "exp": int(time.time()) + 3600, "casUrl": url}

    def xorb(self, name, xorb):
        """Takes pieces of files: before each, eight bytes with its length and how it is compressed."""
        pieces, at = [], 0
        while at + 8 <= len(self.body):
            size, compression = int.from_bytes(self.body[at + 1 : at + 4], "little"), self.body[at + 4]
            if compression:
                raise Refusal(400, "", "set HF_XET_XORB_COMPRESSION_POLICY=none")
            pieces.append(self.body[at + 8 : at + 8 + size])
            at += 8 + size
        self.server.xorbs[xorb] = pieces
        return {"was_inserted": True}

    def shard(self, name):
        """Puts files together. Records of 48 bytes: for each file a head, its parts, checks of them, its SHA-256."""
        at = 48
        while self.body[at : at + 32] != b"\xff" * 32:
            flags, count = struct.unpack_from("<II", self.body, at + 32)
            parts = [struct.unpack_from("<32sIIII", self.body, at + 48 * i) for i in range(1, count + 1)]
            content = b"".join(b"".join(self.server.xorbs[_hash(xorb)][a:b]) for xorb, _, _, a, b in parts)
            at += 48 * (1 + count * (2 if flags >> 31 else 1))
            oid = _hash(self.body[at : at + 32])
            if not flags >> 30 & 1 or hashlib.sha256(content).hexdigest() != oid:
                raise Refusal(400, "", "the file is not what its SHA-256 says")
            self.server.store[oid] = content
            at += 48
        return {"result": 1}

    def commit(self, kind, name, revision):
        """Changes all files of a commit at once, or none."""
        repo = self._repo(name, kind)
        own = {f"refs/pr/{d['num']}" for d in repo.discussions if d["author"]["name"] == (self.account or [""])[0]}
        if revision not in own:
            self._demand_write(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        head, header = repo.at(revision), lines[0]["value"]
        if header.get("parentCommit") not in (None, head.oid):
            raise Refusal(412, "", "The branch has moved: A commit has happened since.")
        files = dict(head.files)
        for line in lines[1:]:
            CHANGES[line["key"]](self.server, files, line["value"])
        commit = repo.add(revision, header["summary"], files)
        return {"commitUrl": f"{self.server.url}/{name}/commit/{commit.oid}", "commitOid": commit.oid}

    def branch(self, kind, name, revision):
        """A new branch."""
        self._demand_write(name)
        repo = self._repo(name, kind)
        if revision in repo.branches:
            raise Refusal(409, "", "Reference already exists")
        repo.branches[revision] = repo.at(json.loads(self.body or b"{}").get("startingPoint", "main")).oid
        return {}

    def tag(self, kind, name, revision):
        """A new tag."""
        self._demand_write(name)
        repo, tag = self._repo(name, kind), json.loads(self.body)["tag"]
        if tag in repo.tags:
            raise Refusal(409, "", "Tag already exists")
        repo.tags[tag] = repo.at(revision).oid
        return {}

    def discussions(self, kind, name):
        """Pull requests of a repository."""
        found = [
            d for d in self._repo(name, kind).discussions if self.query.get("author") in (None, d["author"]["name"])
        ]
        return {"discussions": found, "count": len(found), "start": 0, "numClosedDiscussions": 0}

    def propose(self, kind, name):
        """A new pull request, which begins as a draft of main."""
        repo, wanted = self._repo(name, kind), json.loads(self.body)
        number = len(repo.discussions) + 1
        common = {"num": number, "title": wanted["title"], "status": "draft", "isPullRequest": True, "createdAt": DATE}
        repo.discussions.append(common | {"author": {"name": self.account[0]}, "repo": {"name": name, "type": "model"}})
        repo.branches[f"refs/pr/{number}"] = repo.at().oid
        return repo.discussions[-1]

    def discussion(self, kind, name, number):
        """One pull request."""
        details = {
            "events": [],
            "filesWithConflicts": [],
            "changes": {"base": "refs/heads/main", "mergeCommitId": None},
        }
        return self._repo(name, kind).discussions[int(number) - 1] | details

    def status(self, kind, name, number):
        """Opens or closes a pull request."""
        new = json.loads(self.body)["status"]
        self._repo(name, kind).discussions[int(number) - 1]["status"] = new
        event = {"id": "1", "type": "status-change", "createdAt": DATE, "author": {"name": self.account[0]}}
        return {"newStatus": event | {"data": {"status": new}}}

    def resolve(self, name, revision, path):
        """The bytes of a file, or some of them."""
        commit = self._repo(name).at(revision)
        if path not in commit.files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        blob = commit.files[path]
        content = self.server.store[blob.sha256] if blob.content is None else blob.content
        headers = {"ETag": f'"{blob.sha256 or blob.oid}"', "X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if wanted := re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            begin, end = int(wanted[1]), min(int(wanted[2] or blob.size - 1), blob.size - 1)
            headers["Content-Range"] = f"bytes {begin}-{end}/{blob.size}"
            return 206, content[begin : end + 1], headers
        return 200, content, headers


def _hash(raw: bytes) -> str:
    """A hash as Xet writes it: four numbers of 64 bits, the lowest byte first."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))


def _entry(path: str, blob: Blob) -> dict[str, Any]:
    large = {"lfs": {"oid": blob.sha256, "size": blob.size, "pointerSize": 134}} if blob.sha256 else {}
    return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid} | large


def _add(server: HubServer, files: dict[str, Blob], value: dict[str, Any]) -> None:
    content = base64.b64decode(value["content"])
    content = bytes(len(content)) if value["path"] in server.spoils else content
    files[value["path"]] = Blob(len(content), content)


def _add_large(server: HubServer, files: dict[str, Blob], value: dict[str, Any]) -> None:
    if value["oid"] not in server.store:
        raise Refusal(400, "", f"LFS pointer of {value['path']} points to no file")
    files[value["path"]] = Blob(len(server.store[value["oid"]]), sha256=value["oid"])


def _delete(server: HubServer, files: dict[str, Blob], value: dict[str, Any]) -> None:
    if files.pop(value["path"], None) is None:
        raise Refusal(404, "EntryNotFound", "A file with this name doesn't exist")


CHANGES: dict[str, Callable] = {"file": _add, "lfsFile": _add_large, "deletedFile": _delete}
_REPO = r"/api/(?P<kind>models|datasets|spaces)/(?P<name>[^/]+/[^/]+)"
ROUTES: tuple[tuple[str, Callable], ...] = (
    (r"GET /api/whoami-v2", Handler.whoami),
    (r"POST /api/repos/create", Handler.create),
    (r"POST /api/validate-yaml", Handler.validate_yaml),
    (rf"GET {_REPO}", Handler.info),
    (rf"GET {_REPO}/revision/(?P<revision>.+)", Handler.info),
    (rf"GET {_REPO}/tree/(?P<revision>refs/pr/\d+|[^/]+)/?", Handler.tree),
    (rf"POST {_REPO}/paths-info/(?P<revision>.+)", Handler.paths_info),
    (rf"GET {_REPO}/refs", Handler.refs),
    (rf"POST {_REPO}/preupload/(?P<revision>.+)", Handler.preupload),
    (rf"POST {_REPO}/commit/(?P<revision>.+)", Handler.commit),
    (rf"POST {_REPO}/branch/(?P<revision>.+)", Handler.branch),
    (rf"POST {_REPO}/tag/(?P<revision>.+)", Handler.tag),
    (rf"GET {_REPO}/discussions", Handler.discussions),
    (rf"POST {_REPO}/discussions", Handler.propose),
    (rf"GET {_REPO}/discussions/(?P<number>\d+)", Handler.discussion),
    (rf"POST {_REPO}/discussions/(?P<number>\d+)/status", Handler.status),
    (r"POST /(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch", Handler.lfs_batch),
    (r"POST /(?P<name>[^/]+/[^/]+)\.git/info/lfs/verify", Handler.lfs_verify),
    (r"PUT /store/(?P<oid>\w+)", Handler.store),
    (rf"GET {_REPO}/xet-write-token/(?P<revision>.+)", Handler.xet_token),
    (r"POST /xet/(?P<name>[^/]+/[^/]+)/v1/xorbs/default/(?P<xorb>\w+)", Handler.xorb),
    (r"POST /xet/(?P<name>[^/]+/[^/]+)/v1/shards", Handler.shard),
    (r"(?:GET|HEAD) /(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>refs/pr/\d+|[^/]+)/(?P<path>.+)", Handler.resolve),
)

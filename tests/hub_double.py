"""A double of the Hugging Face Hub on loopback: the wire of huggingface_hub 2.4, repositories that keep what they get, faults on demand.

In a test it is a context manager. `python -m tests.hub_double --port-file F --state-file F` runs it by itself: it writes its address into
the one file and, at each change and at its end, what it holds into the other. A client finds it by HF_ENDPOINT, set before
huggingface_hub is imported; xet must be off (HF_HUB_DISABLE_XET=1).
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import parse_qs, quote, unquote, urlsplit

import yaml

TOKEN = "hf_DistinctiveTokenThatNobodyMaySee"  # what the tests' clients have; it may do everything
ID_TOKEN_REQUEST = "github-request-token-DistinctiveAsWell"
MOVED = "The branch was updated since you opened this page. Please refresh and try again."
LFS_FROM = 4096  # bytes; larger files, and those that are no text, are LFS objects
WRITES = frozenset(  # need a token that may write
    {"create", "preupload", "lfs-batch", "commit", "tag", "delete-tag", "branch", "delete-branch"}
)
_REPO = r"(?P<id>[^/]+/[^/]+)"
_API = rf"/api/(?P<type>model|dataset)s/{_REPO}"
_ROUTES = tuple(
    (method, re.compile(pattern), name)
    for method, pattern, name in (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate-yaml"),
        ("POST", r"/oauth/token", "oauth"),
        ("GET", r"/github/id-token", "id-token"),
        ("POST", rf"{_API}/preupload/(?P<rev>[^/]+)", "preupload"),
        ("POST", rf"{_API}/commit/(?P<rev>[^/]+)", "commit"),
        ("POST", rf"{_API}/tag/(?P<rev>[^/]+)", "tag"),
        ("DELETE", rf"{_API}/tag/(?P<rev>[^/]+)", "delete-tag"),
        ("POST", rf"{_API}/branch/(?P<rev>[^/]+)", "branch"),
        ("DELETE", rf"{_API}/branch/(?P<rev>[^/]+)", "delete-branch"),
        ("GET", rf"{_API}/tree/(?P<rev>[^/]+)", "tree"),
        ("GET", rf"{_API}/refs", "refs"),
        ("GET", rf"{_API}/commits/(?P<rev>[^/]+)", "commits"),
        ("GET", rf"{_API}(?:/revision/(?P<rev>[^/]+))?", "info"),
        ("POST", rf"/(?:(?P<type>dataset)s/)?{_REPO}\.git/info/lfs/objects/batch", "lfs-batch"),
        ("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})", "lfs-put"),
        ("POST", r"/lfs/verify", "lfs-verify"),
        ("GET", rf"/(?:(?P<type>dataset)s/)?{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
        ("HEAD", rf"/(?:(?P<type>dataset)s/)?{_REPO}/resolve/(?P<rev>[^/]+)/(?P<path>.+)", "resolve"),
    )
)  # fmt: skip

Fault = Callable[["_Handler", Callable[[], None]], None]  # meets a request in the server's place; the second does what was asked


# --- what it holds ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Blob:
    data: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.data).hexdigest()

    @property
    def pointer(self) -> bytes:
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n".encode()

    @property
    def oid(self) -> str:
        """The git blob's; of an LFS file its pointer's."""
        data = self.pointer if self.lfs else self.data
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass(frozen=True)
class Commit:
    id: str
    title: str
    message: str
    files: Mapping[str, Blob]


Line = tuple[Commit, ...]  # from the first commit to a branch's head


@dataclass(frozen=True)
class Refs:
    """What names commits at one time. `branches`: those beside main."""

    main: Line
    tags: Mapping[str, str]
    branches: Mapping[str, Line]

    def line(self, revision: str) -> Line | None:
        return self.main if revision == "main" else self.branches.get(revision)


@dataclass
class Repository:
    """`commits` are main's, from the first to the head, each with its whole tree. `before`: the refs before the last change."""

    type: str
    id: str
    private: bool
    commits: Line = ()
    tags: dict[str, str] = field(default_factory=dict)
    branches: dict[str, Line] = field(default_factory=dict)
    lines: dict[str, Line] = field(default_factory=dict)  # every commit ever made -> what leads to it
    before: Refs = field(default_factory=lambda: Refs((), {}, {}))

    @property
    def head(self) -> Commit:
        return self.commits[-1]

    @property
    def files(self) -> dict[str, bytes]:
        """The head's tree."""
        return {path: blob.data for path, blob in self.head.files.items()}

    @property
    def refs(self) -> Refs:
        return Refs(self.commits, dict(self.tags), dict(self.branches))

    def tagged(self, tag: str) -> dict[str, bytes]:
        """A tag's tree."""
        return {path: blob.data for path, blob in self.lines[self.tags[tag]][-1].files.items()}

    def line(self, revision: str, refs: Refs | None = None) -> Line | None:
        """What leads to a revision: a branch, a tag, or a commit that a branch or a tag keeps; any other one is garbage."""
        refs = refs or self.refs
        if line := refs.line(revision):
            return line
        wanted = self.tags.get(revision, revision)
        kept = (refs.main, *refs.branches.values(), *(self.lines[commit] for commit in self.tags.values()))
        return self.lines[wanted] if any(commit.id == wanted for line in kept for commit in line) else None

    def add(self, title: str, files: Mapping[str, Blob], message: str = "", branch: str = "main") -> Commit:
        line = self.commits if branch == "main" else self.branches[branch]
        parent = line[-1].id if line else ""
        tree = [f"{path} {blob.oid}" for path, blob in sorted(files.items())]
        id = hashlib.sha1("\n".join([self.id, parent, title, str(len(self.lines)), *tree]).encode()).hexdigest()
        first = (Commit(id, title, message, {}),)
        self.before = Refs(self.commits or first, dict(self.tags), dict(self.branches))
        commit = Commit(id, title, message, dict(files))
        self.lines[id] = (*line, commit)
        if branch == "main":
            self.commits = self.lines[id]
        else:
            self.branches[branch] = self.lines[id]
        return commit

    def push(self, files: Mapping[str, bytes | None], title: str = "somebody's edit", branch: str = "main") -> Commit:
        """A commit of somebody else's; None deletes."""
        tree = dict((self.line(branch) or ())[-1].files)
        for path, data in files.items():
            if data is None:
                del tree[path]
            else:
                tree[path] = Blob(data, lfs=is_lfs(data))
        return self.add(title, tree, branch=branch)


def is_lfs(data: bytes) -> bool:
    return len(data) > LFS_FROM or b"\0" in data


@dataclass(frozen=True)
class Request:
    operation: str  # the third column of _ROUTES
    method: str
    path: str
    authorized: bool  # an Authorization header was there
    killed: bool = False


# --- faults ----------------------------------------------------------------------------------------------------------


def says(status: int, message: str = "no", *, code: str = "", **headers: str) -> Fault:
    """An error as the Hub words it, before anything is done."""
    extra = {name.replace("_", "-"): value for name, value in headers.items()} | ({"X-Error-Code": code} if code else {})
    return lambda handler, work: handler.send(status, {"error": message}, extra)


def invalid(*messages: str) -> Fault:
    """What `validate-yaml` says of a bad card."""
    return lambda handler, work: handler.send(400, {"errors": [{"message": message} for message in messages], "warnings": []})


def rate_limited(seconds: int, *, by_retry_after: bool = False) -> Fault:
    headers = {"Retry-After": str(seconds)} if by_retry_after else {"RateLimit": f'"api";r=0;t={seconds}'}
    return lambda handler, work: handler.send(429, {"error": "Too Many Requests"}, headers)


def page(status: int = 200) -> Fault:
    """A proxy's page in the server's place."""
    return lambda handler, work: handler.send_data(status, b"<!DOCTYPE html><title>Sign in</title>", {"Content-Type": "text/html"})


def drops(handler: _Handler, work: Callable[[], None]) -> None:
    """Half an answer, then nothing; nothing was done."""
    handler.drop()


def hangs(seconds: float) -> Fault:
    def hang(handler: _Handler, work: Callable[[], None]) -> None:
        time.sleep(seconds)
        handler.drop()

    return hang


def after(fault: Fault) -> Fault:
    """What was asked is done, then the fault answers."""

    def late(handler: _Handler, work: Callable[[], None]) -> None:
        handler.muted = True
        work()
        handler.muted = False
        fault(handler, work)

    return late


def meanwhile(change: Callable[[], object]) -> Fault:
    """Something happens just before the request is served."""

    def both(handler: _Handler, work: Callable[[], None]) -> None:
        change()
        work()

    return both


# --- the server ------------------------------------------------------------------------------------------------------


class HubDouble:
    """Runs from the first line of a `with` to its last. `requests` holds every request in order.

    Args:
        tokens: token -> the one repository that it may write to ("ns/name", "datasets/ns/name"; None: all). None: any token does.
        on_change: called under the lock after each request that changed something.
    """

    def __init__(
        self, *, tokens: Mapping[str, str | None] | None = None, port: int = 0, on_change: Callable[[HubDouble], None] | None = None
    ) -> None:
        self._given_tokens = tokens
        self.on_change = on_change
        self.lock = threading.RLock()
        self.reset()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads, self._http.hub = True, self  # type: ignore[attr-defined]
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def reset(self) -> None:
        """As new."""
        with self.lock:
            self.tokens = None if self._given_tokens is None else dict(self._given_tokens)
            self.repositories: dict[str, Repository] = {}
            self.objects: dict[str, bytes] = {}  # LFS
            self.requests: list[Request] = []
            self.publishers: dict[str, dict[str, str]] = {}  # repository -> the claims that its Trusted Publisher wants
            self.claims: dict[str, str] = {}  # of the job that asks for an ID token
            self.ignored: set[str] = set()  # paths that a .gitignore of the repository names
            self.page_size = 1000
            self.audience = ""
            self._faults: list[tuple[str, Fault, int | None]] = []
            self._lagging: dict[str, int] = {}
            self._kill: tuple[int, int, bool] | None = None

    def close(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def __enter__(self) -> HubDouble:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    # --- for tests ---

    def repository(self, id: str, type: str = "model") -> Repository:
        return self.repositories[place(type, id)]

    def create(self, id: str, type: str = "model", *, private: bool = True) -> Repository:
        with self.lock:
            repository = Repository(type, id, private)
            repository.add("initial commit", {".gitattributes": Blob(b"*.gguf filter=lfs\n", lfs=False)})
            self.repositories[place(type, id)] = repository
            return repository

    def fail(self, operation: str, fault: Fault, *, times: int | None = 1) -> None:
        """The next requests of that operation ("*": of any) meet the fault; `times` None: for ever."""
        with self.lock:
            self._faults.append((operation, fault, times))

    def no_faults(self) -> None:
        with self.lock:
            self._faults.clear()

    def only_pull_requests(self) -> None:
        """The token can't commit to main: whatever the parent, the branch is said to have moved (datasets issue 7777)."""
        self.fail("commit", says(412, MOVED), times=None)

    def lag(self, **requests: int) -> None:
        """The next so many requests of `refs`, `info` or `commits` are told what held before the last change."""
        with self.lock:
            self._lagging |= requests

    def kill(self, pid: int, at: int, *, served: bool = False) -> None:
        """The client of that process dies by SIGKILL at the request of that number, from 1: before it is served, or after."""
        with self.lock:
            self.requests.clear()
            self._kill = (pid, at, served)

    def operations(self) -> list[str]:
        return [request.operation for request in self.requests]

    def state(self) -> dict[str, Any]:
        """What it holds, as JSON can say it."""
        with self.lock:
            return {
                "repositories": {
                    name: {
                        "private": repository.private,
                        "head": repository.head.id,
                        "commits": [{"id": commit.id, "title": commit.title} for commit in repository.commits],
                        "tags": dict(repository.tags),
                        "branches": {branch: line[-1].id for branch, line in repository.branches.items()},
                        "files": {path: _told(blob) for path, blob in sorted(repository.head.files.items())},
                    }
                    for name, repository in sorted(self.repositories.items())
                },
                "requests": [[request.method, request.path, request.authorized] for request in self.requests],
            }

    # --- for the handler ---

    def fault(self, operation: str) -> Fault | None:
        for at, (wanted, fault, times) in enumerate(self._faults):
            if wanted in (operation, "*"):
                if times is not None:
                    self._faults[at : at + 1] = [(wanted, fault, times - 1)] if times > 1 else []
                return fault
        return None

    def stale(self, operation: str) -> bool:
        left = self._lagging.get(operation, 0)
        self._lagging[operation] = max(left - 1, 0)
        return left > 0

    def dies(self, served: bool) -> bool:
        if self._kill is None or self._kill[2] is not served or len(self.requests) != self._kill[1]:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self._kill[0], signal.SIGKILL)
        self._kill = None
        return True


def place(type: str, id: str) -> str:
    return f"datasets/{id}" if type == "dataset" else id


def _told(blob: Blob) -> dict[str, Any]:
    told: dict[str, Any] = {"size": len(blob.data), "lfs": blob.lfs, "sha256": blob.sha256}
    if not blob.lfs:
        with contextlib.suppress(UnicodeDecodeError):
            told["text"] = blob.data.decode()
    return told


class _Answered(Exception):
    """The request was answered already."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two would wait for one another
    changes: ClassVar[frozenset[str]] = frozenset({"create", "commit", "tag", "delete-tag", "branch", "delete-branch"})
    muted = False  # what is sent goes nowhere

    @property
    def hub(self) -> HubDouble:
        return self.server.hub  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def handle(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().handle()

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()

    def send(self, status: int, answer: object, headers: Mapping[str, str] | None = None) -> None:
        self.send_data(status, json.dumps(answer).encode(), {"Content-Type": "application/json", **(headers or {})})

    def send_data(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        if self.muted:
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def drop(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b'{"half": ')
        self.close_connection = True

    def refuse(self, status: int, message: str, code: str = "") -> _Answered:
        self.send(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message} if code else {})
        return _Answered()

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_PUT = do_HEAD = do_DELETE = do_GET

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        data = b""
        while size := int(self.rfile.readline(), 16):
            data += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return data

    def _serve(self) -> None:
        data = self._body()
        address = urlsplit(self.path)
        path = address.path
        hub, name, match = self.hub, "unknown", None
        for method, pattern, operation in _ROUTES:
            if method == self.command and (match := pattern.fullmatch(path)):
                name = operation
                break
        with hub.lock:
            hub.requests.append(Request(name, self.command, path, "Authorization" in self.headers))
            if hub.dies(served=False):
                self.close_connection = True
                return
            fault = hub.fault(name)

        def work() -> None:
            with hub.lock, contextlib.suppress(_Answered):
                if match is None:
                    raise self.refuse(404, f"Sorry, we can't find {self.command} {path}")
                parts = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                self._may(name, parts)
                getattr(self, "_" + name.replace("-", "_"))(data, parts, parse_qs(address.query))
                if name in self.changes and hub.on_change is not None:
                    hub.on_change(hub)

        if hub._kill is not None and hub._kill[2]:
            with hub.lock:
                last = len(hub.requests) == hub._kill[1]
            if last:  # done, and the client dies before it is told
                self.muted = True
                work()
                with hub.lock:
                    hub.dies(served=True)
                self.close_connection = True
                return
        if fault is None:
            work()
        else:
            fault(self, work)

    # --- who may ---

    @property
    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _may(self, operation: str, parts: Mapping[str, str]) -> None:
        if operation in ("oauth", "lfs-put", "id-token", "validate-yaml"):
            return
        known = self.hub.tokens
        if self._token and known is not None and self._token not in known:
            raise self._unknown_token()
        if operation in WRITES and not self._token:
            raise self.refuse(401, "Invalid username or password.")
        only = known[self._token] if self._token and known is not None else None
        if operation in WRITES and only and (operation == "create" or place(parts.get("type", "model"), parts["id"]) != only):
            raise self.refuse(403, "you don't have the rights to write to this repository", "Forbidden")

    def _unknown_token(self) -> _Answered:
        message = "Invalid credentials in Authorization header"
        self.send(401, {"error": message}, {"X-Error-Message": message})
        return _Answered()

    def _repo(self, parts: Mapping[str, str]) -> Repository:
        repository = self.hub.repositories.get(place(parts.get("type", "model"), parts["id"]))
        if repository is None or (repository.private and not self._token):
            raise self.refuse(404 if self._token else 401, "Repository not found", "RepoNotFound")
        return repository

    def _line_of(self, repository: Repository, parts: Mapping[str, str], refs: Refs | None = None) -> Line:
        line = repository.line(parts.get("rev", "main"), refs)
        if line is None:
            raise self.refuse(404, f"Invalid rev id: {parts['rev']}", "RevisionNotFound")
        return line

    def _commit_of(self, repository: Repository, parts: Mapping[str, str], refs: Refs | None = None) -> Commit:
        return self._line_of(repository, parts, refs)[-1]

    # --- answers ---

    def _whoami(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        if not self._token:
            raise self.refuse(401, "Invalid username or password.")
        self.send(200, {"type": "user", "name": "ns", "orgs": [], "auth": {"type": "access_token"}})

    def _create(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        asked = json.loads(data)
        type, id = asked.get("type", "model"), f"{asked.get('organization') or 'ns'}/{asked['name']}"
        url = f"{self.hub.address}/{place(type, id)}"
        if place(type, id) in self.hub.repositories:
            self.send(409, {"error": f"You already created this {type} repo: {id}", "url": url})
            return
        self.hub.create(id, type, private=asked.get("visibility") == "private" or bool(asked.get("private")))
        self.send(200, {"url": url, "name": id})

    def _validate_yaml(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        asked = json.loads(data)
        head = re.match(r"---\r?\n(.*?\n)---\r?(?:\n|$)", asked["content"], re.DOTALL)
        try:
            card = yaml.safe_load(head[1]) if head else {}
            wrong = [] if isinstance(card, dict) else ["YAML metadata is no mapping"]
        except yaml.YAMLError as error:
            card, wrong = {}, [f"YAML metadata parsing error: {error}"]
        if not wrong and any(entry is None for entry in card.get("datasets") or []):
            wrong = ['YAML metadata schema issue on key "datasets" (key: /0 must be string)']
        warnings = [] if card else [{"message": "empty or missing yaml metadata in repo card"}]
        self.send(400 if wrong else 200, {"errors": [{"message": message} for message in wrong], "warnings": warnings})

    def _preupload(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        head = self._commit_of(self._repo(parts), parts)
        told = []
        for file in json.loads(data)["files"]:
            lfs = file["size"] > LFS_FROM or b"\0" in base64.b64decode(file["sample"])
            there = head.files.get(file["path"])
            told.append(
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if lfs else "regular",
                    "shouldIgnore": file["path"] in self.hub.ignored,
                    "oid": None if there is None else there.sha256 if there.lfs else there.oid,
                }
            )
        self.send(200, {"files": told, "commitOid": head.id})

    def _lfs_batch(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        self._repo(parts)
        objects = []
        for wanted in json.loads(data)["objects"]:
            one: dict[str, Any] = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                one["actions"] = {
                    "upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}", "header": {}},
                    "verify": {"href": f"{self.hub.address}/lfs/verify", "header": {}},
                }
            objects.append(one)
        self.send(200, {"transfer": "basic", "objects": objects})

    def _lfs_put(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        if hashlib.sha256(data).hexdigest() != parts["oid"]:
            raise self.refuse(400, "the content has another SHA-256")
        self.hub.objects[parts["oid"]] = data
        self.send_data(200, b"", {"ETag": '"1"'})

    def _lfs_verify(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        asked = json.loads(data)
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            raise self.refuse(404, "no such object")
        self.send(200, {"success": True})

    def _commit(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        branch = parts["rev"]
        if repository.refs.line(branch) is None:  # a tag or a commit can't be committed to
            raise self.refuse(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        head = self._commit_of(repository, parts)
        header, *items = [json.loads(line) for line in data.decode().splitlines()]
        if (parent := header["value"].get("parentCommit")) is not None and parent != head.id:
            raise self.refuse(412, MOVED)
        tree = dict(head.files)
        for item in items:
            value = item["value"]
            path = value["path"]
            match item["key"]:
                case "file":
                    tree[path] = Blob(base64.b64decode(value["content"]), lfs=False)
                case "lfsFile":
                    if value["oid"] not in self.hub.objects:
                        raise self.refuse(400, f"LFS pointer pointed to a file that does not exist: {path}")
                    tree[path] = Blob(self.hub.objects[value["oid"]], lfs=True)
                case "deletedFile":
                    if path not in tree:
                        raise self.refuse(404, "A file with this name doesn't exist", "EntryNotFound")
                    del tree[path]
                case "deletedFolder":
                    tree = {name: blob for name, blob in tree.items() if not name.startswith(path.rstrip("/") + "/")}
        commit = repository.add(header["value"]["summary"], tree, header["value"].get("description", ""), branch)
        self.send(200, {"success": True, "commitOid": commit.id, "commitUrl": f"{self.hub.address}/{repository.id}/commit/{commit.id}"})

    def _info(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        commit = self._commit_of(repository, parts, repository.before if self.hub.stale("info") else None)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        self.send(200, {"id": repository.id, "sha": commit.id, "private": repository.private, "siblings": siblings, "tags": []})

    def _tree(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        commit = self._commit_of(self._repo(parts), parts)
        files: list[dict[str, Any]] = []
        for folder in sorted({path.rpartition("/")[0] for path in commit.files} - {""}):
            files.append({"type": "directory", "path": folder, "oid": hashlib.sha1(folder.encode()).hexdigest(), "size": 0})
        for path, blob in sorted(commit.files.items()):
            one: dict[str, Any] = {"type": "file", "path": path, "size": len(blob.data), "oid": blob.oid}
            if blob.lfs:
                one["lfs"] = {"oid": blob.sha256, "size": len(blob.data), "pointerSize": len(blob.pointer)}
            files.append(one)
        if query.get("recursive", ["False"])[0].lower() != "true":
            files = [file for file in files if "/" not in file["path"]]
        self._send_page(files, query)

    def _commits(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        commits = self._line_of(repository, parts, repository.before if self.hub.stale("commits") else None)
        fixed = {"authors": [{"user": "ns"}], "date": "2026-01-01T00:00:00.000Z"}
        told = [{"id": commit.id, "title": commit.title, "message": commit.message, **fixed} for commit in reversed(commits)]
        self._send_page(told, query)

    def _send_page(self, rows: list[dict[str, Any]], query: Mapping[str, list[str]]) -> None:
        at, size = int(query.get("cursor", ["0"])[0]), self.hub.page_size
        headers = {}
        if at + size < len(rows):
            others = "".join(f"&{name}={quote(value[0])}" for name, value in query.items() if name != "cursor")
            path = urlsplit(self.path).path
            headers["Link"] = f'<{self.hub.address}{path}?cursor={at + size}{others}>; rel="next"'
        self.send(200, rows[at : at + size], headers)

    def _refs(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        refs = repository.before if self.hub.stale("refs") else repository.refs
        heads = {"main": refs.main, **refs.branches}
        self.send(
            200,
            {
                "branches": [
                    {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": line[-1].id} for branch, line in heads.items()
                ],
                "tags": [{"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": commit} for tag, commit in refs.tags.items()],
                "converts": [],
            },
        )

    def _tag(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        commit, tag = self._commit_of(repository, parts), json.loads(data)["tag"]
        if tag in repository.tags:
            raise self.refuse(409, f'Tag reference exists already: "{tag}"')
        repository.before = repository.refs
        repository.tags[tag] = commit.id
        self.send(200, {"success": True})

    def _delete_tag(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        if parts["rev"] not in repository.tags:
            raise self.refuse(404, "no such tag", "RevisionNotFound")
        repository.before = repository.refs
        del repository.tags[parts["rev"]]
        self.send(200, {"success": True})

    def _branch(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        line = self._line_of(repository, {"rev": json.loads(data).get("startingPoint", "main")})
        if repository.refs.line(parts["rev"]) is not None:
            raise self.refuse(409, "Reference already exists")
        repository.before = repository.refs
        repository.branches[parts["rev"]] = line
        self.send(200, {"success": True})

    def _delete_branch(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        repository = self._repo(parts)
        if parts["rev"] == "main":
            raise self.refuse(403, "main can't be deleted")
        if parts["rev"] not in repository.branches:
            raise self.refuse(404, "Reference does not exist")
        repository.before = repository.refs
        del repository.branches[parts["rev"]]
        self.send(200, {"success": True})

    def _resolve(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        commit = self._commit_of(self._repo(parts), parts)
        blob = commit.files.get(parts["path"])
        if blob is None:
            self.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit.id})
            return
        headers = {
            "X-Repo-Commit": commit.id,
            "ETag": f'"{blob.oid}"',
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
        }
        if blob.lfs:
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.data))}
        self.send_data(200, blob.data, headers)

    # --- keyless ---

    def _id_token(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        """GitHub's part: who the job is, signed (here: not)."""
        if self._token != ID_TOKEN_REQUEST:
            raise self.refuse(401, "bad request token")
        [self.hub.audience] = query["audience"]
        self.send(200, {"value": id_token(self.hub.claims)})

    def _oauth(self, data: bytes, parts: Mapping[str, str], query: Mapping[str, list[str]]) -> None:
        asked = json.loads(data)
        resource = asked["resource"]
        if not asked["grant_type"].endswith(":token-exchange") or not asked["subject_token_type"].endswith(":id_token"):
            raise self.refuse(400, "unsupported_grant_type")
        claims = _claims(asked["subject_token"])
        if claims is None or resource not in self.hub.repositories or self.hub.publishers.get(resource) != claims:
            self.send(400, {"error": "invalid_grant", "error_description": f"No Trusted Publisher of {resource} matches the claims"})
            return
        token = "hf_jwt_" + hashlib.sha256(resource.encode()).hexdigest()[:20]
        if self.hub.tokens is None:
            self.hub.tokens = {}
        self.hub.tokens[token] = resource
        self.send(200, {"access_token": token, "token_type": "bearer", "expires_in": 3600})


def id_token(claims: Mapping[str, str]) -> str:
    def part(value: object) -> str:
        return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

    return f"{part({'alg': 'none'})}.{part(dict(claims))}.signature"


def _claims(token: str) -> dict[str, str] | None:
    try:
        payload = token.split(".")[1]
        return dict(json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))))
    except (IndexError, ValueError, binascii.Error):
        return None


# --- a client --------------------------------------------------------------------------------------------------------


class HubProcess:
    """A process that runs `tests/hub_driver.py` with the real huggingface_hub against a double. Also a context manager."""

    def __init__(self, hub: HubDouble, home: Path, **env: str) -> None:
        self.hub = hub
        plain = {name: value for name, value in os.environ.items() if not name.startswith("ACTIONS_")}  # a CI's own offer of a token
        settings = {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1", **env}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hub_driver"], cwd=Path(__file__).parents[1], env=plain | settings, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def do(self, what: str, *, env: Mapping[str, str] | None = None, dies: tuple[int, bool] | None = None, **asked: Any) -> dict[str, Any]:
        """The driver's answer. `dies`: at which request the child is killed, and whether that is served before."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        command = {"do": what, "env": {"HF_TOKEN": TOKEN} if env is None else dict(env), **asked}
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        child = int(self._process.stdout.readline())
        if dies is not None:
            self.hub.kill(child, dies[0], served=dies[1])
        self._process.stdin.write("go\n")
        self._process.stdin.flush()
        answer: dict[str, Any] = json.loads(self._process.stdout.readline())
        assert "bug" not in answer, answer["bug"]
        return answer

    def __enter__(self) -> HubProcess:
        return self

    def __exit__(self, *exc: object) -> None:
        with self._process:  # waits, and closes the pipes
            assert self._process.stdin is not None
            self._process.stdin.close()


# --- by itself -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _until_terminated() -> Iterator[threading.Event]:
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    yield ended


def _write(path: Path, text: str) -> None:
    """Whole or not at all: another process waits for the file."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    part.replace(path)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="A double of the Hugging Face Hub on 127.0.0.1.")
    parser.add_argument("--port-file", type=Path, required=True, help="gets its address")
    parser.add_argument("--state-file", type=Path, required=True, help="gets what it holds, as JSON, at each change and at the end")
    parser.add_argument("--token", help="the only token that may write (default: any)")
    parser.add_argument("--repository", action="append", default=[], metavar="[datasets/]NS/NAME", help="is there from the start, private")
    given = parser.parse_args(argv)

    def dump(hub: HubDouble) -> None:
        _write(given.state_file, json.dumps(hub.state(), indent=2))

    with _until_terminated() as ended, HubDouble(tokens={given.token: None} if given.token else None, on_change=dump) as hub:
        for name in given.repository:
            hub.create(name.removeprefix("datasets/"), "dataset" if name.startswith("datasets/") else "model")
        dump(hub)
        _write(given.port_file, hub.address)
        while not ended.wait(0.2):
            pass
        dump(hub)


if __name__ == "__main__":
    main(sys.argv[1:])

"""Versions on the Hugging Face Hub: one commit and one tag each, sent so that a second time changes nothing."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, get_session
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils._headers import build_hf_headers

from pipeline.backends.hub_session import Garbled, Patience, Refused
from pipeline.backends.hub_wire import AGAIN, Wire, endpoint
from pipeline.errors import ArtifactError, BackendError, PrivacyError
from pipeline.publication import REPO_TYPES, Publication, Published, RepoType, is_owned, url_of
from pipeline.version_names import is_name

if TYPE_CHECKING:
    from pipeline.version_names import Kind

BRANCH = "main"
SIDE = "publishing-"  # and the version: the branch that an older version's commit is made on, until the tag keeps it
SHOWN_FILES = 5
_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class Content:
    """What is known of a file's bytes. The Hub tells `sha256` of an LFS file and `blob` (git's SHA-1) of any other; the rest is None."""

    size: int
    blob: str | None
    sha256: str | None

    def is_same(self, there: Content | None) -> bool:
        if there is None or there.size != self.size:
            return False
        return there.sha256 == self.sha256 if there.sha256 is not None else there.blob == self.blob


Tree = Mapping[str, Content]  # path -> content


class HubClient:
    """The port `Hub`, through huggingface_hub. The token comes from HF_TOKEN or the login, or for the job's identity (Trusted Publishers)
    where HF_OIDC_RESOURCE is set, or where GitHub offers one and HF_TOKEN is not set."""

    def __init__(
        self,
        *,
        patience: Patience | None = None,
        sleep: Callable[[float], None] = time.sleep,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        self.patience, self._sleep, self._now = patience or Patience(), sleep, now

    def publish(self, publication: Publication, *, create: bool = False, replace: bool = False) -> Published:
        """See `pipeline.ports.Hub.publish`."""
        wanted = {path: content_of(source, path) for path, source in publication.files.items()}
        with self._wire(publication.kind, publication.repo_id).open() as wire:
            work = _Publishing(_Repository(wire, publication.repo_type, publication.repo_id), publication, wanted, create, replace)
            return wire.patiently(work.settle)

    def read_back(self, kind: Kind, repo_id: str, name: str) -> Published | None:
        """See `pipeline.ports.Hub.read_back`."""
        with self._wire(kind, repo_id).open() as wire:
            repository = _Repository(wire, REPO_TYPES[kind], repo_id)

            def look() -> str | None:
                return None if repository.is_private() is None else repository.refs().tags.get(name)

            commit = wire.patiently(look)
            return (
                None if commit is None else Published(kind, name, repo_id, commit, url_of(kind, repo_id, name, endpoint()), changed=False)
            )

    def _wire(self, kind: Kind, repo_id: str) -> Wire:
        resource = f"datasets/{repo_id}" if REPO_TYPES[kind] == "dataset" else repo_id
        return Wire(resource, self.patience, self._sleep, self._now)


def content_of(source: bytes | Path, name: str) -> Content:
    """
    Raises:
        ArtifactError: the file can't be read.
    """
    sha256 = hashlib.sha256()
    if isinstance(source, bytes):
        return Content(len(source), hashlib.sha1(b"blob %d\0" % len(source) + source).hexdigest(), hashlib.sha256(source).hexdigest())
    try:
        size = source.stat().st_size
        blob = hashlib.sha1(b"blob %d\0" % size)
        with source.open("rb") as file:
            while chunk := file.read(_CHUNK):
                blob.update(chunk)
                sha256.update(chunk)
    except OSError as error:
        raise ArtifactError(
            f"{source}: can't be read, to be published as {name}: {error.strerror}", hint="run the stage that makes it again"
        ) from error
    return Content(size, blob.hexdigest(), sha256.hexdigest())


@dataclass(frozen=True, slots=True)
class _Refs:
    """Tags and branches -> the commits that they name."""

    tags: Mapping[str, str]
    branches: Mapping[str, str]


class _Repository:
    """What is asked of one repository, each question once and without patience."""

    def __init__(self, wire: Wire, type: RepoType, id: str) -> None:
        self.wire, self.type, self.id = wire, type, id
        self._which: dict[str, Any] = {"repo_id": id, "repo_type": type}

    def is_private(self) -> bool | None:
        """None: there is no such repository, or none that the token may see."""
        try:
            return bool(self.wire.call(lambda: self.wire.api.repo_info(**self._which)).private)
        except Refused as refused:
            if refused.is_missing_repository:
                return None
            raise

    def create(self, private: bool) -> None:
        try:
            self.wire.call(lambda: self.wire.api.create_repo(**self._which, private=private, exist_ok=True))
        except Refused as refused:
            if refused.status != 409:  # somebody else was faster, or still is
                raise

    def refs(self) -> _Refs:
        refs = self.wire.call(lambda: self.wire.api.list_repo_refs(**self._which))
        tags, branches = ({ref.name: str(ref.target_commit) for ref in group} for group in (refs.tags, refs.branches))
        return _Refs(tags, branches)

    def newest_commits(self) -> list[tuple[str, str]]:
        """Commit and title of main's newest ones, the head first. From the list of commits: what is told of the repository may be old."""

        def ask() -> list[tuple[str, str]]:
            reply = get_session().get(f"{endpoint()}/api/{self.type}s/{self.id}/commits/{BRANCH}", headers=build_hf_headers(token=True))
            return [(str(commit["id"]), str(commit["title"])) for commit in reply.json()]

        return self.wire.call(ask)  # one page; the client's own call reads all of them

    def tree(self, commit: str) -> dict[str, Content]:
        files = self.wire.call(lambda: list(self.wire.api.list_repo_tree(**self._which, revision=commit, recursive=True)))
        return {
            file.path: Content(file.lfs.size, None, file.lfs.sha256) if file.lfs else Content(file.size, file.blob_id, None)
            for file in files
            if isinstance(file, RepoFile)
        }

    def commit(self, branch: str, title: str, files: Mapping[str, bytes | Path], gone: list[str], parent: str | None) -> str:
        """The commit made; the head as it is where the Hub finds nothing to change."""
        operations: list[Any] = [CommitOperationDelete(path, is_folder=False) for path in gone]
        for path, source in files.items():  # made anew for each try: the client changes them
            operations.append(CommitOperationAdd(path, source if isinstance(source, bytes) else str(source.absolute())))
        made = self.wire.call(
            lambda: self.wire.api.create_commit(
                **self._which, operations=operations, commit_message=title, revision=branch, parent_commit=parent
            )
        )
        return str(made.oid)

    def set_tag(self, name: str, commit: str) -> None:
        self.wire.call(lambda: self.wire.api.create_tag(**self._which, tag=name, revision=commit, exist_ok=False))

    def delete_tag(self, name: str) -> None:
        self._delete(lambda: self.wire.api.delete_tag(**self._which, tag=name), lambda: name in self.refs().tags)

    def create_branch(self, name: str, commit: str) -> None:
        try:
            self.wire.call(lambda: self.wire.api.create_branch(**self._which, branch=name, revision=commit))
        except Refused as refused:
            if refused.status != 409:  # there and not shown yet; if it is at another commit, the next commit is refused
                raise

    def delete_branch(self, name: str) -> None:
        self._delete(lambda: self.wire.api.delete_branch(**self._which, branch=name), lambda: name in self.refs().branches)

    def _delete(self, work: Callable[[], None], is_there: Callable[[], bool]) -> None:
        """What is gone already is no fault. 404 says so; 400 may."""
        try:
            self.wire.call(work)
        except Refused as refused:
            if refused.status != 404 and (refused.status != 400 or is_there()):
                raise


@dataclass(slots=True)
class _Publishing:
    """One publication on its way. `settle` can be called until it returns: each time it looks first at what is there."""

    repository: _Repository
    publication: Publication
    wanted: Tree
    create: bool
    replace: bool
    wrote: bool = False  # by now something may have been changed
    branched: bool = False  # by now there may be a side branch, shown or not

    def settle(self) -> Published:
        self._check_repository()
        refs, publication = self.repository.refs(), self.publication
        tagged = refs.tags.get(publication.name)
        if tagged is None or self._must_move(tagged):
            former, tagged = tagged, self._bring(refs)
            self._set_tag(tagged, former)
        self._tidy(refs)
        url = url_of(publication.kind, publication.repo_id, publication.name, endpoint())
        return Published(publication.kind, publication.name, publication.repo_id, tagged, url, changed=self.wrote)

    @property
    def _side(self) -> str:
        return SIDE + self.publication.name

    def _check_repository(self) -> None:
        private = self.repository.is_private()
        if private is None and self.create:
            self.wrote = True
            self.repository.create(self.publication.private)
            private = self.repository.wire.until_shown(self.repository.is_private)
        if private is None:
            raise Refused(404, "Repository not found")
        if self.publication.private and not private:
            raise PrivacyError(
                f"{self.repository.wire.resource}: the repository is public, and publish.private is true; nothing was sent",
                hint="make it private in its settings on the Hub, or set publish.private: false",
            )

    def _differences(self, there: Tree) -> list[str]:
        """Paths that are not as they must be. What this product doesn't own is not looked at."""
        mine = set(self.wanted) | {path for path in there if is_owned(path)}
        return sorted(path for path in mine if path not in self.wanted or not self.wanted[path].is_same(there.get(path)))

    def _must_move(self, commit: str) -> bool:
        different = self._differences(self.repository.tree(commit))
        if different and not self.replace:
            raise self._error(
                f"the tag {self.publication.name} is there with other content (commit {commit[:12]}): {_named(different)}",
                "make a new version; or, to put this in its place, publish again with --replace",
            )
        return bool(different)

    def _bring(self, refs: _Refs) -> str:
        """The commit that holds the version: one that does so already (an answer was lost, or a run died before it set the tag),
        or a new one, on main unless a newer version is there."""
        commits = self.repository.newest_commits()
        head = self.repository.tree(commits[0][0]) if commits else {}
        if commits and not self._differences(head):
            return commits[0][0]
        # of the version's commits only the newest: what a later one replaced must not come back while main has that one
        own = next((commit for commit, title in commits if title == self.publication.name), None)
        if own is not None and own != commits[0][0] and not self._differences(self.repository.tree(own)):
            return own
        if not commits or not self._is_older([*refs.tags, *(title for _, title in commits)]):
            return self._send(BRANCH, commits[0][0] if commits else None, head)
        if (side := refs.branches.get(self._side)) is None:
            self.branched = True
            self.repository.create_branch(self._side, commits[0][0])
            return self._send(self._side, commits[0][0], head)
        there = self.repository.tree(side)  # a run died before it set the tag
        return self._send(self._side, side, there) if self._differences(there) else side

    def _is_older(self, others: list[str]) -> bool:
        """Whether a version with a higher ID is there. By titles too: a run may have died between its commit and its tag."""
        return any(is_name(other) and other[:4] > self.publication.name[:4] for other in others)

    def _send(self, branch: str, parent: str | None, there: Tree) -> str:
        self.wrote = True
        gone = [path for path in there if is_owned(path) and path not in self.wanted]
        commit = self.repository.commit(branch, self.publication.name, self.publication.files, gone, parent)
        different = self._differences(self.repository.tree(commit))
        if different and commit == parent:
            raise Garbled("it finds nothing to change, though the files differ")
        if different:
            raise self._error(
                f"commit {commit[:12]} does not hold what was sent: {_named(different)}",
                "does a .gitignore in the repository name these files? Or did they change while they were sent? Then " + AGAIN,
            )
        return commit

    def _set_tag(self, commit: str, former: str | None) -> None:
        """`former`: where the tag is now. The Hub moves no tag: it is deleted, then made; who dies between leaves none, and any next
        run makes it."""
        name = self.publication.name
        self.wrote = True
        if former is not None:
            self.repository.delete_tag(name)
        self.repository.set_tag(name, commit)

        def look() -> str | None:
            found = self.repository.refs().tags.get(name)
            return None if found == former else found

        shown = self.repository.wire.until_shown(look)
        if shown is None:
            raise self._error(f"the tag {name} was set and is not shown", AGAIN)
        if shown != commit:
            raise self._error(
                f"the tag {name} is at {shown[:12]} and not at {commit[:12]}, where it was set", f"who else publishes? {AGAIN}"
            )

    def _tidy(self, refs: _Refs) -> None:
        """Deletes side branches that are needed no more: this version's, and any whose commit its tag keeps (a run died)."""
        sides = {branch.removeprefix(SIDE): commit for branch, commit in refs.branches.items() if branch.startswith(SIDE)}
        ended = {SIDE + name for name, commit in sides.items() if refs.tags.get(name) == commit}
        if self.branched or self._side in refs.branches:
            ended.add(self._side)
        for branch in sorted(ended):
            self.repository.delete_branch(branch)

    def _error(self, message: str, hint: str) -> BackendError:
        return self.repository.wire.error(message, hint)


def _named(paths: list[str]) -> str:
    more = f" and {len(paths) - SHOWN_FILES} more" if len(paths) > SHOWN_FILES else ""
    return ", ".join(paths[:SHOWN_FILES]) + more

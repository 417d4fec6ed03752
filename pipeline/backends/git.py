"""A git remote as the place where versions are agreed on: read in one look, changed in one atomic push.

Nothing here touches the user's branch, index or working tree: commits and tags are made as objects and pushed by their ids, so a dirty
tree, a detached head and a shallow clone do as well as any.
"""

from __future__ import annotations

import base64
import os
import random
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path

from pipeline.errors import BackendError, PushLostError, UserError
from pipeline.ports import RESERVED_TAGS, WAITING_BRANCHES, RemoteState

TOKEN = "PIPELINE_GIT_TOKEN"  # for https remotes; of the one step that talks to them
BOT = ("github-actions[bot]", "41898282+github-actions[bot]@users.noreply.github.com")
_LOCAL_S, _NETWORK_S = 60, 180
_TRIES = 4  # for a remote that can't be reached
_LOOKS = 12  # for one that changes while it is read
_PAUSE_S = 2.0

_PROTECTED = ("protected branch", "hook declined", "gh006", "gh013", "repository rule", "not allowed to push", "push declined")
_RACE = (
    "fetch first", "non-fast-forward", "already exists", "stale info", "needs force", "cannot lock ref", "failed to update ref",
    "failed to lock", "incorrect old value", "atomic transaction failed", "atomic push fail", "remote ref does not exist",
    "reference broken", "unable to lock", "shallow update not allowed",
)  # fmt: skip
_RIGHTS = (
    "authentication failed", "permission denied", "permission to", "error: 403", "error: 401", "could not read username", "access denied",
    "not found", "does not appear to be a git repository", "host key verification failed",
)  # fmt: skip


class GitRemote:
    """The remote of the repository that a folder lies in (the port `Remote`)."""

    def __init__(
        self, root: Path, *, remote: str = "origin", environ: Mapping[str, str] = os.environ, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        """
        Raises:
            UserError: no git, no repository, or no remote of that name.
        """
        self._environ, self._sleep = environ, sleep
        self._root = root.resolve()
        self._site: str | None = None  # the only place that may see the token
        self.remote = remote
        top = self._git("rev-parse", "--show-toplevel", code=None)
        if top is None:
            raise UserError(
                f"{self._root}: is in no git repository", hint="versions are shared through a git remote: `git init`, `git remote add`"
            )
        self._root = self.top = Path(top.rstrip("\n"))  # git takes paths from where it runs
        address = self._git("remote", "get-url", "--push", remote, code=None)
        if address is None:
            raise UserError(
                f"this repository has no remote called {remote}", hint=f"`git remote add {remote} URL`; or commit metadata/ by hand"
            )

        # over https, or to a server on this machine: elsewhere a token could be read on its way
        site = re.match(r"(https://|http://(?=(?:[^/\s]*@)?(?:127\.0\.0\.1|localhost)[:/]))(?:[^/\s]*@)?([^/@\s]+)", address)
        self._site = f"{site[1]}{site[2]}/" if site else None

    def folder(self, path: Path) -> str:
        """A folder of the repository as git names it.

        Raises:
            UserError: it lies outside.
        """
        try:
            return path.resolve().relative_to(self.top.resolve()).as_posix()
        except ValueError:
            raise UserError(f"{path}: lies outside the repository {self.top}", hint="keep pipeline.yaml inside the repository") from None

    # --- reading ---

    def look(self) -> RemoteState:
        """
        Raises:
            BackendError: the remote can't be reached or read; it has no default branch yet.
        """
        for _ in range(_LOOKS):
            listed = self._network("ls-remote", "--symref", self.remote, "HEAD", "refs/heads/*", "refs/tags/*")
            branch, refs = _refs(listed)
            if branch is None or f"refs/heads/{branch}" not in refs:
                raise BackendError(f"the remote {self.remote} has no default branch yet", hint="push the first commit to it")
            tags = {name.removeprefix("refs/tags/"): oid for name, oid in refs.items() if name.startswith("refs/tags/")}
            held = sorted(name for name in refs if name.startswith(f"refs/tags/{RESERVED_TAGS}"))
            waiting = [name for name in refs if name.startswith(f"refs/heads/{WAITING_BRANCHES}")]
            try:
                self._fetch([f"refs/heads/{branch}", *waiting, *held])
            except PushLostError:
                continue  # a reservation went between the two
            if self._git("cat-file", "-e", refs[f"refs/heads/{branch}"], code=None) is None:
                continue  # the branch was set to another history
            messages = dict(
                zip((name.removeprefix("refs/tags/") for name in held), self._tag_messages([refs[n] for n in held]), strict=True)
            )
            branches = {name.removeprefix("refs/heads/"): oid for name, oid in refs.items() if name.startswith("refs/heads/")}
            return RemoteState(branch, refs[f"refs/heads/{branch}"], tags, messages, branches)
        raise BackendError(f"the remote {self.remote} changes faster than it can be read", hint="run again in a while")

    def files_at(self, commit: str, folder: str, into: Path) -> None:
        """Writes the files of a folder at a commit, byte for byte, below `into`."""
        listed = self._git("ls-tree", "-r", "-z", f"{commit}", "--", f"{folder}/") or ""
        wanted = [(line.split("\t", 1)[1], line.split()[2]) for line in listed.split("\0") if line and line.split()[1] == "blob"]
        for (path, _), content in zip(wanted, self._objects([oid for _, oid in wanted]), strict=True):
            target = into / path.removeprefix(f"{folder}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)

    def files_of_tag(self, name: str, folder: str, into: Path) -> bool:
        """As `files_at`, at the commit of a tag of the remote; False where there is none."""
        listed = self._network("ls-remote", self.remote, f"refs/tags/{name}")
        if not listed:
            return False
        self._fetch([f"refs/tags/{name}"])
        self.files_at(listed.split()[0], folder, into)
        return True

    def head(self) -> str | None:
        """The commit that is checked out; None before the first."""
        found = self._git("rev-parse", "--verify", "--quiet", "HEAD", code=None)
        return found.strip() if found else None

    # --- writing ---

    def commit(self, parent: str, folder: str, content: Path, message: str) -> str | None:
        """A commit on `parent` in which `folder` holds what `content` holds; None when it does so already."""
        with tempfile.TemporaryDirectory(prefix="pipeline-git-") as scratch:
            index = {"GIT_INDEX_FILE": str(Path(scratch) / "index")}
            self._git("read-tree", parent, extra=index)
            there = self._git("ls-tree", "-r", "-z", "--name-only", parent, "--", f"{folder}/") or ""
            lines = [f"0 {'0' * len(parent)}\t{path}\0" for path in there.split("\0") if path]  # taken out, then put in
            paths = sorted(path for path in content.rglob("*") if path.is_file())
            listed = "".join(f"{path}\n" for path in paths)
            oids = (self._git("hash-object", "-w", "--no-filters", "--stdin-paths", stdin=listed) or "").split()
            for path, oid in zip(paths, oids, strict=True):
                lines.append(f"100644 {oid}\t{folder}/{path.relative_to(content).as_posix()}\0")
            self._git("update-index", "-z", "--index-info", stdin="".join(lines), extra=index)
            made = str(self._git("write-tree", extra=index)).strip()
        if made == str(self._git("rev-parse", f"{parent}^{{tree}}")).strip():
            return None
        return str(self._git("commit-tree", made, "-p", parent, "-F", "-", stdin=message, extra=self._identity())).strip()

    def tag(self, name: str, commit: str, message: str) -> str:
        """An annotated tag as an object; its text must be of its own, since a tag that is there with the same text counts as pushed.

        A reservation points at an empty commit without a past instead, so that reading it fetches nothing else, in a shallow clone either,
        and no plain `git fetch` takes it along.
        """
        if name.startswith(RESERVED_TAGS):
            commit = self._empty_commit
        who, email = self._person
        text = f"object {commit}\ntype commit\ntag {name}\ntagger {who} <{email}> {int(time.time())} +0000\n\n{message}"
        return str(self._git("mktag", stdin=text)).strip()

    def push(self, updates: Mapping[str, str | None]) -> None:
        """Sets refs to objects (None deletes one), all or none; a tag is only ever created, a branch only moved forward.

        Raises:
            PushLostError: somebody else was faster. Look again.
            BackendError: refused (rights, a protected branch), or the remote can't be reached.
        """
        refspecs = [f"{oid or ''}:{ref}" for ref, oid in updates.items()]
        for attempt in range(_TRIES):
            done = self._run("push", "--porcelain", "--atomic", "--no-verify", self.remote, *refspecs, timeout=_NETWORK_S)
            said = self._safe(f"{done.stdout}\n{done.stderr}")
            results = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
            if done.returncode == 0:
                # "=": the object was there before, so it is not we who put it there, or an answer was lost: looking again tells
                if others := [line[1] for line in results if line[0] == "="]:
                    raise PushLostError(f"already there: {', '.join(others)}")
                return
            self._raise_if_refused(said, " ".join(line[-1].lower() for line in results if line[0] == "!"))
            if self._is_final(said) or attempt == _TRIES - 1:
                raise self._failure("push", said)
            self._sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))

    def _raise_if_refused(self, said: str, reasons: str) -> None:
        """What the remote itself says no to."""
        low = said.lower()
        if "gh007" in low:
            raise BackendError(
                f"the remote {self.remote} refused the push: {_reason(said)}",
                hint="set an address that may be public: `git config user.email`",
            )
        if any(word in reasons or word in low for word in _PROTECTED):
            raise BackendError(
                f"the remote {self.remote} refused the push: {_reason(said)}",
                hint="let this job past the rules for branches and tags; for the branch alone, `pipeline version record --pull-request`",
            )
        if taken := re.search(r"'refs/(heads|tags)/(\S+)' exists; cannot create", said):
            what = "branch" if taken[1] == "heads" else "tag"
            raise BackendError(
                f"the {what} {taken[2]} on the remote {self.remote} is in the way: {_reason(said)}",
                hint=f"rename it: names that begin with {taken[2]}/ are needed",
            )
        if any(word in reasons for word in _RACE) or any(word in low for word in ("remote ref does not exist", "fetch first")):
            raise PushLostError(_reason(said))

    def advance(self, branch: str, commit: str, folder: str) -> bool:
        """Moves the checked-out branch on to a commit that differs from it in `folder` alone, and the index with it; the files are left to
        the caller. False when another branch is checked out, the commit brings more, or the checkout is in use. The index goes first: what
        a kill between the two leaves is ready to be pulled.
        """
        here, head = self._git("symbolic-ref", "--quiet", "--short", "HEAD", code=None), self.head()
        if not here or here.strip() != branch or not head:
            return False
        steps = (
            ("merge-base", "--is-ancestor", head, commit),
            ("diff", "--quiet", "--no-ext-diff", head, commit, "--", ".", f":(exclude,literal){folder}"),
            ("reset", "--quiet", commit, "--", folder),
            ("update-ref", "-m", "pipeline version record", f"refs/heads/{branch}", commit, head),
        )
        return all(self._git(*step, code=None) is not None for step in steps)

    # --- git ---

    def _fetch(self, refs: Sequence[str]) -> None:
        # without --depth, which would cut the history that a shallow clone has
        self._network("fetch", "--quiet", "--no-tags", "--no-write-fetch-head", "--no-recurse-submodules", self.remote, *refs)

    def _tag_messages(self, oids: Sequence[str]) -> Iterator[str]:
        for content in self._objects(oids):
            yield content.decode("utf-8", "replace").partition("\n\n")[2]

    def _objects(self, oids: Sequence[str]) -> Iterator[bytes]:
        if not oids:
            return
        done = self._run_bytes("cat-file", "--batch", stdin="".join(f"{oid}\n" for oid in oids).encode())
        position = 0
        for oid in oids:
            end = done.find(b"\n", position)
            header = done[position : max(end, position)].split()
            if len(header) != 3:
                raise BackendError(f"the object {oid} is not in this repository", hint="run `git fsck`, or clone again")
            start, size = end + 1, int(header[2])
            yield done[start : start + size]
            position = start + size + 1

    def _network(self, *arguments: str) -> str:
        """
        Raises:
            PushLostError: a ref that was asked for is gone.
            BackendError
        """
        for attempt in range(_TRIES):
            done = self._run(*arguments, timeout=_NETWORK_S)
            if done.returncode == 0:
                return done.stdout
            said = self._safe(done.stderr)
            if "couldn't find remote ref" in said.lower() or "could not find remote ref" in said.lower():
                raise PushLostError(_reason(said))
            if self._is_final(said) or attempt == _TRIES - 1:
                raise self._failure(arguments[0], said)
            self._sleep(_PAUSE_S * 2**attempt * random.uniform(0.5, 1.0))
        raise AssertionError("unreachable")

    def _is_final(self, said: str) -> bool:
        """Whether asking again can't help."""
        return "--atomic" in said or any(word in said.lower() for word in _RIGHTS)

    def _failure(self, what: str, said: str) -> BackendError:
        if "--atomic" in said:
            return BackendError(
                f"the remote {self.remote} can't push atomically", hint="use a server with git's own protocol (https or ssh)"
            )
        if any(word in said.lower() for word in _RIGHTS):
            hint = f"check the remote's address and the rights of the token in {TOKEN} (contents: write) or of your key"
        else:
            hint = "check the network; nothing was lost: run the same command again"
        return BackendError(f"git {what} on the remote {self.remote} failed: {_reason(said)}", hint=hint)

    def _git(self, *arguments: str, stdin: str | None = None, extra: Mapping[str, str] | None = None, code: int | None = 0) -> str | None:
        """What git says; with `code` None, None when it fails."""
        done = self._run(*arguments, timeout=_LOCAL_S, stdin=stdin, extra=extra)
        if done.returncode == 0:
            return done.stdout
        if code is None:
            return None
        raise BackendError(f"git {arguments[0]} failed: {_reason(self._safe(done.stderr))}", hint="run `git status` and `git fsck` here")

    def _run(
        self, *arguments: str, timeout: float, stdin: str | None = None, extra: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                self._command(*arguments), input=stdin or "", capture_output=True, text=True, encoding="utf-8", errors="replace",
                timeout=timeout, check=False, env=self._environment(extra),
            )  # fmt: skip
        except FileNotFoundError:
            raise UserError("there is no git here", hint="install git") from None
        except subprocess.TimeoutExpired:
            return subprocess.CompletedProcess(arguments, 124, "", f"timed out after {timeout:.0f} s")

    def _run_bytes(self, *arguments: str, stdin: bytes) -> bytes:
        try:  # in a clone without blobs this goes to the network
            done = subprocess.run(
                self._command(*arguments), input=stdin, capture_output=True, timeout=_NETWORK_S, check=False, env=self._environment()
            )
        except subprocess.TimeoutExpired:
            raise self._failure(arguments[0], f"timed out after {_NETWORK_S} s") from None
        return done.stdout

    def _command(self, *arguments: str) -> list[str]:
        # a container often runs as another user than the owner of the mounted checkout; nothing of its hooks is run here
        return ["git", "-c", "safe.directory=*", "-c", "core.hooksPath=/dev/null", "-c", "gc.auto=0", "-C", str(self._root), *arguments]

    def _environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        unwanted = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", TOKEN)
        environment = {name: value for name, value in self._environ.items() if name not in unwanted}
        environment |= {"LC_ALL": "C", "GIT_TERMINAL_PROMPT": "0", **(extra or {})}
        if self._site and (token := self._environ.get(TOKEN)):
            # by the environment, never by an argument: arguments can be seen by every process of the machine
            count = int(environment.get("GIT_CONFIG_COUNT") or 0)
            for value in ("", f"Authorization: Basic {_basic(token)}"):  # the empty one forgets a header that the checkout step left
                environment |= {f"GIT_CONFIG_KEY_{count}": f"http.{self._site}.extraHeader", f"GIT_CONFIG_VALUE_{count}": value}
                count += 1
            environment["GIT_CONFIG_COUNT"] = str(count)
        return environment

    def _safe(self, text: str) -> str:
        """Without tokens: that of the environment, and those inside addresses."""
        if token := self._environ.get(TOKEN):
            text = text.replace(token, "…").replace(_basic(token), "…")
        return re.sub(r"(?<=://)[^/\s]+@", "…@", text)

    @cached_property
    def _empty_commit(self) -> str:
        tree = str(self._git("mktree")).strip()
        return str(self._git("commit-tree", tree, "-m", "Reservation", extra=self._identity())).strip()

    @cached_property
    def _person(self) -> tuple[str, str]:
        """Who commits: as git is told here, else the bot of the forge's workflows."""
        told = [self._environ.get(f"GIT_COMMITTER_{what}") or (self._git("config", f"user.{key}", code=None) or "").strip()
                for what, key in (("NAME", "name"), ("EMAIL", "email"))]  # fmt: skip
        name, email = (re.sub(r"[<>\n]", "", text).strip() for text in told)
        return (name, email) if name and email else BOT

    def _identity(self) -> dict[str, str]:
        name, email = self._person
        return {f"GIT_{role}_{what}": value for role in ("AUTHOR", "COMMITTER") for what, value in (("NAME", name), ("EMAIL", email))}


def _refs(listed: str) -> tuple[str | None, dict[str, str]]:
    """The default branch's short name, and every ref with its object."""
    branch, refs = None, {}
    for line in listed.splitlines():
        left, _, name = line.partition("\t")
        if left.startswith("ref: "):
            branch = left.removeprefix("ref: refs/heads/")
        elif not name.endswith("^{}"):
            refs[name] = left
    return branch, refs


def _basic(token: str) -> str:
    return base64.b64encode(f"x-access-token:{token}".encode()).decode()


def _reason(said: str) -> str:
    """The lines of git that say why, as one, each once; first what the remote says."""
    lines = [line.strip() for line in said.splitlines()]
    told = [line.removeprefix("remote:").strip() for line in lines if line.startswith("remote:")]
    told += [line.split("\t")[-1] for line in lines if line.startswith("!")]
    told += [line for line in lines if line.startswith(("error:", "fatal:"))]
    reasons = [line for line in told if line] or [line for line in lines if line][-2:] or ["no reason given"]
    return " ".join("; ".join(dict.fromkeys(reasons)).split())[:400]

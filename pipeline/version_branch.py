"""Whether this checkout may allocate versions: only the default branch does."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

_TIMEOUT_S = 10
_USUAL = ("main", "master")


class BranchState(NamedTuple):
    is_git: bool
    branch: str | None  # None on a detached HEAD that is no branch
    allocates: bool


def default_branch_state(root: Path, environ: Mapping[str, str] = os.environ) -> BranchState:
    """The branch that `root` is on and whether it allocates versions. Without git, or outside a repository, it does.

    The default branch is what origin/HEAD or the workflow's event names; unknown, it is main or master; in a repository without a
    remote and without those, the branch at hand. A detached HEAD is the branch that GitHub Actions says it is, else none.
    """
    inside = _git(root, "rev-parse", "--is-inside-work-tree")
    if inside != "true":
        # a repository that can't be read from here (a worktree whose main folder is not mounted, say) is no reason to allocate
        unread = inside is None and (root / ".git").exists() and shutil.which("git") is not None
        return BranchState(unread, None, not unread)
    branch: str | None = _git(root, "symbolic-ref", "--quiet", "--short", "HEAD") or _branch_of_workflow(environ)
    default: str | None = (_git(root, "symbolic-ref", "--quiet", "--short", "refs/remotes/origin/HEAD") or "").removeprefix("origin/")
    default = default or _default_of_workflow(environ)
    if branch is None:
        return BranchState(True, None, False)
    if default:
        return BranchState(True, branch, branch == default)
    others = _git(root, "for-each-ref", "--format=%(refname:short)", *(f"refs/heads/{name}" for name in _USUAL))
    return BranchState(True, branch, branch in _USUAL or not (others or _git(root, "remote")))


def _branch_of_workflow(environ: Mapping[str, str]) -> str | None:
    # a tag or a pull request has a ref too, and is no branch
    return environ.get("GITHUB_REF_NAME") or None if environ.get("GITHUB_REF", "").startswith("refs/heads/") else None


def _default_of_workflow(environ: Mapping[str, str]) -> str | None:
    if told := environ.get("PIPELINE_DEFAULT_BRANCH"):  # in a container, which the event's file is not in
        return told
    try:
        event = json.loads(Path(environ["GITHUB_EVENT_PATH"]).read_text(encoding="utf-8"))
        return str(event["repository"]["default_branch"])
    except (KeyError, OSError, ValueError, TypeError):
        return None


def head_commit(root: Path) -> str | None:
    """The commit that `root` is at; None without git or outside a repository."""
    return _git(root, "rev-parse", "HEAD")


def _git(root: Path, *arguments: str) -> str | None:
    """What git says, stripped; None when it is not there, fails or hangs."""
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")}
    # a container often runs as another user than the owner of the mounted checkout; these commands only read
    command = ["git", "-c", "safe.directory=*", "-C", str(root), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, env=environment)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None

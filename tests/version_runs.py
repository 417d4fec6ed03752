"""Runs without models against a real git remote: they reserve, write metadata as a run does, and record. Also a program, so that
many can be started at once, or killed:

    python -m tests.version_runs CLONE [--source A] [--rows R] [--run NAME] [--only reserve|run|record]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from pipeline import yaml_text
from pipeline.backends.git import GitRemote
from pipeline.cards import dataset_card, model_card, run_card, write_card
from pipeline.config import PipelineConfig, parse_config
from pipeline.records import digest_text
from pipeline.store import write_text
from pipeline.version_record import Recorded, record
from pipeline.version_reservations import RunReservation, read_reservation, write_reservation
from pipeline.version_reserve import Planned, Reserved, reserve
from pipeline.versions import (
    KINDS,
    Allocation,
    Kind,
    Registry,
    dataset_inputs,
    model_inputs,
    run_inputs,
    verify,
    write_assignments,
)
from tests.test_cards import FACTS, QUALITY, TRAINING, evaluation

HOLD = timedelta(hours=6)


def git(folder: Path, *arguments: str, check: bool = True, **settings: Any) -> str:
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False, env=environment, **settings)
    assert not check or done.returncode == 0, f"git {arguments}: {done.stderr}"
    return done.stdout


def make_remote(folder: Path, *, files: Mapping[str, str] | None = None) -> Path:
    """A bare repository whose branch main has one commit."""
    bare, seed = folder / "remote.git", folder / "seed"
    git(folder, "init", "--quiet", "--bare", "--initial-branch=main", str(bare))
    git(folder, "init", "--quiet", "--initial-branch=main", str(seed))
    for name, text in {"pipeline.yaml": "project: toy\n", ".gitignore": "outputs/\n", **(files or {})}.items():
        write_text(seed / name, text)
    git(seed, "add", "--all")
    git(seed, "-c", "user.name=Somebody", "-c", "user.email=somebody@example.org", "commit", "--quiet", "-m", "Begin")
    git(seed, "push", "--quiet", str(bare), "main")
    return bare


def clone(bare: Path, folder: Path, *options: str) -> Path:
    git(bare.parent, "clone", "--quiet", *options, f"file://{bare}", str(folder))
    return folder


class ToyRun:
    """One run in one clone. `source` and `rows` decide which versions it makes."""

    def __init__(self, folder: Path, *, source: str = "a", rows: str = "r", method: str = "lora", name: str = "toy run") -> None:
        self.folder, self.rows, self.method, self.name = folder, rows, method, name
        self.config: PipelineConfig = parse_config({"project": "toy", "dataset": {"source": source}}, root=folder)
        self.metadata, self.outputs = folder / "metadata", folder / "outputs"

    @property
    def remote(self) -> GitRemote:
        return GitRemote(self.folder)

    def plan(self, registry: Registry, method: str | None = None) -> dict[Kind, Allocation]:
        rows = digest_text(self.rows)
        data = registry.plan(dataset_inputs(self.config, rows))
        model = registry.plan(model_inputs(self.config, FACTS, rows, method or self.method), lineage={"dataset": data})  # type: ignore[arg-type]
        run = registry.plan(run_inputs(self.config, model.key, data.key), lineage={"model": model, "dataset": data})
        return {"dataset": data, "model": model, "run": run}

    def reserve(self, *, now: Callable[[], datetime] = lambda: datetime.now(UTC), **how: Any) -> Reserved:
        done = reserve(self.remote, "metadata", lambda registry, *_: Planned(self.plan(registry)), run=self.name, hold=HOLD, now=now, **how)
        write_reservation(self.outputs, RunReservation(done.nonce, tuple(done.allocations.values()), {}))
        return done

    def run(self, method: str | None = None) -> dict[Kind, Allocation]:
        """What a run leaves in its checkout's metadata."""
        told = read_reservation(self.outputs)
        registry = Registry.load(self.metadata, ours=told.allocations if told else ())
        allocations = self.plan(registry, method)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        records = {kind: registry.record(a, created=now, artifact=digest_text(a.key), commit=None) for kind, a in allocations.items()}
        history = {kind: registry.history(kind) for kind in records}
        scored = evaluation("fine_tuned" if (method or self.method) == "lora" else "model_set")
        written = {
            "dataset": dataset_card(self.config, QUALITY, version=records["dataset"], history=history["dataset"]),
            "model": model_card(self.config, FACTS, version=records["model"], history=history["model"], method=method or self.method,  # type: ignore[arg-type]
                                training=TRAINING, evaluation=scored, evaluated_on=records["dataset"]["name"]),
            "run": run_card(self.config, scored, version=records["run"], history=history["run"]),
        }  # fmt: skip
        for kind, card in written.items():
            write_card(self.metadata / f"{kind}_card.yaml", card)
        write_assignments(self.metadata, {digest_text(self.rows).removeprefix("sha256:")[:16]: "train"})
        write_text(self.metadata / "runs" / f"{allocations['run'].name}.jsonl", json.dumps({"stage": "format", "run": self.name}) + "\n")
        return allocations

    def record(self, *, incoming: Path | None = None, **how: Any) -> Recorded:
        told = read_reservation(self.outputs)
        own = {"own_checkout": True} if incoming is None else {}
        return record(self.remote, "metadata", incoming or self.metadata, nonce=told.nonce if told else None, run=self.name, **own, **how)


def toy(bare: Path, folder: str = "one", /, *options: str, **how: Any) -> ToyRun:
    """A run in a clone of its own."""
    return ToyRun(clone(bare, bare.parent / folder, *options), **{"name": f"run {folder}", **how})


def done(run: ToyRun) -> Recorded:
    run.reserve()
    run.run()
    return run.record()


def later(hours: float) -> Callable[[], datetime]:
    """The clock of a machine that is ahead, or behind."""
    return lambda: datetime.now(UTC) + timedelta(hours=hours)


def refs(bare: Path) -> dict[str, str]:
    """Every ref of a repository with its object: what a command that failed must leave alone."""
    return dict(reversed(line.split(" ", 1)) for line in git(bare, "for-each-ref", "--format=%(objectname) %(refname)").splitlines())


def reserved(bare: Path) -> list[str]:
    return [name.removeprefix("refs/tags/reserved/") for name in refs(bare) if name.startswith("refs/tags/reserved/")]


def before_push(monkeypatch: pytest.MonkeyPatch, *actions: Callable[[], object]) -> list[dict[str, str | None]]:
    """Somebody else acts between the look and the push, once for each action. Gives the list of what was pushed or tried."""
    plain, waiting, pushed = GitRemote.push, list(actions), []

    def push(self: GitRemote, updates: Mapping[str, str | None]) -> None:
        if waiting:
            waiting.pop(0)()
        pushed.append(dict(updates))
        plain(self, updates)

    monkeypatch.setattr(GitRemote, "push", push)
    return pushed


def healthy(bare: Path) -> Registry:
    """The history of the remote's head, which must be sound: no ID and no number twice, every version with its tags."""
    metadata = checked_out(bare, bare.parent / "looked at")
    assert verify(metadata) == []
    registry = Registry.load(metadata)
    assert registry.rebuilt is None, "the index is not that of the records"
    recorded = [entry for kind in KINDS for entry in registry.versions(kind)]
    names = {name for entry in recorded if entry.status == "done" for name in registry.read(entry.kind, entry.id)["names"]}
    assert {name for name in git(bare, "tag", "--list").split() if not name.startswith("reserved/")} == names
    for kind in KINDS:
        path = metadata / f"{kind}_card.yaml"
        assert not path.exists() or yaml_text.read(path)["pipeline"]["versions"] == registry.history(kind)
    return registry


def names(registry: Registry, kind: Kind, status: str = "done") -> list[str]:
    return [entry.name for entry in registry.versions(kind) if entry.status == status]


SHIM = """#!/bin/sh
n=$(($(cat "$COUNT") + 1)); echo $n > "$COUNT"
[ $n = "$KILL_BEFORE" ] && kill -9 $PPID && exit 1
"$GIT" "$@"
rc=$?
for word in $n "$@"; do [ "$word" = "$KILL_AFTER" ] && kill -9 $PPID && exit 1; done
exit $rc
"""


class Killer:
    """Runs something in a process of its own that dies (kill -9) at its n-th call of git."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.count = folder / "bin", folder / "count"
        self.folder.mkdir()
        shim = self.folder / "git"
        shim.write_text(SHIM, encoding="utf-8")
        shim.chmod(shim.stat().st_mode | stat.S_IXUSR)
        self.git = next(path for path in (Path(part) / "git" for part in os.environ["PATH"].split(os.pathsep)) if path.is_file())

    def kills(self, action: Callable[[], object], *, before: int = 0, after: int | str = 0) -> bool:
        """Before or after its n-th call, or after one with that word. False when the action ended without it."""
        self.count.write_text("0", encoding="utf-8")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                path = f"{self.folder}{os.pathsep}{os.environ['PATH']}"
                told = {"COUNT": self.count, "GIT": self.git, "KILL_BEFORE": before, "KILL_AFTER": after, "PATH": path}
                os.environ.update({name: str(value) for name, value in told.items()})
                action()
                code = 0
            finally:
                os._exit(code)
        status = os.waitpid(child, 0)[1]
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        assert killed or status == 0, "it failed by itself"
        return killed


def state_of(bare: Path) -> dict[str, Any]:
    """Tags, and what the default branch's metadata says."""
    tags = git(bare, "tag", "--list").split()
    files = [name for name in git(bare, "ls-tree", "-r", "--name-only", "main").splitlines() if name.startswith("metadata/")]
    return {"tags": tags, "files": files, "commits": int(git(bare, "rev-list", "--count", "main"))}


def checked_out(bare: Path, folder: Path) -> Path:
    """The metadata of the remote's head, in a new folder."""
    shutil.rmtree(folder, ignore_errors=True)
    remote = GitRemote(clone(bare, folder, "--no-checkout"))  # not as files are checked out: with the bytes of the commit
    remote.files_at(remote.look().head, "metadata", folder / "metadata")
    return folder / "metadata"


def _count_pushes() -> list[None]:
    plain, counted = GitRemote.push, []

    def push(self: GitRemote, updates: Mapping[str, str | None]) -> None:
        counted.append(None)
        plain(self, updates)

    GitRemote.push = push  # type: ignore[method-assign]
    return counted


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("clone", type=Path)
    parser.add_argument("--source", default="a")
    parser.add_argument("--rows", default="r")
    parser.add_argument("--run", default=f"process {os.getpid()}")
    parser.add_argument("--only", choices=("reserve", "run", "record"))
    args = parser.parse_args()
    toy = ToyRun(args.clone, source=args.source, rows=args.rows, name=args.run)
    told: dict[str, Any] = {}
    begun, pushes = time.perf_counter(), _count_pushes()
    if args.only in (None, "reserve"):
        told["reserved"] = {kind: {"id": r.id, "existing": r.existing} for kind, r in toy.reserve().allocations.items()}
    if args.only in (None, "run"):
        toy.run()
    if args.only in (None, "record"):
        told["recorded"] = {name: dict(value) if isinstance(value, Mapping) else value for name, value in asdict(toy.record()).items()}
    told |= {"seconds": time.perf_counter() - begun, "pushes": len(pushes)}
    sys.stdout.write(json.dumps(told, default=str) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

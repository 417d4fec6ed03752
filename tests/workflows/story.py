"""The whole story in one folder: a team's repository, data pushed from two clones at once, our workflows run by act with the real
`pipeline` and the real model, versions and cards on the server, a double of the Hub at the end. A program that tells it:

    uv run python -m tests.workflows.story [--train] [--keep FOLDER]

Without --train a model set is made in place of training, which takes a few minutes less.
"""

from __future__ import annotations

import argparse
import copy
import csv
import io
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from pipeline.versions import verify
from tests.hub_double import TOKEN, HubDouble
from tests.workflows.act import ROOT, Finished, GitHub

CONTAINER = "model.engine=embedded"  # what the job's container has in place of an Ollama server
ROWS = (60, 66, 72)  # of the table at the first push, after one clone's push, after both


@dataclass
class Told:
    """What happened, for a test to look at."""

    github: GitHub
    hub: dict[str, Any] = field(default_factory=dict)  # repository -> what the double says of it
    runs: dict[str, Finished] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def table(rows: int) -> str:
    """The sample's first rows."""
    lines = list(csv.reader(io.StringIO((ROOT / "data" / "chief_complaints.csv").read_text(encoding="utf-8"))))
    written = io.StringIO()
    csv.writer(written, lineterminator="\n").writerows(lines[: rows + 1])
    return written.getvalue()


def settings(*, train: bool, gates: dict[str, Any] | None = None) -> str:
    told = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))
    told["train"] |= {"enabled": train, "epochs": 1}
    told["generate"] = {"max_tokens": 40}
    told["model_set"] = {"max_examples": 2}
    told["evaluate"] |= {"metrics": ["chrf"], "gates": gates or {}}
    told["dataset"]["shareable"] = False
    told["publish"] = {"enabled": True, "namespace": "team"}
    return yaml.safe_dump(told, sort_keys=False)


def tell(folder: Path, *, train: bool, say: Callable[[str], None] = lambda line: None) -> Told:
    with HubDouble(tokens={TOKEN: None}) as hub:
        environment = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        files: dict[str, str | bytes] = {"data/chief_complaints.csv": table(ROWS[0]), "pipeline.yaml": settings(train=train)}
        github = GitHub(folder / "github", files, secrets={"HF_TOKEN": TOKEN})
        told = Told(github)

        def run(title: str, server: GitHub) -> Finished:
            began = time.monotonic()
            done = server.pushed(settings=CONTAINER, environment=environment, timeout=1200)
            told.runs[title] = done
            say(f"\n== {title}: {time.monotonic() - began:.0f} s, workflow {'green' if done.code == 0 else 'red'}, jobs {dict(done.jobs)}")
            for job in ("bump", "record", "publish"):
                say("".join(f"   {job} | {line}\n" for line in done.summaries.get(job, "").splitlines() if line.strip()).rstrip("\n"))
            return done

        run("the first push", github)

        first, second = twin(github, "ann"), twin(github, "bob")
        first.push({"data/chief_complaints.csv": table(ROWS[1])}, "Ann: six more rows")
        threads = [threading.Thread(target=run, args=("Ann pushes", first))]
        threads[0].start()
        await_calls(first)  # her run has its checkout
        second.push({"data/chief_complaints.csv": table(ROWS[2])}, "Bob: six more rows on top, a second later")
        threads.append(threading.Thread(target=run, args=("Bob pushes", second)))
        threads[1].start()
        for thread in threads:
            thread.join()

        run("the same again", github)

        gates = {"model_set.accuracy" if not train else "fine_tuned.accuracy": {"value": ">= 0.99"}}
        github.push({"pipeline.yaml": settings(train=train, gates=gates)}, "A gate that these rows can't pass")
        run("a gate that fails", github)

        look(told, hub.state(), folder, say)
    return told


def twin(github: GitHub, name: str) -> GitHub:
    """Another person's clone of the same repository, and runners of its own."""
    other = copy.copy(github)
    other.folder = github.folder / name
    other.artifacts, other._clone, other._home = other.folder / "artifacts", other.folder / "clone", other.folder / "home"
    other._home.mkdir(parents=True)
    other.git("clone", "--quiet", str(other.remote), str(other._clone), at=other.folder)
    other._stand_ins()
    return other


def await_calls(github: GitHub) -> None:
    until = time.monotonic() + 60
    while not any(path.read_text(encoding="utf-8") for path in github.folder.glob("run-*/calls.jsonl")):
        if time.monotonic() > until:
            raise TimeoutError("the run does not begin")
        time.sleep(0.05)


def look(told: Told, state: dict[str, Any], folder: Path, say: Callable[[str], None]) -> None:
    """What there is in the end: commits, tags, cards, the Hub."""
    github = told.github
    told.hub = state["repositories"]
    say("\n== the server's default branch")
    say(github.git("log", "--reverse", "--format=%h %an: %s", github.default_branch, at=github.remote))
    say("\n== tags")
    say("\n".join(github.tags()))
    say("\n== cards")
    for kind in ("dataset", "model", "run"):
        about = yaml.safe_load(github.show(f"metadata/{kind}_card.yaml"))["pipeline"]
        say(f"{kind}: {about['name']}, key {about['key'][:15]}…, versions {', '.join(v['name'] for v in about['versions'])}")
    final = folder / "final"
    github.git("clone", "--quiet", str(github.remote), str(final), at=folder)
    told.problems = verify(final / "metadata")
    say(f"pipeline verify: {told.problems or 'whole'}")
    say("\n== the Hub")
    for name, repository in told.hub.items():
        say(f"{name} ({'private' if repository['private'] else 'public'}), tags {', '.join(sorted(repository['tags']))}")
        say("".join(f"   {file}\n" for file in repository["files"]))


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description="Plays the story of a pushed dataset commit in a temporary folder.")
    parser.add_argument("--train", action="store_true", help="fine-tune, in place of making a model set")
    parser.add_argument("--keep", metavar="FOLDER", type=Path, help="play it here, and leave all of it")
    given = parser.parse_args(argv)

    def say(line: str) -> None:
        if line:
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()

    with tempfile.TemporaryDirectory(prefix="pipeline-story-", ignore_cleanup_errors=True) as scratch:
        folder = given.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        told = tell(folder, train=given.train, say=say)
    return 1 if told.problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

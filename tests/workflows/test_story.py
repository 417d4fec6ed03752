"""The story of `story.py`, played once: workflows by act, the real commands and the real model, git, a double of the Hub."""

from __future__ import annotations

import csv
import io

import pytest
import yaml

from pipeline.versions import parse_name
from tests.workflows.story import ROWS, Told, table, tell

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    return tell(tmp_path_factory.mktemp("story"), train=False)


def test_every_run_ends_as_it_should(told: Told) -> None:
    every = {"bump": "success", "run": "success", "record": "success", "publish": "success"}
    logs = {title: run.log[-3000:] for title, run in told.runs.items()}
    assert {title: run.jobs for title, run in told.runs.items()} == {
        "the first push": every, "Ann pushes": every, "Bob pushes": every, "the same again": {"bump": "success"},
        "a gate that fails": {"bump": "success", "run": "failure", "record": "success"},
    }, logs  # fmt: skip
    assert [run.code == 0 for run in told.runs.values()].count(False) == 1


def test_both_pushes_got_versions_of_their_own(told: Told) -> None:
    held = [told.runs[who].summaries["bump"] for who in ("Ann pushes", "Bob pushes")]
    ids = {next(line.split()[1] for line in text.splitlines() if line.split()[:1] == ["dataset"]) for text in held}
    assert len(ids) == 2, held
    assert not [run for run in told.runs.values() if "is called" in run.summaries.get("record", "")]
    names = [name for name in told.github.tags()]
    assert sorted({name[:4] for name in names if parse_name(name).kind == "dataset"}) == ["0001", "0002", "0003"]
    assert sorted({name[:4] for name in names if parse_name(name).kind == "run"}) == ["0001", "0002", "0003", "0004"]
    assert not [name for name in names if name.startswith("reserved/")]
    assert told.problems == []


def test_commits_of_the_bot_touch_metadata_alone(told: Told) -> None:
    github = told.github
    bots = github.git("log", "--format=%H", "--author=github-actions", github.default_branch, at=github.remote).split()
    assert len(bots) >= 6, "two publications that end together need one commit for their journals"
    for commit in bots:
        assert "[skip ci]" in github.git("log", "-1", "--format=%B", commit, at=github.remote)
        files = github.git("show", "--name-only", "--format=", commit, at=github.remote).split()
        assert all(name.startswith("metadata/") for name in files)


def test_the_hub_has_every_version_but_the_one_whose_gate_failed(told: Told) -> None:
    tags = {name: set(repository["tags"]) for name, repository in told.hub.items()}
    git = {kind: {tag for tag in told.github.tags() if parse_name(tag).kind == kind} for kind in ("dataset", "model", "run")}
    assert tags["team/chief-complaints-model"] == git["model"]
    assert tags["datasets/team/chief-complaints-runs"] == {tag for tag in git["run"] if not tag.startswith("0004")}
    assert tags["datasets/team/chief-complaints-dataset"] == {tag for tag in git["dataset"] if "-train-" in tag}
    assert all(repository["private"] for repository in told.hub.values())
    journal = [line for line in told.github.show("metadata/publications.jsonl").splitlines() if line]
    assert len(journal) == 2 * sum(map(len, tags.values()))


def test_no_record_leaves_the_run(told: Told) -> None:
    cells = [cell for row in csv.reader(io.StringIO(table(ROWS[-1]))) for cell in row if len(cell.split()) >= 6]
    assert len(cells) > ROWS[-1]
    kept = "".join(run.log + "".join(run.summaries.values()) for run in told.runs.values())
    folders = [told.github.artifacts, *(told.github.folder / who / "artifacts" for who in ("ann", "bob"))]
    artifacts = [[path for path in folder.rglob("*") if path.is_file()] for folder in folders]
    assert all(any(path.name == "summary.md" for path in files) for files in artifacts), "every run kept its results"
    kept += "".join(path.read_text(encoding="utf-8") for files in artifacts for path in files)
    kept += yaml.safe_dump(told.hub, allow_unicode=True, width=10_000)
    assert not [cell for cell in cells if cell in kept]

"""What a run left becomes one commit with its tags on a real git remote, whatever happened there meanwhile."""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline import yaml_text
from pipeline.errors import ArtifactError
from pipeline.version_files import record_path
from pipeline.versions import KINDS, Registry, read_assignments, verify, write_assignments
from tests.version_runs import (
    Killer,
    ToyRun,
    before_push,
    checked_out,
    clone,
    done,
    git,
    healthy,
    later,
    make_remote,
    names,
    refs,
    reserved,
    toy,
)

SOMEBODY = ("-c", "user.name=Somebody", "-c", "user.email=somebody@example.org")


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    return make_remote(tmp_path)


def ready(bare: Path, folder: str = "one", **how: Any) -> ToyRun:
    """A run that reserved and is whole, but not recorded."""
    run = toy(bare, folder, **how)
    run.reserve()
    run.run()
    return run


def status(run: ToyRun) -> str:
    return git(run.folder, "status", "--porcelain")


def spoil(bare: Path, file: str, change: Callable[[str], str]) -> str:
    """Somebody edits a file on the default branch and pushes; gives the commit."""
    person = bare.parent / f"person-{secrets.token_hex(4)}"
    git(bare.parent, "clone", "--quiet", str(bare), str(person))
    path = person / file
    path.write_text(change(path.read_text(encoding="utf-8")), encoding="utf-8")
    git(person, "-c", "user.name=S", "-c", "user.email=s@e", "commit", "--quiet", "-am", "Edit")
    git(person, "push", "--quiet", "origin", "main")
    return git(person, "rev-parse", "HEAD").strip()


# --- one run ---------------------------------------------------------------------------------------------------------


def test_a_run_becomes_one_commit_with_its_tags_and_the_checkout_follows(bare: Path) -> None:
    run = ready(bare)
    before = git(bare, "rev-parse", "main").strip()
    recorded = run.record()
    assert git(bare, "rev-list", f"{before}..main").split() == [recorded.commit]
    assert git(bare, "diff", "--name-only", before, "main").split()[0].startswith("metadata/")
    assert [git(bare, "cat-file", "-t", name).strip() for name in recorded.new] == ["tag"] * 3
    tags = git(bare, "tag", "--list").split()
    assert {git(bare, "rev-parse", f"{name}^{{commit}}").strip() for name in tags} == {recorded.commit}
    assert tags == [
        "0001-model-1.0.0.0",
        "0001-model-1.0.0.0-data-1.0.0.0",
        "0001-test-1.0.0.0",
        "0001-train-1.0.0.0",
        "0001-valid-1.0.0.0",
    ]
    assert recorded.in_own_checkout
    assert git(run.folder, "rev-parse", "main").strip() == recorded.commit
    assert status(run) == ""
    healthy(bare)


def test_the_commit_says_what_was_recorded_by_whom_and_starts_no_workflow(bare: Path) -> None:
    done(toy(bare))
    text = git(bare, "log", "-1", "--format=%B", "main")
    assert text.startswith("Record 0001-train-1.0.0.0, 0001-model-1.0.0.0, 0001-model-1.0.0.0-data-1.0.0.0\n\n[skip ci]\n\nRun: run one\n")
    assert {"Run", "Reservation", "Nonce"} <= {line.partition(":")[0] for line in text.splitlines()}


def test_what_another_machine_made_is_recorded_from_a_folder_and_this_checkout_stays(bare: Path, tmp_path: Path) -> None:
    run = ready(bare)
    shutil.move(run.metadata, tmp_path / "downloaded")
    before = git(run.folder, "rev-parse", "HEAD")
    recorded = run.record(incoming=tmp_path / "downloaded")
    assert (git(run.folder, "rev-parse", "HEAD"), status(run), recorded.in_own_checkout) == (before, "", None)
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0"]


@pytest.mark.parametrize("left", ["nothing", "an empty folder", "a folder without versions"])
def test_of_a_run_that_failed_its_ids_are_recorded_as_failed(bare: Path, tmp_path: Path, left: str) -> None:
    run, folder = toy(bare), tmp_path / "left"
    run.reserve()
    if left != "nothing":
        (folder / ("runs" if left.endswith("versions") else "")).mkdir(parents=True)
    recorded = run.record(incoming=folder)
    assert recorded.failed == ("0001-train-1.0.0.0", "0001-model-1.0.0.0", "0001-model-1.0.0.0-data-1.0.0.0")
    registry = healthy(bare)
    assert names(registry, "run", "failed") == ["0001-model-1.0.0.0-data-1.0.0.0"]
    assert registry.read("run", "0001")["note"] == "the run did not finish (held for run one)"
    assert reserved(bare) == []
    assert done(toy(bare, "again")).versions["model"] == "0002-model-1.0.0.0"


def test_an_attempt_after_one_that_was_recorded_as_failed_gets_new_ids(bare: Path, tmp_path: Path) -> None:
    first = toy(bare, "attempt-1", name="workflow run 7")
    first.reserve()
    first.record(incoming=tmp_path / "nothing")
    assert done(toy(bare, "attempt-2", name="workflow run 7")).versions["run"] == "0002-model-1.0.0.0-data-1.0.0.0"
    registry = healthy(bare)
    assert [entry.status for entry in registry.versions("dataset")] == ["failed", "done"]


@pytest.mark.parametrize("where", ["in its own checkout", "in a fresh one"])
def test_recording_twice_changes_nothing(bare: Path, where: str) -> None:
    run = ready(bare)
    run.record()
    before = refs(bare)
    again = run.record() if where.startswith("in its") else toy(bare, "fresh").record(incoming=run.metadata)
    assert (again.commit, again.new, again.failed, refs(bare)) == (None, (), (), before)
    assert status(run) == ""


# --- others were faster ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("when", ["before the look", "between look and push"])
def test_on_a_head_that_moved_both_histories_are_whole(bare: Path, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    one, two = ready(bare, "one"), ready(bare, "two", source="b", rows="others")
    if when == "before the look":
        two.record()
    else:
        before_push(monkeypatch, two.record)
    recorded = one.record()
    assert recorded.renamed == {}
    registry = healthy(bare)
    assert names(registry, "model") == ["0001-model-1.0.0.0", "0002-model-1.0.0.0"]
    metadata = checked_out(bare, bare.parent / "after")
    assert len(read_assignments(metadata)) == 2
    assert len(list((metadata / "runs").glob("*.jsonl"))) == 2
    assert yaml_text.read(metadata / "dataset_card.yaml")["pipeline"]["name"] == "0001-train-1.0.0.0", "that of who came last"
    assert reserved(bare) == []
    assert recorded.in_own_checkout, "the commits of others that it lacked brought metadata alone"
    assert status(one) == ""


def test_a_checkout_that_lacks_more_than_metadata_or_is_in_use_does_not_follow(bare: Path) -> None:
    run = ready(bare)
    lock = run.folder / ".git/index.lock"
    lock.touch()
    before = git(run.folder, "rev-parse", "main")
    assert not run.record().in_own_checkout
    lock.unlink()
    behind = ready(bare, "behind", rows="others")
    spoil(bare, "pipeline.yaml", lambda text: text + "seed: 7\n")
    recorded = behind.record()
    assert recorded.commit
    assert not recorded.in_own_checkout
    assert git(behind.folder, "rev-parse", "main^") == before
    git(behind.folder, "clean", "--quiet", "-fd", "metadata")
    git(behind.folder, "checkout", "--quiet", "metadata")
    git(behind.folder, "pull", "--quiet", "--ff-only")
    assert status(behind) == ""


def test_a_name_that_was_taken_meanwhile_is_replaced_everywhere(bare: Path, tmp_path: Path) -> None:
    run = toy(bare, "alone", source="b", rows="others")
    run.run()  # without a reservation, so that it takes what looks free
    done(toy(bare, "first"))
    recorded = run.record()
    assert recorded.renamed == {
        "0001-train-1.0.0.0": "0002-train-2.0.0.0", "0001-valid-1.0.0.0": "0002-valid-2.0.0.0", "0001-test-1.0.0.0": "0002-test-2.0.0.0",
        "0001-model-1.0.0.0": "0002-model-1.0.0.0", "0001-model-1.0.0.0-data-1.0.0.0": "0002-model-1.0.0.0-data-2.0.0.0",
    }  # fmt: skip
    assert recorded.versions["run"] == "0002-model-1.0.0.0-data-2.0.0.0"
    registry = healthy(bare)
    assert registry.read("run", "0002")["lineage"]["model"]["name"] == "0002-model-1.0.0.0"
    metadata = checked_out(bare, tmp_path / "after")
    told = [yaml_text.read(metadata / f"{kind}_card.yaml") for kind in KINDS]
    assert [card["pipeline"]["id"] for card in told] == ["0002"] * 3
    for card, kind in zip(told, KINDS, strict=True):
        card["pipeline"]["versions"] = []
        path = record_path(metadata, kind, "0002")
        record = yaml_text.read(path)
        assert record["why"].pop().endswith("where it was made; that name was taken meanwhile")
        for text in (yaml_text.dump(card), yaml_text.dump(record)):
            assert not re.search(r"0001-(train|valid|test|model)|version:0001", text), text
    log = metadata / "runs/0002-model-1.0.0.0-data-2.0.0.0.jsonl"
    assert json.loads(log.read_text(encoding="utf-8"))["run"] == "run alone"
    assert "run alone" not in (metadata / "runs/0001-model-1.0.0.0-data-1.0.0.0.jsonl").read_text(encoding="utf-8")


def test_the_own_checkout_takes_over_new_names_where_it_can_follow(bare: Path) -> None:
    run = toy(bare)
    git(bare, "tag", "0001-model-1.0.0.0", "main")  # left by a history that was pushed away
    run.run()
    recorded = run.record()
    assert (recorded.versions["model"], recorded.in_own_checkout) == ("0002-model-1.0.0.0", True)
    assert status(run) == ""
    assert [path.name for path in sorted((run.metadata / "versions").glob("model-*"))] == ["model-0002.yaml"]
    assert [path.stem for path in (run.metadata / "runs").iterdir()] == [recorded.versions["run"]]


def test_of_two_runs_with_the_same_inputs_one_version_comes(bare: Path, tmp_path: Path) -> None:
    one, two = ready(bare, "one"), ready(bare, "two")
    path = record_path(two.metadata, "model", "0002")
    made = yaml_text.read(path)
    made["builds"][0]["machine"] = {"dtype": "float32"}
    yaml_text.write(path, made)
    one.record()
    recorded = two.record()
    assert recorded.versions["model"] == "0001-model-1.0.0.0"
    assert recorded.failed == ("0002-train-1.0.0.0", "0002-model-1.0.0.0", "0002-model-1.0.0.0-data-1.0.0.0")
    registry = healthy(bare)
    assert [entry.status for entry in registry.versions("model")] == ["done", "failed"]
    assert registry.read("model", "0002")["note"].startswith("the same inputs were recorded as 0001-")
    assert [build["machine"] for build in registry.read("model", "0001")["builds"]] == [{}, {"dtype": "float32"}]
    assert len(registry.read("dataset", "0001")["builds"]) == 1
    assert yaml_text.read(checked_out(bare, tmp_path / "after") / "run_card.yaml")["pipeline"]["id"] == "0001"
    assert reserved(bare) == []


def test_rows_keep_the_split_that_was_recorded_first_and_the_run_is_told(bare: Path) -> None:
    one, two = ready(bare, "one"), ready(bare, "two", source="b", rows="others")
    write_assignments(one.metadata, {"a" * 16: "train"})
    write_assignments(two.metadata, {"a" * 16: "test", "b" * 16: "valid"})
    one.record()
    recorded = two.record()
    assert recorded.remarks == ("1 rows have another split in a version that was recorded meanwhile; later versions keep that one",)
    found = read_assignments(checked_out(bare, bare.parent / "after"))
    assert (found["a" * 16], found["b" * 16]) == ("train", "valid")


def test_the_same_bytes_in_the_same_second_do_not_count_twice(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two clones whose commits and tags have the same object names: a push of what is there already succeeds without doing anything."""
    one, two = toy(bare, "one", name="same"), toy(bare, "two", name="same")
    for run in (one, two):
        run.run()
    (two.metadata / "versions").rename(bare.parent / "kept")
    shutil.copytree(one.metadata / "versions", two.metadata / "versions")
    for kind in KINDS:
        shutil.copyfile(one.metadata / f"{kind}_card.yaml", two.metadata / f"{kind}_card.yaml")
    at = "1800000000 +0000"
    for name in ("GIT_AUTHOR_DATE", "GIT_COMMITTER_DATE"):
        monkeypatch.setenv(name, at)
    monkeypatch.setattr(secrets, "token_hex", lambda n=8: "0" * 16)
    monkeypatch.setattr(time, "time", lambda: 1800000000.0)
    results = []
    pushed = before_push(monkeypatch, lambda: results.append(two.record()))
    results.append(one.record())
    assert pushed[0] == pushed[1], "the test needs equal objects"
    assert sorted(result.commit is None for result in results) == [False, True]
    assert names(healthy(bare), "run") == ["0001-model-1.0.0.0-data-1.0.0.0"]


# --- pull requests -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [True, False], ids=["reserved before", "not reserved"])
@pytest.mark.parametrize("how", ["fast-forward", "squash"])
def test_a_record_in_a_pull_request_keeps_its_ids_until_it_is_merged(bare: Path, how: str, held: bool) -> None:
    run = ready(bare) if held else toy(bare)
    run.run()
    head = git(bare, "rev-parse", "main")
    recorded = run.record(pull_request=True)
    assert recorded.waits
    assert git(bare, "rev-parse", "main") == head
    assert git(bare, "rev-parse", recorded.branch).strip() == recorded.commit
    assert "model/id-0001" in reserved(bare)
    other = toy(bare, "other", source="b", rows="others")
    found = other.reserve(pull_request=True)
    assert found.abandoned == ()
    assert found.allocations["dataset"].name == "0002-train-2.0.0.0"
    person = bare.parent / "person"
    git(bare.parent, "clone", "--quiet", str(bare), str(person))
    if how == "squash":
        git(person, "merge", "--quiet", "--squash", f"origin/{recorded.branch}")
        git(person, "-c", "user.name=S", "-c", "user.email=s@e", "commit", "--quiet", "-m", "Squashed")
    else:
        git(person, "merge", "--quiet", "--ff-only", f"origin/{recorded.branch}")
    git(person, "push", "--quiet", "origin", "main", f":{recorded.branch}")
    third = toy(bare, "third", source="c", rows="third")
    assert third.reserve(pull_request=True).allocations["dataset"].name == "0003-train-3.0.0.0"
    assert {tag.rpartition("-")[2] for tag in reserved(bare) if "/id-" in tag} == {"0002", "0003"}
    other.run()
    other.record()
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0", "0002-model-1.0.0.0"]


def test_what_waits_in_a_pull_request_is_not_abandoned(bare: Path) -> None:
    run = toy(bare)
    run.reserve(now=later(-24))
    run.run()
    run.record(pull_request=True)
    found = toy(bare, "other", source="b").reserve()
    assert (found.abandoned, found.remarks) == ((), ())
    assert "model/id-0001" in reserved(bare)


def test_a_record_that_waits_already_is_not_pushed_again(bare: Path) -> None:
    run = ready(bare)
    first = run.record(pull_request=True)
    before = refs(bare)
    again = run.record(pull_request=True)
    assert (again.commit, again.branch, again.versions, again.waits) == (first.commit, first.branch, first.versions, True)
    assert refs(bare) == before


def test_a_second_attempt_adds_to_what_waits_in_the_pull_request(bare: Path) -> None:
    """The first attempt failed, and its branch says so; the repeated run did not."""
    run = toy(bare)
    run.reserve()
    first = run.record(incoming=run.folder / "nothing", pull_request=True)
    assert len(first.failed) == 3
    run.run()
    second = run.record(pull_request=True)
    assert (second.branch, second.waits, second.commit != first.commit) == (first.branch, True, True)
    assert second.new == tuple(second.versions.values())
    git(bare, "update-ref", "refs/heads/main", str(second.commit))
    assert [(e.id, e.status) for e in Registry.load(checked_out(bare, bare.parent / "merged")).versions("run")] == [
        ("0001", "failed"), ("0002", "done"),
    ]  # fmt: skip
    assert verify(bare.parent / "merged" / "metadata") == []
    assert "[skip ci]" not in git(bare, "log", "-1", "--format=%B", "main"), "a pull request's checks must run"


def test_two_pull_requests_with_one_dataset_can_both_be_merged(bare: Path) -> None:
    one, two = toy(bare, "one"), toy(bare, "two")
    two.config = dataclasses.replace(two.config, train=dataclasses.replace(two.config.train, epochs=7))
    for run in (one, two):
        run.reserve()
        run.run()
    branches = [run.record(pull_request=True).branch for run in (one, two)]
    merger = clone(bare, bare.parent / "merger")
    git(merger, *SOMEBODY, "merge", "--quiet", "--no-edit", f"origin/{branches[0]}")
    git(merger, *SOMEBODY, "merge", "--quiet", "--no-edit", "-X", "theirs", f"origin/{branches[1]}")
    (merger / "metadata" / "versions" / "index.jsonl").unlink()
    git(merger, *SOMEBODY, "commit", "--quiet", "--all", "-m", "Merge")
    git(merger, "push", "--quiet", "origin", "main")
    again = toy(bare, "again").reserve()
    assert (again.changed, again.allocations["dataset"].name) == (False, "0001-train-1.0.0.0"), "the first of the two holds"
    third = toy(bare, "third", rows="more")
    third.reserve()
    third.run()
    done = third.record()
    assert "0002-train-1.0.0.0" in done.failed
    seen = checked_out(bare, bare.parent / "seen")
    assert verify(seen) == []
    assert {"0001-model-1.0.0.0", "0002-model-1.0.1.0", done.versions["model"]} <= {e.name for e in Registry.load(seen).versions("model")}


def test_a_card_that_was_changed_by_hand_is_not_overwritten_where_nothing_is_to_be_recorded(bare: Path) -> None:
    done(toy(bare, "first"))
    behind = toy(bare, "behind")
    git(behind.folder, "reset", "--quiet", "--hard", "HEAD")
    done(toy(bare, "second", source="b"))
    card = behind.metadata / "model_card.yaml"
    card.write_text(card.read_text(encoding="utf-8") + "# a remark\n", encoding="utf-8")
    recorded = behind.record()
    assert (recorded.commit, recorded.in_own_checkout) == (None, None)
    assert card.read_text(encoding="utf-8").endswith("# a remark\n")


# --- a damaged history -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("file", "change", "told"),
    [
        ("metadata/versions/dataset-0001.yaml", lambda text: "", "dataset-0001.yaml: empty: a run was cut off"),
        ("metadata/versions/model-0001.yaml", lambda text: "x" * len(text), "model-0001.yaml: damaged"),
        (
            "metadata/versions/model-0001.yaml",
            lambda text: text + "]: {\n",
            "on the branch main: metadata/versions/model-0001.yaml: damaged",
        ),
        ("metadata/versions/splits.csv", lambda text: text + "<<<<<<< x\n", "on the branch main: metadata/versions/splits.csv: damaged"),
    ],
    ids=["emptied record", "record of the same size", "record", "splits"],
)
def test_on_a_damaged_history_nothing_is_recorded_and_the_file_is_named(
    bare: Path, tmp_path: Path, file: str, change: Callable[[str], str], told: str
) -> None:
    done(toy(bare, "first"))
    run = ready(bare, "second", source="b")
    spoil(bare, file, change)
    before, before_here = refs(bare), {path: path.read_bytes() for path in run.metadata.rglob("*") if path.is_file()}
    with pytest.raises(ArtifactError) as error:
        run.record()
    assert told in str(error.value)
    assert str(tmp_path) not in str(error.value)
    assert "/tmp" not in str(error.value)
    assert error.value.hint
    assert refs(bare) == before
    assert {path: path.read_bytes() for path in run.metadata.rglob("*") if path.is_file()} == before_here


def test_a_damaged_card_stops_a_record_that_brings_no_other_and_is_replaced_by_one_that_does(bare: Path, tmp_path: Path) -> None:
    done(toy(bare, "first"))
    run = ready(bare, "second", source="b")
    spoil(bare, "metadata/model_card.yaml", lambda text: text + "]: {\n")
    before = refs(bare)
    with pytest.raises(ArtifactError, match=r"^on the branch main: metadata/model_card.yaml: damaged") as error:
        run.record(incoming=tmp_path / "nothing")
    assert error.value.hint.endswith("then push it")
    assert refs(bare) == before
    run.record()
    healthy(bare)


def test_an_index_that_a_merge_damaged_is_made_anew(bare: Path) -> None:
    done(toy(bare, "first"))
    run = ready(bare, "second", source="b")
    spoil(bare, "metadata/versions/index.jsonl", lambda text: "<<<<<<< x\n" + text + text)
    run.record()
    healthy(bare)


def test_a_damaged_record_of_the_run_is_named_as_the_file_it_is(bare: Path) -> None:
    run = ready(bare)
    path = record_path(run.metadata, "model", "0001")
    path.write_text(path.read_text(encoding="utf-8") + "]: {\n", encoding="utf-8")
    before = refs(bare)
    with pytest.raises(ArtifactError, match=f"^{path}: damaged") as error:
        run.record()
    assert "git checkout" in error.value.hint
    assert "push" not in error.value.hint
    assert refs(bare) == before


# --- many at once ------------------------------------------------------------------------------------------------------

MIXED = ({}, {"source": "b"}, {"source": "b", "rows": "s"}, {"rows": "s"}, {"source": "c", "rows": "t"}, {"source": "b", "rows": "s"})


def started(folder: Path, run: str, how: dict[str, str]) -> dict[str, Any]:
    flags = [part for name, value in how.items() for part in (f"--{name}", value)]
    command = [sys.executable, "-m", "tests.version_runs", str(folder), "--run", run, *flags]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1], timeout=300)
    assert finished.returncode == 0, finished.stderr
    told: dict[str, Any] = json.loads(finished.stdout)
    return told


def check_many(bare: Path, told: list[dict[str, Any]]) -> Registry:
    """Every ID was given to one run, every number to one value, and all that was recorded is there."""
    registry = healthy(bare)
    assert reserved(bare) == []
    for kind in KINDS:
        held = Counter(each["reserved"][kind]["id"] for each in told if not each["reserved"][kind]["existing"])
        assert set(held.values()) <= {1}, f"one ID for two runs: {held}"
        entries = registry.versions(kind)
        assert len({entry.key for entry in entries if entry.status == "done"}) == sum(entry.status == "done" for entry in entries)
        if kind != "run":
            numbers = {(entry.version, entry.segments) for entry in entries}
            assert len({version for version, _ in numbers}) == len({values for _, values in numbers}) == len(numbers)
        assert {each["recorded"]["versions"][kind] for each in told} == set(names(registry, kind))
    return registry


@pytest.mark.parametrize("again", [1, 2])
def test_six_processes_at_once_each_get_their_own_versions(bare: Path, again: int) -> None:
    folders = [toy(bare, f"clone-{n}", *(("--depth=1",) if n % 2 else ())).folder for n in range(len(MIXED))]
    with ThreadPoolExecutor(len(MIXED)) as threads:
        told = list(threads.map(started, folders, [f"run {n}" for n in range(len(MIXED))], MIXED))
    registry = check_many(bare, told)
    assert len(names(registry, "dataset")) == len({tuple(sorted(how.items())) for how in MIXED})
    assert {name.split("-")[2] for name in names(registry, "dataset")} >= {"1.0.0.0", "2.0.0.0", "3.0.0.0"}


# --- killed ----------------------------------------------------------------------------------------------------------


def test_a_record_that_was_killed_anywhere_is_simply_run_again(tmp_path: Path) -> None:
    """Before each of its calls of git; the same command then finishes, and nothing is there twice."""
    bare, killer = make_remote(tmp_path), Killer(tmp_path)
    run = ready(bare)
    prepared, nothing, calls, pushed = tmp_path / "prepared", refs(bare), 1, 0
    shutil.copytree(tmp_path, prepared, ignore=shutil.ignore_patterns("prepared"), symlinks=True)
    while killer.kills(run.record, before=calls):
        if refs(bare) != nothing:
            pushed += 1
            again = run.record()
            assert again.commit is None
            assert names(healthy(bare), "run") == ["0001-model-1.0.0.0-data-1.0.0.0"]
            assert reserved(bare) == []
            assert git(run.folder, "rev-parse", "main") == git(bare, "rev-parse", "main")
            assert status(run) == ""
            for folder in ("one", "remote.git"):
                shutil.rmtree(tmp_path / folder)
                shutil.copytree(prepared / folder, tmp_path / folder, symlinks=True)
        calls += 1
    assert calls > 20
    assert pushed > 2
    healthy(bare)
    assert status(run) == ""


@pytest.mark.parametrize("step", ["push", "reset", "update-ref"])
def test_a_record_whose_names_changed_is_finished_after_it_was_killed(tmp_path: Path, step: str) -> None:
    bare, killer = make_remote(tmp_path), Killer(tmp_path)
    done(toy(bare, "first"))
    run = toy(bare, "late", source="b", rows="others")
    git(run.folder, "reset", "--quiet", "--hard", "HEAD^")
    run.run()
    assert killer.kills(run.record, after=step)
    assert status(run) != ""
    assert run.record().versions["model"] == "0002-model-1.0.0.0"
    assert names(healthy(bare), "model") == ["0001-model-1.0.0.0", "0002-model-1.0.0.0"]
    assert git(run.folder, "rev-parse", "main") == git(bare, "rev-parse", "main")
    assert status(run) == ""

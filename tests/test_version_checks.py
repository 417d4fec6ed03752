"""`verify` over many versions and in bad weather: what it reads again, what it can't miss, what it tells people to do."""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline import version_facts, version_verified, yaml_text
from pipeline.cards import dataset_card, model_card, run_card, write_card
from pipeline.config import PipelineConfig, TrainConfig
from pipeline.errors import ArtifactError, UserError
from pipeline.records import DataQuality, Estimate, Evaluation, ModelFacts, SystemScores
from pipeline.version_files import IndexEntry, record_path
from pipeline.versions import (
    Allocation,
    Registry,
    VersionInputs,
    dataset_inputs,
    model_inputs,
    names_of,
    run_inputs,
    verify,
    write_assignments,
)

NOW = "2026-01-02T03:04:05Z"
FACTS = ModelFacts("tiny:q4", "sha256:base", "llama", 1000, "Q4_1", 2048, 10, None, None, None)
Three = tuple[Allocation, Allocation, Allocation]


def three(metadata: Path, rows: str = "sha256:rows", config: PipelineConfig | None = None) -> Three:
    """A dataset, a model trained on it and their run, recorded, with cards that name them."""
    registry, chosen = Registry.load(metadata), config or PipelineConfig()
    data = registry.plan(dataset_inputs(chosen, rows))
    model = registry.plan(model_inputs(chosen, FACTS, rows, "lora"), lineage={"dataset": data})
    run = registry.plan(run_inputs(chosen, model.key, data.key), lineage={"model": model, "dataset": data})
    for allocation in (data, model, run):
        registry.record(allocation, created=NOW, artifact="sha256:x")
        block = {"id": allocation.id, "name": allocation.name, "versions": [{"id": allocation.id, "name": allocation.name}]}
        yaml_text.write(metadata / f"{allocation.kind}_card.yaml", {"pipeline": block})
    write_assignments(metadata, {"0" * 16: "train"})
    return data, model, run


def edit(path: Path, **fields: Any) -> None:
    path.write_text(yaml_text.dump({**yaml_text.read(path), **fields}), encoding="utf-8")


def index_of(metadata: Path) -> Path:
    return metadata / "versions" / "index.jsonl"


@pytest.fixture
def metadata(tmp_path: Path) -> Path:
    folder = tmp_path / "metadata"
    three(folder)
    return folder


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "outputs" / ".verified.tsv"


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the records that were read as YAML."""
    names: list[str] = []
    honest = version_facts.read_facts

    def listed(path: Path, kind: str, id: str, size: int) -> Any:
        names.append(path.name)
        return honest(path, kind, id, size)

    monkeypatch.setattr("pipeline.version_checks.read_facts", listed)
    return names


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the records whose bytes were compared with what was found before."""
    names: list[str] = []
    honest = version_verified.digest_of

    def listed(path: Path) -> str | None:
        names.append(path.name)
        return honest(path)

    monkeypatch.setattr(version_verified, "digest_of", listed)
    return names


def settle(monkeypatch: pytest.MonkeyPatch) -> None:
    """As though the files had been written long ago."""
    monkeypatch.setattr(version_verified, "_FRESH_NS", -(10**18))


# --- what is read again -----------------------------------------------------------------------------------------------


def test_what_was_found_good_is_not_read_again(metadata: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    assert verify(metadata, cache=cache) == []
    assert read == ["dataset-0001.yaml", "model-0001.yaml", "run-0001.yaml"]
    read.clear()
    assert verify(metadata, cache=cache) == []
    assert read == []
    three(metadata, "sha256:more")
    assert verify(metadata, cache=cache) == []
    assert read == ["dataset-0002.yaml", "model-0002.yaml", "run-0002.yaml"]
    read.clear()
    assert verify(metadata, cache=cache, full=True) == []
    assert len(read) == 6


def test_without_a_cache_all_is_read_and_nothing_written(metadata: Path, tmp_path: Path, read: list[str]) -> None:
    assert verify(metadata) == verify(metadata) == []
    assert len(read) == 6
    assert [path.name for path in tmp_path.iterdir()] == ["metadata"]


def test_a_new_checkout_is_compared_by_content(
    metadata: Path, cache: Path, read: list[str], hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settle(monkeypatch)
    verify(metadata, cache=cache)
    read.clear()
    for path in (metadata / "versions").iterdir():
        os.utime(path, (1, 1))
    assert verify(metadata, cache=cache) == []
    assert (read, len(hashed)) == ([], 3)
    hashed.clear()
    assert verify(metadata, cache=cache) == []
    assert (read, hashed) == ([], [])  # the new times are known now


def swapped(path: Path) -> None:
    """A change of the same size whose modification time is set back."""
    status = path.stat()
    time.sleep(0.05)  # longer than a tick of the file system's clock
    path.write_text(path.read_text(encoding="utf-8").replace("sha256:rows", "sha256:sown"), encoding="utf-8")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def test_an_edit_that_hides_its_time_is_seen(metadata: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settle(monkeypatch)
    verify(metadata, cache=cache)
    swapped(record_path(metadata, "dataset", "0001"))
    problems = verify(metadata, cache=cache)
    assert [p for p in problems if p.startswith("dataset-0001.yaml: D: the value is not the one its digest was made of")]
    assert problems == verify(metadata, cache=cache) == verify(metadata, full=True)


def test_a_file_that_was_just_written_is_not_trusted_by_its_time(metadata: Path, cache: Path, hashed: list[str]) -> None:
    verify(metadata, cache=cache)
    assert verify(metadata, cache=cache) == []
    assert len(hashed) == 3


def test_what_is_not_good_is_named_each_time_and_forgotten_when_mended(metadata: Path, cache: Path) -> None:
    path = record_path(metadata, "model", "0001")
    good = path.read_text(encoding="utf-8")
    verify(metadata, cache=cache)
    edit(path, key="sha256:x")
    first = verify(metadata, cache=cache)
    assert first == verify(metadata, cache=cache)
    assert any("the key is not that of its values" in problem for problem in first)
    path.write_text(good, encoding="utf-8")
    assert verify(metadata, cache=cache) == []


def test_a_record_that_is_gone_is_missed_by_those_that_name_it(metadata: Path, cache: Path) -> None:
    verify(metadata, cache=cache)
    record_path(metadata, "dataset", "0001").unlink()
    for problems in (verify(metadata, cache=cache), verify(metadata)):
        assert any(p.startswith("model-0001.yaml: its dataset 0001-train-1.0.0.0 is not recorded; restore") for p in problems)
        assert any(p.startswith("run-0001.yaml: its dataset") for p in problems)
        assert any(p.startswith("dataset_card.yaml: 0001-train-1.0.0.0 (ID 0001) is not recorded") for p in problems)


@pytest.mark.parametrize("text", ["", "{", "999\n", "1\nmodel-0001.yaml\t1\n", "1\n" + "\t".join("abcdefg") + "\n", "\xff"])
def test_a_cache_that_says_nothing_is_no_harm(metadata: Path, cache: Path, read: list[str], text: str) -> None:
    cache.parent.mkdir()
    cache.write_bytes(text.encode("latin-1"))
    assert verify(metadata, cache=cache) == []
    assert len(read) == 3
    assert verify(metadata, cache=cache) == []
    assert len(read) == 3


def test_other_rules_read_all_again(metadata: Path, cache: Path, read: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    verify(metadata, cache=cache)
    monkeypatch.setattr(version_verified, "RULES", version_verified.RULES + 1)
    verify(metadata, cache=cache)
    assert len(read) == 6


def test_an_output_folder_that_can_not_be_written_is_no_problem(metadata: Path, tmp_path: Path, read: list[str]) -> None:
    (tmp_path / "outputs").write_text("a file", encoding="utf-8")
    assert verify(metadata, cache=tmp_path / "outputs" / ".verified.tsv") == []
    assert verify(metadata, cache=tmp_path / "outputs" / ".verified.tsv") == []
    assert len(read) == 6


def test_the_index_is_compared_with_what_was_found_before(metadata: Path, cache: Path) -> None:
    verify(metadata, cache=cache)
    index = index_of(metadata)
    index.write_text(index.read_text(encoding="utf-8").replace('"done"', '"gone"', 1), encoding="utf-8")
    for problems in (verify(metadata, cache=cache), verify(metadata)):
        assert [p for p in problems if p.startswith("index.jsonl: the line of dataset-0001 differs from the record; delete the file")]


# --- nothing hides anything -------------------------------------------------------------------------------------------


def test_one_damaged_file_hides_no_other(metadata: Path) -> None:
    three(metadata, "sha256:more")
    record_path(metadata, "dataset", "0002").write_text("kind: [", encoding="utf-8")
    record_path(metadata, "model", "0001").write_text("kind: model\n", encoding="utf-8")
    edit(record_path(metadata, "run", "0002"), key="sha256:x")
    (metadata / "dataset_card.yaml").write_text("pipeline: {", encoding="utf-8")
    (metadata / "model_card.yaml").write_text("pipeline: 3\n", encoding="utf-8")
    (metadata / "versions" / "splits.csv").write_text("no header\n", encoding="utf-8")
    index_of(metadata).write_text("{\n", encoding="utf-8")
    problems = verify(metadata)
    for start in (
        "dataset-0002.yaml: damaged", "model-0001.yaml: damaged: 'id' is missing or wrong", "run-0002.yaml: the key is not",
        "dataset_card.yaml: damaged", "model_card.yaml: damaged", "index.jsonl: it is damaged",
    ):  # fmt: skip
        assert [problem for problem in problems if problem.startswith(start)], start
    assert any(problem.startswith("splits.csv: damaged: the first line is not 'row,split'; restore") for problem in problems)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.dates(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5) | st.integers(), inner, max_size=3),
    max_leaves=5,
)


def write_anything(path: Path, tree: Any) -> None:
    import yaml

    path.write_text(yaml.safe_dump(tree, allow_unicode=True), encoding="utf-8")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data(), st.sampled_from(["dataset", "model", "run"]), plain)
def test_any_value_in_any_field_is_a_problem_and_never_a_crash(metadata: Path, data: st.DataObject, kind: str, value: Any) -> None:
    path = record_path(metadata, kind, "0001")
    good = path.read_bytes()
    record = yaml_text.read(path)
    field = data.draw(st.sampled_from(sorted(record)))
    where: Any = record
    if field in ("segments", "lineage") and record[field] and data.draw(st.booleans()):
        where = record[field]
        field = data.draw(st.sampled_from(sorted(where) if isinstance(where, dict) else range(len(where))))
        if data.draw(st.booleans()):
            where = where[field]
            field = data.draw(st.sampled_from(sorted(where)))
    where[field] = value
    try:
        write_anything(path, record)
        assert isinstance(verify(metadata), list)
    finally:
        path.write_bytes(good)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plain, st.sampled_from(["card", "pipeline", "versions", "entry"]))
def test_any_card_is_a_problem_and_never_a_crash(metadata: Path, value: Any, where: str) -> None:
    block: dict[str, Any] = {"id": "0001", "name": "0001-model-1.0.0.0", "versions": [value] if where == "entry" else value}
    tree = {"card": value, "pipeline": {"pipeline": value}}.get(where, {"pipeline": block})
    write_anything(metadata / "model_card.yaml", tree)
    problems = [problem for problem in verify(metadata) if problem.startswith("model_card.yaml: ")]
    assert problems or (where == "versions" and not value and value is not None)
    assert all("`pipeline run`" in problem for problem in problems)


# --- bad weather ------------------------------------------------------------------------------------------------------


def test_a_card_that_is_no_yaml_any_more(metadata: Path) -> None:
    (metadata / "model_card.yaml").write_text("license: mit\n pipeline: {id: 0001\n", encoding="utf-8")
    (problem,) = verify(metadata)
    assert problem.startswith("model_card.yaml: damaged: ")
    assert problem.endswith("; restore the file with `git checkout`, or delete it: `pipeline run` writes it again")


def test_a_file_that_describes_another_id(metadata: Path) -> None:
    three(metadata, "sha256:more")
    path = record_path(metadata, "model", "0002")
    edit(path, id="0003", name="0003-model-1.0.0.0", names=["0003-model-1.0.0.0"])
    problems = verify(metadata)
    assert "model-0002.yaml: describes model '0003'; the ID must be the file's, in quotes; restore the file with `git checkout`" in problems
    index_of(metadata).unlink()
    with pytest.raises(ArtifactError, match=r"model-0002\.yaml: damaged: it describes model '0003'") as refused:
        Registry.load(metadata)
    assert "git checkout" in refused.value.hint


def test_a_copy_beside_the_records_is_named(metadata: Path) -> None:
    copy = metadata / "versions" / "model-0001 (1).yaml"
    copy.write_bytes(record_path(metadata, "model", "0001").read_bytes())
    (problem,) = verify(metadata)
    assert problem.startswith("model-0001 (1).yaml: is no record's name, so nothing reads it; delete it, or call it ")


def test_an_index_that_names_an_id_twice(metadata: Path) -> None:
    index = index_of(metadata)
    good = index.read_text(encoding="utf-8")
    index.write_text(good + good.splitlines(keepends=True)[1], encoding="utf-8")
    assert verify(metadata) == ["index.jsonl: model-0001 is in it twice; `pipeline run` writes it again"]
    three(metadata, "sha256:more")
    assert verify(metadata) == []


MARKED = "<<<<<<< HEAD\n{}=======\nother: side\n>>>>>>> branch\n"


@pytest.mark.parametrize(
    ("file", "problem"),
    [
        ("versions/model-0001.yaml", "model-0001.yaml: damaged: it holds the marks of a merge; resolve it: keep one side whole"),
        ("run_card.yaml", "run_card.yaml: damaged: it holds the marks of a merge; resolve it: keep one side whole"),
        ("versions/index.jsonl", "index.jsonl: it holds the marks of a merge; `pipeline run` writes it again"),
        ("versions/splits.csv", "after a merge, keep the lines of both sides, each row once"),
    ],
)
def test_the_marks_of_a_merge(metadata: Path, file: str, problem: str) -> None:
    path = metadata / file
    path.write_text(MARKED.format(path.read_text(encoding="utf-8")), encoding="utf-8")
    assert any(problem in line for line in verify(metadata))


def test_the_marks_of_a_merge_make_no_record_be_read_that_its_line_tells(metadata: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a merge of two branches all lines are there but in conflict: ten thousand records must not be read for that."""
    three(metadata, "sha256:more")
    index = index_of(metadata)
    lines = index.read_text(encoding="utf-8").splitlines(keepends=True)
    other = lines[3].replace("sha256:", "sha256:0")  # model-0002 of the other branch, of the same size
    index.write_text("".join([*lines[:3], "<<<<<<< HEAD\n", lines[3], "=======\n", other, ">>>>>>> b\n", *lines[4:]]), encoding="utf-8")
    read: list[str] = []
    honest = yaml_text.read
    monkeypatch.setattr(yaml_text, "read", lambda path: read.append(path.name) or honest(path))
    registry = Registry.load(metadata)
    assert registry.rebuilt == "it holds the marks of a merge"
    assert read == ["model-0002.yaml"]
    assert [json.loads(line)["key"] for line in lines] == [
        entry.key
        for kind in ("dataset", "model", "run")
        for entry in registry.versions(kind)  # type: ignore[arg-type]
    ]


def test_two_branches_that_recorded_the_same_inputs(metadata: Path) -> None:
    """Both sides of a merge have the key, under two IDs; the advice leads to a history that holds together."""
    record = Registry.load(metadata).read("model", "0001")
    path = record_path(metadata, "model", "0002")
    path.write_text(
        yaml_text.dump({**record, "id": "0002", "name": "0002-model-1.0.0.0", "names": ["0002-model-1.0.0.0"]}), encoding="utf-8"
    )
    problems = verify(metadata)
    assert any(
        p.startswith("model-0002.yaml: has the key of model-0001.yaml; one of them should not exist: write `status: aban") for p in problems
    )
    edit(path, status="abandoned")
    three(metadata, "sha256:more")
    assert verify(metadata) == []
    assert Registry.load(metadata).versions("model")[-1].id == "0003"


def test_two_branches_that_gave_one_number_to_two_values(metadata: Path, tmp_path: Path) -> None:
    """Model 0002 of another branch, renamed to 0003 by hand, has the number of ours."""
    other = tmp_path / "other"
    three(other)
    three(other, config=PipelineConfig(train=TrainConfig(epochs=7)))
    three(metadata, config=PipelineConfig(train=TrainConfig(epochs=9)))
    record = Registry.load(other).read("model", "0002")
    name = record["name"].replace("0002", "0003")
    record_path(metadata, "model", "0003").write_text(
        yaml_text.dump({**record, "id": "0003", "name": name, "names": [name]}), encoding="utf-8"
    )
    (problem, *_) = [p for p in verify(metadata) if p.startswith("model-0003.yaml: ")]
    assert "C 1 does not mean what it means in model-0002.yaml" in problem
    assert "keep one of the two and run the other branch's configuration again" in problem


def git(folder: Path, *arguments: str, check: bool = True) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false")
    subprocess.run(["git", *who, *arguments], cwd=folder, check=check, capture_output=True)


def test_a_real_merge_of_two_branches(tmp_path: Path) -> None:
    metadata = tmp_path / "metadata"
    git(tmp_path, "init", "-b", "main")
    three(metadata)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    git(tmp_path, "checkout", "-b", "side")
    three(metadata, "sha256:side")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "side")
    git(tmp_path, "checkout", "main")
    three(metadata, "sha256:main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "main")
    git(tmp_path, "merge", "side", check=False)
    problems = verify(metadata)
    for name in ("dataset-0002.yaml", "model-0002.yaml", "run-0002.yaml", "index.jsonl"):
        assert [p for p in problems if p.startswith(f"{name}: ") and "holds the marks of a merge" in p], name
    git(tmp_path, "checkout", "--ours", ".")
    assert verify(metadata) == []


def test_abandoned_and_failed_versions_are_versions(metadata: Path) -> None:
    """Of an ID that was reserved by a run that never came back: its key and its values may come again."""
    registry = Registry.load(metadata)
    inputs = VersionInputs("dataset", ({"a": "new"}, {"b": 1}, {"c": 1}, {"d": 1}))
    for status in ("abandoned", "failed", "abandoned", "done"):
        registry.record(registry.plan(inputs), created=NOW, status=status)
    assert verify(metadata) == []
    found = Registry.load(metadata)
    assert [(e.id, e.version, e.status) for e in found.versions("dataset")[1:]] == [
        ("0002", "2.0.0.0", "abandoned"), ("0003", "2.0.0.0", "failed"), ("0004", "2.0.0.0", "abandoned"), ("0005", "2.0.0.0", "done"),
    ]  # fmt: skip
    assert found.plan(inputs).id == "0005"
    assert "compared with 0004-train-2.0.0.0 (abandoned):" in found.explain("dataset", "0005")


def test_after_9999_there_is_no_version_and_no_problem(metadata: Path) -> None:
    registry = Registry.load(metadata)
    registry._taken["model"].add("9998")
    last = registry.plan(VersionInputs("model", ({"a": 1}, {"b": 1}, {"c": 1}, {"d": 1})), lineage={"dataset": _dataset(registry)})
    registry.record(last, created=NOW)
    assert last.id == "9999"
    assert verify(metadata) == []
    fresh = Registry.load(metadata)
    assert fresh.plan(VersionInputs("model", ({"a": 1}, {"b": 1}, {"c": 1}, {"d": 1}))).existing
    with pytest.raises(UserError, match="no ID is left for a new model version") as refused:
        fresh.plan(VersionInputs("model", ({"a": 2}, {"b": 1}, {"c": 1}, {"d": 1})))
    assert "start a new project" in refused.value.hint
    assert fresh.plan(dataset_inputs(PipelineConfig(), "sha256:more")).id == "0002"


def _dataset(registry: Registry) -> Allocation:
    return registry.plan(dataset_inputs(PipelineConfig(), "sha256:rows"))


# --- size -------------------------------------------------------------------------------------------------------------


def many(metadata: Path, kind: str, version: str) -> Registry:
    entries = [
        IndexEntry(kind, f"{n:04d}", names_of(kind, f"{n:04d}", (1, 0, 0, n), (1, 0, 0, n) if kind == "run" else None)[0], version,  # type: ignore[arg-type]
                   "done", NOW, f"sha256:{n:064d}", (), 1)
        for n in range(1, 10_000)
    ]  # fmt: skip
    return Registry(metadata, entries)


def test_cards_stay_small_with_9999_versions(metadata: Path) -> None:
    """They hold the last twenty, whatever history they are handed; large files in git are what nobody wants to review."""
    config, sure = PipelineConfig(), Estimate(0.8, 0.5, 0.9, "wilson", 3)
    quality = DataQuality(3, 3, (), {}, {}, {}, {}, 0, 0, 0, 0, 0, (), {})
    scores = SystemScores("fine_tuned", "model", 3, 0, {}, *[sure] * 4, None, None, None, {}, ((3,),), (), None, None, 1.0, 20.0)
    found = Evaluation("test", ("Match",), True, "fine_tuned", (scores,), (), (), "Not decided.")
    make: dict[str, Callable[..., Any]] = {
        "dataset": lambda **how: dataset_card(config, quality, **how),
        "model": lambda **how: model_card(config, FACTS, method="lora", evaluation=found, **how),
        "run": lambda **how: run_card(config, found, **how),
    }
    registry = Registry.load(metadata)
    for kind, card in make.items():
        of_many = many(metadata, kind, "1.0.0.0")
        path = metadata / f"{kind}_card.yaml"
        for history in (of_many.history(kind), of_many.history(kind, last=10_000)):  # type: ignore[arg-type]
            write_card(path, card(version=registry.read(kind, "0001"), history=history))  # type: ignore[arg-type]
            kept = yaml_text.read(path)["pipeline"]["versions"]
            assert [entry["id"] for entry in kept] == [f"{n:04d}" for n in range(9980, 10_000)]
            assert path.stat().st_size < 64_000

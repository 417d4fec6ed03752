"""Names, derivation, identity, records on disk, explanations and the checks over them."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import json
import random
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import yaml_text
from pipeline.config import PipelineConfig, TrainConfig, parse_config
from pipeline.errors import ArtifactError, OutputError, UserError
from pipeline.records import ModelFacts
from pipeline.version_files import create_record, record_path
from pipeline.version_names import next_id
from pipeline.versions import (
    Allocation,
    Registry,
    VersionInputs,
    VersionName,
    VersionTakenError,
    dataset_inputs,
    default_branch_state,
    model_inputs,
    names_of,
    parse_name,
    parse_version,
    read_assignments,
    run_inputs,
    verify,
    write_assignments,
)

GOLDEN = Path(__file__).parent / "golden"
NOW = "2026-01-02T03:04:05Z"
FACTS = ModelFacts("tiny:q4", "sha256:base", "llama", 1000, "Q4_1", 2048, 10, None, None, None)

numbers = st.tuples(*[st.integers(0, 999_999_999)] * 4)
ids = st.integers(0, 9999).map(lambda n: f"{n:04d}")
names = st.one_of(
    st.builds(VersionName, ids, st.just("dataset"), numbers, st.sampled_from(["train", "valid", "test"])),
    st.builds(VersionName, ids, st.just("model"), numbers),
    st.builds(VersionName, ids, st.just("run"), numbers, data=numbers),
)


def toy(a: object = "a", b: object = "b", c: object = "c", d: object = "d", *, rows: object = "rows") -> VersionInputs:
    """Model inputs with one value a segment."""
    return VersionInputs("model", ({"a": a}, {"b": b}, {"c": c}, {"d": d}), {"rows": rows})


def made(registry: Registry, inputs: VersionInputs, **how: Any) -> Allocation:
    allocation = registry.plan(inputs, **{k: how.pop(k) for k in ("lineage", "override", "provisional") if k in how})
    registry.record(allocation, created=NOW, **how)
    return allocation


def three(registry: Registry, config: PipelineConfig, rows: str = "sha256:rows", **how: Any) -> tuple[Allocation, Allocation, Allocation]:
    """A dataset, a model trained on it and their run, recorded."""
    data = made(registry, dataset_inputs(config, rows), **how)
    model = made(registry, model_inputs(config, FACTS, rows, "lora"), lineage={"dataset": data}, **how)
    return data, model, made(registry, run_inputs(config, model.key, data.key), lineage={"model": model, "dataset": data}, **how)


# --- names -----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(names)
def test_a_name_reads_back(name: VersionName) -> None:
    assert parse_name(str(name)) == name


@settings(deadline=None)
@given(st.lists(numbers, min_size=2, max_size=8))
def test_names_sort_by_number(versions: list[tuple[int, int, int, int]]) -> None:
    texts = [str(VersionName("0001", "model", version)) for version in versions]
    assert [parse_name(text).version for text in sorted(texts, key=lambda text: parse_name(text).order)] == sorted(versions)


def test_two_digits_come_after_one() -> None:
    assert parse_name("0001-model-2.0.10.0").order > parse_name("0002-model-2.0.9.0").order
    assert parse_name("0002-model-1.0.0.0").order > parse_name("0001-model-1.0.0.0").order


@pytest.mark.parametrize(
    "text",
    ["1-model-1.0.0.0", "00001-model-1.0.0.0", "0001-model-01.0.0.0", "0001-model-1.0.0", "0001-model-1.0.0.0.0", "0001-val-1.0.0.0",
     "0001-model-1.0.0.0 ", "0001-model-1.0.0.0\n", "0001-train-1.0.0.0-data-1.0.0.0", "٠٠٠١-model-1.0.0.0", "0001-model-1.0.0.-1", "",
     "0001-model-1.0.0.0-data-1.0.0", "0001-Model-1.0.0.0"],
)  # fmt: skip
def test_what_is_not_a_name_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="not a version name"):
        parse_name(text)


@settings(deadline=None)
@given(st.from_regex(r"\d{3,5}-(train|model|x)-\d{1,2}(\.\d{1,2}){2,4}(-data-\d{1,2}(\.\d{1,2}){3})?", fullmatch=True))
def test_a_text_is_the_one_spelling_of_a_name_or_refused(text: str) -> None:
    with contextlib.suppress(UserError):
        assert str(parse_name(text)) == text


def test_a_dataset_has_three_names_and_the_others_one() -> None:
    assert names_of("dataset", "0007", (1, 0, 2, 3)) == ("0007-train-1.0.2.3", "0007-valid-1.0.2.3", "0007-test-1.0.2.3")
    assert names_of("run", "0007", (1, 0, 2, 3), (2, 0, 0, 1)) == ("0007-model-1.0.2.3-data-2.0.0.1",)


def test_ids_end_at_9999() -> None:
    assert next_id("model", []) == "0001"
    assert next_id("model", ["0007", "0003"]) == "0008"
    assert next_id("model", ["9998"]) == "9999"
    with pytest.raises(UserError, match="no ID is left for a new model version: 9999"):
        next_id("model", ["9999"])


# --- inputs ----------------------------------------------------------------------------------------------------------


def changed(**sections: dict[str, Any]) -> PipelineConfig:
    return parse_config(sections)


def test_writing_a_default_or_an_integer_for_a_float_changes_no_key() -> None:
    plain = model_inputs(PipelineConfig(), FACTS, "sha256:t", "lora")
    assert model_inputs(changed(train={"epochs": 3, "alpha": 32, "learning_rate": "1e-4"}), FACTS, "sha256:t", "lora") == plain
    by_hand = dataclasses.replace(PipelineConfig(), train=TrainConfig(alpha=32, dropout=0))
    assert model_inputs(by_hand, FACTS, "sha256:t", "lora").key == plain.key


@pytest.mark.parametrize(
    "dataset", [{"path": "elsewhere.csv"}, {"license": "mit"}, {"language": "de"}, {"shareable": True}], ids=lambda d: next(iter(d))
)
def test_what_changes_no_row_is_not_in_the_datasets_key(dataset: dict[str, Any]) -> None:
    assert dataset_inputs(changed(dataset=dataset), "sha256:r").key == dataset_inputs(PipelineConfig(), "sha256:r").key


@pytest.mark.parametrize(
    ("sections", "segment"),
    [
        ({"dataset": {"source": "x"}}, 0),
        ({"dataset": {"subsource": "x"}}, 1),
        ({"dataset": {"method": "x"}}, 2),
        ({"dataset": {"columns": {"text": ["x"]}}}, 2),
        ({"dataset": {"ordered": False}}, 2),
        ({"dataset": {"split": {"train": 0.5, "valid": 0.2, "test": 0.3}}}, 2),
        ({"dataset": {"copilot": {"rating": "x"}}}, 2),
        ({"seed": 7}, 2),
        ({"prompt": {"topic": "x"}}, 3),
    ],
)
def test_each_dataset_setting_has_its_segment(sections: dict[str, Any], segment: int) -> None:
    before, after = dataset_inputs(PipelineConfig(), "sha256:r"), dataset_inputs(changed(**sections), "sha256:r")
    assert [n for n in range(4) if before.segments[n] != after.segments[n]] == [segment]
    assert before.key != after.key


@pytest.mark.parametrize(
    ("sections", "segment"),
    [
        ({"train": {"epochs": 4}}, 2),
        ({"train": {"rank": 4}}, 2),
        ({"train": {"dropout": 0.5}}, 3),
        ({"generate": {"max_tokens": 9}}, 3),
        ({"seed": 7}, 3),
    ],
)
def test_each_model_setting_has_its_segment(sections: dict[str, Any], segment: int) -> None:
    before, after = (model_inputs(config, FACTS, "sha256:t", "lora") for config in (PipelineConfig(), changed(**sections)))
    assert [n for n in range(4) if before.segments[n] != after.segments[n]] == [segment]


def test_the_base_model_moves_a_b_and_d_and_the_method_c() -> None:
    def moved(facts: ModelFacts | None, method: Any = "lora") -> list[int]:
        other = model_inputs(PipelineConfig(), facts, "sha256:t", method)
        return [n for n in range(4) if base.segments[n] != other.segments[n]]

    base = model_inputs(PipelineConfig(), FACTS, "sha256:t", "lora")
    assert moved(dataclasses.replace(FACTS, architecture="qwen2")) == [0]
    assert moved(dataclasses.replace(FACTS, parameters=2000)) == [1]
    assert moved(dataclasses.replace(FACTS, digest="sha256:other")) == [3]
    assert 2 in moved(FACTS, "model_set")
    assert moved(dataclasses.replace(FACTS, name="same file, other name", license="mit", size_bytes=11)) == []
    assert moved(None)[:2] == [0, 1]


def test_other_rows_move_no_segment_of_a_model_but_its_key() -> None:
    a, b = (model_inputs(PipelineConfig(), FACTS, rows, "lora") for rows in ("sha256:1", "sha256:2"))
    assert a.segments == b.segments
    assert a.key != b.key


def test_a_model_set_does_not_care_for_training_settings() -> None:
    a, b, c = (
        model_inputs(config, FACTS, "sha256:t", "model_set").key
        for config in (PipelineConfig(), changed(train={"epochs": 9}), changed(model_set={"max_examples": 2}))
    )
    assert a == b != c


def test_a_runs_key_is_its_parts_and_the_evaluation() -> None:
    key = run_inputs(PipelineConfig(), "sha256:m", "sha256:d").key
    assert key != run_inputs(PipelineConfig(), "sha256:n", "sha256:d").key
    assert key != run_inputs(PipelineConfig(), "sha256:m", "sha256:e").key
    assert key != run_inputs(changed(evaluate={"metrics": ["rouge"]}), "sha256:m", "sha256:d").key
    assert key == run_inputs(changed(train={"epochs": 9}), "sha256:m", "sha256:d").key


def test_keys_stay_what_they_were() -> None:
    """A changed key gives every project a new version of the same thing: change these only together with a note in CHANGELOG."""
    config = changed(dataset={"source": "s"}, prompt={"topic": "t"})
    found = {
        "dataset": dataset_inputs(config, "sha256:r").key,
        "lora": model_inputs(config, FACTS, "sha256:t", "lora").key,
        "model_set": model_inputs(config, FACTS, "sha256:t", "model_set").key,
        "run": run_inputs(config, "sha256:m", "sha256:d").key,
    }
    assert found == json.loads((GOLDEN / "version_keys.json").read_text(encoding="utf-8"))


# --- derivation ------------------------------------------------------------------------------------------------------


def test_segments_number_distinct_values_under_their_parents(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    versions = [
        made(registry, inputs).version
        for inputs in (
            toy(), toy(d="d2"), toy(c="c2"), toy(c="c2", d="d2"), toy(b="b2"), toy("a2"), toy("a2", d="d2"),
            toy(d="d3"), toy("a2", "b2", "c2", "d3"), toy(c="c2", d="d", rows="other"), toy("a3"), toy(d="d2", rows="other"),
        )
    ]  # fmt: skip
    assert versions == ["1.0.0.0", "1.0.0.1", "1.0.1.0", "1.0.1.1", "1.1.0.0", "2.0.0.0", "2.0.0.1", "1.0.0.2", "2.1.0.0", "1.0.1.0",
                        "3.0.0.0", "1.0.0.1"]  # fmt: skip
    assert [entry.id for entry in Registry.load(tmp_path).versions("model")] == [f"{n:04d}" for n in range(1, 13)]


@settings(deadline=None)
@given(st.lists(st.tuples(*[st.integers(0, 2)] * 4), max_size=30))
def test_a_prefix_always_means_the_same_values(values: list[tuple[int, int, int, int]]) -> None:
    registry = Registry(Path("nowhere"), [])
    meaning: dict[tuple[int, ...], tuple[int, ...]] = {}
    for n, value in enumerate(values):
        version = parse_version(registry.plan(toy(*value, rows=n)).version)
        for depth in range(1, 5):
            assert meaning.setdefault(version[:depth], value[:depth]) == value[:depth]
    assert len(set(meaning.values())) == len(meaning)  # and a value has one number


def test_the_same_inputs_reuse_the_version_and_write_nothing(tmp_path: Path) -> None:
    three(Registry.load(tmp_path), PipelineConfig(), artifact="sha256:x", machine={"threads": 2})
    before = {path.name: path.read_bytes() for path in (tmp_path / "versions").iterdir()}
    registry = Registry.load(tmp_path)
    again = registry.plan(dataset_inputs(PipelineConfig(), "sha256:rows"))
    assert again.existing
    assert again.why[0].startswith("unchanged: reused 0001-train-1.0.0.0")
    three(registry, PipelineConfig(), artifact="sha256:x", machine={"threads": 2})
    assert {path.name: path.read_bytes() for path in (tmp_path / "versions").iterdir()} == before


def test_another_result_or_machine_adds_a_build_to_the_same_version(tmp_path: Path) -> None:
    made(Registry.load(tmp_path), toy(), artifact="sha256:x", machine={"threads": 2})
    for artifact, threads, builds in (("sha256:x", 2, 1), ("sha256:y", 2, 2), ("sha256:x", 4, 3), ("sha256:y", 2, 3)):
        registry = Registry.load(tmp_path)
        assert registry.rebuilt is None
        record = registry.record(registry.plan(toy()), created="later", artifact=artifact, machine={"threads": threads})
        assert len(record["builds"]) == builds
    assert [entry.name for entry in Registry.load(tmp_path).versions("model")] == ["0001-model-1.0.0.0"]


def test_a_failed_version_keeps_its_id_and_number_and_is_not_reused(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    assert made(registry, toy(), status="failed", note="out of memory").id == "0001"
    second = Registry.load(tmp_path).plan(toy())
    assert (second.id, second.version, second.existing) == ("0002", "1.0.0.0", False)
    assert "compared with 0001-model-1.0.0.0 (failed):" in second.why
    made(Registry.load(tmp_path), toy())
    assert Registry.load(tmp_path).plan(toy()).id == "0002"


def test_two_plans_before_a_record_get_two_ids(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    first, second = registry.plan(toy()), registry.plan(toy(c="c2"))
    assert (first.name, second.name) == ("0001-model-1.0.0.0", "0002-model-1.0.1.0")
    assert registry.plan(toy()) == first
    assert not (tmp_path / "versions").exists()
    registry.record(second, created=NOW)
    registry.record(first, created=NOW)
    assert [entry.name for entry in Registry.load(tmp_path).versions("model")] == [first.name, second.name]


def test_kinds_count_apart_and_a_run_is_named_after_its_parts(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    made(registry, dataset_inputs(PipelineConfig(), "sha256:first"))
    data, model, run = three(registry, PipelineConfig())
    assert (data.name, model.name, run.name) == ("0002-train-1.0.0.1", "0001-model-1.0.0.0", "0001-model-1.0.0.0-data-1.0.0.1")


def test_provisional_versions_are_named_and_never_written(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    data = registry.plan(dataset_inputs(PipelineConfig(), "sha256:r"), provisional=True)
    model = registry.plan(model_inputs(PipelineConfig(), FACTS, "sha256:r", "lora"), lineage={"dataset": data})
    assert model.provisional
    assert "only the default branch" in model.why[-1]
    assert registry.record(model, created=NOW, artifact="sha256:x")["status"] == "provisional"
    assert list(tmp_path.iterdir()) == []


def test_a_recorded_version_is_no_less_so_on_another_branch(tmp_path: Path) -> None:
    made(Registry.load(tmp_path), toy())
    again = Registry.load(tmp_path).plan(toy(), provisional=True)
    assert (again.existing, again.provisional) == (True, False)


# --- overrides -------------------------------------------------------------------------------------------------------


def test_an_override_names_new_values_and_is_recorded(tmp_path: Path) -> None:
    made(Registry.load(tmp_path), toy())
    made(Registry.load(tmp_path), toy("a2"), override="5.0.0.0")
    record = Registry.load(tmp_path).read("model", "0002")
    assert (record["version"], record["override"]) == ("5.0.0.0", "5.0.0.0")
    assert made(Registry.load(tmp_path), toy("a2", d="d2")).version == "5.0.0.1"
    assert made(Registry.load(tmp_path), toy("a3")).version == "6.0.0.0"
    assert Registry.load(tmp_path).plan(toy(), override="7.0.0.0").why[1].startswith("the override 7.0.0.0 does nothing")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        ("1.0.0.0", "D can't be 0, which has another meaning; the next free number is 1"),
        ("2.0.0.1", "A can't be 2: this value is 1 already"),
        ("1.0.0", "not a version"),
    ],
)
def test_an_override_can_not_give_a_number_two_meanings(tmp_path: Path, override: str, problem: str) -> None:
    made(Registry.load(tmp_path), toy())
    with pytest.raises(UserError, match=problem):
        Registry.load(tmp_path).plan(toy(d="d2"), override=override)


def test_a_run_can_not_be_overridden(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    data, model, _ = three(registry, PipelineConfig())
    inputs = run_inputs(changed(evaluate={"metrics": []}), model.key, data.key)
    with pytest.raises(UserError, match="named after"):
        registry.plan(inputs, lineage={"model": model, "dataset": data}, override="1.0.0.0")


# --- explanations ----------------------------------------------------------------------------------------------------


def test_the_change_is_named(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    data, model, _ = three(registry, PipelineConfig())
    assert registry.explain("model") == ["0001-model-1.0.0.0 (done)", "the first model version"]
    longer = changed(train={"epochs": 5})
    other = made(registry, model_inputs(longer, FACTS, "sha256:rows", "lora"), lineage={"dataset": data})
    sentences = ["compared with 0001-model-1.0.0.0:", "C: train.epochs 3 -> 5"]
    assert list(other.why) == ["new: 0002-model-1.0.1.0", *sentences]
    assert registry.explain("model") == ["0002-model-1.0.1.0 (done)", *sentences]
    assert registry.explain("model", "0001")[1] == "the first model version"
    made(registry, run_inputs(longer, other.key, data.key), lineage={"model": other, "dataset": data})
    assert registry.explain("run")[1:] == ["compared with 0001-model-1.0.0.0-data-1.0.0.0:", f"model: {model.name} -> {other.name}"]


def test_nested_and_long_values_are_shown_where_they_differ(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    long = "the same beginning of an instruction that goes on and on for longer than a line, "
    ratings = [{"value": 0, "label": "No"}, {"value": 1, "label": "Yes"}]
    made(registry, dataset_inputs(changed(prompt={"instruction": long + "one"}, dataset={"ratings": ratings}), "sha256:r"))
    ratings[1]["label"] = "Sure"
    why = registry.plan(dataset_inputs(changed(prompt={"instruction": long + "two"}, dataset={"ratings": ratings}), "sha256:r")).why
    assert 'C: dataset.ratings[1].label "Yes" -> "Sure"' in why
    assert 'D: prompt.instruction …r than a line, one" -> …r than a line, two"' in why


def test_going_back_to_an_old_source_is_explained_against_both(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    made(registry, toy())
    made(registry, toy("a2"))
    back = made(registry, toy(d="d2"))
    assert back.version == "1.0.0.1"
    assert list(back.why) == [
        "new: 0003-model-1.0.0.1",
        "compared with 0002-model-2.0.0.0:",
        'A: a "a2" -> "a"',
        'D: d "d" -> "d2"',
        "and with 0001-model-1.0.0.0, which shares more of it:",
        'D: d "d" -> "d2"',
    ]


def test_other_rows_alone_are_named_as_the_reason(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    made(registry, toy(rows="sha256:0123456789"))
    assert registry.plan(toy(rows="sha256:9876543210")).why[-1] == "key: rows sha256:01234567… -> sha256:98765432…"


def test_explaining_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no model version is recorded yet"):
        Registry.load(tmp_path).explain("model")


# --- files -----------------------------------------------------------------------------------------------------------


def test_the_record_looks_as_it_always_did(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    inputs = VersionInputs("dataset", ({"dataset.source": "0899"}, {"b": 1.0}, {"c": ["on"]}, {"rows": "sha256:r"}))
    data = made(registry, inputs, commit="12e3")
    made(registry, toy("yes", 1, 1e-5, None), lineage={"dataset": data}, artifact="sha256:x", machine={"threads": 2, "dtype": "bf16"})
    text = record_path(tmp_path, "model", "0001").read_text(encoding="utf-8")
    assert text == (GOLDEN / "model-0001.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(record_path(tmp_path, "dataset", "0001").read_text(encoding="utf-8"))["segments"][0]["value"] == {
        "dataset.source": "0899"
    }


def test_a_file_system_without_links_does_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, target: Path) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(Path, "hardlink_to", refuse)
    made(Registry.load(tmp_path), toy())
    with pytest.raises(VersionTakenError):
        create_record(tmp_path, Registry.load(tmp_path).read("model", "0001"))
    assert [path.name for path in sorted((tmp_path / "versions").iterdir())] == ["index.jsonl", "model-0001.yaml"]


@pytest.mark.parametrize("damage", ["missing", "cut", "merge marks", "a line less", "a line twice", "stale size"])
def test_an_index_in_doubt_is_rebuilt_from_the_records(tmp_path: Path, damage: str) -> None:
    registry = Registry.load(tmp_path)
    three(registry, PipelineConfig())
    made(registry, toy())
    index = tmp_path / "versions" / "index.jsonl"
    good = index.read_text(encoding="utf-8")
    lines = good.splitlines(keepends=True)
    bad = {
        "missing": None,
        "cut": good[:-40],
        "merge marks": "<<<<<<< ours\n" + good,
        "a line less": "".join(lines[1:]),
        "a line twice": good + lines[0],
        "stale size": good.replace('"record_bytes":', '"record_bytes":1'),
    }[damage]
    index.unlink() if bad is None else index.write_text(bad, encoding="utf-8")
    fresh = Registry.load(tmp_path)
    assert fresh.rebuilt is not None
    assert any("index.jsonl" in problem for problem in verify(tmp_path))
    assert fresh.plan(toy()).existing
    assert fresh.plan(toy(d="new")).version == registry.plan(toy(d="new")).version
    fresh.record(fresh.plan(toy()), created=NOW)
    assert index.read_text(encoding="utf-8") == good
    assert Registry.load(tmp_path).rebuilt is None


def test_a_damaged_record_is_named(tmp_path: Path) -> None:
    made(Registry.load(tmp_path), toy())
    record_path(tmp_path, "model", "0001").write_text("kind: [", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"model-0001\.yaml: damaged"):
        Registry.load(tmp_path)
    record_path(tmp_path, "model", "0001").write_text("kind: model\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"model-0001\.yaml: damaged: 'id' is missing"):
        Registry.load(tmp_path)
    assert any("model-0001.yaml: damaged" in problem for problem in verify(tmp_path))


def test_an_id_whose_recording_was_cut_off_stays_taken(tmp_path: Path) -> None:
    made(Registry.load(tmp_path), toy())
    record_path(tmp_path, "model", "0002").touch()
    assert Registry.load(tmp_path).plan(toy(d="d2")).id == "0003"
    assert any("model-0002.yaml: empty" in problem for problem in verify(tmp_path))


def test_the_same_id_is_never_recorded_twice(tmp_path: Path) -> None:
    mine, theirs = Registry.load(tmp_path), Registry.load(tmp_path)
    late = mine.plan(toy(d="mine"))
    made(theirs, toy(d="theirs"))
    written = record_path(tmp_path, "model", "0001").read_bytes()
    with pytest.raises(VersionTakenError, match="meanwhile"):
        mine.record(late, created=NOW)
    assert record_path(tmp_path, "model", "0001").read_bytes() == written
    assert made(Registry.load(tmp_path), toy(d="mine")).name == "0002-model-1.0.0.1"


def test_of_many_at_once_one_gets_each_id(tmp_path: Path) -> None:
    def run(n: int) -> None:
        while True:
            registry = Registry.load(tmp_path)
            try:
                names.append(made(registry, toy(d=n)).name)
                return
            except VersionTakenError:
                continue

    names: list[str] = []
    threads = [threading.Thread(target=run, args=(n,)) for n in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert sorted(names) == [f"{n:04d}-model-1.0.0.{n - 1}" for n in range(1, 7)]


def test_a_folder_that_can_not_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "versions").write_text("a file", encoding="utf-8")
    registry = Registry(tmp_path, [])
    with pytest.raises(OutputError, match="can't be written"):
        made(registry, toy())


def test_nothing_is_left_of_a_record_that_could_not_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "hardlink_to", full)
    with pytest.raises(OutputError, match="the disk is full"):
        made(Registry.load(tmp_path), toy())
    assert list((tmp_path / "versions").iterdir()) == []


# --- verify ----------------------------------------------------------------------------------------------------------


def write_cards(metadata: Path, *allocations: Allocation) -> None:
    for a in allocations:
        block = {"id": a.id, "name": a.name, "versions": [{"id": a.id, "name": a.name}]}
        yaml_text.write(metadata / f"{a.kind}_card.yaml", {"pipeline": block})


def edit(metadata: Path, kind: str, number: str, /, **fields: Any) -> None:
    path = record_path(metadata, kind, number)
    path.write_text(yaml_text.dump({**yaml_text.read(path), **fields}), encoding="utf-8")


def test_what_holds_together_has_no_problem(tmp_path: Path) -> None:
    assert verify(tmp_path) == []
    registry = Registry.load(tmp_path)
    write_cards(tmp_path, *three(registry, PipelineConfig()))
    three(registry, changed(train={"epochs": 9}))
    made(registry, model_inputs(PipelineConfig(), None, "sha256:n", "model_set"), lineage={"dataset": registry.plan(
        dataset_inputs(PipelineConfig(), "sha256:rows"))}, status="failed")  # fmt: skip
    write_assignments(tmp_path, {"0" * 16: "train"})
    assert verify(tmp_path) == []


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("model", {"id": 1}, "the ID must be the file's, in quotes"),
        ("model", {"name": "0002-model-1.0.0.0"}, "is not one of model 0001"),
        ("model", {"name": "model-one"}, "not a version name"),
        ("model", {"version": "1.0.0.1"}, "differ"),
        ("model", {"status": "maybe"}, "'maybe' is not one of"),
        ("model", {"key": "sha256:x"}, "the key is not that of its values"),
        ("model", {"beside": {"train and valid rows": "sha256:z"}}, "the key is not that of its values"),
        ("model", {"segments": []}, "the segments are not A to D"),
        ("model", {"lineage": {}}, "its lineage names no dataset"),
        ("run", {"lineage": {"model": {"id": "0009", "name": "n", "key": "k"}}}, "its model n is not recorded"),
    ],
)
def test_what_does_not_hold_together_is_named(tmp_path: Path, kind: str, fields: dict[str, Any], problem: str) -> None:
    write_cards(tmp_path, *three(Registry.load(tmp_path), PipelineConfig()))
    edit(tmp_path, kind, "0001", **fields)
    problems = verify(tmp_path)
    assert any(line.startswith(f"{kind}-0001.yaml: ") and problem in line for line in problems), problems


def test_an_edited_value_or_number_is_named(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    made(registry, toy())
    made(registry, toy(d="d2"))
    segments = yaml_text.read(record_path(tmp_path, "model", "0002"))["segments"]
    segments[3]["number"] = 0
    edit(tmp_path, "model", "0002", segments=segments, version="1.0.0.0", name="0002-model-1.0.0.0", names=["0002-model-1.0.0.0"])
    assert any(line.startswith("model-0002.yaml: D 0 does not mean what it means in model-0001.yaml; ") for line in verify(tmp_path))
    segments[0]["value"] = {"a": "edited"}
    edit(tmp_path, "model", "0002", segments=segments)
    assert any(line.startswith("model-0002.yaml: A: the value is not the one its digest was made of; ") for line in verify(tmp_path))


def test_a_key_twice_and_an_index_line_that_lies_are_named(tmp_path: Path) -> None:
    registry = Registry.load(tmp_path)
    made(registry, toy())
    copy = {**registry.read("model", "0001"), "id": "0002", "name": "0002-model-1.0.0.0", "names": ["0002-model-1.0.0.0"]}
    record_path(tmp_path, "model", "0002").write_text(yaml_text.dump(copy), encoding="utf-8")
    assert any("has the key of model-0001.yaml" in problem for problem in verify(tmp_path))
    record_path(tmp_path, "model", "0002").unlink()
    index = tmp_path / "versions" / "index.jsonl"
    index.write_text(index.read_text(encoding="utf-8").replace('"done"', '"gone"'), encoding="utf-8")
    assert any("the line of model-0001 differs" in problem for problem in verify(tmp_path))


def test_cards_must_name_recorded_versions(tmp_path: Path) -> None:
    data, model, _ = three(Registry.load(tmp_path), PipelineConfig())
    write_cards(tmp_path, data, dataclasses.replace(model, id="0002", names=("0002-model-1.0.0.0",)))
    (tmp_path / "run_card.yaml").write_text("a card: of something else\n", encoding="utf-8")
    problems = verify(tmp_path)
    assert any(problem.startswith("model_card.yaml: 0002-model-1.0.0.0 (ID 0002) is not recorded in versions/; ") for problem in problems)
    assert any(problem.startswith("run_card.yaml: damaged") for problem in problems)
    (tmp_path / "dataset_card.yaml").unlink()
    assert any(problem.startswith("dataset_card.yaml: missing, although dataset versions are recorded; ") for problem in verify(tmp_path))


# --- splits ----------------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.dictionaries(st.integers(0, 2**64 - 1).map(lambda n: f"{n:016x}"), st.sampled_from(["train", "valid", "test"]), max_size=20))
def test_assignments_read_back(tmp_path_factory: pytest.TempPathFactory, assignments: dict[str, Any]) -> None:
    folder = tmp_path_factory.mktemp("metadata")
    assert write_assignments(folder, assignments) is bool(assignments)
    assert read_assignments(folder) == assignments
    assert write_assignments(folder, assignments) is False


def test_assignments_of_earlier_versions_stay(tmp_path: Path) -> None:
    a, b, c = (letter * 16 for letter in "abc")
    write_assignments(tmp_path, {b: "test", a: "train"})
    write_assignments(tmp_path, {c: "valid", a: "test"})
    assert read_assignments(tmp_path) == {a: "test", b: "test", c: "valid"}
    text = (tmp_path / "versions" / "splits.csv").read_text(encoding="utf-8")
    assert text == f"row,split\n{a},test\n{b},test\n{c},valid\n"


@pytest.mark.parametrize("text", ["row,split\nxyz,train\n", f"row,split\n{'a' * 16},dev\n", f"{'a' * 16},train\n", "",
                                  f"row,split\n{'a' * 16},train\n{'a' * 16},test\n", "row,split\n<<<<<<< ours\n"])  # fmt: skip
def test_damaged_assignments_are_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "versions").mkdir()
    (tmp_path / "versions" / "splits.csv").write_text(text, encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"splits\.csv: damaged"):
        read_assignments(tmp_path)
    assert any("splits.csv" in problem for problem in verify(tmp_path))


def test_a_row_key_is_never_a_text(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a row key"):
        write_assignments(tmp_path, {"fever and cough": "train"})


# --- branches --------------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("GIT_CONFIG_GLOBAL", "GIT_CONFIG_SYSTEM"):
        monkeypatch.setenv(name, "/dev/null")
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@example.org", "commit", "--quiet", "--allow-empty", "--message=first")
    return tmp_path


def git(folder: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(folder), *arguments], check=True, capture_output=True, timeout=30)


def test_only_the_default_branch_allocates(repository: Path) -> None:
    assert default_branch_state(repository, {}) == (True, "main", True)
    git(repository, "checkout", "--quiet", "-b", "feature")
    assert default_branch_state(repository, {}) == (True, "feature", False)
    git(repository, "update-ref", "refs/remotes/origin/feature", "HEAD")
    git(repository, "symbolic-ref", "refs/remotes/origin/HEAD", "refs/remotes/origin/feature")
    assert default_branch_state(repository, {}).allocates
    git(repository, "checkout", "--quiet", "main")
    assert not default_branch_state(repository, {}).allocates


def test_a_detached_head_is_the_branch_that_the_workflow_names(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    git(repository, "checkout", "--quiet", "--detach")
    event = tmp_path_factory.mktemp("event") / "event.json"
    event.write_text('{"repository": {"default_branch": "trunk"}}', encoding="utf-8")
    on = {"GITHUB_EVENT_PATH": str(event), "GITHUB_REF": "refs/heads/trunk", "GITHUB_REF_NAME": "trunk"}
    assert default_branch_state(repository, {}) == (True, None, False)
    assert default_branch_state(repository, on) == (True, "trunk", True)
    assert default_branch_state(repository, {**on, "GITHUB_REF": "refs/heads/x", "GITHUB_REF_NAME": "x"}) == (True, "x", False)
    assert default_branch_state(repository, {**on, "GITHUB_REF": "refs/tags/trunk"}) == (True, None, False)


def test_a_lone_repository_allocates_whatever_its_branch_is_called(tmp_path: Path) -> None:
    git(tmp_path, "init", "--quiet", "--initial-branch=trunk")
    assert default_branch_state(tmp_path, {}) == (True, "trunk", True)
    git(tmp_path, "remote", "add", "origin", "https://example.org/x.git")
    assert default_branch_state(tmp_path, {}) == (True, "trunk", False)


def test_a_worktree_whose_repository_is_not_here_allocates_nothing(tmp_path: Path) -> None:
    """A container that sees the worktree's folder alone, say: which branch it is on can't be told."""
    (tmp_path / ".git").write_text("gitdir: /nowhere/.git/worktrees/feature\n", encoding="utf-8")
    assert default_branch_state(tmp_path, {}) == (True, None, False)


def test_without_git_or_a_repository_versions_are_allocated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert default_branch_state(tmp_path, {}) == (False, None, True)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert default_branch_state(tmp_path, {}) == (False, None, True)


# --- size ------------------------------------------------------------------------------------------------------------


def test_numbers_hold_over_hundreds_of_versions_in_any_order(tmp_path: Path) -> None:
    registry = Registry(tmp_path, [])
    values = [tuple(random.Random(n).choices(range(4), k=4)) for n in range(300)]
    planned = [registry.plan(toy(*value, rows=n)) for n, value in enumerate(values)]
    assert len({a.id for a in planned}) == 300
    assert len({a.version for a in planned}) == len(set(values))

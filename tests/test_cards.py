"""The three cards: what the Hub reads, what every YAML parser reads, and what is checked offline."""

from __future__ import annotations

import copy
import dataclasses
import io
import json
import math
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import DatasetCardData, ModelCardData
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from ruamel.yaml import YAML

from pipeline import yaml_text
from pipeline.cards import dataset_card, model_card, read_card, run_card, validate_card, write_card
from pipeline.config import PipelineConfig, parse_config
from pipeline.errors import ArtifactError
from pipeline.prompts import instruction
from pipeline.records import (
    Comparison,
    DataQuality,
    DroppedRow,
    EpochFigures,
    Estimate,
    Evaluation,
    GateResult,
    ModelFacts,
    RatingScores,
    RationaleScore,
    SplitQuality,
    SystemScores,
    TrainingResult,
)
from pipeline.versions import Allocation, Registry, VersionInputs, dataset_inputs, model_inputs, run_inputs, verify

GOLDEN = Path(__file__).parent / "golden"
SECRET_ID = "MRN-0042"
FACTS = ModelFacts("tiny:q4", "sha256:base", "llama", 1000, "Q4_1", 2048, 10, "apache-2.0", "owner/tiny", "{{ messages }}")
QUALITY = DataQuality(
    rows_read=12,
    rows_kept=10,
    dropped=(DroppedRow(3, "no rating"), DroppedRow(7, "no rating")),
    splits={
        "train": SplitQuality(6, 3, {"Match": 3, "No": 3}),
        "valid": SplitQuality(1, 1, {"No": 1}),
        "test": SplitQuality(3, 2, {"No": 3}),
    },
    prompt_words={"min": 1.0, "median": 2.0, "p95": 3.0, "max": 4.0},
    rationale_words={},
    prompt_tokens={},
    without_rationale=1,
    exact_duplicates=0,
    near_duplicate_clusters=0,
    near_duplicate_rows=0,
    label_conflicts=0,
    contradicting_rationales=(SECRET_ID,),
    opinions={"copilot": 2},
)
TRAINING = TrainingResult(1, (EpochFigures(1, 1.5, None, 2.0, 30),), 3, 6, {}, 20, 30, 2.0, 1000, "bf16", 2)


def config(**sections: Any) -> PipelineConfig:
    return parse_config({"project": "demo", **sections})


def version(kind: str = "model", **fields: Any) -> dict[str, Any]:
    names = {"dataset": ["0899-train-1.0.0.0", "0899-valid-1.0.0.0", "0899-test-1.0.0.0"], "model": ["0899-model-1.0.0.0"],
             "run": ["0899-model-1.0.0.0-data-1.0.0.0"]}[kind]  # fmt: skip
    return {
        "kind": kind, "id": "0899", "name": names[0], "names": names, "version": "1.0.0.0", "key": "sha256:key", "status": "done",
        "created": "2026-01-02T03:04:05Z", "commit": None, "override": None, "why": ["the first"], "builds": [],
        "segments": [{"segment": "A", "number": 1, "digest": "sha256:a", "value": {"architecture": "llama"}}],
        "lineage": {} if kind == "dataset" else {"dataset": {"id": "0012", "name": "0012-train-1.0.0.0", "key": "sha256:d"}},
        **fields,
    }  # fmt: skip


def scores(system: str, accuracy: float | None, kind: Any = "model", unscored: int = 0) -> SystemScores:
    sure = Estimate(accuracy, 0.5, 0.9, "wilson", 3)
    return SystemScores(
        system, kind, 3, 0, {}, sure, Estimate(accuracy), Estimate(accuracy), Estimate(None), None, None, None,
        {"Match": RatingScores(sure, sure, sure, 3)}, ((3, 0, 0), (0, 0, 0)), (RationaleScore("chrf", Estimate(0.25, n=3), unscored),),
        None, None, 1.5, 20.0,
    )  # fmt: skip


def evaluation(primary: str = "fine_tuned") -> Evaluation:
    pair = Comparison(primary, "base", 3, Estimate(0.2, -0.1, 0.5), 1, 0, 1.0, 1.0, None, "not decided", "not decided at 3 rows")
    plain = Comparison("base", "majority", 3, Estimate(0.0), 0, 0, 1.0, 1.0, None, "not decided", "-")
    given = Comparison("copilot", "base", 3, Estimate(0.0), 0, 0, 1.0, 1.0, None, "not decided", "-")
    systems = (scores("base", 0.4), scores(primary, 0.8, unscored=1), scores("majority", 0.5, "baseline"), scores("copilot", 0.6, "given"))
    return Evaluation("test", ("Match", "No"), True, primary, systems, (pair, plain, given), (), "Not decided.")


def cards(**sections: Any) -> dict[str, dict[str, Any]]:
    chosen = config(**sections)
    return {
        "dataset": dataset_card(chosen, QUALITY, version=version("dataset"), history=[{"id": "0899", "name": "n"}]),
        "model": model_card(
            chosen, FACTS, version=version(), method="lora", reason="it fits", training=TRAINING, evaluation=evaluation(),
            validation={"prompt_ids_equal": True}, lineage={"adapter": "sha256:adapter"}, dataset_revision="a" * 40,
            source_url="https://huggingface.co/datasets/o/demo-runs",
        ),
        "run": run_card(chosen, evaluation(), version=version("run")),
    }  # fmt: skip


PUBLISHED = {"publish": {"enabled": True, "namespace": "org", "rows": True}, "dataset": {"license": "cc-by-4.0"}}


# --- YAML ------------------------------------------------------------------------------------------------------------


def read_1_2(text: str) -> Any:
    return YAML(typ="safe", pure=True).load(io.StringIO(text))


tricky = st.sampled_from(
    ["0899", "0420", "2.0", "1.10", "1_0", "yes", "No", "ON", "off", "y", "null", "~", "", " ", "true", "2026-01-01", "0x1F", "0o17", "0b1",
     "1e5", "12:30", "190:20:30", ".5", ".nan", "-.inf", "+1", "=", "<<", "- a", "a: b", "a #b", "#", "&a", "*a", "!x", "%TAG", "@", "`",
     "a\nb", "a\r\nb", "\ta", "a ", " a", "'", '"', "\\", "[", "{", "?", ":", "---", "...",
     "Ä ö", "🙂", "\u2028", "\x85", "\x7f", "\ufeff", "\0"]
)  # fmt: skip
texts = st.one_of(tricky, st.text(max_size=12), st.from_regex(r"[0-9a-zA-Z_.:+-]{1,9}", fullmatch=True))
leaves = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False, allow_infinity=False), texts)
nested = st.recursive(leaves, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3), max_leaves=8)
trees = st.dictionaries(texts, nested, max_size=4)


@settings(deadline=None)
@given(trees)
def test_every_parser_reads_the_same_tree(tree: dict[str, Any]) -> None:
    text = yaml_text.dump(tree)
    for found in (yaml.safe_load(text), read_1_2(text)):
        assert found == tree
        assert repr(sorted(map(str, _leaves(found)))) == repr(sorted(map(str, _leaves(tree))))  # 1 is no True, 1.0 no 1
    assert "\r" not in text


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    items = tree.values() if isinstance(tree, dict) else tree if isinstance(tree, list) else None
    return [(type(tree).__name__, tree)] if items is None else [leaf for item in items for leaf in _leaves(item)]


def test_every_id_is_a_string_to_every_parser() -> None:
    ids = [f"{n:04d}" for n in range(10_000)]
    text = yaml_text.dump({"ids": ids, "versions": {id: f"1.{int(id)}" for id in ids[:50]}})
    loaded, loaded_1_2 = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)), read_1_2(text)
    assert loaded["ids"] == loaded_1_2["ids"] == ids
    assert loaded["versions"] == loaded_1_2["versions"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="no canonical form"):
        yaml_text.dump({"score": value})


# --- the Hub ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sections", [{}, PUBLISHED], ids=["private", "published"])
@pytest.mark.parametrize("kind", ["dataset", "model", "run"])
def test_the_hubs_library_and_both_yaml_versions_read_a_card_back(tmp_path: Path, kind: str, sections: dict[str, Any]) -> None:
    card = cards(**sections)[kind]
    path = tmp_path / f"{kind}_card.yaml"
    assert write_card(path, card) is True
    assert write_card(path, card) is False
    assert validate_card(kind, card) == []
    text = path.read_text(encoding="utf-8")
    assert read_card(path) == read_1_2(text) == yaml.safe_load(text) == card
    assert list(read_card(path)) == list(card)
    data = (ModelCardData if kind == "model" else DatasetCardData)(**copy.deepcopy(card))
    assert data.to_dict() == card
    assert yaml.safe_load(data.to_yaml()) == card


def test_cards_of_recorded_versions_hold_together(tmp_path: Path) -> None:
    chosen, registry = config(), Registry.load(tmp_path)

    def recorded(inputs: VersionInputs, **lineage: Allocation) -> tuple[Allocation, dict[str, Any]]:
        allocation = registry.plan(inputs, lineage=lineage)
        return allocation, registry.record(allocation, created="2026-01-02T03:04:05Z", artifact="sha256:x")

    data, about_data = recorded(dataset_inputs(chosen, "sha256:rows"))
    model, about_model = recorded(model_inputs(chosen, FACTS, "sha256:rows", "lora"), dataset=data)
    _, about_run = recorded(run_inputs(chosen, model.key, data.key), model=model, dataset=data)
    made = {
        "dataset": dataset_card(chosen, QUALITY, version=about_data, history=registry.history("dataset")),
        "model": model_card(chosen, FACTS, version=about_model, history=registry.history("model"), method="lora", evaluation=evaluation()),
        "run": run_card(chosen, evaluation(), version=about_run, history=registry.history("run")),
    }
    for kind, card in made.items():
        assert validate_card(kind, card) == []
        write_card(tmp_path / f"{kind}_card.yaml", card)
    assert verify(tmp_path) == []
    assert made["run"]["pipeline"]["versions"] == [
        {name: about_run[name] for name in ("id", "name", "version", "status", "created", "key")}
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["/home/someone/m.gguf", "../models/m.gguf", "~/m.gguf"])
def test_a_path_of_this_machine_stays_here(name: str) -> None:
    card = model_card(config(), dataclasses.replace(FACTS, name=name), version=version(), method="lora")
    assert card["pipeline"]["base"]["name"] == "m.gguf"
    assert cards()["model"]["pipeline"]["base"]["name"] == "tiny:q4"


def test_a_card_looks_as_it_always_did() -> None:
    text = yaml_text.dump(model_card(config(), FACTS, version=version(), method="lora", reason="it fits", evaluation=evaluation()))
    assert text == (GOLDEN / "model_card.yaml").read_text(encoding="utf-8")


def test_only_the_models_own_scores_are_its_claims() -> None:
    card = cards()["model"]
    [index] = card["model-index"]
    [result] = index["results"]
    assert {metric["type"]: metric["value"] for metric in result["metrics"]} == {
        "accuracy": 0.8, "balanced_accuracy": 0.8, "f1": 0.8, "chrf": 0.25,
    }  # fmt: skip
    assert result["metrics"][0]["args"] == {"low": 0.5, "high": 0.9, "method": "wilson", "n": 3}
    assert result["metrics"][-1]["args"] == {"n": 3, "n_unscored": 1}
    assert result["dataset"] == {"name": "0012-test-1.0.0.0", "type": "demo", "split": "test", "revision": "a" * 40}
    assert list(card["pipeline"]["metrics"]["systems"]) == ["base", "fine_tuned", "majority"]
    assert [(pair["a"], pair["b"]) for pair in card["pipeline"]["metrics"]["comparisons"]] == [("fine_tuned", "base")]
    assert card["pipeline"]["metrics"]["others"] == ["copilot"]


def test_a_models_card_has_the_gates_of_its_run_and_how_to_read_its_table() -> None:
    groups = "The 3 rows form 2 groups: intervals count groups."
    gate = GateResult("fine_tuned.accuracy: value >= 0.9", "failed", "Failed: fine_tuned.accuracy is 0.8; asked: value >= 0.9.")
    seen = dataclasses.replace(evaluation(), gates=(gate,), notes=(groups, "The copilot rated 1 of 3 rows and is scored on those."))
    metrics = model_card(config(), FACTS, version=version(), method="lora", evaluation=seen)["pipeline"]["metrics"]
    assert metrics["gates"] == [{"gate": gate.gate, "outcome": "failed", "words": gate.words}]
    assert metrics["notes"] == [groups]


def test_a_card_tells_what_is_rated_and_how_to_ask() -> None:
    chosen = {"prompt": {"topic": "coughs"}, "dataset": {"columns": {"text": ["triage_note"]}}}
    for card in cards(**chosen).values():
        assert card["pipeline"]["prompt"] == {
            "topic": "coughs", "labels": ["Does Not Match", "Unknown", "Match"], "headings": ["Triage note"],
            "instruction": instruction(config(**chosen).prompt, config().dataset.scale),
        }  # fmt: skip


@pytest.mark.parametrize(("folder", "shown"), [("./out/a", "out/a"), ("/srv/out", "outputs"), ("../out", "outputs"), ("~/out", "outputs")])
def test_commands_name_the_folder_of_the_project_only(folder: str, shown: str) -> None:
    card = model_card(config(output_dir=folder), FACTS, version=version(), method="lora")
    assert card["pipeline"]["how_to_run"]["llama.cpp"] == f"llama-server --model {shown}/fine_tuned_model.gguf"


def test_without_a_url_there_is_no_source_and_without_scores_no_model_index() -> None:
    card = model_card(config(), FACTS, version=version(), method="lora", evaluation=evaluation())
    assert "source" not in card["model-index"][0]["results"][0]
    assert "revision" not in card["model-index"][0]["results"][0]["dataset"]
    elsewhere = model_card(config(), FACTS, version=version(), method="lora", evaluation=evaluation(), evaluated_on="0013-train-1.0.0.1")
    assert elsewhere["model-index"][0]["results"][0]["dataset"]["name"] == "0013-test-1.0.0.1"
    bare = model_card(config(), FACTS, version=version(), method="lora")
    assert "model-index" not in bare
    assert bare["pipeline"]["metrics"] is None
    assert "how good it is: it has not been evaluated" in bare["pipeline"]["unknown"]
    other = model_card(config(), FACTS, version=version(), method="lora", evaluation=evaluation("model_set"))
    assert "model-index" not in other
    assert "how good it is: the run holds no answers of it" in other["pipeline"]["unknown"]
    nothing = dataclasses.replace(evaluation(), systems=(dataclasses.replace(scores("fine_tuned", None), rationale=()),))
    assert "model-index" not in model_card(config(), FACTS, version=version(), method="lora", evaluation=nothing)


def test_a_model_set_is_no_fine_tune_of_its_base() -> None:
    card = model_card(config(), FACTS, version=version(), method="model_set", evaluation=evaluation("model_set"))
    assert validate_card("model", card) == []
    assert card["base_model"] == "owner/tiny"
    assert "base_model_relation" not in card
    assert "library_name" not in card
    assert card["pipeline"]["hyperparameters"]["model_set"] == {"compare": False, "max_examples": 6}
    assert "train" not in card["pipeline"]["hyperparameters"]
    assert card["model-index"][0]["results"][0]["metrics"][0]["value"] == 0.8


def test_what_is_unknown_is_said_and_not_guessed() -> None:
    facts = dataclasses.replace(FACTS, license=None, hub_id=None)
    card = model_card(config(), facts, version=version(), method="lora")
    assert (card["license"], card["license_name"]) == ("other", "not-stated")
    assert "base_model" not in card
    assert "base_model_relation" not in card
    assert len(card["pipeline"]["unknown"]) == 3
    lost = model_card(config(), None, version=version(), method="model_set")
    assert lost["pipeline"]["base"] is None
    assert "the base model: it was not found on the machine that made this" in lost["pipeline"]["unknown"]
    assert validate_card("model", card) == validate_card("model", lost) == []


@pytest.mark.parametrize(
    ("given", "fields"),
    [
        ("CC0-1.0", {"license": "cc0-1.0"}),
        ("mit", {"license": "mit"}),
        ("Hospital Data License (v2)", {"license": "other", "license_name": "hospital-data-license-v2"}),
        ("other", {"license": "other", "license_name": "not-stated"}),
        ("???", {"license": "other", "license_name": "not-stated"}),
    ],
)
def test_a_licence_is_the_hubs_id_or_other_with_a_name(given: str, fields: dict[str, str]) -> None:
    card = dataset_card(config(dataset={"license": given}), QUALITY, version=version("dataset"))
    assert {name: value for name, value in card.items() if name.startswith("license")} == fields
    assert validate_card("dataset", card) == []


def test_the_dataset_card_counts_and_holds_no_record() -> None:
    card = cards()["dataset"]
    block = card["pipeline"]
    assert list(block["splits"]) == ["train", "validation", "test"]
    assert block["data_quality"]["dropped"] == 2
    assert block["data_quality"]["dropped_by_reason"] == {"no rating": 2}
    assert block["data_quality"]["contradicting_rationales"] == 1
    assert SECRET_ID not in yaml_text.dump(card)
    assert "configs" not in card
    assert [file["split"] for file in cards(**PUBLISHED)["dataset"]["configs"][0]["data_files"]] == ["train", "validation", "test"]


@pytest.mark.parametrize(("rows", "size"), [(0, "n<1K"), (999, "n<1K"), (1000, "1K<n<10K"), (549_367, "100K<n<1M"), (10**7, "10M<n<100M")])
def test_sizes(rows: int, size: str) -> None:
    card = dataset_card(config(), dataclasses.replace(QUALITY, rows_kept=rows), version=version("dataset"))
    assert card["size_categories"] == [size]


def test_a_card_keeps_the_last_twenty_versions() -> None:
    history = [{"id": f"{n:04d}", "name": "n"} for n in range(1, 31)]
    card = dataset_card(config(), QUALITY, version=version("dataset"), history=history)
    assert [entry["id"] for entry in card["pipeline"]["versions"]] == [f"{n:04d}" for n in range(11, 31)]


def test_a_raters_name_becomes_a_split_that_the_hub_allows() -> None:
    seen = dataclasses.replace(evaluation(), systems=(scores("base", 0.4), scores("Dr. O'Neil-2", 0.5, "given")))
    card = run_card(config(**PUBLISHED), seen, version=version("run"))
    assert [file["split"] for file in card["configs"][0]["data_files"]] == ["base", "Dr__O_Neil_2"]
    assert validate_card("run", card) == []


# --- checks ----------------------------------------------------------------------------------------------------------


def without(card: dict[str, Any], field: str) -> dict[str, Any]:
    return {name: value for name, value in card.items() if name != field}


@pytest.mark.parametrize(
    ("kind", "fields", "problem"),
    [
        ("dataset", {"license": "CC BY 4.0"}, "license: 'CC BY 4.0' is not an id"),
        ("dataset", {"license": "other", "license_name": "My Licence"}, "license_name: needed"),
        ("dataset", {"language": ["english"]}, "language[0]: 'english' is not an ISO 639 code"),
        ("dataset", {"size_categories": ["many"]}, "size_categories[0]: 'many' is not one of"),
        ("dataset", {"annotations_creators": "expert-generated"}, "annotations_creators: must be a list"),
        ("dataset", {"tags": [1]}, "tags[0]: 1 is no text"),
        ("dataset", {"pretty_name": 420}, "pretty_name: must be text"),
        ("dataset", {"task_ids": None}, "task_ids: is null"),
        ("dataset", {"source_datasets": ["mine"]}, "source_datasets[0]: 'mine' is neither"),
        ("dataset", {"configs": {}}, "configs: must be a list"),
        ("dataset", {"configs": [{"config_name": "a/b", "data_files": [{"split": "train", "path": "x"}]}]}, "configs[0].config_name"),
        ("dataset", {"configs": [{"config_name": "a", "data_files": [{"split": "my-train", "path": "x"}]}]}, "'my-train' may hold"),
        ("dataset", {"configs": [{"config_name": "a", "data_files": [{"split": "valid", "path": "x"}]}]}, "is validation"),
        ("dataset", {"configs": [{"config_name": "a", "data_files": [{"split": "test", "path": "x"}] * 2}]}, "is there twice"),
        ("dataset", {"configs": [{"config_name": "a", "data_files": [{"split": "test"}]}]}, "configs[0].data_files[0].path: missing"),
        ("dataset", {"pipeline": []}, "pipeline: must be a mapping"),
        ("model", {"base_model": "llama2"}, "base_model: 'llama2' is not a Hub ID"),
        ("model", {"base_model": "qwen2.5:0.5b"}, "base_model: 'qwen2.5:0.5b' is not a Hub ID"),
        ("model", {"datasets": [None]}, "datasets[0]: None is not a Hub ID"),
        ("model", {"base_model_relation": "child"}, "base_model_relation: 'child' is not one of"),
        ("model", {"model-index": {}}, "model-index: must be a list"),
        ("model", {"model-index": [{"name": "m", "results": []}]}, "results: needs at least one result"),
        ("model", {"model-index": [{"results": [{}]}]}, "model-index[0].name: missing"),
        ("model", {"model-index": [{"name": "m", "results": [{"task": {}}]}]}, "results[0].task.type: missing"),
        ("model", {"model-index": [{"name": "m", "results": [{"dataset": {"type": "t"}}]}]}, "results[0].dataset.name: missing"),
        ("model", {"model-index": [{"name": "m", "results": [{"dataset": {"revision": "main"}}]}]}, "must be a full commit id"),
        ("model", {"model-index": [{"name": "m", "results": [{"metrics": [{"type": "accuracy"}]}]}]}, "metrics[0].value: missing"),
        ("model", {"model-index": [{"name": "m", "results": [{"source": {"name": "s"}}]}]}, "source.url: missing"),
        ("model", {"co2": {"grams": [1.0, math.nan]}}, "co2.grams.1: not a finite number"),
    ],
)  # fmt: skip
def test_what_the_hub_would_refuse_is_named(kind: str, fields: dict[str, Any], problem: str) -> None:
    problems = validate_card(kind, {**cards()[kind], **fields})
    assert any(problem in line for line in problems), problems


@pytest.mark.parametrize("kind", ["dataset", "model", "run"])
def test_a_missing_field_is_named(kind: str) -> None:
    card = cards()[kind]
    for field in ("language", "license", "tags", "pipeline"):
        assert f"{field}: missing" in validate_card(kind, without(card, field))


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"id": 899}, "pipeline.id: must be text in quotes"),
        ({"version": 2.0}, "pipeline.version: must be text in quotes"),
        ({"key": None}, "pipeline.key: must be text in quotes"),
        ({"kind": "run"}, "pipeline.kind: must be model"),
        ({"schema_version": None}, "pipeline.schema_version: must be a number"),
        ({"prompt": {"topic": 1}}, "pipeline.prompt.topic: must be text"),
        ({"prompt": {"labels": [1]}}, "pipeline.prompt.labels[0]: 1 is no text"),
        ({"versions": None}, "pipeline.versions: must be a list"),
        ({"versions": [{"id": 1}]}, "pipeline.versions[0].id: must be text in quotes"),
    ],
)
def test_the_products_own_fields_are_checked(fields: dict[str, Any], problem: str) -> None:
    card = cards()["model"]
    problems = validate_card("model", {**card, "pipeline": {**card["pipeline"], **fields}})
    assert any(line.startswith(problem) for line in problems), problems


def test_the_schema_is_one_that_any_program_can_use() -> None:
    schema = json.loads(files("pipeline").joinpath("card_schema.json").read_text(encoding="utf-8"))
    Draft202012Validator.check_schema(schema)
    whole = Draft202012Validator(schema)
    for kind, card in cards(**PUBLISHED).items():
        assert list(whole.iter_errors(card)) == []
        assert list(whole.iter_errors({**card, "license": "My Licence"})), kind
        assert list(whole.iter_errors({**card, "pipeline": {**card["pipeline"], "kind": "other"}})), kind


def test_a_damaged_card_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model_card.yaml"
    for text in ("a: [", "- a list\n", "a: \x00\n"):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ArtifactError, match=r"model_card\.yaml: damaged"):
            read_card(path)
    with pytest.raises(ArtifactError, match="no such file"):
        read_card(tmp_path / "none.yaml")

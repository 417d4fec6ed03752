"""All files of a version as they would lie on the Hub: by default no row and no weight, with a switch exactly those."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pyarrow.parquet as pq
import pytest
from huggingface_hub import DatasetCard

from pipeline.backends import plots
from pipeline.backends.go_template import CHATML, chatml
from pipeline.cards import dataset_card, model_card, run_card, validate_card
from pipeline.config import PipelineConfig
from pipeline.errors import ArtifactError, UserError
from pipeline.formatted_dataset import read_formatted, write_formatted
from pipeline.hub_files import publication
from pipeline.privacy import scan
from pipeline.publication import OWNED, Publication
from pipeline.records import Opinion, Record, fingerprint
from pipeline.store import digest_file
from tests.test_cards import FACTS, PUBLISHED, QUALITY, TRAINING, config, evaluation, scores, version

NASTY = 'a "quoted", line\nand\rcarriage | `x` \\ ‮ 日本語, '
SMOLLM2 = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclasses.dataclass
class Version:
    """A finished run: its folder, its cards, its rows."""

    outputs: Path
    config: PipelineConfig
    cards: dict[str, dict[str, Any]]
    records: tuple[Record, ...]

    def publication(self, kind: Any, **settings: Any) -> Publication:
        return publication(kind, self.cards[kind], **{"config": self.config, "known": {}, "outputs": self.outputs, **settings})


def write_gguf(path: Path, template: str = SMOLLM2) -> None:
    """A GGUF that holds a chat template and hardly more."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_chat_template(template)
    writer.add_tensor("x", np.zeros(32, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


_DRAWN: dict[str, Any] = {}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Version:
    def draw(card: Any, plain: Any = plots.draw) -> Any:
        """Each picture once: the same card gives the same bytes, which tests/test_plots.py holds."""
        key = fingerprint(card)
        if key not in _DRAWN:
            _DRAWN[key] = plain(card)
        return _DRAWN[key]

    monkeypatch.setattr(plots, "draw", draw)
    chosen = config(**PUBLISHED)
    outputs = tmp_path / "outputs"
    outputs.mkdir()
    labels = ("Does Not Match", "Unknown", "Match")
    records = tuple(
        Record(
            f"r{n:03d}", f"g{n % 4}", ("train", "valid", "test")[min(n % 4, 2)], f"Rate it.\n\n{NASTY}{n}", labels[n % 3],
            f"why {n}, {NASTY}",
            {"copilot": Opinion(labels[0], None)} if n % 2 else {}, {"ward": "NA" if n % 3 else ""},
        )
        for n in range(24)
    )  # fmt: skip
    formatted = outputs / "formatted_dataset.csv"
    write_formatted(formatted, records, chosen.dataset.scale, systems=["copilot"], meta=["ward"])
    lines = []
    for system in ("base", "fine_tuned"):
        for text in ("old", "new"):  # the last line of a row counts
            for record in records:
                if record.split == "test":
                    answer = {
                        "record_id": record.record_id, "system": system, "prompt_digest": "sha256:p", "response": f"{text} {NASTY}",
                        "label": "Match", "rationale": "because", "error": None, "finish": "stop",
                        "probabilities": {"Match": 0.75, "No": 0.25},
                        "prompt_tokens": 3, "output_tokens": 4, "seconds": 0.5, "engine": "embedded", "model_digest": "sha256:m",
                        "generate_key": "sha256:g", "detail": None,
                    }  # fmt: skip
                    lines.append(json.dumps(answer, ensure_ascii=False) + "\n")
    (outputs / "outputs.jsonl").write_text("".join(lines), encoding="utf-8", newline="")
    for name in ("fine_tuned_model.gguf", "adapter.gguf"):
        write_gguf(outputs / name)
    lineage = {name: digest_file(outputs / name) for name in ("formatted_dataset.csv", "outputs.jsonl")}

    def build(kind: str, name: str) -> dict[str, Any]:
        return version(kind, builds=[{"artifact": digest_file(outputs / name), "created": "2026-01-02T03:04:05Z", "machine": {}}])

    cards = {
        "dataset": dataset_card(chosen, QUALITY, version=build("dataset", "formatted_dataset.csv")),
        "model": model_card(
            chosen, FACTS, version=build("model", "fine_tuned_model.gguf"), method="lora", training=TRAINING, evaluation=evaluation()
        ),
        "run": run_card(chosen, evaluation(), version=version("run"), lineage=lineage),
    }
    return Version(outputs, chosen, cards, records)


def as_bytes(content: bytes | Path) -> bytes:
    return content if isinstance(content, bytes) else content.read_bytes()


def rows_of(content: bytes | Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(io.BytesIO(as_bytes(content))).to_pylist()
    return rows


# --- what goes, and what doesn't -------------------------------------------------------------------------------------


def test_by_default_no_row_and_no_weight_goes(made: Version) -> None:
    files = {kind: list(made.publication(kind).files) for kind in made.cards}
    assert files == {
        "dataset": ["README.md", "dataset_card.yaml"],
        "model": ["README.md", "model_card.yaml", "plots/accuracy.png"],
        "run": ["README.md", "run_card.yaml", "plots/accuracy.png", "plots/confusion.png", "metrics/metrics.parquet"],
    }
    texts = [part for record in made.records for part in (record.prompt, record.rationale)]
    for kind in made.cards:
        assert scan(made.publication(kind).files, texts) == ()
        assert "configs" not in DatasetCard(as_bytes(made.publication("dataset").files["README.md"]).decode()).data.to_dict()


def test_each_switch_adds_its_own_files_and_all_are_this_products(made: Version) -> None:
    added = {}
    for kind in made.cards:
        plain, full = made.publication(kind), made.publication(kind, rows=True, weights=True)
        added[kind] = sorted(set(full.files) - set(plain.files))
        assert all(any(fnmatch(path, owned) for owned in OWNED) for path in full.files)
        assert (full.repo_id, full.private, full.name) == (plain.repo_id, True, made.cards[kind]["pipeline"]["name"])
        images = [line for line in as_bytes(full.files["README.md"]).decode().splitlines() if line.startswith("![")]
        assert len(images) == len([path for path in full.files if path.startswith("plots/")])
    assert added == {
        "dataset": ["data/test.parquet", "data/train.parquet", "data/validation.parquet"],
        "model": ["adapter.gguf", "fine_tuned_model.gguf", "params", "system", "template"],
        "run": ["outputs/base.parquet", "outputs/copilot.parquet", "outputs/fine_tuned.parquet"],
    }
    assert {kind: made.publication(kind).repo_id for kind in made.cards} == {
        "dataset": "org/demo-dataset", "model": "org/demo-model", "run": "org/demo-runs",
    }  # fmt: skip


def test_the_same_version_gives_the_same_bytes_with_or_without_the_outputs(made: Version) -> None:
    for kind in made.cards:
        first, second = made.publication(kind), made.publication(kind, outputs=None)
        assert first == second
    assert made.publication("run", rows=True) == made.publication("run", rows=True)


def test_figures_are_null_where_they_are_undefined(made: Version) -> None:
    rows = rows_of(made.publication("run").files["metrics/metrics.parquet"])
    assert list(rows[0]) == ["system", "metric", "value", "ci_low", "ci_high", "n", "n_unscored"]
    figure = {(row["system"], row["metric"]): row for row in rows}
    assert figure["fine_tuned", "accuracy"] == {
        "system": "fine_tuned", "metric": "accuracy", "value": 0.8, "ci_low": 0.5, "ci_high": 0.9, "n": 3, "n_unscored": None,
    }  # fmt: skip
    assert figure["base", "kappa"]["value"] is None
    assert figure["fine_tuned", "rationale: chrf"]["n_unscored"] == 1
    assert figure["base", "precision: Match"]["value"] == 0.4
    assert figure["base", "unusable_answers"]["value"] == 0.0
    assert all(row["value"] == row["value"] for row in rows)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_published_rows_are_the_rows(made: Version) -> None:
    files = made.publication("dataset", rows=True).files
    found = [row for split in ("train", "validation", "test") for row in rows_of(files[f"data/{split}.parquet"])]
    assert list(found[0]) == [
        "record_id", "group", "prompt", "rating", "label", "rationale", "copilot_rating", "copilot_rationale", "meta_ward",
    ]  # fmt: skip
    records = {r.record_id: r for r in read_formatted(made.outputs / "formatted_dataset.csv", made.config.dataset.scale)}
    assert len(found) == len(records)
    for row in found:
        record = records[row["record_id"]]
        assert (row["prompt"], row["rationale"], row["label"], row["meta_ward"]) == (
            record.prompt, record.rationale, record.label, record.meta["ward"],
        )  # fmt: skip
        assert row["rating"] in (0, -1, 1)
        assert row["copilot_rating"] == ("Does Not Match" if record.opinions else None)


LOAD = """
import json, sys
from datasets import load_dataset
def told(folder, *name):
    found = load_dataset(folder, *name)
    return {split: [rows.num_rows, {n: f.dtype for n, f in rows.features.items()}, rows[0]] for split, rows in found.items()}
print(json.dumps([told(sys.argv[1] + "/dataset"), told(sys.argv[1] + "/run", "outputs"), told(sys.argv[1] + "/run", "metrics")]))
"""


def test_datasets_loads_what_was_published_with_the_splits_of_the_page(made: Version, tmp_path: Path) -> None:
    environment = {**os.environ, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    for kind in ("dataset", "run"):
        for path, content in made.publication(kind, rows=True).files.items():
            there = tmp_path / kind / path
            there.parent.mkdir(parents=True, exist_ok=True)
            there.write_bytes(as_bytes(content))
    command = [sys.executable, "-c", LOAD, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    rows, answers, figures = loaded
    assert {split: told[0] for split, told in rows.items()} == {"train": 6, "validation": 6, "test": 12}
    assert rows["train"][1]["rating"] == "int64"
    assert rows["train"][2]["prompt"] == made.records[0].prompt
    assert {split: told[0] for split, told in answers.items()} == {"base": 12, "fine_tuned": 12, "copilot": 6}
    assert answers["base"][2]["response"] == f"new {NASTY}"
    assert answers["base"][2]["expert_label"] == made.records[2].label
    assert json.loads(answers["base"][2]["probabilities"]) == {"Match": 0.75, "No": 0.25}
    assert answers["copilot"][2] | {"prompt": ""} == {
        **dict.fromkeys(answers["copilot"][2]), "record_id": "r003", "prompt": "", "expert_label": "Does Not Match",
        "expert_rationale": made.records[3].rationale, "label": "Does Not Match", "finish": "given", "engine": "given",
    }  # fmt: skip
    assert list(figures) == ["test"]


def test_two_raters_whose_names_a_split_can_not_tell_apart_keep_a_file_each(made: Version) -> None:
    header, *rows = (made.outputs / "formatted_dataset.csv").read_text(encoding="utf-8").partition("\n")
    wide = header.replace("copilot_rating,copilot_rationale", "rater_a-b_rating,rater_a-b_rationale") + "".join(rows)
    (made.outputs / "formatted_dataset.csv").write_text(wide.replace("meta_ward", "rater_a b_rating"), encoding="utf-8", newline="")
    seen = dataclasses.replace(evaluation(), systems=(scores("base", 0.4), scores("a-b", 0.5, "given"), scores("a b", 0.5, "given")))
    card = run_card(made.config, seen, version=version("run"))
    made.cards["run"] = card
    files = made.publication("run", rows=True).files
    assert {"outputs/a_b.parquet", "outputs/a_b_.parquet"} <= set(files)


@pytest.mark.parametrize(
    ("kind", "name", "stage"),
    [
        ("dataset", "formatted_dataset.csv", "format"), ("run", "outputs.jsonl", "infer"), ("run", "formatted_dataset.csv", "format"),
        ("model", "fine_tuned_model.gguf", "finetune"), ("model", "adapter.gguf", "finetune"),
    ],
)  # fmt: skip
def test_a_missing_or_foreign_file_is_named_with_its_stage(made: Version, kind: str, name: str, stage: str) -> None:
    for outputs in (None, made.outputs / "none"):
        with pytest.raises(UserError) as caught:
            made.publication(kind, rows=True, weights=True, outputs=outputs)
        assert "`pipeline " in caught.value.hint
    (made.outputs / name).unlink()
    with pytest.raises(UserError, match=name) as caught:
        made.publication(kind, rows=True, weights=True)
    assert f"pipeline {stage}" in caught.value.hint
    if name != "adapter.gguf":
        (made.outputs / name).write_bytes(b"another")
        with pytest.raises(UserError, match=f"{name}: is not the file that 0899-"):
            made.publication(kind, rows=True, weights=True)


def test_a_damaged_file_is_named(made: Version) -> None:
    del made.cards["run"]["pipeline"]["lineage"]["outputs.jsonl"]
    (made.outputs / "outputs.jsonl").write_text("{\n", encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"outputs\.jsonl: line 1 is damaged"):
        made.publication("run", rows=True)
    (made.outputs / "outputs.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ArtifactError, match="holds no answers of base"):
        made.publication("run", rows=True)


def test_a_card_that_the_hub_would_refuse_is_not_published(made: Version) -> None:
    made.cards["model"]["license"] = "My Licence"
    with pytest.raises(ArtifactError, match=r"license: 'My Licence' is not an id"):
        made.publication("model")


@pytest.mark.parametrize(
    ("namespace", "project"), [(None, "demo"), ("org", "a--b"), ("org", "a..b"), ("o/x", "demo"), ("org", "x" * 64 + "-")]
)
def test_a_name_that_the_hub_does_not_take_is_refused(made: Version, namespace: str | None, project: str) -> None:
    chosen = dataclasses.replace(
        made.config,
        project=project,
        publish=dataclasses.replace(made.config.publish, namespace=namespace and namespace + "o" * 30 * ("x" * 64 in project)),
    )
    with pytest.raises(UserError):
        made.publication("model", config=chosen)


# --- weights ---------------------------------------------------------------------------------------------------------


def test_weights_come_with_what_ollama_needs_to_talk_to_them(made: Version) -> None:
    files = made.publication("model", weights=True).files
    assert files["fine_tuned_model.gguf"] == made.outputs / "fine_tuned_model.gguf"
    assert files["template"] == CHATML.encode()
    assert files["system"] == b"You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert json.loads(as_bytes(files["params"])) == {
        "stop": ["<|im_start|>", "<|im_end|>"], "temperature": 0.0, "num_predict": 160, "num_ctx": 2048,
    }  # fmt: skip
    page = as_bytes(files["README.md"]).decode()
    assert "ollama run hf.co/org/demo-model:fine_tuned_model.gguf" in page


def test_a_page_says_gguf_only_where_one_lies_beside_it(made: Version) -> None:
    for weights in (False, True):
        told = DatasetCard(as_bytes(made.publication("model", weights=weights).files["README.md"]).decode()).data.to_dict()
        assert ("gguf" in told["tags"], "library_name" in told) == (weights, weights)
        assert "lora" in told["tags"]


def test_published_rows_come_with_what_each_field_holds(made: Version) -> None:
    assert "| Field |" not in as_bytes(made.publication("dataset").files["README.md"]).decode()
    page = as_bytes(made.publication("dataset", rows=True).files["README.md"]).decode()
    for said in (
        "| `rating` | int64 |", "the copilot's reason, where there is one",
        "| `meta_ward` | string | the column ward of the original table |",
    ):  # fmt: skip
        assert said in page


def test_a_servers_own_manner_goes_before_the_files(made: Version) -> None:
    manner = {"template": "{{ .Prompt }}", "system": None, "parameters": {"stop": ["x"], "temperature": 0.9, "top_k": 3}, "messages": ()}
    told = made.outputs / "fine_tuning_metadata.json"
    told.write_text(json.dumps({"served_with": manner}), encoding="utf-8")
    files = made.publication("model", weights=True).files
    assert files["template"] == b"{{ .Prompt }}"
    assert "system" not in files
    assert json.loads(as_bytes(files["params"])) | {"num_ctx": 0} == {
        "stop": ["x"], "temperature": 0.0, "top_k": 3, "num_predict": 160, "num_ctx": 0,
    }  # fmt: skip
    told.write_text(json.dumps({"served_with": {"template": None}}), encoding="utf-8")
    silent = made.publication("model", weights=True).files
    assert "template" not in silent
    assert "was not checked" in as_bytes(silent["README.md"]).decode()


@pytest.mark.parametrize(
    ("jinja", "system"),
    [
        (SMOLLM2, "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
        (SMOLLM2.replace("loop.first", "false"), None),
    ],
)
def test_a_chatml_template_is_known(jinja: str, system: str | None) -> None:
    found = chatml(jinja)
    assert found is not None
    assert (found.template, found.system) == (CHATML, system)


@pytest.mark.parametrize(
    "jinja",
    [
        "", "{{ messages[0].content }}", "{% broken", SMOLLM2.replace("message['content']", "message['content'] | trim"),
        SMOLLM2.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"), SMOLLM2.replace("assistant\n", "assistant"),
        "{{ raise_exception('no') }}<|im_start|>", SMOLLM2.replace("Face<", "Face {{ 1 }}<") + "{{ strftime_now('%d') }}",
        SMOLLM2.replace("message['role'] +", "(message['role'] if message['role'] != 'assistant' else 'model') +"),
        "<|im_start|>{{ ().__class__.__mro__ }}", "<|im_start|>{% for x in range(99999999999) %}{% endfor %}",
    ],
)  # fmt: skip
def test_any_other_template_is_not_taken_for_it(jinja: str) -> None:
    assert chatml(jinja) is None


def test_a_model_set_holds_record_text_and_goes_with_rows_only(made: Version) -> None:
    path = made.outputs / "model_set_config.json"
    path.write_text("{}", encoding="utf-8")
    chosen = version(builds=[{"artifact": digest_file(path), "created": "2026-01-02T03:04:05Z", "machine": {}}])
    made.cards["model"] = model_card(made.config, FACTS, version=chosen, method="model_set", evaluation=evaluation("model_set"))
    assert set(made.publication("model", weights=True).files) == {"README.md", "model_card.yaml", "plots/accuracy.png"}
    assert made.publication("model", rows=True).files["model_set_config.json"] == path


def test_dataset_info_is_part_of_what_the_schema_checks(made: Version) -> None:
    told = DatasetCard(as_bytes(made.publication("run", rows=True).files["README.md"]).decode()).data.to_dict()
    assert [info["config_name"] for info in told["dataset_info"]] == ["outputs", "metrics"]
    assert validate_card("run", told) == []
    told["dataset_info"][0]["splits"][0] = {"name": "my-split", "num_bytes": -1, "num_examples": "3"}
    assert validate_card("run", told) == [
        "dataset_info[0].splits[0].name: 'my-split' may hold letters, digits, underscores and inner dots only",
        "dataset_info[0].splits[0].num_bytes: must be a count", "dataset_info[0].splits[0].num_examples: must be a count",
    ]  # fmt: skip
    told["configs"].append(told["configs"][0])
    assert "configs: the name 'outputs' is there twice" in validate_card("run", told)

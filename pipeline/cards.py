"""The three cards in `metadata/`: the Hub's own fields at the top level, everything of this product under the one key `pipeline`.

Counts, figures, digests and settings only: no record text, no record IDs. What is not known is said under `unknown`, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pipeline import yaml_text
from pipeline.card_checks import validate_card
from pipeline.card_fields import (
    HUB_METRICS,
    SPLIT_ON_HUB,
    Card,
    about_version,
    base_facts,
    figures,
    how_to_run,
    hub_id,
    hyperparameters,
    is_known,
    languages,
    last_versions,
    license_fields,
    metrics_table,
    model_results,
    prompt_facts,
    quality_figures,
    size_category,
    split_name,
    tags,
    unknown_of_model,
    unscored,
)
from pipeline.config import PipelineConfig
from pipeline.records import DataQuality, Evaluation, ModelFacts, TrainingResult, to_plain

__all__ = ["dataset_card", "model_card", "read_card", "run_card", "validate_card", "write_card"]

# --- files -----------------------------------------------------------------------------------------------------------


def write_card(path: Path, card: Mapping[str, Any]) -> bool:
    """Writes a card atomically; False when the file said the same already.

    Raises:
        ValueError: NaN or an infinity in it.
        OutputError: the folder can't be written.
    """
    return yaml_text.write(path, card)


def read_card(path: Path) -> Card:
    """
    Raises:
        ArtifactError: missing or damaged.
    """
    return yaml_text.read(path)


# --- the three -------------------------------------------------------------------------------------------------------


def dataset_card(
    config: PipelineConfig, quality: DataQuality, *, version: Mapping[str, Any], history: Sequence[Mapping[str, Any]] = ()
) -> Card:
    """
    Args:
        version: the record of this version (what `Registry.record` returns).
        history: lines of earlier versions, oldest first; the last 20 are kept.
    """
    dataset = config.dataset
    unknown = [] if is_known(dataset.license) else ["the licence of the rows: `dataset.license` names none"]
    card: Card = {
        "language": languages(config),
        **license_fields(dataset.license),
        "pretty_name": f"{config.project} {version['id']}: rated records",
        "annotations_creators": ["expert-generated"],
        "multilinguality": ["multilingual" if len(languages(config)) > 1 else "monolingual"],
        "size_categories": [size_category(quality.rows_kept)],
        "task_categories": ["text-classification", "text-generation"],
        "tags": tags(config, version, "rating", "rationale"),
    }
    if config.publish.rows:
        files = [{"split": split, "path": f"data/{split}.parquet"} for split in SPLIT_ON_HUB.values()]
        card["configs"] = [{"config_name": "default", "default": True, "data_files": files}]
    card["pipeline"] = {
        **about_version(config, "dataset", version),
        "source": {"source": dataset.source, "subsource": dataset.subsource, "method": dataset.method},
        "prompt": prompt_facts(config),
        "ratings": to_plain(dataset.ratings),
        "ordered": dataset.ordered,
        "splits": {SPLIT_ON_HUB.get(name, name): to_plain(split) for name, split in quality.splits.items()},
        "data_quality": quality_figures(quality),
        "unknown": unknown,
        "versions": last_versions(history),
    }
    return card


def model_card(
    config: PipelineConfig,
    facts: ModelFacts | None,
    *,
    version: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    method: Literal["lora", "model_set"],
    reason: str = "",
    training: TrainingResult | None = None,
    evaluation: Evaluation | None = None,
    validation: Mapping[str, Any] | None = None,
    lineage: Mapping[str, str] | None = None,
    evaluated_on: str | None = None,
    dataset_revision: str | None = None,
    source_url: str | None = None,
) -> Card:
    """
    Args:
        facts: the base model; None when it was not found here (a model set only).
        method, reason: how the model was made, and why that way.
        evaluation: the scores of the run that evaluated it; the model's own go into `model-index`, all others stay under `pipeline`.
        lineage: digests by name, beside the record's own lineage.
        evaluated_on: name of the dataset version that it was evaluated on, when that is not the one of its lineage.
        dataset_revision, source_url: where the test rows and the run lie on the Hub, once published.
    """
    scores = evaluation.system("fine_tuned" if method == "lora" else "model_set") if evaluation else None
    card = _hub_fields_of_model(config, facts, version, method)
    if evaluation and scores:
        where = {"evaluated_on": evaluated_on, "revision": dataset_revision, "source_url": source_url}
        if results := model_results(config, version, evaluation, scores, **where):
            card["metrics"] = [metric["type"] for metric in results[0]["metrics"] if metric["type"] in HUB_METRICS.values()]
            card["model-index"] = [{"name": version["name"], "results": results}]
    card["pipeline"] = {
        **about_version(config, "model", version),
        "approach": {"method": method, "reason": reason},
        "prompt": prompt_facts(config),
        "license_from": "the base model, whose weights " + ("these are" if method == "lora" else "are not part of this"),
        "base": base_facts(facts) if facts else None,
        "hyperparameters": hyperparameters(config, method),
        "training": to_plain(training),
        "metrics": metrics_table(evaluation, scores),
        "validation": to_plain(validation or {}),
        "lineage": {**version["lineage"], **(lineage or {})},
        "how_to_run": how_to_run(config, version, method, facts),
        "unknown": unknown_of_model(facts, evaluation, scores),
        "versions": last_versions(history),
    }
    return card


def _hub_fields_of_model(config: PipelineConfig, facts: ModelFacts | None, version: Mapping[str, Any], method: str) -> Card:
    card: Card = {
        "language": languages(config),
        **license_fields(facts.license if facts else None),
        "pipeline_tag": "text-generation",
        "tags": tags(config, version, "gguf", "lora" if method == "lora" else "prompt"),
    }
    if method == "lora":
        card["library_name"] = "gguf"
    if facts and facts.hub_id:
        card["base_model"] = facts.hub_id
        if method == "lora":
            card["base_model_relation"] = "finetune"
    if dataset := hub_id(config, "dataset"):
        card["datasets"] = [dataset]
    return card


def run_card(
    config: PipelineConfig,
    evaluation: Evaluation,
    *,
    version: Mapping[str, Any],
    history: Sequence[Mapping[str, Any]] = (),
    lineage: Mapping[str, str] | None = None,
) -> Card:
    """A run is a dataset of outputs with scores: one split a system on the Hub."""
    systems = [scores.system for scores in evaluation.systems if scores.kind != "baseline"]
    card: Card = {
        "language": languages(config),
        **license_fields(config.dataset.license),
        "pretty_name": version["name"],
        "size_categories": [size_category(sum(scores.n for scores in evaluation.systems if scores.kind != "baseline"))],
        "task_categories": ["text-classification", "text-generation"],
        "tags": tags(config, version, "evaluation", "run"),
    }
    if dataset := hub_id(config, "dataset"):
        card["source_datasets"] = [dataset]
    if config.publish.rows:
        files = [{"split": split, "path": f"outputs/{split}.parquet"} for split in map(split_name, systems)]
        card["configs"] = [{"config_name": "outputs", "default": True, "data_files": files}]
    card["pipeline"] = {
        **about_version(config, "run", version),
        "prompt": prompt_facts(config),
        "split": SPLIT_ON_HUB.get(evaluation.split, evaluation.split),
        "verdict": evaluation.verdict,
        "primary": evaluation.primary,
        "labels": list(evaluation.labels),
        "systems": {scores.system: figures(scores) for scores in evaluation.systems},
        "comparisons": figures(evaluation.comparisons),
        "gates": to_plain(evaluation.gates),
        "evaluate": to_plain(config.evaluate),
        "notes": list(evaluation.notes),
        "lineage": {**version["lineage"], **(lineage or {})},
        "unknown": [sentence for scores in evaluation.systems for sentence in unscored(scores)],
        "versions": last_versions(history),
    }
    return card

"""The parts of a card: the Hub's fields, and the product's own under `pipeline`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from pipeline.card_checks import HUB_LICENSES
from pipeline.config import PipelineConfig
from pipeline.prompts import heading, instruction
from pipeline.records import Comparison, DataQuality, Estimate, Evaluation, ModelFacts, SystemScores, to_plain

SCHEMA_VERSION = 1
KEPT_VERSIONS = 20
SPLIT_ON_HUB = {"train": "train", "valid": "validation", "test": "test"}
_SIZES = ((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M"))
_FIGURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "macro_f1": "macro F1", "kappa": "Cohen's kappa"}
HUB_METRICS = {"accuracy": "accuracy", "balanced_accuracy": "balanced_accuracy", "macro_f1": "f1", "kappa": "cohen_kappa"}
_PAIR = ("a", "b", "n", "difference", "p_value", "p_holm", "smallest_detectable", "verdict", "words")
_GROUPS = re.compile(r"The \d+ rows form \d+ groups\b")

Card = dict[str, Any]


def split_name(system: str) -> str:
    """A system's name as the Hub allows it for a split: letters, digits and underscores."""
    return re.sub(r"\W", "_", system, flags=re.ASCII) or "_"


# --- Hub fields ------------------------------------------------------------------------------------------------------


def languages(config: PipelineConfig) -> list[str]:
    return [code.strip() for code in config.dataset.language.split(",") if code.strip()]


def is_known(license: str | None) -> bool:
    return bool(license) and str(license).lower() not in ("other", "unknown")


def license_fields(license: str | None) -> Card:
    """The Hub's id where it has one; else `other` with the name, and "not-stated" where nobody gave one."""
    stated = str(license).strip().lower() if license and is_known(license) else ""
    if stated in HUB_LICENSES:
        return {"license": stated}
    return {"license": "other", "license_name": re.sub(r"[^a-z0-9.]+", "-", stated).strip("-") or "not-stated"}


def tags(config: PipelineConfig, version: Mapping[str, Any], *own: str) -> list[str]:
    return [*own, f"project:{config.project}", f"version:{version['id']}"]


def size_category(rows: int) -> str:
    return next((name for limit, name in _SIZES if rows < limit), "10M<n<100M")


def hub_id(config: PipelineConfig, kind: str) -> str | None:
    """The Hub ID of this project's repository of a kind, when rows are published; a repository that isn't there can't be named."""
    publish = config.publish
    return f"{publish.namespace}/{config.project}-{kind}" if publish.enabled and publish.rows and publish.namespace else None


def model_results(
    config: PipelineConfig,
    version: Mapping[str, Any],
    evaluation: Evaluation,
    scores: SystemScores,
    *,
    evaluated_on: str | None,
    revision: str | None,
    source_url: str | None,
) -> list[Card]:
    """The model's own scores: a score of the base model is no claim about this one."""
    metrics = [_metric(HUB_METRICS[field], name, getattr(scores, field), scores.n) for field, name in _FIGURES.items()]
    for score in scores.rationale:
        scored = scores.n - score.n_unscored
        metrics.append(_metric(score.metric, f"rationale: {score.metric}", score.estimate, scored, n_unscored=score.n_unscored))
    metrics = [metric for metric in metrics if metric["value"] is not None]
    if not metrics:
        return []
    name = evaluated_on or str(version["lineage"].get("dataset", {}).get("name") or config.project)
    dataset: Card = {
        "name": name.replace("-train-", f"-{evaluation.split}-", 1),
        "type": hub_id(config, "dataset") or config.project,
        "split": SPLIT_ON_HUB.get(evaluation.split, evaluation.split),
    }
    if revision:
        dataset["revision"] = revision
    result: Card = {"task": {"type": "text-generation", "name": "rating with rationale"}, "dataset": dataset, "metrics": metrics}
    if source_url:
        result["source"] = {"name": "evaluation run", "url": source_url}
    return [result]


def _metric(kind: str, name: str, estimate: Estimate, n: int, **more: Any) -> Card:
    interval = {"low": estimate.low, "high": estimate.high, "method": estimate.method or None, "n": estimate.n or n, **more}
    return {"type": kind, "value": estimate.value, "name": name, "args": {n: v for n, v in interval.items() if v is not None}}


# --- product fields --------------------------------------------------------------------------------------------------


def about_version(config: PipelineConfig, kind: str, version: Mapping[str, Any]) -> Card:
    segments = {segment["segment"]: segment["value"] for segment in version["segments"]}
    return {
        "schema_version": SCHEMA_VERSION,
        "project": config.project,
        "kind": kind,
        **{name: version[name] for name in ("id", "name", "names", "version", "key", "status", "created", "commit", "override")},
        "segments": to_plain(segments),
        "why": list(version["why"]),
        "builds": to_plain(version["builds"][-KEPT_VERSIONS:]),
    }


def prompt_facts(config: PipelineConfig) -> Card:
    """What records are rated for, and how one is put to a model: configuration only, no text of a record."""
    scale = config.dataset.scale
    return {
        "topic": config.prompt.topic,
        "labels": list(scale.labels),
        "instruction": instruction(config.prompt, scale),
        "headings": [heading(column) for column in config.dataset.columns.text],
    }


def last_versions(history: Sequence[Mapping[str, Any]]) -> list[Card]:
    return [dict(entry) for entry in history[-KEPT_VERSIONS:]]


def quality_figures(quality: DataQuality) -> Card:
    """The formatter's findings; record IDs and row numbers are left out, their counts stay."""
    plain = to_plain(quality)
    dropped = {"dropped": len(quality.dropped), "dropped_by_reason": quality.dropped_by_reason}
    kept = {name: value for name, value in plain.items() if name not in ("dropped", "splits", "contradicting_rationales")}
    return {**kept, **dropped, "contradicting_rationales": len(quality.contradicting_rationales)}


def base_facts(facts: ModelFacts) -> Card:
    """What is known of the base model; of a file's path only the file's name, and the template stays in the file."""
    outside = facts.name.startswith((".", "~")) or PurePath(facts.name).is_absolute()
    return {
        **to_plain(facts),
        "name": PurePath(facts.name).name if outside else facts.name,
        "chat_template": None if facts.chat_template is None else "in the GGUF",
    }


def hyperparameters(config: PipelineConfig, method: str) -> Card:
    recipe = {"train": config.train} if method == "lora" else {"model_set": config.model_set}
    return {"seed": config.seed, **to_plain(recipe), "generate": to_plain(config.generate), "prompt_max_tokens": config.prompt.max_tokens}


def metrics_table(evaluation: Evaluation | None, own: SystemScores | None) -> Card | None:
    """The card's own system, the base and the majority baseline side by side, what the pairs say, and the gates of the run."""
    if evaluation is None or own is None:
        return None
    systems = [s for s in evaluation.systems if s.system in (own.system, "base") or s.kind == "baseline"]
    names = {s.system for s in systems}
    pairs = [c for c in evaluation.comparisons if own.system in (c.a, c.b) and {c.a, c.b} <= names]
    return {
        "split": SPLIT_ON_HUB.get(evaluation.split, evaluation.split),
        "verdict": evaluation.verdict,
        "systems": {s.system: _scores(s) for s in systems},
        "comparisons": [_pair(c) for c in pairs],
        "others": [s.system for s in evaluation.systems if s.system not in names],  # the run's card has their figures
        "gates": to_plain(evaluation.gates),
        "notes": [note for note in evaluation.notes if _GROUPS.match(note)],  # the other notes are on raters and further systems
    }


def _scores(scores: SystemScores) -> Card:
    left_out = ("system", "confusion", "mean_seconds", "mean_output_tokens")
    return {name: value for name, value in figures(scores).items() if name not in left_out}


def figures(value: Any) -> Any:
    """Scores as plain values; an estimate without an interval has no empty `low`, `high` and `method`."""
    value = to_plain(value)
    if isinstance(value, list):
        return [figures(item) for item in value]
    if not isinstance(value, dict):
        return value
    empty = {name for name in ("low", "high", "method") if not value.get(name) and value.get(name) != 0} if "value" in value else set()
    return {name: figures(item) for name, item in value.items() if name not in empty}


def _pair(pair: Comparison) -> Card:
    return {name: figures(getattr(pair, name)) for name in _PAIR}


def how_to_run(config: PipelineConfig, version: Mapping[str, Any], method: str, facts: ModelFacts | None) -> Card:
    # a plain `ollama create` on the file would take a template of its own guessing
    registered = [] if config.model.engine == "ollama" else ["uv run pipeline register --set model.engine=ollama"]
    ollama = [*registered, f"ollama run {version['name']}"]
    if method == "model_set":
        elsewhere = "send the messages and options of model_set_config.json to the base model"
        return {"here": "uv run pipeline infer", **({"ollama": ollama} if facts else {}), "elsewhere": elsewhere}
    return {
        "here": "uv run pipeline infer",
        "llama.cpp": f"llama-server --model {_output_dir(config)}/fine_tuned_model.gguf",
        "ollama": ollama,
        "prompt": "one user message, as in the prompt column of formatted_dataset.csv; the answer is one JSON object: rating, rationale",
    }


def _output_dir(config: PipelineConfig) -> str:
    """The folder of outputs as seen from the project; a path of this machine stays here."""
    path = PurePath(config.output_dir)
    return "outputs" if path.is_absolute() or ".." in path.parts or config.output_dir.startswith("~") else path.as_posix()


def unknown_of_model(facts: ModelFacts | None, evaluation: Evaluation | None, scores: SystemScores | None) -> list[str]:
    sentences = []
    if facts is None:
        sentences.append("the base model: it was not found on the machine that made this")
    else:
        if not is_known(facts.license):
            sentences.append("the licence: the base model's file states none, and its weights are inherited")
        if facts.hub_id is None:
            sentences.append("where the base model lies on the Hub")
    if evaluation is None:
        sentences.append("how good it is: it has not been evaluated")
    elif scores is None:
        sentences.append("how good it is: the run holds no answers of it")
    return sentences + (unscored(scores) if scores else [])


def unscored(scores: SystemScores) -> list[str]:
    return [f"{s.metric} of {s.n_unscored} of the {scores.n} rationales of {scores.system}" for s in scores.rationale if s.n_unscored]

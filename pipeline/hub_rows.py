"""Figures and rows as typed Parquet, with the `configs` and `dataset_info` that `datasets` checks when it loads them."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]

from pipeline.card_fields import SPLIT_ON_HUB, split_name
from pipeline.errors import ArtifactError

METRICS = "metrics/metrics.parquet"
_FIGURES = (
    "accuracy", "balanced_accuracy", "macro_f1", "kappa", "quadratic_kappa", "decided_accuracy", "abstention_rate", "brier",
    "calibration_error", "mean_seconds", "mean_output_tokens",
)  # fmt: skip
_METRIC_FIELDS = {
    "system": pa.string(), "metric": pa.string(), "value": pa.float64(), "ci_low": pa.float64(), "ci_high": pa.float64(),
    "n": pa.int64(), "n_unscored": pa.int64(),
}  # fmt: skip
_ANSWER_FIELDS = {
    "record_id": pa.string(), "prompt": pa.string(), "expert_label": pa.string(), "expert_rationale": pa.string(), "label": pa.string(),
    "rationale": pa.string(), "response": pa.string(), "error": pa.string(), "finish": pa.string(), "probabilities": pa.string(),
    "prompt_tokens": pa.int64(), "output_tokens": pa.int64(), "seconds": pa.float64(), "engine": pa.string(), "model_digest": pa.string(),
}  # fmt: skip
_DTYPES = {pa.string(): "string", pa.int64(): "int64", pa.float64(): "float64"}


@dataclass(frozen=True, slots=True)
class Config:
    """One subset of a repository: what the card says of it, and its files."""

    entry: Mapping[str, Any]  # of `configs`
    info: Mapping[str, Any]  # of `dataset_info`
    files: Mapping[str, bytes]


def metrics(card: Mapping[str, Any]) -> Config:
    """Every figure of a run's card, one a row; null where it is undefined."""
    rows: list[dict[str, Any]] = []
    for system, scores in card["pipeline"]["systems"].items():
        rows += [_metric(system, name, scores[name], scores) for name in _FIGURES if scores.get(name) is not None]
        rows += [
            _metric(system, f"{part}: {label}", each[part], scores)
            for label, each in (scores.get("per_rating") or {}).items()
            for part in ("precision", "recall", "f1")
        ]
        rows.append({**_metric(system, "unusable_answers", {"value": scores["n_invalid"]}, scores)})
        rows += [
            {**_metric(system, f"rationale: {r['metric']}", r["estimate"], scores), "n_unscored": r["n_unscored"]}
            for r in scores.get("rationale") or ()
        ]
    return _config("metrics", {card["pipeline"]["split"]: (METRICS, _table(rows, _METRIC_FIELDS))})


def _metric(system: str, name: str, figure: Any, scores: Mapping[str, Any]) -> dict[str, Any]:
    told = figure if isinstance(figure, Mapping) else {"value": figure}
    value = None if told.get("value") is None else float(told["value"])
    n = told.get("n") or scores["n"]
    return {"system": system, "metric": name, "value": value, "ci_low": told.get("low"), "ci_high": told.get("high"), "n": n}


# --- rows ------------------------------------------------------------------------------------------------------------


def dataset_rows(formatted: Path, card: Mapping[str, Any]) -> Config:
    """formatted_dataset.csv, a file a split; an opinion that is not there is null.

    Raises:
        ArtifactError: damaged.
    """
    rows = read_rows(formatted)
    whole = all(isinstance(rating["value"], int) for rating in card["pipeline"]["ratings"])
    names = [name for name in (rows[0] if rows else ()) if name != "split"]
    fields = {name: pa.int64() if name == "rating" and whole else pa.string() for name in names}
    given = {name for name in names if name.startswith(("copilot_", "rater_"))}
    tables: dict[str, tuple[str, pa.Table]] = {}
    for split, name in SPLIT_ON_HUB.items():
        chosen: list[dict[str, Any]] = [
            {n: None if n in given and not row[n] else int(row[n]) if n == "rating" and whole else row[n] for n in names}
            for row in rows
            if row["split"] == split
        ]
        if chosen:  # the Hub's viewer fails on an empty file
            tables[name] = (f"data/{name}.parquet", _table(chosen, fields))
    return _config("default", tables, default=True)


def answers(outputs: Path, formatted: Path, card: Mapping[str, Any]) -> Config:
    """Every answer of every system to a test row, a file a system.

    Raises:
        ArtifactError: damaged, or a system's answers are not in it.
    """
    about = card["pipeline"]
    on_hub = about["split"]
    split = next((name for name, there in SPLIT_ON_HUB.items() if there == on_hub), on_hub)
    rows = [row for row in read_rows(formatted) if row["split"] == split]
    made = _made_answers(outputs)
    tables: dict[str, tuple[str, pa.Table]] = {}
    for system, scores in about["systems"].items():
        if scores["kind"] == "baseline":
            continue
        prefix = system if system == "copilot" else f"rater_{system}"
        found = [made.get((row["record_id"], system)) if scores["kind"] == "model" else _given(row, prefix) for row in rows]
        lines = [{**_of_record(row), **answer} for row, answer in zip(rows, found, strict=True) if answer is not None]
        if not lines:
            raise ArtifactError(f"{outputs}: holds no answers of {system}", hint="make them: `pipeline run`")
        name = split_name(system)
        while name in tables:  # two raters' names may differ in what a split's name can't hold
            name += "_"
        tables[name] = (f"outputs/{name}.parquet", _table(lines, _ANSWER_FIELDS))
    return _config("outputs", tables, default=True)


def read_rows(formatted: Path) -> list[dict[str, str]]:
    """The rows of formatted_dataset.csv, every text as it stands there.

    Raises:
        ArtifactError: damaged.
    """
    limit = csv.field_size_limit(2**31 - 1)
    try:
        header, *rows = csv.reader(io.StringIO(formatted.read_bytes().decode("utf-8-sig"), newline=""), strict=True)
        return [dict(zip(header, row, strict=True)) for row in rows]
    except (csv.Error, UnicodeDecodeError, ValueError) as error:
        raise ArtifactError(f"{formatted}: damaged: {error}", hint="make it again: `pipeline format`") from error
    finally:
        csv.field_size_limit(limit)


def _of_record(row: Mapping[str, str]) -> dict[str, Any]:
    told = {"record_id": "record_id", "prompt": "prompt", "expert_label": "label", "expert_rationale": "rationale"}
    return {name: row[column] for name, column in told.items()}


def _given(row: Mapping[str, str], prefix: str) -> dict[str, Any] | None:
    """What a rater or another system said of a row, in a column of the table."""
    label, why = row.get(f"{prefix}_rating") or None, row.get(f"{prefix}_rationale") or None
    return {"label": label, "rationale": why, "finish": "given", "engine": "given"} if label or why else None


def _made_answers(outputs: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """(record, system) -> the last line of it."""
    found = {}
    for number, line in enumerate(outputs.read_bytes().split(b"\n")[:-1], start=1):
        try:
            told = json.loads(line)
            key = (told["record_id"], told["system"])
        except (ValueError, KeyError, TypeError) as error:
            raise ArtifactError(f"{outputs}: line {number} is damaged", hint="make it again: `pipeline infer`") from error
        odds = told.get("probabilities")
        told["probabilities"] = None if odds is None else json.dumps(odds, ensure_ascii=False, sort_keys=True)
        found[key] = {name: told.get(name) for name in _ANSWER_FIELDS if name not in ("prompt", "expert_label", "expert_rationale")}
    return found


# --- Parquet ---------------------------------------------------------------------------------------------------------


def _table(rows: Sequence[Mapping[str, Any]], fields: Mapping[str, pa.DataType]) -> pa.Table:
    return pa.table({name: pa.array([row.get(name) for row in rows], type=kind) for name, kind in fields.items()})


def _config(name: str, tables: Mapping[str, tuple[str, pa.Table]], *, default: bool = False) -> Config:
    """The subset of these splits, its sizes computed: `datasets` refuses a subset whose counts are not those of its files."""
    files: dict[str, bytes] = {}
    for path, table in tables.values():
        out = io.BytesIO()
        pq.write_table(table, out, compression="snappy")
        files[path] = out.getvalue()
    schema = next(iter(tables.values()))[1].schema
    splits = [{"name": split, "num_bytes": table.nbytes, "num_examples": table.num_rows} for split, (_, table) in tables.items()]
    info = {
        "config_name": name,
        "features": [{"name": field.name, "dtype": _DTYPES[field.type]} for field in schema],
        "splits": splits,
        "download_size": sum(map(len, files.values())),
        "dataset_size": sum(table.nbytes for _, table in tables.values()),
    }
    entry: dict[str, Any] = {"config_name": name, **({"default": True} if default else {})}
    entry["data_files"] = [{"split": split, "path": path} for split, (path, _) in tables.items()]
    return Config(entry, info, files)

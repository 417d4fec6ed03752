"""Systems lined up beside the rows, and every figure of theirs by the name that gates use."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from pipeline import intervals, statistics
from pipeline.evaluation_words import MAJORITY
from pipeline.intervals import Figure
from pipeline.ports import Scorer
from pipeline.records import Answer, RatingScale, Record
from pipeline.statistics import Array

SYSTEMS = ("base", "fine_tuned", "model_set")  # the order of the model systems; others follow, given ones and the baseline come last
Kind = Literal["model", "given", "baseline"]


@dataclass(frozen=True, eq=False)
class Sheet:
    """The rows, with the expert's ratings as positions on the scale."""

    records: Sequence[Record]
    scale: RatingScale
    expert: Array  # (rows,)
    resampler: intervals.Resampler

    @property
    def k(self) -> int:
        return len(self.scale.labels)


@dataclass(frozen=True, eq=False)
class Column:
    """One system beside the rows: `answer` (rows,) positions, k for invalid; `rows` (rows,) bool, the rows it is scored on."""

    system: str
    kind: Kind
    answer: Array
    rows: Array
    answers: tuple[Answer | None, ...]
    errors: Mapping[str, int]
    figures: Mapping[str, Figure] = field(default_factory=dict)


def by_system_of(answers: Sequence[Answer], primary: str) -> dict[str, list[Answer]]:
    """System -> its answers: models first, then the copilot, then raters."""
    found: dict[str, list[Answer]] = {primary: []}
    for answer in answers:
        found.setdefault(answer.system, []).append(answer)

    def place(system: str) -> tuple[int, int]:
        if _is_given(found[system]):
            return (2, system != "copilot")
        return (0, SYSTEMS.index(system)) if system in SYSTEMS else (1, 0)

    return {system: found[system] for system in sorted(found, key=place)}


def _is_given(answers: Sequence[Answer]) -> bool:
    return bool(answers) and all(answer.engine == "given" for answer in answers)


def column_of(sheet: Sheet, system: str, mine: Sequence[Answer]) -> Column:
    by_record = {answer.record_id: answer for answer in mine}
    answers = tuple(by_record.get(record.record_id) for record in sheet.records)
    position = {label: number for number, label in enumerate(sheet.scale.labels)}
    codes = np.array(
        [position.get(a.label, sheet.k) if a and a.label is not None and not a.error else sheet.k for a in answers], dtype=np.int64
    )
    rows = np.ones(len(answers), dtype=bool)
    if _is_given(mine):
        rows = np.array([a is not None and a.error != "no_answer" for a in answers], dtype=bool)
    errors = Counter(
        "no_answer" if a is None else a.error or "unknown_label"
        for a, code, row in zip(answers, codes, rows, strict=True)
        if row and code == sheet.k
    )
    return Column(system, "given" if _is_given(mine) else "model", codes, rows, answers, dict(sorted(errors.items())))


def baseline(sheet: Sheet, train_labels: Sequence[str]) -> list[Column]:
    """Always the most frequent rating of the training rows; nothing when there are none."""
    counts = [sum(label == known for label in train_labels) for known in sheet.scale.labels]
    if not any(counts):
        return []
    n = len(sheet.records)
    return [Column(MAJORITY, "baseline", np.full(n, counts.index(max(counts))), np.ones(n, dtype=bool), (None,) * n, {})]


def figures_of(sheet: Sheet, column: Column, metrics: Sequence[str], score: Scorer) -> dict[str, Figure]:
    """Every figure of one system, by the name that gates use; a figure without rows is there and undefined."""
    k, expert, answer, rows = sheet.k, sheet.expert, column.answer, column.rows
    right = rows & (answer == expert)

    def of_table(metric: statistics.Metric, least: float = 0.0) -> Figure:
        return intervals.table_figure(metric, expert, answer, k, rows, (least, 1.0))

    figures = {
        "accuracy": intervals.share_figure(right, rows),
        "balanced_accuracy": of_table(statistics.balanced_accuracy),
        "macro_f1": of_table(statistics.macro_f1),
        "kappa": of_table(statistics.kappa, -1.0),
        "invalid_rate": intervals.share_figure(answer == k, rows),
    }
    if sheet.scale.ordered:
        figures["quadratic_kappa"] = of_table(statistics.quadratic_kappa, -1.0)
    abstain = [number for number, rating in enumerate(sheet.scale.ratings) if rating.abstain]
    if abstain:
        figures["decided_accuracy"] = intervals.share_figure(right, rows & ~np.isin(expert, abstain))
        figures["abstention_rate"] = intervals.share_figure(np.isin(answer, abstain), rows)
    for number, label in enumerate(sheet.scale.labels):
        figures[f"precision.{label}"] = intervals.share_figure(right, rows & (answer == number), rows)
        figures[f"recall.{label}"] = intervals.share_figure(right, rows & (expert == number))
        figures[f"f1.{label}"] = of_table(statistics.f1_of(number))
    probabilities = [_probabilities(a, sheet.scale.labels) if a and row else None for a, row in zip(column.answers, rows, strict=True)]
    figures["brier"] = intervals.brier_figure(probabilities, expert)
    figures["calibration_error"] = intervals.calibration_figure(probabilities, expert)
    for metric in metrics:
        bounds = (-1.0, 1.0) if metric == "semantic_similarity" else (0.0, 1.0)  # a cosine may be negative
        figures[metric] = intervals.mean_figure(_rationale_values(sheet, column, metric, score), bounds)
    return figures


def _probabilities(answer: Answer, labels: Sequence[str]) -> list[float] | None:
    """One number a rating, adding up to 1; None when there are none or they make no sense."""
    values = [float((answer.probabilities or {}).get(label, 0.0)) for label in labels]
    total = sum(values)
    return [value / total for value in values] if math.isfinite(total) and total > 0 and min(values) >= 0 else None


def _rationale_values(sheet: Sheet, column: Column, metric: str, score: Scorer) -> list[float | None]:
    """The metric for each row that has two rationales; None elsewhere."""
    values: list[float | None] = [None] * len(sheet.records)
    texts = {
        row: (answer.rationale, record.rationale)
        for row, (answer, record) in enumerate(zip(column.answers, sheet.records, strict=True))
        if column.rows[row] and answer and answer.rationale and answer.rationale.strip() and record.rationale.strip()
    }
    if texts:
        scored = score(metric, [mine for mine, _ in texts.values()], [expert for _, expert in texts.values()])
        for row, value in zip(texts, scored, strict=True):
            values[row] = value
    return values

"""Answers -> scores, comparisons, gates, and a verdict in words.

Rules. A missing or unusable answer of a model is wrong, never dropped; a copilot or rater is scored on the rows it has. Two systems are
compared on the rows of both. `a` is *better* than `b` when the paired 95 % interval of the difference of accuracy lies above zero and
the exact McNemar p-value, adjusted by Holm over all pairs, is below 0.05; *worse* likewise; anything else is *not decided*.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations

import numpy as np

from pipeline import intervals, statistics
from pipeline.config import EvaluateConfig
from pipeline.evaluation_figures import Column, Sheet, baseline, by_system_of, column_of, figures_of
from pipeline.evaluation_gates import Gate, check_gates, gate_exit_code, gate_result
from pipeline.evaluation_words import capital, comparison_words, name, verdict_words
from pipeline.ports import Progress, Scorer, quiet
from pipeline.records import (
    Answer,
    Comparison,
    Estimate,
    Evaluation,
    GateResult,
    RatingScale,
    RatingScores,
    RationaleScore,
    Record,
    SystemScores,
    Verdict,
)

__all__ = ["check_gates", "evaluate", "gate_exit_code"]

ALPHA = 0.05


def evaluate(
    records: Sequence[Record],
    answers: Sequence[Answer],
    *,
    scale: RatingScale,
    config: EvaluateConfig,
    score: Scorer,
    seed: int,
    primary: str,
    train_labels: Sequence[str],
    split: str = "test",
    remarks: Sequence[str] = (),
    progress: Progress = quiet,
) -> Evaluation:
    """Scores of every system in `answers`, of `primary` (all wrong when it has no answer) and of the majority baseline.

    Args:
        records: the rows of one split; answers to other rows are ignored.
        answers: of any number of systems; the last one counts where a system answered a row twice.
        score: called once a system and metric of `config.metrics`, never with an empty list.
        train_labels: the ratings of the training rows, whose most frequent one is the baseline's answer; ties go to the lower rating.
        remarks: what is known of the answers beside them, to stand among the notes.

    Returns:
        Comparisons name the primary system first, then fine_tuned, model_set, base, further models, copilot, raters and the baseline
        (so `comparison("fine_tuned", "base")` exists); shares are 0 to 1.

    Raises:
        ConfigError: a gate that can't be read, or names a system or figure that there is not; raised before anything is computed.
    """
    by_system = by_system_of(answers, primary)
    # a model that a fallback left out makes its gates inconclusive, not unknown
    gates = check_gates(config, systems=dict.fromkeys([*by_system, "base", "fine_tuned", "model_set"]), scale=scale)
    position = {label: number for number, label in enumerate(scale.labels)}
    expert = np.array([position[record.label] for record in records], dtype=np.int64)
    sheet = Sheet(records, scale, expert, intervals.Resampler([record.group for record in records], seed=seed))
    columns = [column_of(sheet, system, mine) for system, mine in by_system.items()] + baseline(sheet, train_labels)
    for number, column in enumerate(columns):
        progress("evaluate", number, len(columns), column.system)
        columns[number] = replace(column, figures=figures_of(sheet, column, config.metrics, score))
    systems = tuple(_scores(sheet, column, config.metrics) for column in columns)
    comparisons = _comparisons(sheet, columns, primary)
    results = tuple(_gate_result(gate, sheet, columns) for gate in gates)
    progress("evaluate", len(columns), len(columns))
    verdict = verdict_words(primary, systems, comparisons, split)
    notes = (*_notes(sheet, columns), *remarks)
    return Evaluation(split, scale.labels, scale.ordered, primary, systems, comparisons, results, verdict, notes)


# --- scores ------------------------------------------------------------------------------------------------------------


def _scores(sheet: Sheet, column: Column, metrics: Sequence[str]) -> SystemScores:
    figures, kind = column.figures, column.kind
    estimates = {name: intervals.estimate(figure, sheet.resampler) for name, figure in figures.items()}
    rows, n = column.rows, int(column.rows.sum())
    per_rating = {
        label: RatingScores(
            precision=estimates[f"precision.{label}"],
            recall=estimates[f"recall.{label}"],
            f1=estimates[f"f1.{label}"],
            support=int((sheet.expert[rows] == number).sum()),
        )
        for number, label in enumerate(sheet.scale.labels)
    }
    table = statistics.table(sheet.expert[rows], column.answer[rows], sheet.k)
    timed = [answer for answer in column.answers if answer] if kind == "model" else []
    has_probabilities = figures["brier"].n > 0
    return SystemScores(
        system=column.system,
        kind=kind,
        n=n,
        n_invalid=int((column.answer[rows] == sheet.k).sum()),
        errors=column.errors,
        accuracy=estimates["accuracy"],
        balanced_accuracy=estimates["balanced_accuracy"],
        macro_f1=estimates["macro_f1"],
        kappa=estimates["kappa"],
        quadratic_kappa=estimates.get("quadratic_kappa"),
        decided_accuracy=estimates.get("decided_accuracy"),
        abstention_rate=estimates["abstention_rate"].value if "abstention_rate" in estimates else None,
        per_rating=per_rating,
        confusion=tuple(tuple(int(count) for count in line) for line in table),
        rationale=() if kind == "baseline" else tuple(RationaleScore(name, estimates[name], n - estimates[name].n) for name in metrics),
        brier=estimates["brier"] if has_probabilities else None,
        calibration_error=estimates["calibration_error"] if has_probabilities else None,
        mean_seconds=sum(answer.seconds for answer in timed) / len(timed) if timed else None,
        mean_output_tokens=sum(answer.output_tokens for answer in timed) / len(timed) if timed else None,
    )


# --- comparisons -------------------------------------------------------------------------------------------------------


def _comparisons(sheet: Sheet, columns: Sequence[Column], primary: str) -> tuple[Comparison, ...]:
    first = (primary, "fine_tuned", "model_set", "base")
    ordered = sorted(columns, key=lambda column: first.index(column.system) if column.system in first else len(first))
    kinds = {column.system: column.kind for column in columns}
    pairs = list(combinations(ordered, 2))
    raw = [_compare(sheet, a, b) for a, b in pairs]
    adjusted = iter(statistics.holm([pair.p_value for pair in raw if pair.n]))
    judged = [_judge(pair, next(adjusted)) if pair.n else pair for pair in raw]
    return tuple(
        replace(pair, words=comparison_words(pair, kinds, *_right(sheet, a, b))) for pair, (a, b) in zip(judged, pairs, strict=True)
    )


def _compare(sheet: Sheet, a: Column, b: Column) -> Comparison:
    """The pair before the p-values of all pairs are known."""
    both = a.rows & b.rows
    right_a, right_b = (both & (column.answer == sheet.expert) for column in (a, b))
    n, only_a, only_b = int(both.sum()), int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    return Comparison(
        a=a.system,
        b=b.system,
        n=n,
        difference=intervals.difference(a.figures["accuracy"], b.figures["accuracy"], sheet.resampler),
        only_a_right=only_a,
        only_b_right=only_b,
        p_value=statistics.mcnemar(only_a, only_b),
        p_holm=1.0,
        smallest_detectable=statistics.smallest_detectable(only_a + only_b, n),
        verdict="not decided",
        words="",
    )


def _judge(pair: Comparison, p_holm: float) -> Comparison:
    low, high = pair.difference.low, pair.difference.high
    verdict: Verdict = "not decided"
    if p_holm < ALPHA and low is not None and high is not None and (low > 0 or high < 0):
        verdict = "better" if low > 0 else "worse"
    return replace(pair, p_holm=p_holm, verdict=verdict)


def _right(sheet: Sheet, a: Column, b: Column) -> tuple[int, int]:
    """How many of their common rows each got right."""
    both = a.rows & b.rows
    return int((both & (a.answer == sheet.expert)).sum()), int((both & (b.answer == sheet.expert)).sum())


def _gate_result(gate: Gate, sheet: Sheet, columns: Sequence[Column]) -> GateResult:
    figures = {column.system: column.figures for column in columns}
    terms = [term for term in (gate.a, gate.b) if term is not None]
    if any(system not in figures for system, _ in terms):  # a model that was not made; the baseline, without training ratings
        return gate_result(gate, Estimate(None))
    found = [figures[system][figure] for system, figure in terms]
    if gate.b is None:
        return gate_result(gate, intervals.estimate(found[0], sheet.resampler))
    return gate_result(gate, intervals.difference(found[0], found[1], sheet.resampler))


# --- notes -------------------------------------------------------------------------------------------------------------


def _notes(sheet: Sheet, columns: Sequence[Column]) -> tuple[str, ...]:
    labels, n = sheet.scale.labels, len(sheet.records)
    notes = []
    if sheet.resampler.clustered:
        notes.append(
            f"The {n} rows form {sheet.resampler.units} groups: intervals count groups, the exact test counts rows; a verdict needs both."
        )
    absent = [label for number, label in enumerate(labels) if not (sheet.expert == number).any()]
    if n and absent:
        notes.append(f"The expert rated no row {_listed(absent)}: macro F1 and balanced accuracy are means over the other ratings.")
    if not any(column.kind == "baseline" for column in columns):
        notes.append("There is no majority baseline, because no training ratings were given.")
    for column in columns:
        notes += _column_notes(column)
    raters = [column for column in columns if column.kind == "given" and column.system != "copilot"]
    if raters:
        rows = [
            [int(e), *(int(c.answer[i]) if c.rows[i] and c.answer[i] < sheet.k else None for c in raters)]
            for i, e in enumerate(sheet.expert)
        ]
        alpha = statistics.krippendorff_alpha(rows, sheet.k, ordered=sheet.scale.ordered)
        kind = "ordinal" if sheet.scale.ordered else "nominal"
        if alpha is not None:
            others = "one other rater" if len(raters) == 1 else f"{len(raters)} other raters"
            notes.append(f"Agreement of the expert and {others}: Krippendorff's alpha ({kind}) is {alpha:.3f}.")
    return tuple(notes)


def _column_notes(column: Column) -> list[str]:
    """What a reader of this system's figures must know."""
    who, notes = capital(name(column.system, column.kind)), []
    n, known = int(column.rows.sum()), column.figures["brier"].n
    if column.kind == "given" and n < len(column.rows):
        notes.append(f"{who} rated {n} of {len(column.rows)} rows and is scored on those.")
    if missing := column.errors.get("no_answer"):
        notes.append(f"{who} has no answer to {missing} of {n} rows; they count as wrong.")
    if 0 < known < n:
        notes.append(f"{who}: rating probabilities are known for {known} of {n} rows; Brier score and calibration error are over those.")
    return notes


def _listed(labels: Sequence[str]) -> str:
    return " or ".join(f"“{label}”" for label in labels)

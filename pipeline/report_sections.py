"""The sections of report.html: records in, markup out. Empty markup leaves a section out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.records import INVALID, DataQuality, Evaluation, ModelFacts, RationaleScore, SystemScores, TrainingResult, to_plain
from pipeline.report_markup import (
    NONE,
    Axis,
    Html,
    attribute,
    bullets,
    cell,
    code,
    count,
    details,
    duration,
    facts,
    h,
    join,
    learning_curve,
    note,
    p_text,
    points_text,
    system_name,
    table,
)

METRICS = {"rouge": "ROUGE-L", "chrf": "chrF", "string_similarity": "String similarity", "semantic_similarity": "Semantic similarity"}
KINDS = {"model": "model", "given": "from the table", "baseline": "baseline"}
MARKS = {"better": "▲", "worse": "▼", "not decided": "○", "passed": "✓", "failed": "✗", "inconclusive": "○"}
ERRORS = {
    "invalid_json": "not the JSON asked for",
    "unknown_label": "a rating that is not on the scale",
    "cut": "cut by the token limit before the rating",
    "too_long": "prompt too long, not sent",
    "failed": "the engine failed on this row",
    "no_answer": "no answer",
}
READING = {
    "Interval": "95 %: in 19 of 20 samples of rows like these, such an interval holds the true figure. Fewer rows, wider interval.",
    "Difference": "Accuracy of the first less that of the second on the rows that both answered. An interval without zero and a small p "
    "say that it is more than luck; Holm's p allows for the number of pairs.",
    "Not decided": "These rows can't tell. It does not mean equal: a difference below the smallest detectable one would mostly go unseen.",
    "Invalid": "An answer without a usable rating. It counts as wrong and is never left out.",
    "Kappa": "Agreement with the expert beyond chance: 0 is chance, 1 perfect. The quadratic one forgives near misses on an ordered scale.",
    "Majority": "Always the most frequent rating of the training rows. A system that does not beat it is of no use.",
    "Raters": "A second person's agreement with the expert is about the most that a model can honestly reach.",
    "Rationales": "Likeness to the expert's sentence, in words or in meaning. It does not say whether a reason is true.",
}


def accuracy(evaluation: Evaluation) -> Html:
    if not evaluation.systems:
        return note("No system was evaluated.")
    baseline = next((s.accuracy.value for s in evaluation.systems if s.kind == "baseline"), None)
    axis = Axis.around(value for s in evaluation.systems for value in (s.accuracy.value, s.accuracy.low, s.accuracy.high))
    rows = [
        (
            Html(f"{_who(s, evaluation)} <small>{KINDS[s.kind]}</small>"),
            cell(s.accuracy, percent=True),
            axis.interval(s.accuracy, s.kind, baseline),
            cell(s.macro_f1, percent=True),
            cell(s.kappa),
            count(s.n_invalid),
            count(s.n),
        )
        for s in evaluation.systems
    ]
    head = ("System", ">Accuracy [95 % interval]", axis.heading("Plot in per cent"), ">Macro F1", ">Kappa", ">Invalid", ">Rows")
    key = "●  model    ○  from the table: people, copilot    ❘  baseline" + ("    ┆  majority" if baseline is not None else "")
    title = f"Agreement with the expert on the {evaluation.split} rows"
    return Html(table(title, head, rows, "forest") + note(key) + details("More figures of each system", _more(evaluation)))


def _more(evaluation: Evaluation) -> Html:
    head = ("System", ">Balanced accuracy", ">Quadratic kappa", ">Accuracy where the expert decided", ">Abstains", ">Seconds a row")
    rows = [
        (
            _who(s, evaluation),
            cell(s.balanced_accuracy, percent=True),
            cell(s.quadratic_kappa),
            cell(s.decided_accuracy, percent=True),
            NONE if s.abstention_rate is None else f"{s.abstention_rate * 100:.1f} %",
            NONE if s.mean_seconds is None else f"{s.mean_seconds:.2f}",
            NONE if s.mean_output_tokens is None else f"{s.mean_output_tokens:.0f}",
            "; ".join(f"{count(n)} × {ERRORS.get(error, error)}" for error, n in s.errors.items() if n) or "none",
        )
        for s in evaluation.systems
    ]
    return table("", (*head, ">Tokens a row", "Invalid answers"), rows)


def _who(scores: SystemScores, evaluation: Evaluation) -> Html:
    name = h(system_name(scores.system))
    return Html(f"<b>{name}</b>") if scores.system == evaluation.primary else name


def comparisons(evaluation: Evaluation) -> Html:
    pairs = sorted(evaluation.comparisons, key=lambda pair: evaluation.primary not in (pair.a, pair.b))
    if not pairs:
        return note("There are no two systems to compare.")
    models = {s.system for s in evaluation.systems if s.kind == "model"}
    axis = Axis.around([0.0, *(v for pair in pairs for v in (pair.difference.value, pair.difference.low, pair.difference.high))])
    rows = [
        (
            Html(f"{h(system_name(pair.a))} <small>against</small> {h(system_name(pair.b))}"),
            cell(pair.difference, points=True),
            axis.interval(pair.difference, "model", 0.0),
            p_text(pair.p_holm),
            p_text(pair.p_value),
            points_text(pair.smallest_detectable),
            Html(f"{_flip(pair.only_a_right, pair.b, pair.a, models)} : {_flip(pair.only_b_right, pair.a, pair.b, models)}"),
            count(pair.n),
            Html(f'<b class="whole">{MARKS[pair.verdict]} {pair.verdict}</b>'),
        )
        for pair in pairs
    ]
    head = ("Pair", ">Difference in points [95 % interval]", axis.heading("Plot in points"), ">p, Holm", ">p")
    more = (">Smallest detectable", ">Only one right, first : second", ">Rows", "Verdict")
    title = "Differences in accuracy on the same rows; exact McNemar test"
    return Html(table(title, (*head, *more), rows, "forest") + details("The same in words", bullets(pair.words for pair in pairs)))


def _flip(n: int, wrong: str, right: str, models: set[str]) -> Html:
    """A count; where both are models, a button that shows its rows."""
    if not {wrong, right} <= models:
        return h(count(n))
    query = attribute(json.dumps([wrong, right], separators=(",", ":")))
    return Html(f'<button type="button" data-flip="{query}" title="Show these rows">{count(n)}</button>')


def gates(evaluation: Evaluation) -> Html:
    rows = [(gate.gate, Html(f"<b>{MARKS[gate.outcome]} {gate.outcome}</b>"), gate.words) for gate in evaluation.gates]
    return table("", ("Gate", "Outcome", "Why"), rows) if rows else Html()


def each_rating(evaluation: Evaluation) -> Html:
    rows: list[Sequence[object] | Html] = []
    for label in evaluation.labels:
        scored = [(s, s.per_rating[label]) for s in evaluation.systems if label in s.per_rating]
        rows += [h(label)] if scored else []
        rows += [
            (_who(s, evaluation), *(cell(e, percent=True) for e in (r.precision, r.recall, r.f1)), count(r.support)) for s, r in scored
        ]
    return table("", ("System", ">Precision", ">Recall", ">F1", ">Expert rows"), rows) if rows else Html()


def confusion(evaluation: Evaluation) -> Html:
    said = (*evaluation.labels, INVALID)
    blocks = [
        table(
            system_name(s.system),
            ("Expert ↓ said →", *(f">{name}" for name in said), ">Rows"),
            [
                (label, *(_confused(s, label, name, n, sum(row)) for name, n in zip(said, row, strict=True)), count(sum(row)))
                for label, row in zip(evaluation.labels, s.confusion, strict=True)
            ],
            "confusion",
        )
        for s in evaluation.systems
    ]
    how = note("Rows are the expert's rating, columns what the system said; framed cells agree. Press a count to see its rows.")
    return Html(f'{how}<div class="side">{join(blocks)}</div>') if blocks else Html()


def _confused(scores: SystemScores, label: str, said: str, n: int, total: int) -> Html:
    kind = f"s{round(5 * n / total) if total else 0}{' agree' if label == said else ''}"
    if not n or scores.kind == "baseline":
        return Html(f'<span class="{kind}">{count(n)}</span>')
    query = attribute(json.dumps([label, scores.system, said], ensure_ascii=False))
    return Html(f'<button type="button" class="{kind}" data-cell="{query}" title="Show these rows">{count(n)}</button>')


def rationales(evaluation: Evaluation) -> Html:
    metrics = list(dict.fromkeys(score.metric for s in evaluation.systems for score in s.rationale))
    if not metrics:
        return note("No rationale was scored.")
    scored = [(s, {score.metric: score for score in s.rationale}) for s in evaluation.systems if s.rationale]
    rows = [(_who(s, evaluation), *(_rationale(scores.get(metric)) for metric in metrics)) for s, scores in scored]
    head = ("System", *(f">{METRICS.get(metric, metric)}" for metric in metrics))
    return Html(
        table("Likeness to the expert's rationale: mean [95 % interval]", head, rows)
        + note("Higher is more alike. A row that could not be scored is left out of the mean and counted.")
    )


def _rationale(score: RationaleScore | None) -> Html:
    if score is None:
        return h(NONE)
    return Html(f"{cell(score.estimate)}<br><small>{count(score.estimate.n)} scored, {count(score.n_unscored)} not</small>")


def calibration(evaluation: Evaluation) -> Html:
    scored = [s for s in evaluation.systems if s.brier or s.calibration_error]
    rows = [(_who(s, evaluation), cell(s.brier), cell(s.calibration_error)) for s in scored]
    title = "Do the ratings' probabilities mean what they say? Lower is better, 0 is perfect"
    return table(title, ("System", ">Brier score", ">Calibration error (ECE)"), rows) if rows else Html()


def training(result: TrainingResult | None, model: ModelFacts | None, approach: str, reason: str, validation: Mapping[str, Any]) -> Html:
    known: list[tuple[object, object]] = [("Approach", approach.replace("_", " ")), ("Why", reason or NONE)]
    if model:
        size = (
            f"{model.architecture}, {count(model.parameters / 1e6)} M parameters, {model.quantisation}, {count(model.size_bytes / 1e6)} MB"
        )
        known += [("Base model", f"{model.name}: {size}"), ("Licence of the base", model.license or "not stated in the file")]
    checks = details("Validation", _tree(validation))
    if result is None:
        return Html(facts(known) + note("No weights were changed, so there is no learning curve.") + checks)
    refused = "".join(f", {count(n)} refused ({why})" for why, n in result.refused_rows.items())
    known += [
        ("Rows", f"{count(result.trained_rows)} trained on{refused}"),
        ("Tokens a pass", f"{count(result.row_tokens)}, of them {count(result.answer_tokens)} in answers, which alone carry the loss"),
        ("Time", f"{duration(result.seconds)}, {count(result.steps)} steps"),
        ("Machine", f"{result.threads} threads, {result.dtype}, {result.peak_memory_bytes / 1e9:.1f} GB at the peak"),
        ("Kept", f"epoch {result.best_epoch}" + (", stopped early" if result.stopped_early else "")),
    ]
    return Html(facts(known) + _epochs(result) + checks)


def _epochs(result: TrainingResult) -> Html:
    rows = [
        (
            f"{e.epoch}{' (kept)' if e.epoch == result.best_epoch else ''}",
            f"{e.train_loss:.4f}",
            NONE if e.valid_loss is None else f"{e.valid_loss:.4f}",
            duration(e.seconds),
            count(e.tokens / e.seconds) if e.seconds else NONE,
        )
        for e in result.epochs
    ]
    head = ("Epoch", ">Training loss", ">Validation loss", ">Time", ">Tokens/s")
    return Html(f'<div class="side">{learning_curve(result)}{table("", head, rows)}</div>') if rows else Html()


def data_quality(quality: DataQuality, labels: Sequence[str]) -> Html:
    ids = quality.contradicting_rationales
    known: list[tuple[object, object]] = [
        ("Rows", f"{count(quality.rows_kept)} kept of {count(quality.rows_read)} read"),
        ("Without a rationale", count(quality.without_rationale)),
        ("Exact duplicates", f"{count(quality.exact_duplicates)}; groups of them with different ratings: {count(quality.label_conflicts)}"),
        ("Near duplicates", f"{count(quality.near_duplicate_rows)} rows in {count(quality.near_duplicate_clusters)} clusters"),
        ("Rationale contradicts rating", Html(count(len(ids)) + details("their record ids", h(", ".join(ids)) if ids else Html()))),
        ("Other opinions", ", ".join(f"{system_name(who)}: {count(n)} rows" for who, n in quality.opinions.items()) or "none"),
    ]
    dropped = [(reason, count(n)) for reason, n in quality.dropped_by_reason.items()]
    drops = table("Rows dropped", ("Why", ">Rows"), dropped) if dropped else note("No row was dropped.")
    return Html(f'{facts(known)}<div class="side">{_splits(quality, labels)}{_lengths(quality)}{drops}</div>{bullets(quality.notes)}')


def _splits(quality: DataQuality, labels: Sequence[str]) -> Html:
    names = list(dict.fromkeys([*labels, *(label for split in quality.splits.values() for label in split.labels)]))
    rows = [
        (name, count(split.rows), count(split.groups), *(_share(split.labels.get(label, 0), split.rows) for label in names))
        for name, split in quality.splits.items()
    ]
    return (
        table("Balance of the splits", ("Split", ">Rows", ">Groups", *(f">{name}" for name in names)), rows, "splits") if rows else Html()
    )


def _share(n: int, total: int) -> Html:
    return Html(f'{count(n)} <span class="ci">{100 * n / total:.0f} %</span>' if total else count(n))


def _lengths(quality: DataQuality) -> Html:
    kinds = {"Prompt, words": quality.prompt_words, "Prompt, tokens": quality.prompt_tokens, "Rationale, words": quality.rationale_words}
    rows = [(name, *(count(f[k]) if k in f else NONE for k in ("min", "median", "p95", "max"))) for name, f in kinds.items() if f]
    return table("Lengths", ("Text", ">Least", ">Median", ">95 % under", ">Most"), rows) if rows else Html()


def lineage(versions: Mapping[str, str], digests: Mapping[str, str], model: ModelFacts | None, config: Mapping[str, Any]) -> Html:
    lines = [(name, code(version)) for name, version in versions.items()] + [(name, code(digest)) for name, digest in digests.items()]
    lines += [(f"base model {model.name}", code(model.digest))] if model else []
    return Html(facts(lines) + details("Configuration", _tree(config))) or note("No version was allocated.")


def how_to_read() -> Html:
    return facts(READING.items())


def _tree(tree: Mapping[str, Any]) -> Html:
    return facts((path, code(value)) for path, value in _flat(tree))


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Nested mappings as (`a.b.c`, value)."""
    lines = []
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            lines += _flat(value, f"{prefix}{key}.")
        else:
            lines.append((f"{prefix}{key}", value if isinstance(value, str) else json.dumps(to_plain(value), ensure_ascii=False)))
    return lines

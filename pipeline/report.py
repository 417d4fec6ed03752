"""Scores -> report.html (one file that asks the network for nothing) and summary.md (no record text).

The figures are markup; the rows travel as JSON that the page's own script draws, a page at a time.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from pipeline import report_sections as sections
from pipeline.records import Answer, Comparison, DataQuality, Evaluation, ModelFacts, Record, SystemScores, TrainingResult
from pipeline.report_markup import Html, attribute, bullets, count, h, join, note, number, p_text, points_text, system_name

NO_SCRIPT = "The rows are drawn by a script, and scripts are off. formatted_dataset.csv and outputs.jsonl hold the same rows."


@dataclass(frozen=True, slots=True)
class ReportData:
    """All that a report shows. `records` are the test rows; `validation`, `versions`, `lineage` and `config` are shown as they are."""

    project: str
    created: str  # ISO 8601
    evaluation: Evaluation
    records: Sequence[Record]
    answers: Sequence[Answer]
    quality: DataQuality
    training: TrainingResult | None
    model: ModelFacts | None
    approach: str  # "fine_tuning" or "model_set"
    approach_reason: str
    validation: Mapping[str, Any]
    versions: Mapping[str, str]
    lineage: Mapping[str, str]
    config: Mapping[str, Any]
    topic: str | None = None


def render_html(data: ReportData) -> str:
    """report.html. It holds record text. Its one script and one style are admitted by hash, and nothing else is."""
    page = files("pipeline").joinpath("report_page.html").read_text(encoding="utf-8")
    shown = [(key, title, body) for key, title, body in _sections(data) if body]
    about = (f"Topic: {data.topic}" if data.topic else "", *data.versions.values(), data.created)
    parts = {
        "style_hash": _source_hash(page, "style"),
        "script_hash": _source_hash(page, "script"),
        "title": attribute(data.project),
        "about": h(" · ".join(filter(None, about))),
        "verdict": h(data.evaluation.verdict or "Nothing was evaluated."),
        "notes": bullets(data.evaluation.notes),
        "nav": join(Html(f'<a href="#{key}">{h(title)}</a>') for key, title, _ in shown),
        "sections": join(Html(f'<section id="{key}"><h2>{h(title)}</h2>{body}</section>\n') for key, title, body in shown),
        "rows": _script_json(_row_data(data)),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], page)  # one pass: a "{{title}}" in a record stays text


def _sections(data: ReportData) -> tuple[tuple[str, str, Html], ...]:
    evaluation = data.evaluation
    return (
        ("accuracy", "Accuracy", sections.accuracy(evaluation)),
        ("comparisons", "Comparisons", sections.comparisons(evaluation)),
        ("gates", "Gates", sections.gates(evaluation)),
        ("ratings", "Each rating", sections.each_rating(evaluation)),
        ("confusion", "Confusion", sections.confusion(evaluation)),
        ("rationales", "Rationales", sections.rationales(evaluation)),
        ("calibration", "Calibration", sections.calibration(evaluation)),
        ("training", "Training", sections.training(data.training, data.model, data.approach, data.approach_reason, data.validation)),
        ("rows", "Test rows", _rows(data.records)),
        ("data", "Data", sections.data_quality(data.quality, evaluation.labels)),
        ("versions", "Versions", sections.lineage(data.versions, data.lineage, data.model, data.config)),
        ("reading", "How to read", sections.how_to_read()),
    )


def _rows(records: Sequence[Record]) -> Html:
    if not records:
        return note("There are no test rows.")
    return Html(f'<noscript>{note(NO_SCRIPT)}</noscript><div id="browser" hidden></div>')


# --- rows for the script ---------------------------------------------------------------------------------------------


def _row_data(data: ReportData) -> dict[str, Any]:
    """The rows as the page's script reads them: places in `labels` and `systems` instead of names, -1 for no label."""
    labels = list(
        dict.fromkeys([*data.evaluation.labels, *(r.label for r in data.records), *(a.label for a in data.answers if a.label is not None)])
    )
    place = {label: n for n, label in enumerate(labels)}
    answers = {(answer.record_id, answer.system): answer for answer in data.answers}
    known = [s.system for s in data.evaluation.systems] + sorted({answer.system for answer in data.answers})
    answering = {answer.system for answer in data.answers}
    systems = [system for system in dict.fromkeys(known) if system in answering]
    models = [s.system for s in data.evaluation.systems if s.kind == "model" and s.system in answering]
    shared = _shared_opening([record.prompt for record in data.records])
    rows = [
        [
            record.record_id,
            place[record.label],
            record.rationale,
            record.prompt[len(shared) :],
            [_answer(answers.get((record.record_id, system)), system in models, place, labels) for system in systems],
        ]
        for record in data.records
    ]
    return {
        "labels": labels,
        "systems": [[system, system_name(system)] for system in systems],
        "flips": [[a, b] for a in models for b in models if a != b],
        "errors": sections.ERRORS,
        "shared": shared.strip(),
        "rows": rows,
    }


def _answer(answer: Answer | None, asked: bool, place: Mapping[str, int], labels: Sequence[str]) -> list[Any] | None:
    """[label, rationale, error, probabilities in the order of `labels`, the raw response of an invalid answer, finish]. A model
    that left a row out gave an invalid answer; a person who did was not asked."""
    if answer is None:
        return [-1, None, "no_answer", None, None, ""] if asked else None
    given = answer.probabilities
    probabilities = None if given is None else [round(p, 4) if math.isfinite(p := given.get(label, 0.0)) else None for label in labels]
    label = -1 if answer.label is None else place[answer.label]
    return [label, answer.rationale, answer.error, probabilities, None if answer.error is None else answer.response, answer.finish]


def _shared_opening(prompts: Sequence[str]) -> str:
    """What all prompts begin with, up to a blank line: the instruction, shown once. Empty when a prompt would have nothing left."""
    if len(prompts) < 2:
        return ""
    low, high = min(prompts), max(prompts)
    common = next((n for n, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), min(len(low), len(high)))
    opening = low[: low.rfind("\n\n", 0, common) + 2] if "\n\n" in low[:common] else ""
    return opening if all(prompt[len(opening) :].strip() for prompt in prompts) else ""


def _script_json(value: object) -> Html:
    """JSON that no HTML parser can mistake for the end of its script element."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Html(re.sub("[<>&\u2028\u2029\ud800-\udfff]", lambda match: f"\\u{ord(match[0]):04x}", text))


def _source_hash(page: str, tag: str) -> Html:
    """The CSP source expression of the page's one inline script or style."""
    source = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return Html("'sha256-" + base64.b64encode(hashlib.sha256(source.encode("utf-8")).digest()).decode() + "'")


# --- summary.md ------------------------------------------------------------------------------------------------------


def render_summary(data: ReportData) -> str:
    """summary.md, for terminals and $GITHUB_STEP_SUMMARY: figures, counts and versions, no record text and no record id."""
    evaluation, quality = data.evaluation, data.quality
    parts = [f"# {_md(data.project)}: evaluation", f"**Verdict:** {_md(evaluation.verdict or 'Nothing was evaluated.')}"]
    parts += [_md_list(evaluation.notes)]
    head = ("System", "Accuracy [95 % interval]", "Macro F1", "Kappa", "Invalid", "Rows")
    parts += [_md_table(head, [_md_system(s) for s in evaluation.systems])]
    if evaluation.comparisons:
        compared = ("Pair", "Difference, points", "p, Holm", "Smallest detectable", "Rows", "Verdict")
        parts += ["## Comparisons", _md_table(compared, [_md_pair(pair) for pair in evaluation.comparisons])]
    if evaluation.gates:
        parts += [
            "## Gates",
            _md_table(
                ("Gate", "Outcome", "Why"), [(g.gate, f"{sections.MARKS[g.outcome]} {g.outcome}", g.words) for g in evaluation.gates]
            ),
        ]
    parts += ["## Data", _md_list([*_md_data(quality), *quality.notes])]
    splits = [
        (name, count(s.rows), count(s.groups), *(count(s.labels.get(label, 0)) for label in evaluation.labels))
        for name, s in quality.splits.items()
    ]
    parts += [_md_table(("Split", "Rows", "Groups", *evaluation.labels), splits)]
    made = [
        (
            "approach",
            f"{data.approach.replace('_', ' ')}: {data.approach_reason}" if data.approach_reason else data.approach.replace("_", " "),
        )
    ]
    made += [("base model", f"{data.model.name} {data.model.digest}")] if data.model else []
    parts += [
        "## Versions",
        "\n".join(f"- {_md(name)}: {_md(value)}" for name, value in [*data.versions.items(), *made, ("created", data.created)]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _md_system(s: SystemScores) -> tuple[str, ...]:
    return (
        system_name(s.system),
        number(s.accuracy, percent=True),
        number(s.macro_f1, percent=True),
        number(s.kappa),
        count(s.n_invalid),
        count(s.n),
    )


def _md_pair(pair: Comparison) -> tuple[str, ...]:
    names = f"{system_name(pair.a)} against {system_name(pair.b)}"
    return (
        names,
        number(pair.difference, points=True),
        p_text(pair.p_holm),
        points_text(pair.smallest_detectable),
        count(pair.n),
        pair.verdict,
    )


def _md_data(quality: DataQuality) -> list[str]:
    return [
        f"rows: {count(quality.rows_kept)} kept of {count(quality.rows_read)} read",
        *(f"dropped: {count(n)} × {reason}" for reason, n in quality.dropped_by_reason.items()),
        f"exact duplicates: {count(quality.exact_duplicates)}; groups with different ratings: {count(quality.label_conflicts)}",
        f"near duplicates: {count(quality.near_duplicate_rows)} rows in {count(quality.near_duplicate_clusters)} clusters",
        f"rationale contradicts rating: {count(len(quality.contradicting_rationales))}",
        f"without a rationale: {count(quality.without_rationale)}",
    ]


def _md(text: object) -> str:
    """Text that Markdown shows as it is: no markup, link, HTML, table cell end or change of writing direction. As few escapes
    as that takes, since a terminal shows them."""
    line = re.sub(
        "[\x00-\x08\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]",
        "",
        re.sub("[ \t\n\r\x0b\x0c\x85\u2028\u2029]+", " ", str(text)).strip(),
    )
    line = re.sub(r"&(?=#?\w+;)|<(?=[A-Za-z/!?])", lambda match: html.escape(match[0]), line)
    return re.sub(r"([\\`*|~$]|\](?=[(\[:])|(?<!\w)_|_(?!\w)|:(?=//)|(?<=www)\.)", r"\\\1", line)


def _md_list(items: Iterable[object]) -> str:
    """A list whose items can't begin a heading, a quotation or another list."""
    return "\n".join("- " + re.sub(r"^(\d*)([#+\-=>.)])", r"\1\\\2", _md(item)) for item in items)


def _md_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns also line up in a terminal; figures, from the second column on, stand right but for words."""
    if not rows:
        return ""
    cells = [[_md(cell) for cell in row] for row in (head, *rows)]
    widths = [max(3, *(len(row[n]) for row in cells)) for n in range(len(head))]
    right = [n > 0 and all(not row[n][:1].isalpha() and name not in ("Outcome", "Why") for row in rows) for n, name in enumerate(head)]
    lines = ["| " + " | ".join(c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 1) + (":" if r else "-") for w, r in zip(widths, right, strict=True)) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])

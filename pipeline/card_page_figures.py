"""The figures of a card's page: what was found, systems side by side, pairs, ratings, reasons, the training."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pipeline.markdown import Markdown, code, line, table, text

NONE = "–"
_GLUE = "\u00a0"  # a figure and its interval stay on one line
_MEASURES = {
    "rouge": "ROUGE-L", "chrf": "chrF", "string_similarity": "String similarity", "semantic_similarity": "Semantic similarity",
}  # fmt: skip
_NAMES = {"fine_tuned": "fine-tuned", "model_set": "model set", "majority": "majority (baseline)"}
_MODELS = ("base", "fine_tuned", "model_set", "majority")


def verdict(words: str | None) -> Markdown:
    """What the evaluation found, in one sentence: the first thing that a reader sees."""
    first, _, rest = re.sub(
        r"(?<=[.!?])\s+(?=[A-Z])", "\0", words or "How good it is, is unknown: it has not been evaluated.", count=1
    ).partition("\0")
    return Markdown(f"**{said(first)}**" + (f" {said(rest)}" if rest else ""))


def gates_not_passed(results: Sequence[Mapping[str, Any]]) -> Markdown:
    """What nobody may miss: each gate that failed or could not be decided."""
    lines = [
        f"**Gate {'failed' if g['outcome'] == 'failed' else 'undecided'}:** {said(re.sub('^(Failed|Inconclusive): ', '', str(g['words'])))}"
        for g in results
        if g["outcome"] != "passed"
    ]
    return Markdown("\n\n".join(lines))


def said(sentence: object) -> Markdown:
    """A sentence of the card, with the minus sign that the tables have."""
    return text(re.sub(r"(?<![\w.-])-(?=\d)", "−", str(sentence)))


# --- figures ---------------------------------------------------------------------------------------------------------


def systems(told: Mapping[str, Any]) -> Markdown:
    """Systems side by side, every figure with its 95 % interval."""
    rows = [
        (
            name_of(name, told), figure(s.get("accuracy"), 100), figure(s.get("balanced_accuracy"), 100), figure(s.get("macro_f1"), 100),
            figure(s.get("kappa")), s.get("n_invalid", NONE), s.get("n", NONE),
        )
        for name, s in told["systems"].items()
    ]  # fmt: skip
    head = ("System", "Accuracy, %", "Balanced accuracy, %", "Macro F1, %", "Cohen's kappa", "Unusable answers", "Rows")
    split = text(told.get("split") or "test")
    return Markdown(f"On the {split} rows; 95 % intervals in brackets. An unusable answer counts as wrong.\n\n{table(head, rows)}")


def comparisons(told: Mapping[str, Any]) -> Markdown:
    pairs = told.get("comparisons") or ()
    rows = [
        (
            f"{name_of(p['a'], told)} against {name_of(p['b'], told)}", figure(p.get("difference"), 100, signed=True), _p(p.get("p_holm")),
            _points(p.get("smallest_detectable")), p.get("n", NONE), line(p.get("verdict", NONE)).replace(" ", _GLUE),
        )
        for p in pairs
    ]  # fmt: skip
    if not rows:
        return Markdown()
    shown = table(
        ("Pair, on the same rows", "Difference in accuracy, points", "p, Holm", "Smallest detectable, points", "Rows", "Verdict"), rows
    )
    about = (
        "p: exact McNemar test, adjusted over all pairs after Holm. Smallest detectable: a difference below it would mostly go unseen on"
        " these rows."
    )
    return Markdown(f"### Compared\n\n{shown}\n\n{about}")


def ratings(told: Mapping[str, Any], own: str) -> Markdown:
    """Precision and recall of each rating, of the system that the page is about."""
    each = (told["systems"].get(own) or {}).get("per_rating") or {}
    rows = [
        (label, *(figure(r.get(part), 100) for part in ("precision", "recall", "f1")), r.get("support", NONE)) for label, r in each.items()
    ]
    shown = table(("Rating", "Precision, %", "Recall, %", "F1, %", "Rows"), rows)
    return Markdown(f"### Each rating, {name_of(own)}\n\n{shown}") if shown else Markdown()


def rationales(told: Mapping[str, Any]) -> Markdown:
    """How like the expert's each system's reasons are: a line a system, a column a measure."""
    each = {name: {r["metric"]: r for r in s.get("rationale") or ()} for name, s in told["systems"].items()}
    measures = list(dict.fromkeys(metric for scores in each.values() for metric in scores))
    rows = [(name_of(name, told), *(_likeness(scores.get(m)) for m in measures)) for name, scores in each.items() if scores]
    shown = table(("System", *(_MEASURES.get(m, m) for m in measures)), rows)
    about = "Likeness to the expert's reason; 1 would be the same. It is no proof that a reason is right."
    return Markdown(f"### Reasons\n\n{shown}\n\n{about}") if shown else Markdown()


def _likeness(score: Mapping[str, Any] | None) -> Markdown:
    if score is None:
        return Markdown(NONE)
    missing = score.get("n_unscored") or 0
    return Markdown(figure(score.get("estimate")) + (f", {rows_of(missing)} without a score" if missing else ""))


def gates(results: Sequence[Mapping[str, Any]]) -> Markdown:
    return table(("Gate", "Outcome", "Why"), [(code(g["gate"]), g["outcome"], said(g["words"])) for g in results])


def training(about: Mapping[str, Any]) -> Markdown:
    """How the training went, in about ten lines, and whether the file that is served is what was trained; the rest is in the card."""
    settings, checks = about.get("hyperparameters") or {}, about.get("validation") or {}
    if about["approach"]["method"] != "lora":
        rows = [("Solved examples in it", checks.get("examples")), ("Seed", settings.get("seed"))]
        return Markdown("\n\n".join(part for part in (_values(rows), _sentence(checks.get("how"))) if part))
    train, trained = settings.get("train") or {}, about.get("training") or {}
    epochs = trained.get("epochs") or []
    kept: Mapping[str, Any] = next((e for e in epochs if e.get("epoch") == trained.get("best_epoch")), {})
    stopped = f", ended after {len(epochs)}" if trained.get("stopped_early") else ""
    rows = [
        ("Epochs", f"{train['epochs']}{stopped}" if "epochs" in train else None),
        ("Epoch kept", trained.get("best_epoch")),
        ("Loss per answer token, training", _short(kept.get("train_loss"))),
        ("Loss per answer token, validation", _short(kept.get("valid_loss"))),
        ("Learning rate", _short(train.get("learning_rate"))),
        ("Rows per step", train.get("batch_size")),
        ("LoRA rank and alpha", f"{train['rank']} and {_short(train.get('alpha'))}" if "rank" in train else None),
        ("Weight of the rating in the loss", _short(train.get("rating_weight"))),
        ("Seed", settings.get("seed")),
        ("Time", _time(trained.get("seconds"))),
        ("Memory at most", f"{trained['peak_memory_bytes'] / 1e9:.1f} GB" if trained.get("peak_memory_bytes") else None),
        ("Type of numbers", trained.get("dtype")),
    ]
    return Markdown("\n\n".join(part for part in (_values(rows), _same_model(checks)) if part))


def _values(rows: Iterable[tuple[str, object]]) -> Markdown:
    return table(("What", "Value"), [(name, text(value)) for name, value in rows if value is not None])


def _same_model(checks: Mapping[str, Any]) -> Markdown:
    """Whether the file that is served rates as the trained model does, in plain words."""
    part, rows = checks.get("served") or checks.get("merged"), checks.get("rows")
    if not rows or not part or "same_rating" not in part:
        return Markdown()
    same, near = part["same_rating"], part.get("near_ties") or 0
    words = f"The file that is served was compared with the model as it was trained, on {rows_of(rows)}. "
    if same == rows:
        return text(f"{words}Both found the same rating likeliest on all of them.")
    words += f"Both found the same rating likeliest on {same} of them"
    if near:
        words += f"; on {near} the two likeliest ratings were so close that the rounding in the file can swap them"
    if other := rows - same - near:
        words += f"; on {other} they differed by more"
    return text(f"{words}.")


def _sentence(words: object) -> Markdown:
    shown = line(words or "")
    return text(shown[:1].upper() + shown[1:] + ("" if shown.endswith(".") else ".")) if shown else Markdown()


def _short(number: float | None) -> str | None:
    return None if number is None else f"{number:.4g}"


def _time(seconds: float | None) -> str | None:
    if seconds is None:
        return None
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# --- words -----------------------------------------------------------------------------------------------------------


def figure(estimate: Mapping[str, Any] | None, scale: int = 1, *, signed: bool = False) -> Markdown:
    """`72.3 [68.6, 75.8]` on one line; a dash where it is undefined."""
    if not estimate or estimate.get("value") is None:
        return Markdown(NONE)
    form = ("+z" if signed else "z") + (".1f" if scale == 100 else ".3f")
    low, high = estimate.get("low"), estimate.get("high")
    interval = f"{_GLUE}[{low * scale:{form}},{_GLUE}{high * scale:{form}}]" if low is not None and high is not None else ""
    return Markdown(f"{estimate['value'] * scale:{form}}{interval}".replace("-", "−"))


def _points(share: float | None) -> str:
    return NONE if share is None else f"{100 * share:.1f}"


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def name_of(system: str, told: Mapping[str, Any] | None = None) -> str:
    """A system's name for readers; `told` says which are people."""
    given = told is not None and (told["systems"].get(system) or {}).get("kind") == "given" and system != "copilot"
    return f"rater {system}" if given else _NAMES.get(system, system)


def name_outside(system: str) -> str:
    """A system's name where no table says what it is: what is no model of this product and no copilot is a person."""
    return "the copilot" if system == "copilot" else _NAMES.get(system, system) if system in _MODELS else f"rater {system}"


def moment(created: object) -> str:
    """`2026-11-26 14:54 UTC`, of the time as records have it."""
    return re.sub(r"T(\d\d:\d\d):\d\d(?:\.\d+)?(?:\+00:00|Z)$", rf" \1{_GLUE}UTC", str(created))


def rows_of(n: int) -> str:
    return f"{n} row" if n == 1 else f"{n} rows"

"""The figures of a card's page: what was found, systems side by side, pairs, ratings, reasons."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.markdown import Markdown, code, table, text

NONE = "–"
_NAMES = {"fine_tuned": "fine-tuned", "model_set": "model set", "majority": "majority (baseline)"}


def verdict(said: str | None) -> Markdown:
    """What the evaluation found, in one sentence: the first thing that a reader sees."""
    first, _, rest = re.sub(
        r"(?<=[.!?])\s+(?=[A-Z])", "\0", said or "How good it is, is unknown: it has not been evaluated.", count=1
    ).partition("\0")
    return Markdown(f"**{text(first)}**" + (f" {text(rest)}" if rest else ""))


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
            p.get("n", NONE), p.get("verdict", NONE),
        )
        for p in pairs
    ]  # fmt: skip
    if not rows:
        return Markdown()
    shown = table(("Pair, on the same rows", "Difference in accuracy, points", "p, Holm", "Rows", "Verdict"), rows)
    return Markdown(f"### Compared\n\n{shown}\n\np: exact McNemar test, adjusted over all pairs after Holm.")


def ratings(told: Mapping[str, Any], own: str) -> Markdown:
    """Precision and recall of each rating, of the system that the page is about."""
    each = (told["systems"].get(own) or {}).get("per_rating") or {}
    rows = [
        (label, *(figure(r.get(part), 100) for part in ("precision", "recall", "f1")), r.get("support", NONE)) for label, r in each.items()
    ]
    shown = table(("Rating", "Precision, %", "Recall, %", "F1, %", "Rows"), rows)
    return Markdown(f"### Each rating, {name_of(own)}\n\n{shown}") if shown else Markdown()


def rationales(told: Mapping[str, Any]) -> Markdown:
    rows = [
        (name_of(name, told), r["metric"], figure(r.get("estimate")), r.get("n_unscored", NONE))
        for name, s in told["systems"].items()
        for r in s.get("rationale") or ()
    ]
    shown = table(("System", "Likeness to the expert's reason", "Mean", "Rows without a score"), rows)
    return (
        Markdown(f"### Reasons\n\n{shown}\n\nLikeness to the expert's words is no proof that a reason is right.") if shown else Markdown()
    )


def gates(results: Sequence[Mapping[str, Any]]) -> Markdown:
    return table(("Gate", "Outcome", "Why"), [(code(g["gate"]), g["outcome"], g["words"]) for g in results])


def figure(estimate: Mapping[str, Any] | None, scale: int = 1, *, signed: bool = False) -> Markdown:
    """`72.3 [68.6, 75.8]`; a dash where it is undefined."""
    if not estimate or estimate.get("value") is None:
        return Markdown(NONE)
    form = ("+z" if signed else "z") + (".1f" if scale == 100 else ".3f")
    low, high = estimate.get("low"), estimate.get("high")
    interval = f" [{low * scale:{form}}, {high * scale:{form}}]" if low is not None and high is not None else ""
    return Markdown(f"{estimate['value'] * scale:{form}}{interval}".replace("-", "−"))


def _p(p: float | None) -> str:
    return NONE if p is None else "< 0.001" if p < 0.001 else f"{p:.3f}"


def name_of(system: str, told: Mapping[str, Any] | None = None) -> str:
    """A system's name for readers; `told` says which are people."""
    given = told is not None and (told["systems"].get(system) or {}).get("kind") == "given" and system != "copilot"
    return f"rater {system}" if given else _NAMES.get(system, system)

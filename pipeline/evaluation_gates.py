"""Gates: bounds on figures of an evaluation, read and checked before anything is computed, and decided from intervals."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config import EvaluateConfig
from pipeline.errors import GATE_FAILED, GATE_INCONCLUSIVE, ConfigError
from pipeline.evaluation_words import MAJORITY
from pipeline.records import Estimate, Evaluation, GateResult, RatingScale

_BOUND = re.compile(r"\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*(%?)\s*")
_ENDS = ("value", "ci_low", "ci_high")
Term = tuple[str, str]  # system, figure


@dataclass(frozen=True)
class Gate:
    """One bound on a figure (`b` None) or on a paired difference of figures."""

    expression: str
    a: Term
    b: Term | None
    end: str  # value, ci_low, ci_high
    sign: str
    bound: float

    def __str__(self) -> str:
        return f"{self.expression}: {self.end} {self.sign} {self.bound:g}"


def figure_names(scale: RatingScale, metrics: Iterable[str]) -> tuple[str, ...]:
    """The figures that gates can name, such as `accuracy` and `recall.Match`."""
    names = ["accuracy", "balanced_accuracy", "macro_f1", "kappa", *(["quadratic_kappa"] if scale.ordered else [])]
    names += ["decided_accuracy", "abstention_rate"] if scale.abstain_labels else []
    names += ["invalid_rate", "brier", "calibration_error", *metrics]
    return (*names, *(f"{name}.{label}" for name in ("precision", "recall", "f1") for label in scale.labels))


def check_gates(config: EvaluateConfig, *, systems: Iterable[str], scale: RatingScale) -> tuple[Gate, ...]:
    """The gates of `evaluate.gates`, read and checked against the systems there will be (the majority baseline joins by itself).

    Raises:
        ConfigError: every unknown system, figure and bound, with what there is; or a judge, which no release has yet.
    """
    systems = (*systems, MAJORITY)
    figures = figure_names(scale, config.metrics)
    gates, problems = [], []
    if config.judge is not None:
        problems.append(f"evaluate.judge: {config.judge!r}: rationales can't be judged by a model yet; leave it null")
    for expression, bounds in config.gates.items():
        terms = _terms(expression, systems, figures)
        if isinstance(terms, str):
            problems.append(f"evaluate.gates: {expression!r}: {terms}")
        for end, text in bounds.items():
            match = _BOUND.fullmatch(text)
            if end not in _ENDS or match is None:
                problems.append(
                    f"evaluate.gates: {expression!r}: {end}: {text!r} is not one of {', '.join(_ENDS)} with a bound such as '>= 0.6'"
                )
            elif not isinstance(terms, str):
                gates.append(Gate(expression, *terms, end, match[1], float(match[2]) / (100 if match[3] else 1)))
        if not bounds:
            problems.append(f"evaluate.gates: {expression!r}: no bound, for example {{value: '>= 0.6'}}")
    if problems:
        raise ConfigError("pipeline.yaml", problems)
    return tuple(gates)


def _terms(expression: str, systems: Sequence[str], figures: Sequence[str]) -> tuple[Term, Term | None] | str:
    """The one or two terms of an expression, or what is wrong with it. Names may hold dots and dashes, so they are looked up whole."""
    known = {f"{system}.{figure}": (system, figure) for system in systems for figure in figures}
    expression = expression.strip()
    if expression in known:
        return known[expression], None
    sides: list[str] = [expression]
    for dash in re.finditer(r"\s+-\s+", expression):
        sides = [expression[: dash.start()], expression[dash.end() :]]
        if all(side in known for side in sides):
            return known[sides[0]], known[sides[1]]
    return "; ".join(_unknown(side, systems, figures) for side in sides if side not in known)


def _unknown(term: str, systems: Sequence[str], figures: Sequence[str]) -> str:
    system = next((system for system in systems if term.startswith(f"{system}.")), None)
    if system is None:
        return f"{term!r} starts with no known system; there are {', '.join(systems)}, as in {systems[0]}.accuracy"
    figure = term.removeprefix(f"{system}.")
    near = difflib.get_close_matches(figure, figures, n=1)
    return f"no figure {figure!r}; " + (f"did you mean {near[0]}? " if near else "") + f"there are {', '.join(figures)}"


def gate_outcome(gate: Gate, found: Estimate) -> Literal["passed", "failed", "inconclusive"]:
    """`ci_low` and `ci_high` compare that end of the 95 % interval. `value` asks about the true figure: passed or failed when the whole
    interval is on one side of the bound, inconclusive when the bound lies inside it. Undefined figures are inconclusive."""
    if found.value is None or found.low is None or found.high is None:
        return "inconclusive"
    ends = {"ci_low": [found.low], "ci_high": [found.high], "value": [found.low, found.value, found.high]}[gate.end]
    met = {_meets(end, gate.sign, gate.bound) for end in ends}
    return "inconclusive" if len(met) == 2 else "passed" if True in met else "failed"


def _meets(number: float, sign: str, bound: float) -> bool:
    return {">=": number >= bound, "<=": number <= bound, ">": number > bound, "<": number < bound}[sign]


def _figure(found: Estimate) -> str:
    if found.value is None:
        return "undefined"
    if found.low is None or found.high is None:
        return f"{found.value:.4f} without an interval"
    return f"{found.value:.4f} (95 % interval {found.low:.4f} to {found.high:.4f})"


def gate_result(gate: Gate, found: Estimate) -> GateResult:
    """The gate decided on what was found, in words."""
    outcome = gate_outcome(gate, found)
    words = f"{outcome.capitalize()}: {gate.expression} is {_figure(found)}; asked: {gate.end} {gate.sign} {gate.bound:g}."
    return GateResult(str(gate), outcome, words)


def gate_exit_code(evaluation: Evaluation) -> int:
    """100 when a gate failed, else 101 when one is inconclusive, else 0."""
    outcomes = {gate.outcome for gate in evaluation.gates}
    return GATE_FAILED if "failed" in outcomes else GATE_INCONCLUSIVE if "inconclusive" in outcomes else 0

"""What an evaluation says in plain words: comparisons, the verdict, percentages with one decimal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.records import Comparison, Estimate, SystemScores

MAJORITY = "majority"
_NAMES = {
    "base": "the base model",
    "fine_tuned": "the fine-tuned model",
    "model_set": "the model set",
    "copilot": "the copilot",
    MAJORITY: "the majority baseline",
}


def comparison_words(pair: Comparison, kinds: Mapping[str, str], right_a: int, right_b: int) -> str:
    """One or two sentences. `kinds`: system -> its kind; `right_a`, `right_b`: rows of the pair that each got right."""
    a, b = name(pair.a, kinds[pair.a]), name(pair.b, kinds[pair.b])
    if not pair.n:
        return f"{capital(a)} and {b} have no rows in common, so they can't be compared."
    decided = pair.verdict != "not decided"
    claim = f"{a} is {pair.verdict} than {b}" if decided else f"not decided between {a} and {b}"
    p = "p < 0.001" if pair.p_holm < 0.001 else f"p = {pair.p_holm:.3f}"
    words = (
        f"{capital(claim)}: {percent(right_a / pair.n)} against {percent(right_b / pair.n)} right on the same {count(pair.n, 'row')}, "
        f"{points(pair.difference)}; {p} after correction for all pairs."
    )
    return words if decided else f"{words} {_sensitivity(pair)}"


def verdict_words(primary: str, systems: Sequence[SystemScores], comparisons: Sequence[Comparison], split: str) -> str:
    """What is known of the primary system: against the base, the majority baseline, the copilot and the raters."""
    scores = {system.system: system for system in systems}
    mine = scores[primary]
    if not mine.n:
        return f"There are no {split} rows, so nothing can be said of {name(primary, mine.kind)}."
    against = {pair.b: pair for pair in comparisons if pair.a == primary}
    sentences = [_against_base(mine, scores.get("base"), against.get("base"), split)]
    if mine.n_invalid:
        sentences.append(f"{mine.n_invalid} of its {count(mine.n, 'answer')} had no usable rating and count as wrong.")
    if MAJORITY in against:
        sentences.append(_against_majority(against[MAJORITY], scores[MAJORITY]))
    given = [against[system.system] for system in systems if system.kind == "given" and system.system in against]
    return " ".join(sentences + [_against_given(pair) for pair in given if pair.n])


def _against_base(mine: SystemScores, base: SystemScores | None, pair: Comparison | None, split: str) -> str:
    who, share = name(mine.system, mine.kind), percent(mine.accuracy.value)
    right = f"{who} is right on {share} of the {count(mine.n, f'{split} row')}"
    if base is None or pair is None:
        return f"{capital(right)} (95 % interval {percent(mine.accuracy.low)} to {percent(mine.accuracy.high)})."
    what = "Fine-tuning" if mine.system == "fine_tuned" else capital(who)
    claims = {"better": "helped", "worse": "did not help here; it made the answers worse", "not decided": "is not shown to help here"}
    words = f"{what} {claims[pair.verdict]}: {right}, the base model on {percent(base.accuracy.value)} ({points(pair.difference)})."
    return words if pair.verdict != "not decided" else f"{words} {_sensitivity(pair)}"


def _against_majority(pair: Comparison, baseline: SystemScores) -> str:
    claim = {"better": "It is better", "worse": "It is worse", "not decided": "It is not shown to be better"}[pair.verdict]
    return f"{claim} than always giving the most frequent rating ({percent(baseline.accuracy.value)}; {points(pair.difference)})."


def _against_given(pair: Comparison) -> str:
    who = name(pair.b, "given")
    claims = {"better": f"It is better than {who}", "worse": f"It is worse than {who}", "not decided": f"It can't be told apart from {who}"}
    return f"{claims[pair.verdict]} on the {count(pair.n, 'row')} that both rated ({points(pair.difference)})."


def _sensitivity(pair: Comparison) -> str:
    if pair.smallest_detectable is None:
        discordant = pair.only_a_right + pair.only_b_right
        if not discordant:
            return "No row told the two apart, so no difference can show."
        return f"Only {count(discordant, 'row')} told the two apart, too few to show any difference."
    return f"A difference below about {100 * pair.smallest_detectable:.1f} points would mostly go unseen on these rows."


def percent(share: float | None) -> str:
    """0.7123 as `71.2 %`."""
    return "undefined" if share is None else f"{100 * share:.1f} %"


def points(difference: Estimate) -> str:
    """`+11.7 points, 95 % interval −6.1 to +17.2`, with the minus sign that tables have."""
    if difference.value is None:
        return "difference undefined"
    if difference.low is None or difference.high is None:
        return f"{_signed(difference.value)} points, too few rows or groups for an interval"
    value, low, high = map(_signed, (difference.value, difference.low, difference.high))
    return f"{value} points, 95 % interval {low} to {high}"


def _signed(share: float) -> str:
    return f"{round(100 * share, 1) + 0.0:+.1f}".replace("-", "−")


def count(number: int, thing: str) -> str:
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def name(system: str, kind: str) -> str:
    """A system as people call it."""
    return _NAMES.get(system) or (f"rater {system}" if kind == "given" else f"the system {system}")


def capital(text: str) -> str:
    return text[:1].upper() + text[1:]

"""Which rated rows stand as solved examples in a model set, how many, and in which order.

Chosen from train: balanced over the ratings, unlike one another, short, with a rationale. Number and order are tried on valid rows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

import numpy as np
from pydantic import FiniteFloat

from pipeline import prompts
from pipeline.ports import Embedder, Engine, Progress
from pipeline.records import Message, Prompt, RatingScale, Record, digest_text

DEFAULT_PER_RATING = 2  # examples a rating where nothing can be tried
LONGEST_TRIED = 100  # rows looked at for the longest one within the token limit
VALID_ROWS, VALID_TOKENS = 30, 6000  # a trial reads at most so many rows, and about so many tokens of theirs
LEAST_PROBABILITY = 1e-6  # so that one sure mistake does not decide a mean of logarithms
BYTES_PER_TOKEN, TOKENS_PER_MESSAGE = 3, 8  # a careful guess where no tokenizer is at hand
POOL_ROWS = 100  # rows of one rating that diversity is judged over

Similarity = np.ndarray[Any, np.dtype[np.float64]]
Measure = Callable[[Sequence[Message]], int]


@dataclass(frozen=True, slots=True)
class SolvedExample:
    """One solved turn: what the user asked and what the expert answered, as the model reads it."""

    record_id: str
    label: str
    user: str
    assistant: str


@dataclass(frozen=True, slots=True)
class Arrangement:
    """What stands before a record: the system text or not, how many examples of each rating, which rating's comes last."""

    system: bool
    per_rating: int
    last: str


@dataclass(frozen=True, slots=True)
class Trial:
    """An arrangement on valid rows; figures are None where it did not fit."""

    arrangement: Arrangement
    examples: int
    rows: int
    accuracy: FiniteFloat | None
    mean_log_probability: FiniteFloat | None  # of the expert's rating, natural logarithm


# --- which rows -------------------------------------------------------------------------------------------------------


def choose_examples(
    rows: Sequence[Record], scale: RatingScale, per_rating: int, *, seed: int, strip: str = "", embed: Embedder | None = None
) -> dict[str, list[Record]]:
    """Up to `per_rating` rows of each label, the most typical first, then each as far as can be from those before (farthest-point
    selection, Gonzalez 1985). Short rows with a rationale are preferred; no two rows share a group."""
    chosen: dict[str, list[Record]] = {label: [] for label in scale.labels}
    if per_rating == 0:
        return chosen
    pools = {label: _pool(rows, label, per_rating, seed) for label in scale.labels}
    near = {label: _nearness([r.prompt.removeprefix(strip) for r in pool], embed) for label, pool in pools.items()}
    groups: set[str] = set()
    for _ in range(per_rating):
        for label, pool in pools.items():
            taken = [i for i, record in enumerate(pool) if record in chosen[label]]
            free = [i for i, record in enumerate(pool) if _group(record) not in groups]
            if free:
                best = _farthest(near[label], taken, free)
                chosen[label].append(pool[best])
                groups.add(_group(pool[best]))
    return chosen


def _pool(rows: Sequence[Record], label: str, wanted: int, seed: int) -> list[Record]:
    """Rows of a label to choose from, at most POOL_ROWS: the better kinds first, others only where those don't suffice."""
    labels_of: dict[str, set[str]] = {}
    for record in rows:
        labels_of.setdefault(record.prompt, set()).add(record.label)
    middle = median(_length(record) for record in rows)
    kinds: tuple[Callable[[Record], bool], ...] = (
        lambda r: bool(r.rationale) and _length(r) <= middle,
        lambda r: bool(r.rationale),
        lambda _: True,
    )
    fair = sorted(
        (record for record in rows if record.label == label and len(labels_of[record.prompt]) == 1),
        key=lambda record: digest_text(f"{seed} {record.record_id}"),
    )
    for kind in kinds:
        pool = list({record.prompt: record for record in fair if kind(record)}.values())
        if len({_group(record) for record in pool}) >= 2 * wanted:  # twice: other labels may take some groups
            break
    return pool[:POOL_ROWS]


def _length(record: Record) -> int:
    return len(record.prompt) + len(record.rationale)


def _group(record: Record) -> str:
    return record.group or record.record_id


def _nearness(texts: Sequence[str], embed: Embedder | None) -> Similarity:
    """(texts, texts) similarity: cosine of embeddings, else the shared part of the two word sets (Jaccard)."""
    if embed is not None and texts:
        vectors = np.asarray(embed(texts), dtype=np.float64)
        return np.asarray(vectors @ vectors.T)
    words = [frozenset(re.findall(r"\w+", text.casefold())) for text in texts]
    return np.array([[len(a & b) / max(len(a | b), 1) for b in words] for a in words], dtype=np.float64)


def _farthest(near: Similarity, taken: Sequence[int], free: Sequence[int]) -> int:
    """The free row least like its nearest taken one; without any taken, the one most like all. Ties go to the first."""
    if not taken:
        return max(free, key=lambda i: round(float(near[i].mean()), 9))
    return min(free, key=lambda i: round(float(near[i, list(taken)].max()), 9))


# --- how many, in which order ----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Desk:
    """What arrangements are made from."""

    scale: RatingScale
    system: str | None
    chosen: Mapping[str, Sequence[Record]]
    measure: Measure
    longest: Record | None  # that fits without anything before it
    limit: int  # tokens

    @property
    def most(self) -> int:
        return max(len(rows) for rows in self.chosen.values())

    def numbers(self) -> list[int]:
        return [n for n in dict.fromkeys((1, DEFAULT_PER_RATING, self.most)) if n <= self.most]

    def arrangement(self, per_rating: int, last: str | None = None, *, system: bool = True) -> Arrangement:
        return Arrangement(system and self.system is not None, per_rating, last or self.scale.labels[-1])

    def examples(self, arrangement: Arrangement) -> tuple[SolvedExample, ...]:
        """Round by round, one of each rating; the scale's order, turned so that `last` ends it."""
        labels = self.scale.labels
        turn = labels.index(arrangement.last) + 1
        rows = [
            self.chosen[label][n]
            for n in range(arrangement.per_rating)
            for label in (*labels[turn:], *labels[:turn])
            if n < len(self.chosen[label])
        ]
        return tuple(
            SolvedExample(row.record_id, row.label, user.content, answer.content)
            for row, (user, answer) in zip(rows, prompts.answer_examples(rows), strict=True)
        )

    def prefix(self, arrangement: Arrangement) -> tuple[Message, ...]:
        return turns(self.system if arrangement.system else None, self.examples(arrangement))

    def fits(self, arrangement: Arrangement) -> bool:
        """Whether the longest row still fits behind it: examples give way to text, never the other way round."""
        if self.longest is None:
            return not arrangement.per_rating
        return self.measure((*self.prefix(arrangement), *prompts.messages_for(self.longest))) <= self.limit


def turns(system: str | None, examples: Sequence[SolvedExample]) -> tuple[Message, ...]:
    """The chat that stands before every record."""
    solved = tuple(turn for e in examples for turn in (Message("user", e.user), Message("assistant", e.assistant)))
    return (*([Message("system", system)] if system else []), *solved)


def try_arrangements(desk: Desk, engine: Engine, sample: Sequence[Record], progress: Progress) -> tuple[Trial, ...]:
    """First the numbers, each in the scale's order; then the best number with the other ratings last."""
    plain = [desk.arrangement(0, system=False)]
    numbers = list(dict.fromkeys([*plain, desk.arrangement(0), *map(desk.arrangement, desk.numbers())]))
    total, trials = len(numbers) + 2, []
    for arrangement in numbers:
        trials.append(_trial(desk, engine, sample, arrangement))
        progress("model_set", len(trials), total, "number of examples")
    best = _winner(trials).arrangement
    if best.per_rating:
        for last in desk.scale.labels[:2]:  # the scale's order ends in its last label, which was tried
            if last != desk.scale.labels[-1]:
                trials.append(_trial(desk, engine, sample, desk.arrangement(best.per_rating, last)))
                progress("model_set", len(trials), total, "order of examples")
    progress("model_set", total, total)
    return tuple(trials)


def _trial(desk: Desk, engine: Engine, sample: Sequence[Record], arrangement: Arrangement) -> Trial:
    prefix, count = desk.prefix(arrangement), len(desk.examples(arrangement))
    if not desk.fits(arrangement):
        return Trial(arrangement, count, 0, None, None)
    asked = [Prompt(record.record_id, (*prefix, *prompts.messages_for(record))) for record in sample]
    said = engine.rating_probabilities(asked, desk.scale)
    right = [max(desk.scale.labels, key=lambda label: given.get(label, 0.0)) == r.label for r, given in zip(sample, said, strict=True)]
    logs = [math.log(max(given.get(r.label, 0.0), LEAST_PROBABILITY)) for r, given in zip(sample, said, strict=True)]
    return Trial(arrangement, count, len(sample), round(fmean(right), 6), round(fmean(logs), 6))


def _winner(trials: Sequence[Trial]) -> Trial:
    """Highest accuracy, then highest mean log-probability; of equals the first, which is the shorter one."""
    return max(trials, key=lambda t: (-1.0, 0.0) if t.accuracy is None else (t.accuracy, t.mean_log_probability or 0.0))


def best_arrangement(desk: Desk, trials: Sequence[Trial], *, has_engine: bool, max_examples: int) -> tuple[Arrangement, str]:
    """The arrangement to use, and in words how it was chosen."""
    notes = _notes(desk, max_examples)
    if trials:
        won = _winner(trials)
        tried = sum(trial.accuracy is not None for trial in trials)
        words = f"{_words(won.arrangement, won.examples)}: the best of {tried} arrangements on {won.rows} valid rows"
        words += f" (accuracy {won.accuracy:.3f}; the bare prompt {trials[0].accuracy:.3f}; so few rows tell large differences only)"
        unfit = len(trials) - tried
        return won.arrangement, "; ".join([words, *([f"{unfit} did not fit the prompt's token limit"] if unfit else []), *notes])
    sizes = [n for n in desk.numbers() if n <= DEFAULT_PER_RATING]
    fitting = [n for n in sizes if desk.fits(desk.arrangement(n))]
    best = desk.arrangement(max(fitting, default=0))
    why = "no valid rows were at hand to try others" if has_engine else "no engine was at hand to try others"
    words = f"{_words(best, len(desk.examples(best)))}: the default number and order, since {why}"
    return best, "; ".join([words, *(["more did not fit the prompt's token limit"] if len(fitting) < len(sizes) else []), *notes])


def _words(arrangement: Arrangement, examples: int) -> str:
    system = "a system text" if arrangement.system else "no system text"
    if not examples:
        return f"{system} and no examples"
    return f"{system} and {examples} examples, at most {arrangement.per_rating} a rating, {arrangement.last!r} last"


def _notes(desk: Desk, max_examples: int) -> Iterator[str]:
    if 0 < max_examples < len(desk.scale.labels):
        yield f"model_set.max_examples is {max_examples}, too few for one of each of {len(desk.scale.labels)} ratings"
    elif max_examples:
        for label, rows in desk.chosen.items():
            if len(rows) < desk.most or not rows:
                yield f"train has only {len(rows)} usable examples of {label!r}"


def sample_rows(valid: Sequence[Record], seed: int, desk: Desk) -> list[Record]:
    """Some valid rows that fit, drawn by hash; bounded by rows and by their own tokens."""
    drawn: list[Record] = []
    tokens = 0
    for record in sorted(valid, key=lambda record: digest_text(f"{seed} {record.record_id}")):
        cost = desk.measure(prompts.messages_for(record))
        if record.label in desk.scale.labels and cost <= desk.limit:
            tokens += cost
            if len(drawn) == VALID_ROWS or (drawn and tokens > VALID_TOKENS):
                break
            drawn.append(record)
    return drawn


def longest_fitting(records: Sequence[Record], measure: Measure, limit: int) -> Record | None:
    """The longest row within the limit (longer ones are refused anyway), among some of the longest and the shortest."""
    by_length = sorted(records, key=lambda record: len(record.prompt), reverse=True)
    return next((r for r in (*by_length[:LONGEST_TRIED], by_length[-1]) if measure(prompts.messages_for(r)) <= limit), None)


def token_counter(engine: Engine | None) -> Measure:
    if engine is not None:
        return lambda messages: len(engine.token_ids(messages))
    return lambda messages: sum(len(m.content.encode()) // BYTES_PER_TOKEN + TOKENS_PER_MESSAGE for m in messages)

"""The values that travel between stages, and their keys. No paths on this machine, no clock, nothing third-party.

A *key* is the fingerprint of what was asked for; a *digest* is the hash of what came out. Both read `sha256:<hex>`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any, Literal

Value = int | str
Split = Literal["train", "valid", "test"]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")
INVALID = "(invalid)"  # the column of a confusion matrix for answers without a usable rating


# --- ratings ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Rating:
    """One step of the scale: `value` is stored, `label` is the text that the model reads and writes."""

    value: Value
    label: str
    aliases: tuple[str, ...] = ()
    abstain: bool = False  # "can't tell": an answer of its own, left out of the decided-only view


@dataclass(frozen=True, slots=True)
class RatingScale:
    """The ratings in their order (lowest first when `ordered`)."""

    ratings: tuple[Rating, ...]
    ordered: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(rating.label for rating in self.ratings)

    @property
    def abstain_labels(self) -> frozenset[str]:
        return frozenset(rating.label for rating in self.ratings if rating.abstain)

    def by_label(self, label: str) -> Rating:
        return next(rating for rating in self.ratings if rating.label == label)


# --- rows ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Opinion:
    """What a copilot or a further rater said of a record; `label` None when they gave no rating."""

    label: str | None
    rationale: str | None


@dataclass(frozen=True, slots=True)
class Record:
    """One row of formatted_dataset.csv. `prompt` is the user message, complete."""

    record_id: str
    group: str
    split: Split
    prompt: str
    label: str
    rationale: str
    opinions: Mapping[str, Opinion] = field(default_factory=dict)  # system name -> opinion: "copilot", rater names
    meta: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class DroppedRow:
    row: int  # 1 is the first row after the header
    reason: str  # a short fixed phrase: rows are counted by it


@dataclass(frozen=True, slots=True)
class SplitQuality:
    rows: int
    groups: int
    labels: Mapping[str, int]


@dataclass(frozen=True, slots=True)
class DataQuality:
    """What the formatter found; counts only, no record text. Lands in the dataset card and the report."""

    rows_read: int
    rows_kept: int
    dropped: tuple[DroppedRow, ...]
    splits: Mapping[str, SplitQuality]
    prompt_words: Mapping[str, float]  # min, median, p95, max (whitespace-separated)
    rationale_words: Mapping[str, float]
    prompt_tokens: Mapping[str, float]  # the same in tokens of the base model; empty until a tokenizer has seen them
    without_rationale: int
    exact_duplicates: int
    near_duplicate_clusters: int
    near_duplicate_rows: int
    label_conflicts: int  # clusters of exact duplicates whose ratings differ
    contradicting_rationales: tuple[str, ...]  # record_ids whose rationale names another rating than the row's
    opinions: Mapping[str, int]  # system -> rows that have one
    notes: tuple[str, ...] = ()  # sentences worth a reader's attention, no record text

    @property
    def dropped_by_reason(self) -> dict[str, int]:
        counts: dict[str, int] = {}
        for dropped in self.dropped:
            counts[dropped.reason] = counts.get(dropped.reason, 0) + 1
        return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


# --- prompts and answers ---------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Message:
    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a system is asked about one record."""

    record_id: str
    messages: tuple[Message, ...]


Finish = Literal["stop", "length", "too_long", "failed"]


@dataclass(frozen=True, slots=True)
class Completion:
    """What an engine gave for one prompt. `too_long`: the prompt did not fit and was not sent; `failed`: see `error`."""

    record_id: str
    text: str
    finish: Finish
    error: str | None
    prompt_tokens: int
    output_tokens: int
    seconds: float
    probabilities: Mapping[str, float] | None  # label -> probability, renormalised over the labels; None when unknown


AnswerError = Literal["invalid_json", "unknown_label", "cut", "too_long", "failed", "no_answer"]


@dataclass(frozen=True, slots=True)
class Answer:
    """One line of outputs.jsonl: what one system said of one record."""

    record_id: str
    system: str
    prompt_digest: str
    response: str
    label: str | None  # None together with `error`
    rationale: str | None
    error: AnswerError | None
    finish: str  # "stop", "length" (rating there, rationale cut), "given" (a table column), …
    probabilities: Mapping[str, float] | None
    prompt_tokens: int
    output_tokens: int
    seconds: float
    engine: str  # "embedded", "ollama", "given"
    model_digest: str | None


@dataclass(frozen=True, slots=True)
class TokenRow:
    """A training row in token ids. `answer` ends with the end-of-turn token.

    `rating_tokens` are the places in `answer` where the ratings part; `branches` the ids allowed at each.
    """

    record_id: str
    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    rating_tokens: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @property
    def size(self) -> int:
        return len(self.prompt) + len(self.answer)


# --- models ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What is known of a base model without loading its weights."""

    name: str  # as the user wrote it
    digest: str
    architecture: str
    parameters: int  # number of weights
    quantisation: str  # file type, "Q4_1"
    context_length: int  # tokens
    size_bytes: int
    license: str | None  # an SPDX-like id as the file says it, else None
    hub_id: str | None  # "OWNER/REPO" when known
    chat_template: str | None  # Jinja


@dataclass(frozen=True, slots=True)
class EpochFigures:
    epoch: int
    train_loss: float  # mean over answer tokens, the rating's weighted as train.rating_weight says; valid_loss too
    valid_loss: float | None
    seconds: float
    tokens: int  # row tokens: every row counted whole
    valid_accuracy: float | None = None  # share of valid rows whose rating a greedy answer gets right


@dataclass(frozen=True, slots=True)
class TrainingResult:
    """What training gives besides its files."""

    best_epoch: int
    epochs: tuple[EpochFigures, ...]
    steps: int
    trained_rows: int
    refused_rows: Mapping[str, int]  # reason -> count
    answer_tokens: int
    row_tokens: int
    seconds: float
    peak_memory_bytes: int
    dtype: str
    threads: int
    stopped_early: bool = False
    shared_prefix_tokens: int = 0  # first prompt tokens that all rows have in common


# --- scores ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure with its interval; None where it is undefined (never NaN)."""

    value: float | None
    low: float | None = None
    high: float | None = None
    method: str = ""  # "wilson", "bootstrap", …
    n: int = 0


@dataclass(frozen=True, slots=True)
class RatingScores:
    precision: Estimate
    recall: Estimate
    f1: Estimate
    support: int


@dataclass(frozen=True, slots=True)
class RationaleScore:
    """Mean of one rationale metric over the rows that could be scored."""

    metric: str
    estimate: Estimate
    n_unscored: int


@dataclass(frozen=True, slots=True)
class SystemScores:
    """One system on its rows. `n` counts invalid answers too: they are wrong, never dropped."""

    system: str
    kind: Literal["model", "given", "baseline"]
    n: int
    n_invalid: int
    errors: Mapping[str, int]
    accuracy: Estimate
    balanced_accuracy: Estimate
    macro_f1: Estimate
    kappa: Estimate
    quadratic_kappa: Estimate | None  # None unless ratings are ordered
    decided_accuracy: Estimate | None  # rows whose expert rating is not an abstention; None without such ratings
    abstention_rate: float | None
    per_rating: Mapping[str, RatingScores]
    confusion: tuple[tuple[int, ...], ...]  # rows: expert label in scale order; columns: labels then INVALID
    rationale: tuple[RationaleScore, ...]
    brier: Estimate | None
    calibration_error: Estimate | None
    mean_seconds: float | None
    mean_output_tokens: float | None


Verdict = Literal["better", "worse", "not decided"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """System `a` against system `b` on the rows that both answered (an invalid answer is an answer)."""

    a: str
    b: str
    n: int
    difference: Estimate  # accuracy of a minus accuracy of b, paired
    only_a_right: int
    only_b_right: int
    p_value: float  # exact McNemar
    p_holm: float  # adjusted over all pairs
    smallest_detectable: float | None  # accuracy difference seen with 80 % power at these discordant rows
    verdict: Verdict
    words: str


@dataclass(frozen=True, slots=True)
class GateResult:
    gate: str
    outcome: Literal["passed", "failed", "inconclusive"]
    words: str


@dataclass(frozen=True, slots=True)
class Evaluation:
    """scores.json."""

    split: str
    labels: tuple[str, ...]
    ordered: bool
    primary: str  # the system that the verdict is about
    systems: tuple[SystemScores, ...]
    comparisons: tuple[Comparison, ...]
    gates: tuple[GateResult, ...]
    verdict: str  # a sentence or two in plain words
    notes: tuple[str, ...] = ()

    def system(self, name: str) -> SystemScores | None:
        return next((scores for scores in self.systems if scores.system == name), None)

    def comparison(self, a: str, b: str) -> Comparison | None:
        return next((pair for pair in self.comparisons if (pair.a, pair.b) == (a, b)), None)


# --- keys ------------------------------------------------------------------------------------------------------------


def to_plain(value: Any) -> Any:
    """The value as JSON types: dataclasses as objects, tuples as arrays, sets sorted.

    Raises:
        TypeError: a type without a canonical form (a path, say).
        ValueError: NaN or an infinity, which JSON can't carry.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Enum):
        return to_plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, frozenset | set):
        return sorted(to_plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray):
        return [to_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} has no canonical form")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"{type(value).__name__} has no canonical form")


def canonical(value: Any) -> str:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8 as is."""
    return json.dumps(to_plain(value), ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def fingerprint(*parts: Any) -> str:
    """`sha256:<hex>` of the canonical form of the parts, in order."""
    return digest_text(canonical(parts))


def digest_text(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode("utf-8")).hexdigest()

"""A rated table -> records to train on -> rows of token ids. Everything that can be wrong with them is named here."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline.config import PromptConfig, fold, rating_problems
from pipeline.errors import DataError, FineTuningNotSupportedError
from pipeline.ports import Engine
from pipeline.prompts import ANSWER_OPENING, ANSWER_RULE, RATIONALE_OPENING, answer_text, messages_for, user_text
from pipeline.rating_tree import RatingTree, rating_tree
from pipeline.records import Message, Rating, RatingScale, Record, Split, TokenRow, Value, digest_text

if TYPE_CHECKING:
    import pandas as pd

COLUMNS = {
    "prompt": ("prompt", "formatted_prompt"),
    "rating": ("rating", "standardized_rating", "Expert Rating"),
    "rationale": ("rationale", "Rationale of Rating"),
}
VALID_SHARE = 0.15  # of the rows, where the table has no split column
SHOWN_ROWS = 5


def scale_from_mapping(mapping: Mapping[Any, Any], *, ordered: bool = True) -> RatingScale:
    """The rating scale that label -> rating says, or rating -> label where that is unambiguous (numbers on the left only).

    Several labels of one rating: the first is its text, the others are aliases.

    Raises:
        DataError: empty, of another type, or two ratings for one text.
    """
    pairs = [(_plain(key), _plain(value)) for key, value in mapping.items()]
    if pairs and all(_is_value(key) and not isinstance(key, str) and isinstance(label, str) for key, label in pairs):
        pairs = [(label, key) for key, label in pairs]
        twice = [label for label, count in Counter(fold(label) for label, _ in pairs).items() if count > 1]
        if twice:
            raise DataError("rating_mapping", [f"{label!r} stands for several ratings" for label in twice])
    wrong = [
        f"{label!r}: {value!r} is not a label with a whole number or a short text"
        for label, value in pairs
        if not isinstance(label, str) or not _is_value(value)
    ]
    if wrong or not pairs:
        raise DataError("rating_mapping", wrong or ["is empty"], hint='for example {"Match": 1, "Does Not Match": 0}')
    labels: dict[Value, list[str]] = {}
    for label, value in pairs:
        labels.setdefault(value, []).append(label)
    ratings = tuple(Rating(value, names[0], tuple(names[1:])) for value, names in labels.items())
    problems = [problem.removeprefix("dataset.ratings: ") for problem in rating_problems(ratings)]
    if problems:
        raise DataError("rating_mapping", problems)
    return RatingScale(ratings, ordered)


def _plain(value: Any) -> Any:
    """Numbers of a table as Python's; whole ones as int (a column with a gap holds 1 as 1.0)."""
    value = value.item() if hasattr(value, "item") else value
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_value(value: object) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def records_from_frame(frame: pd.DataFrame, scale: RatingScale, prompt: PromptConfig, *, seed: int) -> tuple[Record, ...]:
    """The rows of a table as records with a split. Prompts without the answer rule gain the instruction.

    Raises:
        DataError: missing columns, empty prompts, unknown or missing ratings, unknown splits, all at once with row numbers.
    """
    names = {role: next((name for name in known if name in frame.columns), None) for role, known in COLUMNS.items()}
    missing = [
        f"no column for the {role}: one of {', '.join(COLUMNS[role])} is needed" for role in ("prompt", "rating") if names[role] is None
    ]
    if missing:
        raise DataError("dataset", missing, hint=f"the columns are: {', '.join(map(str, frame.columns))}")
    if frame.empty:
        raise DataError("dataset", ["there are no rows"])
    frame = frame.astype(object).where(frame.notna(), None)
    texts = [_text(value) for value in frame[names["prompt"]]]
    labels = _labels(list(frame[names["rating"]]), scale)
    rationales = [_text(value) for value in frame[names["rationale"]]] if names["rationale"] else [""] * len(frame)
    splits = [_text(value).lower() for value in frame["split"]] if "split" in frame.columns else None
    given = [_text(value) for value in frame["record_id"]] if "record_id" in frame.columns else None
    problems = _id_problems(given or ()) + _problems(
        texts, labels, splits, str(names["prompt"]), str(names["rating"]), [_text(value) for value in frame[names["rating"]]]
    )
    if problems:
        raise DataError("dataset", problems)
    digests = [digest_text(text)[7:23] for text in texts]
    ids = given or _numbered(digests)
    groups = [_text(value) for value in frame["group"]] if "group" in frame.columns else given or digests
    return tuple(
        Record(
            record_id=ids[n],
            group=groups[n],
            split=_split(splits[n]) if splits else _drawn_split(groups[n] or ids[n], seed),
            prompt=text if ANSWER_RULE in text else user_text({"record": text}, prompt, scale),
            label=str(labels[n]),
            rationale=rationales[n],
        )
        for n, text in enumerate(texts)
    )


def _numbered(names: Sequence[str]) -> list[str]:
    """The names, the second of two same ones with -2 behind it, and so on."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name}-{seen[name]}")
    return found


def _text(value: object) -> str:
    return "" if value is None else str(value).strip()


def _labels(values: Sequence[object], scale: RatingScale) -> list[str | None]:
    known = {fold(str(text)): rating.label for rating in scale.ratings for text in (rating.value, rating.label, *rating.aliases)}
    found = []
    for value in values:
        text = _text(value)
        found.append(known.get(fold(text)) or known.get(fold(text.removesuffix(".0"))))
    return found


def _problems(
    texts: Sequence[str], labels: Sequence[str | None], splits: Sequence[str] | None, prompt_name: str, rating_name: str, raw: Sequence[str]
) -> list[str]:
    problems = []
    empty = [n + 1 for n, text in enumerate(texts) if not text]
    if empty:
        problems.append(f"column {prompt_name}: empty in {_rows(empty)}")
    unrated = [n + 1 for n, text in enumerate(raw) if not text]
    if unrated:
        problems.append(f"column {rating_name}: empty in {_rows(unrated)}")
    unknown: dict[str, list[int]] = {}
    for n, (label, text) in enumerate(zip(labels, raw, strict=True)):
        if label is None and text:
            unknown.setdefault(text[:60], []).append(n + 1)
    problems += [f"column {rating_name}: {text!r} is not in the rating mapping ({_rows(rows)})" for text, rows in unknown.items()]
    if not problems and len(set(labels)) < 2:
        problems.append(f"column {rating_name}: every row is rated {labels[0]!r}; there is nothing to tell apart")
    odd: dict[str, list[int]] = {}
    for n, split in enumerate(splits or ()):
        if split not in _SPLIT_NAMES:
            odd.setdefault(split[:60], []).append(n + 1)
    problems += [f"column split: {split!r} is not train, valid or test ({_rows(rows)})" for split, rows in odd.items()]
    if splits and "train" not in splits:
        problems.append("column split: no row is marked train")
    return problems


def _id_problems(ids: Sequence[str]) -> list[str]:
    """An id names one row: files and figures go by it."""
    empty = [n + 1 for n, name in enumerate(ids) if not name]
    rows: dict[str, list[int]] = {}
    for n, name in enumerate(ids):
        rows.setdefault(name, []).append(n + 1)
    twice = {name: found for name, found in rows.items() if name and len(found) > 1}
    problems = [f"column record_id: empty in {_rows(empty)}"] if empty else []
    return problems + [f"column record_id: {name[:60]!r} stands in {_rows(found)}" for name, found in twice.items()]


def _rows(rows: Sequence[int]) -> str:
    shown = ", ".join(map(str, rows[:SHOWN_ROWS]))
    return f"{len(rows)} row{'s' if len(rows) > 1 else ''}: {shown}{', …' if len(rows) > SHOWN_ROWS else ''}"


_SPLIT_NAMES: dict[str, Split] = {"train": "train", "valid": "valid", "validation": "valid", "dev": "valid", "val": "valid", "test": "test"}


def _split(name: str) -> Split:
    return _SPLIT_NAMES[name]


def _drawn_split(group: str, seed: int) -> Split:
    draw = int.from_bytes(hashlib.sha256(f"{seed}:{group}".encode()).digest()[:8], "big") / 2**64
    return "valid" if draw < VALID_SHARE else "train"


# --- token ids -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TokenisedRows:
    train: tuple[TokenRow, ...]
    valid: tuple[TokenRow, ...]
    refused: Mapping[str, int]  # reason -> rows
    tree: RatingTree


def tokenised(records: Sequence[Record], engine: Engine, scale: RatingScale, *, max_tokens: int, context_tokens: int) -> TokenisedRows:
    """The train and valid records as the serving engine tokenises them: chat template, answer, end of turn.

    Rows whose prompt passes `max_tokens`, or which are longer than `context_tokens`, are refused and counted, never cut.
    """
    tree = answer_tree(engine, scale)
    end = end_of_turn(engine)
    rows: dict[str, list[TokenRow]] = {"train": [], "valid": []}
    refused: Counter[str] = Counter()
    for record in records:
        if record.split == "test":
            continue
        answer = (*engine.tokenize(answer_text(record.label, record.rationale)), end)
        places = tree.places(record.label)
        path = tree.paths[record.label][: len(places[-1]) + 1]
        row = TokenRow(
            record.record_id,
            engine.token_ids(messages_for(record)),
            answer,
            tuple(len(place) for place in places),
            tuple(tree.branches[place] for place in places),
        )
        if len(row.prompt) > max_tokens:
            refused["longer than prompt.max_tokens"] += 1
        elif row.size > context_tokens:
            refused["longer than the model's context"] += 1
        elif answer[: len(path)] != path:
            refused["rating tokenised in an unusual way"] += 1
        else:
            rows[record.split].append(row)
    return TokenisedRows(tuple(rows["train"]), tuple(rows["valid"]), dict(refused), tree)


def answer_tree(engine: Engine, scale: RatingScale) -> RatingTree:
    """Where the ratings' texts part, in the engine's tokens."""
    return rating_tree({label: engine.tokenize(ANSWER_OPENING + label + RATIONALE_OPENING) for label in scale.labels})


def end_of_turn(engine: Engine) -> int:
    """The token that the chat template puts after an assistant's message.

    Raises:
        FineTuningNotSupportedError: the template writes an assistant's turn in another way than it opens one.
    """
    asked, answered = Message("user", "Ready?"), Message("assistant", "Yes")
    opened = engine.token_ids((asked,))
    whole = engine.token_ids((asked, answered, asked))
    said = engine.tokenize(answered.content)
    if whole[: len(opened)] != opened or whole[len(opened) : len(opened) + len(said)] != said:
        raise FineTuningNotSupportedError(
            "the model's chat template opens an assistant's turn in another way than it writes one,"
            " so training on it would not match serving",
            hint="choose another base model, or leave the fallback on to make a model set",
        )
    return whole[len(opened) + len(said)]

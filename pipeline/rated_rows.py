"""A table's cells -> rated rows: standardised ratings, opinions, ids and prompts; duplicates taken out."""

from __future__ import annotations

import difflib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.config import DatasetConfig, OpinionColumns, PipelineConfig, fold
from pipeline.data_quality import CONFLICT, DUPLICATE, NO_RATING, NO_TEXT
from pipeline.errors import ConfigError, DataError
from pipeline.prompts import user_text
from pipeline.records import DroppedRow, Opinion, RatingScale
from pipeline.tables import Table

NO_VALUE = frozenset({"na", "n/a", "#n/a", "null", "none", "nan", "-"})  # an empty rating, unless the scale knows it
SHOWN_VALUE = 40  # characters of a rating value in a message; longer ones may be record text


@dataclass(frozen=True, slots=True)
class RatedRow:
    number: int  # from 0, in the table
    record_id: str
    texts: tuple[str, ...]
    prompt: str
    label: str
    rationale: str
    group: str
    opinions: Mapping[str, Opinion]
    meta: Mapping[str, str]

    @property
    def name(self) -> str:
        return digest16("\x1f".join(self.texts))


def wanted_columns(dataset: DatasetConfig) -> dict[str, str]:
    """Every column that is needed -> the key that names it."""
    columns = dataset.columns
    wanted: dict[str, str] = {column: "dataset.columns.text" for column in columns.text}
    problems = [
        f"the column {column!r} is both text and {use}: the answer would stand in the question"
        for use, column in (("rating", columns.rating), ("rationale", columns.rationale))
        if column in wanted
    ]
    if problems:
        raise ConfigError("dataset.columns", problems, hint="take it out of text")
    for name in ("id", "rating", "rationale", "group", "split"):
        if column := getattr(columns, name):
            wanted.setdefault(column, f"dataset.columns.{name}")
    for system, given in opinion_columns(dataset).items():
        key = "dataset.copilot" if system == "copilot" else f"dataset.raters.{system}"
        wanted.setdefault(given.rating, f"{key}.rating")
        if given.rationale:
            wanted.setdefault(given.rationale, f"{key}.rationale")
    for column in dataset.keep:
        wanted.setdefault(column, "dataset.keep")
    return wanted


def opinion_columns(dataset: DatasetConfig) -> dict[str, OpinionColumns]:
    return ({"copilot": dataset.copilot} if dataset.copilot else {}) | dict(dataset.raters)


def _standardised(column: Sequence[str], scale: RatingScale) -> tuple[list[str | None], dict[str, list[int]]]:
    """(label of each cell, None where there is none; cells that the scale does not know -> rows)."""
    known = {fold(str(text)): rating.label for rating in scale.ratings for text in (rating.value, rating.label, *rating.aliases)}
    meaning: dict[str, str | None] = {"": None}
    unknown: dict[str, list[int]] = {}
    for cell in set(column):
        text = fold(cell)
        number = str(int(float(text))) if re.fullmatch(r"[+-]?\d{1,9}(\.0*)?", text) else text
        if text in known or number in known:
            meaning[cell] = known.get(text, known.get(number))
        elif text in NO_VALUE:
            meaning[cell] = None
    for row, cell in enumerate(column):
        if cell not in meaning:
            unknown.setdefault(cell, []).append(row)
    return [meaning.get(cell) for cell in column], unknown


def _unknown_values(table: Table, column: str, unknown: Mapping[str, list[int]], scale: RatingScale) -> list[str]:
    """One line a value, the most frequent first; texts that are too long for a rating are not shown."""
    texts = [text for r in scale.ratings for text in (r.label, *r.aliases)]
    lines = []
    for value, rows in sorted(unknown.items(), key=lambda item: (-len(item[1]), item[0]))[:10]:
        near = difflib.get_close_matches(fold(value), [fold(text) for text in texts], n=1)
        guess = f"; did you mean {next(t for t in texts if fold(t) == near[0])!r}?" if near and len(value) <= SHOWN_VALUE else ""
        times = "once" if len(rows) == 1 else f"{len(rows)} times"
        lines.append(f"column {column!r}: unknown rating {short(value)}, {times} ({table.places(rows)}){guess}")
    if len(unknown) > 10:
        lines.append(f"column {column!r}: {len(unknown) - 10} more unknown values; is it the column with the ratings?")
    return lines


def rated_rows(table: Table, config: PipelineConfig, dropped: list[DroppedRow], notes: list[str]) -> list[RatedRow]:
    """The rows with a text and a rating."""
    dataset, scale = config.dataset, config.dataset.scale
    columns, cells = dataset.columns, table.values
    texts = list(zip(*(cells[column] for column in columns.text), strict=True))
    labels, unknown = _standardised(cells[columns.rating], scale)
    unknown = {value: found for value, rows in unknown.items() if (found := [row for row in rows if any(texts[row])])}
    problems = _unknown_values(table, columns.rating, unknown, scale)
    opinions = {system: _opinions(table, system, given, scale, problems, notes) for system, given in opinion_columns(dataset).items()}
    used = [row for row in range(table.rows) if any(texts[row]) and labels[row] is not None]
    if columns.id:
        used = _check_ids(table, columns.id, used, dropped, problems)
    if problems:
        values = ", ".join(f"{r.value} = {r.label}" + (f" ({', '.join(r.aliases)})" if r.aliases else "") for r in scale.ratings)
        hint = (
            f"known ratings: {values}; correct the cells, or add aliases to dataset.ratings"
            if any("unknown rating" in p for p in problems)
            else ""
        )
        raise DataError(table.source, problems, hint=hint)
    for row in range(table.rows):
        if not any(texts[row]) or labels[row] is None:
            dropped.append(DroppedRow(row + 1, NO_RATING if any(texts[row]) else NO_TEXT))
    ids = cells[columns.id] if columns.id else None
    rationales = cells[columns.rationale] if columns.rationale else [""] * table.rows
    groups = cells[columns.group] if columns.group else [""] * table.rows
    return [
        RatedRow(
            number=row,
            record_id=ids[row] if ids else digest16("\x1f".join(texts[row])),
            texts=texts[row],
            prompt=user_text(dict(zip(columns.text, texts[row], strict=True)), config.prompt, scale),
            label=labels[row] or "",
            rationale=rationales[row],
            group=groups[row],
            opinions={system: said for system, column in opinions.items() if (said := column[row])},
            meta={column: cells[column][row] for column in dataset.keep},
        )
        for row in used
    ]


def short(value: str) -> str:
    """A cell as it may stand in a message."""
    return repr(value) if len(value) <= SHOWN_VALUE else f"a text of {len(value)} characters"


def _opinions(
    table: Table, system: str, given: OpinionColumns, scale: RatingScale, problems: list[str], notes: list[str]
) -> list[Opinion | None]:
    """What one system said of each row; None where it said nothing."""
    labels, unknown = _standardised(table.values[given.rating], scale)
    rationales = table.values[given.rationale] if given.rationale else [""] * table.rows
    if unknown and not any(labels):
        problems += _unknown_values(table, given.rating, unknown, scale)
    elif unknown:
        rows = sorted(row for found in unknown.values() for row in found)
        were = "cell is" if len(rows) == 1 else "cells are"
        notes.append(f"{system}: {len(rows)} {were} not on the scale ({table.places(rows)}) and count as no rating.")
    return [Opinion(label, text or None) if label or text else None for label, text in zip(labels, rationales, strict=True)]


def _check_ids(table: Table, column: str, used: Sequence[int], dropped: list[DroppedRow], problems: list[str]) -> list[int]:
    """The rows without those that repeat a whole row; an id that stands for two rows, or none, is a problem."""
    ids = table.values[column]
    first: dict[str, int] = {}
    clashes: dict[str, list[int]] = {}
    kept = []
    for row in used:
        before = first.setdefault(ids[row], row)
        if before != row and all(cells[row] == cells[before] for cells in table.values.values()):
            dropped.append(DroppedRow(row + 1, DUPLICATE))
            continue
        if before != row and ids[row]:
            clashes.setdefault(ids[row], [before]).append(row)
        kept.append(row)
    if empty := [row for row in used if not ids[row]]:
        problems.append(f"column {column!r}: no id in {table.places(empty)}; fill it, or leave dataset.columns.id out")
    problems += [f"column {column!r}: one id for different rows: {table.places(rows, 5)}" for rows in clashes.values()]
    return kept


def without_duplicates(rows: Sequence[RatedRow], dropped: list[DroppedRow]) -> tuple[list[RatedRow], int]:
    """(rows whose prompt stands once, number of prompts that were rated in two ways)."""
    labels: dict[str, set[str]] = {}
    for row in rows:
        labels.setdefault(row.prompt, set()).add(row.label)
    seen: set[str] = set()
    kept = []
    for row in rows:
        if len(labels[row.prompt]) > 1:
            dropped.append(DroppedRow(row.number + 1, CONFLICT))
        elif row.prompt in seen:
            dropped.append(DroppedRow(row.number + 1, DUPLICATE))
        else:
            seen.add(row.prompt)
            kept.append(row)
    return kept, sum(len(found) > 1 for found in labels.values())


def digest16(text: str) -> str:
    """First 16 hex digits of SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]

"""formatted_dataset.csv: records -> file -> the same records."""

from __future__ import annotations

import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.errors import ArtifactError, DataError
from pipeline.records import SPLITS, Opinion, RatingScale, Record
from pipeline.store import writing
from pipeline.tables import long_cells

COLUMNS = ("record_id", "group", "split", "prompt", "rating", "label", "rationale")
_AGAIN = "make it again: `pipeline format`"
_SPECIAL = re.compile(r'[",\r\n]')


def write_formatted(path: Path, records: Sequence[Record], scale: RatingScale, *, systems: Sequence[str], meta: Sequence[str]) -> None:
    """RFC 4180 with line feeds; an opinion or text that is not there is an empty cell."""
    prefixes = [system if system == "copilot" else f"rater_{system}" for system in systems]
    header = [*COLUMNS, *(f"{prefix}_{part}" for prefix in prefixes for part in ("rating", "rationale")), *(f"meta_{c}" for c in meta)]
    values = {rating.label: str(rating.value) for rating in scale.ratings}
    silent = Opinion(None, None)
    with writing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as out:
        out.write(_line(header))
        for r in records:
            said = [r.opinions.get(system, silent) for system in systems]
            cells = [r.record_id, r.group, r.split, r.prompt, values[r.label], r.label, r.rationale]
            cells += [cell or "" for opinion in said for cell in (opinion.label, opinion.rationale)]
            out.write(_line(cells + [r.meta[column] for column in meta]))


def _line(cells: Sequence[str]) -> str:
    """The csv module would leave a lone carriage return unquoted when lines end in line feeds."""
    return ",".join('"' + cell.replace('"', '""') + '"' if _SPECIAL.search(cell) else cell for cell in cells) + "\n"


def read_formatted(path: Path, scale: RatingScale) -> tuple[Record, ...]:
    """The records of formatted_dataset.csv, in file order, every text exactly as it was written.

    Raises:
        ArtifactError: no such file.
        DataError: damaged, or made with other ratings: row and column are named.
    """
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file", hint="make it: `pipeline format`") from None
    except UnicodeDecodeError as error:
        raise DataError(str(path), [f"is not UTF-8 at byte {error.start + 1}"], hint=_AGAIN) from None
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error.strerror}", hint="check the file's rights") from error
    lines: list[list[str]] = []
    with long_cells():
        try:
            lines += csv.reader(io.StringIO(text, newline=""), strict=True)
        except csv.Error as error:
            raise DataError(str(path), [f"row {max(len(lines), 1)} is broken: {error}"], hint=_AGAIN) from None
    if not lines:
        raise DataError(str(path), ["is empty"], hint=_AGAIN)
    header, *rows = lines
    systems, meta = _layout(path, header)
    problems = [problem for n, row in enumerate(rows, 1) for problem in _row_problems(n, row, header, systems, scale)]
    twice = [row_id for row_id, n in Counter(row[0] for row in rows if row).items() if n > 1]
    problems += [f"column 'record_id': {len(twice)} ids stand for more than one row"] if twice else []
    if problems:
        raise DataError(str(path), problems, hint=_AGAIN)
    return tuple(_parsed(row, systems, meta) for row in rows)


def _layout(path: Path, header: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """(systems, meta columns) that follow the fixed columns."""
    rest = list(header[len(COLUMNS) :])
    systems: list[str] = []
    while len(rest) >= 2 and (found := re.fullmatch(r"(?s)(?:(copilot)|rater_(.*))_rating", rest[0])):
        system = found[1] or found[2]
        if rest[1] != rest[0].removesuffix("rating") + "rationale":
            break
        systems.append(system)
        del rest[:2]
    wrong = [
        f"column {n} is {have!r}, not {want!r}" for n, (have, want) in enumerate(zip(header, COLUMNS, strict=False), 1) if have != want
    ]
    wrong += [f"no column {want!r}" for want in COLUMNS[len(header) :]]
    wrong += [f"column {name!r} is not known here" for name in rest if not name.startswith("meta_")]
    if wrong:
        raise DataError(str(path), wrong, hint=_AGAIN)
    return tuple(systems), tuple(name.removeprefix("meta_") for name in rest)


def _row_problems(n: int, row: Sequence[str], header: Sequence[str], systems: Sequence[str], scale: RatingScale) -> Iterator[str]:
    if len(row) != len(header):
        yield f"row {n}: {len(row)} cells where the header has {len(header)}"
        return
    values = {rating.label: str(rating.value) for rating in scale.ratings}
    if row[2] not in SPLITS:
        yield f"row {n}, column 'split': not train, valid or test"
    if row[5] not in values:
        yield f"row {n}, column 'label': not one of the ratings in dataset.ratings"
    elif row[4] != values[row[5]]:
        yield f"row {n}, column 'rating': does not go with the label {row[5]!r}"
    for place in (0, 3):
        if not row[place]:
            yield f"row {n}, column {COLUMNS[place]!r}: empty"
    for at in range(len(COLUMNS), len(COLUMNS) + 2 * len(systems), 2):
        if row[at] and row[at] not in values:
            yield f"row {n}, column {header[at]!r}: not one of the ratings in dataset.ratings"


def _parsed(row: Sequence[str], systems: Sequence[str], meta: Sequence[str]) -> Record:
    record_id, group, split, prompt, _, label, rationale = row[: len(COLUMNS)]
    opinions = {}
    for n, system in enumerate(systems):
        said, why = row[len(COLUMNS) + 2 * n : len(COLUMNS) + 2 * n + 2]
        if said or why:
            opinions[system] = Opinion(said or None, why or None)
    kept = dict(zip(meta, row[len(COLUMNS) + 2 * len(systems) :], strict=True))
    return Record(record_id, group, SPLITS[SPLITS.index(split)], prompt, label, rationale, opinions, kept)

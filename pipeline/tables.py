"""The user's table -> columns of clean text: CSV, TSV, JSONL or Parquet, with every problem named by line and column."""

from __future__ import annotations

import codecs
import contextlib
import csv
import difflib
import gzip
import io
import json
import sys
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import DataError

DELIMITERS = {".csv": ",", ".tsv": "\t", ".tab": "\t"}
FORMATS = ".csv, .tsv, .jsonl, .parquet (text formats also with .gz)"
COLUMNS_HINT = "name the table's own columns in dataset of pipeline.yaml, or correct its header"
NOT_A_VALUE = frozenset({"nan", "NaN", "<NA>", "NaT"})  # what tools write for a missing cell; "NA", "None" and "null" are texts
ENCODINGS = ((codecs.BOM_UTF32_LE, "UTF-32"), (codecs.BOM_UTF16_LE, "UTF-16"), (codecs.BOM_UTF16_BE, "UTF-16"))
AS_UTF8 = "save the table as UTF-8 (in Excel: 'CSV UTF-8'), or convert it: iconv -f {} -t UTF-8 OLD > NEW"


@dataclass(frozen=True, slots=True)
class Table:
    """The columns that were asked for. Cells are stripped, line ends are line feeds, a missing cell is ""."""

    source: str
    values: Mapping[str, Sequence[str]]
    lines: Sequence[int]  # the line each row starts in; empty for Parquet

    @property
    def rows(self) -> int:
        return len(next(iter(self.values.values())))

    def place(self, row: int) -> str:
        """Where a row (from 0) is, for a message: rows count from 1 after the header."""
        return f"row {row + 1}" + (f" (line {self.lines[row]})" if self.lines else "")

    def places(self, rows: Sequence[int], shown: int = 3) -> str:
        """The first few rows: `rows 3, 7, 9 and 12 more`."""
        listed = ", ".join(str(row + 1) for row in rows[:shown])
        more = f" and {len(rows) - shown} more" if len(rows) > shown else ""
        return ("row " if len(rows) == 1 else "rows ") + listed + more


@dataclass(frozen=True, slots=True)
class _Grid:
    """A file as read: every column's name, the cells of a column on demand, lines."""

    columns: Sequence[str]
    cells: Mapping[str, Sequence[Any]]
    lines: Sequence[int]


def read_table(path: Path, wanted: Mapping[str, str]) -> Table:
    """The wanted columns (column name -> the config key that names it) of a table, by its file's extension.

    Raises:
        DataError: no such file, another format, wrong encoding, ragged rows, missing columns, cells that hold no text: all
            that can be seen at once.
    """
    suffix = _suffix(path)
    if suffix == ".parquet":
        grid = _read_parquet(path, wanted)
    else:
        text = _decode(path, _read_bytes(path, suffix.endswith(".gz")))
        kind = suffix.removesuffix(".gz")
        grid = _read_delimited(path, text, DELIMITERS[kind], wanted) if kind in DELIMITERS else _read_jsonl(path, text, wanted)
    if not next(iter(grid.cells.values())):
        raise DataError(str(path), ["there is a header but no row" if grid.columns else "there is no row"], hint="add rated rows")
    problems: list[str] = []
    values = {name: _texts(name, cells, grid.lines, problems) for name, cells in grid.cells.items()}
    if problems:
        raise DataError(str(path), problems, hint="clean these cells and run again")
    return Table(str(path), values, grid.lines)


def _suffix(path: Path) -> str:
    suffix = path.suffix.lower()
    kind = Path(path.stem).suffix.lower() if suffix == ".gz" else suffix
    kind = ".jsonl" if kind == ".ndjson" else kind
    if (kind == ".parquet" and suffix != ".gz") or kind in (*DELIMITERS, ".jsonl"):
        return kind + (".gz" if suffix == ".gz" else "")
    hint = "save the sheet as 'CSV UTF-8'" if kind in (".xlsx", ".xls", ".ods") else f"these are read: {FORMATS}"
    if path.is_dir():
        raise DataError(str(path), ["is a folder, not a table"], hint="name the file in dataset.path")
    raise DataError(str(path), [f"tables of the type {kind or 'without an extension'!s} are not read"], hint=hint)


def _read_bytes(path: Path, zipped: bool = False) -> bytes:
    if path.exists() and not path.is_file() and not path.is_dir():
        raise DataError(str(path), ["is not a file"], hint="name the table in dataset.path")  # a pipe would be waited for without end
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if zipped else data
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*")] if path.parent.is_dir() else [], n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise DataError(str(path), ["no such file"], hint=f"{hint}dataset.path names the table, relative to pipeline.yaml") from None
    except IsADirectoryError:
        raise DataError(str(path), ["is a folder, not a table"], hint="name the file in dataset.path") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise DataError(str(path), ["is not a whole gzip file"], hint="compress or copy it again") from error
    except OSError as error:
        raise DataError(str(path), [f"can't be read: {error.strerror}"], hint="check the file's rights") from error


def _decode(path: Path, data: bytes) -> str:
    """UTF-8 text without a byte-order mark."""
    if not data.strip():
        raise DataError(str(path), ["is empty"], hint="it needs a header and rated rows")
    mark = next((name for bom, name in ENCODINGS if data.startswith(bom)), None)
    if mark is None and b"\0" in data[:200] and data[:200].count(b"\0") > len(data[:200]) // 4:
        mark = "UTF-16"
    if mark:
        raise DataError(str(path), [f"is {mark}, not UTF-8 (seen from byte 1 in line 1)"], hint=AS_UTF8.format(mark))
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(str(path), _undecodable(data, error), hint=AS_UTF8.format("WINDOWS-1252")) from None
    if "\0" in text:
        lines = [str(n) for n, line in enumerate(data.split(b"\n"), 1) if b"\0" in line]
        raise DataError(
            str(path), [f"NUL bytes in line {', '.join(lines[:5])}{' …' * (len(lines) > 5)}"], hint="remove them, or save it anew"
        )
    return text


def _undecodable(data: bytes, error: UnicodeDecodeError) -> list[str]:
    start = error.start + (len(codecs.BOM_UTF8) if data.startswith(codecs.BOM_UTF8) else 0)
    wrong = 0
    for line in data.split(b"\n"):
        try:
            line.decode("utf-8")
        except UnicodeDecodeError:
            wrong += 1
    line_number = data.count(b"\n", 0, start) + 1
    return [f"is not UTF-8: byte {data[start]:#04x} at position {start + 1}, line {line_number} (lines affected: {wrong})"]


# --- formats ---------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def long_cells() -> Iterator[None]:
    """Lets the csv module read cells of any length."""
    before = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _read_delimited(path: Path, text: str, delimiter: str, wanted: Mapping[str, str]) -> _Grid:
    """RFC 4180; blank lines are skipped. Lines, not rows, are named, since quoted cells may span lines."""
    rows, lines, problems = [], [], []
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    with long_cells():
        try:
            for row in reader:
                if row:
                    rows.append(row)
                    lines.append(line)
                line = reader.line_num + 1
        except csv.Error as error:
            problems.append(f"line {line}: {_quote_problem(error, reader.line_num)}")
    if not rows:
        raise DataError(str(path), problems or ["is empty"], hint="it needs a header and rated rows")
    header = [name.strip() for name in rows.pop(0)]
    del lines[0]
    broken = bool(problems)
    problems += _header_problems(header, wanted)
    ragged = [(n, row) for n, row in zip(lines, rows, strict=True) if len(row) != len(header)]
    problems += [f"line {n}: {len(row)} cells where the header has {len(header)}" for n, row in ragged]
    if problems:
        raise DataError(str(path), problems, hint=_delimited_hint(header, delimiter, broken or bool(ragged)))
    return _Grid(header, {name: [row[i] for row in rows] for name in wanted for i in [header.index(name)]}, lines)


def _quote_problem(error: csv.Error, last: int) -> str:
    if "unexpected end" in str(error):
        return f"a quote is opened here and never closed (read on to line {last})"
    return "text follows a closing quote; a quote inside a quoted cell is written twice"


def _delimited_hint(header: Sequence[str], delimiter: str, broken: bool) -> str:
    for other, name in ((";", "semicolons"), ("\t", "tabs"), (",", "commas"), ("|", "bars")):
        if len(header) == 1 and other != delimiter and other in header[0]:
            rename = {"\t": ", or give it the extension .tsv", ",": ", or give it the extension .csv"}.get(other, "")
            need = "commas" if delimiter == "," else "tabs"
            return f"the header looks separated by {name}: save the table with {need} between cells{rename}"
    return "put cells that hold separators, quotes or line breaks in double quotes" if broken else COLUMNS_HINT


def _header_problems(header: Sequence[str], wanted: Mapping[str, str]) -> list[str]:
    problems = [f"the header names the column {name!r} {n} times" for name, n in Counter(header).items() if n > 1 and name]
    for column, key in wanted.items():
        if column in header:
            continue
        near = difflib.get_close_matches(column, header, n=1, cutoff=0.6)
        folded = [name for name in header if name.casefold() == column.casefold()]
        suggestion = f"; did you mean {(folded or near)[0]!r}?" if folded or near else ""
        problems.append(f"no column {column!r} ({key}){suggestion}")
    if any(column not in header for column in wanted):
        shown = ", ".join(repr(name) if len(name) <= 40 else f"a name of {len(name)} characters" for name in header[:30]) + (
            " …" if len(header) > 30 else ""
        )
        problems.append(f"columns there: {shown or 'none'}")
    return problems


def _read_jsonl(path: Path, text: str, wanted: Mapping[str, str]) -> _Grid:
    objects, lines, problems = [], [], []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: JSON strings may hold U+2028
        if not line.strip():
            continue
        try:
            item = json.loads(line)
        except (ValueError, RecursionError) as error:
            at = f" at character {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
            problems.append(f"line {number}: not JSON{at}")
            continue
        if isinstance(item, dict):
            objects.append(item)
            lines.append(number)
        else:
            problems.append(f"line {number}: not a JSON object {{column: value, …}}")
    if problems:
        raise DataError(str(path), problems, hint="each line must be one JSON object")
    columns = list(dict.fromkeys(key for item in objects for key in item))
    if missing := _header_problems(columns, wanted):
        raise DataError(str(path), missing, hint=COLUMNS_HINT)
    return _Grid(columns, {name: [item.get(name) for item in objects] for name in wanted}, lines)


def _read_parquet(path: Path, wanted: Mapping[str, str]) -> _Grid:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    data = _read_bytes(path)
    if not data:
        raise DataError(str(path), ["is empty"], hint="write the table again")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        columns = list(file.schema_arrow.names)
        if problems := _header_problems(columns, wanted):
            raise DataError(str(path), problems, hint=COLUMNS_HINT)
        table = file.read(columns=list(wanted))
        cells = {name: table.column(name).to_pylist() for name in wanted}
    except (pa.ArrowException, OSError) as error:
        raise DataError(str(path), ["is damaged or not a Parquet file"], hint="write or copy it again") from error
    return _Grid(columns, cells, ())


# --- cells -----------------------------------------------------------------------------------------------------------


def _texts(column: str, cells: Sequence[Any], lines: Sequence[int], problems: list[str]) -> list[str]:
    """The cells as clean text; adds one problem a kind of bad cell."""
    wrong: dict[str, list[int]] = {}
    texts = []
    for row, cell in enumerate(cells):
        text, problem = _text(cell)
        texts.append(text)
        if problem:
            wrong.setdefault(problem, []).append(row)
    for problem, rows in wrong.items():
        line = f", line {lines[rows[0]]}" if lines else ""
        count = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
        problems.append(f"column {column!r}, row {rows[0] + 1}{line}: {problem}{count}")
    return texts


def _text(cell: Any) -> tuple[str, str | None]:
    """(text, what is wrong)."""
    if isinstance(cell, bool):
        return str(cell).lower(), None
    if isinstance(cell, list | tuple | dict | set):
        return "", "holds a list or an object; make it one text first"
    if isinstance(cell, bytes):
        return "", "holds bytes; make it text first"
    if cell is None:
        return "", None
    text = str(cell).strip()
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "\0" in text:
        return "", "holds a NUL character"
    if not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text):
        return "", "holds half a surrogate pair, which is no character"
    return ("" if text in NOT_A_VALUE else text), None

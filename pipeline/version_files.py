"""`metadata/versions/` on disk: one YAML record a version, index.jsonl beside them, and the split of every row ever assigned."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, cast

from pipeline import yaml_text
from pipeline.errors import ArtifactError, UserError
from pipeline.records import SPLITS, Split
from pipeline.store import explained, write_text
from pipeline.version_names import KINDS, Kind

INDEX, ASSIGNMENTS = "index.jsonl", "splits.csv"
_RECORD_NAME = re.compile(rf"({'|'.join(KINDS)})-([0-9]{{4}})\.yaml")
_ROW_KEY = re.compile(r"[0-9a-f]{16}")
_HEADER = "row,split"
MERGE_MARK = re.compile(r"^(<<<<<<<|=======|>>>>>>>)", re.MULTILINE)
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class VersionTakenError(UserError):
    """Another run recorded a version between this one's plan and its record. Load and plan again."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of index.jsonl: all that allocation needs. `record_bytes` tells a stale line from a good one.

    `status`: "done"; "failed" (its run died); "abandoned" (reserved by a run that never came back).
    """

    kind: Kind
    id: str
    name: str
    version: str  # "1.0.0.0"; of a run "1.0.0.0-data-1.0.0.0"
    status: str
    created: str
    key: str
    segments: tuple[str, ...]  # value digests, A to D
    record_bytes: int


_FIELDS = tuple(each.name for each in fields(IndexEntry))
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode

# --- records ---------------------------------------------------------------------------------------------------------


def versions_folder(metadata: Path) -> Path:
    return metadata / "versions"


def record_path(metadata: Path, kind: str, id: str) -> Path:
    return versions_folder(metadata) / f"{kind}-{id}.yaml"


def record_ids(metadata: Path) -> set[tuple[Kind, str]]:
    """(kind, ID) of every record file, the empty ones included."""
    return {(cast(Kind, match[1]), match[2]) for name in _names(metadata) if (match := _RECORD_NAME.fullmatch(name))}


def strange_files(metadata: Path) -> list[str]:
    """Names of YAML files beside the records that are no record's: a copy that an editor or a file share made, say."""
    return sorted(name for name in _names(metadata) if name.endswith((".yaml", ".yml")) and not _RECORD_NAME.fullmatch(name))


def _names(metadata: Path) -> list[str]:
    folder = versions_folder(metadata)
    return [path.name for path in os.scandir(folder)] if folder.is_dir() else []


def record_files(metadata: Path) -> dict[tuple[Kind, str], os.stat_result]:
    """(kind, ID) -> status of every record file."""
    folder = versions_folder(metadata)
    if not folder.is_dir():
        return {}
    with os.scandir(folder) as found:
        return {(cast(Kind, match[1]), match[2]): file.stat() for file in found if (match := _RECORD_NAME.fullmatch(file.name))}


def record_sizes(metadata: Path) -> dict[tuple[Kind, str], int]:
    """(kind, ID) -> bytes of every record file. A file of 0 bytes is an ID that was taken and never described."""
    return {place: status.st_size for place, status in record_files(metadata).items()}


def create_record(metadata: Path, record: Mapping[str, Any]) -> int:
    """Writes a new record whole and returns its size. Of two runs that write the same ID at once, one gets it.

    Raises:
        VersionTakenError: the ID is taken.
        OutputError: the folder can't be written.
    """
    path = record_path(metadata, record["kind"], record["id"])
    text = yaml_text.dump(record)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")
    write_text(temporary, text)
    try:
        with explained(path):
            _link(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return len(text.encode("utf-8"))


def _link(source: Path, path: Path) -> None:
    try:
        try:
            path.hardlink_to(source)
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            path.open("x").close()  # a file system without links: take the name first
            source.replace(path)
    except FileExistsError:
        raise VersionTakenError(f"{path}: another run recorded this version meanwhile", hint="run again") from None


def entry_of(record: Mapping[str, Any], record_bytes: int) -> IndexEntry:
    """
    Raises:
        KeyError, TypeError: the record lacks a field.
    """
    fields = {name: str(record[name]) for name in ("id", "name", "version", "status", "created", "key")}
    digests = tuple(str(segment["digest"]) for segment in record["segments"])
    return IndexEntry(kind=record["kind"], **fields, segments=digests, record_bytes=record_bytes)


# --- index -----------------------------------------------------------------------------------------------------------


def load_entries(metadata: Path) -> tuple[list[IndexEntry], str | None]:
    """Every version in order, and why the index was not enough (None: it was). Records are read only where it is not.

    Raises:
        ArtifactError: a record that is needed is damaged.
    """
    sizes = {place: size for place, size in record_sizes(metadata).items() if size}
    known, doubt = read_index(metadata, sizes)
    read = [_entry_from_file(metadata, *place, size) for place, size in sizes.items() if place not in known]
    return sorted([*(entry for _, entry in known.values()), *read], key=_order), doubt


def read_index(metadata: Path, sizes: Mapping[tuple[Kind, str], int]) -> tuple[dict[tuple[Kind, str], tuple[str, IndexEntry]], str | None]:
    """The lines that fit the record files, as text and read, and what is wrong with the index (None: nothing).

    Args:
        sizes: bytes of the record files, the empty ones left out.
    """
    try:
        text = (versions_folder(metadata) / INDEX).read_text(encoding="utf-8")
    except FileNotFoundError:
        return {}, "it is missing" if sizes else None
    except (OSError, ValueError):
        return {}, "it can't be read"
    found: dict[tuple[Kind, str], tuple[str, IndexEntry]] = {}
    twice, damaged, strange = set(), False, False
    for line in text.removesuffix("\n").split("\n") if text else ():
        try:
            entry = parse_line(line)
            fits = sizes.get((entry.kind, entry.id)) == entry.record_bytes
        except (ValueError, TypeError, KeyError):
            damaged = True
            continue
        place = (entry.kind, entry.id)
        if place in found:
            twice.add(place)
        elif fits:
            found[place] = line, entry
        else:
            strange = True
    known = {place: each for place, each in found.items() if place not in twice}
    if damaged:
        return known, "it holds the marks of a merge" if MERGE_MARK.search(text) else "it is damaged"
    if twice:
        return known, f"{' and '.join('-'.join(place) for place in sorted(twice)[:3])} is in it twice"
    return known, "its lines are not those of the record files" if strange or len(known) != len(sizes) else None


def write_index(metadata: Path, entries: Iterable[IndexEntry]) -> None:
    write_text(versions_folder(metadata) / INDEX, "".join(f"{format_line(entry)}\n" for entry in sorted(entries, key=_order)))


def format_line(entry: IndexEntry) -> str:
    return _encode({name: getattr(entry, name) for name in _FIELDS})


def parse_line(line: str) -> IndexEntry:
    """
    Raises:
        ValueError, TypeError, KeyError: not a line of the index.
    """
    row = json.loads(line)
    row["segments"] = tuple(row["segments"])
    return IndexEntry(**row)


def _order(entry: IndexEntry) -> tuple[int, str]:
    return KINDS.index(entry.kind), entry.id


def _entry_from_file(metadata: Path, kind: Kind, id: str, size: int) -> IndexEntry:
    path = record_path(metadata, kind, id)
    try:
        entry = entry_of(yaml_text.read(path), size)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged: {error} is missing or wrong", hint="restore it with `git checkout`") from error
    if (entry.kind, entry.id) != (kind, id):
        raise ArtifactError(f"{path}: damaged: it describes {entry.kind} {entry.id!r}", hint="restore it with `git checkout`")
    return entry


# --- splits ----------------------------------------------------------------------------------------------------------

_SPLITS_HINT = "restore it with `git checkout`; after a merge, keep the lines of both sides, each row once"


def read_assignments(metadata: Path) -> dict[str, Split]:
    """Row key -> split of every row that a recorded version assigned; empty before the first.

    Raises:
        ArtifactError: the file is damaged (a merge left its marks, say).
    """
    path = versions_folder(metadata) / ASSIGNMENTS
    try:
        header, *lines = path.read_text(encoding="utf-8").splitlines() or [""]
    except FileNotFoundError:
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: can't be read: {error}", hint="restore it with `git checkout`") from error
    assignments: dict[str, Split] = {}
    for number, line in enumerate(lines, 2):
        row, _, split = line.partition(",")
        if split not in SPLITS or row in assignments or not _ROW_KEY.fullmatch(row):
            raise ArtifactError(f"{path}: damaged at line {number}", hint=_SPLITS_HINT)
        assignments[row] = split
    if header != _HEADER:
        raise ArtifactError(f"{path}: damaged: the first line is not {_HEADER!r}", hint="restore it with `git checkout`")
    return assignments


def write_assignments(metadata: Path, assignments: Mapping[str, Split]) -> bool:
    """Adds the rows of a version that was recorded; rows of earlier versions stay, for they may come back. Sorted, so that a
    commit shows only what is new. False when nothing was."""
    earlier = read_assignments(metadata)
    merged = {**earlier, **assignments}  # only a given split column can move a row; then the new split holds
    if merged == earlier:
        return False
    if wrong := [row for row in assignments if not _ROW_KEY.fullmatch(row)]:
        raise ValueError(f"not a row key: {wrong[0][:20]!r}")
    lines = [f"{row},{split}\n" for row, split in sorted(merged.items())]
    write_text(versions_folder(metadata) / ASSIGNMENTS, "".join([_HEADER + "\n", *lines]))
    return True

"""`metadata/versions/` on disk: one YAML record a version, index.jsonl beside them, and the split of every row ever assigned."""

from __future__ import annotations

import errno
import json
import re
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
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
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class VersionTakenError(UserError):
    """Another run recorded a version between this one's plan and its record. Load and plan again."""


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """One line of index.jsonl: all that allocation needs. `record_bytes` tells a stale line from a good one."""

    kind: Kind
    id: str
    name: str
    version: str  # "1.0.0.0"; of a run "1.0.0.0-data-1.0.0.0"
    status: str  # "done" or "failed"
    created: str
    key: str
    segments: tuple[str, ...]  # value digests, A to D
    record_bytes: int


# --- records ---------------------------------------------------------------------------------------------------------


def versions_folder(metadata: Path) -> Path:
    return metadata / "versions"


def record_path(metadata: Path, kind: str, id: str) -> Path:
    return versions_folder(metadata) / f"{kind}-{id}.yaml"


def record_sizes(metadata: Path) -> dict[tuple[Kind, str], int]:
    """(kind, ID) -> bytes of every record file. A file of 0 bytes is an ID that was taken and never described."""
    sizes: dict[tuple[Kind, str], int] = {}
    folder = versions_folder(metadata)
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := _RECORD_NAME.fullmatch(path.name):
            sizes[cast(Kind, match[1]), match[2]] = path.stat().st_size
    return sizes


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
    """Every version in order, and why the index had to be rebuilt from the records (None: it was read).

    Raises:
        ArtifactError: a record that is needed is damaged.
    """
    path = versions_folder(metadata) / INDEX
    sizes = {place: size for place, size in record_sizes(metadata).items() if size}
    entries, doubt = _read_index(path)
    if doubt is None and {(entry.kind, entry.id): entry.record_bytes for entry in entries} != sizes:
        doubt = "its lines are not those of the record files"
    if doubt is None:
        return sorted(entries, key=_order), None
    if not sizes and not path.exists():
        return [], None
    return sorted((_entry_from_file(metadata, *place, size) for place, size in sizes.items()), key=_order), doubt


def write_index(metadata: Path, entries: Iterable[IndexEntry]) -> None:
    lines = [json.dumps(asdict(entry), ensure_ascii=False, separators=(",", ":")) for entry in sorted(entries, key=_order)]
    write_text(versions_folder(metadata) / INDEX, "".join(f"{line}\n" for line in lines))


def _order(entry: IndexEntry) -> tuple[int, str]:
    return KINDS.index(entry.kind), entry.id


def _entry_from_file(metadata: Path, kind: Kind, id: str, size: int) -> IndexEntry:
    path = record_path(metadata, kind, id)
    try:
        return entry_of(yaml_text.read(path), size)
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: damaged: {error} is missing or wrong", hint="restore it with `git checkout`") from error


def _read_index(path: Path) -> tuple[list[IndexEntry], str | None]:
    try:
        text = path.read_text(encoding="utf-8")
        rows = [json.loads(line) for line in text.splitlines()]
        entries = [IndexEntry(**{**row, "segments": tuple(row["segments"])}) for row in rows]
    except FileNotFoundError:
        return [], "it is missing"
    except (OSError, ValueError, TypeError, KeyError):
        return [], "it is damaged"
    return (entries, None) if len({(e.kind, e.id) for e in entries}) == len(entries) else ([], "a version is in it twice")


# --- splits ----------------------------------------------------------------------------------------------------------


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
            raise ArtifactError(f"{path}: damaged at line {number}", hint="restore it with `git checkout`, or resolve the merge")
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

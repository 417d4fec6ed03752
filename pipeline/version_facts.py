"""One record by itself: whether it says what its file name, its values and its digests say, and what other records are compared with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.errors import ArtifactError, PipelineError
from pipeline.records import fingerprint
from pipeline.version_files import MERGE_MARK, IndexEntry, entry_of
from pipeline.version_inputs import LETTERS, key_of
from pipeline.version_names import format_version, names_of, parse_name

STATUSES = ("done", "failed", "abandoned")
RESTORE = "restore the file with `git checkout`"
_SHAPE = (KeyError, TypeError, ValueError, AttributeError, IndexError, RecursionError)  # of a tree that is not a record's


@dataclass(frozen=True, slots=True)
class Facts:
    """What the rules over all records need of one."""

    entry: IndexEntry
    numbers: tuple[int, ...]  # of its segments, A to D
    lineage: tuple[tuple[str, str, str, str], ...]  # role, id, name, key


def read_facts(path: Path, kind: str, id: str, size: int) -> tuple[Facts | None, list[str]]:
    """The facts of a record file (None: it can't be read as one) and its own problems, each with what to do."""
    if size == 0:
        return None, [f"{path.name}: empty: a run was cut off while recording it; its ID stays taken, so commit it or delete it"]
    try:
        record = yaml_text.read(path)
        facts = facts_of(record, size)
    except ArtifactError as error:
        return None, [damage(path, error, RESTORE)]
    except _SHAPE as error:
        return None, [f"{path.name}: damaged: {error} is missing or wrong; {RESTORE}"]
    try:
        return facts, [f"{path.name}: {problem}; {RESTORE}" for problem in _problems(record, kind, id)]
    except _SHAPE as error:
        return facts, [f"{path.name}: damaged: {error}; {RESTORE}"]


def facts_of(record: Mapping[str, Any], size: int) -> Facts:
    entry = entry_of(record, size)
    lineage = tuple((str(role), *(str(part[name]) for name in ("id", "name", "key"))) for role, part in (record["lineage"] or {}).items())
    numbers = tuple(int(segment["number"]) for segment in record["segments"])
    return Facts(entry, numbers, lineage)  # type: ignore[arg-type]


def damage(path: Path, error: Exception, todo: str) -> str:
    """The problem of a YAML file that can't be read, by its name; a merge that left its marks is called that."""
    try:
        marked = MERGE_MARK.search(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        marked = None
    if marked:
        return f"{path.name}: damaged: it holds the marks of a merge; resolve it: keep one side whole (`git checkout --ours` or `--theirs`)"
    return f"{path.name}: {str(error).removeprefix(f'{path}: ')}; {todo}"


def _problems(record: Mapping[str, Any], kind: str, id: str) -> list[str]:
    """Names, numbers, digests, key."""
    problems = []
    if (record["kind"], record["id"]) != (kind, id):
        problems.append(f"describes {record['kind']} {record['id']!r}; the ID must be the file's, in quotes")
    try:
        name = parse_name(record["name"])
        if (name.kind, name.id) != (kind, id) or list(names_of(name.kind, name.id, name.version, name.data)) != record["names"]:
            problems.append(f"the name {record['name']} is not one of {kind} {id}")
        if record["version"] != format_version(name.version) + (f"-data-{format_version(name.data)}" if name.data else ""):
            problems.append(f"the name {record['name']} and the version {record['version']} differ")
        if record["segments"] and [s["number"] for s in record["segments"]] != list(name.version):
            problems.append(f"the segments' numbers are not those of {record['version']}")
    except (PipelineError, TypeError) as error:
        problems.append(str(error))
    if record["status"] not in STATUSES:
        problems.append(f"the status {record['status']!r} is not one of {', '.join(STATUSES)}")
    if [s["segment"] for s in record["segments"]] != ([] if kind == "run" else list(LETTERS)):
        problems.append("the segments are not A to D")
    wrong = [s["segment"] for s in record["segments"] if fingerprint(s["value"]) != s["digest"]]
    problems += [f"{letter}: the value is not the one its digest was made of" for letter in wrong]
    if key_of(kind, [s["value"] for s in record["segments"]], record["beside"]) != record["key"]:
        problems.append("the key is not that of its values")
    return problems

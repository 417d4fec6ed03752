"""Whether the versions in `metadata/` hold together, read from the full records and never from the index alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.errors import ArtifactError, PipelineError
from pipeline.records import fingerprint
from pipeline.version_files import entry_of, load_entries, read_assignments, record_path, record_sizes
from pipeline.version_inputs import LETTERS, key_of
from pipeline.version_names import KINDS, format_version, names_of, parse_name

Records = dict[tuple[str, str], Mapping[str, Any]]
_STATUS = ("done", "failed")


def verify(metadata: Path) -> list[str]:
    """Every problem found, one line each; empty when all is well. Nothing to check is well too."""
    records, problems = _read_all(metadata)
    problems += [problem for place, record in records.items() for problem in _record_problems(record, *place)]
    problems += _prefix_problems(records)
    problems += _key_problems(records)
    problems += _lineage_problems(records)
    problems += _index_problems(metadata, records)
    problems += _card_problems(metadata, records)
    try:
        read_assignments(metadata)
    except ArtifactError as error:
        problems.append(str(error))
    return problems


def _read_all(metadata: Path) -> tuple[Records, list[str]]:
    records: Records = {}
    problems = []
    for (kind, id), size in sorted(record_sizes(metadata).items()):
        path = record_path(metadata, kind, id)
        if size == 0:
            problems.append(f"{path.name}: empty: a run was cut off while recording it; its ID stays taken")
            continue
        try:
            record = yaml_text.read(path)
            entry_of(record, size)
        except ArtifactError as error:
            problems.append(str(error))
        except (KeyError, TypeError) as error:
            problems.append(f"{path.name}: damaged: {error} is missing or wrong")
        else:
            records[kind, id] = record
    return records, problems


def _record_problems(record: Mapping[str, Any], kind: str, id: str) -> list[str]:
    """What one record says about itself: names, numbers, digests, key."""
    where = f"{kind}-{id}.yaml"
    problems = []
    if (record["kind"], record["id"]) != (kind, id):
        problems.append(f"{where}: describes {record['kind']} {record['id']!r}; the ID must be the file's, in quotes")
    try:
        name = parse_name(record["name"])
        if (name.kind, name.id) != (kind, id) or list(names_of(name.kind, name.id, name.version, name.data)) != record["names"]:
            problems.append(f"{where}: the name {record['name']} is not one of {kind} {id}")
        if record["version"] != format_version(name.version) + (f"-data-{format_version(name.data)}" if name.data else ""):
            problems.append(f"{where}: the name {record['name']} and the version {record['version']} differ")
        if record["segments"] and [s["number"] for s in record["segments"]] != list(name.version):
            problems.append(f"{where}: the segments' numbers are not those of {record['version']}")
    except (PipelineError, TypeError) as error:
        problems.append(f"{where}: {error}")
    if record["status"] not in _STATUS:
        problems.append(f"{where}: the status {record['status']!r} is not one of {', '.join(_STATUS)}")
    if [s["segment"] for s in record["segments"]] != ([] if kind == "run" else list(LETTERS)):
        problems.append(f"{where}: the segments are not A to D")
    problems += [
        f"{where}: {s['segment']}: the value is not the one its digest was made of"
        for s in record["segments"]
        if fingerprint(s["value"]) != s["digest"]
    ]
    if key_of(kind, [s["value"] for s in record["segments"]], record["beside"]) != record["key"]:
        problems.append(f"{where}: the key is not that of its values")
    return problems


def _prefix_problems(records: Records) -> list[str]:
    """A number under its parents must always mean the same value, and a value must always have the same number."""
    problems = []
    meanings: dict[tuple[Any, ...], tuple[Any, str]] = {}
    for (kind, id), record in records.items():
        parents: tuple[str, ...] = ()
        for segment in record["segments"]:
            number, digest = segment["number"], segment["digest"]
            for asked, told in (((kind, parents, "number", number), digest), ((kind, parents, "value", digest), number)):
                first, where = meanings.setdefault(asked, (told, id))
                if first != told:
                    problems.append(f"{kind}-{id}.yaml: {segment['segment']} {number} does not mean what it means in {kind}-{where}.yaml")
                    break
            parents = (*parents, digest)
    return problems


def _key_problems(records: Records) -> list[str]:
    first: dict[tuple[str, str], str] = {}
    return [
        f"{kind}-{id}.yaml: has the key of {kind}-{first[kind, record['key']]}.yaml; one of them should not exist"
        for (kind, id), record in records.items()
        if record["status"] == "done" and first.setdefault((kind, record["key"]), id) != id
    ]


def _lineage_problems(records: Records) -> list[str]:
    problems = []
    needed = {"dataset": (), "model": ("dataset",), "run": ("model", "dataset")}
    for (kind, id), record in records.items():
        lineage = record.get("lineage") or {}
        problems += [f"{kind}-{id}.yaml: its lineage names no {role}" for role in needed[kind] if role not in lineage]
        for role, part in lineage.items():
            found = records.get((role, part["id"]))
            if found is None or (found["name"], found["key"]) != (part["name"], part["key"]):
                problems.append(f"{kind}-{id}.yaml: its {role} {part['name']} is not recorded" + (" so" if found else ""))
    return problems


def _index_problems(metadata: Path, records: Records) -> list[str]:
    try:
        entries, doubt = load_entries(metadata)
    except ArtifactError:
        return []  # a record's own problem, already named
    if doubt:
        return [f"index.jsonl: {doubt}; the next recorded version rebuilds it"]
    return [
        f"index.jsonl: the line of {entry.kind}-{entry.id} differs from the record; delete the file, the next version rebuilds it"
        for entry in entries
        if (record := records.get((entry.kind, entry.id))) and entry != entry_of(record, entry.record_bytes)
    ]


def _card_problems(metadata: Path, records: Records) -> list[str]:
    """The cards must name versions that are recorded."""
    problems = []
    for kind in KINDS:
        path = metadata / f"{kind}_card.yaml"
        if not path.exists():
            if any(k == kind and record["status"] == "done" for (k, _), record in records.items()):
                problems.append(f"{path.name}: missing, although {kind} versions are recorded")
            continue
        try:
            block = yaml_text.read(path)["pipeline"]
            named = [(block["id"], block["name"]), *((entry["id"], entry["name"]) for entry in block["versions"])]
        except (ArtifactError, KeyError, TypeError) as error:
            problems.append(f"{path.name}: damaged: {error}")
            continue
        recorded = {(record["id"], record["name"]) for (k, _), record in records.items() if k == kind}
        missing = [(id, name) for id, name in dict.fromkeys(named) if (id, name) not in recorded]
        problems += [f"{path.name}: {name} (ID {id}) is not recorded in versions/" for id, name in missing]
    return problems

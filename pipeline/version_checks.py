"""Whether the versions in `metadata/` hold together, read from the full records and never from the index alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.errors import ArtifactError
from pipeline.version_facts import RESTORE, Facts, damage, read_facts
from pipeline.version_files import IndexEntry, read_assignments, read_index, record_files, record_path, strange_files, versions_folder
from pipeline.version_inputs import LETTERS
from pipeline.version_names import KINDS, Kind
from pipeline.version_verified import Verified, digest_of, stamp_of

Place = tuple[Kind, str]
_NEEDED: Mapping[Kind, tuple[Kind, ...]] = {"dataset": (), "model": ("dataset",), "run": ("model", "dataset")}


def verify(metadata: Path, *, full: bool = False, cache: Path | None = None) -> list[str]:
    """Every problem found, one line each, with its file and what to do; empty when all is well. Nothing to check is well too.

    Records that an earlier call found good are not read again while size, modification and change time are the same, or, where the times
    are not (after a `git checkout`), while the bytes have the same SHA-256. All rules over several records, the index, the cards and the
    splits are checked each time. What this can't see: bytes that changed without the file system's knowledge (a failing disk), and a
    cache that someone edited. `full` sees those.

    Args:
        full: read every record, whatever was found before.
        cache: where what was found good is kept, a file outside `metadata`; None: nowhere, and every record is read.
    """
    files = record_files(metadata)
    index, doubt = read_index(metadata, {place: status.st_size for place, status in files.items() if status.st_size})
    verified = Verified(versions_folder(metadata), cache, dict(index.values()), forget=full)
    records: dict[Place, Facts] = {}
    problems: list[str] = []
    for place in sorted(files):
        name, stamp = f"{'-'.join(place)}.yaml", stamp_of(files[place])
        facts = verified.facts(name, stamp)
        if facts is None:
            path = record_path(metadata, *place)
            digest = digest_of(path)  # before the reading: a change in between is seen next time
            facts, own = read_facts(path, *place, stamp.size)
            problems += own
            if facts and digest and not own:
                verified.keep(name, stamp, digest, facts)
        if facts:
            records[place] = facts
    problems += [
        f"{name}: is no record's name, so nothing reads it; delete it, or call it KIND-NNNN.yaml with the ID that it holds"
        for name in strange_files(metadata)
    ]
    problems += _prefix_problems(records)
    problems += _key_problems(records)
    problems += _lineage_problems(records)
    problems += [f"index.jsonl: {doubt}; `pipeline run` writes it again"] if doubt else []
    problems += _index_problems(records, {place: entry for place, (_, entry) in index.items()})
    problems += _card_problems(metadata, records)
    try:
        read_assignments(metadata)
    except ArtifactError as error:
        problems.append(f"{str(error).removeprefix(f'{versions_folder(metadata)}/')}; {error.hint}")
    verified.save()
    return problems


def _prefix_problems(records: Mapping[Place, Facts]) -> list[str]:
    """A number under its parents must always mean the same value, and a value must always have the same number."""
    problems = []
    meanings: dict[tuple[Any, ...], tuple[Any, str]] = {}
    for (kind, id), facts in records.items():
        parents: tuple[str, ...] = ()
        for letter, number, digest in zip(LETTERS, facts.numbers, facts.entry.segments, strict=False):
            for asked, told in (((kind, parents, "number", number), digest), ((kind, parents, "value", digest), number)):
                first, where = meanings.setdefault(asked, (told, id))
                if first != told:
                    problems.append(
                        f"{kind}-{id}.yaml: {letter} {number} does not mean what it means in {kind}-{where}.yaml; {RESTORE}, or, where two "
                        "branches gave the number out, keep one of the two and run the other branch's configuration again"
                    )
                    break
            parents = (*parents, digest)
    return problems


def _key_problems(records: Mapping[Place, Facts]) -> list[str]:
    first: dict[tuple[str, str], str] = {}
    return [
        f"{kind}-{id}.yaml: has the key of {kind}-{first[kind, facts.entry.key]}.yaml; one of them should not exist: write "
        "`status: abandoned` in the one that no tag and no card names, and its ID stays taken"
        for (kind, id), facts in records.items()
        if facts.entry.status == "done" and first.setdefault((kind, facts.entry.key), id) != id
    ]


def _lineage_problems(records: Mapping[Place, Facts]) -> list[str]:
    problems = []
    known: dict[tuple[str, str], tuple[str, str]] = {place: (facts.entry.name, facts.entry.key) for place, facts in records.items()}
    for (kind, id), facts in records.items():
        roles = {role for role, *_ in facts.lineage}
        problems += [f"{kind}-{id}.yaml: its lineage names no {role}; {RESTORE}" for role in _NEEDED[kind] if role not in roles]
        for role, part, name, key in facts.lineage:
            found = known.get((role, part))
            if found != (name, key):
                what = f"its {role} {name} is not recorded" + (f" so in {role}-{part}.yaml" if found else "")
                problems.append(f"{kind}-{id}.yaml: {what}; restore the one of the two that was changed or lost with `git checkout`")
    return problems


def _index_problems(records: Mapping[Place, Facts], entries: Mapping[Place, IndexEntry]) -> list[str]:
    return [
        f"index.jsonl: the line of {kind}-{id} differs from the record; delete the file, `pipeline run` writes it again"
        for (kind, id), entry in entries.items()
        if (facts := records.get((kind, id))) and entry is not facts.entry and entry != facts.entry
    ]


def _card_problems(metadata: Path, records: Mapping[Place, Facts]) -> list[str]:
    """The cards must name versions that are recorded."""
    problems = []
    for kind in KINDS:
        path = metadata / f"{kind}_card.yaml"
        again = f"{RESTORE}, or delete it: `pipeline run` writes it again"
        if not path.exists():
            if any(k == kind and facts.entry.status == "done" for (k, _), facts in records.items()):
                problems.append(f"{path.name}: missing, although {kind} versions are recorded; {RESTORE}, or let `pipeline run` write it")
            continue
        try:
            block = yaml_text.read(path)["pipeline"]
            named = [(str(entry["id"]), str(entry["name"])) for entry in (block, *block["versions"])]
        except ArtifactError as error:
            problems.append(damage(path, error, again))
            continue
        except (KeyError, TypeError, RecursionError) as error:
            problems.append(f"{path.name}: damaged: {error} is missing or wrong; {again}")
            continue
        recorded = {(facts.entry.id, facts.entry.name) for (k, _), facts in records.items() if k == kind}
        missing = [(id, name) for id, name in dict.fromkeys(named) if (id, name) not in recorded]
        problems += [f"{path.name}: {name} (ID {id}) is not recorded in versions/; {again}" for id, name in missing]
    return problems

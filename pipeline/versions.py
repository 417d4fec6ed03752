"""Versions that derive themselves: a segment is the number of a distinct value under its parents, identity is a key over inputs.

`Registry.load(metadata)`, then `plan` (writes nothing) before a stage and `record` after it. Names, inputs, files and checks live in the
`version_*` modules and are re-exported here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.errors import UserError
from pipeline.records import fingerprint, to_plain
from pipeline.version_branch import BranchState, default_branch_state
from pipeline.version_changes import compared
from pipeline.version_checks import verify
from pipeline.version_files import (
    IndexEntry,
    VersionTakenError,
    create_record,
    entry_of,
    load_entries,
    read_assignments,
    record_ids,
    record_path,
    record_sizes,
    write_assignments,
    write_index,
)
from pipeline.version_inputs import LETTERS, Method, VersionInputs, dataset_inputs, model_inputs, run_inputs
from pipeline.version_names import (
    KINDS,
    Kind,
    Version,
    VersionName,
    format_version,
    is_name,
    names_of,
    names_replaced,
    next_id,
    parse_name,
    parse_version,
)
from pipeline.version_reservations import Reservation, RunReservation, read_reservation

__all__ = [
    "KINDS",
    "Allocation",
    "BranchState",
    "IndexEntry",
    "Kind",
    "Method",
    "Registry",
    "Reservation",
    "RunReservation",
    "Version",
    "VersionInputs",
    "VersionName",
    "VersionTakenError",
    "dataset_inputs",
    "default_branch_state",
    "format_version",
    "model_inputs",
    "names_of",
    "parse_name",
    "parse_version",
    "read_assignments",
    "read_reservation",
    "run_inputs",
    "verify",
    "write_assignments",
]  # fmt: skip

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Allocation:
    """The version that inputs have (`existing`) or will get. `why` says it in sentences."""

    kind: Kind
    id: str
    names: tuple[str, ...]
    version: str  # "1.0.0.0"; of a run "1.0.0.0-data-1.0.0.0"
    key: str
    segments: tuple[Mapping[str, Any], ...]  # segment, number, digest, value
    beside: Mapping[str, Any]
    lineage: Mapping[str, Mapping[str, str]]  # role -> id, name, version, key
    existing: bool
    provisional: bool = False  # not on the default branch: never recorded, tagged or published
    override: str | None = None
    why: tuple[str, ...] = field(default=())
    first_new: tuple[int, ...] = ()  # its numbers down to the first that had no meaning before; empty when all had one

    @property
    def name(self) -> str:
        """The name that stands for the version where one must do; of a dataset, that of its training split."""
        return self.names[0]

    def as_lineage(self) -> dict[str, str]:
        return {"id": self.id, "name": self.name, "version": self.version, "key": self.key}

    def described(self) -> dict[str, Any]:
        """The part of the record that the inputs decide."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": self.kind,
            "id": self.id,
            "name": self.name,
            "names": list(self.names),
            "version": self.version,
            "key": self.key,
            "segments": to_plain(self.segments),
            "beside": to_plain(self.beside),
            "lineage": to_plain(self.lineage),
            "override": self.override,
        }


class Registry:
    """The versions under one metadata folder, with those planned in this process: two plans never get the same ID."""

    def __init__(
        self,
        metadata: Path,
        entries: list[IndexEntry],
        rebuilt: str | None = None,
        *,
        held: Iterable[Reservation] = (),
        ours: Iterable[Reservation] = (),
        tags: Iterable[str] = (),
    ) -> None:
        self.metadata = metadata
        self.rebuilt = rebuilt  # why the index could not be used; None when it could
        self._entries = entries
        files = record_ids(metadata)
        self._taken = {kind: {id for k, id in files if k == kind} for kind in KINDS}
        self._ours = {reservation.kind: reservation for reservation in ours}
        self._planned: dict[tuple[Kind, str], Allocation] = {}
        self._done = {(entry.kind, entry.key): entry for entry in reversed(entries) if entry.status == "done"}  # of two the first holds
        self._numbers: defaultdict[tuple[Kind, tuple[str, ...]], dict[str, int]] = defaultdict(dict)
        for entry in entries:
            if entry.segments:
                self._learn(entry.kind, entry.segments, parse_version(entry.version))
        for other in held:
            self._taken[other.kind].add(other.id)
            if other.digests:
                self._learn(other.kind, other.digests, parse_version(str(other.described["version"])))
        for name in filter(is_name, tags):
            self._taken[parse_name(name).kind].add(name[:4])

    @classmethod
    def load(
        cls, metadata: Path, *, held: Iterable[Reservation] = (), ours: Iterable[Reservation] = (), tags: Iterable[str] = ()
    ) -> Registry:
        """
        Args:
            held: versions that are held for other runs: their IDs and numbers are not free.
            ours: what is held for this run: the versions of the same keys, and the IDs for other ones.
            tags: names that a remote has; an ID among them is not free, even where its record was lost.

        Raises:
            ArtifactError: a record is damaged and the index can't stand in for it.
        """
        return cls(metadata, *load_entries(metadata), held=held, ours=ours, tags=tags)

    def versions(self, kind: Kind) -> tuple[IndexEntry, ...]:
        """Recorded versions in the order of their IDs, failed ones included."""
        return tuple(entry for entry in self._entries if entry.kind == kind)

    def find(self, kind: Kind, key: str) -> IndexEntry | None:
        """The version that is recorded as done under this key."""
        return self._done.get((kind, key))

    def history(self, kind: Kind, last: int = 20) -> list[dict[str, str]]:
        """The last versions for a card, oldest first."""
        shown = ("id", "name", "version", "status", "created", "key")
        return [{name: getattr(entry, name) for name in shown} for entry in self.versions(kind)[-last:]]

    def read(self, kind: Kind, id: str) -> dict[str, Any]:
        """One full record.

        Raises:
            ArtifactError: missing or damaged.
        """
        return yaml_text.read(record_path(self.metadata, kind, id))

    # --- plan --------------------------------------------------------------------------------------------------------

    def plan(
        self,
        inputs: VersionInputs,
        *,
        lineage: Mapping[str, Allocation] | None = None,
        override: str | None = None,
        provisional: bool = False,
    ) -> Allocation:
        """The version of these inputs: the one that has their key, else a new one. Nothing is written.

        Args:
            lineage: of a model {"dataset": …}; of a run {"model": …, "dataset": …}, whose numbers it takes.
            override: "A.B.C.D", numbers chosen by hand for values that have none yet.
            provisional: the branch may not allocate. A provisional part makes the whole provisional.

        Raises:
            UserError: no ID is left, or the override gives a number two meanings.
        """
        key = inputs.key
        if entry := self._done.get((inputs.kind, key)):
            return self._existing(entry, override)
        if planned := self._planned.get((inputs.kind, key)):
            return planned
        mine = self._ours.get(inputs.kind)
        if mine and mine.key == key and not provisional and (mine.existing or mine.id not in self._taken[inputs.kind]):
            self._planned[inputs.kind, key] = reserved = _reserved(mine)
            self._taken[inputs.kind].add(reserved.id)
            return reserved
        parts = lineage or {}
        digests = tuple(fingerprint(values) for values in inputs.segments)
        first_new = self._first_new(inputs.kind, digests)
        version, names, numbers = self._name(inputs.kind, digests, parts, override)
        new = Allocation(
            inputs.kind, names[0][:4], names, version, key, _segments(inputs, digests, numbers), inputs.beside,
            {role: part.as_lineage() for role, part in parts.items()}, existing=False, override=override,
            provisional=provisional or any(part.provisional for part in parts.values()),
            first_new=numbers[: first_new + 1] if first_new is not None else (),
        )  # fmt: skip
        new = replace(new, why=self._why(new))
        self._planned[new.kind, key] = new
        self._taken[new.kind].add(new.id)
        if numbers:
            self._learn(new.kind, digests, parse_version(version))
        return new

    def _existing(self, entry: IndexEntry, override: str | None) -> Allocation:
        record = self.read(entry.kind, entry.id)
        why = [f"unchanged: reused {entry.name} (same inputs, key {entry.key[:15]}…)"]
        if override and override != entry.version:
            why.append(f"the override {override} does nothing: these inputs have version {entry.version} already")
        return Allocation(
            entry.kind, entry.id, tuple(record["names"]), entry.version, entry.key, tuple(record["segments"]), record["beside"],
            record["lineage"], existing=True, override=record["override"], why=tuple(why),
        )  # fmt: skip

    def _name(
        self, kind: Kind, digests: tuple[str, ...], parts: Mapping[str, Allocation], override: str | None
    ) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
        """Version text, names and the numbers of the segments (none for a run)."""
        id = self._free_id(kind)
        if kind == "run":
            if override:
                raise UserError("a run can't be given a version: it is named after its model and dataset")
            model, data = parse_version(parts["model"].version), parse_version(parts["dataset"].version)
            return f"{format_version(model)}-data-{format_version(data)}", names_of(kind, id, model, data), ()
        version = self._derive(kind, digests, parse_version(override) if override else None)
        return format_version(version), names_of(kind, id, version), version

    def _derive(self, kind: Kind, digests: tuple[str, ...], chosen: Version | None) -> Version:
        numbers, problems = [], []
        for depth, digest in enumerate(digests):
            known = self._numbers[kind, digests[:depth]]
            number = known.get(digest)
            if number is None:
                free = max(known.values(), default=-1 if depth else 0) + 1  # A starts at 1, the others at 0
                number = chosen[depth] if chosen else free
                if number in known.values() or number < (depth == 0):
                    problems.append(f"{LETTERS[depth]} can't be {number}, which has another meaning; the next free number is {free}")
            elif chosen and chosen[depth] != number:
                problems.append(f"{LETTERS[depth]} can't be {chosen[depth]}: this value is {number} already")
            numbers.append(number)
        if chosen and problems:
            raise UserError(f"override {format_version(chosen)}: {'; '.join(problems)}", hint="change the override, or remove it")
        a, b, c, d = numbers
        return a, b, c, d

    def _free_id(self, kind: Kind) -> str:
        mine = self._ours.get(kind)
        if mine and not mine.existing and mine.id not in self._taken[kind]:
            return mine.id  # held for this run, which came to ask for something else (a model set instead of training, say)
        return next_id(kind, self._taken[kind])

    def _first_new(self, kind: Kind, digests: tuple[str, ...]) -> int | None:
        """The depth of the first value that has no number yet."""
        return next((depth for depth, digest in enumerate(digests) if digest not in self._numbers[kind, digests[:depth]]), None)

    def _learn(self, kind: Kind, digests: tuple[str, ...], version: Version) -> None:
        for depth, (digest, number) in enumerate(zip(digests, version, strict=True)):
            self._numbers[kind, digests[:depth]].setdefault(digest, number)

    # --- record ------------------------------------------------------------------------------------------------------

    def record(
        self,
        allocation: Allocation,
        *,
        created: str,
        status: str = "done",
        artifact: str | None = None,
        machine: Mapping[str, Any] | None = None,
        commit: str | None = None,
        note: str | None = None,
        asked: str | None = None,
    ) -> dict[str, Any]:
        """Writes the version and its index line, and returns the record. A provisional one is returned and not written; of an existing
        one only a build that is not there yet is added, so that the same result on the same machine changes no file.

        Args:
            created: ISO time, UTC.
            status: "done", or "failed" (the ID is used up either way).
            artifact: digest of what came out.
            asked: key of the version that was asked for, where this one was made instead: the same wish finds it again.
            machine: dtype, threads, package versions and the like.

        Raises:
            VersionTakenError: another run recorded a version of this kind since `load`.
            OutputError: the folder can't be written.
        """
        build = {"artifact": artifact, "created": created, "machine": to_plain(machine or {})}
        if allocation.existing:
            return self._add_build(allocation, build)
        record = {
            **allocation.described(),
            "status": "provisional" if allocation.provisional else status,
            "created": created,
            "commit": commit,
            "note": note,
            "why": list(allocation.why),
            "builds": [build] if artifact else [],
            **({"asked": asked} if asked else {}),
        }
        if allocation.provisional:
            return record
        written = {id for (kind, id), size in record_sizes(self.metadata).items() if size and kind == allocation.kind}
        if new := written - {entry.id for entry in self.versions(allocation.kind)}:
            raise VersionTakenError(f"{allocation.kind}-{min(new)} was recorded by another run meanwhile", hint="run again")
        self._keep(record, create_record(self.metadata, record))
        self._planned.pop((allocation.kind, allocation.key), None)
        return record

    def adopt(self, record: Mapping[str, Any], renamed: Mapping[str, Mapping[str, str]]) -> dict[str, Any]:
        """Writes a version that was made beside this history, under the ID and the numbers that it gets here: its own, where they are free.
        Where its key is recorded already, that version is given back, with this one's builds.

        Args:
            renamed: key -> lineage entry of the versions that it stands on, as they are called here.

        Raises:
            VersionTakenError, OutputError
        """
        kind: Kind = record["kind"]
        if (entry := self._done.get((kind, record["key"]))) and record["status"] == "done":
            return self._add_builds(kind, entry.id, record["builds"])
        lineage = {role: dict(renamed.get(part["key"], part)) for role, part in record["lineage"].items()}
        digests = tuple(str(segment["digest"]) for segment in record["segments"])
        if kind == "run":
            model, data = (parse_version(lineage[role]["version"]) for role in ("model", "dataset"))
            version, segments = f"{format_version(model)}-data-{format_version(data)}", []
        else:
            model, data = self._numbers_like(kind, digests, parse_version(record["version"])), None
            version = format_version(model)
            segments = [{**segment, "number": number} for segment, number in zip(record["segments"], model, strict=True)]
        id = record["id"] if record["id"] not in self._taken[kind] else next_id(kind, self._taken[kind])
        names = names_of(kind, id, model, data)
        called = dict(zip(record["names"], names, strict=True))
        called |= {part["name"]: lineage[role]["name"] for role, part in record["lineage"].items()}
        why = [names_replaced(sentence, called) for sentence in record["why"]]
        moved = [f"was {record['name']} where it was made; that name was taken meanwhile"] if names[0] != record["name"] else []
        own = {"id": id, "name": names[0], "names": list(names), "version": version, "segments": segments, "lineage": lineage}
        written = {**record, **own, "why": [*why, *moved]}
        self._keep(written, create_record(self.metadata, written))
        self._taken[kind].add(id)
        if segments:
            self._learn(kind, digests, model)
        return written

    def _numbers_like(self, kind: Kind, digests: tuple[str, ...], wanted: Version) -> Version:
        try:
            return self._derive(kind, digests, wanted)
        except UserError:
            return self._derive(kind, digests, None)

    def _add_builds(self, kind: Kind, id: str, builds: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The recorded version, with the builds that it had not yet."""
        record = self.read(kind, id)
        known = [(build["artifact"], build["machine"]) for build in record["builds"]]
        if new := [dict(build) for build in builds if (build["artifact"], build["machine"]) not in known]:
            record["builds"] += new
            path = record_path(self.metadata, kind, id)
            yaml_text.write(path, record)
            self._keep(record, path.stat().st_size)
        return record

    def _add_build(self, allocation: Allocation, build: Mapping[str, Any]) -> dict[str, Any]:
        if not record_path(self.metadata, allocation.kind, allocation.id).exists():
            # recorded after this checkout was made: whoever records the run adds the build
            known = {"status": "done", "created": build["created"], "commit": None, "note": None, "why": list(allocation.why)}
            return {**allocation.described(), **known, "builds": [dict(build)]}
        record = self._add_builds(allocation.kind, allocation.id, [build] if build["artifact"] else [])
        if self.rebuilt:
            write_index(self.metadata, self._entries)
        return record

    def _keep(self, record: Mapping[str, Any], size: int) -> None:
        entry = entry_of(record, size)
        self._entries = [e for e in self._entries if (e.kind, e.id) != (entry.kind, entry.id)] + [entry]
        if entry.status == "done":
            self._done[entry.kind, entry.key] = entry
        write_index(self.metadata, self._entries)
        self.rebuilt = None

    # --- explain -----------------------------------------------------------------------------------------------------

    def explain(self, kind: Kind, id: str | None = None) -> list[str]:
        """Sentences on how a recorded version (the last one) differs from the one before it.

        Raises:
            UserError: there is no such version.
        """
        entries = self.versions(kind)
        entry = next((e for e in reversed(entries) if id in (None, e.id)), None)
        if entry is None:
            raise UserError(f"no {kind} version {id} is recorded" if id else f"no {kind} version is recorded yet")
        record = self.read(kind, entry.id)
        return [f"{entry.name} ({entry.status})", *compared(record, [e for e in entries if e.id < entry.id], self.read)]

    def _why(self, new: Allocation) -> tuple[str, ...]:
        sentences = [f"new: {new.name}", *compared(new.described(), self.versions(new.kind), self.read)]
        if new.override:
            sentences.append(f"{new.override} was chosen by an override")
        if new.provisional:
            sentences.append("provisional: only the default branch records, tags and publishes versions")
        return tuple(sentences)


def _reserved(mine: Reservation) -> Allocation:
    told = mine.described
    why = (f"unchanged: recorded meanwhile as {mine.name}",) if mine.existing else tuple(mine.why) or (f"reserved: {mine.name}",)
    return Allocation(
        mine.kind, mine.id, tuple(told["names"]), told["version"], mine.key, tuple(told["segments"]), told["beside"], told["lineage"],
        existing=mine.existing, override=told.get("override"), why=why,
    )  # fmt: skip


def _segments(inputs: VersionInputs, digests: tuple[str, ...], numbers: tuple[int, ...]) -> tuple[dict[str, Any], ...]:
    return tuple(
        {"segment": letter, "number": number, "digest": digest, "value": to_plain(value)}
        for letter, number, digest, value in zip(LETTERS, numbers, digests, inputs.segments, strict=False)
    )

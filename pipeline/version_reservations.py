"""IDs and numbers that are held for a run before it is recorded.

On the remote a reservation is one or two annotated tags, made once and never moved: `reserved/KIND/id-NNNN` for the ID, and
`reserved/KIND/number-A.B…`, down to the first new number, so that two runs never give one number two meanings. For the run itself it is
`reservation.json` in the output folder. Both hold settings and digests as the record will, and no text of a record.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from pipeline.errors import ArtifactError, UserError
from pipeline.ports import RESERVED_TAGS
from pipeline.records import SPLITS, Split, canonical
from pipeline.store import read_json, write_json
from pipeline.version_names import Kind, names_of, parse_name

FILE = "reservation.json"
SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Reservation:
    """One version held for one run. The three kinds of one run share a nonce."""

    kind: Kind
    id: str
    described: Mapping[str, Any]  # what the version's record will say of its inputs: names, version, key, segments, lineage
    nonce: str
    run: str  # who holds it, for people and to know a second attempt by
    created: str  # ISO, UTC, by the clock of who reserved
    expires: str
    why: tuple[str, ...] = ()  # what changed, for the record; not in the tags
    assigned: Mapping[str, Split] = field(default_factory=dict)  # of a dataset: row key -> split of the rows that no version had before
    existing: bool = False  # the version is recorded already: nothing is held, the run is told which one it is

    @property
    def key(self) -> str:
        return str(self.described["key"])

    @property
    def name(self) -> str:
        return str(self.described["name"])

    @property
    def digests(self) -> tuple[str, ...]:
        return tuple(str(segment["digest"]) for segment in self.described["segments"])

    @property
    def id_tag(self) -> str:
        return f"{RESERVED_TAGS}{self.kind}/id-{self.id}"

    def message(self) -> str:
        """The text of its tags."""
        told = {name: getattr(self, name) for name in ("kind", "id", "nonce", "run", "created", "expires", "described")}
        if self.assigned:
            told["splits"] = {split: sorted(row for row, own in self.assigned.items() if own == split) for split in SPLITS}
        return f"{self.name} is held for {self.run} until {self.expires}\n\n{canonical({'schema_version': SCHEMA_VERSION, **told})}\n"

    def expired(self, now: datetime) -> bool:
        return datetime.fromisoformat(self.expires) < now


def number_tag(kind: Kind, numbers: Iterable[int]) -> str:
    return f"{RESERVED_TAGS}{kind}/number-{'.'.join(map(str, numbers))}"


@dataclass(frozen=True, slots=True)
class Held:
    """What the remote's tags say."""

    reservations: tuple[Reservation, ...]
    tags: Mapping[tuple[Kind, str, str], tuple[str, ...]]  # (kind, ID, nonce) -> the tags of that reservation
    unread: tuple[str, ...]  # tags under reserved/ that are not ours to understand

    def tags_of(self, reservation: Reservation) -> tuple[str, ...]:
        return self.tags[reservation.kind, reservation.id, reservation.nonce]


def read_tags(messages: Mapping[str, str]) -> Held:
    """`messages`: tag -> its text."""
    found: dict[tuple[Kind, str, str], Reservation] = {}
    tags: dict[tuple[Kind, str, str], list[str]] = {}
    unread = []
    for tag, text in messages.items():
        reservation = _parsed(text)
        if reservation is None:
            unread.append(tag)
            continue
        place = (reservation.kind, reservation.id, reservation.nonce)
        found.setdefault(place, reservation)
        tags.setdefault(place, []).append(tag)
    return Held(tuple(found.values()), {place: tuple(names) for place, names in tags.items()}, tuple(unread))


def _parsed(text: str) -> Reservation | None:
    try:
        told = json.loads(text.partition("\n\n")[2])
        fields = {name: str(told[name]) for name in ("kind", "id", "nonce", "run", "created", "expires")}
        assigned = {str(row): split for split in SPLITS for row in told.get("splits", {}).get(split, [])}
        reservation = Reservation(described=told["described"], assigned=assigned, **fields)  # type: ignore[arg-type]
        name = parse_name(reservation.name)
        names = list(names_of(name.kind, name.id, name.version, name.data))
        if (name.kind, name.id, names) != (reservation.kind, reservation.id, reservation.described["names"]):
            return None
        for needed in ("version", "key", "beside", "lineage"):
            reservation.described[needed]
        if len(reservation.digests) != (0 if name.kind == "run" else len(name.version)):
            return None
        for moment in (reservation.created, reservation.expires):
            _ = datetime.fromisoformat(moment) < datetime.now(UTC)  # a time without a zone can't be compared
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, UserError):
        return None
    return reservation


# --- reservation.json ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class RunReservation:
    """What a run is told: its versions, and the splits that were recorded after its checkout was made."""

    nonce: str | None  # None: nothing is held, all three versions exist
    allocations: tuple[Reservation, ...]
    assigned: Mapping[str, Split]  # row key -> split, beyond those of the checkout's metadata


def write_reservation(folder: Path, reservation: RunReservation) -> None:
    allocations = [replace(allocation, assigned={}) for allocation in reservation.allocations]  # the run assigns its rows itself
    told = {"nonce": reservation.nonce, "allocations": allocations, "assigned": reservation.assigned}
    write_json(folder / FILE, {"schema_version": SCHEMA_VERSION, **told})


def read_reservation(folder: Path) -> RunReservation | None:
    """None where there is none.

    Raises:
        ArtifactError: damaged.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        told = read_json(path)
        allocations = tuple(Reservation(**allocation) for allocation in told["allocations"])
        assigned = {str(row): cast(Split, split) for row, split in told["assigned"].items()}
        if unknown := set(assigned.values()) - set(SPLITS):
            raise ValueError(f"{unknown.pop()} is no split")
        return RunReservation(told["nonce"], allocations, assigned)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(f"{path}: damaged: {error}", hint="delete it, or reserve again with `pipeline version reserve`") from error

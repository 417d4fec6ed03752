"""`pipeline version reserve`: looks whether anything changed; if so, holds IDs and numbers on the remote before the run begins."""

from __future__ import annotations

import random
import secrets
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

from pipeline import yaml_text
from pipeline.errors import ArtifactError, BackendError, PushLostError
from pipeline.ports import WAITING_BRANCHES, Remote, RemoteState
from pipeline.records import Split
from pipeline.version_files import IndexEntry, create_record, load_entries, record_path, write_index
from pipeline.version_names import KINDS, Kind
from pipeline.version_reservations import Held, Reservation, number_tag, read_tags
from pipeline.versions import Allocation, Registry, verify

TRIES = 40  # pushes lost to others, before giving up; each was somebody's success


@dataclass(frozen=True, slots=True)
class Reserved:
    """What came of it. Nothing is held when all versions exist."""

    changed: bool
    nonce: str | None
    allocations: Mapping[Kind, Reservation]
    why: tuple[str, ...]
    abandoned: tuple[str, ...] = ()  # names of versions whose runs never came back, now recorded as such
    remarks: tuple[str, ...] = ()
    dry_run: bool = False


@dataclass(frozen=True, slots=True)
class Planned:
    """`assigned`: row key -> split of the dataset's rows that no version had before."""

    allocations: Mapping[Kind, Allocation]
    assigned: Mapping[str, Split] = field(default_factory=dict)


# (the history, the metadata folder of the remote's head, splits that runs under way gave to rows) -> the versions to be made
Plan = Callable[[Registry, Path, Mapping[str, Split]], Planned]


def reserve(
    remote: Remote,
    folder: str,
    plan: Plan,
    *,
    run: str,
    hold: timedelta,
    dry_run: bool = False,
    pull_request: bool = False,
    verified: Path | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> Reserved:
    """Holds the versions that `plan` gives and that are not recorded, for `hold`. A second attempt of the same run gets what the first
    held.

    Args:
        folder: the metadata folder, as the remote's commits name it.
        run: who reserves; the same text means the same run.
        pull_request: commits go through pull requests here, so that what was abandoned is left for the next record to say.
        verified: where what was found whole before is noted, so that not every record is read again.

    Raises:
        ArtifactError: the history on the remote contradicts itself, or it or a reservation there is damaged.
        BackendError: the remote refuses or can't be reached.
        UserError: no ID is left.
    """
    for wait in pauses():
        state = remote.look()
        with metadata_at(remote, state, folder) as metadata:
            told = now()
            heal_doubles(metadata)
            require_sound(metadata, verified, "the recorded versions contradict one another")  # better said now than after the run
            settled = settle(metadata, state, told, writes=not (dry_run or pull_request))
            mine = {reservation.kind: reservation for reservation in settled.live if reservation.run == run}
            others = [reservation for reservation in settled.live if reservation.run != run]
            registry = Registry.load(metadata, held=others, ours=mine.values(), tags=state.tags)
            # rows get the split that a run under way gave them: the same inputs must give the same dataset, whoever ends first
            splits = {row: split for r in sorted(settled.live, key=lambda r: r.id, reverse=True) for row, split in r.assigned.items()}
            made = plan(registry, metadata, splits)
            planned = made.allocations
            fresh = {kind: allocation for kind, allocation in planned.items() if not allocation.existing}
            nonce = next((reservation.nonce for reservation in mine.values()), None) or secrets.token_hex(8)
            created, expires = (moment.isoformat(timespec="seconds") for moment in (told, told + hold))
            reservations = {
                kind: Reservation(kind, a.id, a.described(), nonce, run, created, expires, why=a.why, existing=a.existing,
                                  assigned=made.assigned if kind == "dataset" and not a.existing else {})
                for kind, a in planned.items()
            }  # fmt: skip
            why = tuple(sentence for allocation in planned.values() for sentence in allocation.why)
            result = Reserved(
                bool(fresh), nonce if fresh else None, reservations, why, tuple(settled.abandoned), tuple(settled.remarks), dry_run
            )
            if dry_run:
                return result
            updates: dict[str, str | None] = {f"refs/tags/{tag}": None for tag in settled.over}
            if settled.abandoned:
                commit = remote.commit(state.head, folder, metadata, _abandoned_text(settled.abandoned, nonce))
                updates[f"refs/heads/{state.branch}"] = commit
            wanted = _tags_wanted(fresh, reservations, mine, settled)
            if in_the_way := [tag for tag in wanted if tag in state.tags and tag not in settled.over]:
                raise _in_the_way(in_the_way[0])
            again = any(tag in settled.over for tag in wanted)  # one push can't delete a tag and make it
            if not again:
                updates |= {f"refs/tags/{tag}": remote.tag(tag, state.head, reservations[kind].message()) for tag, kind in wanted.items()}
        if not updates:
            return result
        try:
            remote.push(updates)
        except PushLostError:
            sleep(wait)
            continue
        if not again:
            return result
    raise too_many()


def _tags_wanted(
    fresh: Mapping[Kind, Allocation], reservations: Mapping[Kind, Reservation], mine: Mapping[Kind, Reservation], settled: Settled
) -> dict[str, Kind]:
    """The tags to make; those of the first attempt of this run are there."""
    wanted: dict[str, Kind] = {}
    for kind, allocation in fresh.items():
        own = mine.get(kind)
        if own and (own.key, own.id) == (allocation.key, allocation.id):
            continue
        held = settled.tags[kind, own.id, own.nonce] if own else ()
        tags = [reservations[kind].id_tag, *([number_tag(kind, allocation.first_new)] if allocation.first_new else [])]
        wanted |= {tag: kind for tag in tags if tag not in held}
    return wanted


def _in_the_way(tag: str) -> ArtifactError:
    return ArtifactError(
        f"the tag {tag} on the remote is no reservation that can be read, and in the way of a new one; nothing was pushed",
        hint=f"delete it with `git push origin :refs/tags/{tag}`, unless a newer version of this program made it",
    )


def pauses() -> Iterator[float]:
    """Seconds to wait after each push that was lost: growing, and never the same for two."""
    for attempt in range(TRIES):
        yield random.uniform(0.05, min(0.4 * 1.6**attempt, 5.0))


def too_many() -> BackendError:
    return BackendError(f"{TRIES} pushes in a row were overtaken by others", hint="run again when less is going on")


@contextmanager
def metadata_at(remote: Remote, state: RemoteState, folder: str) -> Iterator[Path]:
    """The metadata folder of the remote's head, in a place of its own."""
    with tempfile.TemporaryDirectory(prefix="pipeline-metadata-") as scratch:
        metadata = Path(scratch) / "metadata"
        metadata.mkdir()
        remote.files_at(state.head, folder, metadata)
        try:
            yield metadata
        except ArtifactError as error:
            if str(metadata) not in str(error):
                raise
            said = f"on the branch {state.branch}: {str(error).replace(str(metadata), folder)}"
            hint = error.hint.replace("`git checkout`", "`git checkout` of an earlier commit")
            raise ArtifactError(said, hint=f"{hint}; then push it") from error


# --- reservations of others ------------------------------------------------------------------------------------------


@dataclass(slots=True)
class Settled:
    live: list[Reservation] = field(default_factory=list)
    over: list[str] = field(default_factory=list)  # tags that have done their work
    abandoned: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    tags: Mapping[tuple[Kind, str, str], tuple[str, ...]] = field(default_factory=dict)  # as in Held


def settle(metadata: Path, state: RemoteState, now: datetime, *, writes: bool = True, keep: str | None = None) -> Settled:
    """Sorts the reservations: recorded ones are over; those past their time are recorded as abandoned in `metadata`, unless their
    record waits in a pull request, or their nonce is `keep`: a run that came back late, but before anybody missed it."""
    held: Held = read_tags(state.reserved)
    settled = Settled(
        tags=held.tags,
        remarks=[
            f"the tag {tag} is no reservation that can be read: delete it with `git push origin :refs/tags/{tag}`" for tag in held.unread
        ],
    )
    recorded = {(entry.kind, entry.id) for entry in load_entries(metadata)[0]}
    late = []
    for reservation in sorted(held.reservations, key=lambda r: (KINDS.index(r.kind), r.id)):
        waits = f"{WAITING_BRANCHES}{reservation.nonce}" in state.branches
        if (reservation.kind, reservation.id) in recorded:
            settled.over += held.tags_of(reservation)
        elif waits or reservation.nonce == keep or not reservation.expired(now):
            settled.live.append(reservation)
            if not waits and datetime.fromisoformat(reservation.created) > now + timedelta(hours=1):
                settled.remarks.append(
                    f"{reservation.name} was reserved at {reservation.created}, which is still to come: a clock is wrong"
                )
        elif writes:
            late.append(reservation)
            settled.over += held.tags_of(reservation)
        else:
            settled.live.append(reservation)  # its ID is not free either way
    settled.abandoned = write_unfinished(metadata, late, "abandoned", "the run that it was held for did not come back in time")
    return settled


def write_unfinished(metadata: Path, reservations: Iterable[Reservation], status: str, note: str) -> list[str]:
    """Records versions that came to nothing, so that their IDs are never used again. Gives their names."""
    names = []
    for reservation in reservations:
        if record_path(metadata, reservation.kind, reservation.id).exists():
            continue
        told = f"{note} (held for {reservation.run})"
        record = {
            **reservation.described,
            "status": status,
            "created": reservation.created,
            "commit": None,
            "note": told,
            "why": [],
            "builds": [],
        }
        create_record(metadata, record)
        names.append(reservation.name)
    if names:
        write_index(metadata, load_entries(metadata)[0])
    return names


def heal_doubles(metadata: Path) -> list[str]:
    """Of two versions with one key (recorded apart and merged by hand, or by two pull requests) the later one came to nothing: its ID is
    used up, and whoever looks for these inputs finds the first. Gives the names of those that were marked."""
    first: dict[tuple[Kind, str], IndexEntry] = {}
    names = []
    for entry in load_entries(metadata)[0]:
        if entry.status != "done" or (kept := first.setdefault((entry.kind, entry.key), entry)) is entry:
            continue
        path = record_path(metadata, entry.kind, entry.id)
        yaml_text.write(path, yaml_text.read(path) | {"status": "failed", "note": f"the same inputs as {kept.name}, which came first"})
        names.append(entry.name)
    if names:
        write_index(metadata, load_entries(metadata)[0])
    return names


def require_sound(metadata: Path, verified: Path | None, what: str) -> None:
    """
    Raises:
        ArtifactError: `what` is wrong, and each place where.
    """
    if problems := verify(metadata, cache=verified):
        lines = [f"{metadata}: {what}:", *(f"  - {problem}" for problem in problems[:20])]
        raise ArtifactError("\n".join(lines), hint="mend what is named")


def _abandoned_text(names: Iterable[str], nonce: str) -> str:
    why = "Their runs did not come back.\n\n[skip ci]"
    return f"Record abandoned versions: {', '.join(names)}\n\n{why}\n\nNonce: {nonce}-{secrets.token_hex(4)}\n"

"""`pipeline version record`: what a run left becomes one commit on the remote's head, with its tags, in one push.

A refused push is never rebased: rendered files (index, cards) are made anew on what the head holds then, and a version whose ID or numbers
are taken there gets others.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from pipeline import yaml_text
from pipeline.errors import PushLostError
from pipeline.ports import WAITING_BRANCHES, Remote, RemoteState
from pipeline.store import write_text
from pipeline.version_files import IndexEntry, load_entries, read_assignments, record_path, write_assignments, write_index
from pipeline.version_names import KINDS, Kind, names_replaced
from pipeline.version_reservations import Reservation, number_tag
from pipeline.version_reserve import heal_doubles, metadata_at, pauses, require_sound, settle, too_many, write_unfinished
from pipeline.versions import Registry

JOURNAL = "publications.jsonl"
HOLD_UNTIL_MERGED = timedelta(days=90)  # of a record in a pull request that had no reservation before


@dataclass(frozen=True, slots=True)
class Recorded:
    """What came of it. `commit` None: the remote has it all already."""

    commit: str | None
    branch: str
    versions: Mapping[Kind, str]  # of the run that was recorded, as they are called now
    new: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    failed: tuple[str, ...] = ()
    abandoned: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    in_own_checkout: bool | None = None  # whether the checkout that was recorded from is at the commit now; None: it was not one's own
    waits: bool = False  # in a branch, for a pull request


@dataclass(slots=True)
class Applied:
    """A run's metadata put on top of a history."""

    new: list[dict[str, Any]]  # records that were not there
    renamed: dict[str, str]
    here: dict[str, dict[str, str]]  # key -> lineage entry of each of the run's versions, as it is called here
    remarks: list[str]
    published: bool = False  # the journal of publications has grown


Finish = Callable[[Path, Iterable[Mapping[str, Any]]], None]  # (metadata, new records): what else belongs into the commit


def record(
    remote: Remote,
    folder: str,
    incoming: Path,
    *,
    nonce: str | None = None,
    run: str = "",
    pull_request: bool = False,
    own_checkout: bool = False,
    verified: Path | None = None,
    finish: Finish = lambda metadata, new: None,
    merge_journals: Callable[[str, str], str] | None = None,
    now: Callable[[], datetime] = lambda: datetime.now(UTC),
    sleep: Callable[[float], None] = time.sleep,
) -> Recorded:
    """Records the versions in `incoming` that the remote's head lacks. What was held under `nonce` and is not among them failed.

    Args:
        folder: the metadata folder, as the remote's commits name it.
        incoming: a metadata folder as a run left it; it may be missing or empty.
        own_checkout: `incoming` is this checkout's own: it follows the commit, where the default branch is checked out and lacks nothing
                but metadata.
        verified: where what was found whole before is noted, so that not every record is read again.
        pull_request: push a branch instead; reservations stay until it is merged.
        merge_journals: joins two texts of the journal of publications: (the head's, the run's) -> both.

    Raises:
        ArtifactError: the metadata would contradict itself; nothing is pushed.
        BackendError: the remote refuses or can't be reached; nothing is lost.
    """  # fmt: skip
    for wait in pauses():
        state = remote.look()
        branch = f"{WAITING_BRANCHES}{nonce or secrets.token_hex(8)}" if pull_request else state.branch
        base = state.branches.get(branch, state.head)  # what an earlier attempt put into the branch is built upon
        with metadata_at(remote, replace(state, head=base), folder) as metadata:
            told = now()
            doubles = heal_doubles(metadata)
            settled = settle(metadata, state, told, keep=nonce)
            ours = [r for r in settled.live if nonce is not None and r.nonce == nonce]
            others = [r for r in settled.live if nonce is None or r.nonce != nonce]
            registry = Registry.load(metadata, held=others, tags=state.tags)
            applied = _apply(metadata, incoming, registry, own_cards=base == remote.head(), merge_journals=merge_journals)
            failed = [*doubles, *write_unfinished(metadata, ours, "failed", _reason(incoming, ours, applied))]
            _renew_histories(metadata)
            finish(metadata, applied.new)
            require_sound(metadata, verified, "would contradict itself; nothing was pushed")
            title = _title(applied, failed, settled.abandoned)
            commit = remote.commit(base, folder, metadata, _message(title, run, nonce, skip_ci=not pull_request))
            result = Recorded(
                commit or (base if base != state.head else None), branch, _versions(incoming, applied),
                tuple(new["name"] for new in applied.new), dict(applied.renamed), tuple(failed), tuple(settled.abandoned),
                (*settled.remarks, *applied.remarks), waits=pull_request and (commit or base) != state.head,
            )  # fmt: skip
            updates: dict[str, str | None] = {}
            if commit:
                updates = {f"refs/heads/{branch}": commit, **_version_tags(remote, commit, applied.new)}
            if not result.waits:
                updates |= {f"refs/tags/{tag}": None for tag in settled.over}
                updates |= {f"refs/tags/{tag}": None for r in ours for tag in settled.tags[r.kind, r.id, r.nonce]}
            elif not ours:  # the head has nothing of it yet, so that its IDs and numbers have to be held
                updates |= _held_until_merged(remote, state, applied.new, branch.removeprefix(WAITING_BRANCHES), run, told)
            if updates:
                try:
                    remote.push(updates)
                except PushLostError:
                    sleep(wait)
                    continue
            if own_checkout and not pull_request and (commit or applied.here or _holds(incoming, metadata)):
                # without a commit too: a record that was cut off after its push is finished by the next
                moved = remote.advance(branch, commit or state.head, folder)
                if moved:
                    _follow(metadata, incoming)
                result = replace(result, in_own_checkout=moved)
            return result
    raise too_many()


def _version_tags(remote: Remote, commit: str, new: Sequence[Mapping[str, Any]]) -> dict[str, str | None]:
    names = [name for record in new if record["status"] == "done" for name in record["names"]]
    return {f"refs/tags/{name}": remote.tag(name, commit, _tag_text(name, new)) for name in names}


def _reason(incoming: Path, ours: Iterable[Reservation], applied: Applied) -> str:
    same = [applied.here[r.key]["name"] for r in ours if r.key in applied.here]
    if same:
        return f"the same inputs were recorded as {', '.join(same)} meanwhile"
    return "the run made nothing new" if (incoming / "versions").is_dir() and not applied.new else "the run did not finish"


# --- putting a run's metadata on top of a history ---------------------------------------------------------------------


def _apply(
    metadata: Path, incoming: Path, registry: Registry, *, own_cards: bool, merge_journals: Callable[[str, str], str] | None
) -> Applied:
    applied = Applied([], {}, {}, [])
    if not (incoming / "versions").is_dir():
        return applied
    known = {(entry.kind, entry.id): entry for entry in load_entries(metadata)[0]}
    theirs = load_entries(incoming)[0]
    for entry in sorted(theirs, key=lambda entry: (KINDS.index(entry.kind), entry.id)):
        _apply_one(entry, known, incoming, registry, applied)
    _apply_splits(metadata, incoming, applied)
    _apply_logs(metadata, incoming, applied)
    here, theirs_too = metadata / JOURNAL, incoming / JOURNAL
    if merge_journals and theirs_too.is_file():
        earlier = here.read_text(encoding="utf-8") if here.is_file() else ""
        both = merge_journals(earlier, theirs_too.read_text(encoding="utf-8"))
        applied.published = both != earlier
        write_text(here, both)
    if applied.new or own_cards:
        _apply_cards(metadata, incoming, applied)
    return applied


def _apply_one(
    entry: IndexEntry, history: Mapping[tuple[Kind, str], IndexEntry], incoming: Path, registry: Registry, applied: Applied
) -> None:
    if history.get((entry.kind, entry.id)) == entry:
        return
    known = {(e.key, e.created) for e in history.values() if e.status != "done"} if entry.status != "done" else ()
    if (entry.key, entry.created) in known:
        return  # it came to nothing, and that is recorded already
    made = yaml_text.read(record_path(incoming, entry.kind, entry.id))
    new = entry.status != "done" or registry.find(entry.kind, entry.key) is None
    written = registry.adopt(made, applied.here)
    if new:
        applied.new.append(written)
    if entry.status == "done":
        applied.here[entry.key] = {name: str(written[name]) for name in ("id", "name", "version", "key")}
        if written["name"] != made["name"]:
            applied.renamed |= dict(zip(made["names"], written["names"], strict=True))


def _apply_splits(metadata: Path, incoming: Path, applied: Applied) -> None:
    here, theirs = read_assignments(metadata), read_assignments(incoming)
    if moved := sum(1 for row, split in theirs.items() if here.get(row, split) != split):
        applied.remarks.append(f"{moved} rows have another split in a version that was recorded meanwhile; later versions keep that one")
    write_assignments(metadata, {row: split for row, split in theirs.items() if row not in here})


def _apply_logs(metadata: Path, incoming: Path, applied: Applied) -> None:
    for log in sorted((incoming / "runs").glob("*.jsonl")):
        target = metadata / "runs" / f"{applied.renamed.get(log.stem, log.stem)}.jsonl"
        here = target.read_text(encoding="utf-8").splitlines(keepends=True) if target.is_file() else []
        new = [line for line in log.read_text(encoding="utf-8").splitlines(keepends=True) if line not in here]
        if new:
            write_text(target, "".join([*here, *new]))


def _apply_cards(metadata: Path, incoming: Path, applied: Applied) -> None:
    for kind in KINDS:
        source = incoming / f"{kind}_card.yaml"
        if source.is_file():
            yaml_text.write(metadata / source.name, _renamed_card(yaml_text.read(source), applied))


def _renamed_card(card: dict[str, Any], applied: Applied) -> dict[str, Any]:
    """The card with the names that its versions have here."""
    if not applied.renamed:
        return card
    block = card["pipeline"]
    own = applied.here.get(block["key"])
    old_id = block["id"]
    card = _with_names(card, applied.renamed)
    if own:
        card["pipeline"] |= {name: own[name] for name in ("id", "version")}
        card["tags"] = [f"version:{own['id']}" if tag == f"version:{old_id}" else tag for tag in card.get("tags", [])]
        if block["kind"] == "dataset":
            card["pretty_name"] = card["pretty_name"].replace(f" {old_id}: ", f" {own['id']}: ")
    for part in card["pipeline"].get("lineage", {}).values():
        if isinstance(part, dict) and part.get("key") in applied.here:
            part |= applied.here[part["key"]]
    return card


def _with_names(value: Any, renamed: Mapping[str, str]) -> Any:
    if isinstance(value, str):
        return names_replaced(value, renamed)
    if isinstance(value, dict):
        return {key: _with_names(item, renamed) for key, item in value.items()}
    return [_with_names(item, renamed) for item in value] if isinstance(value, list) else value


def _renew_histories(metadata: Path) -> None:
    """The last versions, as each card lists them; and the index, where the head's was in doubt."""
    registry = Registry.load(metadata)
    if registry.rebuilt:
        write_index(metadata, load_entries(metadata)[0])
    for kind in KINDS:
        path = metadata / f"{kind}_card.yaml"
        if path.is_file():
            card = yaml_text.read(path)
            card["pipeline"]["versions"] = registry.history(kind)
            yaml_text.write(path, card)


def _holds(own: Path, metadata: Path) -> bool:
    """Whether the checkout's metadata is what the head has: nothing that somebody changed by hand would be lost."""
    files = [path for path in metadata.rglob("*") if path.is_file()]
    return all((twin := own / path.relative_to(metadata)).is_file() and twin.read_bytes() == path.read_bytes() for path in files)


def _follow(metadata: Path, own: Path) -> None:
    """The checkout's metadata becomes what was committed."""
    for path in sorted(metadata.rglob("*")):
        if path.is_file():
            target = own / path.relative_to(metadata)
            if not target.is_file() or target.read_bytes() != path.read_bytes():
                write_text(target, path.read_text(encoding="utf-8"))
    for path in (*own.glob("versions/*-[0-9][0-9][0-9][0-9].yaml"), *own.glob("runs/*.jsonl")):
        if not (metadata / path.relative_to(own)).exists():
            path.unlink()  # it has another name now


# --- texts -----------------------------------------------------------------------------------------------------------


def _versions(incoming: Path, applied: Applied) -> dict[Kind, str]:
    """What the run's cards speak of, as it is called here."""
    found: dict[Kind, str] = {}
    for kind in KINDS:
        path = incoming / f"{kind}_card.yaml"
        if path.is_file():
            name = str(yaml_text.read(path)["pipeline"]["name"])
            found[kind] = applied.renamed.get(name, name)
    return found


def _title(applied: Applied, failed: Iterable[str], abandoned: Iterable[str]) -> str:
    parts = [("Record", [new["name"] for new in applied.new]), ("Record failed", list(failed)), ("Record abandoned", list(abandoned))]
    told = [f"{what} {', '.join(names)}" for what, names in parts if names]
    return "; ".join(told) or ("Record what was published" if applied.published else "Renew metadata")


def _message(title: str, run: str, nonce: str | None, *, skip_ci: bool) -> str:
    """A pull request's checks must not be skipped."""
    trailers = {"Run": run, "Reservation": nonce, "Nonce": secrets.token_hex(8)}
    # the forge's own token starts no workflow anyway; this is for those who push with another one
    return (
        f"{title}\n\n" + ("[skip ci]\n\n" if skip_ci else "") + "".join(f"{name}: {value}\n" for name, value in trailers.items() if value)
    )


def _tag_text(name: str, new: Iterable[Mapping[str, Any]]) -> str:
    key = next(record["key"] for record in new if name in record["names"])
    return f"{name}\n\nKey: {key}\nNonce: {secrets.token_hex(8)}\n"


def _held_until_merged(
    remote: Remote, state: RemoteState, new: Iterable[Mapping[str, Any]], nonce: str, run: str, now: datetime
) -> dict[str, str | None]:
    """Tags that keep the IDs and numbers of a record that waits in a pull request."""
    updates: dict[str, str | None] = {}
    created, expires = (moment.isoformat(timespec="seconds") for moment in (now, now + HOLD_UNTIL_MERGED))
    for record in new:
        told = {name: value for name, value in record.items() if name not in ("status", "created", "commit", "note", "why", "builds")}
        reservation = Reservation(record["kind"], record["id"], told, nonce, run, created, expires)
        tags = [reservation.id_tag]
        tags += [number_tag(record["kind"], [s["number"] for s in record["segments"]])] if record["segments"] else []
        for tag in tags:
            if tag not in state.tags:
                updates[f"refs/tags/{tag}"] = remote.tag(tag, state.head, reservation.message())
    return updates

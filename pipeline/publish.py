"""Publishing in two phases: what is to be published is noted down with the version, then done; the journal tells what is left to do.

`metadata/publications.jsonl` has one line for each step. Lines are only ever added, and one that says "published" holds whatever stands
before or after it, so that two clones' journals merge by taking the lines of both. A version that was published again has a line for each
commit; the latest one holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn, cast

import yaml

from pipeline.errors import ArtifactError
from pipeline.ports import Hub, Progress, quiet
from pipeline.publication import REPO_TYPES, Publication, Published, is_owned, url_of
from pipeline.store import write_text

if TYPE_CHECKING:
    from pipeline.version_names import Kind

JOURNAL = "publications.jsonl"
ORDER: tuple[Kind, ...] = ("dataset", "run", "model")  # the model's card names the dataset's commit and the run's page
State = Literal["pending", "published"]
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NOWHERE = "0" * 40  # what a preview has for the commit of what is not published
_FIELDS = {"kind", "name", "repo", "state", "commit", "url", "at"}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the journal. `commit` and `url` are there when it is published."""

    kind: Kind
    name: str
    repo: str
    state: State
    at: str
    commit: str | None = None
    url: str | None = None

    @property
    def place(self) -> Place:
        return self.kind, self.name, self.repo

    @property
    def moment(self) -> datetime:
        moment = datetime.fromisoformat(self.at)
        return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


Place = tuple["Kind", str, str]  # kind, name, repository
Build = Callable[["Kind", Mapping["Kind", Published]], Publication]


@dataclass(frozen=True, slots=True)
class Planned:
    """A version to be published. `build` gets the versions that its files may name, as published; called twice for the same version
    it must give the same bytes, or a run that was cut short can't be finished. `incomplete`: it has to leave out files that an earlier
    attempt may have sent, since they are not here any more."""

    kind: Kind
    name: str
    repo_id: str
    build: Build = field(compare=False)
    incomplete: bool = False

    @property
    def place(self) -> Place:
        return self.kind, self.name, self.repo_id


# --- the journal -----------------------------------------------------------------------------------------------------


def read_journal(metadata: Path) -> list[Line]:
    """
    Raises:
        ArtifactError: a line is damaged (a merge left its marks, say).
    """
    path = metadata / JOURNAL
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path}: can't be read: {error}", hint="restore it with `git checkout`") from error
    return _parsed(text, str(path))


def pending(metadata: Path) -> list[Line]:
    """What was to be published and is not, each once, in the order in which it was noted down.

    Raises:
        ArtifactError: the journal is damaged.
    """
    lines = read_journal(metadata)
    done = {line.place for line in lines if line.state == "published"}
    left: dict[Place, Line] = {}
    for line in lines:
        if line.place not in done:
            left.setdefault(line.place, line)
    return list(left.values())


def published(metadata: Path) -> dict[Place, Published]:
    """What was published, by kind, name and repository, as it was last.

    Raises:
        ArtifactError: the journal is damaged.
    """
    return {place: _as_published(line) for place, line in _latest(metadata).items()}


def _latest(metadata: Path) -> dict[Place, Line]:
    """The latest line that says "published", by time: after a merge the last one may be another. Of one time the last one."""
    found: dict[Place, Line] = {}
    for line in read_journal(metadata):
        if line.state == "published" and (line.place not in found or line.moment >= found[line.place].moment):
            found[line.place] = line
    return found


def _as_published(line: Line) -> Published:
    assert line.commit is not None
    assert line.url is not None
    return Published(*line.place, line.commit, line.url, changed=False)


def mark_pending(metadata: Path, places: Iterable[Place], *, now: Callable[[], datetime] | None = None) -> list[Place]:
    """Notes down what is to be published; gives what was not in the journal before. The same again changes nothing.

    Raises:
        ArtifactError: the journal is damaged. OutputError: it can't be written.
    """
    known = {line.place for line in read_journal(metadata)}
    new = [place for place in dict.fromkeys(places) if place not in known]
    _append(metadata, [Line(*place, state="pending", at=_time(now)) for place in new])
    return new


def merge_journals(ours: str, theirs: str) -> str:
    """The lines of both: ours in their order, then what only theirs tells. For two clones that both added lines; when each published
    the same, one line says so, the later one: a version may have come back to an earlier commit.

    Raises:
        ArtifactError: a line of either is damaged.
    """
    told: dict[tuple[Any, ...], Line] = {}
    for text, whose in ((ours, "ours"), (theirs, "theirs")):
        for line in _parsed(text, f"{JOURNAL} ({whose})"):
            known = told.setdefault((line.place, line.state, line.commit), line)
            if line.moment > known.moment:
                told[line.place, line.state, line.commit] = line
    return "".join(map(_written, told.values()))


def _append(metadata: Path, lines: Sequence[Line]) -> None:
    if not lines:
        return
    path = metadata / JOURNAL
    earlier = path.read_text(encoding="utf-8") if path.exists() else ""
    if earlier and not earlier.endswith("\n"):
        earlier += "\n"
    write_text(path, earlier + "".join(_written(line) for line in lines))


def _written(line: Line) -> str:
    told = {name: getattr(line, name) for name in _FIELDS}
    return json.dumps(told, ensure_ascii=False, sort_keys=True, separators=(", ", ": ")) + "\n"


def _parsed(text: str, source: str) -> list[Line]:
    lines: list[Line] = []
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: that also splits within a JSON string
        if line.strip():
            try:
                lines.append(_line(json.loads(line)))
            except (ValueError, RecursionError) as error:
                _damaged(source, number, line, error)
    return lines


def _line(told: Any) -> Line:
    """
    Raises:
        ValueError: it is no line of a journal.
    """
    if not isinstance(told, dict) or told.keys() != _FIELDS:
        raise ValueError(f"its fields are not {', '.join(sorted(_FIELDS))}")
    texts = [told[name] for name in ("kind", "name", "repo", "state", "at")]
    if not all(isinstance(text, str) and text for text in texts):
        raise ValueError("a field that must be a text is none")
    if told["kind"] not in REPO_TYPES or told["state"] not in ("pending", "published"):
        raise ValueError(f"kind {told['kind']!r} or state {told['state']!r} is unknown")
    datetime.fromisoformat(told["at"])
    if told["state"] == "pending":
        if told["commit"] is not None or told["url"] is not None:
            raise ValueError("it is pending and has a commit or a URL")
    elif not isinstance(told["commit"], str) or not _COMMIT.fullmatch(told["commit"]) or not isinstance(told["url"], str):
        raise ValueError("it is published and lacks its commit (40 hex digits) or its URL")
    return Line(**told)


def _damaged(source: str, number: int, line: str, error: Exception) -> NoReturn:
    marks = line.startswith(("<<<<<<<", "=======", ">>>>>>>"))
    hint = "keep the lines of both sides and delete the marks of the merge" if marks else "restore it with `git checkout`"
    raise ArtifactError(f"{source}: damaged at line {number}: {'marks of a merge' if marks else error}", hint=hint) from None


def _time(now: Callable[[], datetime] | None) -> str:
    return (now() if now else datetime.now(UTC)).astimezone(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


# --- publishing ------------------------------------------------------------------------------------------------------


def publish_all(
    planned: Sequence[Planned],
    hub: Hub,
    metadata: Path,
    *,
    known: Mapping[Kind, Published] | None = None,
    create: bool = False,
    again: bool = False,
    progress: Progress = quiet,
    now: Callable[[], datetime] | None = None,
) -> list[Published]:
    """Publishes the versions that belong together, at most one of a kind: the dataset, then the run, then the model. Each is in the
    journal before the next one is begun; what the journal has as published is not touched again unless `again`.

    Args:
        known: versions that are not published here and that the files may name.
        create: lets the Hub make repositories that are missing.
        again: sends all of them, and replaces what is there with other content. An incomplete one stays as it is there.

    Raises:
        UserError, ArtifactError, PrivacyError, BackendError: as `Hub.publish`; what was done before is in the journal.
    """
    done = _latest(metadata)
    mark_pending(metadata, (version.place for version in planned), now=now)
    found: dict[Kind, Published] = dict(known or {})
    results = []
    for at, version in enumerate(_ordered(planned)):
        progress("publish", at, len(planned), version.name)
        line = done.get(version.place)
        if line is not None and not again:
            result = _as_published(line)
        else:
            result = _sent(version, hub, found, create=create, again=again)
            # not by `changed`: a run may have died between moving the tag and this line
            if line is None or line.commit != result.commit:
                _append(metadata, [_line_after(line, version.place, result, now)])
        found[version.kind] = result
        results.append(result)
    progress("publish", len(planned), len(planned))
    return results


def _sent(version: Planned, hub: Hub, found: Mapping[Kind, Published], *, create: bool, again: bool) -> Published:
    """Of an incomplete version what is there under its tag: an attempt that was cut off before its line in the journal sent it whole."""
    there = hub.read_back(version.kind, version.repo_id, version.name) if version.incomplete else None
    return there or hub.publish(_built(version, found), create=create, replace=again)


def _line_after(earlier: Line | None, place: Place, result: Published, now: Callable[[], datetime] | None) -> Line:
    """Later than the line that it replaces, whatever the clock says: in a merged journal the time alone tells which one holds."""
    line = Line(*place, state="published", at=_time(now), commit=result.commit, url=result.url)
    if earlier is None or earlier.moment < line.moment:
        return line
    after = earlier.moment + timedelta(seconds=1)
    return replace(line, at=_time(lambda: after))


def _ordered(planned: Sequence[Planned]) -> list[Planned]:
    kinds = [version.kind for version in planned]
    if len(set(kinds)) != len(kinds):
        raise ValueError(f"two versions of one kind: {', '.join(kinds)}")
    return sorted(planned, key=lambda version: ORDER.index(version.kind))


def _built(version: Planned, found: Mapping[Kind, Published]) -> Publication:
    publication = version.build(version.kind, dict(found))
    if (publication.kind, publication.name, publication.repo_id) != version.place:
        raise ValueError(f"{version.name}: another version was built: {publication.name} for {publication.repo_id}")
    if foreign := sorted(path for path in publication.files if not is_owned(path)):
        raise ValueError(f"{version.name}: not among the files that a version may hold (publication.OWNED): {', '.join(foreign)}")
    return publication


# --- preview ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PreviewFile:
    """`fields`: a card's, that is the front matter of Markdown or the whole of a YAML file; None for any other file."""

    path: str
    size: int
    fields: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Preview:
    """What would go to the Hub for one version. `published`: it is there already, so that nothing would."""

    kind: Kind
    name: str
    repo_id: str
    private: bool
    published: bool
    files: tuple[PreviewFile, ...]


def preview_all(planned: Sequence[Planned], metadata: Path, *, known: Mapping[Kind, Published] | None = None) -> list[Preview]:
    """What `publish_all` would send, without any network and without a line in the journal. Where a file names a version that is not
    published yet, its commit stands as zeros.

    Raises:
        ArtifactError: the journal is damaged, or a file is missing.
    """
    done = published(metadata)
    found: dict[Kind, Published] = dict(known or {})
    previews = []
    for version in _ordered(planned):
        publication = _built(version, found)
        files = tuple(_preview(path, source) for path, source in sorted(publication.files.items()))
        previews.append(Preview(*version.place, publication.private, version.place in done, files))
        url = url_of(version.kind, version.repo_id, version.name)
        found[version.kind] = done.get(version.place) or Published(*version.place, _NOWHERE, url, changed=False)
    return previews


def _preview(path: str, source: bytes | Path) -> PreviewFile:
    is_card = path.endswith((".md", ".yaml", ".yml"))
    try:
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        data = (source if isinstance(source, bytes) else source.read_bytes()) if is_card else b""
    except OSError as error:
        where = error.filename or path
        raise ArtifactError(f"{where}: can't be published as {path}: {error.strerror}", hint="run the stage that makes it again") from error
    return PreviewFile(path, size, _fields(data.decode("utf-8", "replace"), path) if is_card else None)


def _fields(text: str, path: str) -> Mapping[str, Any]:
    if path.endswith(".md"):
        head = re.match(r"\ufeff?---\r?\n(.*?)^---\s*$", text, re.DOTALL | re.MULTILINE)
        text = head[1] if head else ""
    try:
        fields = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ArtifactError(f"{path}: not YAML: {' '.join(str(error).split())}", hint="make the cards again: `pipeline cards`") from None
    return cast(Mapping[str, Any], fields) if isinstance(fields, dict) else {}

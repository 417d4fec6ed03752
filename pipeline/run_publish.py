"""`pipeline publish`: which versions go, from which cards and files, through the privacy gate, to the Hub."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import github, hub_files, publish, yaml_text
from pipeline.config import PublishConfig
from pipeline.errors import ArtifactError, PipelineError, PrivacyError, UserError
from pipeline.hub_rows import read_rows
from pipeline.ports import Hub, Progress, Remote, quiet
from pipeline.privacy import check, record_texts, scan
from pipeline.prompts import instruction
from pipeline.publication import Publication, Published
from pipeline.run import Pipeline
from pipeline.store import require_new, writing
from pipeline.version_names import KINDS, Kind, parse_name

Cards = dict[Kind, Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """What was asked for. Rows and weights go only when asked for: here or, for versions that are not named, in the configuration."""

    names: tuple[str, ...] = ()  # without any: what the cards describe
    pending: bool = False  # instead: what the journal says is waiting
    dry_run: bool = False
    to: Path | None = None  # where a dry run leaves the files
    rows: bool = False
    weights: bool = False
    replace: bool = False  # also where it is published already with other content: its tag is moved
    reviewed: str | None = None  # the code of findings that a person has looked at

    def rows_and_weights(self, pipeline: Pipeline) -> tuple[bool, bool]:
        configured = pipeline.config.publish if not self.names else PublishConfig()  # an older version's files are seldom at hand
        return self.rows or configured.rows, self.weights or configured.weights


@dataclass(frozen=True, slots=True)
class PublishResult:
    published: tuple[Published, ...] = ()
    previews: tuple[publish.Preview, ...] = ()
    remarks: tuple[str, ...] = ()


def publish_versions(
    pipeline: Pipeline, wanted: Wanted, *, hub: Callable[[], Hub], remote: Callable[[], Remote], progress: Progress = quiet
) -> PublishResult:
    """
    Args:
        hub, remote: opened when they are needed: a dry run needs no Hub, and the current cards no remote.

    Raises:
        UserError: no such version, or a file that was asked for is not here.
        PrivacyError: something looks personal; nothing was sent.
        ArtifactError, BackendError
    """
    if wanted.to:
        require_new(wanted.to)
    failures: list[PipelineError] = []
    groups = _pending_groups(pipeline, remote, failures) if wanted.pending else _named_groups(pipeline, wanted.names, remote)
    records = _records(pipeline)
    done = PublishResult(remarks=tuple([records.remark] if records.remark else []))
    for cards in groups:
        try:
            done = _joined(done, _publish_group(pipeline, wanted, cards, records, hub, progress))
        except PipelineError as error:  # what stops one run's versions must not stop all later ones
            failures.append(error)
    if failures:
        raise _all_of(failures, len(done.published))
    return done


def _publish_group(
    pipeline: Pipeline, wanted: Wanted, cards: Cards, records: Records, hub: Callable[[], Hub], progress: Progress
) -> PublishResult:
    metadata = pipeline.config.metadata_path
    known = _known(pipeline, metadata, cards)
    builds = [_Build(kind, card, pipeline, wanted) for kind, card in cards.items()]
    remarks = tuple(build.remark for build in builds if build.remark)
    planned = [build.planned for build in builds]
    previews = tuple(publish.preview_all(planned, metadata, known=known)) if wanted.dry_run else ()
    if wanted.to:
        for build in builds:
            _write(build(build.kind, known), wanted.to)
    _gate(builds, known, pipeline, wanted, records)
    if wanted.dry_run:
        return PublishResult(previews=previews, remarks=remarks)
    sent = publish.publish_all(planned, hub(), metadata, known=known, create=True, again=wanted.replace, progress=progress)
    return PublishResult(published=tuple(sent), remarks=remarks)


def _joined(a: PublishResult, b: PublishResult) -> PublishResult:
    return PublishResult(a.published + b.published, a.previews + b.previews, a.remarks + b.remarks)


def _all_of(failures: Sequence[PipelineError], published: int) -> PipelineError:
    """One error for all groups; the privacy gate's, where it closed for one of them."""
    worst = next((failure for failure in failures if isinstance(failure, PrivacyError)), failures[0])
    if len(failures) == 1 and not published:
        return worst
    told = "\n".join(f"- {failure}" for failure in failures)
    return type(worst)(f"{published} versions were published, these were not:\n{told}", hint=worst.hint)


class _Build:
    """The files of one version, made once for each set of versions that its pages may name. Rows or weights that only the configuration
    asks for and that are not here any more are left out."""

    def __init__(self, kind: Kind, card: Mapping[str, Any], pipeline: Pipeline, wanted: Wanted) -> None:
        self.kind, self.remark = kind, ""
        self._card, self._pipeline = card, pipeline
        self._made: dict[tuple[str, ...], Publication] = {}
        self.rows, self._weights = wanted.rows_and_weights(pipeline)
        try:
            self(kind, {})
        except UserError as error:
            if (self.rows, self._weights) == (wanted.rows, wanted.weights):
                raise
            self.rows, self._weights = wanted.rows, wanted.weights
            self.remark = f"{card['pipeline']['name']} goes without rows and weights: {error}"
        config = pipeline.config
        self.planned = publish.Planned(kind, card["pipeline"]["name"], hub_files.repo_id(kind, config), self, incomplete=bool(self.remark))

    def __call__(self, kind: Kind, known: Mapping[Kind, Published]) -> Publication:
        key = tuple(sorted(version.commit for version in known.values()))
        if key not in self._made:
            self._made[key] = hub_files.publication(
                kind, self._card, config=self._pipeline.config, known=known, outputs=self._pipeline.folder.path,
                weights=self._weights, rows=self.rows,
            )  # fmt: skip
        return self._made[key]


def _write(publication: Publication, folder: Path) -> None:
    """The files of one version below `folder`, as they would lie in its repository."""
    for name, content in publication.files.items():
        with writing(folder / publication.repo_id / name) as target:
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)


# --- which versions --------------------------------------------------------------------------------------------------


def _named_groups(pipeline: Pipeline, names: Sequence[str], remote: Callable[[], Remote]) -> list[Cards]:
    if not names:
        cards = _cards_here(pipeline)
        if not cards:
            raise UserError("metadata/ describes no version yet", hint="`pipeline run` on the default branch makes the first")
        return [cards]
    asked: dict[Kind, dict[str, str]] = {}
    for name in names:
        parsed = parse_name(name)
        asked.setdefault(parsed.kind, {})[parsed.id] = name
    found = {kind: [_card(pipeline, kind, name, remote) for name in ids.values()] for kind, ids in asked.items()}
    return _grouped(found)


def _pending_groups(pipeline: Pipeline, remote: Callable[[], Remote], failures: list[PipelineError]) -> list[Cards]:
    """`failures` gets what is wrong with a version whose card can't be had."""
    found: dict[Kind, list[Mapping[str, Any]]] = {}
    for line in publish.pending(pipeline.config.metadata_path):
        if line.repo == hub_files.repo_id(line.kind, pipeline.config):  # of another namespace: nothing of this configuration
            try:
                card = _card(pipeline, line.kind, line.name, remote)
            except (UserError, ArtifactError) as error:
                failures.append(error)
            else:
                found.setdefault(line.kind, []).append(card)
    return _grouped(found)


def _grouped(found: Mapping[Kind, Sequence[Mapping[str, Any]]]) -> list[Cards]:
    """Versions that belong to one run together, since their pages name one another; datasets before what was made from them."""
    left = {(kind, card["pipeline"]["key"]): card for kind in KINDS for card in found.get(kind, ())}
    groups: list[Cards] = []
    for run in found.get("run", ()):
        group: Cards = {}
        for kind in KINDS:
            key = run["pipeline"]["key"] if kind == "run" else run["pipeline"]["lineage"][kind]["key"]
            if card := left.pop((kind, key), None):
                group[kind] = card
        groups.append(group)
    alone: list[Cards] = [{kind: card} for (kind, _), card in left.items()]
    return [group for group in (*alone, *groups) if group]


def _cards_here(pipeline: Pipeline) -> Cards:
    paths = {kind: pipeline.config.metadata_path / f"{kind}_card.yaml" for kind in KINDS}
    return {kind: yaml_text.read(path) for kind, path in paths.items() if path.is_file()}


def _card(pipeline: Pipeline, kind: Kind, name: str, remote: Callable[[], Remote]) -> Mapping[str, Any]:
    """The card of a version: the current one, or the one that was committed with it."""
    path = pipeline.config.metadata_path / f"{kind}_card.yaml"
    if path.is_file() and _describes(card := yaml_text.read(path), name):
        return card
    git = remote()
    with tempfile.TemporaryDirectory(prefix="pipeline-card-") as scratch:
        if not git.files_of_tag(name, git.folder(pipeline.config.metadata_path), Path(scratch)):
            raise UserError(f"{name}: no such version", hint="`pipeline version` lists them; its tag must be on the remote")
        card = yaml_text.read(Path(scratch) / f"{kind}_card.yaml")
    if not _describes(card, name):
        raise ArtifactError(
            f"the {kind} card in the commit of the tag {name} describes {card['pipeline']['name']}", hint="was the tag moved?"
        )
    return card


def _describes(card: Mapping[str, Any], name: str) -> bool:
    """A dataset goes by any of its three names."""
    about, asked = card["pipeline"], parse_name(name)
    own = parse_name(str(about["name"]))
    return (own.kind, own.id, own.version, own.data) == (asked.kind, asked.id, asked.version, asked.data)


def _known(pipeline: Pipeline, metadata: Path, cards: Cards) -> dict[Kind, Published]:
    """What is on the Hub already of the versions that these stand on."""
    done = publish.published(metadata)
    lineage = {kind: part["name"] for card in cards.values() for kind, part in card["pipeline"].get("lineage", {}).items() if kind in KINDS}
    places = {kind: (kind, name, hub_files.repo_id(kind, pipeline.config)) for kind, name in lineage.items() if kind not in cards}
    return {kind: done[place] for kind, place in places.items() if place in done}


# --- the gate --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Records:
    """The records' own texts, to be looked for in what would leave. `missing`: why there are none; then a person has to look."""

    texts: list[str] | None
    missing: str | None = None
    remark: str = ""


def _gate(builds: Iterable[_Build], known: Mapping[Kind, Published], pipeline: Pipeline, wanted: Wanted, records: Records) -> None:
    """
    Raises:
        PrivacyError: names every place in every file of the group.
    """
    findings = []
    for build in builds:
        publication = build(build.kind, known)
        found = scan(
            publication.files, records.texts, rows_allowed=build.rows, allowed=pipeline.config.publish.allowed,
            records_missing=records.missing,
        )  # fmt: skip
        findings += [replace(finding, file=f"{publication.repo_id}/{finding.file}") for finding in found]
    check(findings, wanted.reviewed, public=github.is_workflow())


def _records(pipeline: Pipeline) -> Records:
    config = pipeline.config
    formatted = pipeline.folder / "formatted_dataset.csv"
    try:
        if formatted.is_file():
            return Records(list(record_texts(read_rows(formatted), instruction(config.prompt, config.dataset.scale))))
        if not config.dataset_path.is_file():
            return Records(None, f"{config.dataset.path}, the table of the records, is not here")
        from pipeline.tables import read_table

        columns, copilot = config.dataset.columns, config.dataset.copilot
        rationales = [columns.rationale, copilot.rationale if copilot else None, *(r.rationale for r in config.dataset.raters.values())]
        names = list(dict.fromkeys([*columns.text, *filter(None, rationales), *config.dataset.keep]))
        table = read_table(config.dataset_path, {name: "dataset.columns" for name in names})
    except (PipelineError, OSError) as error:
        return Records(None, f"the records can't be read: {error}")
    remark = f"looked for in what would leave: the texts of {config.dataset.path} as it is now, {len(table.values[names[0]])} records"
    return Records([text for name in names for text in table.values[name]], remark=remark)

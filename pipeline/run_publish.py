"""`pipeline publish`: which versions go, from which cards and files, through the privacy gate, to the Hub."""

from __future__ import annotations

import csv
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline import hub_files, publish, yaml_text
from pipeline.config import PublishConfig
from pipeline.errors import ArtifactError, OutputError, PipelineError, UserError
from pipeline.ports import Hub, Progress, Remote, quiet
from pipeline.privacy import check, record_texts, scan
from pipeline.prompts import instruction
from pipeline.publication import Publication, Published
from pipeline.run import Pipeline
from pipeline.store import writing
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
    metadata = pipeline.config.metadata_path
    if wanted.to and wanted.to.exists() and (not wanted.to.is_dir() or any(wanted.to.iterdir())):
        raise OutputError(f"{wanted.to}: is there already", hint="name a new folder")
    groups = _pending_groups(pipeline, remote) if wanted.pending else _named_groups(pipeline, wanted.names, remote)
    texts, remarks = _texts(pipeline)
    published: list[Published] = []
    previews: list[publish.Preview] = []
    for cards in groups:
        known = _known(pipeline, metadata, cards)
        planned = [_planned(kind, card, pipeline, wanted) for kind, card in cards.items()]
        shown = publish.preview_all(planned, metadata, known=known)
        _gate(planned, known, pipeline, wanted, texts)
        if wanted.dry_run:
            previews += shown
            for version in planned if wanted.to else ():
                _write(version.build(version.kind, known), wanted.to)
        else:
            published += publish.publish_all(planned, hub(), metadata, known=known, create=True, progress=progress)
    return PublishResult(tuple(published), tuple(previews), remarks)


def _write(publication: Publication, folder: Path | None) -> None:
    """The files of one version below `folder`, as they would lie in its repository."""
    assert folder is not None
    for name, content in publication.files.items():
        with writing(folder / publication.repo_id / name) as target:
            if isinstance(content, bytes):
                target.write_bytes(content)
            else:
                shutil.copyfile(content, target)


def _planned(kind: Kind, card: Mapping[str, Any], pipeline: Pipeline, wanted: Wanted) -> publish.Planned:
    config = pipeline.config

    def build(kind: Kind, known: Mapping[Kind, Published]) -> Publication:
        rows, weights = wanted.rows_and_weights(pipeline)
        return hub_files.publication(kind, card, config=config, known=known, outputs=pipeline.folder.path, weights=weights, rows=rows)

    return publish.Planned(kind, card["pipeline"]["name"], hub_files.repo_id(kind, config), build)


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


def _pending_groups(pipeline: Pipeline, remote: Callable[[], Remote]) -> list[Cards]:
    found: dict[Kind, list[Mapping[str, Any]]] = {}
    for line in publish.pending(pipeline.config.metadata_path):
        if line.repo == hub_files.repo_id(line.kind, pipeline.config):  # of another namespace: nothing of this configuration
            found.setdefault(line.kind, []).append(_card(pipeline, line.kind, line.name, remote))
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


def _gate(
    planned: Iterable[publish.Planned], known: Mapping[Kind, Published], pipeline: Pipeline, wanted: Wanted, texts: list[str] | None
) -> None:
    """
    Raises:
        PrivacyError: names every place in every file of the group.
    """
    rows, _ = wanted.rows_and_weights(pipeline)
    findings = []
    for version in planned:
        files = version.build(version.kind, known).files
        findings += [replace(found, file=f"{version.repo_id}/{found.file}") for found in scan(files, texts, rows_allowed=rows)]
    check(findings, wanted.reviewed)


def _texts(pipeline: Pipeline) -> tuple[list[str] | None, tuple[str, ...]]:
    """The records' own texts, to be looked for in what would leave; None where no records are here."""
    config = pipeline.config
    formatted = pipeline.folder / "formatted_dataset.csv"
    try:
        if formatted.is_file():
            return list(record_texts(_rows(formatted), instruction(config.prompt, config.dataset.scale))), ()
        if config.dataset_path.is_file():
            from pipeline.tables import read_table

            columns = config.dataset.columns
            names = [*columns.text, *([columns.rationale] if columns.rationale else []), *config.dataset.keep]
            table = read_table(config.dataset_path, {name: "dataset.columns" for name in names})
            return [text for name in names for text in table.values[name]], ()
    except (PipelineError, OSError, csv.Error) as error:
        return None, (f"not looked for in what would leave: the texts of the records, which can't be read ({error})",)
    return None, ("not looked for in what would leave: the texts of the records, which are not here",)


def _rows(formatted: Path) -> Iterator[dict[str, str]]:
    with formatted.open(encoding="utf-8", newline="") as lines:
        yield from csv.DictReader(lines)

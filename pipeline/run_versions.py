"""What CI asks around a run: to hold its versions before it, to record them after it, and what of it may be kept as an artifact."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from pipeline import github, yaml_text
from pipeline.config import PipelineConfig
from pipeline.errors import UserError
from pipeline.ports import Remote
from pipeline.privacy import check_repository
from pipeline.records import Split
from pipeline.run import Pipeline
from pipeline.store import explained, require_new, writing
from pipeline.version_record import Recorded
from pipeline.version_record import record as record_on
from pipeline.version_reservations import FILE, RunReservation, read_reservation, write_reservation
from pipeline.version_reserve import Planned, Reserved
from pipeline.version_reserve import reserve as reserve_on
from pipeline.versions import Allocation, Kind, Registry, read_assignments

# publish.artifacts -> files of the output folder. Cards stand for the metadata folder, which the record needs; it holds no record text.
ARTIFACTS: Mapping[str, tuple[str, ...]] = {
    "cards": (),
    "summary": ("summary.md",),
    "scores": ("scores.json", "data_quality.json"),
    "report": ("report.html",),
    "outputs": ("outputs.jsonl",),
    "dataset": ("formatted_dataset.csv",),
    "training_data": ("training_data.jsonl",),
    "model_set": ("model_set_config.json",),
    "weights": ("fine_tuned_model.gguf", "adapter.gguf", "fine_tuning_metadata.json"),
}


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """What `record` did; `publish`: something waits to be published."""

    recorded: Recorded
    publish: bool


def reserve(pipeline: Pipeline, remote: Remote, *, hold: timedelta, dry_run: bool = False, pull_request: bool = False) -> Reserved:
    """Formats the rows, derives the versions, and holds what is new; leaves reservation.json for the run.

    Off the default branch nothing is held: the run will be provisional.
    """
    check_repository(pipeline.config.dataset.shareable, os.environ)  # first of all: also a branch that records nothing reads rows
    config = pipeline.config
    if github.is_workflow():
        _check_artifacts(config)

    def plan(registry: Registry, metadata: Path, held: Mapping[str, Split]) -> Planned:
        # the history may have grown since this checkout was made; rows keep the splits that it gave them
        own, recorded = read_assignments(config.metadata_path), read_assignments(metadata)
        assigned = {row: split for row, split in {**held, **recorded}.items() if own.get(row) != split}
        pipeline.reservation = RunReservation(None, (), assigned)
        pipeline.run(until="format")
        new = {row: split for row, split in pipeline.left.splits().items() if row not in recorded}
        return Planned(_versions_of(pipeline, registry), new)

    if not pipeline.allocates():
        return Reserved(True, None, {}, ("this is not the default branch: the run's versions are provisional, and nothing is recorded",))
    run = github.run_name()
    folder = remote.folder(config.metadata_path)
    done = reserve_on(
        remote, folder, plan, run=run, hold=hold, dry_run=dry_run, pull_request=pull_request, verified=pipeline.folder / ".verified.tsv"
    )
    if not dry_run and pipeline.reservation:
        told = RunReservation(done.nonce, tuple(done.allocations.values()), pipeline.reservation.assigned)
        write_reservation(pipeline.folder.path, told)
    return done


def _check_artifacts(config: PipelineConfig) -> None:
    """
    Raises:
        UserError: the publishing job could not find what it is to send. Better said before the training than after it.
    """
    publish = config.publish
    needed = {"weights": ("weights",), "rows": ("dataset", "outputs")} if publish.enabled else {}
    for switch, artifacts in needed.items():
        missing = [name for name in artifacts if name not in publish.artifacts]
        if getattr(publish, switch) and missing:
            raise UserError(
                f"publish.{switch} is on, and the workflow keeps no {', no '.join(missing)}",
                hint=f"add {', '.join(missing)} to publish.artifacts, or switch publish.{switch} off",
            )


def _versions_of(pipeline: Pipeline, registry: Registry) -> Mapping[Kind, Allocation]:
    """The versions to be made; those of an earlier run that was asked for the same and had to make a model set, where there is one."""
    method = pipeline.expected_method()
    if method == "lora":
        asked, instead = pipeline.model_key("lora"), registry.find("model", pipeline.model_key("model_set"))
        if instead and not registry.find("model", asked) and registry.read("model", instead.id).get("asked") == asked:
            method = "model_set"
    return pipeline.allocations(provisional=False, registry=registry, method=method)


def record(
    pipeline: Pipeline, remote: Remote, *, source: Path | None = None, nonce: str | None = None, pull_request: bool = False
) -> RecordedRun:
    """Records what a run left: in `source` (a metadata folder, or a folder that holds one), else in this checkout's metadata, where a
    provisional run of a branch that was merged since gets its versions first."""
    from pipeline.publish import merge_journals, pending

    config = pipeline.config
    if not pipeline.allocates():
        raise UserError(
            "only the default branch records versions", hint="merge this branch first, then record there: nothing is trained again"
        )
    told = read_reservation(pipeline.folder.path)
    nonce = nonce or (told.nonce if told else None)
    own = source is None
    if own:
        _finish_merged(pipeline)
    incoming = config.metadata_path if source is None else _metadata_in(source)

    waiting = False

    def finish(metadata: Path, new: Iterable[Mapping[str, Any]]) -> None:
        nonlocal waiting
        if config.publish.enabled and _passed(metadata):
            _mark_pending(config, metadata, new)
            waiting = bool(pending(metadata))

    done = record_on(
        remote, remote.folder(config.metadata_path), incoming, nonce=nonce, run=github.run_name(), pull_request=pull_request,
        own_checkout=own, verified=pipeline.folder / ".verified.tsv", finish=finish, merge_journals=merge_journals,
    )  # fmt: skip
    if told and told.nonce == nonce:
        (pipeline.folder / FILE).unlink(missing_ok=True)
    return RecordedRun(done, waiting and not done.waits)


def _finish_merged(pipeline: Pipeline) -> None:
    """Gives a run that is whole, but provisional, its versions, cards and report; trains and asks nothing."""
    if pipeline.folder.manifest("evaluate") is None:
        return
    plan = {stage.stage: stage.action for stage in pipeline.plan()}
    made = all(plan[stage] == "cached" for stage in ("format", "finetune", "infer", "evaluate"))
    if made and plan["version"] == "run":
        pipeline.run()


def _metadata_in(source: Path) -> Path:
    return source / "metadata" if (source / "metadata").is_dir() else source


def _mark_pending(config: PipelineConfig, metadata: Path, new: Iterable[Mapping[str, Any]]) -> None:
    from pipeline.hub_files import repo_id
    from pipeline.publish import mark_pending

    done = [record for record in new if record["status"] == "done"]
    mark_pending(metadata, [(record["kind"], record["name"], repo_id(record["kind"], config)) for record in done])


def _passed(metadata: Path) -> bool:
    """Whether the run that the cards describe passed its gates."""
    path = metadata / "run_card.yaml"
    gates = yaml_text.read(path)["pipeline"].get("gates", []) if path.is_file() else []
    return all(gate["outcome"] == "passed" for gate in gates)


def collect(pipeline: Pipeline, folder: Path) -> tuple[str, ...]:
    """Copies into `folder`, which must be new or empty, what CI may keep: the metadata, and what `publish.artifacts` lists. Gives the
    paths in it."""
    config = pipeline.config
    require_new(folder)
    sources = {path.relative_to(config.root).as_posix(): path for path in sorted(config.metadata_path.rglob("*")) if path.is_file()}
    for artifact in config.publish.artifacts:
        sources |= {name: pipeline.folder / name for name in ARTIFACTS[artifact] if (pipeline.folder / name).is_file()}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for name, source in sources.items():
        with writing(folder / name) as target:
            shutil.copyfile(source, target)
    return tuple(sources)

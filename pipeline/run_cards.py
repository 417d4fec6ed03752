"""What a run adds to `metadata/`: its versions, the three cards, the log; and whether metadata and outputs hold together."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

from pipeline import cards
from pipeline.config import PipelineConfig
from pipeline.errors import ArtifactError
from pipeline.publish import read_journal
from pipeline.records import ModelFacts
from pipeline.run_left import Left
from pipeline.store import RunFolder, digest_file, write_text
from pipeline.version_branch import head_commit
from pipeline.versions import KINDS, Allocation, Kind, Registry, verify


def write_cards(
    config: PipelineConfig, left: Left, registry: Registry, allocations: Mapping[Kind, Allocation], *, base: ModelFacts | None,
    serving: Mapping[str, Any], now: str, asked: str | None = None,
) -> list[str]:  # fmt: skip
    """Records the versions and writes the cards; gives the cards' digests. `asked`: key of the model that was to be made, if another was.

    Raises:
        ArtifactError: a card breaks the Hub's rules.
    """
    commit, made, evaluation = head_commit(config.root), left.made(), left.scores()
    tuned = made["approach"] == "fine_tuning"
    artifacts = {
        "dataset": left.digest("format", "formatted_dataset.csv"),
        "model": left.digest("finetune", "fine_tuned_model.gguf" if tuned else "model_set_config.json"),
        "run": left.digest("evaluate", "scores.json"),
    }
    version = {
        kind: registry.record(
            allocation,
            created=now,
            artifact=artifacts[kind],
            machine=_machine(made, serving) if kind == "model" else {},
            commit=commit,
            asked=asked if kind == "model" else None,
        )
        for kind, allocation in allocations.items()
    }
    history = {kind: registry.history(kind) for kind in allocations}
    written = {
        "dataset": cards.dataset_card(config, left.quality(), version=version["dataset"], history=history["dataset"]),
        "model": cards.model_card(
            config, base, version=version["model"], history=history["model"], method="lora" if tuned else "model_set",
            reason=made["reason"], training=left.training(made), evaluation=evaluation, validation=made["validation"],
            lineage=left.lineage(), evaluated_on=version["dataset"]["name"],
        ),
        "run": cards.run_card(config, evaluation, version=version["run"], history=history["run"], lineage=left.lineage()),
    }  # fmt: skip
    paths = {kind: config.metadata_path / f"{kind}_card.yaml" for kind in written}
    for kind, card in written.items():
        if problems := cards.validate_card(kind, card):
            raise ArtifactError(f"the {kind} card breaks the Hub's rules:\n" + "\n".join(f"  - {problem}" for problem in problems))
        cards.write_card(paths[kind], card)
    return [digest_file(path) for path in paths.values()]


def _machine(made: Mapping[str, Any], serving: Mapping[str, Any]) -> dict[str, Any]:
    training = made.get("training") or {}
    packages = {name: package_version(name) for name in ("torch", "transformers", "xllamacpp")}
    return {"dtype": training.get("dtype"), "threads": training.get("threads"), **serving, "packages": packages}


def write_log(path: Path, stages: Sequence[Any], *, started: datetime, exit_code: int, counts: Mapping[str, Any]) -> None:
    """Adds a line for each stage of a run (`StageOutcome`); no record text."""
    kept = path.read_text(encoding="utf-8") if path.is_file() else ""
    lines = [
        json.dumps({"run_started": started.isoformat(timespec="seconds"), "stage": o.stage, "action": o.action, "seconds": o.seconds,
                    "exit": exit_code if o.stage == "evaluate" else 0, "counts": counts.get(o.stage)}, ensure_ascii=False)
        for o in stages
    ]  # fmt: skip
    write_text(path, kept + "".join(line + "\n" for line in lines))


def problems_of(metadata: Path, folder: RunFolder, stages: Sequence[str], *, full: bool) -> list[str]:
    """Problems in the metadata and of files that are not what their stage left; empty when all is well. What an earlier call found good
    and what has not changed since is not read again, unless `full`."""
    problems = verify(metadata, full=full, cache=folder / ".verified.tsv") if metadata.is_dir() else []
    for kind in KINDS:
        path = metadata / f"{kind}_card.yaml"
        with contextlib.suppress(ArtifactError):  # a card that can't be read is named already
            card = cards.read_card(path)
            problems += [f"{path.name}: {problem}" for problem in cards.validate_card(kind, card)]
    try:
        read_journal(metadata)
    except ArtifactError as error:
        problems.append(f"{error}; {error.hint}")
    for stage in stages:
        problems += [problem] if (problem := folder.damaged(stage)) else []
        problems += [f"{problem} (left by {stage})" for problem in folder.changed(stage, full=full)]
    return problems

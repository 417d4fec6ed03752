"""What the stages of a run left in its output folder, read back."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.config import PipelineConfig
from pipeline.store import RunFolder, read_json

if TYPE_CHECKING:
    from pipeline.records import Answer, DataQuality, Evaluation, Record, Split, TrainingResult


class Left:
    """Facts, digests and files of finished stages. Damaged files are ArtifactErrors."""

    def __init__(self, config: PipelineConfig, folder: RunFolder) -> None:
        self._config, self._folder = config, folder

    def facts(self, stage: str) -> Mapping[str, Any]:
        manifest = self._folder.manifest(stage)
        return manifest["facts"] if manifest else {}

    def digest(self, stage: str, name: str) -> str | None:
        manifest = self._folder.manifest(stage)
        return manifest["files"].get(name, {}).get("digest") if manifest else None

    def wants_model_set(self) -> bool:
        return self._config.model_set.compare or "model_set" in self._config.evaluate.systems

    def primary(self) -> str:
        """The system that the verdict is about and the run is named after."""
        return "fine_tuned" if self.facts("finetune").get("approach") == "fine_tuning" else "model_set"

    def systems(self) -> dict[str, str]:
        """The systems to ask and the digest of each one's model: those configured, as far as the model stage made them."""
        made: Mapping[str, str] = self.facts("finetune").get("models", {})
        wanted = [*self._config.evaluate.systems, self.primary(), *(["model_set"] if self.wants_model_set() else [])]
        return {name: made[name] for name in ("base", "fine_tuned", "model_set") if name in made and name in wanted}

    def lineage(self) -> dict[str, str]:
        digests = {
            "formatted_dataset.csv": self.digest("format", "formatted_dataset.csv"),
            "outputs.jsonl": self.digest("infer", "outputs.jsonl"),
            "scores.json": self.digest("evaluate", "scores.json"),
            **{f"model of {name}": digest for name, digest in self.systems().items()},
        }
        return {name: digest for name, digest in digests.items() if digest}

    def records(self) -> tuple[Record, ...]:
        from pipeline.formatter_promptbuilder import read_formatted

        return read_formatted(self._folder / "formatted_dataset.csv", self._config.dataset.scale)

    def splits(self) -> dict[str, Split]:
        """Row key -> split, as versions note them down."""
        from pipeline.formatter_promptbuilder import row_key

        return {row_key(record.prompt): record.split for record in self.records()}

    def answers(self, rows: Sequence[Record]) -> list[Answer]:
        from pipeline.inference_runner import given_answers, read_answers

        systems = list(self.systems())
        ids = [row.record_id for row in rows]
        made = read_answers(self._folder / "outputs.jsonl", record_ids=ids, systems=systems) if systems else ()
        return [*made, *given_answers(rows)]

    def model_set(self) -> Any:
        from pipeline.model_set import read_model_set

        return read_model_set(self._folder / "model_set_config.json")

    def made(self) -> dict[str, Any]:
        made: dict[str, Any] = read_json(self._folder / "fine_tuning_metadata.json")
        return made

    def training(self, made: Mapping[str, Any]) -> TrainingResult | None:
        from pydantic import TypeAdapter

        from pipeline.records import TrainingResult

        return TypeAdapter(TrainingResult).validate_python(made["training"]) if made["training"] else None

    def scores(self) -> Evaluation:
        from pydantic import TypeAdapter

        from pipeline.records import Evaluation

        return TypeAdapter(Evaluation).validate_python(read_json(self._folder / "scores.json"))

    def quality(self) -> DataQuality:
        from pipeline.formatter_promptbuilder import read_quality

        quality = read_quality(self._folder / "data_quality.json")
        return dataclasses.replace(quality, prompt_tokens=self.made().get("prompt_tokens", {}))

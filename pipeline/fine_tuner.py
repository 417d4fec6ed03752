"""FineTuner: rated rows -> a validated fine-tuned model, or a model set where that can't be.

python -m pipeline.fine_tuner --input outputs/formatted_dataset.csv --model smollm2-135m-instruct --topics "respiratory infections"
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import GenerateConfig, ModelSetConfig, PromptConfig, TrainConfig
from pipeline.errors import (
    ConfigError,
    DataError,
    DatasetTooSmallWarning,
    FineTuningNotSupportedError,
    ModelNotFoundError,
    ModelSetConfigError,
    TrainingFailedError,
)
from pipeline.parity import CHECKED_ROWS, check_parity
from pipeline.ports import BaseModel, Engine, EngineFactory, ModelSetBuilder, Progress, Trainer, quiet
from pipeline.prompts import answer_text, messages_for
from pipeline.records import Prompt, RatingScale, Record, to_plain
from pipeline.store import digest_file, explained, write_json, write_text, writing
from pipeline.training_rows import TokenisedRows, records_from_frame, scale_from_mapping, tokenised

if TYPE_CHECKING:
    import pandas as pd

FEWEST_ROWS = 50
FINE_TUNED_FILES = ("fine_tuned_model.gguf", "adapter.gguf", "training_data.jsonl", "training_config.yaml", "fine_tuning_metadata.json")
MODEL_SET_FILES = ("model_set_config.json", "fine_tuning_metadata.json")

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class TuneConfig:
    """Everything that decides what comes out, but the rows."""

    model_name: str = "smollm2-135m-instruct:q4_1"
    seed: int = 42
    train: TrainConfig = TrainConfig()
    prompt: PromptConfig = PromptConfig()
    generate: GenerateConfig = GenerateConfig()
    model_set: ModelSetConfig = ModelSetConfig()
    root: Path = Path()


class _Fallback(Exception):
    """Why training is left for a model set. Carries the error to raise when the fallback is off."""

    def __init__(self, reason: str, error: Exception) -> None:
        super().__init__(reason)
        self.reason, self.error = reason, error


class FineTuner:
    """Fine-tunes a model on rated rows.

    Args:
        debug_mode: log at level debug, into `fine_tuner.log` in the output folder too, with the first training example; without it no
            record text is logged.
        fallback_mode: make a model set where training can't be done; off, that is an error.
        trainer, open_engine, resolve, build_model_set: what does the work; by default LoRA, llama.cpp in this process, the models on
            this machine, and `pipeline.model_set`.
        serve: opens the engine that will answer with the fine-tuned model, where that is another than `open_engine`'s: it is checked too.
    """

    def __init__(
        self,
        debug_mode: bool = False,
        fallback_mode: bool = True,
        *,
        trainer: Trainer | None = None,
        open_engine: EngineFactory | None = None,
        resolve: Callable[..., BaseModel] | None = None,
        build_model_set: ModelSetBuilder | None = None,
        serve: Callable[[Path], Engine] | None = None,
        progress: Progress = quiet,
    ) -> None:
        self.debug_mode, self.fallback_mode, self.progress = debug_mode, fallback_mode, progress
        self._trainer, self._open_engine, self._resolve, self._build_model_set = trainer, open_engine, resolve, build_model_set
        self._serve = serve

    def process_dataset(
        self,
        df: pd.DataFrame,
        model_name: str = TuneConfig.model_name,
        rating_mapping: Mapping[Any, Any] | None = None,
        target_topics: str | Sequence[str] = "",
        output_dir: str | Path = "outputs",
        *,
        epochs: int = TrainConfig.epochs,
        learning_rate: float = TrainConfig.learning_rate,
        batch_size: int = TrainConfig.batch_size,
        seed: int = TuneConfig.seed,
    ) -> tuple[bool, dict[str, Any]]:
        """Fine-tunes `model_name` on a table, or makes a model set.

        Args:
            df: a prompt column (`prompt` or `formatted_prompt`) and a rating column (`rating`, `standardized_rating` or
                `Expert Rating`); optional: `rationale` or `Rationale of Rating`, `record_id`, `group`, `split` (then only train and
                valid rows are used, test rows never).
            rating_mapping: label -> rating, or rating -> label where the ratings are numbers. By default the table's `rating` and
                `label` columns say it.
            target_topics: what the ratings are about.

        Returns:
            (whether an artifact was written and validated, metadata: also in `fine_tuning_metadata.json`).

        Raises:
            DataError: the table, with row numbers. ConfigError: a setting. OutputError: the folder. ArtifactError: a damaged base, or
            a result that does not serve what was trained. FineTuningNotSupportedError, TrainingFailedError: with the fallback off.
            ModelSetConfigError: not even a model set.
        """
        from pipeline.config import section_from

        topics = [target_topics] if isinstance(target_topics, str) else list(target_topics)
        train = section_from(TrainConfig, {"epochs": epochs, "learning_rate": learning_rate, "batch_size": batch_size}, source="FineTuner")
        prompt = PromptConfig(topic=", ".join(topic for topic in topics if topic) or None)
        # a mapping says which ratings there are, not that they have an order
        scale = scale_from_mapping(rating_mapping if rating_mapping is not None else _mapping_in(df), ordered=False)
        records = records_from_frame(df, scale, prompt, seed=seed)
        return self.tune(records, scale, TuneConfig(model_name, seed, train, prompt), Path(output_dir))

    def tune(self, records: Sequence[Record], scale: RatingScale, config: TuneConfig, output_dir: Path) -> tuple[bool, dict[str, Any]]:
        """The same from records: see `process_dataset`."""
        with explained(output_dir / "fine_tuning_metadata.json"):
            output_dir.mkdir(parents=True, exist_ok=True)
        with self._debug_log(output_dir) if self.debug_mode else contextlib.nullcontext():
            return True, self._tune(records, scale, config, output_dir)

    def _tune(self, records: Sequence[Record], scale: RatingScale, config: TuneConfig, output_dir: Path) -> dict[str, Any]:
        usable = [record for record in records if record.split != "test"]
        facts: dict[str, Any] = {"data": _data_checks(records, scale), "config": _plain_config(config)}
        base: BaseModel | None = None
        try:
            too_few = self._too_few(len(records))
            base = self._find(config)
            if too_few and self.fallback_mode:
                raise _Fallback(too_few, FineTuningNotSupportedError(too_few))
            facts |= self._fine_tune(base, usable, scale, config, output_dir)
        except _Fallback as fallback:
            if not self.fallback_mode:
                raise fallback.error from fallback.error.__cause__
            logger.warning("making a model set instead of fine-tuning: %s", fallback.reason)
            facts |= self.make_model_set(base, usable, scale, config, output_dir, fallback.reason)
        write_json(output_dir / "fine_tuning_metadata.json", facts)
        other = FINE_TUNED_FILES if facts["approach"] == "model_set" else MODEL_SET_FILES
        for name in set(other) - {"fine_tuning_metadata.json"}:  # left by an earlier run the other way: it would pass for this one's
            (output_dir / name).unlink(missing_ok=True)
        return facts

    def _too_few(self, rows: int) -> str | None:
        """Warns where there are too few rows; the reason, or None."""
        if rows >= FEWEST_ROWS:
            return None
        reason = f"{rows} usable rows; fewer than {FEWEST_ROWS} are too few to fine-tune on"
        warnings.warn(reason, DatasetTooSmallWarning, stacklevel=5)
        return reason

    def _find(self, config: TuneConfig) -> BaseModel:
        if self._resolve is None:
            from pipeline.backends.serving import EmbeddedServing

            self._resolve = EmbeddedServing().find
        try:
            return self._resolve(config.model_name, root=config.root)
        except ModelNotFoundError as error:
            raise _Fallback(f"{error}", FineTuningNotSupportedError(str(error), hint=error.hint)) from error

    # --- the training way ---

    def _fine_tune(
        self, base: BaseModel, records: Sequence[Record], scale: RatingScale, config: TuneConfig, output_dir: Path
    ) -> dict[str, Any]:
        trainer = self._working_trainer(base, config)
        try:
            with self._engine(base.path) as engine:
                self.progress("prepare", 0, len(records), "prompts in tokens")
                room = base.facts.context_length
                limit = min(config.prompt.max_tokens, room - config.generate.max_tokens)
                rows = tokenised(records, engine, scale, max_tokens=limit, context_tokens=room)
                _must_have_room(config.generate, rows)
                fitting = {row.record_id for row in (*rows.train, *rows.valid)}
                checked = _rows_to_check([record for record in records if record.record_id in fitting])
                base_probabilities = engine.rating_probabilities([Prompt(r.record_id, messages_for(r)) for r in checked], scale)
        except FineTuningNotSupportedError as error:
            raise _Fallback(str(error), error) from error
        if not rows.train:
            reason = f"no train row fits: {dict(rows.refused)}"
            raise _Fallback(reason, DataError("dataset", [reason], hint="raise prompt.max_tokens, or shorten the texts"))
        estimate = self._estimate(trainer, base, rows, config)
        self._log_example(records, rows)
        try:
            trained = trainer.train(base, rows.train, rows.valid, config.train, seed=config.seed, folder=output_dir, progress=self.progress)
        except TrainingFailedError as error:
            raise _Fallback(str(error), error) from error
        self.progress("write", 0, 0, "merging the adapter into the base")
        unchecked = output_dir / ".checkpoint"  # what was there before stays until the new files are found good
        unchecked.mkdir(exist_ok=True)
        merge = trained.write(unchecked)
        validation = check_parity(
            trained,
            checked,
            {row.record_id: row for row in (*rows.train, *rows.valid)},
            base_probabilities,
            tree=rows.tree,
            scale=scale,
            generate=config.generate,
            base=base.path,
            output_dir=unchecked,
            open_engine=self._engine,
            serve=self._serve,
            progress=self.progress,
        )
        for name in ("adapter.gguf", "fine_tuned_model.gguf"):
            (unchecked / name).replace(output_dir / name)
        self._write_training_data(records, rows, config, scale, output_dir)
        return {
            "approach": "fine_tuning",
            "reason": "the model can be trained on this machine and there are enough rows",
            "base": to_plain(base.facts),
            "estimate": estimate,
            "prompt_tokens": _lengths(rows),
            "training": to_plain(dataclasses.replace(trained.result, refused_rows=rows.refused)),
            "merge": merge,
            "validation": validation,
            "digests": {name: digest_file(output_dir / name) for name in FINE_TUNED_FILES if name != "fine_tuning_metadata.json"},
        }

    def _working_trainer(self, base: BaseModel, config: TuneConfig) -> Trainer:
        if not config.train.enabled:
            raise _Fallback("train.enabled is false", FineTuningNotSupportedError("train.enabled is false and the fallback is off"))
        if self._trainer is None:
            try:
                from pipeline.backends.lora import LoraTrainer
            except ModuleNotFoundError as error:
                if error.name not in ("torch", "transformers"):
                    raise
                reason = f"training needs torch and transformers; {error.name} is not installed"
                raise _Fallback(reason, FineTuningNotSupportedError(reason, hint="run `uv sync`")) from error
            self._trainer = LoraTrainer()
        why_not = base.why_untrainable or self._trainer.unsupported(base)
        if why_not:
            raise _Fallback(why_not, FineTuningNotSupportedError(why_not, hint="choose another base model, or leave the fallback on"))
        return self._trainer

    def _engine(self, model: Path, *, adapter: Path | None = None, context_tokens: int = 0) -> Any:
        if self._open_engine is None:
            from pipeline.backends.llamacpp import open_engine

            self._open_engine = open_engine
        return self._open_engine(model, adapter=adapter, context_tokens=context_tokens)

    def _estimate(self, trainer: Trainer, base: BaseModel, rows: TokenisedRows, config: TuneConfig) -> dict[str, Any]:
        from pipeline.machine import machine_facts

        estimate = trainer.estimate(base, rows.train, rows.valid, config.train)
        free = machine_facts(Path(), services=False).free_memory_bytes
        note = f"about {estimate.seconds / 60:.0f} min and {estimate.memory_bytes / 1e9:.1f} GB for {len(rows.train)} rows"
        self.progress("prepare", len(rows.train), len(rows.train), note)
        logger.info("training will take %s", note)
        if free and estimate.memory_bytes > free:
            reason = f"training needs about {estimate.memory_bytes / 1e9:.1f} GB of memory; {free / 1e9:.1f} GB are free"
            raise _Fallback(reason, FineTuningNotSupportedError(reason, hint="a smaller base model or shorter rows need less"))
        return {"seconds": round(estimate.seconds), "memory_bytes": estimate.memory_bytes}

    def _write_training_data(
        self, records: Sequence[Record], rows: TokenisedRows, config: TuneConfig, scale: RatingScale, output_dir: Path
    ) -> None:
        import json

        import yaml

        kept = {row.record_id for row in rows.train}
        with writing(output_dir / "training_data.jsonl") as temporary, temporary.open("w", encoding="utf-8", newline="\n") as out:
            for record in records:
                if record.record_id in kept and record.split == "train":
                    turns = [{"role": m.role, "content": m.content} for m in messages_for(record)]
                    turns.append({"role": "assistant", "content": answer_text(record.label, record.rationale)})
                    out.write(json.dumps({"messages": turns, "record_id": record.record_id}, ensure_ascii=False) + "\n")
        tree = {**_plain_config(config), "dataset": {"ratings": to_plain(scale.ratings), "ordered": scale.ordered}}
        write_text(output_dir / "training_config.yaml", yaml.safe_dump(tree, sort_keys=False, allow_unicode=True))

    # --- the model-set way ---

    def make_model_set(
        self, base: BaseModel | None, records: Sequence[Record], scale: RatingScale, config: TuneConfig, output_dir: Path, reason: str
    ) -> dict[str, Any]:
        """Writes model_set_config.json; gives what is said of it in the metadata.

        Raises:
            ModelSetConfigError: no row to take examples from.
        """
        from pipeline.model_set import build_model_set, write_model_set

        build: Any = self._build_model_set or build_model_set
        split = {name: [record for record in records if record.split == name] for name in ("train", "valid")}
        if not split["train"]:
            raise ModelSetConfigError("there is no train row to take examples from")
        settings: dict[str, Any] = {
            "scale": scale, "prompt": config.prompt, "generate": config.generate, "config": config.model_set, "reason": reason,
            "seed": config.seed, "base_name": config.model_name, "progress": self.progress,
        }  # fmt: skip
        if base is None:
            made = build(split["train"], split["valid"], base=None, engine=None, **settings)
        else:
            with self._engine(base.path) as engine:
                made = build(split["train"], split["valid"], base=base.facts, engine=engine, **settings)
        write_model_set(made, output_dir / "model_set_config.json")
        return {
            "approach": "model_set",
            "reason": reason,
            "base": to_plain(base.facts) if base else {"name": config.model_name, "digest": None},
            "training": None,
            "validation": {"examples": len(made.examples), "how": made.how},
            "digests": {"model_set_config.json": digest_file(output_dir / "model_set_config.json")},
        }

    # --- logs ---

    @contextlib.contextmanager
    def _debug_log(self, output_dir: Path) -> Iterator[None]:
        handler = logging.FileHandler(output_dir / "fine_tuner.log", mode="w", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s %(message)s"))
        package = logging.getLogger("pipeline")
        level = package.level
        package.setLevel(logging.DEBUG)
        package.addHandler(handler)
        try:
            yield
        finally:
            package.removeHandler(handler)
            package.setLevel(level)
            handler.close()

    def _log_example(self, records: Sequence[Record], rows: TokenisedRows) -> None:
        if not self.debug_mode:  # however verbose the logs are otherwise
            return
        first = rows.train[0]
        record = next(record for record in records if record.record_id == first.record_id)
        logger.debug(
            "first example %s\nprompt (masked, %d tokens %s):\n%s\nanswer (learnt, %d tokens %s, rating decided at %s):\n%s",
            first.record_id, len(first.prompt), list(first.prompt), record.prompt,
            len(first.answer), list(first.answer), list(first.rating_tokens), answer_text(record.label, record.rationale),
        )  # fmt: skip


def _mapping_in(df: pd.DataFrame) -> dict[Any, Any]:
    """label -> rating as a formatted dataset holds it, or each rating standing for itself."""
    if {"rating", "label"} <= set(df.columns):
        pairs = df[["label", "rating"]].dropna().drop_duplicates()
        return {str(label): value for label, value in pairs.itertuples(index=False)}
    name = next((name for name in ("rating", "standardized_rating", "Expert Rating") if name in df.columns), None)
    return {str(value): str(value) for value in df[name].dropna().unique()} if name else {"no rating column": 0, "at all": 1}


def _must_have_room(generate: GenerateConfig, rows: TokenisedRows) -> None:
    if generate.max_tokens <= rows.tree.longest:
        raise ConfigError(
            "generate.max_tokens", [f"{generate.max_tokens} tokens leave no room for a rationale; the rating takes {rows.tree.longest}"]
        )


def _rows_to_check(records: Sequence[Record]) -> list[Record]:
    """Valid rows first, filled up with train rows."""
    return sorted(records, key=lambda record: record.split != "valid")[:CHECKED_ROWS]


def _data_checks(records: Sequence[Record], scale: RatingScale) -> dict[str, Any]:
    """Counts only."""

    def count(split: str) -> dict[str, int]:
        return {label: sum(r.label == label and r.split == split for r in records) for label in scale.labels}

    return {
        "rows": len(records),
        "without_rationale": sum(not record.rationale for record in records),
        "ratings": {split: count(split) for split in ("train", "valid")},
        "test_rows_left_out": sum(record.split == "test" for record in records),
    }


def _lengths(rows: TokenisedRows) -> dict[str, float]:
    sizes = sorted(len(row.prompt) for row in (*rows.train, *rows.valid))
    return {"min": sizes[0], "median": sizes[len(sizes) // 2], "p95": sizes[int(0.95 * (len(sizes) - 1))], "max": sizes[-1]}


def _plain_config(config: TuneConfig) -> dict[str, Any]:
    """The settings under their names in pipeline.yaml."""
    return {
        "seed": config.seed,
        "prompt": to_plain(config.prompt),
        "model": {"name": config.model_name},
        "train": to_plain(config.train),
        "generate": to_plain(config.generate),
        "model_set": to_plain(config.model_set),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m pipeline.fine_tuner`: the same as `pipeline finetune`."""
    from pipeline.cli import main as pipeline_main

    return pipeline_main(["finetune", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())

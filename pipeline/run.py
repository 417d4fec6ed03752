"""The order of the stages, and only that: what runs, what is cached, what each is handed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pipeline.config import PipelineConfig
from pipeline.errors import ArtifactError, ModelNotFoundError, OutputError
from pipeline.ports import BaseModel, Engine, Progress, Serving, quiet
from pipeline.records import SPLITS, ModelFacts, Record, fingerprint, to_plain
from pipeline.run_left import Left
from pipeline.store import RunFolder, digest_file, explained, read_json, write_json, write_text

if TYPE_CHECKING:
    from pipeline.fine_tuner import TuneConfig
    from pipeline.inference_runner import Flips, SystemRun
    from pipeline.records import Split
    from pipeline.versions import Allocation, Kind, Registry, RunReservation

STAGES = ("format", "finetune", "infer", "evaluate", "version", "report", "register")
# Part of each stage's key: raise one when its stage gives something else for the same inputs.
STAGE_VERSIONS = {"format": 1, "finetune": 1, "infer": 2, "evaluate": 2, "version": 3, "report": 1, "register": 1}
KINDS: tuple[Kind, ...] = ("dataset", "model", "run")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StagePlan:
    stage: str
    action: Literal["run", "cached"]
    why: str
    seconds: float | None  # what it took last time; None when it never ran here


@dataclass(frozen=True)
class StageOutcome:
    stage: str
    action: Literal["ran", "cached"]
    seconds: float
    summary: str


@dataclass(frozen=True)
class RunResult:
    stages: tuple[StageOutcome, ...]
    unchanged: bool
    verdict: str | None
    versions: Mapping[str, str]
    files: Mapping[str, str]
    systems: tuple[Mapping[str, Any], ...]
    exit_code: int


class Pipeline:
    """One configuration and its output folder."""

    def __init__(self, config: PipelineConfig, *, progress: Progress = quiet, debug: bool = False, fallback: bool = True) -> None:
        self.config, self.progress, self.debug, self.fallback = config, progress, debug, fallback
        self.folder = RunFolder(config.output_path)
        self.left = Left(config, self.folder)
        self.scale = config.dataset.scale
        self._base: BaseModel | None = None
        self._base_missing = self._may_download = False  # looking at the plan fetches nothing
        self._may_replace = False
        self.reservation: RunReservation | None = None  # in place of the output folder's, while versions are being held

    # --- what there is to do ---

    def plan(self) -> tuple[StagePlan, ...]:
        """What `run` would do, stage by stage. After the first stage that must run, the later ones run too."""
        plans: list[StagePlan] = []
        stale = None
        for stage in STAGES:
            why = f"{stale} runs" if stale else self._why(stage)
            facts = (self.folder.manifest(stage) or {}).get("facts", {})
            if why is None:
                plans.append(StagePlan(stage, "cached", "nothing it depends on changed", 0.0))
            else:
                stale = stale or stage
                plans.append(StagePlan(stage, "run", why, facts.get("seconds")))
        return tuple(plans)

    def run(self, until: str = STAGES[-1], *, force: bool = False, replace: bool = False) -> RunResult:
        """Runs what is not cached, up to and including `until`. `replace`: a server's model of the version's name may be replaced."""
        from pipeline.privacy import check_repository

        check_repository(self.config.dataset.shareable, os.environ)
        self._check_gates()
        self._may_download, self._may_replace, self._base_missing = True, replace, False
        started = datetime.now(UTC)
        outcomes: list[StageOutcome] = []
        with self._alone():
            for stage in STAGES[: STAGES.index(until) + 1]:
                if not force and self._why(stage) is None:
                    outcomes.append(StageOutcome(stage, "cached", 0.0, self.left.facts(stage).get("summary", "")))
                    continue
                outcomes.append(self._run_stage(stage))
        result = self._result(tuple(outcomes))
        if not result.unchanged and "run" in result.versions and self.left.facts("version").get("recorded"):
            from pipeline.run_cards import write_log

            path = self.config.metadata_path / "runs" / f"{result.versions['run']}.jsonl"
            counts = {"infer": self.left.facts("infer").get("counts")}
            write_log(path, result.stages, started=started, exit_code=result.exit_code, counts=counts)
        return result

    def _run_stage(self, stage: str) -> StageOutcome:
        begun = time.monotonic()
        self.progress(stage, 0, 0, "")
        key = self._key(stage)
        work: Callable[[], tuple[list[str], dict[str, Any]]] = getattr(self, f"_{stage}")
        files, facts = work()
        seconds = round(time.monotonic() - begun, 2)
        # rows that failed are asked again by the next run
        self.folder.finish(stage, fingerprint(key, "again") if facts.get("again") else key, files, {**facts, "seconds": seconds})
        return StageOutcome(stage, "ran", seconds, str(facts["summary"]))

    def _key(self, stage: str) -> str:
        """What the stage is asked for: its settings and the digests of what it reads."""
        config, left = self.config, self.left
        parts: dict[str, Callable[[], list[Any]]] = {
            "format": lambda: [
                self._table_digest(), _without(config.dataset, "path", "license", "language", "shareable"), config.prompt, config.seed,
            ],
            "finetune": lambda: [
                left.facts("format").get("train_valid"), self.scale, config.train, config.prompt, config.generate, config.model_set,
                left.wants_model_set(), config.seed, self._base_identity(), *self._manner(),
            ],
            "infer": lambda: [
                left.facts("format").get("test"), self.scale.labels, left.systems(), config.generate, config.prompt.max_tokens,
                *([self._through()] if self._serving.served_apart() else []),
            ],
            "evaluate": lambda: [
                left.digest("infer", "outputs.jsonl"), left.digest("format", "formatted_dataset.csv"), self.scale,
                left.systems(),
                left.primary(), config.evaluate, config.seed, *([flips] if (flips := left.facts("infer").get("flips")) else []),
            ],
            "version": lambda: [
                [planned.key for planned in self.allocations(provisional=False).values()], self._found(), self.allocates(),
                config.project, config.dataset.license, config.dataset.language, config.publish,
            ],
            "register": lambda: [
                self._through(), left.facts("version").get("versions"), left.facts("version").get("recorded"), left.systems(),
            ],
            "report": lambda: [
                self._found(), left.digest("format", "formatted_dataset.csv"), left.facts("version").get("versions"), self._settings(),
            ],
        }  # fmt: skip
        return fingerprint(stage, STAGE_VERSIONS[stage], *parts[stage]())

    def _found(self) -> list[str | None]:
        """Digests of what cards and report speak of."""
        files = (("format", "data_quality.json"), ("finetune", "fine_tuning_metadata.json"), ("evaluate", "scores.json"))
        return [self.left.digest(stage, name) for stage, name in files]

    def _settings(self) -> dict[str, Any]:
        """The configuration as the report shows it."""
        return {name: to_plain(value) for name, value in vars(self.config).items() if name not in ("root", "output_dir")}

    def _why(self, stage: str) -> str | None:
        """Why the stage must run, or None."""
        beside = {"finetune": self._fallback_refused, "format": self._splits_moved}
        beside |= {"version": self._metadata_lost, "register": self._unregistered}
        return self.folder.why_not_done(stage, self._key(stage)) or (beside[stage]() if stage in beside else None)

    def _splits_moved(self) -> str | None:
        """The recorded splits are neither those that were read when the rows were formatted nor those that were written then."""
        known = (self.left.facts("format").get("splits_file"), self.left.facts("version").get("splits_file"))
        return None if self.config.dataset.columns.split or self._splits_file() in known else "the recorded splits changed"

    def _splits_file(self) -> str | None:
        path = self.config.metadata_path / "versions" / "splits.csv"
        own = digest_file(path) if path.is_file() else None
        told = self._reservation()
        return fingerprint(own, told.assigned) if told and told.assigned else own

    def _metadata_lost(self) -> str | None:
        """What the version stage wrote is not there any more, or is not what it wrote."""
        facts = self.left.facts("version")
        if not facts.get("recorded"):
            return None
        paths = [self.config.metadata_path / f"{kind}_card.yaml" for kind in KINDS]
        if [digest_file(path) if path.is_file() else None for path in paths] != facts["cards"]:
            return "a card is missing or was changed"
        if not (self.config.metadata_path / "versions" / "splits.csv").is_file():
            return "the recorded splits are missing"
        if self._registry().rebuilt:
            return "the index of the versions is to be written again"
        lost = [planned.name for planned in self.allocations(provisional=False).values() if not planned.existing]
        return f"{', '.join(lost)} is not recorded" if lost else None

    def allocates(self) -> bool:
        """Whether this checkout may give out versions: only the default branch does."""
        from pipeline.versions import default_branch_state

        return default_branch_state(self.config.root).allocates

    def _table_digest(self) -> str | None:
        try:
            return digest_file(self.config.dataset_path)
        except ArtifactError:
            return None  # the formatter says what is wrong with the path

    def _base_or_fail(self) -> BaseModel:
        base = self._find_base()
        if base is None:
            raise ModelNotFoundError(f"{self.config.model.name}: the base model is not here any more", hint="run again")
        return base

    def _base_identity(self) -> str:
        base = self._find_base()
        return base.facts.digest if base else f"not found: {self.config.model.name}"

    @functools.cached_property
    def _serving(self) -> Serving:
        from pipeline.backends.serving import open_serving

        # who only looks does not wait for a server that is away
        return open_serving(self.config.model.engine, pull=self.config.model.pull, patient=self._may_download)

    def _find_base(self) -> BaseModel | None:
        if self._base is None and not self._base_missing:
            try:
                self._base = self._base_of_name(verify=False)
            except ModelNotFoundError as error:
                made = self.left.facts("finetune")
                if made.get("base") == self.config.model.name and made.get("models", {}).get("base"):
                    # it was here when these results were made: to make others without it would throw them away
                    raise ModelNotFoundError(
                        f"{error}; it was there before", hint=f"{error.hint}; or name another output_dir to go on without it"
                    ) from error
                self._base_missing = True
        return self._base

    def _base_of_name(self, *, verify: bool) -> BaseModel:
        return self._serving.find(
            self.config.model.name, root=self.config.root, allow_download=self._may_download, verify=verify, progress=self.progress
        )

    def _through(self) -> str:
        """What answers come through, as far as it decides them."""
        return " ".join([self._serving.name, *self._manner()])

    def _manner(self) -> list[str]:
        """How a server puts chats with the base into words, where that is not as the base's file says."""
        base = self._find_base()
        manner = self._serving.manner(base) if base else None
        return [manner] if manner else []

    def _fallback_refused(self) -> str | None:
        made = self.left.facts("finetune")
        if not self.fallback and made.get("approach") == "model_set":
            return "a model set was made, and the fallback is off now"
        if made.get("approach") == "fine_tuning" and self._serving.served_apart() and not made.get("served"):
            return "what the server answers was not compared with the trained model"  # training itself goes on from its checkpoint
        return None

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Holds the folder against a second run at the same time."""
        with explained(self.folder / ".lock"):
            self.folder.path.mkdir(parents=True, exist_ok=True)
            lock = (self.folder / ".lock").open("w")
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(
                    f"{self.folder.path}: another run is at work here", hint="wait for it, or name another output_dir"
                ) from None
            except OSError as error:
                logger.warning("%s: this file system has no locks (%s): run only once at a time here", self.folder.path, error.strerror)
            for torn in self.folder.path.glob(".*.part"):  # of a run that was killed while it wrote
                torn.unlink(missing_ok=True)
            yield

    def _check_gates(self) -> None:
        if self.config.evaluate.gates or self.config.evaluate.judge:
            from pipeline.evaluation_gates import check_gates

            given = ["copilot"] * (self.config.dataset.copilot is not None) + list(self.config.dataset.raters)
            tuned, prompted = self.config.train.enabled, self.left.wants_model_set() or not self.config.train.enabled
            models = ["base", *(["fine_tuned"] if tuned else []), *(["model_set"] if prompted else [])]
            check_gates(self.config.evaluate, systems=[*models, *given, "majority"], scale=self.scale)

    # --- the stages ---

    def _format(self) -> tuple[list[str], dict[str, Any]]:
        from pipeline.formatter_promptbuilder import format_dataset

        quality = format_dataset(self.config, self.folder.path, assigned=self._assigned(), progress=self.progress)
        records = self.left.records()
        rows = {name: quality.splits[name].rows for name in SPLITS}
        facts = {
            "train_valid": fingerprint([r for r in map(_trained_on, records) if r["split"] != "test"]),
            "splits_file": self._splits_file(),
            "test": fingerprint([[r.record_id, r.prompt] for r in records if r.split == "test"]),
            "summary": f"{quality.rows_kept} rows ({', '.join(f'{n} {name}' for name, n in rows.items())}), {len(quality.dropped)} dropped",
        }
        return ["formatted_dataset.csv", "data_quality.json"], facts

    def _finetune(self) -> tuple[list[str], dict[str, Any]]:
        from pipeline.fine_tuner import FINE_TUNED_FILES, MODEL_SET_FILES, FineTuner

        tuner = FineTuner(
            self.debug, self.fallback, progress=self.progress, resolve=lambda *_, **__: self._base_of_name(verify=True),
            open_engine=lambda model, **settings: self._serving.on_file(self._base_or_fail())(model, **settings),
            serve=(lambda model: self._serving.serve(self._base_or_fail(), model)) if self._serving.served_apart() else None,
        )  # fmt: skip
        records = self.left.records()
        tune = self._tune_config()
        _, made = tuner.tune(records, self.scale, tune, self.folder.path)
        base = self._find_base()
        models = {"base": base.facts.digest} if base else {}
        files = list(MODEL_SET_FILES)
        if made["approach"] == "fine_tuning":
            files = list(FINE_TUNED_FILES)
            models["fine_tuned"] = made["digests"]["fine_tuned_model.gguf"]
            if base and (words := self._serving.words(base)):  # for whoever serves the file elsewhere
                write_json(self.folder / "fine_tuning_metadata.json", {**made, "served_with": words})
            if self.left.wants_model_set():
                tuner.make_model_set(base, records, self.scale, tune, self.folder.path, "compared with the fine-tuned model")
                files.append("model_set_config.json")
        if "model_set_config.json" in files and base:
            models["model_set"] = self.left.model_set().model_digest
        facts = {"approach": made["approach"], "models": models, "served": "served" in made["validation"], "base": self.config.model.name}
        return files, {**facts, "summary": _summary_of_tuning(made)}

    def _infer(self) -> tuple[list[str], dict[str, Any]]:
        from pipeline.inference_runner import SystemRun, run_inference

        rows = [record for record in self.left.records() if record.split == "test"]
        runs = [
            SystemRun(system, self._prompts(system, rows), digest, functools.partial(self._answering, system))
            for system, digest in self.left.systems().items()
        ]
        asked: dict[str, Any] = {
            "scale": self.scale, "generate": self.config.generate, "max_prompt_tokens": self.config.prompt.max_tokens,
            "through": self._through(), "progress": self.progress,
        }  # fmt: skip
        counts = run_inference(runs, self.folder / "outputs.jsonl", **asked)
        flips = self._flips(runs, asked)
        summary = "; ".join(f"{name}: {c.done} answers made, {c.resumed} kept" for name, c in counts.systems.items()) or "no model to ask"
        failed = sum(count.errors.get("failed", 0) for count in counts.systems.values())
        return ["outputs.jsonl"], {"counts": to_plain(counts), "flips": to_plain(flips), "summary": summary, "again": failed > 0}

    def _answering(self, system: str) -> Engine:
        return self._serving.serve(self._base_or_fail(), self.folder / "fine_tuned_model.gguf" if system == "fine_tuned" else None)

    def _flips(self, runs: Sequence[SystemRun], asked: Mapping[str, Any]) -> Flips | None:
        """How far a server's answers differ when it is asked again."""
        from pipeline.inference_runner import ask_again

        primary = next((run for run in runs if run.system == self.left.primary()), None)
        return ask_again(primary, self.folder / "outputs.jsonl", **asked) if primary and self._serving.served_apart() else None

    def _prompts(self, system: str, rows: Sequence[Record]) -> list[Any]:
        from pipeline.prompts import messages_for
        from pipeline.records import Prompt

        messages = self.left.model_set().messages_for if system == "model_set" else messages_for
        return [Prompt(row.record_id, messages(row)) for row in rows]

    def _evaluate(self) -> tuple[list[str], dict[str, Any]]:
        from pipeline.backends.ragas_metrics import RagasScorer
        from pipeline.evaluation import evaluate, gate_exit_code
        from pipeline.inference_runner import Flips

        records = self.left.records()
        rows = [record for record in records if record.split == "test"]
        flips = self.left.facts("infer").get("flips")
        scores = evaluate(
            rows, self.left.answers(rows), scale=self.scale, config=self.config.evaluate, score=RagasScorer(), seed=self.config.seed,
            primary=self.left.primary(), train_labels=[record.label for record in records if record.split == "train"],
            remarks=[Flips(**flips).words] if flips else [], progress=self.progress,
        )  # fmt: skip
        write_json(self.folder / "scores.json", scores)
        return ["scores.json"], {"exit_code": gate_exit_code(scores), "summary": scores.verdict}

    def _version(self) -> tuple[list[str], dict[str, Any]]:
        """Allocates the three versions, records them and writes the cards; provisional ones write nothing."""
        from pipeline.versions import write_assignments

        allocations = self.allocations(provisional=not self.allocates())
        recorded = not any(allocation.provisional for allocation in allocations.values())
        versions = {kind: allocation.name for kind, allocation in allocations.items()}
        cards: list[str] = []
        if recorded:
            from pipeline.run_cards import write_cards

            base = self._find_base()
            cards = write_cards(
                self.config, self.left, self._registry(), allocations, base=base.facts if base else None, serving=self._serving.facts,
                now=_now(), asked=self._asked(allocations["model"].key),
            )  # fmt: skip
            write_assignments(self.config.metadata_path, self.left.splits())
        why = [sentence for allocation in allocations.values() for sentence in allocation.why]
        summary = ", ".join(versions.values()) + ("" if recorded else " (provisional: not the default branch)")
        facts = {"versions": versions, "recorded": recorded, "why": why, "cards": cards, "splits_file": self._splits_file()}
        return [], {**facts, "summary": summary}

    def _asked(self, key: str) -> str | None:
        """What the model was to be, by the reservation, where it became another one: a model set instead of training."""
        told = self._reservation()
        return next((r.key for r in told.allocations if r.kind == "model" and r.key != key), None) if told else None

    def _report(self) -> tuple[list[str], dict[str, Any]]:
        from pipeline.report import render_html, render_summary

        data = self._report_data()
        write_text(self.folder / "report.html", render_html(data))
        write_text(self.folder / "summary.md", render_summary(data))
        return ["report.html", "summary.md"], {"summary": str(self.folder / "report.html")}

    def _register(self) -> tuple[list[str], dict[str, Any]]:
        """Keeps what was made under its version's name, where a server can."""
        name, base = self.left.facts("version")["versions"]["model"], self._find_base()
        if not self._serving.served_apart():
            return [], {"kept": [], "summary": "no server to keep models"}
        if base is None:
            return [], {"kept": [], "summary": "nothing to register: the base model was not found"}
        if not self.left.facts("version").get("recorded"):
            return [], {"kept": [], "summary": "provisional versions are not registered"}
        made: list[Any] = []
        if self.left.primary() == "fine_tuned":
            made.append((name, self.folder / "fine_tuned_model.gguf"))
        if "model_set" in self.left.systems():
            made.append((f"{name}:model-set" if made else name, self.left.model_set().create_request()))
        kept = [self._serving.keep(called, base, model, replace=self._may_replace) for called, model in made]
        names = ", ".join(model.name for model in kept if model)
        return [], {"kept": to_plain(kept), "summary": f"ollama run {names}" if len(kept) == 1 else f"registered: {names}"}

    def _unregistered(self) -> str | None:
        """A model that was registered is not on the server any more."""
        gone = [kept["name"] for kept in self.left.facts("register").get("kept", []) if not self._serving.has(kept["name"], kept["digest"])]
        return f"{', '.join(gone)} is not registered any more" if gone else None

    # --- versions and cards ---

    def model_key(self, method: Literal["lora", "model_set"]) -> str:
        """What a model made that way would be known by."""
        from pipeline.versions import model_inputs

        base = self._find_base()
        return model_inputs(self.config, base.facts if base else None, self.left.facts("format").get("train_valid", ""), method).key

    def allocations(
        self, *, provisional: bool, registry: Registry | None = None, method: Literal["lora", "model_set"] | None = None
    ) -> dict[Kind, Allocation]:
        """The versions that this configuration has or would get. `method`: how the model will be made, where it is not made yet."""
        from pipeline.versions import dataset_inputs, model_inputs, run_inputs

        config = self.config
        registry = registry or self._registry()
        base = self._find_base()
        rows = self.left.digest("format", "formatted_dataset.csv") or ""
        method = method or ("lora" if self.left.facts("finetune").get("approach") == "fine_tuning" else "model_set")
        dataset = registry.plan(dataset_inputs(config, rows), provisional=provisional)
        model = registry.plan(
            model_inputs(config, base.facts if base else None, self.left.facts("format").get("train_valid", ""), method),
            lineage={"dataset": dataset}, provisional=provisional,
        )  # fmt: skip
        run = registry.plan(
            run_inputs(config, model.key, dataset.key), lineage={"model": model, "dataset": dataset}, provisional=provisional
        )
        return {"dataset": dataset, "model": model, "run": run}

    def _reservation(self) -> RunReservation | None:
        from pipeline.versions import read_reservation

        return self.reservation or read_reservation(self.folder.path)

    def _registry(self) -> Registry:
        """The recorded versions, and those that are held for this run."""
        from pipeline.versions import Registry

        told = self._reservation()
        return Registry.load(self.config.metadata_path, ours=told.allocations if told else ())

    def _assigned(self) -> dict[str, Split]:
        """The split of every row that a version assigned: of those recorded here, and of those recorded since this checkout was made."""
        from pipeline.versions import read_assignments

        told = self._reservation()
        return {**read_assignments(self.config.metadata_path), **(told.assigned if told else {})}

    def expected_method(self) -> Literal["lora", "model_set"]:
        """How the model was made or, where that is still to be done, will most likely be made."""
        from pipeline.fine_tuner import FEWEST_ROWS

        if self._why("finetune") is None:
            return "lora" if self.left.primary() == "fine_tuned" else "model_set"
        base = self._find_base()
        trains = self.config.train.enabled and base is not None and base.why_untrainable is None and len(self.left.records()) >= FEWEST_ROWS
        return "lora" if trains else "model_set"

    def versions(self, explain: bool = False) -> list[Mapping[str, Any]]:
        """The recorded versions, and first what this configuration has or would get, with reasons."""
        registry = self._registry()
        found: list[Mapping[str, Any]] = []
        if self.folder.manifest("finetune"):
            for planned in self.allocations(provisional=not self.allocates()).values():
                why = list(planned.why) + (registry.explain(planned.kind, planned.id) if explain and planned.existing else [])
                found.append({"kind": planned.kind, "name": planned.name, "state": _state(planned), "why": list(dict.fromkeys(why))})
        for kind in KINDS:
            for line in registry.history(kind):
                found.append({"kind": kind, "state": "recorded", **line})
        return found

    def verify(self, *, full: bool = False) -> list[str]:
        """Problems in the metadata and of what stages left (`run_cards.problems_of`)."""
        from pipeline.run_cards import problems_of

        return problems_of(self.config.metadata_path, self.folder, STAGES, full=full)

    # --- what stages and results are made from ---

    def _tune_config(self) -> TuneConfig:
        from pipeline.fine_tuner import TuneConfig

        c = self.config
        return TuneConfig(c.model.name, c.seed, c.train, c.prompt, c.generate, c.model_set, c.root)

    def _report_data(self) -> Any:
        from pipeline.report import ReportData

        left = self.left
        made, rows = left.made(), [record for record in left.records() if record.split == "test"]
        base = self._find_base()
        facts: ModelFacts | None = base.facts if base else None
        return ReportData(
            project=self.config.project, created=_now(), evaluation=left.scores(), records=rows, answers=left.answers(rows),
            quality=left.quality(), training=left.training(made), model=facts, approach=made["approach"], approach_reason=made["reason"],
            validation=made["validation"], versions=left.facts("version")["versions"], lineage=left.lineage(), config=self._settings(),
            topic=self.config.prompt.topic,
        )  # fmt: skip

    def _result(self, outcomes: tuple[StageOutcome, ...]) -> RunResult:
        scored = any(outcome.stage == "evaluate" for outcome in outcomes)
        scores = read_json(self.folder / "scores.json") if scored else None
        tuned = self.left.facts("finetune").get("approach") == "fine_tuning"
        left = {
            "report": "report.html", "summary": "summary.md", "scores": "scores.json", "dataset": "formatted_dataset.csv",
            "model": "fine_tuned_model.gguf" if tuned else "model_set_config.json",
        }  # fmt: skip
        done = {outcome.stage for outcome in outcomes}
        maker = {"report": "report", "summary": "report", "scores": "evaluate", "dataset": "format", "model": "finetune"}
        return RunResult(
            stages=outcomes,
            unchanged=all(outcome.action == "cached" for outcome in outcomes),
            verdict=scores["verdict"] if scores else None,
            versions=self.left.facts("version").get("versions", {}) if "version" in done else {},
            files={name: str(self.folder / file) for name, file in left.items() if maker[name] in done},
            systems=tuple(_headline(system) for system in scores["systems"]) if scores else (),
            exit_code=int(self.left.facts("evaluate").get("exit_code", 0)) if scored else 0,
        )


def _headline(system: Mapping[str, Any]) -> dict[str, Any]:
    accuracy = system["accuracy"]
    return {
        "name": system["system"], "accuracy": accuracy["value"], "low": accuracy["low"], "high": accuracy["high"],
        "macro_f1": system["macro_f1"]["value"], "n": system["n"], "n_invalid": system["n_invalid"],
    }  # fmt: skip


def _summary_of_tuning(made: Mapping[str, Any]) -> str:
    if made["approach"] == "model_set":
        return f"model set: {made['reason']}"
    training = made["training"]
    return f"trained on {training['trained_rows']} rows, best epoch {training['best_epoch']} of {len(training['epochs'])}"


def _trained_on(record: Record) -> dict[str, Any]:
    """What training reads of a record."""
    return {name: getattr(record, name) for name in ("record_id", "split", "prompt", "label", "rationale")}


def _without(section: Any, *names: str) -> dict[str, Any]:
    return {key: value for key, value in vars(section).items() if key not in names}


def _state(planned: Allocation) -> str:
    return "unchanged" if planned.existing else "provisional" if planned.provisional else "new"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")

"""The whole pipeline on fakes: what runs, what is cached, which versions come out."""

from __future__ import annotations

import fcntl
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from pipeline.config import load_config
from pipeline.errors import ArtifactError, ConfigError, ModelNotFoundError, OutputError, UserError
from pipeline.machine import embedded_model
from pipeline.ports import Kept
from pipeline.run import STAGES, Pipeline, RunResult
from tests.test_fine_tuner import FakeTrainer, LetterEngine

ROOT = Path(__file__).parents[1]


class Job:
    """A project folder with the sample, and what its runs opened."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.engines, self.trainer = folder, [], FakeTrainer()  # type: ignore[var-annotated]
        (folder / "data").mkdir()
        shutil.copy(ROOT / "data" / "chief_complaints.csv", folder / "data")
        shutil.copy(ROOT / "pipeline.yaml", folder)

    def pipeline(self, *settings: str, **options: Any) -> Pipeline:
        return Pipeline(load_config(self.folder / "pipeline.yaml", settings), **options)

    def run(self, *settings: str, **options: Any) -> RunResult:
        return self.pipeline(*settings, **options).run()

    def open_engine(self, model: Path, *, adapter: Path | None = None, context_tokens: int = 0) -> LetterEngine:
        self.engines.append(LetterEngine())
        return self.engines[-1]

    def tree(self, name: str) -> dict[str, bytes]:
        return {str(path): path.read_bytes() for path in sorted((self.folder / name).rglob("*")) if path.is_file()}


def same_words(metric: str, responses: Sequence[str], references: Sequence[str]) -> list[float | None]:
    return [float(a == b) for a, b in zip(responses, references, strict=True)]


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    made = Job(tmp_path)

    def stand_in(name: str, **members: Any) -> None:
        module = ModuleType(name)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, f"pipeline.backends.{name}", module)

    stand_in("llamacpp", open_engine=made.open_engine)
    stand_in("lora", LoraTrainer=lambda: made.trainer)
    stand_in("ragas_metrics", RagasScorer=lambda: same_words, embed=None)
    return made


class FakeServing:
    """A server that keeps models, beside the engine of this process; its answers are the fake engine's."""

    name, facts = "ollama", {"engine": "ollama", "ollama": "0.34.2"}

    def __init__(self, job: Job, *, manner: str | None = None, unsteady: int = 0) -> None:
        self.job, self.way, self.unsteady = job, manner, unsteady
        self.kept: dict[str, str] = {}
        self.served: list[Path | None] = []
        self.verified: list[bool] = []

    def find(self, name: str, *, root: Path, allow_download: bool, verify: bool, progress: Any = None) -> Any:
        from pipeline.backends.base_model import resolve

        self.verified.append(verify)
        return resolve(name, root=root)

    def manner(self, base: Any) -> str | None:
        return self.way

    def words(self, base: Any) -> dict[str, Any]:
        return {"template": "{{ .Prompt }}", "system": None, "parameters": {"stop": ["x"]}}

    def on_file(self, base: Any) -> Any:
        return self.job.open_engine

    def served_apart(self) -> bool:
        return True

    def serve(self, base: Any, model: Path | None = None) -> LetterEngine:
        self.served.append(model)
        engine = LetterEngine()
        engine.name = "ollama"
        if model is not None and sum(path is not None for path in self.served) > 2 and self.unsteady:  # the third time it is asked again
            engine.respond = lambda prompt: "{}"
        self.job.engines.append(engine)
        return engine

    def keep(self, name: str, base: Any, model: Path | dict[str, Any], *, replace: bool = False) -> Kept:
        if name in self.kept and self.kept[name] != str(model) and not replace:
            raise UserError(f"another model called {name}", hint="--replace")
        changed, self.kept[name] = self.kept.get(name) != str(model), str(model)
        return Kept(name, "sha256:1", changed)

    def has(self, name: str, digest: str) -> bool:
        return name in self.kept


def served_by(serving: FakeServing, pipeline: Pipeline) -> Pipeline:
    vars(pipeline)["_serving"] = serving
    return pipeline


def test_a_server_answers_and_keeps_the_model(job: Job) -> None:
    serving = FakeServing(job)
    result = served_by(serving, job.pipeline()).run()
    assert list(serving.kept) == [result.versions["model"]]
    made = json.loads((job.folder / "outputs" / "fine_tuning_metadata.json").read_text())
    assert made["validation"]["served"]["agreement"] == 1.0
    assert made["served_with"] == serving.words(None)
    lines = [json.loads(line) for line in (job.folder / "outputs" / "outputs.jsonl").read_text().splitlines()]
    assert {line["engine"] for line in lines} == {"ollama"}
    assert any(serving.verified)  # before training
    assert served_by(serving, job.pipeline()).run().unchanged
    card = yaml.safe_load((job.folder / "metadata" / "versions" / "model-0001.yaml").read_text())
    assert "0.34.2" in json.dumps(card)


def test_answers_are_asked_for_again(job: Job) -> None:
    served_by(FakeServing(job, unsteady=1), job.pipeline()).run()
    notes = json.loads((job.folder / "outputs" / "scores.json").read_text())["notes"]
    assert "Asked again, fine-tuned gave another rating in 50 of 50 rows, and another text in 50" in notes[-1]


def test_a_model_that_vanished_is_registered_again(job: Job) -> None:
    serving = FakeServing(job)
    served_by(serving, job.pipeline()).run()
    serving.kept.clear()
    again = served_by(serving, job.pipeline())
    assert next(plan for plan in again.plan() if plan.stage == "register").why == "0001-model-1.0.0.0 is not registered any more"
    assert ran(again.run())[0] == "register"
    assert list(serving.kept) == ["0001-model-1.0.0.0"]


def test_a_name_that_is_taken_stops_at_the_end_and_nothing_is_lost(job: Job) -> None:
    serving = FakeServing(job)
    serving.kept["0001-model-1.0.0.0"] = "somebody else's"
    with pytest.raises(UserError, match="another model"):
        served_by(serving, job.pipeline()).run()
    assert (job.folder / "metadata" / "model_card.yaml").is_file()
    assert ran(served_by(serving, job.pipeline()).run(replace=True)) == ["register"]


def test_another_way_to_put_chats_into_words_trains_anew(job: Job) -> None:
    served_by(FakeServing(job), job.pipeline()).run()
    assert "finetune" in ran(served_by(FakeServing(job, manner="sha256:other"), job.pipeline()).run())


def test_results_are_not_thrown_away_when_the_base_is_away(job: Job, tmp_path: Path) -> None:
    base = tmp_path / "base.gguf"
    base.write_bytes(embedded_model().read_bytes())  # type: ignore[union-attr]
    setting = "model.name=base.gguf"
    job.run(setting)
    before = job.tree("outputs") | job.tree("metadata")
    base.rename(tmp_path / "elsewhere.gguf")
    for ask in (lambda: job.run(setting), lambda: job.pipeline(setting).plan()):
        with pytest.raises(ModelNotFoundError, match="it was there before"):
            ask()
    assert job.tree("outputs") | job.tree("metadata") == before
    (tmp_path / "elsewhere.gguf").rename(base)
    assert job.run(setting).unchanged


def test_a_server_that_comes_later_is_compared_with_training_first(job: Job) -> None:
    job.run()
    serving = FakeServing(job)
    again = served_by(serving, job.pipeline())
    plan = next(plan for plan in again.plan() if plan.stage == "finetune")
    assert plan.why == "what the server answers was not compared with the trained model"
    again.run()
    made = json.loads((job.folder / "outputs" / "fine_tuning_metadata.json").read_text())
    assert made["validation"]["served"]["agreement"] == 1.0
    assert served_by(serving, job.pipeline()).run().unchanged


def test_another_way_to_put_chats_into_words_asks_every_system_anew(job: Job) -> None:
    served_by(FakeServing(job), job.pipeline()).run()
    served_by(FakeServing(job, manner="sha256:other"), job.pipeline()).run()
    lines = (job.folder / "outputs" / "outputs.jsonl").read_text().splitlines()
    keys = {json.loads(line)["generate_key"] for line in lines if json.loads(line)["system"] == "base"}
    assert len(keys) == 2


def test_a_model_set_is_registered_too(job: Job) -> None:
    serving = FakeServing(job)
    served_by(serving, job.pipeline("model_set.compare=true")).run()
    assert list(serving.kept) == ["0001-model-1.0.0.0", "0001-model-1.0.0.0:model-set"]
    alone = FakeServing(job)
    served_by(alone, job.pipeline("train.enabled=false")).run()
    assert list(alone.kept) == ["0002-model-1.0.1.0"]


def test_without_a_server_nothing_is_registered(job: Job) -> None:
    outcome = next(outcome for outcome in job.run().stages if outcome.stage == "register")
    assert outcome.summary == "no server to keep models"


def ran(result: RunResult) -> list[str]:
    return [outcome.stage for outcome in result.stages if outcome.action == "ran"]


def test_the_first_run_does_everything(job: Job) -> None:
    result = job.run()
    assert ran(result) == list(STAGES)
    assert (result.unchanged, result.exit_code) == (False, 0)
    assert result.versions == {"dataset": "0001-train-1.0.0.0", "model": "0001-model-1.0.0.0", "run": "0001-model-1.0.0.0-data-1.0.0.0"}
    assert all(Path(path).is_file() for path in result.files.values())
    assert {system["name"] for system in result.systems} == {"base", "fine_tuned", "copilot", "second", "majority"}
    assert all((job.folder / "metadata" / f"{kind}_card.yaml").is_file() for kind in ("dataset", "model", "run"))
    lines = (job.folder / "metadata" / "runs" / f"{result.versions['run']}.jsonl").read_text().splitlines()
    assert [json.loads(line)["stage"] for line in lines] == list(STAGES)
    assert job.pipeline().verify() == []


def test_the_second_run_does_nothing(job: Job) -> None:
    first = job.run()
    before, opened = job.tree("metadata") | job.tree("outputs"), len(job.engines)
    assert [plan.action for plan in job.pipeline().plan()] == ["cached"] * len(STAGES)
    second = job.run()
    assert second.unchanged
    assert (second.verdict, second.versions, second.systems) == (first.verdict, first.versions, first.systems)
    assert (job.tree("metadata") | job.tree("outputs"), len(job.engines)) == (before, opened)


def test_no_test_row_is_trained_on(job: Job) -> None:
    job.run()
    rows = (job.folder / "outputs" / "formatted_dataset.csv").read_text().splitlines()
    [(train, valid, _, _)] = job.trainer.asked
    test = {row.split(",")[0] for row in rows if ",test," in row[:60]}
    assert test
    assert not test & {row.record_id for row in (*train, *valid)}
    answered = {json.loads(line)["record_id"] for line in (job.folder / "outputs" / "outputs.jsonl").read_text().splitlines()}
    assert answered == test


@pytest.mark.parametrize(
    ("setting", "stages", "new"),
    [
        ("evaluate.metrics=[rouge]", {"evaluate", "version", "report"}, {"run"}),
        ("train.epochs=5", {"finetune", "version", "report"}, {"model", "run"}),
        ("generate.max_tokens=150", {"finetune", "infer", "evaluate", "version", "report"}, {"model", "run"}),
        # recorded rows keep their split, so the same test rows are asked the same
        ("seed=7", set(STAGES) - {"infer"}, {"dataset", "model", "run"}),
        ("prompt.topic=colds", set(STAGES), {"dataset", "model", "run"}),
        ("project=other", {"version", "report"}, set()),
    ],
)
def test_a_setting_runs_what_depends_on_it(job: Job, setting: str, stages: set[str], new: set[str]) -> None:
    before = job.run().versions
    result = job.run(setting)
    assert stages <= set(ran(result)) | {"report", "register"}
    assert set(ran(result)) <= stages | {"version", "register", "report"}
    assert {kind for kind in before if result.versions[kind][:4] != before[kind][:4]} == new
    assert job.run(setting).unchanged


def test_going_back_gives_the_old_versions(job: Job) -> None:
    first = job.run()
    other = job.run("train.epochs=5")
    assert other.versions["model"] == "0002-model-1.0.1.0"
    back = job.run()
    assert back.versions == first.versions
    assert job.pipeline().verify() == []


@pytest.mark.parametrize("lost", ["outputs", "metadata"])
def test_a_folder_that_is_lost_is_made_again(job: Job, lost: str) -> None:
    first = job.run()
    shutil.rmtree(job.folder / lost)
    again = job.run()
    assert not again.unchanged
    assert again.versions == first.versions
    assert (job.folder / "metadata" / "model_card.yaml").is_file()
    assert job.run().unchanged


def test_a_card_that_is_lost_is_written_again(job: Job) -> None:
    job.run()
    card = job.folder / "metadata" / "run_card.yaml"
    text = card.read_text()
    card.unlink()
    assert "version" in ran(job.run())
    assert card.read_text() == text
    assert job.run().unchanged


def test_a_changed_artifact_is_noticed(job: Job) -> None:
    job.run()
    (job.folder / "outputs" / "fine_tuned_model.gguf").write_bytes(b"something else")
    assert any("fine_tuned_model.gguf" in problem for problem in job.pipeline().verify())
    assert "finetune" in ran(job.run())
    assert job.pipeline().verify() == []


def test_the_model_set_can_be_compared(job: Job) -> None:
    result = job.run("model_set.compare=true")
    assert {"base", "fine_tuned", "model_set"} <= {system["name"] for system in result.systems}
    assert result.versions["model"] == "0001-model-1.0.0.0"


def test_the_scores_follow_when_another_way_is_taken(job: Job) -> None:
    job.run("model_set.compare=true")
    result = job.run("train.enabled=false")
    assert "fine-tuned" not in str(result.verdict)
    assert "fine_tuned" not in {system["name"] for system in result.systems}
    assert not (job.folder / "outputs" / "fine_tuned_model.gguf").exists()


def test_the_primary_system_is_always_asked(job: Job) -> None:
    assert {"base", "fine_tuned"} <= {system["name"] for system in job.run("evaluate.systems=[base]").systems}


def test_what_cards_speak_of_is_written_anew(job: Job) -> None:
    job.run()
    assert "version" in ran(job.run("dataset.license=mit"))
    assert "license: mit" in (job.folder / "metadata" / "dataset_card.yaml").read_text()


def test_splits_that_a_colleague_recorded_are_kept(job: Job) -> None:
    job.run()
    splits = job.folder / "metadata" / "versions" / "splits.csv"
    lines = splits.read_text().splitlines()
    row = next(n for n, line in enumerate(lines) if line.endswith(",test"))
    lines[row] = lines[row].replace(",test", ",train")
    splits.write_text("\n".join(lines) + "\n")
    assert "format" in ran(job.run())
    assert lines[row] in splits.read_text().splitlines()
    assert job.run().unchanged


def test_a_result_that_is_not_served_as_trained_replaces_nothing(job: Job) -> None:
    job.run()
    good = (job.folder / "outputs" / "fine_tuned_model.gguf").read_bytes()
    job.trainer.wrong = True
    with pytest.raises(ArtifactError, match="agree"):
        job.run("train.epochs=5")
    assert (job.folder / "outputs" / "fine_tuned_model.gguf").read_bytes() == good


def test_a_model_set_where_training_is_off(job: Job) -> None:
    result = job.run("train.enabled=false")
    assert {system["name"] for system in result.systems} == {"base", "model_set", "copilot", "second", "majority"}
    assert result.files["model"].endswith("model_set_config.json")
    assert job.run("train.enabled=false").unchanged


def test_a_base_that_is_not_there(job: Job) -> None:
    result = job.run("model.name=llama2")
    assert {system["name"] for system in result.systems} >= {"copilot", "second", "majority"}
    assert result.files["model"].endswith("model_set_config.json")
    assert job.run("model.name=llama2").unchanged


@pytest.mark.parametrize(("bound", "code"), [(">= 0.99", 100), (">= 0.01", 0)])
def test_gates_decide_the_exit_code(job: Job, bound: str, code: int) -> None:
    gate = f'evaluate.gates={{fine_tuned.accuracy: {{value: "{bound}"}}}}'
    assert job.run(gate).exit_code == code
    again = job.run(gate)
    assert (again.unchanged, again.exit_code) == (True, code)


def test_an_unknown_gate_stops_before_any_work(job: Job) -> None:
    with pytest.raises(ConfigError, match="nonsense"):
        job.run('evaluate.gates={nonsense.accuracy: {value: ">= 0.5"}}')
    assert not (job.folder / "outputs").exists()


def test_another_branch_gets_provisional_names(job: Job) -> None:
    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(job.folder), "-c", "user.name=a", "-c", "user.email=a@b.c", *words], check=True, capture_output=True
        )

    git("init", "-b", "main")
    git("add", "pipeline.yaml")
    git("commit", "-m", "one")
    git("checkout", "-b", "idea")
    result = job.run()
    assert result.versions["model"] == "0001-model-1.0.0.0"
    assert not (job.folder / "metadata").exists()
    git("checkout", "main")
    assert not job.run().unchanged
    assert (job.folder / "metadata" / "model_card.yaml").is_file()


def test_a_second_run_at_the_same_time_is_refused(job: Job) -> None:
    (job.folder / "outputs").mkdir()
    with (job.folder / "outputs" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(OutputError, match="another run"):
            job.run()


def dies(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    "where",
    ["pipeline.evaluation.evaluate", "pipeline.report.render_html", "pipeline.cards.run_card", "pipeline.inference_runner.run_inference"],
)
def test_a_run_that_is_killed_goes_on(job: Job, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(where, dies)
        with pytest.raises(KeyboardInterrupt):
            job.run()
    result = job.run()
    assert "format" not in ran(result)
    assert "finetune" not in ran(result)
    assert result.versions["run"] == "0001-model-1.0.0.0-data-1.0.0.0"
    assert job.pipeline().verify() == []
    assert job.run().unchanged


def test_versions_are_explained(job: Job) -> None:
    job.run()
    planned = job.pipeline("train.epochs=5")
    planned.run()
    lines = planned.versions(explain=True)
    words = " ".join(sentence for line in lines for sentence in line.get("why", []))
    assert "train.epochs" in words


def test_a_damaged_formatted_dataset_is_formatted_again(job: Job) -> None:
    job.run()
    (job.folder / "outputs" / "formatted_dataset.csv").write_text("nonsense")
    assert "format" in ran(job.run())


def test_damaged_scores_do_not_crash(job: Job) -> None:
    job.run()
    (job.folder / "outputs" / "scores.json").write_text("{")
    assert "evaluate" in ran(job.run())


def test_forced_runs_keep_the_versions(job: Job) -> None:
    first = job.run()
    again = job.pipeline().run(force=True)
    assert ran(again) == list(STAGES)
    assert again.versions == first.versions


def test_until(job: Job) -> None:
    result = job.pipeline().run(until="format")
    assert ran(result) == ["format"]
    assert set(result.files) == {"dataset"}

"""The command: what it passes on, what it prints where, and the exit code of every way to fail. The pipeline itself is a stand-in."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

from pipeline import cli, process, run, run_publish, run_versions
from pipeline.arguments import COMMANDS, STAGES, parse
from pipeline.config import PipelineConfig
from pipeline.errors import (
    ArtifactError,
    DatasetTooSmallWarning,
    EngineError,
    FineTuningNotSupportedError,
    OutputError,
    PrivacyError,
)
from pipeline.fine_tuner import FineTuner
from pipeline.ports import Progress, quiet
from pipeline.progress import Bars, Lines, duration

ROOT = Path(__file__).parents[1]
SYSTEMS = (
    {"name": "base", "accuracy": 0.35, "low": 0.28, "high": 0.43, "macro_f1": 0.3, "n": 90, "n_invalid": 1},
    {"name": "fine_tuned", "accuracy": 0.712, "low": 0.61, "high": 0.8, "macro_f1": None, "n": 90, "n_invalid": 0},
)
VERDICT = "The fine-tuned model is better than the base model."


def result(folder: Path, stages: tuple[str, ...], *, unchanged: bool = False, exit_code: int = 0) -> run.RunResult:
    action = "cached" if unchanged else "ran"
    return run.RunResult(
        stages=tuple(run.StageOutcome(stage, action, 1.0, f"{stage} says this") for stage in stages),  # type: ignore[arg-type]
        unchanged=unchanged,
        verdict=VERDICT if "evaluate" in stages else None,
        versions={"dataset": "0001-train-1.0.0.0", "model": "0001-model-1.0.0.0"} if "version" in stages else {},
        files={"summary": str(folder / "summary.md"), "report": str(folder / "report.html")} if "report" in stages else {},
        systems=SYSTEMS if "evaluate" in stages else (),
        exit_code=exit_code,
    )


class FakePipeline:
    """Stands in for run.Pipeline; keeps what it was asked."""

    made: ClassVar[list[FakePipeline]]
    acts: ClassVar[list[Callable[[FakePipeline], object]]]  # the last one is done when it is asked for anything
    outcome: ClassVar[Mapping[str, Any]]
    problems: ClassVar[list[str]]

    def __init__(self, config: PipelineConfig, *, progress: Progress = quiet, debug: bool = False, fallback: bool = True) -> None:
        self.config, self.progress, self.debug, self.fallback = config, progress, debug, fallback
        self.until, self.force, self.replace = "", False, False
        type(self).made.append(self)

    def plan(self) -> tuple[run.StagePlan, ...]:
        type(self).acts[-1](self)
        return (
            run.StagePlan("format", "cached", "nothing it depends on changed", 0.0),
            run.StagePlan("finetune", "run", "its inputs changed", 125.0),
            run.StagePlan("infer", "run", "finetune runs", None),
        )

    def run(self, until: str = "report", *, force: bool = False, replace: bool = False) -> run.RunResult:
        self.until, self.force, self.replace = until, force, replace
        type(self).acts[-1](self)
        return result(self.config.output_path, STAGES[: STAGES.index(until) + 1], **self.outcome)

    def versions(self, explain: bool = False) -> list[Mapping[str, Any]]:
        type(self).acts[-1](self)
        why = ["train.epochs changed from 3 to 5"] if explain else []
        return [
            {"kind": "model", "name": "0002-model-1.0.1.0", "state": "new", "why": why},
            {"kind": "model", "state": "recorded", "name": "0001-model-1.0.0.0", "created": "2026-11-23"},
        ]

    def verify(self, *, full: bool = False) -> list[str]:
        self.full = full
        type(self).acts[-1](self)
        return self.problems


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> type[FakePipeline]:
    """A folder with a pipeline.yaml, and the stand-in in place of the pipeline."""

    class Fake(FakePipeline):
        made: ClassVar[list[FakePipeline]] = []
        outcome: ClassVar[Mapping[str, Any]] = {}
        problems: ClassVar[list[str]] = []
        wanted: ClassVar[run_publish.Wanted]
        acts: ClassVar[list[Callable[[FakePipeline], object]]] = [lambda pipeline: pipeline.progress("train", 0, 10, "epoch 1/1")]

    def collect(pipeline: Any, folder: Path) -> tuple[str, ...]:
        Fake.acts[-1](pipeline)
        return ("summary.md",)

    def publish(pipeline: Any, wanted: run_publish.Wanted, **_: Any) -> run_publish.PublishResult:
        Fake.acts[-1](pipeline)
        Fake.wanted = wanted
        return run_publish.PublishResult()

    monkeypatch.setattr(run, "Pipeline", Fake)
    monkeypatch.setattr(run_versions, "collect", collect)
    monkeypatch.setattr(run_publish, "publish_versions", publish)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    (tmp_path / "pipeline.yaml").write_text("project: tried\ntrain: {epochs: 2}\n", encoding="utf-8")
    return Fake


def raising(error: BaseException) -> Callable[[FakePipeline], None]:
    def act(_: FakePipeline) -> None:
        raise error

    return act


def one_object(text: str) -> dict[str, Any]:
    assert text.count("\n") == 1
    found = json.loads(text)
    assert isinstance(found, dict)
    return found


# --- help ---


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_that_parses(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main([command, "--help"])
    assert leaving.value.code == 0
    out = capsys.readouterr().out
    assert "example" in out
    assert f"  pipeline {command}" in out
    for option in ("--config", "--set", "--json", "--verbose", "--debug", "--version"):
        assert option in out
    for line, _ in COMMANDS[command].examples:
        words = re.findall(r'"[^"]*"|\S+', line.partition(" | ")[0])
        assert words[:2] == ["pipeline", command]
        assert parse(words[1:]).command == command


def test_help_lists_the_commands_of_the_issue(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(COMMANDS) == [
        "run", "plan", "format", "finetune", "infer", "evaluate", "register", "report", "version", "verify", "artifacts",
        "publish", "doctor",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    out = capsys.readouterr().out
    assert all(re.search(rf"^    {name} ", out, re.MULTILINE) for name in COMMANDS)


def test_stages_are_those_of_the_pipeline() -> None:
    assert STAGES == run.STAGES
    assert set(cli.UNTIL.values()) <= set(STAGES)


def test_without_a_command_the_help_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "pipeline run" in err


def test_version_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leaving:
        cli.main(["--version"])
    assert leaving.value.code == 0
    assert re.fullmatch(r"pipeline \d+\.\d+\.\d+\n", capsys.readouterr().out)


# --- what is passed on ---


def test_stage_commands_run_until_their_stage(fake: type[FakePipeline]) -> None:
    for command in ("run", "format", "finetune", "infer", "evaluate", "report"):
        assert cli.main([command]) == 0
    assert [made.until for made in fake.made] == ["register", "format", "finetune", "infer", "evaluate", "report"]


def test_options_of_run(fake: type[FakePipeline]) -> None:
    assert cli.main(["run", "--force", "--no-fallback", "--until", "infer", "--debug"]) == 0
    assert cli.main(["run"]) == 0
    first, second = fake.made
    assert (first.force, first.fallback, first.until, first.debug) == (True, False, "infer", True)
    assert (second.force, second.fallback, second.until, second.debug) == (False, True, "register", False)


def test_settings_go_above_the_file_wherever_they_stand(fake: type[FakePipeline]) -> None:
    assert cli.main(["--set", "seed=7", "plan", "--set", "train.epochs=5", "--set", "train.rank=8"]) == 0
    config = fake.made[0].config
    assert (config.seed, config.train.epochs, config.train.rank, config.project) == (7, 5, 8, "tried")


def test_the_environment_stands_between_the_file_and_the_flags(fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_SET", "\n  seed=7\n\nmodel.name=a model.gguf\ntrain.epochs=4\n")
    assert cli.main(["plan", "--set", "train.epochs=5"]) == 0
    config = fake.made[0].config
    assert (config.seed, config.model.name, config.train.epochs) == (7, "a model.gguf", 5)


def test_register_may_replace(fake: type[FakePipeline]) -> None:
    assert cli.main(["register"]) == 0
    assert cli.main(["register", "--replace"]) == 0
    assert [(made.until, made.replace) for made in fake.made] == [("register", False), ("register", True)]


def test_absent_flags_leave_the_file_alone(fake: type[FakePipeline]) -> None:
    assert cli.main(["finetune"]) == 0
    assert fake.made[0].config.train.epochs == 2


def test_flags_of_finetune_are_settings(fake: type[FakePipeline]) -> None:
    flags = "--model some.gguf --topics flu cough --output-dir out --epochs 4 --learning-rate 0.00001 --batch-size 2 --seed 9"
    assert cli.main(["finetune", "--set", "train.epochs=9", *flags.split()]) == 0
    config = fake.made[0].config
    assert (config.model.name, config.prompt.topic, config.output_dir, config.seed) == ("some.gguf", "flu, cough", "out", 9)
    assert (config.train.epochs, config.train.learning_rate, config.train.batch_size) == (4, 1e-5, 2)


def test_an_output_folder_named_by_flag_starts_here(fake: type[FakePipeline], tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "other.yaml").write_text("project: other\n", encoding="utf-8")
    assert cli.main(["finetune", "--config", "deep/other.yaml", "--output-dir", "out"]) == 0
    assert fake.made[0].config.output_path == tmp_path / "out"


# --- finetune --input ---


def test_finetune_input_needs_no_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen: dict[str, Any] = {}

    def process_dataset(self: FineTuner, df: Any, **kwargs: Any) -> tuple[bool, dict[str, Any]]:
        seen.update(kwargs, df=df, debug=self.debug_mode, fallback=self.fallback_mode)
        return True, {"approach": "model_set", "reason": "12 rows", "data": {"rows": 2}, "training": None}

    monkeypatch.setattr(FineTuner, "process_dataset", process_dataset)
    monkeypatch.chdir(tmp_path)
    Path("rows.csv").write_text('prompt,rating\n"one, two",1\nNA,\n', encoding="utf-8")
    flags = [
        "--input",
        "rows.csv",
        "--model",
        "llama2",
        "--topics",
        "a",
        "b",
        "--output-dir",
        "out",
        "--epochs",
        "3",
        "--no-fallback",
        "--debug",
    ]
    assert cli.main(["finetune", *flags]) == 0
    assert seen["df"].to_dict("list") == {"prompt": ["one, two", "NA"], "rating": ["1", ""]}
    assert (seen["model_name"], seen["target_topics"], seen["output_dir"], seen["epochs"]) == ("llama2", ["a", "b"], "out", 3)
    assert (seen["learning_rate"], seen["batch_size"], seen["debug"], seen["fallback"]) == (1e-4, 4, True, False)
    assert "model set was made instead of fine-tuning: 12 rows" in capsys.readouterr().out
    assert cli.main(["finetune", *flags, "--json"]) == 0
    assert one_object(capsys.readouterr().out)["metadata"]["approach"] == "model_set"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (None, "no such file"),
        (b"", "is empty"),
        (b"prompt,rating\n", "no row"),
        (b"prompt,rating\nx,1\ny,1,2\n", "line 3: 3 cells where the header has 2"),
        (b"prompt,rating\n\xff,1\n", "not UTF-8"),
        (b"prompt,rating,rating\nx,1,1\n", "'rating' 2 times"),
        (b'prompt,rating\n"x,1\n', "never closed"),
        (b"text,score\nx,1\n", "no column for the prompt"),
        (b"prompt,rating\nx,1\ny,1\n", "at least two ratings"),
    ],
)
def test_a_damaged_table_is_named(
    data: bytes | None, words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    if data is not None:
        Path("rows.csv").write_bytes(data)
    assert cli.main(["finetune", "--input", "rows.csv"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err
    assert "Traceback" not in err
    assert "dataset.path" not in err
    assert err.startswith("error: rows.csv:\n  - ")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "-1"], "train.epochs"),
        (["--learning-rate", "0"], "train.learning_rate"),
        (["--seed", "-5"], "seed"),
        (["--epochs", "many"], "invalid int value: 'many'"),
        (["--set", "seed=1"], "--config and --set don't go with it"),
        (["--json", "--config", "pipeline.yaml"], "--config and --set don't go with it"),
    ],
)
def test_wrong_flags_of_finetune_input(flags: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["finetune", "--input", str(tmp_path / "rows.csv"), *flags]) == 2
    assert words in capsys.readouterr().err


def test_scripts_fine_tuner_is_the_same_command(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts" / "fine_tuner.py"), "--input", "none.csv", "--topics", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "none.csv:\n  - no such file" in done.stderr


# --- what is printed ---


@pytest.mark.parametrize("command", COMMANDS)
def test_json_is_one_object_and_nothing_else(command: str, fake: type[FakePipeline], capfd: pytest.CaptureFixture[str]) -> None:
    def chatty(_: FakePipeline) -> None:
        sys.stdout.write("a library says hello\n")
        os.write(1, b"and one in C as well\n")

    fake.acts.append(chatty)
    code = cli.main([command, "--json", *(["folder"] if command == "artifacts" else [])])
    out, err = capfd.readouterr()
    found = one_object(out)
    assert (found["command"], found["exit_code"], code) == (command, 0, 0)
    if command != "doctor":
        assert "a library says hello" in err
        assert "and one in C as well" in err


def test_json_of_a_run_holds_the_result(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "--json"]) == 0
    found = one_object(capsys.readouterr().out)
    assert found["verdict"] == VERDICT
    assert found["systems"] == list(SYSTEMS)
    assert [stage["stage"] for stage in found["stages"]] == list(STAGES)
    assert found["versions"]["model"] == "0001-model-1.0.0.0"


def test_json_survives_a_stdout_that_is_not_utf8(fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_out = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(bytes_out, encoding="ascii"))
    fake.problems = ["Größe – damaged"]
    assert cli.main(["verify", "--json"]) == 4
    assert json.loads(bytes_out.getvalue())["problems"] == ["Größe – damaged"]


def test_summary_of_a_run(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.main(["run"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert lines[0] == VERDICT
    [row] = [line for line in lines if line.startswith("fine_tuned")]
    assert row.split() == ["fine_tuned", "71.2", "%", "61.0", "to", "80.0", "%", "–", "90", "0"]
    assert "dataset version  0001-train-1.0.0.0" in lines
    assert f"report           {Path('outputs') / 'report.html'}" in lines
    assert lines[-1].startswith("done in ")
    assert err == "train: 0/10 epoch 1/1\n"
    assert "\x1b" not in out


def test_unchanged_run_is_one_line(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    fake.outcome = {"unchanged": True}
    assert cli.main(["run"]) == 0
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith("nothing changed, nothing to run: format, finetune, infer, evaluate, version, report, register are cached")


@pytest.mark.parametrize("unchanged", [False, True])
@pytest.mark.parametrize(("code", "words"), [(100, "an evaluation gate failed"), (101, "could not be decided")])
def test_gates_give_the_exit_code(
    code: int, words: str, unchanged: bool, fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.outcome = {"exit_code": code, "unchanged": unchanged}
    assert cli.main(["run"]) == code
    out = capsys.readouterr().out
    assert VERDICT in out
    assert words in out


def test_a_stage_alone_says_what_it_did(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["format"]) == 0
    assert "format: format says this" in capsys.readouterr().out


def test_plan(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"finetune +run +about 2 min 5 s +its inputs changed", out)
    assert "about 2 min 5 s in all, and 1 stage whose time is not known" in out


def test_version(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "--explain"]) == 0
    out = capsys.readouterr().out
    assert "2026-11-23" in out
    assert "0002-model-1.0.1.0: train.epochs changed from 3 to 5" in out
    assert cli.main(["version"]) == 0
    assert "changed from" not in capsys.readouterr().out


def test_verify_reads_everything_when_told(fake: type[FakePipeline]) -> None:
    for argv, full in ((["verify"], False), (["verify", "--full"], True)):
        assert cli.main(argv) == 0
        assert fake.made[-1].full is full


@pytest.mark.parametrize(
    "argv",
    [["--explain", "reserve"], ["record", "--dry-run"], ["--from", "x"], ["reserve", "--reservation", "c"], ["--hold-minutes", "5"],
     ["reserve", "--hold-minutes", "0"]],
)  # fmt: skip
def test_options_of_another_action_are_refused(argv: list[str], fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", *argv]) == 2
    assert "--" in capsys.readouterr().err
    assert not fake.made


def test_publish_says_what_was_asked_for(fake: type[FakePipeline]) -> None:
    assert cli.main(["publish", "--dry-run", "--rows", "--", "0001-model-1.0.0.0"]) == 0
    assert fake.wanted == run_publish.Wanted(names=("0001-model-1.0.0.0",), dry_run=True, rows=True)
    assert cli.main(["publish", "--pending", "--weights", "--reviewed", "c0de"]) == 0
    assert fake.wanted == run_publish.Wanted(pending=True, weights=True, reviewed="c0de")
    assert cli.main(["publish", "--pending", "0001-model-1.0.0.0"]) == 2


def test_versions_need_a_remote(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version", "record"]) == 2
    assert "is in no git repository" in capsys.readouterr().err


def test_the_form_of_a_workflow_is_a_setting(fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_SET", "train.epochs=7\ntrain.batch_size=2")
    monkeypatch.setenv(
        "PIPELINE_INPUTS", json.dumps({"epochs": "5", "dataset": "", "base_model": "m\ntrain.rank=1", "publish": "as configured"})
    )
    assert cli.main(["plan"]) == 0
    config = fake.made[-1].config
    assert (config.train.epochs, config.train.batch_size, config.train.rank) == (5, 2, 16)
    assert config.model.name == "m\ntrain.rank=1"


def test_verify(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["verify"]) == 0
    assert capsys.readouterr().out == "metadata and outputs are whole\n"
    fake.problems = ["model-0001.yaml: missing", "run-0001.yaml: \x1b[2Jdamaged"]
    assert cli.main(["verify"]) == 4
    assert capsys.readouterr().out == "2 problems:\n  - model-0001.yaml: missing\n  - run-0001.yaml: \\x1b[2Jdamaged\n"


def test_doctor_works_without_a_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "")
    assert cli.main(["doctor"]) == 0
    assert re.search(r"^Docker +– +not installed", capsys.readouterr().out, re.MULTILINE)
    assert cli.main(["doctor", "--json", "--set", "model.name=absent.gguf"]) == 0
    found = one_object(capsys.readouterr().out)
    assert not found["ok"]
    assert {check["name"]: check["ok"] for check in found["checks"]}["base model"] is False


def test_doctor_names_a_broken_configuration(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text("seeds: 1\n", encoding="utf-8")
    assert cli.main(["doctor", "--json"]) == 0
    first, *others = one_object(capsys.readouterr().out)["checks"]
    assert (first["name"], first["ok"]) == ("settings", False)
    assert "did you mean seed?" in first["found"]
    assert others


def test_colours_only_where_they_can_be_seen(fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "40")
    shown = {}
    for no_color in ("", "1"):
        monkeypatch.setenv("NO_COLOR", no_color)
        screen = Terminal()
        monkeypatch.setattr(sys, "stdout", screen)
        fake.outcome = {"exit_code": 100}
        assert cli.main(["run"]) == 100
        shown[no_color] = screen.getvalue()
    assert "\x1b[31m" in shown[""]
    assert "\x1b[31m" not in shown["1"]
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown["1"]).splitlines()
    assert max(len(line) for line in plain if "report.html" not in line and "model" not in line) <= 40


# --- failures ---


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OutputError("outputs: the disk is full", hint="free some space"), 2, "error: outputs: the disk is full\nhint: free some space"),
        (FineTuningNotSupportedError("no"), 2, "error: no"),
        (EngineError("the engine died"), 3, "error: the engine died"),
        (ArtifactError("base.gguf: truncated"), 4, "error: base.gguf: truncated"),
        (PrivacyError("rows would leave"), 5, "error: rows would leave"),
        (MemoryError(), 3, "error: out of memory"),
        (OSError(errno.ENOSPC, "No space left on device"), 2, "error: the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied", "outputs/x"), 2, "error: outputs/x: Permission denied"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 2, "error: the package torch is not installed"),
        (ValueError("patient John Doe"), 1, "error: a bug: ValueError in test_cli.py, line "),
        (KeyboardInterrupt(), 130, "interrupted\nhint: what was finished is kept"),
    ],
)
def test_failures_are_one_message_and_a_code(
    error: BaseException, code: int, words: str, fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]
) -> None:
    fake.acts.append(raising(error))
    assert cli.main(["run"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith(words)
    assert "Traceback" not in err
    assert "John Doe" not in err

    assert cli.main(["run", "--json"]) == code
    found = one_object(capsys.readouterr().out)["error"]
    assert set(found) == {"type", "message", "hint", "exit_code"}
    assert found["exit_code"] == code


def test_verbose_shows_the_traceback(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    fake.acts.append(raising(ValueError("odd")))
    assert cli.main(["-v", "run"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ValueError: odd" in err
    assert err.splitlines()[-2].startswith("error: a bug: ValueError")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["rnu"], "invalid choice: 'rnu'"),
        (["run", "--until", "later"], "invalid choice: 'later'"),
        (["run", "--frce"], "unrecognized arguments: --frce"),
        (["run", "--forc"], "unrecognized arguments: --forc"),
        (["--json"], "required: COMMAND"),
        (["plan", "--config", "absent.yaml"], "absent.yaml:\n  - no such file"),
        (["plan", "--set", "trian.epochs=5"], "trian: unknown key; did you mean train?"),
        (["plan", "--set", "epochs"], "'epochs' is not KEY=VALUE"),
        (["plan", "--set", "train.epochs=-1"], "train.epochs"),
    ],
)
def test_wrong_arguments(argv: list[str], words: str, fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(argv) == 2
    assert words in capsys.readouterr().err
    assert cli.main([*argv, "--json"]) == 2
    assert words in one_object(capsys.readouterr().out)["error"]["message"]
    assert fake.made == []


def test_unknown_key_in_the_file(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    Path("pipeline.yaml").write_text("train: {epoch: 3}\nproject: x\n", encoding="utf-8")
    assert cli.main(["run"]) == 2
    assert "train.epoch: unknown key; did you mean train.epochs?" in capsys.readouterr().err


def test_control_characters_in_messages_are_spelt_out(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    fake.acts.append(raising(OutputError("odd \x1b[31mname\r")))
    assert cli.main(["run"]) == 2
    assert capsys.readouterr().err == "error: odd \\x1b[31mname\\r\n"


# --- logs and warnings ---


def talk(_: FakePipeline) -> None:
    warnings.warn("12 usable rows", DatasetTooSmallWarning, stacklevel=2)
    warnings.warn_explicit("their notice", UserWarning, "site-packages/torch/x.py", 1)
    logging.getLogger("pipeline.some").warning("ours warns")
    logging.getLogger("pipeline.some").info("ours informs")
    logging.getLogger("pipeline.some").debug("ours debugs")
    logging.getLogger("some_library.x").warning("theirs warns")


@pytest.mark.filterwarnings("default")
def test_what_is_logged_by_default_and_with_v(fake: type[FakePipeline], capsys: pytest.CaptureFixture[str]) -> None:
    fake.acts.append(talk)
    before = logging.getLogger().handlers[:], logging.getLogger().level, logging.getLogger("pipeline").level
    shown = {}
    for flags in ("", "-v", "-vv"):
        assert cli.main(["format", *flags.split()]) == 0
        out, shown[flags] = capsys.readouterr()
        assert "warning" not in out
    assert shown[""] == "warning: 12 usable rows\nwarning: ours warns\n"
    assert "info: pipeline.some: ours informs\n" in shown["-v"]
    assert "warning: warnings: their notice\n" in shown["-v"]
    assert "warning: some_library.x: theirs warns\n" in shown["-v"]
    assert "ours debugs" not in shown["-v"]
    assert "debug: pipeline.some: ours debugs\n" in shown["-vv"]
    assert before == (logging.getLogger().handlers, logging.getLogger().level, logging.getLogger("pipeline").level)


def test_libraries_are_told_to_be_quiet_and_the_environment_is_given_back(
    fake: type[FakePipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSFORMERS_VERBOSITY", "info")
    for name in process.QUIET_LIBRARIES.keys() - {"TRANSFORMERS_VERBOSITY"}:
        monkeypatch.delenv(name, raising=False)
    seen: dict[str, str] = {}
    fake.acts.append(lambda _: seen.update(os.environ))
    assert cli.main(["run"]) == 0
    assert {name: seen[name] for name in process.QUIET_LIBRARIES} == {**process.QUIET_LIBRARIES, "TRANSFORMERS_VERBOSITY": "info"}
    assert "TQDM_DISABLE" not in os.environ


# --- progress ---


def test_lines_come_now_and_then() -> None:
    stream, now = io.StringIO(), [0.0]
    lines = Lines(stream, clock=lambda: now[0])
    with lines:
        for step in range(101):
            now[0] = step * 0.5
            lines("train", step, 100, f"loss {step}")
        lines("model_set", 0, 0)
        lines("inference", 0, 3, "base")
        lines("inference", 3, 3, "base")
        lines("inference", 0, 3, "fine_tuned")
    assert stream.getvalue().splitlines() == [
        "train: 0/100 loss 0",
        "train: 20/100 loss 20, 40 s left",
        "train: 40/100 loss 40, 30 s left",
        "train: 60/100 loss 60, 20 s left",
        "train: 80/100 loss 80, 10 s left",
        "train: 100/100 loss 100, done in 50 s",
        "model set: …",
        "inference: 0/3 base",
        "inference: 3/3 base, done in 0.0 s",
        "inference: 0/3 fine_tuned",
    ]


def test_lines_survive_a_reader_that_went_away() -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    Lines(Gone())("train", 1, 2)


def test_bars_show_the_stages_and_their_notes() -> None:
    from rich.console import Console

    screen = io.StringIO()
    with Bars(Console(file=screen, force_terminal=True, width=100, color_system=None)) as bars:
        bars("finetune", 0, 0)
        threads = [threading.Thread(target=bars, args=("train", step, 40, f"epoch 1/1, loss [{step}]")) for step in range(1, 40)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        bars("train", 40, 40, "epoch 1/1, loss [0.9]")
        bars("write", 0, 0, "merging")
    last = screen.getvalue().split("\x1b[2K")[-1]
    assert "train" in last
    assert "40/40" in last
    assert "loss [0.9]" in last
    assert "finetune" not in last
    assert "write" not in last


@pytest.mark.parametrize(
    ("seconds", "words"), [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (185, "3 min 5 s"), (7440, "2 h 4 min")]
)
def test_durations(seconds: float, words: str) -> None:
    assert duration(seconds) == words


# --- a process of its own ---

SLOW = """
    import sys, threading, time
    from pipeline import cli, run, run_publish, run_versions

    class Slow:
        def __init__(self, config, **settings):
            pass
        def run(self, *args, **settings):
            threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
            try:
                print("at work", file=sys.stderr, flush=True)
                time.sleep(30)
            finally:
                open("cleaned-up", "w").close()
                time.sleep(WAIT)

    run.Pipeline = Slow
    sys.exit(cli.main(sys.argv[1:]))
"""


def start(tmp_path: Path, *argv: str, wait: float = 0.0) -> subprocess.Popen[str]:
    (tmp_path / "pipeline.yaml").write_text("project: x\n", encoding="utf-8")
    script = textwrap.dedent(SLOW).replace("WAIT", str(wait))
    command = [sys.executable, "-c", script, "run", *argv]
    started = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    assert started.stderr.readline() == "at work\n"
    return started


@pytest.mark.parametrize(("number", "code", "word"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")])
def test_a_signal_ends_it_cleanly(number: signal.Signals, code: int, word: str, tmp_path: Path) -> None:
    started = start(tmp_path, "--json")
    started.send_signal(number)
    out, err = started.communicate(timeout=20)
    assert started.returncode == code
    assert one_object(out)["error"]["exit_code"] == code
    assert err.startswith(f"{word}\n")
    assert "Traceback" not in err
    assert (tmp_path / "cleaned-up").exists()


def test_a_second_ctrl_c_ends_it_at_once(tmp_path: Path) -> None:
    started = start(tmp_path, wait=30)
    started.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 20
    while not (tmp_path / "cleaned-up").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    started.send_signal(signal.SIGINT)
    _, err = started.communicate(timeout=20)
    assert started.returncode == 130
    assert "Traceback" not in err


def test_signal_handlers_are_given_back(fake: type[FakePipeline]) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert cli.main(["plan"]) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("arguments", ["--help", "doctor", "doctor --json"])
def test_a_closed_pipe_is_no_error(arguments: str, tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "pipeline.cli", *arguments.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=tmp_path, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


def test_help_loads_nothing_heavy() -> None:
    heavy = {
        "torch",
        "transformers",
        "pandas",
        "numpy",
        "pydantic",
        "rich",
        "yaml",
        "scipy",
        "sklearn",
        "ragas",
        "pyarrow",
        "xllamacpp",
        "gguf",
    }
    script = (
        "import sys, pipeline.cli\n"
        "assert not (loaded := HEAVY & sys.modules.keys()), loaded\n"
        "try: pipeline.cli.main(['run', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not (loaded := HEAVY & sys.modules.keys()), loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", f"HEAVY = {heavy!r}\n{script}"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_machine_that_reads_json_needs_no_rich(tmp_path: Path) -> None:
    script = "import sys; from pipeline import cli; code = cli.main(['doctor', '--json']); assert 'rich' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    one_object(done.stdout)

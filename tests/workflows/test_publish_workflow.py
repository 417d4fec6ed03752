"""publish.yml, run by act with a `pipeline` that only answers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.workflows.act import Answer, GitHub
from tests.workflows.conftest import answers

Make = Callable[..., GitHub]

NAME = "0007-model-1.0.0.0"


def test_it_is_a_dry_run_unless_told(github: Make) -> None:
    done = github().dispatched("publish.yml", {"version": NAME}, answers=answers())
    assert (done.code, done.jobs) == (0, {"plan": "success"})
    assert done.lines("pipeline") == [f"pipeline publish --dry-run -- {NAME}"]
    assert done.summaries == {"plan": "    what went to the Hub\n"}
    assert not done.call("pipeline publish").environment.get("HF_TOKEN")
    assert done.lines("actions/download-artifact") == []


def test_for_real(github: Make) -> None:
    done = github().dispatched("publish.yml", {"version": NAME, "dry_run": False}, answers=answers())
    assert (done.code, done.jobs) == (0, {"plan": "success", "publish": "success"})
    assert done.lines("pipeline", job="publish") == [f"pipeline publish -- {NAME}", "pipeline version record"]
    publish, record = (call for call in done.calls if call.program == "pipeline" and call.job == "publish")
    assert (publish.environment.get("HF_TOKEN"), publish.environment.get("PIPELINE_GIT_TOKEN")) == ("token-of-the-hub", None)
    assert (record.environment.get("HF_TOKEN"), record.environment.get("PIPELINE_GIT_TOKEN")) == (None, "token-of-the-run")


def test_weights_come_from_the_run_that_is_named(github: Make) -> None:
    there = github()
    weights = there.artifacts / "results" / "fine_tuned_model.gguf"
    weights.parent.mkdir(parents=True)
    weights.write_text("GGUF")
    done = there.dispatched("publish.yml", {"version": NAME, "weights_run": "1234", "dry_run": False}, answers=answers())
    assert [line for line in done.lines("pipeline") if "publish" in line] == [
        f"pipeline publish --dry-run --weights -- {NAME}",
        f"pipeline publish --weights -- {NAME}",
    ]
    for call in done.calls:
        if call.program == "actions/download-artifact":
            wanted = {"name": "results", "path": "outputs", "run-id": "1234", "github-token": "token-of-the-run"}
            assert wanted.items() <= call.inputs.items()
        if "--weights" in call.arguments:
            assert "outputs/fine_tuned_model.gguf" in call.files


def test_a_run_without_results_gives_no_weights(github: Make) -> None:
    done = github().dispatched("publish.yml", {"version": NAME, "weights_run": "1234", "dry_run": False}, answers=answers())
    assert (done.code != 0, done.jobs, done.lines("pipeline")) == (True, {"plan": "failure"}, [])


def test_nothing_is_sent_when_the_plan_is_refused(github: Make) -> None:
    done = github().dispatched("publish.yml", {"version": NAME, "dry_run": False}, answers=answers(publish=Answer(code=5)))
    assert (done.code != 0, done.jobs) == (True, {"plan": "failure"})


def test_inputs_are_never_options_nor_shell(github: Make, tmp_path: Path) -> None:
    nasty = '--weights "; touch $HOME/pwned; $(touch $HOME/pwned)\nmore'
    done = github().dispatched("publish.yml", {"version": nasty, "reviewed": nasty, "dry_run": False}, answers=answers())
    calls = [call for call in done.calls if call.arguments[:1] == ("publish",)]
    assert [call.arguments for call in calls] == [
        ("publish", "--dry-run", f"--reviewed={nasty}", "--", nasty),
        ("publish", f"--reviewed={nasty}", "--", nasty),
    ]
    assert not list(tmp_path.rglob("pwned"))


def test_what_reached_the_hub_is_recorded_though_publishing_failed(github: Make) -> None:
    said = {**answers(), "publish --dry-run": Answer(), "publish": Answer(code=3)}
    done = github().dispatched("publish.yml", {"version": NAME, "dry_run": False}, answers=said)
    assert (done.code != 0, done.jobs) == (True, {"plan": "success", "publish": "failure"})
    assert done.lines("pipeline", job="publish")[-1] == "pipeline version record"


def test_a_protected_branch_gets_a_pull_request(github: Make) -> None:
    there = github(variables={"PIPELINE_PULL_REQUEST": "true"})
    said = answers(version_record=Answer(outputs={"branch": "pipeline/record-1"}))
    done = there.dispatched("publish.yml", {"version": NAME, "dry_run": False}, answers=said)
    assert done.lines("pipeline", job="publish")[-1] == "pipeline version record --pull-request"
    assert done.jobs["propose"] == "success"

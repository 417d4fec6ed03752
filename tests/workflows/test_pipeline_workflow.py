"""pipeline.yml, run by act with a `pipeline` that only answers: which jobs run in which case, and what they are handed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.workflows.act import Answer, Finished, GitHub
from tests.workflows.conftest import CARD, RECORD_TEXT, answers, repository

Make = Callable[..., GitHub]

RESERVED = {"changed": "true", "record": "true", "reservation": "5d1c07e9"}
SECRETS = ("PIPELINE_GIT_TOKEN", "HF_TOKEN", "GH_TOKEN", "GITHUB_TOKEN")


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A push after which all goes well."""
    return repository(tmp_path_factory.mktemp("good") / "github", variables={"MODEL": "qwen3:0.6b"}).pushed(answers=answers())


def commands(done: Finished, job: str) -> list[str]:
    return done.lines("pipeline", "docker", "gh", job=job)


def test_all_goes_well(good: Finished) -> None:
    assert (good.code, good.jobs) == (0, {"bump": "success", "run": "success", "record": "success", "publish": "success"}), good.log
    assert commands(good, "bump") == [
        "docker compose up --detach --wait ollama",
        "docker compose config --format json",
        "pipeline version reserve --hold-minutes 2880",
        "docker compose down --volumes --timeout 20",
    ]
    assert commands(good, "run") == [
        "docker compose build pipeline",
        "docker compose up --no-build --no-log-prefix --exit-code-from pipeline",
        "pipeline run",
        "docker compose run --rm --no-deps --no-TTY pipeline artifacts outputs/artifacts",
        "pipeline artifacts outputs/artifacts",
        "docker compose down --volumes --timeout 20",
    ]
    assert commands(good, "record") == ["pipeline version record --from outputs/artifacts --reservation 5d1c07e9"]
    assert commands(good, "publish") == ["pipeline publish --pending", "pipeline version record"]


def test_what_one_job_hands_to_the_next(good: Finished) -> None:
    assert good.uploaded("reservation") == {"reservation.json": '{"nonce": "5d1c07e9"}'}
    assert "outputs/reservation.json" in good.call("pipeline run").files
    assert {"outputs/artifacts/summary.md", f"outputs/artifacts/{CARD}"} <= set(good.call("pipeline version record --from").files)
    assert {"outputs/summary.md", f"outputs/{CARD}"} <= set(good.call("pipeline publish").files)


def test_artifacts_hold_only_what_may_leave(github: Make) -> None:
    kept = {"outputs/artifacts/summary.md": "# Better", "outputs/artifacts/.hidden": RECORD_TEXT}
    done = github().pushed(answers=answers(artifacts=Answer(files=kept)))
    assert sorted(path.name for path in done.artifacts.iterdir()) == ["reservation", "results"]
    assert done.uploaded("results") == {"summary.md": "# Better"}
    assert RECORD_TEXT not in done.log + "".join(done.summaries.values())


def test_summaries(good: Finished) -> None:
    assert good.summaries == {
        "bump": "    0007-model-1.0.0.0 is reserved\n",
        "run": "The job ended with exit code 0.\n\n# Better\n",
        "record": "    recorded\n",
        "publish": "    what went to the Hub\n",
    }


@pytest.mark.parametrize("code", [100, 101])
def test_a_gate_that_failed_or_is_undecided_is_recorded_and_not_published(github: Make, code: int) -> None:
    done = github().pushed(answers=answers(run=Answer(code=code)))
    assert done.code != 0
    assert done.jobs == {"bump": "success", "run": "failure", "record": "success"}
    assert done.uploaded("results")[CARD] == "new"
    assert f"outputs/artifacts/{CARD}" in done.call("pipeline version record").files
    assert done.summaries["run"] == f"The job ended with exit code {code}.\n\n# Better\n"


def test_a_run_that_left_nothing_is_recorded_as_failed(github: Make) -> None:
    done = github().pushed(answers=answers(run=Answer(code=3), artifacts=Answer()))
    assert done.code != 0
    assert done.jobs == {"bump": "success", "run": "failure", "record": "success"}
    assert done.uploaded("results") == {}
    record = done.call("pipeline version record")
    assert str(record) == "pipeline version record --from outputs/artifacts --reservation 5d1c07e9"
    assert not [name for name in record.files if name.startswith("outputs/")]
    assert done.summaries["run"] == "The job ended with exit code 3.\n\n"
    assert "docker compose logs --no-color --tail 100 ollama" in commands(done, "run")


def test_a_good_run_without_results_is_an_error(github: Make) -> None:
    done = github().pushed(answers=answers(artifacts=Answer()))
    assert done.jobs == {"bump": "success", "run": "failure", "record": "success"}
    assert done.code != 0


def test_when_nothing_may_be_kept_nothing_is(github: Make) -> None:
    done = github().pushed(answers=answers(artifacts=Answer(code=5, files={"outputs/artifacts/x": RECORD_TEXT})))
    assert done.jobs == {"bump": "success", "run": "failure", "record": "success"}
    assert done.uploaded("results") == {}


def test_nothing_changed(github: Make) -> None:
    nothing = Answer(says="nothing changed", outputs={"changed": "false", "record": "false", "reservation": ""})
    done = github().pushed(answers=answers(version_reserve=nothing))
    assert (done.code, done.jobs) == (0, {"bump": "success"})
    assert done.summaries == {"bump": "    nothing changed\n"}
    assert not done.artifacts.exists()


def test_another_branch_runs_on_demand_and_records_nothing(github: Make) -> None:
    there = github()
    there.push({"pipeline.yaml": "project: other\n"}, branch="trial")
    said = answers(version_reserve=Answer(outputs={"changed": "true", "record": "false", "reservation": ""}))
    assert there.pushed(branch="trial", answers=said).jobs == {}
    done = there.dispatched(branch="trial", answers=said)
    assert (done.code, done.jobs) == (0, {"bump": "success", "run": "success"})
    assert done.uploaded("reservation") == {}
    assert done.uploaded("results")["summary.md"] == "# Better\n"


def test_the_default_branch_may_have_any_name(github: Make) -> None:
    there = github(default_branch="trunk")
    assert set(there.pushed(answers=answers()).jobs) == {"bump", "run", "record", "publish"}


@pytest.mark.parametrize("outputs", [{}, RESERVED])
def test_a_dry_run_reserves_runs_and_records_nothing(github: Make, outputs: dict[str, str]) -> None:
    said = answers(version_reserve=Answer(says="would be reserved: 0007-model-1.0.0.0", outputs=outputs))
    done = github().dispatched(inputs={"dry_run": True}, answers=said)
    assert (done.code, done.jobs) == (0, {"bump": "success"})
    assert done.lines("pipeline") == ["pipeline version reserve --hold-minutes 2880 --dry-run"]
    assert done.summaries == {"bump": "    would be reserved: 0007-model-1.0.0.0\n"}
    assert not done.artifacts.exists()


def test_the_privacy_gate_stops_everything(github: Make) -> None:
    done = github(private=False).pushed(answers=answers(version_reserve=Answer(code=5)))
    assert done.code != 0
    assert done.jobs == {"bump": "failure"}
    assert not done.artifacts.exists()
    assert commands(done, "bump")[-1] == "docker compose down --volumes --timeout 20"


def test_a_reservation_that_was_lost_on_the_way_is_given_back(github: Make) -> None:
    done = github().pushed(answers=answers(version_reserve=Answer(outputs=RESERVED)))  # and no file to hand on
    assert done.jobs == {"bump": "failure", "record": "success"}
    assert done.lines("pipeline", job="record") == ["pipeline version record --from outputs/artifacts --reservation 5d1c07e9"]


def test_publishing_is_off(github: Make) -> None:
    done = github().pushed(answers=answers(version_record=Answer(outputs={"publish": "false", "branch": ""})))
    assert (done.code, done.jobs) == (0, {"bump": "success", "run": "success", "record": "success"})


def test_a_record_that_fails_publishes_nothing(github: Make) -> None:
    done = github().pushed(answers=answers(version_record=Answer(code=3, outputs={"publish": "true"})))
    assert done.code != 0
    assert done.jobs == {"bump": "success", "run": "success", "record": "failure"}


def test_what_reached_the_hub_is_recorded_though_publishing_failed(github: Make) -> None:
    done = github().pushed(answers=answers(publish=Answer(code=3)))
    assert done.code != 0
    assert commands(done, "publish") == ["pipeline publish --pending", "pipeline version record"]


def test_a_protected_branch_gets_a_pull_request(github: Make) -> None:
    there = github(variables={"PIPELINE_PULL_REQUEST": "true"})
    done = there.pushed(answers=answers(version_record=Answer(outputs={"branch": "pipeline/record-5d1c07e9", "publish": "false"})))
    assert (done.code, done.jobs) == (0, {"bump": "success", "run": "success", "record": "success", "propose": "success"})
    assert done.lines("pipeline", job="bump") == ["pipeline version reserve --hold-minutes 2880 --pull-request"]
    record = done.call("pipeline version record")
    assert str(record) == "pipeline version record --from outputs/artifacts --reservation 5d1c07e9 --pull-request"
    opened = done.call("gh pr create").arguments
    assert {"--base": "main", "--head": "pipeline/record-5d1c07e9"}.items() <= dict(zip(opened[2::2], opened[3::2], strict=True)).items()


def test_a_cancelled_run_ends_its_containers_and_is_recorded(github: Make) -> None:
    """act skips all steps of a job that begins after Ctrl-C, where GitHub does them: that `record` begins is what shows here."""
    said = answers(run=Answer(seconds=60))
    done = github().pushed(answers=said, interrupt=lambda calls: any(str(call) == "pipeline run" for call in calls))
    assert done.code != 0
    assert {"run": "failure", "record": "success"}.items() <= done.jobs.items()
    assert commands(done, "run")[-1] == "docker compose down --volumes --timeout 20"
    assert done.uploaded("results") == {}


# --- inputs and secrets ----------------------------------------------------------------------------------------------

# without an expression: act would work it out in a value too, GitHub does not
NASTY = 'x\'; touch "$HOME/pwned"; $(touch $HOME/pwned) `touch $HOME/pwned` $GITHUB_PATH | & > \' " \\ \nsecond line\n--help'


def test_inputs_reach_the_commands_as_they_were_typed_and_no_shell(github: Make, tmp_path: Path) -> None:
    names = ("dataset", "base_model", "epochs", "learning_rate", "batch_size")
    done = github().dispatched(inputs=dict.fromkeys(names, NASTY) | {"publish": "yes"}, answers=answers())
    assert done.code == 0, done.log
    for line in ("pipeline version reserve", "docker compose up --no-build", "pipeline version record --from", "pipeline publish"):
        told = json.loads(done.call(line).environment["PIPELINE_INPUTS"])
        assert told == {**dict.fromkeys(names, NASTY), "publish": "yes", "dry_run": False}
    assert not list(tmp_path.rglob("pwned"))
    assert all(set(call.arguments).isdisjoint({NASTY}) for call in done.calls)


def test_the_container_gets_the_inputs(github: Make) -> None:
    done = github().dispatched(inputs={"epochs": "5"}, answers=answers())
    assert json.loads(done.call("pipeline run").environment["PIPELINE_INPUTS"])["epochs"] == "5"


def test_a_push_has_no_inputs(good: Finished) -> None:
    told = good.call("pipeline version reserve").environment["PIPELINE_INPUTS"]
    assert (json.loads(told) or {}) == {}


def test_each_token_is_there_where_it_is_needed_and_nowhere_else(github: Make) -> None:
    both = answers(version_record=Answer(outputs={"branch": "b", "publish": "true"}))
    done = github(variables={"PIPELINE_PULL_REQUEST": "true"}).pushed(answers=both)
    having: dict[str, set[str]] = {}
    for call in done.calls:
        tokens = {name for name in SECRETS if call.environment.get(name)}
        having.setdefault(" ".join(call.arguments[:2]) or call.program, set()).update(tokens)
    assert {line: tokens for line, tokens in having.items() if tokens} == {
        "version reserve": {"PIPELINE_GIT_TOKEN"},
        "version record": {"PIPELINE_GIT_TOKEN"},
        "publish --pending": {"HF_TOKEN"},
        "pr list": {"GH_TOKEN"},
        "pr create": {"GH_TOKEN"},
    }
    assert {"compose up", "compose build", "compose run", "run", "artifacts outputs/artifacts", "actions/upload-artifact"} <= set(having)


def test_versions_are_reserved_with_the_settings_of_the_job(good: Finished) -> None:
    reserve, run = good.call("pipeline version reserve").environment, good.call("pipeline run").environment
    assert reserve["PIPELINE_SET"] == run["PIPELINE_SET"] == "model.engine=ollama\nmodel.name=qwen3:0.6b"
    assert Path(reserve["OLLAMA_MODELS"]) == Path(reserve["RUNNER_TEMP"]) / "models"


def test_the_job_writes_as_the_user_who_runs_it(good: Finished) -> None:
    assert ".env" in good.call("docker compose build").files

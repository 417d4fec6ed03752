"""The workflow files, read: by zizmor, actionlint and GitHub's schemas, and for the rules of this project that none of them knows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.workflows.act import ACTIONS, ROOT, SCRIPTS, WORKFLOWS

GITHUB = ROOT / ".github"
LOCAL_ACTIONS = sorted(GITHUB.glob("actions/*/action.yml"))
FILES = sorted(WORKFLOWS.glob("*.yml"))
TEXTS = {path.name: path.read_text(encoding="utf-8") for path in FILES}
PARSED: dict[str, dict[Any, Any]] = {name: yaml.safe_load(text) for name, text in TEXTS.items()}
ALL_TEXT = "\n".join([*TEXTS.values(), *(path.read_text(encoding="utf-8") for path in LOCAL_ACTIONS)])

JOBS: list[tuple[str, str, dict[str, Any]]] = [
    (name, job_id, job) for name, workflow in PARSED.items() for job_id, job in workflow["jobs"].items()
]
every_workflow = pytest.mark.parametrize("name", PARSED)
every_job = pytest.mark.parametrize(("name", "job_id", "job"), [pytest.param(*job, id="-".join(job[:2])) for job in JOBS])


def said_by(*command: str | Path) -> tuple[int, str]:
    done = subprocess.run([str(part) for part in command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    """(file and job, step) of all workflows and local actions."""
    for name, workflow in PARSED.items():
        for job_id, job in workflow["jobs"].items():
            yield from ((f"{name} {job_id}", step) for step in job["steps"])
    for path in LOCAL_ACTIONS:
        yield from ((path.parent.name, step) for step in yaml.safe_load(path.read_text(encoding="utf-8"))["runs"]["steps"])


def uses(job: dict[str, Any], action: str) -> list[dict[str, Any]]:
    return [step for step in job["steps"] if step.get("uses", "").startswith(f"{action}@")]


# --- linters ---------------------------------------------------------------------------------------------------------


def test_zizmor() -> None:
    code, said = said_by(SCRIPTS / "zizmor", "--offline", "--persona=auditor", "--no-progress", "--color=never", ".github")
    assert code == 0, said


def test_what_zizmor_is_told_to_ignore_is_said_why() -> None:
    ignored = re.findall(r"zizmor: ignore\[([a-z-]+)\](.*)", ALL_TEXT)
    assert {rule for rule, _ in ignored} == {"github-env", "self-repository"}
    assert all(len(why.split()) > 4 for _, why in ignored)
    assert not list(GITHUB.glob("zizmor.y*ml")) + list(ROOT.glob("zizmor.y*ml"))


def test_actionlint() -> None:
    binary = os.environ.get("TEST_ACTIONLINT") or shutil.which("actionlint")
    if binary is None:
        message = "needs actionlint: go install github.com/rhysd/actionlint/cmd/actionlint@v1.7.12"
        if os.environ.get("CI") == "true":
            pytest.fail(message)
        pytest.skip(message)
    code, said = said_by(binary, "-no-color")
    assert code == 0, said


@pytest.mark.parametrize(("schema", "paths"), [("vendor.github-workflows", FILES), ("vendor.github-actions", LOCAL_ACTIONS)])
def test_schemas_of_github(schema: str, paths: list[Path]) -> None:
    assert paths
    code, said = said_by(SCRIPTS / "check-jsonschema", "--builtin-schema", schema, *paths)
    assert code == 0, said


# --- what is used ----------------------------------------------------------------------------------------------------


def test_actions_are_the_four_that_are_pinned_here_or_our_own() -> None:
    lines = re.findall(r"^ +(?:- )?uses: (.*)$", ALL_TEXT, re.MULTILINE)
    assert len(lines) == len([step for _, step in steps() if "uses" in step])
    allowed = {f"{name}@{sha} # {version}" for name, (sha, version, _) in ACTIONS.items()}
    ours = {f"./{path.parent.relative_to(ROOT).as_posix()}" for path in LOCAL_ACTIONS}
    assert {line for line in lines if not line.startswith("./")} == allowed
    assert {line.split(" # ")[0] for line in lines if line.startswith("./")} == ours


def test_actions_know_their_inputs() -> None:
    known = {f"{name}@{sha}": set(inputs) for name, (sha, _, inputs) in ACTIONS.items()}
    known |= {f"./{path.parent.relative_to(ROOT).as_posix()}": set(yaml.safe_load(path.read_text())["inputs"]) for path in LOCAL_ACTIONS}
    for where, step in steps():
        if "uses" in step:
            assert set(step.get("with", {})) <= known[step["uses"]], f"{where}: {step['uses']}"


def test_one_version_of_uv() -> None:
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    versions = re.findall(r"\buv==\S+", ALL_TEXT)
    assert len(versions) == 2
    assert set(versions) == set(re.findall(r"\buv==\S+", dockerfile))


def test_what_is_left_out_without_pytorch_is_what_the_image_leaves_out() -> None:
    pattern = re.compile(r"/\^\((torch\|.+?)\)==/")
    action = (GITHUB / "actions" / "environment" / "action.yml").read_text(encoding="utf-8")
    assert pattern.findall(action) == pattern.findall((ROOT / "Dockerfile").read_text(encoding="utf-8"))


# --- what each file has ----------------------------------------------------------------------------------------------


@every_workflow
def test_a_workflow_starts_without_any_permission_and_without_secrets(name: str) -> None:
    workflow = PARSED[name]
    assert workflow["permissions"] == {}
    assert "secrets." not in str(workflow.get("env", {}))
    assert workflow["defaults"] == {"run": {"shell": "bash"}}, "the default lacks pipefail"


@every_workflow
def test_runs_wait_for_one_another_and_none_is_cancelled(name: str) -> None:
    jobs = {job: PARSED[name]["jobs"][job]["concurrency"] for job in PARSED[name]["jobs"]} if name == "pipeline.yml" else {}
    for job, concurrency in (jobs or {name.removesuffix(".yml"): PARSED[name]["concurrency"]}).items():
        assert (concurrency["cancel-in-progress"], concurrency["queue"]) == (False, "max")
        assert concurrency["group"] == f"{job}-${{{{ github.ref }}}}"


@every_job
def test_a_job_has_a_time_out_and_says_why_it_needs_what(name: str, job_id: str, job: dict[str, Any]) -> None:
    assert 0 < job["timeout-minutes"] < 360
    assert job["runs-on"] == "ubuntu-24.04"
    assert job["permissions"]
    for permission, access in job["permissions"].items():
        assert re.search(rf"^      {permission}: {access} +# \w+", TEXTS[name], re.MULTILINE), permission


def test_permissions_are_these_and_no_more() -> None:
    writing = {(name, job_id): {key for key, access in job["permissions"].items() if access == "write"} for name, job_id, job in JOBS}
    assert {where: names for where, names in writing.items() if names} == {
        ("pipeline.yml", "bump"): {"contents"},
        ("pipeline.yml", "record"): {"contents"},
        ("pipeline.yml", "propose"): {"pull-requests"},
        ("pipeline.yml", "publish"): {"contents", "id-token"},
        ("publish.yml", "publish"): {"contents", "id-token"},
        ("publish.yml", "propose"): {"pull-requests"},
    }


def test_no_expression_in_a_script() -> None:
    for where, step in steps():
        assert "${{" not in step.get("run", ""), where


def test_what_commands_say_is_plain_text_in_a_summary() -> None:
    """Four spaces before each line: neither Markdown nor HTML. summary.md alone is Markdown, and escaped by the command that wrote it."""
    for where, step in steps():
        for line in re.findall(r".*GITHUB_STEP_SUMMARY.*", step.get("run", "")):
            assert "| sed 's/^/    /' | tee -a" in line or line.strip().startswith(("printf", "if [ -f outputs/artifacts/summary.md ]")), (
                where
            )


def test_scripts_are_short() -> None:
    """What needs more belongs into a `pipeline` command, where it can be tested."""
    for where, step in steps():
        commands = re.sub(r"\\\n", "", step.get("run", "").strip()).splitlines()
        assert len(commands) <= (8 if where == "environment" else 4), where


def test_secrets_are_given_to_single_steps_of_the_environment_hub() -> None:
    for _, job_id, job in JOBS:
        having = [step for step in job["steps"] if "secrets." in str(step)]
        assert "secrets." not in str({key: value for key, value in job.items() if key != "steps"})
        assert [step["env"]["HF_TOKEN"] for step in having] == (["${{ secrets.HF_TOKEN }}"] if job_id == "publish" else [])
        assert job.get("environment") == ("hub" if job_id == "publish" else None)
        for step in having:
            assert "github.token" not in str(step)


def test_no_job_has_more_than_one_use_for_its_token() -> None:
    for where, step in steps():
        if "github.token" in str(step) and "uses" not in step:
            assert set(step["env"]) & {"PIPELINE_GIT_TOKEN", "GH_TOKEN"}
            assert re.search(r"pipeline version (reserve|record)|gh pr create", step["run"]), where


@every_job
def test_checkouts_keep_no_credentials(name: str, job_id: str, job: dict[str, Any]) -> None:
    for step in uses(job, "actions/checkout"):
        assert step["with"]["persist-credentials"] is False


# --- privacy ---------------------------------------------------------------------------------------------------------


@every_job
def test_only_these_two_things_become_artifacts(name: str, job_id: str, job: dict[str, Any]) -> None:
    for step in uses(job, "actions/upload-artifact"):
        allowed = {"reservation": "outputs/reservation.json", "results": "outputs/artifacts"}
        assert step["with"]["path"] == allowed[step["with"]["name"]]
        assert 0 < step["with"]["retention-days"] <= 30
        assert "if-no-files-found" in step["with"]
        assert step["with"]["overwrite"] is True
        assert "include-hidden-files" not in step["with"]


def test_caches_are_for_checks_alone() -> None:
    having = {(name, job_id) for name, job_id, job in JOBS if uses(job, "actions/cache")}
    assert having == {("ci.yml", "check")}
    assert set(PARSED["ci.yml"]["jobs"]["check"]["permissions"].values()) == {"read"}


def test_the_log_of_the_job_s_container_is_not_shown_again() -> None:
    """`docker compose logs` without a service would repeat all; the server's log has no prompt in it."""
    for command in re.findall(r"docker compose logs.*", ALL_TEXT):
        assert command.endswith(" ollama")


# --- pipeline.yml ----------------------------------------------------------------------------------------------------


def test_what_starts_the_job() -> None:
    triggers = PARSED["pipeline.yml"][True]  # YAML 1.1 takes the key `on` for a yes
    assert set(triggers) == {"push", "workflow_dispatch"}
    assert triggers["push"] == {"branches": ["**"], "paths": ["data/**", "pipeline.yaml"]}, "tags and metadata/ must not start it"
    form = "dataset base_model epochs learning_rate batch_size publish dry_run"
    assert list(triggers["workflow_dispatch"]["inputs"]) == form.split()
    assert set(PARSED["publish.yml"][True]) == {"workflow_dispatch"}
    assert PARSED["publish.yml"][True]["workflow_dispatch"]["inputs"]["dry_run"]["default"] is True
    assert set(PARSED["ci.yml"][True]) == {"pull_request", "push"}


def test_publishing_waits_for_a_good_run_and_its_record() -> None:
    publish = PARSED["pipeline.yml"]["jobs"]["publish"]
    assert {"run", "record"} <= set(publish["needs"])
    assert not re.search(r"always\(|cancelled\(|failure\(", publish["if"]), "without them, all needed jobs must have succeeded"


def test_versions_are_held_for_longer_than_the_jobs_may_take() -> None:
    jobs = PARSED["pipeline.yml"]["jobs"]
    (minutes,) = re.findall(r"--hold-minutes (\d+)", TEXTS["pipeline.yml"])
    all_jobs = sum(jobs[name]["timeout-minutes"] for name in ("bump", "run", "record"))
    assert int(minutes) > 1.5 * all_jobs, "runners are waited for, too"


def test_the_server_beside_the_job_is_the_one_of_docker_compose() -> None:
    over = yaml.safe_load((GITHUB / "ollama-on-host.yml").read_text(encoding="utf-8"))["services"]
    service = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]["ollama"]
    assert set(over) == {"ollama"}
    assert over["ollama"]["ports"] == ["127.0.0.1:11434:11434"], "nobody else may reach it"
    (volume,), (mounted,) = over["ollama"]["volumes"], service["volumes"]
    assert volume.partition(":/")[2] == mounted.partition(":/")[2] == service["environment"]["OLLAMA_MODELS"].removeprefix("/")

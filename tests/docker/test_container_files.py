"""Dockerfile, docker-compose.yml and .env.example, read and checked without an engine."""

from __future__ import annotations

import fnmatch
import re
import shutil
import subprocess
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text(encoding="utf-8")
COMPOSE = (ROOT / "docker-compose.yml").read_text(encoding="utf-8")
LOCK = (ROOT / "requirements.lock").read_text(encoding="utf-8")
SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE)["services"]


# --- Dockerfile ------------------------------------------------------------------------------------------------------


def test_hadolint_has_nothing_to_say() -> None:
    hadolint = Path(sysconfig.get_path("scripts")) / "hadolint"
    done = subprocess.run([str(hadolint), "--no-color", "Dockerfile"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr


def test_the_old_builder_can_build_it() -> None:
    """Without buildx there are no mounts, no --chmod and no here-documents."""
    assert not re.findall(r"^# syntax=|--mount=|--chmod=|--link\b|<<", DOCKERFILE, re.MULTILINE)


def test_packages_come_by_hash_and_the_lock_has_its_own_layer() -> None:
    installs = re.findall(r"uv pip install (.*?)(?: ;;| \\|$)", DOCKERFILE, re.MULTILINE)
    by_hash = [line for line in installs if "--require-hashes -r" in line]
    others = [line for line in installs if line not in by_hash]
    assert len(by_hash) == 2
    assert all("--no-deps" in line for line in installs)
    assert all("--offline" in line or '"$torch"' in line for line in others)
    assert DOCKERFILE.index("COPY requirements.lock") < DOCKERFILE.index("--require-hashes") < DOCKERFILE.index("COPY pipeline")


def test_no_address_of_an_index() -> None:
    for text in (DOCKERFILE, COMPOSE, (ROOT / ".env.example").read_text(encoding="utf-8")):
        assert not re.findall(r"https?://(?!ollama(?:-gpu)?:)|index-url|find-links|trusted-host", text)


def blocks(text: str) -> dict[str, str]:
    """package -> its lines in the lock. A package with several versions, by marker, has them one after the other."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines():
        if start := re.match(r"[a-z0-9][a-z0-9._-]*(?===)", line):
            name = start[0]
        if name and (line.startswith("    --hash") or start):
            found[name] = found.get(name, "") + line + "\n"
    return found


def awk(program: str, text: str) -> str:
    return subprocess.run(["awk", program], input=text, capture_output=True, text=True, timeout=60, check=True).stdout


@pytest.mark.skipif(shutil.which("awk") is None, reason="needs awk, which the image has")
def test_the_build_for_processors_leaves_out_pytorch_and_cuda_alone() -> None:
    keep, pin = re.findall(r"awk '([^']+)' requirements\.lock", DOCKERFILE)
    whole, kept = blocks(LOCK), blocks(awk(keep, LOCK))
    left_out = set(whole) - set(kept)
    assert left_out == {name for name in whole if name in ("torch", "triton") or name.startswith(("nvidia-", "cuda-"))}
    assert {"torch", "triton", "cuda-bindings"} <= left_out
    assert kept == {name: lines for name, lines in whole.items() if name not in left_out}
    assert re.fullmatch(r"torch==[\d.]+\n", awk(pin, LOCK))


def test_the_context_holds_what_is_copied_and_no_more() -> None:
    ignored, *rules = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert ignored == "*"
    back = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set(" ".join(re.findall(r"^COPY (?!--from)(.*) \S+$", DOCKERFILE, re.MULTILINE)).split())
    assert back == copied
    assert all((ROOT / name).exists() for name in copied)


def test_the_label_says_what_the_package_says() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    labels = dict(re.findall(r'org\.opencontainers\.image\.(\w+)="([^"]*)"', DOCKERFILE))
    assert labels == {
        "title": project["name"],
        "description": project["description"],
        "licenses": project["license"],
        "source": "${SOURCE}",
    }


def test_it_runs_the_job_as_nobody_in_particular() -> None:
    last = DOCKERFILE.rpartition("\nFROM ")[2]
    assert re.search(r"^USER 1000:1000$", last, re.MULTILINE)
    assert '\nENTRYPOINT ["pipeline"]\nCMD ["run"]\n' in last


# --- docker-compose.yml ----------------------------------------------------------------------------------------------


def test_the_services_and_who_waits_for_whom() -> None:
    assert list(SERVICES) == ["ollama", "pipeline", "ollama-gpu", "pipeline-gpu"]
    for job, server in (("pipeline", "ollama"), ("pipeline-gpu", "ollama-gpu")):
        assert SERVICES[job]["depends_on"] == {server: {"condition": "service_healthy"}}
        assert SERVICES[server]["healthcheck"]["test"] == ["CMD", "ollama", "list"]
        assert SERVICES[server]["restart"] == "unless-stopped"
        assert SERVICES[server]["attach"] is False, "else `docker compose up` doesn't end with the job"
        assert SERVICES[job]["restart"] == "no"
        assert SERVICES[job]["environment"]["OLLAMA_HOST"] == f"http://{server}:11434"
        for key in ("OLLAMA_NUM_PARALLEL", "OLLAMA_MODELS"):
            assert SERVICES[job]["environment"][key] == SERVICES[server]["environment"][key]


def test_the_gpu_profile_is_the_same_with_a_gpu() -> None:
    for name in ("ollama", "pipeline"):
        plain, gpu = SERVICES[name], SERVICES[f"{name}-gpu"]
        assert "profiles" not in plain
        assert gpu["profiles"] == ["gpu"]
        others = {"profiles", "deploy", "depends_on", "environment"}
        assert {key: value for key, value in gpu.items() if key not in others} == {k: v for k, v in plain.items() if k not in others}
        assert set(gpu["environment"]) == set(plain["environment"])
    assert "gpu" in SERVICES["ollama-gpu"]["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"]
    assert "deploy" not in SERVICES["pipeline-gpu"], "training uses no GPU"


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_is_held_tight(name: str) -> None:
    service = SERVICES[name]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert service["logging"]["options"]["max-size"]
    assert "mem_limit" in service
    assert not {"ports", "privileged", "network_mode", "pid", "env_file"} & set(service)


def test_the_servers_key_stays_with_the_server() -> None:
    """It lies in /root/.ollama; what is shared with the job is the folder of the models, which the job can't write."""
    for name in ("ollama", "ollama-gpu"):
        assert SERVICES[name]["volumes"] == ["models:/models"]
        assert SERVICES[name]["environment"]["OLLAMA_MODELS"] == "/models"
    for name in ("pipeline", "pipeline-gpu"):
        assert SERVICES[name]["volumes"] == ["./:/job", "models:/models:ro", "downloads:/downloads"]
        assert SERVICES[name]["read_only"] is True


def test_the_job_is_told_its_engine_and_model() -> None:
    for name in ("pipeline", "pipeline-gpu"):
        lines = SERVICES[name]["environment"]["PIPELINE_SET"].splitlines()
        assert lines == ["model.engine=ollama", "model.name=${MODEL:-smollm2:135m}"]


# --- .env.example ----------------------------------------------------------------------------------------------------


def test_env_example_names_every_setting_with_its_default() -> None:
    used: dict[str, str] = {}
    for name, default in re.findall(r"\$\{(\w+):-([^}]*)\}", COMPOSE):
        used.setdefault(name, default)
    assert COMPOSE.count("${") == len(re.findall(r"\$\{\w+:-", COMPOSE)), "every setting has a default"
    example = (ROOT / ".env.example").read_text(encoding="utf-8")
    assert dict(re.findall(r"^#(\w+)=(.*)$", example, re.MULTILINE)) == used


def test_env_example_changes_nothing_as_it_stands() -> None:
    lines = (ROOT / ".env.example").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if line and not line.startswith("#")]


def test_a_users_settings_stay_out_of_git_and_image() -> None:
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
    assert ".env" in ignored
    assert not any(fnmatch.fnmatch(".env.example", rule) for rule in ignored)

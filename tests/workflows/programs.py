"""Stand-ins for programs and actions that reach out: `programs.py NAME ARGUMENT...`. `act.py` puts them in place for what act runs.

Each call is noted in the file that ACT_CALLS names. docker does what our workflows want of it without any container: `compose up` is
`pipeline run` and `compose run ... pipeline ARGUMENT...` is `pipeline ARGUMENT...`, in the checkout, with a container's environment.
"""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SEEN_IN_CONTAINERS = ("PATH", "LANG", "HOME", "PYTHONDONTWRITEBYTECODE")  # PATH, since the container is this machine


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def note(program: str, arguments: list[str], inputs: dict[str, str] | None = None) -> None:
    files = [path.as_posix() for path in sorted(Path().rglob("*")) if path.is_file() and path.parts[0] != ".git"]
    job = os.environ.get("GITHUB_JOB") or os.environ.get("ACT_JOB", "")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACT_")}
    call = {"program": program, "arguments": arguments, "job": job, "environment": environment, "files": files, "inputs": inputs or {}}
    with Path(os.environ["ACT_CALLS"]).open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(call) + "\n")


# --- docker ----------------------------------------------------------------------------------------------------------


def compose_environment() -> dict[str, str]:
    """What Compose puts into the job's container, with ACT_SETTINGS in place of its settings for an Ollama server."""
    import yaml  # slow, and needed here alone

    told: dict[str, Any] = {}
    for name in os.environ.get("COMPOSE_FILE", "docker-compose.yml").split(":"):
        services = yaml.safe_load(Path(name).read_text(encoding="utf-8"))["services"]
        told |= services.get("pipeline", {}).get("environment", {})

    def filled(found: re.Match[str]) -> str:
        return os.environ.get(found[1]) or found[2] or ""

    values = {name: re.sub(r"\$\{(\w+)(?::-([^}]*))?\}", filled, str(value)) for name, value in told.items()}
    if "ACT_SETTINGS" in os.environ:
        without = {name: value for name, value in values.items() if not name.startswith("OLLAMA_")}
        values = {**without, "PIPELINE_SET": os.environ["ACT_SETTINGS"]}
    return values


def in_container(arguments: list[str]) -> int:
    kept = {name: value for name, value in os.environ.items() if name in SEEN_IN_CONTAINERS or name.startswith("ACT_")}
    environment = {**kept, "ACT_JOB": os.environ["GITHUB_JOB"], **compose_environment(), **json.loads(os.environ["ACT_MORE"])}
    return subprocess.run(["pipeline", *arguments], env=environment, check=False).returncode


def docker(arguments: list[str]) -> int:
    match arguments:
        case ["compose", "config", "--format", "json", *_]:
            say(json.dumps({"services": {"pipeline": {"environment": compose_environment()}}}))
        case ["compose", "up", *options] if "--exit-code-from" in options:
            return in_container(["run"])
        case ["compose", "run", *rest]:
            return in_container(rest[rest.index("pipeline") + 1 :])
    return 0


# --- pipeline, as a test wants it to answer --------------------------------------------------------------------------


def pipeline(arguments: list[str]) -> int:
    answers = json.loads(os.environ["ACT_ANSWERS"])
    line = " ".join(arguments)
    fitting = [words for words in answers if f"{line} ".startswith(f"{words} ")]
    if not fitting:
        say(f"no answer for: pipeline {line}")
        return 1
    answer = answers[max(fitting, key=len)]
    time.sleep(answer["seconds"])
    for name, text in answer["files"].items():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(text, encoding="utf-8")
    if "GITHUB_OUTPUT" in os.environ:
        with Path(os.environ["GITHUB_OUTPUT"]).open("a", encoding="utf-8") as outputs:
            outputs.writelines(f"{name}={value}\n" for name, value in answer["outputs"].items())
    if answer["says"]:
        say(answer["says"])
    return int(answer["code"])


# --- actions ---------------------------------------------------------------------------------------------------------


def checkout(inputs: dict[str, str]) -> int:
    """A shallow checkout of the branch `ref`, else of the run's commit, on a branch of that name; as with the real one there is
    neither origin/HEAD nor any tag."""
    branch, commit = os.environ["GITHUB_REF_NAME"], os.environ["GITHUB_SHA"]
    if inputs["ref"]:
        branch, commit = inputs["ref"], f"refs/heads/{inputs['ref']}"
    depth = ["--depth=1"] if inputs["fetch-depth"] == "1" else []
    remote = f"refs/remotes/origin/{branch}"
    for command in (
        ["init", "--quiet", "--initial-branch=none"],
        ["remote", "add", "origin", os.environ["ACT_REMOTE"]],
        ["fetch", "--quiet", "--no-tags", *depth, "origin", f"+{commit}:{remote}"],
        ["checkout", "--quiet", "--force", "-B", branch, remote],
    ):
        subprocess.run(["git", *command], check=True)
    return 0


def upload_artifact(inputs: dict[str, str]) -> int:
    source, kept = Path(inputs["path"]), Path(os.environ["ACT_ARTIFACTS"], inputs["name"])
    found = [source] if source.is_file() else [path for path in sorted(source.rglob("*")) if path.is_file()]
    base = source.parent if source.is_file() else source
    found = [path for path in found if not any(part.startswith(".") for part in path.relative_to(base).parts)]
    if not found:
        say(f"no files in {source}: {inputs['if-no-files-found']}")
        return 1 if inputs["if-no-files-found"] == "error" else 0
    if kept.exists():
        if inputs["overwrite"] != "true":
            say(f"an artifact {kept.name} is there already")
            return 1
        shutil.rmtree(kept)
    for path in found:
        target = kept / path.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    return 0


def download_artifact(inputs: dict[str, str]) -> int:
    there = sorted(path.name for path in Path(os.environ["ACT_ARTIFACTS"]).glob("*"))
    wanted = [inputs["name"]] if inputs["name"] else [name for name in there if fnmatch.fnmatchcase(name, inputs["pattern"] or "*")]
    if set(wanted) - set(there):
        say(f"Artifact '{inputs['name']}' not found")
        return 1
    for name in wanted:
        flat = inputs["name"] or inputs["merge-multiple"] == "true"
        shutil.copytree(Path(os.environ["ACT_ARTIFACTS"], name), Path(inputs["path"] or ".", *([] if flat else [name])), dirs_exist_ok=True)
    return 0


ACTIONS: dict[str, Any] = {
    "actions/checkout": checkout,
    "actions/upload-artifact": upload_artifact,
    "actions/download-artifact": download_artifact,
    "actions/cache": lambda inputs: 0,
}
PROGRAMS: dict[str, Any] = {"docker": docker, "gh": lambda arguments: 0, "sudo": lambda arguments: 0, "pipeline": pipeline}


def main(name: str, arguments: list[str]) -> int:
    if name in ACTIONS:
        inputs = {key: str(value) for key, value in json.loads(os.environ["ACTION_INPUTS"]).items()}
        note(name, [], inputs)
        return int(ACTIONS[name](inputs))
    note(name, arguments)
    return int(PROGRAMS[name](arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2:]))

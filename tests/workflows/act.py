"""Workflows run for real, by act, on this machine: a repository on a server (a bare one), its checkouts, and what each run did.

Ours are the workflow files, but for the key `queue`, which act doesn't know. Stand-ins (`programs.py`) are the four actions, the
environment, and the programs that would reach out: docker, gh, sudo; `pipeline` is the real one unless a test says how it answers.
act knows neither permissions nor environments, path filters, concurrency or tokens: `test_workflow_files.py` reads those.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
WORKFLOWS = ROOT / ".github" / "workflows"
PROGRAMS = Path(__file__).with_name("programs.py")
SCRIPTS = Path(sysconfig.get_path("scripts"))

# The only actions that are used: commit, version, and the inputs with their defaults.
ACTIONS: Mapping[str, tuple[str, str, Mapping[str, str]]] = {
    "actions/checkout": (
        "8e8c483db84b4bee98b60c0593521ed34d9990e8", "v6.0.1",
        {"ref": "", "fetch-depth": "1", "persist-credentials": "true"},
    ),
    "actions/upload-artifact": (
        "b7c566a772e6b6bfb58ed0dc250532a479d7789f", "v6",
        {
            "name": "artifact", "path": "", "if-no-files-found": "warn", "retention-days": "", "overwrite": "false",
            "include-hidden-files": "false",
        },
    ),
    "actions/download-artifact": (
        "37930b1c2abaa49bbe596cd826c3c89aef350131", "v7.0.0",
        {"name": "", "path": "", "pattern": "", "merge-multiple": "false", "run-id": "", "github-token": ""},
    ),
    "actions/cache": ("9255dc7a253b0ccc959486e2bca901246202afeb", "v5.0.1", {"path": "", "key": "", "restore-keys": ""}),
}  # fmt: skip

NO_ENVIRONMENT = """\
name: environment
description: Nothing; `pipeline` is on the PATH already.
inputs: {torch: {description: "-", default: "true"}}
runs: {using: composite, steps: [{shell: bash, run: "true"}]}
"""
RUN_IDS = itertools.count(1001)  # act calls every run 1
INHERITED = ("PATH", "LANG", "LC_ALL", "TMPDIR", "SSL_CERT_FILE")


@dataclass(frozen=True)
class Answer:
    """How the stand-in for `pipeline` answers one command: what it writes (paths from the checkout), says and exits with."""

    code: int = 0
    says: str = ""
    outputs: Mapping[str, str] = field(default_factory=dict)  # appended to $GITHUB_OUTPUT where that is set
    files: Mapping[str, str] = field(default_factory=dict)
    seconds: float = 0


Answers = Mapping[str, Answer]  # "version reserve" and the like, the first words of a command: the longest that fits answers


@dataclass(frozen=True)
class Call:
    """A call of docker, gh, sudo or `pipeline`, or the use of an action ("actions/cache", its inputs as `inputs`)."""

    program: str
    arguments: tuple[str, ...]
    job: str
    environment: Mapping[str, str]
    files: tuple[str, ...]  # in the checkout at that moment, without .git
    inputs: Mapping[str, str]

    def __str__(self) -> str:
        return shlex.join((self.program, *self.arguments))


Interrupt = Callable[[Sequence[Call]], bool]


@dataclass(frozen=True)
class Finished:
    """A workflow's end. `jobs`: job -> "success" or "failure"; a job that was skipped isn't there."""

    code: int
    log: str  # what steps printed, and act's own lines
    jobs: Mapping[str, str]
    steps: Mapping[str, Mapping[str, str]]  # job -> step's name -> its result
    summaries: Mapping[str, str]  # job -> its step summary
    calls: tuple[Call, ...]
    artifacts: Path  # one folder each

    def lines(self, *programs: str, job: str | None = None) -> list[str]:
        """Calls as command lines, in order."""
        return [str(call) for call in self.calls if call.program in (programs or (call.program,)) and job in (None, call.job)]

    def call(self, line: str) -> Call:
        """The only call whose command line starts like this."""
        (found,) = (call for call in self.calls if str(call).startswith(line))
        return found

    def uploaded(self, name: str) -> dict[str, str]:
        """Path -> text of the files of an artifact; empty when there is none."""
        folder = self.artifacts / name
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in files}


class GitHub:
    """A repository `example/project` on a server, and runners for its workflows."""

    def __init__(
        self, folder: Path, files: Mapping[str, str | bytes], *, default_branch: str = "main", private: bool = True,
        secrets: Mapping[str, str] | None = None, variables: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        self.folder, self.default_branch, self.private = folder, default_branch, private
        self.secrets = {"GITHUB_TOKEN": "token-of-the-run", **(secrets or {})}
        self.variables = dict(variables or {})
        self.remote = folder / "remote.git"
        self.artifacts = folder / "artifacts"
        self._clone = folder / "clone"
        self._runs = 0
        self._home = folder / "home"
        self._home.mkdir(parents=True)
        self.git("init", "--quiet", "--bare", f"--initial-branch={default_branch}", str(self.remote), at=folder)
        self.git("config", "uploadpack.allowAnySHA1InWant", "true", at=self.remote)  # as GitHub: a checkout fetches a commit
        self.git("clone", "--quiet", str(self.remote), str(self._clone), at=folder)
        self.git("symbolic-ref", "HEAD", f"refs/heads/{default_branch}")
        self.push({**_our_files(), **files}, "The project")
        self._stand_ins()

    def git(self, *arguments: str, at: Path | None = None) -> str:
        """What git says, in the remote repository's clone that tests commit with, or `at` another folder."""
        names = ["-c", "user.name=Somebody", "-c", "user.email=somebody@example.invalid", "-c", "protocol.file.allow=always"]
        environment = {"PATH": os.environ["PATH"], "HOME": str(self._home), "GIT_CONFIG_NOSYSTEM": "1"}
        done = subprocess.run(
            ["git", *names, *arguments], cwd=at or self._clone, env=environment, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"git {' '.join(arguments)}: {done.stderr}"
        return done.stdout.strip()

    def push(self, files: Mapping[str, str | bytes | None], message: str = "A change", branch: str | None = None) -> str:
        """Commits on the fresh head of a branch (None: the default one) and pushes: path -> contents, None deletes. Returns the commit."""
        branch = branch or self.default_branch
        self.git("fetch", "--quiet", "--prune", "--tags", "origin")
        heads = self.git("branch", "--remotes", "--format=%(refname:short)").splitlines()
        if heads:
            self.git("checkout", "--quiet", "-B", branch, f"origin/{branch if f'origin/{branch}' in heads else self.default_branch}")
        for name, contents in files.items():
            path = self._clone / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if contents is None:
                path.unlink()
            else:
                path.write_bytes(contents.encode() if isinstance(contents, str) else contents)
        self.git("add", "--all", "--force", *files)
        self.git("commit", "--quiet", "--allow-empty", "--message", message)
        self.git("push", "--quiet", "origin", branch)
        return self.git("rev-parse", "HEAD")

    def show(self, path: str, branch: str | None = None) -> str:
        """A file's text as the server has it."""
        return self.git("show", f"{branch or self.default_branch}:{path}", at=self.remote)

    def tags(self) -> list[str]:
        return self.git("tag", "--list", at=self.remote).splitlines()

    def pushed(self, workflow: str = "pipeline.yml", *, branch: str | None = None, **settings: Any) -> Finished:
        """Runs a workflow for the push of a branch's last commit. Whether its paths would have started it is not asked."""
        return self._run("push", workflow, branch or self.default_branch, {}, **settings)

    def dispatched(
        self, workflow: str = "pipeline.yml", inputs: Mapping[str, str | bool] | None = None, *, branch: str | None = None, **settings: Any
    ) -> Finished:
        """Runs a workflow as "Run workflow" does; inputs that are not given get their defaults, as in the form."""
        form = _triggers(WORKFLOWS / workflow)["workflow_dispatch"]["inputs"]
        unknown = set(inputs or {}) - set(form)
        assert not unknown, f"{workflow} has no such input: {unknown}"
        defaults = {name: entry.get("default", False if entry["type"] == "boolean" else "") for name, entry in form.items()}
        typed = {name: str(value).lower() if isinstance(value, bool) else value for name, value in {**defaults, **(inputs or {})}.items()}
        return self._run("workflow_dispatch", workflow, branch or self.default_branch, {"inputs": typed}, **settings)

    def _run(
        self,
        event: str,
        workflow: str,
        branch: str,
        payload: Mapping[str, Any],
        *,
        answers: Answers | None = None,
        settings: str | None = None,
        interrupt: Interrupt | None = None,
        environment: Mapping[str, str] | None = None,
        timeout: float = 300,
    ) -> Finished:
        """One run of act.

        Args:
            answers: of the stand-in for `pipeline`; without them the real one runs.
            settings: PIPELINE_SET of the "container", instead of what docker-compose.yml says.
            interrupt: act gets Ctrl-C as soon as this is true of the calls so far.
            environment: more of it, for every step and the "container".
            timeout: seconds.
        """
        self._runs += 1
        here = self.folder / f"run-{self._runs}"
        (here / "cache").mkdir(parents=True)
        self.git("fetch", "--quiet", "--prune", "--tags", "--force", "origin")
        self.git("checkout", "--quiet", "-B", branch, f"origin/{branch}")
        head = self.git("rev-parse", "HEAD")
        (here / "event.json").write_text(json.dumps({**payload, **self._event(branch, head)}), encoding="utf-8")
        (here / "calls.jsonl").touch()
        known = {name: os.environ[name] for name in INHERITED if name in os.environ}
        first = [self.folder / "fake"] if answers is not None else []
        environ = known | {
            "ACT_ANSWERS": json.dumps({words: asdict(answer) for words, answer in (answers or {}).items()}),
            "ACT_ARTIFACTS": str(self.artifacts),
            "ACT_CALLS": str(here / "calls.jsonl"),
            "ACT_MORE": json.dumps(dict(environment or {})),
            "ACT_REMOTE": self.remote.as_uri(),
            "DOCKER_HOST": f"unix://{here / 'none.sock'}",
            "GIT_CONFIG_NOSYSTEM": "1",
            "HOME": str(self._home),
            "PATH": os.pathsep.join(str(folder) for folder in (*first, self.folder / "bin", SCRIPTS, known["PATH"])),
            "PYTHONDONTWRITEBYTECODE": "1",
            "XDG_CACHE_HOME": str(here / "cache"),
            "XDG_CONFIG_HOME": str(self._home),
            **({"ACT_SETTINGS": settings} if settings is not None else {}),
            **(environment or {}),
        }
        command = [
            str(SCRIPTS / "act"), event, "--json", "-W", f".github/workflows/{workflow}", "-e", str(here / "event.json"),
            "-P", "ubuntu-24.04=-self-hosted", "--container-daemon-socket", "-", "--no-cache-server", "--no-skip-checkout",
            "--defaultbranch", self.default_branch, "--concurrent-jobs", "1", "--env", f"GITHUB_RUN_ID={next(RUN_IDS)}",
            *(f"--local-repository={name}@{sha}={self.folder / 'actions' / name}" for name, (sha, _, _) in ACTIONS.items()),
            *(part for name, value in self.secrets.items() for part in ("-s", f"{name}={value}")),
            *(part for name, value in self.variables.items() for part in ("--var", f"{name}={value}")),
        ]  # fmt: skip
        code, log = _watched(command, self._clone, environ, here, interrupt, timeout)
        return _finished(code, log, read_calls(here / "calls.jsonl"), self.artifacts)

    def _event(self, branch: str, head: str) -> dict[str, Any]:
        return {
            "ref": f"refs/heads/{branch}",
            "after": head,
            "repository": {
                "default_branch": self.default_branch, "full_name": "example/project", "name": "project", "owner": {"login": "example"},
                "private": self.private, "visibility": "private" if self.private else "public", "fork": False,
            },
        }  # fmt: skip

    def _stand_ins(self) -> None:
        for place, names in (("bin", ("docker", "gh", "sudo")), ("fake", ("pipeline",))):
            (self.folder / place).mkdir()
            for name in names:
                path = self.folder / place / name
                path.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-I", str(PROGRAMS), name])} "$@"\n', encoding="utf-8")
                path.chmod(0o755)
        for name, (_, _, inputs) in ACTIONS.items():
            folder = self.folder / "actions" / name
            folder.mkdir(parents=True)
            stand_in = shlex.join([sys.executable, "-I", str(PROGRAMS), name])
            step = {"shell": "bash", "env": {"ACTION_INPUTS": "${{ toJSON(inputs) }}"}, "run": stand_in}
            action = {
                "name": name, "description": "a stand-in", "runs": {"using": "composite", "steps": [step]},
                "inputs": {key: {"description": "-", "default": value} for key, value in inputs.items()},
            }  # fmt: skip
            (folder / "action.yml").write_text(yaml.safe_dump(action), encoding="utf-8")


def for_act(workflow: str) -> str:
    """A workflow's text as act takes it: without `queue`."""
    return re.sub(r"^ +queue: .*\n", "", workflow, flags=re.MULTILINE)


def read_calls(path: Path) -> tuple[Call, ...]:
    entries = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return tuple(Call(**{**entry, "arguments": tuple(entry["arguments"]), "files": tuple(entry["files"])}) for entry in entries)


def _our_files() -> dict[str, str]:
    """The part of the checkout that workflows use."""
    files = {f".github/workflows/{path.name}": for_act(path.read_text(encoding="utf-8")) for path in WORKFLOWS.glob("*.yml")}
    files[".github/actions/environment/action.yml"] = NO_ENVIRONMENT
    for name in (".github/ollama-on-host.yml", ".github/job-in-workflow.yml", "docker-compose.yml", ".gitignore"):
        files[name] = (ROOT / name).read_text(encoding="utf-8")
    return files


def _triggers(path: Path) -> dict[str, Any]:
    workflow = yaml.safe_load(path.read_text(encoding="utf-8"))
    return dict(workflow[True])  # YAML 1.1 takes the key `on` for a yes


def _watched(
    command: Sequence[str], folder: Path, environ: Mapping[str, str], here: Path, interrupt: Interrupt | None, timeout: float
) -> tuple[int, str]:
    """Runs it, and ends all that it started when it takes too long. Gives its exit code and all that it said."""
    log, until = here / "log.jsonl", time.monotonic() + timeout
    with log.open("w", encoding="utf-8") as sink:
        streams: Any = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(command, cwd=folder, env=dict(environ), process_group=0, **streams)
        try:
            while process.poll() is None and time.monotonic() < until:
                if interrupt and interrupt(read_calls(here / "calls.jsonl")):
                    process.send_signal(signal.SIGINT)
                    interrupt = None
                time.sleep(0.05)
            timed_out = process.poll() is None
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            code = process.wait()
    text = log.read_text(encoding="utf-8", errors="replace")
    assert not timed_out, f"act ran for more than {timeout:.0f} s\n{text[-3000:]}"
    return code, text


def _finished(code: int, log: str, calls: tuple[Call, ...], artifacts: Path) -> Finished:
    entries = [json.loads(line) if line.startswith("{") else {"msg": line + "\n"} for line in log.splitlines()]
    jobs = {str(entry["jobID"]): str(entry["jobResult"]) for entry in entries if "jobResult" in entry}
    steps: dict[str, dict[str, str]] = {}
    summaries: dict[str, str] = {}
    for entry in entries:
        if entry.get("stage") == "Main" and "stepResult" in entry:
            steps.setdefault(entry["jobID"], {})[entry["step"]] = entry["stepResult"]
        if entry.get("command") == "summary":
            summaries[entry["jobID"]] = summaries.get(entry["jobID"], "") + entry["content"]
    log = "".join(entry["msg"] if entry["msg"].endswith("\n") else entry["msg"] + "\n" for entry in entries if "msg" in entry)
    return Finished(code, log, jobs, steps, summaries, calls, artifacts)

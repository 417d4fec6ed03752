"""requirements.lock is what `uv export` makes of uv.lock: pinned, with hashes, and without a word on where packages come from."""

from __future__ import annotations

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LOCK = ROOT / "requirements.lock"
EXPORT = ("uv", "export", "--frozen", "--no-dev", "--no-emit-project", "--format", "requirements-txt")


def requirements(text: str) -> list[str]:
    """One line a requirement, continuation lines joined, comments left out."""
    return [line for line in text.replace("\\\n", " ").splitlines() if line.strip() and not line.lstrip().startswith("#")]


def test_every_requirement_is_pinned_and_has_hashes() -> None:
    lines = requirements(LOCK.read_text(encoding="utf-8"))
    assert len(lines) > 50
    wrong = [line[:60] for line in lines if not re.match(r"^[a-z0-9][a-z0-9._-]*==\S+ .*--hash=sha256:[0-9a-f]{64}", line)]
    assert not wrong


def test_no_address_is_named() -> None:
    text = LOCK.read_text(encoding="utf-8")
    assert not re.findall(r"https?:|://| @ |file:|^\s*(?:-i|-f|--index-url|--extra-index-url|--find-links)\b", text, re.MULTILINE)


def test_every_direct_dependency_is_in_it() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["dependencies"]
    names = {re.split(r"[<>=!~ ;\[]", line)[0] for line in declared}
    locked = {line.partition("==")[0] for line in requirements(LOCK.read_text(encoding="utf-8"))}
    assert names <= locked


def test_it_is_what_uv_exports() -> None:
    if shutil.which("uv") is None or not (ROOT / "uv.lock").exists():
        pytest.skip("needs uv and a uv.lock (`uv sync` writes it)")
    done = subprocess.run([*EXPORT], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert requirements(done.stdout) == requirements(LOCK.read_text(encoding="utf-8")), "renew it: see CONTRIBUTING.md"

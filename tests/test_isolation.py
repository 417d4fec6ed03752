"""What `conftest.py` promises: no test reaches another machine, even where the refusal is swallowed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = """
import contextlib, os, socket

def test_loopback_is_open():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as client:
        assert client.getpeername() == server.getsockname()
    assert socket.getaddrinfo("localhost", 80)

def test_an_address_is_refused_though_swallowed():
    with contextlib.suppress(Exception):
        socket.create_connection(("192.0.2.1", 80), timeout=1)

def test_a_name_is_refused_though_swallowed():
    with contextlib.suppress(Exception):
        socket.getaddrinfo("example.org", 443)

def test_the_environment_is_clean():
    assert not {"HF_TOKEN", "OLLAMA_HOST", "PIPELINE_CONFIG", "GITHUB_REF"} & set(os.environ)
"""


def test_the_guard(tmp_path: Path) -> None:
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "test_guarded.py").write_text(TESTS, encoding="utf-8")
    settings = {"HF_TOKEN": "t", "OLLAMA_HOST": "h", "PIPELINE_CONFIG": "c", "GITHUB_REF": "r"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", str(tmp_path), str(tmp_path)],
        cwd=tmp_path, env=os.environ | settings, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "4 passed, 2 errors" in done.stdout
    assert done.stdout.count("the network was used") >= 2

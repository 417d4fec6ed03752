"""A real Ollama server for tests marked `ollama`: its own port and models folder, stopped by its id."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

VARIABLE = "TEST_OLLAMA_BIN"
MISSING = f"needs a real Ollama server: put `ollama` on PATH, or set {VARIABLE} to the program"
_STARTS_WITHIN_S = 60


def binary() -> Path | None:
    """The program to start: what TEST_OLLAMA_BIN names, else the `ollama` on PATH."""
    found = os.environ.get(VARIABLE) or shutil.which("ollama")
    return Path(found) if found and Path(found).is_file() else None


class RealOllama:
    """`ollama serve`, running from the first line of a `with` to its last; in between it can be killed and started again."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder, self.models = program, folder, folder / "models"
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> Path:
        return self.folder / "server.log"

    def start(self) -> None:
        """Starts it and waits until it answers."""
        with self.log.open("ab") as log:
            # a session of its own, so that what it starts can be ended with it
            self._server = subprocess.Popen(
                [self.program, "serve"], env=self._environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        deadline = time.monotonic() + _STARTS_WITHIN_S
        while time.monotonic() < deadline and self._server.poll() is None:
            with contextlib.suppress(OSError), opener.open(f"{self.address}/api/version", timeout=5):
                return
            time.sleep(0.05)
        raise RuntimeError(f"{self.program} serve does not answer; see {self.log}:\n{self.log.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """SIGKILL to the server and to what it started, as when a container is killed."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def _end(self, how: signal.Signals) -> None:
        server, self._server = self._server, None
        if server is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, how)
        try:
            server.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)
            server.wait()

    def command(self, *arguments: str) -> str:
        """What `ollama ARGUMENTS…` prints."""
        done = subprocess.run(
            [self.program, *arguments], env=self._environment(), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def _environment(self) -> dict[str, str]:
        own = {
            "OLLAMA_HOST": f"127.0.0.1:{self.port}",
            "OLLAMA_MODELS": str(self.models),
            "OLLAMA_NO_CLOUD": "1",
            "HOME": str(self.folder),  # where it would put a key
            "OMP_WAIT_POLICY": "passive",  # threads that wait by spinning lose whole time slices as soon as anything else wants a core
        }
        return {**os.environ, **own}

    def __enter__(self) -> RealOllama:
        self.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        shutil.rmtree(self.models, ignore_errors=True)  # hundreds of megabytes, which pytest would keep for three runs

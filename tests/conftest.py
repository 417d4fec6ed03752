"""For every test: no network but loopback, an environment without the user's settings, third-party programs that keep quiet."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.ollama_stack import RealOllama

# Before anything is imported: the Hub's client and others read the environment once, when they are imported.
_NOT_OURS = ("HF_", "HUGGING_FACE_", "TRANSFORMERS_", "OLLAMA_", "PIPELINE_", "GITHUB_")
for _name in [name for name in os.environ if name.startswith(_NOT_OURS)]:
    del os.environ[_name]
os.environ |= {
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


class NetworkUsedError(AssertionError):
    """A test reached for a host that is not this machine."""


def is_loopback(host: object) -> bool:
    """Whether a host, as socket functions take it, is this machine."""
    text = host.decode() if isinstance(host, bytes) else host
    if text is None or text in ("", "localhost", "localhost."):
        return True
    try:
        address = ipaddress.ip_address(str(text).partition("%")[0])
    except ValueError:
        return False
    return address.is_loopback or address.is_unspecified


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Refuses, and fails the test too when what it calls swallows the refusal."""
    refused: list[str] = []

    def check(host: object) -> None:
        if not is_loopback(host):
            refused.append(f"{host!r}")
            raise NetworkUsedError(f"the network was used: {host!r}")

    def guarded(name: str) -> Any:
        plain = getattr(socket.socket, name)

        def call(self: socket.socket, *arguments: Any) -> Any:
            if self.family in (socket.AF_INET, socket.AF_INET6):
                check(arguments[-1][0])  # the address stands last: sendto(data, flags, address)
            return plain(self, *arguments)

        return call

    plain_lookup = socket.getaddrinfo

    def lookup(host: Any, *arguments: Any, **settings: Any) -> Any:
        if str(host).endswith(".invalid"):  # never a host (RFC 6761): for a test that wants a name that leads nowhere
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        check(host)
        return plain_lookup(host, *arguments, **settings)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, guarded(name))
    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    yield
    assert not refused, f"the network was used: {', '.join(refused)}"


@pytest.fixture(scope="session")
def real_ollama(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealOllama]:
    """A real server of the tests' own, without any model; skips where there is no `ollama`."""
    from tests.ollama_stack import MISSING, RealOllama, binary

    found = binary()
    if found is None:
        pytest.skip(MISSING)
    with RealOllama(found, tmp_path_factory.mktemp("ollama")) as server:
        yield server

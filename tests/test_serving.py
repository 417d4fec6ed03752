"""Which engine answers: what the configuration asks for, and what is there."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.backends import llamacpp
from pipeline.backends.ollama_models import ServedModel
from pipeline.backends.ollama_server import OllamaServer
from pipeline.backends.ollama_serving import OllamaServing
from pipeline.backends.serving import EmbeddedServing, open_serving
from pipeline.errors import EngineError, ModelNotFoundError, UserError
from pipeline.ports import Serving
from tests.fakes import FakeTokenizer
from tests.scripted_ollama import Model, ScriptedOllama, says
from tests.test_base_model import write_gguf


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedOllama]:
    monkeypatch.setenv("HOME", str(tmp_path))
    with ScriptedOllama(tmp_path / "ollama") as double:
        monkeypatch.setenv("OLLAMA_HOST", double.address)
        path = write_gguf(tmp_path / "made.gguf")
        double.models["small:1b"] = Model(double.add_blob(path.read_bytes()))
        yield double


@pytest.fixture
def closing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Closes the servers that `open_serving` leaves open for as long as the program runs."""
    opened: list[OllamaServer] = []
    plain = OllamaServer.__init__

    def remember(self: OllamaServer, *arguments: Any, **settings: Any) -> None:
        opened.append(self)
        plain(self, *arguments, **settings)

    monkeypatch.setattr(OllamaServer, "__init__", remember)
    yield
    for server in opened:
        if hasattr(server, "wire"):
            server.close()


@pytest.mark.usefixtures("closing")
def test_what_is_asked_for_is_taken(ollama: ScriptedOllama) -> None:
    embedded: Serving = open_serving("embedded")
    assert isinstance(embedded, EmbeddedServing)
    assert ollama.asked == []  # no server is asked
    for engine in ("ollama", "auto"):
        serving: Serving = open_serving(engine)  # type: ignore[arg-type]
        assert isinstance(serving, OllamaServing)
        assert serving.facts == {"engine": "ollama", "ollama": "0.34.2"}
        assert (serving.name, serving.served_apart()) == ("ollama", True)


def test_no_server_there(ollama: ScriptedOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    ollama.stop()
    assert isinstance(open_serving("auto"), EmbeddedServing)
    monkeypatch.setattr("pipeline.backends.ollama_wire.time.sleep", lambda _: None)
    with pytest.raises(EngineError, match="no Ollama server answers") as caught:
        open_serving("ollama")
    assert "model.engine: embedded" in caught.value.hint


def test_a_server_that_is_too_old(ollama: ScriptedOllama) -> None:
    ollama.version = "0.9.6"
    assert isinstance(open_serving("auto"), EmbeddedServing)
    with pytest.raises(EngineError, match="too old"):
        open_serving("ollama")


@pytest.mark.usefixtures("closing")
def test_names_that_mean_files_and_names_that_the_server_knows(ollama: ScriptedOllama, tmp_path: Path) -> None:
    file = write_gguf(tmp_path / "own.gguf")
    write_gguf(tmp_path / "adapter.gguf", general__type="adapter")
    for serving in (open_serving("embedded"), open_serving("ollama")):
        asked = len(ollama.asked)
        assert serving.find("own.gguf", root=tmp_path, allow_download=True, verify=True).path == file
        with pytest.raises(ModelNotFoundError, match=r"none\.gguf: no such file"):
            serving.find("none.gguf", root=tmp_path, allow_download=True, verify=True)
        with pytest.raises(ModelNotFoundError, match=r"\.\./none: no such file"):
            serving.find("../none", root=tmp_path, allow_download=True, verify=True)
        with pytest.raises(UserError, match="adapter"):
            serving.find("adapter.gguf", root=tmp_path, allow_download=True, verify=True)
        assert len(ollama.asked) == asked
        found = serving.find("small:1b", root=tmp_path, allow_download=True, verify=True)
        assert isinstance(found, ServedModel)
        assert found.facts.name == "small:1b"


@pytest.mark.usefixtures("closing")
def test_pulling_is_for_a_server_that_may(ollama: ScriptedOllama, tmp_path: Path) -> None:
    ollama.registry["new:1b"] = ollama.models["small:1b"]

    def find(serving: Serving, allow: bool) -> str:
        return serving.find("new:1b", root=tmp_path, allow_download=allow, verify=True).facts.name

    for serving, allow in ((open_serving("ollama", pull=False), True), (open_serving("ollama"), False), (open_serving("embedded"), True)):
        with pytest.raises(ModelNotFoundError, match="new:1b"):
            find(serving, allow)
    assert ollama.bodies("/api/pull") == []
    assert find(open_serving("ollama"), True) == "new:1b"


def test_the_embedded_engine_finds_what_a_server_has(ollama: ScriptedOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    serving = EmbeddedServing()
    with pytest.raises(ModelNotFoundError, match="no model of that name here, nor on the Ollama server at http") as caught:
        serving.find("none:1b", root=tmp_path)
    assert "model.name takes" in caught.value.hint
    ollama.stop()
    with pytest.raises(ModelNotFoundError, match=r"no model of that name here$"):
        serving.find("small:1b", root=tmp_path)
    ollama.start()
    base = serving.find("small:1b", root=tmp_path)
    opened: list[Path] = []
    monkeypatch.setattr(llamacpp, "open_engine", lambda path, **_: opened.append(path) or FakeTokenizer())
    serving.serve(base)
    serving.serve(base, tmp_path / "tuned.gguf")
    assert opened == [base.path, tmp_path / "tuned.gguf"]
    assert (serving.manner(base), serving.served_apart(), serving.keep("v", base, tmp_path), serving.has("v", "")) == (
        None,
        False,
        None,
        False,
    )


def test_a_server_that_fails_while_it_is_asked(ollama: ScriptedOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.backends.ollama_wire.time.sleep", lambda _: None)
    ollama.fail("/api/show", *[says(500, "it went wrong")] * 3)
    with pytest.raises(EngineError, match="it went wrong"):
        EmbeddedServing().find("small:1b", root=tmp_path)


def test_the_embedded_engine_needs_nothing_of_ollama() -> None:
    code = "import sys; from pipeline.backends.serving import open_serving; open_serving('embedded'); print('ollama' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"

"""Which engine answers: llama.cpp in this process, or an Ollama server. Cheap to import; each is loaded on use."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pipeline.backends.base_model import resolve
from pipeline.errors import ModelNotFoundError
from pipeline.ports import BaseModel, Engine, EngineFactory, Kept, Progress, Serving, quiet


def open_serving(engine: Literal["embedded", "ollama", "auto"], *, pull: bool = True, patient: bool = True) -> Serving:
    """The serving that `model.engine` asks for; `auto` takes an Ollama server when a supported one answers. `patient`: a server that
    does not answer is waited for.

    Raises:
        EngineError: `ollama` is asked for and no supported server answers.
    """
    if engine == "embedded":
        return EmbeddedServing()
    from pipeline.backends.ollama_server import OllamaServer
    from pipeline.backends.ollama_serving import OllamaServing
    from pipeline.backends.ollama_wire import Patience

    patience = Patience() if patient else Patience(waits_s=(0.5, 1.0))
    server = OllamaServer(patience=patience) if engine == "ollama" else OllamaServer.if_there()
    return OllamaServing(server, pull=pull) if server else EmbeddedServing()


class EmbeddedServing:
    """Answers come from llama.cpp in this process (the port `Serving`)."""

    name = "embedded"
    facts: Mapping[str, Any] = {"engine": "embedded"}

    def find(
        self, name: str, *, root: Path = Path(), allow_download: bool = True, verify: bool = True, progress: Progress = quiet
    ) -> BaseModel:
        """Also what an Ollama server has under that name, when one answers; nothing is pulled."""
        try:
            return resolve(name, root=root, allow_download=allow_download)
        except ModelNotFoundError as error:
            from pipeline.backends.ollama_models import find, may_be_name
            from pipeline.backends.ollama_server import OllamaServer

            server = OllamaServer.if_there() if may_be_name(name) else None
            if server is None:
                raise error
            with server:
                if server.show(name) is None:
                    raise ModelNotFoundError(f"{error}, nor on the Ollama server at {server.address}", hint=error.hint) from None
                return find(server, name, verify=verify, progress=progress)

    def manner(self, base: BaseModel) -> str | None:
        return None

    def words(self, base: BaseModel) -> Mapping[str, Any] | None:
        return None

    def on_file(self, base: BaseModel) -> EngineFactory:
        from pipeline.backends.llamacpp import open_engine

        return open_engine

    def serve(self, base: BaseModel, model: Path | None = None) -> Engine:
        return self.on_file(base)(model or base.path)

    def served_apart(self) -> bool:
        return False

    def keep(self, name: str, base: BaseModel, model: Path | Mapping[str, Any], *, replace: bool = False) -> Kept | None:
        return None

    def has(self, name: str, digest: str) -> bool:
        return False

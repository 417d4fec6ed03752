"""The GGUF behind a name of an Ollama server."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from pipeline.backends.base_model import FoundModel, facts_of
from pipeline.backends.ollama_server import OllamaServer, Served
from pipeline.backends.ollama_wire import Refusal
from pipeline.errors import ArtifactError, ModelNotFoundError
from pipeline.ports import Progress, quiet
from pipeline.store import digest_file

OTHER = "choose a model that runs on this server and writes text, for example llama3.2:1b or smollm2:135m"
_NAME = re.compile(r"(?:(?:\w[\w.:-]{0,349}/)?\w[\w-]{0,79}/)?\w[\w.-]{0,79}(?::\w[\w.-]{0,79})?", re.ASCII)  # host/owner/model:tag
_CLOUD = re.compile(r":(?:.*-)?cloud", re.IGNORECASE)
_LICENSES = (
    (r"apache license\s+version 2\.0", "apache-2.0"),
    (r"\bmit license\b|permission is hereby granted, free of charge", "mit"),
    (r"llama 3\.3 community", "llama3.3"),
    (r"llama 3\.2 community", "llama3.2"),
    (r"llama 3\.1 community", "llama3.1"),
    (r"llama 3 community", "llama3"),
    (r"llama 2 community", "llama2"),
    (r"gemma terms of use", "gemma"),
)  # what the text says -> the Hub's id


@dataclass(frozen=True, slots=True)
class ServedModel(FoundModel):
    """A base model that the server has under its own name."""

    served: Served | None = None


def find(server: OllamaServer, name: str, *, allow_pull: bool = False, verify: bool = True, progress: Progress = quiet) -> ServedModel:
    """The GGUF that the server gives when asked for `name`, read from the server's own folder.

    Args:
        allow_pull: lets the server download the model when it has none of that name.
        verify: the file is read, and its SHA-256 compared with the one that names it.

    Raises:
        ModelNotFoundError: no such model; one of the cloud, without a GGUF, or without text; or its file can't be read from here.
        ArtifactError: the file is damaged, or is not what its name says. EngineError: the server fails.
    """
    if not may_be_name(name):
        raise ModelNotFoundError(f"{name[:200]!r}: not a name that Ollama allows", hint="names look like llama3.2:1b")
    if _CLOUD.search(name):
        raise _of_the_cloud(name, "in the cloud")
    try:
        served = server.show(name)
    except Refusal as refusal:
        if refusal.status != 403 or "cloud" not in refusal.said:  # so says a server whose cloud is switched off
            raise
        raise _of_the_cloud(name, "in the cloud") from refusal
    if served is None and allow_pull:
        server.pull(name, progress)
        served = server.show(name)
    if served is None:
        raise ModelNotFoundError(
            f"{name}: the Ollama server at {server.address} has no such model", hint=f"`ollama pull {name}`, or set model.pull: true"
        )
    if served.remote_host:
        raise _of_the_cloud(name, f"in the cloud at {served.remote_host}")
    if served.format != "gguf" or served.digest is None:
        what = f"has no GGUF (its format is {served.format or 'unknown'}: safetensors run in MLX)"
        raise ModelNotFoundError(f"{name}: {what}", hint="choose a model in GGUF format; most names of the library are")
    if served.capabilities and "completion" not in served.capabilities:
        raise ModelNotFoundError(f"{name}: writes no text, it can do: {', '.join(sorted(served.capabilities))}", hint=OTHER)
    path = _file_of(served, server)
    digest = digest_file(path) if verify else served.digest
    if digest != served.digest:
        raise ArtifactError(
            f"{path}: its content has another SHA-256 than its name says", hint=f"delete the file, then `ollama pull {name}`"
        )
    if served.has_adapter:
        raise ModelNotFoundError(
            f"{name}: is a GGUF with an adapter on top, and only the GGUF could be read", hint="name the model below it"
        )
    parts = "has an image part (a projector), which a merged file would lose" if served.has_projector else None
    return ServedModel(facts_of(name, path, license=_license(served.license), digest=digest), path, parts and f"{name} {parts}", served)


def _of_the_cloud(name: str, where: str) -> ModelNotFoundError:
    return ModelNotFoundError(f"{name}: runs {where}, so there is no file to train and records would leave", hint=OTHER)


def may_be_name(name: str) -> bool:
    """Whether Ollama could have a model of that name. What ends in .gguf, or names a file on the Hub, means a file."""
    return _NAME.fullmatch(name) is not None and not name.casefold().endswith(".gguf")


def _file_of(served: Served, server: OllamaServer) -> Path:
    digest, there = str(served.digest), Path(served.file or "")
    home = os.path.expanduser("~/.ollama/models")  # noqa: PTH111  Path's own raises for a user without a home
    folders = [os.environ.get("OLLAMA_MODELS"), home, "/usr/share/ollama/.ollama/models"]
    places = [*(Path(folder) / "blobs" / digest.replace(":", "-") for folder in folders if folder), there]
    for path in places:
        try:
            with path.open("rb"):
                return path
        except OSError:
            continue
    raise ModelNotFoundError(
        f"{served.name}: the server at {server.address} has it in {there.parent}, which can't be read from here",
        hint="mount the server's models folder read-only and set OLLAMA_MODELS to it (not its parent: that holds the server's private key)",
    )


def _license(text: str | None) -> str | None:
    return next((name for pattern, name in _LICENSES if re.search(pattern, " ".join((text or "").lower().split()))), None)

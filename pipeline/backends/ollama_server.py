"""One Ollama server: what it is asked and what it answers.

The ollama package carries what it has arguments for (pulling, uploading); the rest goes as plain JSON, since it knows neither
`truncate` and `shift` nor `_debug_render_only`, `renderer` and `parser`. API: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.backends.ollama_wire import NOT_OLLAMA, Broken, Patience, Refusal, Wire, by_package, json_body, no_error_in, object_in
from pipeline.errors import ArtifactError, EngineError, ModelNotFoundError
from pipeline.machine import OLDEST_OLLAMA, ollama_address, ollama_version
from pipeline.ports import Progress, quiet
from pipeline.records import Message, to_plain

REWRITING = ((0, 30, 0), (0, 34, 1))  # from the first on, and before the second, an uploaded GGUF is written anew under another digest
COUNTING_CACHED = (0, 30, 0)  # from here on prompt_eval_count includes the tokens that were in the cache

logger = logging.getLogger(__name__)
# said of a model whose list of layers was being written when the server died: made again, it is whole
_TORN = frozenset({"EOF", "unexpected EOF"})


@dataclass(frozen=True, slots=True)
class Served:
    """A model as the server has it (/api/show)."""

    name: str
    digest: str | None  # of its GGUF
    file: str | None  # where the server has that GGUF, as the server sees its disk
    template: str | None  # Go's; None where the GGUF's own template holds
    system: str | None
    parameters: Mapping[str, Any]
    license: str | None
    renderer: str | None
    parser: str | None
    messages: tuple[Mapping[str, str], ...]
    format: str  # "gguf", "safetensors"
    capabilities: frozenset[str]
    remote_host: str | None
    has_projector: bool
    has_adapter: bool  # a LoRA beside the GGUF, which servers before 0.34.1 took

    @property
    def manner(self) -> dict[str, Any]:
        """What the model brings to every chat: how it is put into words, where an answer stops."""
        told = ("template", "system", "messages", "renderer", "parser", "parameters")
        return {name: getattr(self, name) for name in told}


class OllamaServer:
    """A server that answers and is new enough. Safe to use from several threads.

    Args:
        address: as OLLAMA_HOST is written; None reads OLLAMA_HOST.

    Raises:
        EngineError: nothing answers there, or not Ollama, or a version older than 0.12.11; or the address is none.
    """

    def __init__(self, address: str | None = None, *, patience: Patience | None = None) -> None:
        self.address = ollama_address(os.environ.get("OLLAMA_HOST", "") if address is None else address)
        self.wire = Wire(self.address, patience or Patience())
        try:
            self.version_text, self.version = self._supported()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections; no request can follow."""
        self.wire.close()

    def __enter__(self) -> OllamaServer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @classmethod
    def if_there(cls, address: str | None = None) -> OllamaServer | None:
        """The server when a supported one answers at once, else None with the reason logged."""
        try:
            with cls(address, patience=Patience(waits_s=(), connect_s=2.0, answer_s=10.0)) as server:
                return cls(server.address)
        except EngineError as error:
            logger.info("no Ollama server is used: %s", error)
            return None

    def _supported(self) -> tuple[str, tuple[int, ...]]:
        try:
            text = self.wire.get("/api/version").get("version")
        except Refusal as refusal:
            raise EngineError(
                f"what answers at {self.address} is not an Ollama server (HTTP {refusal.status})", hint=NOT_OLLAMA
            ) from refusal
        version = ollama_version(text) if isinstance(text, str) else None
        oldest = ".".join(map(str, OLDEST_OLLAMA))
        hint = f"install Ollama {oldest} or later, or set model.engine: embedded"
        if version is None:
            raise EngineError(f"the server at {self.address} calls its version {str(text)[:40]!r}, which tells nothing", hint=hint)
        if version < OLDEST_OLLAMA:
            raise EngineError(f"Ollama {text} at {self.address} is too old: it gives no log-probabilities before {oldest}", hint=hint)
        return str(text), version

    @property
    def rewrites(self) -> bool:
        """Whether the server stores an uploaded GGUF under another digest than it was sent with."""
        return REWRITING[0] <= self.version < REWRITING[1]

    @property
    def counts_cached(self) -> bool:
        """Whether `prompt_eval_count` is the whole prompt, not only what was not in the cache."""
        return self.version >= COUNTING_CACHED

    # --- models ---

    def show(self, model: str) -> Served | None:
        """The model, or None when the server has none of that name."""
        try:
            told = self.wire.post("/api/show", {"model": model})
        except Refusal as refusal:
            if refusal.status == 404 or "invalid model name" in refusal.said or refusal.said in _TORN:
                return None
            raise
        details, modelfile = told.get("details") or {}, str(told.get("modelfile") or "")
        blobs = re.findall(r'^FROM "?(.*sha256-([0-9a-f]{64}))"?\s*$', modelfile, re.MULTILINE)
        return Served(
            name=model,
            digest=f"sha256:{blobs[0][1]}" if blobs else None,
            file=blobs[0][0] if blobs else None,
            template=go_template(str(told.get("template") or "")),
            system=told.get("system") or None,
            parameters=parameters_of(str(told.get("parameters") or "")),
            license=told.get("license") or None,
            renderer=told.get("renderer") or None,
            parser=told.get("parser") or None,
            messages=tuple({"role": m.get("role", ""), "content": m.get("content", "")} for m in told.get("messages") or ()),
            format=str(details.get("format") or ""),
            capabilities=frozenset(told.get("capabilities") or ()),
            remote_host=told.get("remote_host") or None,
            has_projector=bool(told.get("projector_info")) or len(blobs) > 1,
            has_adapter=re.search(r'^ADAPTER "?.*sha256-[0-9a-f]{64}"?\s*$', modelfile, re.MULTILINE) is not None,
        )

    def pull(self, model: str, progress: Progress = quiet) -> None:
        """Lets the server download a model; what arrived before a break is kept by it.

        Raises:
            ModelNotFoundError: the registry has no such model. EngineError: the server or its network fails.
        """

        def work() -> None:
            status: str | None = ""
            for part in self.wire.package.pull(model, stream=True):
                status = part.status
                progress("pull", (part.completed or 0) >> 20, (part.total or 0) >> 20, f"{model}, MiB: {status or ''}"[:80])
            if status != "success":
                raise Broken("the server ended a download halfway")

        try:
            self.wire.patiently(lambda: by_package(work))
        except Refusal as refusal:
            if "not exist" in refusal.said or "not found" in refusal.said or refusal.status == 404:
                raise ModelNotFoundError(f"{model}: the registry has no such model", hint="see https://ollama.com/library") from refusal
            raise EngineError(
                f"{model}: the server could not pull it: {refusal.said}",
                hint="check the server's network and run again; what arrived is kept",
            ) from refusal

    def _upload(self, path: Path, digest: str) -> None:
        """Gives the server a file unless it has it."""
        if self.wire.http.head(f"/api/blobs/{digest}").status_code == 200:
            return
        try:
            sent = by_package(lambda: self.wire.package.create_blob(path))
        except ConnectionError:
            raise  # the package's word for a server that is not there
        except OSError as error:
            raise ArtifactError(f"{path}: can't be read: {error.strerror}", hint="run the stage that makes it again") from error
        if sent != digest:
            raise EngineError(f"{path}: changed while it was sent to Ollama", hint="run again")

    def create(self, body: Mapping[str, Any], uploads: Mapping[str, Path] | None = None) -> None:
        """POST /api/create, to its last line. `uploads`: digest -> file that the server must have. They are looked for at each try, since
        a server that starts anew clears away files of which no model was made yet."""

        def work() -> None:
            for digest, path in (uploads or {}).items():
                self._upload(path, digest)
            last: Mapping[str, Any] = {}
            with self.wire.http.stream("POST", "/api/create", **json_body({**body, "stream": True})) as reply:
                if reply.status_code != 200:
                    reply.read()
                    self.wire.read(reply)
                for line in reply.iter_lines():
                    last = object_in(line) if line.strip() else last
                    no_error_in(last)
            if last.get("status") != "success":
                raise Broken("the server ended a creation halfway")

        self.wire.patiently(work)

    def copy(self, source: str, target: str) -> None:
        self.wire.patiently(lambda: by_package(lambda: self.wire.package.copy(source, target)))

    def delete(self, model: str) -> None:
        """Deletes a model; nothing when there is none."""
        try:
            self.wire.patiently(lambda: by_package(lambda: self.wire.package.delete(model)))
        except Refusal as refusal:
            if refusal.status != 404:
                raise

    def loaded(self) -> list[Mapping[str, Any]]:
        """The models in the server's memory (/api/ps)."""
        return [model for model in self.wire.get("/api/ps").get("models") or () if isinstance(model, dict)]

    def unload(self, model: str) -> None:
        """Frees the server's memory of a model. Asked once: a server that is not there has nothing in its memory."""
        body = json_body({"model": model, "messages": [], "keep_alive": 0})
        try:
            self.wire.patiently(lambda: self.wire.read(self.wire.http.post("/api/chat", **body)), waits_s=())
        except EngineError as error:
            logger.info("%s stays in the server's memory: %s", model, error)

    # --- answers ---

    def chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /api/chat: the whole answer in one object.

        Raises:
            Refusal: the server says no to this request. EngineError: it can't be reached, lost the model, or answers nothing that can be
            read.
        """
        return self._answer("/api/chat", body)

    def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """POST /api/generate, the same way."""
        return self._answer("/api/generate", body)

    def _answer(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        try:
            return self.wire.post(path, {**body, "stream": False})
        except Refusal as refusal:
            if refusal.status == 404:
                raise gone(str(body["model"])) from refusal
            raise

    def render(self, model: str, messages: Sequence[Message], options: Mapping[str, Any], keep_alive: str) -> str | None:
        """The prompt that the model would read, or None where the server can't tell. Loads the model, as an answer would."""
        asked = {"model": model, "messages": to_plain(messages), "options": dict(options), "keep_alive": keep_alive}
        body = {**asked, "think": False, "_debug_render_only": True, **UNCUT}
        told = self.chat(body).get("_debug_info")
        text = told.get("rendered_template") if isinstance(told, dict) else None
        return text if isinstance(text, str) else None


UNCUT = {"truncate": False, "shift": False}  # a prompt that is too long is refused, never shortened


def go_template(text: str) -> str | None:
    """A template of the server's own: where it has none, /api/show gives the GGUF's Jinja or a stand-in."""
    return None if "{%" in text or text.strip() in ("", "{{ .Prompt }}") else text


def parameters_of(text: str) -> dict[str, Any]:
    """The parameters as /api/show writes them: a line `name   value` each, a name repeated for a list, text quoted."""
    found: dict[str, Any] = {}
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if not rest.strip():
            continue
        try:
            value = json.loads(rest.strip())
        except ValueError:
            value = rest.strip().strip('"')
        if name in found or name == "stop":
            found.setdefault(name, [])
            found[name] = [*(found[name] if isinstance(found[name], list) else [found[name]]), value]
        else:
            found[name] = value
    return found


def gone(model: str) -> EngineError:
    return EngineError(f"{model}: was deleted from the Ollama server meanwhile", hint="run again: it is made anew, and goes on from here")

"""One Ollama server over HTTP, asked with patience: what it is asked, what it answers, and what is tried again.

The ollama package carries what it has arguments for (pulling, uploading); the rest goes as plain JSON, since it knows neither
`truncate` and `shift` nor `_debug_render_only`, `renderer` and `parser`. API: https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import ollama

from pipeline.errors import ArtifactError, EngineError, ModelNotFoundError
from pipeline.machine import OLDEST_OLLAMA, ollama_address, ollama_version
from pipeline.ports import Progress, quiet
from pipeline.records import Message, to_plain

REWRITING = ((0, 30, 0), (0, 34, 1))  # from the first on, and before the second, an uploaded GGUF is written anew under another digest
COUNTING_CACHED = (0, 30, 0)  # from here on prompt_eval_count includes the tokens that were in the cache
START = "start it with `ollama serve` (`docker compose up` does), set OLLAMA_HOST, or set model.engine: embedded"
LOG = "see the server's log, then run again: it goes on from here"
NOT_OLLAMA = "check OLLAMA_HOST; where a proxy stands between, name the server in NO_PROXY"
NO_ROOM = "free some space where the server keeps its models (the volume of the sidecar), then run again"

logger = logging.getLogger(__name__)
_Out = TypeVar("_Out")
_TORN = frozenset(
    {"EOF", "unexpected EOF"}
)  # of a model whose list of layers was being written when the server died: made again, it is whole
_FOR_GOOD = ("no space left", "token repeat limit", "file does not exist")  # said with a status, or at a time, that tells nothing
_AGAIN = frozenset({429, 502, 503, 504})  # busy, or a proxy whose server is not up yet


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a server is waited for. `waits_s`: seconds before each further try, give or take a quarter."""

    waits_s: tuple[float, ...] = (0.5, 1, 2, 4, 8, 15, 30, 30, 30)  # two minutes: a restart, and the model loaded anew
    connect_s: float = 10.0
    answer_s: float = 600.0  # without a byte
    tries_when_silent: int = 2  # a silent server is asked so often
    tries_when_broken: int = 3  # so is one that fails (500) or answers what can't be read


class Refusal(EngineError):
    """The server's own no, with its HTTP status (200: in the midst of an answer) and its words. Asking again would give the same."""

    def __init__(self, status: int, said: str, *, hint: str = "") -> None:
        what = "refused the request" if 400 <= status < 500 else "failed"
        super().__init__(f"Ollama {what}{f' (HTTP {status})' if status >= 400 else ''}: {said}", hint=hint)
        self.status, self.said = status, said


class _Broken(Exception):
    """An answer that can't be used; another try may do better. `status` is None where no JSON came."""

    def __init__(self, words: str, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status


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
        """What decides how a chat is put into words for the model."""
        told = ("template", "system", "messages", "renderer", "parser")
        return {name: getattr(self, name) for name in told}


class OllamaServer:
    """A server that answers and is new enough. Safe to use from several threads.

    Args:
        address: as OLLAMA_HOST is written; None reads OLLAMA_HOST.

    Raises:
        EngineError: nothing answers there, or not Ollama, or a version older than 0.12.11; or the address is none.
    """

    def __init__(self, address: str | None = None, *, patience: Patience = Patience()) -> None:
        self.address = ollama_address(os.environ.get("OLLAMA_HOST", "") if address is None else address)
        self.patience = patience
        # a proxy for the wide world knows neither this machine nor a container's name
        try:
            host = urlsplit(self.address).hostname or ""
            beside = "." not in host or host.startswith("127.")
            settings: Any = {"timeout": httpx.Timeout(patience.answer_s, connect=patience.connect_s), "trust_env": not beside}
            self._http = httpx.Client(base_url=self.address, **settings)
            self._ollama = ollama.Client(self.address, **settings)
        except (ValueError, httpx.InvalidURL) as error:
            raise EngineError(f"{self.address[:200]!r} is no address of a server: {error}", hint="set OLLAMA_HOST to HOST:PORT") from error
        try:
            self.version_text, self.version = self._supported()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Closes the connections; no request can follow."""
        self._http.close()
        self._ollama.close()  # type: ignore[no-untyped-call]

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
            text = self._get("/api/version").get("version")
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
            told = self._post("/api/show", {"model": model})
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
            for part in self._ollama.pull(model, stream=True):
                status = part.status
                progress("pull", (part.completed or 0) >> 20, (part.total or 0) >> 20, f"{model}, MiB: {status or ''}"[:80])
            if status != "success":
                raise _Broken("the server ended a download halfway")

        try:
            self._patiently(lambda: _by_package(work))
        except Refusal as refusal:
            if "not exist" in refusal.said or "not found" in refusal.said or refusal.status == 404:
                raise ModelNotFoundError(f"{model}: the registry has no such model", hint="see https://ollama.com/library") from refusal
            raise EngineError(
                f"{model}: the server could not pull it: {refusal.said}",
                hint="check the server's network and run again; what arrived is kept",
            ) from refusal

    def _upload(self, path: Path, digest: str) -> None:
        """Gives the server a file unless it has it."""
        if self._http.head(f"/api/blobs/{digest}").status_code == 200:
            return
        try:
            sent = _by_package(lambda: self._ollama.create_blob(path))
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
            with self._http.stream("POST", "/api/create", **_json({**body, "stream": True})) as reply:
                if reply.status_code != 200:
                    reply.read()
                    self._read(reply)
                for line in reply.iter_lines():
                    last = _object(line) if line.strip() else last
                    _no_error_in(last)
            if last.get("status") != "success":
                raise _Broken("the server ended a creation halfway")

        self._patiently(work)

    def copy(self, source: str, target: str) -> None:
        self._patiently(lambda: _by_package(lambda: self._ollama.copy(source, target)))

    def delete(self, model: str) -> None:
        """Deletes a model; nothing when there is none."""
        try:
            self._patiently(lambda: _by_package(lambda: self._ollama.delete(model)))
        except Refusal as refusal:
            if refusal.status != 404:
                raise

    def loaded(self) -> list[Mapping[str, Any]]:
        """The models in the server's memory (/api/ps)."""
        return [model for model in self._get("/api/ps").get("models") or () if isinstance(model, dict)]

    def unload(self, model: str) -> None:
        """Frees the server's memory of a model. Asked once: a server that is not there has nothing in its memory."""
        try:
            self._patiently(
                lambda: self._read(self._http.post("/api/chat", **_json({"model": model, "messages": [], "keep_alive": 0}))), waits_s=()
            )
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
            return self._post(path, {**body, "stream": False})
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

    # --- the wire ---

    def _get(self, path: str) -> dict[str, Any]:
        return self._patiently(lambda: self._read(self._http.get(path)))

    def _post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self._patiently(lambda: self._read(self._http.post(path, **_json(body))))

    def _read(self, reply: httpx.Response) -> dict[str, Any]:
        if reply.status_code in _AGAIN:
            raise _Broken(f"HTTP {reply.status_code}", reply.status_code)
        try:
            told = _object(reply.text)
        except _Broken:
            if reply.is_client_error:
                raise Refusal(reply.status_code, "no reason given", hint=NOT_OLLAMA) from None
            raise
        _no_error_in(told, reply.status_code)
        if not reply.is_success:
            raise _Broken(f"HTTP {reply.status_code}")
        return told

    def _patiently(self, work: Callable[[], _Out], *, waits_s: tuple[float, ...] | None = None) -> _Out:
        """What `work` gives, tried again as long as its failure may pass.

        Raises:
            Refusal, EngineError
        """
        silent = broken = 0
        for wait in (*(self.patience.waits_s if waits_s is None else waits_s), None):
            try:
                return work()
            except Refusal as refusal:
                raise self._no_room(refusal) if "no space left" in refusal.said else refusal from None
            except httpx.TimeoutException as error:
                failure: Exception = error
                silent += not isinstance(error, httpx.ConnectTimeout)
            except (httpx.RequestError, ConnectionError, _Broken) as error:
                failure = error
                away = isinstance(error, httpx.TransportError | ConnectionError)
                broken += not away and not (isinstance(error, _Broken) and error.status in _AGAIN)
            if wait is None or silent >= self.patience.tries_when_silent or broken >= self.patience.tries_when_broken:
                raise self._given_up(failure) from failure
            logger.info("Ollama at %s: %s; asking again in %.1f s", self.address, _words(failure), wait)
            time.sleep(wait * random.uniform(0.75, 1.25))  # parallel rows spread
        raise AssertionError("the last wait is None")

    def _no_room(self, refusal: Refusal) -> EngineError:
        return EngineError(f"the disk of the Ollama server at {self.address} is full: {refusal.said}", hint=NO_ROOM)

    def _given_up(self, failure: Exception) -> EngineError:
        if isinstance(failure, httpx.ConnectError | httpx.ConnectTimeout | ConnectionError):
            return EngineError(f"no Ollama server answers at {self.address}", hint=START)
        if isinstance(failure, httpx.TimeoutException):
            return EngineError(
                f"Ollama at {self.address} gave no answer in {self.patience.answer_s:.0f} s",
                hint="is another job using it? A smaller model or fewer parallel slots answer sooner; run again: it goes on from here",
            )
        if isinstance(failure, httpx.TransportError):
            return EngineError(f"Ollama at {self.address} broke off: {_words(failure)}", hint=LOG)
        if isinstance(failure, _Broken) and failure.status in _AGAIN:
            return EngineError(
                f"Ollama at {self.address} stays busy or out of reach ({failure})", hint="see the server's log, then run again"
            )
        if isinstance(failure, _Broken) and failure.status is not None:
            return Refusal(failure.status, str(failure), hint="see the server's log; out of memory is the commonest cause")
        return EngineError(
            f"what answers at {self.address} is not an Ollama server, or a broken one: {_words(failure)}",
            hint=NOT_OLLAMA,
        )


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


def _json(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request's body. In ASCII: a text may hold half a character, which UTF-8 can't carry and JSON's escapes can."""
    return {"content": json.dumps(dict(body)).encode("ascii"), "headers": {"Content-Type": "application/json"}}


def _by_package(call: Callable[[], _Out]) -> _Out:
    """What a call of the ollama package gives.

    Raises:
        Refusal, _Broken: as `_no_error_in`. What is no JSON object makes the package fail in ways of its own.
    """
    try:
        return call()
    except ollama.ResponseError as error:
        said = "an HTML page" if str(error.error).lstrip().startswith("<") else error.error
        if error.status_code in _AGAIN:
            raise _Broken(f"HTTP {error.status_code}", error.status_code) from None
        _no_error_in({"error": said}, max(error.status_code, 200))  # the package has -1 where the error came in the midst of an answer
        raise _Broken("an error without words") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise _Broken("an answer that is no JSON object") from error


def _object(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        shown = " ".join(text.split())[:60]
        raise _Broken(
            "an HTML page" if shown.lower().startswith(("<!doctype", "<html")) else f"{len(text)} characters that are no JSON"
        ) from None
    if not isinstance(told, dict):
        raise _Broken(f"a JSON {type(told).__name__} instead of an object")
    return told


def _no_error_in(told: Mapping[str, Any], status: int = 200) -> None:
    """
    Raises:
        Refusal: an error of the request's own making. _Broken: one that may pass.
    """
    said = told.get("error")
    if said is None and status < 400:
        return
    words = _said(said)
    inner = told["status"] if isinstance(told.get("status"), int) else status
    if any(known in words for known in _FOR_GOOD) or 400 <= inner < 500:
        raise Refusal(inner, words)
    raise _Broken(words, 503 if "server busy" in words else inner)


def _said(error: Any) -> str:
    """The words of an error: a text, an object with `message`, or such an object written into a text, as llama.cpp's are."""
    if isinstance(error, str) and error.startswith("{"):
        with contextlib.suppress(ValueError, RecursionError):
            error = json.loads(error)
    while isinstance(error, dict):
        error = error.get("error") or error.get("message")
    return " ".join(str(error or "no reason given").split())[:500]


def _words(failure: Exception) -> str:
    return f"{type(failure).__name__}" if isinstance(failure, httpx.HTTPError) and not str(failure) else str(failure)

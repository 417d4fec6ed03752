"""Requests to an Ollama server, sent with patience: which failures pass, which are final, and what is said of each."""

from __future__ import annotations

import contextlib
import json
import logging
import random
import ssl
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar
from urllib.parse import urlsplit

import httpx
import ollama

from pipeline.errors import EngineError

START = "start it with `ollama serve` (`docker compose up` does), set OLLAMA_HOST, or set model.engine: embedded"
LOG = "see the server's log, then run again: it goes on from here"
NOT_OLLAMA = "check OLLAMA_HOST: another program, or a proxy in front of the server, answers there"
NO_ROOM = "free some space where the server keeps its models (the volume of the sidecar), then run again"

SHOWN_WAIT_S = 4.0  # longer waits are told

logger = logging.getLogger(__name__)
_Out = TypeVar("_Out")
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


class Broken(Exception):
    """An answer that can't be used; another try may do better. `status` is None where no JSON came."""

    def __init__(self, words: str, status: int | None = None) -> None:
        super().__init__(words)
        self.status = status


class Wire:
    """The connections to one address. `http` carries plain JSON, `package` what the ollama package has arguments for.

    Raises:
        EngineError: the address is none.
    """

    def __init__(self, address: str, patience: Patience) -> None:
        self.address, self.patience = address, patience
        try:
            parts = urlsplit(address)
            if parts.port is None:
                raise ValueError("no port")
            # never through a proxy of the environment: it would read the records, and knows no container by its name
            settings: Any = {"timeout": httpx.Timeout(patience.answer_s, connect=patience.connect_s), "trust_env": False}
            if parts.scheme == "https":
                settings["verify"] = ssl.create_default_context()
            self.http = httpx.Client(base_url=address, **settings)
            self.package = ollama.Client(address, **settings)
        except (ValueError, httpx.InvalidURL) as error:
            raise EngineError(f"{address[:200]!r} is no address of a server: {error}", hint="set OLLAMA_HOST to HOST:PORT") from error

    def close(self) -> None:
        """Closes the connections; no request can follow."""
        self.http.close()
        self.package.close()  # type: ignore[no-untyped-call]

    def get(self, path: str) -> dict[str, Any]:
        return self.patiently(lambda: self.read(self.http.get(path)))

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        return self.patiently(lambda: self.read(self.http.post(path, **json_body(body))))

    def read(self, reply: httpx.Response) -> dict[str, Any]:
        if reply.status_code in _AGAIN:
            raise Broken(f"HTTP {reply.status_code}", reply.status_code)
        try:
            told = object_in(reply.text)
        except Broken:
            if reply.is_client_error:
                raise Refusal(reply.status_code, "no reason given", hint=NOT_OLLAMA) from None
            raise
        no_error_in(told, reply.status_code)
        if not reply.is_success:
            raise Broken(f"HTTP {reply.status_code}")
        return told

    def patiently(self, work: Callable[[], _Out], *, waits_s: tuple[float, ...] | None = None) -> _Out:
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
            except (httpx.RequestError, ConnectionError, Broken) as error:
                failure = error
                away = isinstance(error, httpx.TransportError | ConnectionError)
                broken += not away and not (isinstance(error, Broken) and error.status in _AGAIN)
            if wait is None or silent >= self.patience.tries_when_silent or broken >= self.patience.tries_when_broken:
                raise self._given_up(failure) from failure
            logger.log(
                logging.WARNING if wait >= SHOWN_WAIT_S else logging.INFO,
                "Ollama at %s: %s; asking again in %.0f s", self.address, _words(failure), wait,
            )  # fmt: skip
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
        if isinstance(failure, Broken) and failure.status in _AGAIN:
            return EngineError(
                f"Ollama at {self.address} stays busy or out of reach ({failure})", hint="see the server's log, then run again"
            )
        if isinstance(failure, Broken) and failure.status is not None:
            return Refusal(failure.status, str(failure), hint="see the server's log; out of memory is the commonest cause")
        return EngineError(
            f"what answers at {self.address} is not an Ollama server, or a broken one: {_words(failure)}",
            hint=NOT_OLLAMA,
        )


def json_body(body: Mapping[str, Any]) -> dict[str, Any]:
    """A request's body. In ASCII: a text may hold half a character, which UTF-8 can't carry and JSON's escapes can."""
    return {"content": json.dumps(dict(body)).encode("ascii"), "headers": {"Content-Type": "application/json"}}


def by_package(call: Callable[[], _Out]) -> _Out:
    """What a call of the ollama package gives.

    Raises:
        Refusal, Broken: as `no_error_in`. What is no JSON object makes the package fail in ways of its own.
    """
    try:
        return call()
    except ollama.ResponseError as error:
        said = "an HTML page" if str(error.error).lstrip().startswith("<") else error.error
        if error.status_code in _AGAIN:
            raise Broken(f"HTTP {error.status_code}", error.status_code) from None
        no_error_in({"error": said}, max(error.status_code, 200))  # the package has -1 where the error came in the midst of an answer
        raise Broken("an error without words") from error
    except (AttributeError, TypeError, ValueError) as error:
        raise Broken("an answer that is no JSON object") from error


def object_in(text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
    except (ValueError, RecursionError):
        shown = " ".join(text.split())[:60]
        raise Broken(
            "an HTML page" if shown.lower().startswith(("<!doctype", "<html")) else f"{len(text)} characters that are no JSON"
        ) from None
    if not isinstance(told, dict):
        raise Broken(f"a JSON {type(told).__name__} instead of an object")
    return told


def no_error_in(told: Mapping[str, Any], status: int = 200) -> None:
    """
    Raises:
        Refusal: an error of the request's own making. Broken: one that may pass.
    """
    said = told.get("error")
    if said is None and status < 400:
        return
    words = _said(said)
    inner = told["status"] if isinstance(told.get("status"), int) else status
    if any(known in words for known in _FOR_GOOD) or 400 <= inner < 500:
        raise Refusal(inner, words)
    raise Broken(words, 503 if "server busy" in words else inner)


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

"""A double of an Ollama server on loopback: its wire as seen on 0.34.2, answers that follow from the prompt's text, and faults on demand.

Tokens are characters, as in `FakeTokenizer`, and chats are put into words the way its `render` does.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from pipeline.prompts import ANSWER_OPENING, RATIONALE_OPENING, answer_text

DETECTED = "{{- range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}<assistant>"  # the template that a GGUF without one is given
BUSY = "server busy, please try again.  maximum pending requests exceeded"
PAGE = "<!DOCTYPE html><html><head><title>Gateway</title></head><body>Sign in to go on</body></html>"
Fault = Callable[["_Handler"], None]  # answers a request in the server's place


@dataclass
class Model:
    """A model as the server has it. `digest` None: no GGUF."""

    digest: str | None
    template: str = DETECTED
    system: str = ""
    parameters: dict[str, Any] = field(default_factory=dict)
    license: str = ""
    renderer: str = ""
    parser: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    format: str = "gguf"
    capabilities: tuple[str, ...] = ("completion",)
    remote_host: str = ""
    projector: str | None = None
    adapter: str | None = None


# --- faults ----------------------------------------------------------------------------------------------------------


def says(status: int, error: object) -> Fault:
    """An error as the server words it."""
    return lambda handler: handler.send(status, {"error": error})


def plain(status: int, text: str, kind: str = "application/json") -> Fault:
    return lambda handler: handler.send_text(status, text, kind)


def page(status: int) -> Fault:
    """A proxy's page in the server's place."""
    return plain(status, PAGE, "text/html")


def lines(*objects: Mapping[str, Any], rest: str = "") -> Fault:
    """A stream with status 200 and these lines."""
    return plain(200, "".join(json.dumps(line) + "\n" for line in objects) + rest, "application/x-ndjson")


def drops(handler: _Handler) -> None:
    """Half an answer, then nothing."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"half": ')
    handler.close_connection = True


def hangs(seconds: float) -> Fault:
    def hang(handler: _Handler) -> None:
        time.sleep(seconds)
        handler.close_connection = True

    return hang


# --- the server ------------------------------------------------------------------------------------------------------


class ScriptedOllama:
    """Runs from the first line of a `with` to its last. `asked` holds every request: (path, body), the body of a blob as {}.

    Args:
        folder: where its models lie.
        labels: the ratings that its answers choose from.
        most_context: tokens that it has room for.
        tells_prompts: whether it knows `_debug_render_only`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        version: object = "0.34.2",
        labels: tuple[str, ...] = ("No", "Not sure", "Yes"),
        most_context: int = 1 << 20,
        tells_prompts: bool = True,
    ) -> None:
        self.folder, self.version, self.labels = folder, version, labels
        self.most_context, self.tells_prompts = most_context, tells_prompts
        self.models: dict[str, Model] = {}
        self.registry: dict[str, Model] = {}  # what can be pulled
        self.loaded: dict[str, int] = {}  # model -> context
        self.loads = 0
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.amend: Callable[[dict[str, Any]], Any] = lambda reply: reply  # the last word on an answer to a row
        self.write: Callable[[str], str] | None = None  # prompt -> answer, instead of a well-formed one
        self._faults: dict[str, list[Fault]] = {}
        self._lock = threading.Lock()
        self._http: ThreadingHTTPServer | None = None
        self._open: set[socket.socket] = set()
        (folder / "blobs").mkdir(parents=True)
        self.start()

    @property
    def rewrites(self) -> bool:
        return "0.30" <= str(self.version) < "0.34.1"

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def fail(self, path: str, *faults: Fault) -> None:
        """The next requests of that path meet these, one each."""
        self._faults.setdefault(path, []).extend(faults)

    def bodies(self, path: str) -> list[dict[str, Any]]:
        return [body for asked, body in self.asked if asked == path]

    def rows(self) -> list[dict[str, Any]]:
        """The chats that were asked for an answer: neither loaded, nor unloaded, nor only rendered."""
        return [body for body in self.bodies("/api/chat") if body["messages"] and not body.get("_debug_render_only")]

    def add_blob(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blob(digest).write_bytes(data)
        return digest

    def blob(self, digest: str) -> Path:
        return self.folder / "blobs" / digest.replace(":", "-")

    def stop(self) -> None:
        """Gone at once, as after SIGKILL; its port refuses."""
        if self._http is None:
            return
        self._http.shutdown()
        self._http.server_close()
        self._http = None
        self.loaded.clear()
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def start(self) -> None:
        port = getattr(self, "port", 0)
        self._http = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
        self._http.daemon_threads, self._http.ollama = True, self  # type: ignore[attr-defined]
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def restart(self, after_s: float) -> threading.Timer:
        self.stop()
        timer = threading.Timer(after_s, self.start)
        timer.start()
        return timer

    def __enter__(self) -> ScriptedOllama:
        return self

    def __exit__(self, *exc: object) -> None:
        self.stop()
        for _ in range(200):  # the handlers' threads close their sockets
            if not self._open:
                break
            time.sleep(0.01)

    # --- what it answers ---

    def fault(self, path: str) -> Fault | None:
        with self._lock:
            waiting = self._faults.get("/api/blobs" if path.startswith("/api/blobs") else path) or []
            return waiting.pop(0) if waiting else None

    def shares(self, prompt: str) -> dict[str, float]:
        """Label -> probability after a prompt."""
        weights = {label: 1 + hashlib.sha256((prompt + label).encode("utf-8", "surrogatepass")).digest()[0] / 64 for label in self.labels}
        return {label: weight / sum(weights.values()) for label, weight in weights.items()}

    def render(self, model: Model, messages: list[dict[str, str]]) -> str:
        chat = [*model.messages, *messages]
        if model.system and messages[0]["role"] != "system":
            chat = [{"role": "system", "content": model.system}, *chat]
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat) + "<assistant>"

    def likely(self, prompt: str, said: str, chosen: str | None, n: int) -> list[dict[str, Any]]:
        """The likeliest characters after a prompt and what was said."""
        found: dict[str, float] = {}
        for label, share in self.shares(prompt).items():
            text = ANSWER_OPENING + label + RATIONALE_OPENING
            if text.startswith(said) and len(text) > len(said):
                found[text[len(said)]] = found.get(text[len(said)], 0.0) + 0.99 * share
        if chosen is not None:
            found.setdefault(chosen, 0.9)
        rare = [chr(0x2800 + at) for at in range(n)]
        found |= {character: 1e-5 for character in rare[: max(n - len(found), 0)]}
        best = sorted(found.items(), key=lambda item: -item[1])[:n]
        return [{"token": token, "logprob": math.log(share), "bytes": list(token.encode())} for token, share in best]

    def steps(self, prompt: str, text: str, body: Mapping[str, Any]) -> list[dict[str, Any]]:
        n = int(body.get("top_logprobs") or 0)
        return [
            {"token": token, "logprob": -0.1, "top_logprobs": self.likely(prompt, text[:at], token, n)} for at, token in enumerate(text)
        ]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: two would wait for one another

    @property
    def ollama(self) -> ScriptedOllama:
        return self.server.ollama  # type: ignore[attr-defined,no-any-return]

    def log_message(self, *_: object) -> None:
        pass

    def setup(self) -> None:
        super().setup()
        self.ollama._open.add(self.connection)

    def finish(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            super().finish()
        self.ollama._open.discard(self.connection)

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            super().handle()

    def send(self, status: int, answer: object) -> None:
        self.send_text(status, json.dumps(answer))

    def send_text(self, status: int, text: str, kind: str = "application/json") -> None:
        data = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self._serve()

    do_POST = do_DELETE = do_HEAD = do_GET

    def _serve(self) -> None:
        data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        blob = self.path.startswith("/api/blobs/")
        body = json.loads(data) if data and not blob else {}
        with self.ollama._lock:
            self.ollama.asked.append((f"{self.command} /api/blobs" if blob else self.path, body))
        if (fault := self.ollama.fault(self.path)) is not None:
            fault(self)
            return
        if blob:
            self._blob(self.path.rpartition("/")[2], data)
            return
        work: Callable[[dict[str, Any]], None] = getattr(self, "_" + self.path.rpartition("/")[2])
        with contextlib.suppress(_Answered):
            work(body)

    # --- models ---

    def _version(self, body: dict[str, Any]) -> None:
        self.send(200, {"version": self.ollama.version})

    def _tags(self, body: dict[str, Any]) -> None:
        self.send(200, {"models": [{"name": name, "model": name} for name in self.ollama.models]})

    def _ps(self, body: dict[str, Any]) -> None:
        self.send(200, {"models": [{"name": name, "context_length": context} for name, context in self.ollama.loaded.items()]})

    def _found(self, asked: str) -> tuple[str, Model]:
        name = full(asked)
        if not asked or not re.fullmatch(r"(\w[\w.:-]*/)?(\w[\w-]*/)?\w[\w.-]{0,79}:\w[\w.-]{0,79}", name):
            self.send(400, {"error": "invalid model name" if asked else "model is required"})
            raise _Answered
        if name not in self.ollama.models:
            self.send(404, {"error": f"model '{asked}' not found"})
            raise _Answered
        return name, self.ollama.models[name]

    def _show(self, body: dict[str, Any]) -> None:
        name, model = self._found(body["model"])
        blobs = self.ollama.folder / "blobs"
        layers = [f"FROM {blobs / digest.replace(':', '-')}" for digest in (model.digest, model.projector) if digest]
        layers += [f"ADAPTER {blobs / model.adapter.replace(':', '-')}"] if model.adapter else []
        told: dict[str, Any] = {
            "modelfile": '# Modelfile generated by "ollama show"\n# FROM '
            + name
            + "\n\n"
            + "\n".join(layers)
            + f'\nTEMPLATE "{model.template}"\n',
            "parameters": "\n".join(
                f"{key:<30} {json.dumps(value)}" for key, values in model.parameters.items() for value in listed(values)
            ),
            "template": model.template,
            "system": model.system,
            "license": model.license,
            "details": {"format": model.format, "family": "llama"},
            "messages": list(model.messages),
            "capabilities": list(model.capabilities),
            "renderer": model.renderer,
            "parser": model.parser,
            "remote_host": model.remote_host,
            "model_info": {},
            "projector_info": {"clip.has_vision_encoder": True} if model.projector else None,
        }
        self.send(200, {key: value for key, value in told.items() if value or key == "model_info"})  # Go's omitempty

    def _blob(self, digest: str, data: bytes) -> None:
        path = self.ollama.blob(digest)
        if self.command == "HEAD":
            self.send(200 if path.exists() else 404, {})
        elif digest != "sha256:" + hashlib.sha256(data).hexdigest():
            self.send(400, {"error": f'digest mismatch, expected "{digest}"'})
        else:
            path.write_bytes(data)
            self.send(201, {})

    def _create(self, body: dict[str, Any]) -> None:
        if body.get("adapters"):
            self.send(400, {"error": "LoRA adapters are no longer supported"})
            return
        if "from" in body:
            base = self.ollama.models.get(full(body["from"]))
            if base is None:
                lines({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"})(self)
                return
            model = replace(base, parameters=base.parameters | body.get("parameters", {}))
        else:
            [digest] = body["files"].values()
            if not self.ollama.blob(digest).exists():
                lines({"status": "parsing GGUF"}, {"error": f"open {self.ollama.blob(digest)}: no such file or directory"})(self)
                return
            if self.ollama.rewrites:
                digest = self.ollama.add_blob(self.ollama.blob(digest).read_bytes() + b"rewritten")
            model = Model(digest, parameters=body.get("parameters", {}))
        given = {key: body[key] for key in ("template", "system", "license", "renderer", "parser") if body.get(key)}
        if body.get("messages"):
            given["messages"] = tuple(body["messages"])
        self.ollama.models[full(body["model"])] = replace(model, **given)
        lines({"status": "parsing GGUF"}, {"status": "writing manifest"}, {"status": "success"})(self)

    def _copy(self, body: dict[str, Any]) -> None:
        _, model = self._found(body["source"])
        self.ollama.models[full(body["destination"])] = replace(model)
        self.send(200, {})

    def _delete(self, body: dict[str, Any]) -> None:
        name, _ = self._found(body["model"])
        del self.ollama.models[name]
        self.send(200, {})

    def _pull(self, body: dict[str, Any]) -> None:
        model = self.ollama.registry.get(full(body["model"]))
        if model is None:
            lines({"status": "pulling manifest"}, {"error": "pull model manifest: file does not exist"})(self)
            return
        self.ollama.models[full(body["model"])] = model
        part = {"status": "pulling 0123", "digest": "sha256:0123", "total": 4 << 20, "completed": 2 << 20}
        lines({"status": "pulling manifest"}, part, {"status": "verifying sha256 digest"}, {"status": "success"})(self)

    # --- answers ---

    def _chat(self, body: dict[str, Any]) -> None:
        name, model = self._found(body["model"])
        empty = {"model": body["model"], "message": {"role": "assistant", "content": ""}, "done": True}
        if not body["messages"] and body.get("keep_alive") == 0:
            self.ollama.loaded.pop(name, None)
            self.send(200, {**empty, "done_reason": "unload"})
            return
        self._load(name, body)
        if not body["messages"]:
            self.send(200, {**empty, "done_reason": "load"})
            return
        prompt = self.ollama.render(model, body["messages"])
        if body.get("_debug_render_only") and self.ollama.tells_prompts:
            self.send(200, {"model": body["model"], "_debug_info": {"rendered_template": prompt}})
            return
        self._must_fit(name, prompt)
        text = self.ollama.write(prompt) if self.ollama.write else self._answer(prompt)
        written = text[: body["options"]["num_predict"]]
        reply = {
            **empty,
            "message": {"role": "assistant", "content": written},
            "done_reason": "stop" if written == text else "length",
            "prompt_eval_count": len(prompt),
            "eval_count": len(written),
        }
        if body.get("logprobs"):
            reply["logprobs"] = self.ollama.steps(prompt, written, body)
        self.send(200, self.ollama.amend(reply))

    def _generate(self, body: dict[str, Any]) -> None:
        name, _ = self._found(body["model"])
        self._load(name, body)
        assert body["raw"]
        self._must_fit(name, body["prompt"])
        prompt, _, said = body["prompt"].rpartition("<assistant>")
        likely = self.ollama.likely(prompt + "<assistant>", said, None, body["top_logprobs"])
        step = {**likely[0], "top_logprobs": likely}
        self.send(200, {"model": body["model"], "response": step["token"], "done": True, "done_reason": "length", "logprobs": [step]})

    def _load(self, name: str, body: Mapping[str, Any]) -> None:
        context = min(body.get("options", {}).get("num_ctx", 4096), self.ollama.most_context)
        with self.ollama._lock:
            if self.ollama.loaded.get(name) != context:
                self.ollama.loads += 1
                self.ollama.loaded[name] = context

    def _must_fit(self, name: str, prompt: str) -> None:
        context = self.ollama.loaded[name]
        if len(prompt) > context:
            words = f"request ({len(prompt)} tokens) exceeds the available context size ({context} tokens), try increasing it"
            inner = {"code": 400, "message": words, "type": "exceed_context_size_error", "n_prompt_tokens": len(prompt), "n_ctx": context}
            self.send(400, {"error": json.dumps({"error": inner})})  # llama.cpp's own words, as a text
            raise _Answered

    def _answer(self, prompt: str) -> str:
        shares = self.ollama.shares(prompt)
        return answer_text(max(shares, key=lambda label: shares[label]), "because it says so")


class _Answered(Exception):
    """An error was sent."""


def full(name: str) -> str:
    return name if ":" in name.rpartition("/")[2] else f"{name}:latest"


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


@contextlib.contextmanager
def scripted(folder: Path, **settings: Any) -> Iterator[ScriptedOllama]:
    with ScriptedOllama(folder / "ollama", **settings) as server:
        yield server

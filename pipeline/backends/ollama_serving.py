"""Models of this project on an Ollama server: registered from their files, checked, kept under their versions' names."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.backends.base_model import resolve
from pipeline.backends.llamacpp import open_engine
from pipeline.backends.ollama_engine import OllamaEngine
from pipeline.backends.ollama_models import find, may_be_name
from pipeline.backends.ollama_server import OllamaServer, Served, gone
from pipeline.errors import EngineError, ModelNotFoundError, UserError
from pipeline.ports import BaseModel, Engine, EngineFactory, Kept, Progress, quiet
from pipeline.records import Message, fingerprint
from pipeline.store import digest_file

PREFIX = "pipeline-"  # of the names of models at work; a finished model is called by its version
RENDER_CONTEXT = 1024  # tokens: nothing is generated, and the default can be very large
_PROBE = (Message("user", "To be, or not to be?"),)
_MARK = "A system text of its own."

logger = logging.getLogger(__name__)


class OllamaServing:
    """Answers come from an Ollama server (the port `Serving`)."""

    name = "ollama"

    def __init__(self, server: OllamaServer, *, pull: bool = True) -> None:
        self.server, self._pull = server, pull
        self.facts: dict[str, Any] = {"engine": "ollama", "ollama": server.version_text}
        self._bases: dict[str, Served] = {}  # digest -> the base as served
        self._rendered: dict[tuple[str | Message, ...], str] = {}  # (the model's name, the chat) -> its prompt

    def find(self, name: str, *, root: Path, allow_download: bool, verify: bool, progress: Progress = quiet) -> BaseModel:
        try:
            return resolve(name, root=root, allow_download=allow_download)
        except ModelNotFoundError as error:
            if not may_be_name(name):
                raise error
        return find(self.server, name, allow_pull=allow_download and self._pull, verify=verify, progress=progress)

    def manner(self, base: BaseModel) -> str | None:
        served = getattr(base, "served", None)
        return fingerprint(served.manner) if served else None

    def words(self, base: BaseModel) -> Mapping[str, Any] | None:
        manner = self._base(base).manner
        return {name: manner[name] for name in ("template", "system", "parameters")}

    def on_file(self, base: BaseModel) -> EngineFactory:
        served = self._base(base)
        if self.server.render(served.name, _PROBE, {"num_ctx": RENDER_CONTEXT}, keep_alive="10s") is None:
            logger.warning("Ollama %s does not tell how it renders a prompt: only its length is checked", self.server.version_text)
            return open_engine

        def render(messages: Sequence[Message]) -> str:
            asked: tuple[str | Message, ...] = (served.name, *messages)
            if asked not in self._rendered:
                # whoever opens a file here soon trains: the server need not keep the model in memory meanwhile
                text = self.server.render(served.name, messages, {"num_ctx": RENDER_CONTEXT}, keep_alive="10s")
                if text is None:
                    raise EngineError("Ollama does not tell any more how it renders a prompt", hint="see the server's log, then run again")
                self._rendered[asked] = text
            return self._rendered[asked]

        def open_it(model: Path, *, adapter: Path | None = None, context_tokens: int = 0) -> Engine:
            return open_engine(model, adapter=adapter, context_tokens=context_tokens, render=render)

        return open_it

    def served_apart(self) -> bool:
        return True

    def serve(self, base: BaseModel, model: Path | None = None) -> Engine:
        served, digest = self._base(base), base.facts.digest
        if model is not None:
            digest = digest_file(model)
            served = self._register(model, digest, like=served)
        else:
            self._must_be_there(served)
        return OllamaEngine(self.server, served.name, digest, open_engine(model or base.path, context_tokens=256, parallel=1))

    def keep(self, name: str, base: BaseModel, model: Path | Mapping[str, Any], *, replace: bool = False) -> Kept | None:
        like, there = self._base(base), self.server.show(name)
        if not isinstance(model, Path):
            self._must_be_there(like)  # a server that lacks what a model is made from would look for it in its registry
            own = {"system": model.get("system") or like.system, "messages": tuple(model["messages"])}
            wanted = like.manner | own | {"parameters": {**like.parameters, **model["parameters"]}}
            same = self._settled(name, there, str(like.digest), wanted, replace)
            if not same:
                self.server.create({**model, "model": name, "from": like.name})
            return self._kept(name, str(like.digest), not same)
        sent = digest_file(model)
        if there is not None and there.digest == sent and there.manner == like.manner:
            self.server.delete(working_name(sent))
            return Kept(name, sent, False)
        if not self.server.rewrites and there is not None and there.digest != sent and not replace:
            raise self._taken(name)
        working = self._register(model, sent, like=like)
        same = self._settled(name, there, str(working.digest), working.manner, replace)
        if not same:
            self.server.copy(working.name, name)
        self.server.delete(working.name)
        return self._kept(name, str(working.digest), not same)

    def has(self, name: str, digest: str) -> bool:
        there = self.server.show(name)
        return there is not None and there.digest == digest

    def _settled(self, name: str, there: Served | None, digest: str, wanted: Mapping[str, Any], replace: bool) -> bool:
        """Whether the name means this model already.

        Raises:
            UserError: it means another one, and may not be given to this one.
        """
        same = there is not None and there.digest == digest and there.manner == wanted
        if there is not None and not same and not replace:
            raise self._taken(name)
        return same

    def _taken(self, name: str) -> UserError:
        return UserError(
            f"the Ollama server at {self.server.address} has another model called {name}",
            hint=f"`pipeline register --replace` replaces it; `ollama cp {name} OTHER` keeps it under another name",
        )

    def _kept(self, name: str, digest: str, changed: bool) -> Kept:
        if not self.has(name, digest):
            raise EngineError(f"{name}: the Ollama server did not keep what it was given", hint="see the server's log, then run again")
        return Kept(name, digest, changed)

    # --- what is registered ---

    def _base(self, base: BaseModel) -> Served:
        """The base as the server has it: as it was found there, or registered from its file."""
        served: Served | None = getattr(base, "served", None)
        if served is not None:
            return served
        served = self._bases.get(base.facts.digest)
        if served is None or not self.has(served.name, str(served.digest)):
            served = self._bases[base.facts.digest] = self._register_base(base)
        return served

    def _must_be_there(self, served: Served) -> None:
        there = self.server.show(served.name)
        if there is None:
            raise gone(served.name)
        if there.digest != served.digest:
            raise EngineError(
                f"{served.name}: means another model on the Ollama server than when it was looked for", hint="run again, with the new one"
            )

    def _register_base(self, base: BaseModel) -> Served:
        """The base's file under a name of ours, rendering chats as its own template does."""
        served = self._register(base.path, base.facts.digest, like=None)
        with open_engine(base.path, context_tokens=256, parallel=1) as engine:
            if self.server.render(served.name, _PROBE, {"num_ctx": RENDER_CONTEXT}, keep_alive="10s") in (None, engine.render(_PROBE)):
                return served
            # the commonest difference: a template of the server's own, without the system text that the file's puts in by default
            try:
                system = default_system(engine.render(_PROBE), engine.render((Message("system", _MARK), *_PROBE)))
            except EngineError:  # some templates refuse system messages
                system = None
        if system is None:
            return served
        self.server.create({"model": served.name, "from": served.name, "system": system})
        return self._shown(served.name)

    def _register(self, path: Path, digest: str, *, like: Served | None) -> Served:
        """A GGUF under a name made from its digest, with the base's template, parameters, system text, turns and licence."""
        name = working_name(digest)
        there = self.server.show(name)
        if there is not None and (like is None or there.manner == like.manner) and (self.server.rewrites or there.digest == digest):
            return there
        manner = {key: value for key, value in (like.manner if like else {}).items() if value}
        if like and like.license:
            manner["license"] = like.license
        body = {"model": name, "files": {"model.gguf": digest}, **manner}
        self.server.create(body, uploads={digest: path})
        served = self._shown(name)
        if served.digest != digest and not self.server.rewrites:
            raise EngineError(
                f"{path.name}: the Ollama server stored another file than it was sent", hint="see the server's log, then run again"
            )
        return served

    def _shown(self, name: str) -> Served:
        served = self.server.show(name)
        if served is None:
            raise EngineError(
                f"{name}: the Ollama server made this model and does not have it", hint="see the server's log, then run again"
            )
        return served


def default_system(without: str, with_mark: str) -> str | None:
    """The system text that a template puts in by itself: what stands in its rendering without one, where `_MARK` stands in the other."""
    before, marked, after = with_mark.partition(_MARK)
    if not marked or not without.startswith(before) or not without.endswith(after) or len(without) <= len(before) + len(after):
        return None
    return without[len(before) : len(without) - len(after)]


def working_name(digest: str) -> str:
    return PREFIX + digest.removeprefix("sha256:")[:12]

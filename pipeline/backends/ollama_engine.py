"""Answers from an Ollama server: one /api/chat request a row, held to the answer schema, with log-probabilities for its rating.

What the server reads is known before it is sent: the server renders the prompt, and the model's own tokenizer, loaded here, counts it.
So a long prompt is refused here by its true length, and nothing is ever cut (`truncate` and `shift` are off as well).
"""

from __future__ import annotations

import logging
import math
import os
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.backends.llamacpp import LlamaCppEngine, by_length
from pipeline.backends.llamacpp_server import SEED, side_by_side
from pipeline.backends.ollama_server import UNCUT, OllamaServer
from pipeline.backends.ollama_wire import Refusal
from pipeline.config import GenerateConfig
from pipeline.errors import EngineError
from pipeline.prompts import answer_schema, rating_of
from pipeline.rating_tree import Ids, RatingTree
from pipeline.records import Completion, Finish, Message, Prompt, RatingScale

KEEP_ALIVE = "30m"  # the model stays in memory between two rows however slow they are
TOP = 20  # log-probabilities a token; the most that the server gives
UNLISTED = 0.02  # of the probability of all ratings: the most that may be guessed
FAILED_IN_A_ROW = 8  # rows; then it is the server that fails
_STEP = 1024  # tokens by which the context grows: each new size loads the model anew

logger = logging.getLogger(__name__)


class OllamaEngine:
    """One model of a server (the port `Engine`). `tokenizer` is an engine in this process on the same GGUF; it is closed with this one.

    Rows are sent OLLAMA_NUM_PARALLEL + 1 at a time, as the environment says it of the server: one waits while the slots work.
    """

    name = "ollama"

    def __init__(self, server: OllamaServer, model: str, model_digest: str, tokenizer: LlamaCppEngine) -> None:
        self.server, self.model, self.model_digest = server, model, model_digest
        self._tokenizer = tokenizer
        self._context = 0
        self._asked = False  # whether the server has the model in memory because of this engine
        slots = os.environ.get("OLLAMA_NUM_PARALLEL", "")
        self.parallel = (int(slots) if slots.isdecimal() and 0 < int(slots) <= 64 else 1) + 1
        self._texts: dict[tuple[Message, ...], str] = {}
        self._spelt: dict[Ids, str] = {}
        self._lock = threading.Lock()

    # --- prompts ---

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text as the server renders it; by the file's own template where the server does not tell."""
        known = tuple(messages)
        if known not in self._texts:
            self._asked = True
            text = self.server.render(self.model, messages, self._options(self._context or _STEP), KEEP_ALIVE)
            self._texts[known] = self._tokenizer.render(messages) if text is None else text
        return self._texts[known]

    def token_ids(self, messages: Sequence[Message]) -> Ids:
        return self._tokenizer.prompt_ids(self.render(messages))

    def tokenize(self, text: str) -> Ids:
        return self._tokenizer.tokenize(text)

    # --- answers ---

    def complete(
        self, prompts: Sequence[Prompt], scale: RatingScale, generate: GenerateConfig, *, max_prompt_tokens: int
    ) -> Iterator[Completion]:
        """One Completion a prompt, in the order they are done.

        Raises:
            EngineError: the server can't be reached, lost the model, or failed for eight rows in a row.
        """
        labels = self._tokenizer.rating_tree(scale)
        answer_tokens = max(generate.max_tokens, labels.longest + 1)
        limit = min(max_prompt_tokens, self._tokenizer.trained_context - answer_tokens)
        fitting, too_long = by_length(prompts, self.token_ids, limit)
        yield from too_long
        if not fitting:
            return
        self._make_room(max(len(ids) for _, ids in fitting) + answer_tokens)
        job = _Answering(self, labels, scale, generate.max_tokens, generate.temperature)
        failed = 0
        for completion in side_by_side(lambda row, _: job.answer(*row), fitting, self.parallel):
            failed = failed + 1 if completion.finish == "failed" else 0
            yield completion
            if failed == FAILED_IN_A_ROW:
                raise EngineError(
                    f"Ollama failed for {failed} rows in a row, last with: {completion.error}", hint="see the server's log, then run again"
                )

    def rating_probabilities(self, prompts: Sequence[Prompt], scale: RatingScale) -> list[Mapping[str, float]]:
        """Label -> probability for each prompt, from answers that end with their rating. Where a rating is beyond the 20 likeliest tokens,
        so that its probability is not known, the whole goes to the one that was answered.

        Raises:
            EngineError: the server failed, or gave no rating.
        """
        labels = self._tokenizer.rating_tree(scale)
        rows = [(prompt, self.token_ids(prompt.messages)) for prompt in prompts]
        if not rows:
            return []
        tokens = 3 * labels.longest  # a model that was not trained may put spaces of its own before the rating
        self._make_room(max(len(ids) for _, ids in rows) + tokens)
        job = _Answering(self, labels, scale, tokens, 0.0)
        found = {done.record_id: done for done in side_by_side(lambda row, _: job.answer(*row), rows, self.parallel)}
        missing = [done for done in found.values() if rating_of(done.text) not in labels.paths]
        if missing:
            raise EngineError(f"Ollama gave no rating for {len(missing)} of {len(rows)} rows: {missing[0].error or 'none in its answer'}")
        return [_at_least(done, scale) for done in (found[prompt.record_id] for prompt in prompts)]

    def next_token_logprobs(self, token_ids: Sequence[int], n: int) -> dict[int, float]:
        """The likeliest next tokens, 20 at most; a text that is not one token is left out."""
        self._make_room(len(token_ids) + 1)
        found: dict[int, float] = {}
        for text, value in self.after(self._tokenizer.detokenize(tuple(token_ids)))[:n]:
            ids = self._tokenizer.tokenize(text, special=True)
            if len(ids) == 1:
                found[ids[0]] = value
        return found

    # --- requests ---

    def body(self, prompt: Prompt, max_tokens: int, temperature: float, schema: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What /api/chat is asked for one row."""
        asked: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": message.role, "content": message.content} for message in prompt.messages],
            "options": self._options(self._context, max_tokens, temperature),
            "keep_alive": KEEP_ALIVE,
            "think": False,
            **UNCUT,
        }
        if schema is not None:
            asked |= {"format": schema, "logprobs": True, "top_logprobs": TOP}
        return asked

    def after(self, text: str) -> list[tuple[str, float]]:
        """(token, log-probability) of the likeliest tokens after a text that is read as it stands, likeliest first."""
        told = self.server.generate(
            {
                "model": self.model,
                "prompt": text,
                "raw": True,
                "options": self._options(self._context, 1),
                "keep_alive": KEEP_ALIVE,
                "logprobs": True,
                "top_logprobs": TOP,
                **UNCUT,
            }
        )
        steps = told.get("logprobs") or []
        return _top(steps[0]) if steps else []

    def texts_after(self, place: Ids, tokens: Ids) -> dict[int, str]:
        """id -> what it adds to the text of the tokens before it."""
        before = self.answer_text(place)
        return {token: self.answer_text((*place, token)).removeprefix(before) for token in tokens}

    def answer_text(self, ids: Ids) -> str:
        """The text of an answer's first tokens."""
        with self._lock:
            if ids not in self._spelt:
                self._spelt[ids] = self._tokenizer.detokenize(ids)
            return self._spelt[ids]

    def _options(self, context: int, max_tokens: int = 1, temperature: float = 0.0) -> dict[str, Any]:
        """One set for every request of a model: what differs makes the server load it anew. The model's own sampling settings and
        penalties would change a greedy answer, so each is set."""
        drawn = (
            {"temperature": temperature, "top_k": 0, "top_p": 1.0, "min_p": 0.0} if temperature > 0 else {"temperature": 0.0, "top_k": 1}
        )
        even = {"repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
        return {"num_ctx": context, "num_predict": max_tokens, "seed": SEED, **drawn, **even}

    def _make_room(self, tokens: int) -> None:
        """Loads the model with a context for rows of that many tokens, unless it has one."""
        if self._context >= tokens:
            return
        self._context, self._asked = -(-tokens // _STEP) * _STEP, True
        self.server.chat({"model": self.model, "messages": [], "options": self._options(self._context), "keep_alive": KEEP_ALIVE, **UNCUT})
        for model in self.server.loaded():
            has = model.get("context_length")
            if (
                str(model.get("name", "")).removesuffix(":latest") == self.model.removesuffix(":latest")
                and isinstance(has, int)
                and has < tokens
            ):
                raise EngineError(
                    f"{self.model}: the server gives it a context of {has} tokens; {tokens} are needed",
                    hint="lower prompt.max_tokens or OLLAMA_NUM_PARALLEL, or give the server more memory",
                )

    def close(self) -> None:
        """Frees the server's memory of the model, so that the next one has room."""
        self._tokenizer.close()
        if self._asked:
            self._context, self._asked = 0, False
            self.server.unload(self.model)

    def __enter__(self) -> OllamaEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# --- one row ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Answering:
    engine: OllamaEngine
    labels: RatingTree
    scale: RatingScale
    max_tokens: int
    temperature: float

    def answer(self, prompt: Prompt, ids: Ids) -> Completion:
        """The answer to one prompt, or why there is none."""
        started = time.perf_counter()

        def done(text: str, finish: Finish, error: str | None, read: int, written: int, shares: Mapping[str, float] | None) -> Completion:
            return Completion(prompt.record_id, text, finish, error, read, written, time.perf_counter() - started, shares)

        try:
            told = self.engine.server.chat(self.engine.body(prompt, self.max_tokens, self.temperature, answer_schema(self.scale)))
            message: dict[str, Any] = told["message"] if isinstance(told.get("message"), dict) else {}
            text = str(message.get("content") or "")
            finish, error = _ending(told, message, text)
            steps = [step for step in told.get("logprobs") or () if isinstance(step, dict)]
            shares = None if finish == "failed" else _probabilities(self.engine, self.labels, prompt, text, steps)
            read, written = int(told.get("prompt_eval_count") or 0), int(told.get("eval_count") or 0)
        except Refusal as refusal:
            return done("", *_refused(refusal), len(ids), 0, None)
        except (AttributeError, TypeError, ValueError):
            logger.debug("an answer of Ollama in another form than its API's", exc_info=True)
            return done(
                "", "failed", f"Ollama {self.engine.server.version_text} answered in a form that is not its API's", len(ids), 0, None
            )
        if not self.engine.server.counts_cached:
            read = max(read, len(ids))
        return done(text, finish, error, read, written, shares)


def _refused(refusal: Refusal) -> tuple[Finish, str]:
    if refusal.status == 400 and any(words in refusal.said for words in ("exceed", "context", "too long")):
        return "too_long", refusal.said
    return "failed", refusal.said


def _ending(told: Mapping[str, Any], message: Mapping[str, Any], text: str) -> tuple[Finish, str | None]:
    """How an answer that came ended; `done` is false, with status 200, where the server broke off a repetition."""
    if not text.strip():
        thought = "it only thought" if message.get("thinking") else "it wrote nothing"
        return "stop", f"no answer: {thought} (done_reason {told.get('done_reason')})"
    if told.get("done") is not True:
        return "length", "the server broke off an answer that repeated itself"
    reason = told.get("done_reason")
    if reason in ("stop", "length"):
        return reason, None
    return "stop", f"the answer ended with done_reason {str(reason)[:40]!r}"


def _probabilities(
    engine: OllamaEngine, labels: RatingTree, prompt: Prompt, text: str, steps: Sequence[Mapping[str, Any]]
) -> dict[str, float] | None:
    """Label -> probability, from the log-probabilities that came with the answer where it took the way that was trained on; for other
    ways the server is asked again. None where the answer has no rating, or one is too unlikely for the server to list it."""
    if rating_of(text) not in labels.paths:
        return None
    spoken = [str(step.get("token", "")) for step in steps]

    def branch(place: Ids, allowed: Ids) -> Mapping[int, float]:
        tokens = engine.texts_after(place, allowed)
        said = engine.answer_text(place)
        at = next((n for n in range(len(spoken)) if "".join(spoken[:n]) == said), None)
        likely = _top(steps[at]) if at is not None else engine.after(engine.render(prompt.messages) + said)
        return shares(tokens, dict(likely))

    try:
        return labels.probabilities(branch)
    except (_Unlisted, Refusal):
        return None


class _Unlisted(Exception):
    """Ratings that are not among the likeliest tokens could hold a share that matters."""


def shares(tokens: Mapping[int, str], likely: Mapping[str, float]) -> dict[int, float]:
    """id -> probability among the allowed tokens, from the likeliest tokens' log-probabilities. One that is not listed is at most as likely
    as the last that is.

    Raises:
        _Unlisted: those that are not listed could hold more than UNLISTED of the whole.
    """
    last = math.exp(min(likely.values(), default=-math.inf))
    listed = {token: math.exp(likely[text]) for token, text in tokens.items() if text in likely}
    unlisted = last * (len(tokens) - len(listed))
    total = sum(listed.values()) + unlisted
    if not total > 0 or not listed or unlisted > UNLISTED * total:
        raise _Unlisted
    return {token: listed.get(token, last) / total for token in tokens}


def _at_least(done: Completion, scale: RatingScale) -> dict[str, float]:
    return dict(done.probabilities or {label: float(label == rating_of(done.text)) for label in scale.labels})


def _top(step: Mapping[str, Any]) -> list[tuple[str, float]]:
    found: dict[str, float] = {}
    for token in step.get("top_logprobs") or ():
        found.setdefault(str(token.get("token", "")), float(token.get("logprob", -math.inf)))
    return sorted(found.items(), key=lambda item: -item[1])

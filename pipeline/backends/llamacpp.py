"""The embedded engine: llama.cpp in this process, several rows at once.

An answer is made in two steps. First the prompt and ANSWER_OPENING, as token ids, and at each token where the labels' token
sequences branch the probabilities of the allowed branches: they choose the rating. Then the rest of the answer's fixed text up to
the rationale, which the model writes under a grammar. So no token is spent on what the format dictates, the rating's probabilities
cost nothing more, and every answer is one that `prompts.answer_text` could have written.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import prompts as answer_format
from pipeline.backends.gguf_header import Header, read_header
from pipeline.backends.llamacpp_server import SEED, Server, side_by_side
from pipeline.config import GenerateConfig
from pipeline.errors import EngineError
from pipeline.rating_tree import Ids, RatingTree, rating_tree
from pipeline.records import Completion, Finish, Message, Prompt, RatingScale, fingerprint
from pipeline.store import digest_file

ROWS_AT_ONCE = 8
_FIRST_CONTEXT = 1024  # tokens a row; grown when a prompt needs more
_CACHE_BYTES = 1 << 30  # what the attention caches of all rows may take before fewer rows run at once
_BIAS = 100.0  # added to allowed branches: all other tokens together keep less than e^-50


def open_engine(
    model: Path,
    *,
    adapter: Path | None = None,
    context_tokens: int = 0,
    parallel: int | None = None,
    threads: int | None = None,
    render: Callable[[Sequence[Message]], str] | None = None,
) -> LlamaCppEngine:
    """The engine on a GGUF file, `adapter` (a LoRA GGUF) on top of it.

    Args:
        context_tokens: room for one row (prompt and answer); 0 sizes it from the longest prompt of each call.
        parallel: rows at once; None: 8, or fewer where their attention caches would take more than 1 GiB.
        threads: None takes every core that this process may use.
        render: puts a chat into the model's words instead of the file's own template, as another server that serves the model does.

    Raises:
        ArtifactError: a file is missing, damaged or truncated.
        EngineError: llama.cpp can't run the model (an unknown architecture, say); names its reason.
    """
    header = read_header(model)
    digest = digest_file(model)
    if adapter is not None:
        read_header(adapter)
        digest = fingerprint(digest, digest_file(adapter))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return LlamaCppEngine(model, adapter, header, digest, context_tokens, parallel, threads or cores, render)


class LlamaCppEngine:
    """One model, loaded until `close`. Make it with `open_engine`."""

    name = "embedded"

    def __init__(
        self,
        model: Path,
        adapter: Path | None,
        header: Header,
        digest: str,
        context_tokens: int,
        parallel: int | None,
        threads: int,
        render: Callable[[Sequence[Message]], str] | None,
    ) -> None:
        self.model_digest = digest
        self._foreign_render = render
        self._model, self._adapter, self._header = model, adapter, header
        self._parallel, self._threads = parallel, threads
        self._bos: Ids | None = None
        self._server: Server | None = self._load(context_tokens or min(_FIRST_CONTEXT, self.trained_context))

    # --- tokens ---

    def tokenize(self, text: str, special: bool = False) -> Ids:
        """Token ids of a text; with `special`, texts such as `<|im_start|>` become the tokens that they name."""
        return self._loaded().tokenize(text, special=special)

    def render(self, messages: Sequence[Message]) -> str:
        """The prompt's text: the file's chat template applied by llama.cpp (or what it was opened with), the assistant's turn opened."""
        return (self._foreign_render or self._loaded().render)(messages)

    def detokenize(self, ids: Ids) -> str:
        return self._loaded().detokenize(ids)

    def token_ids(self, messages: Sequence[Message]) -> Ids:
        """The prompt as it is sent: `render` in token ids, one BOS at most."""
        return self.prompt_ids(self.render(messages))

    def prompt_ids(self, text: str) -> Ids:
        """A rendered prompt in token ids."""
        ids = self._loaded().tokenize(text, special=True)
        if self._bos is None:
            self._bos = self._bos_added()
        return ids if ids[:1] == self._bos else self._bos + ids

    def _bos_added(self) -> Ids:
        """The BOS token when the vocabulary asks for one in front of every prompt, else nothing."""
        added = self._loaded().tokenize("", special=True, add_special=True)
        return added[:1] if added and added[0] == self._header.values.get("tokenizer.ggml.bos_token_id", 1) else ()

    def next_token_logprobs(self, token_ids: Sequence[int], n: int) -> dict[int, float]:
        """The `n` likeliest next tokens with their log-probabilities over the whole vocabulary.

        Raises:
            EngineError: the engine gave none.
        """
        server = self._room(len(token_ids) + 1)
        reply = _checked(server.generate(token_ids, 1, temperature=0.0, n_probs=n))
        return {int(token["id"]): float(token["logprob"]) for token in _first_token(reply)["top_logprobs"][:n]}

    # --- answers ---

    def complete(
        self, prompts: Sequence[Prompt], scale: RatingScale, generate: GenerateConfig, *, max_prompt_tokens: int
    ) -> Iterator[Completion]:
        """One Completion a prompt, in the order they are done. Near-ties may fall differently from call to call, since rows that run
        together share matrix products.

        Raises:
            EngineError: the engine as a whole failed.
        """
        labels = self.rating_tree(scale)
        answer_tokens = max(generate.max_tokens, labels.longest + 1)
        limit = min(max_prompt_tokens, self.trained_context - answer_tokens)
        fitting, too_long = by_length(prompts, self.token_ids, limit)
        yield from too_long
        if fitting:
            server = self._ready([ids for _, ids in fitting], answer_tokens)
            job = _Answering(server, labels, generate)
            yield from side_by_side(lambda row, slot: job.answer(*row, slot), fitting, server.parallel)

    def rating_probabilities(self, prompts: Sequence[Prompt], scale: RatingScale) -> list[Mapping[str, float]]:
        """Label -> probability for each prompt, in order.

        Raises:
            EngineError: the engine failed, or a prompt does not fit into the model's context.
        """
        labels = self.rating_tree(scale)
        rows = [(n, self.token_ids(prompt.messages)) for n, prompt in enumerate(prompts)]
        if not rows:
            return []
        server = self._ready([ids for _, ids in rows], labels.longest + 1)

        def rate(row: tuple[int, Ids], slot: int) -> tuple[int, Mapping[str, float]]:
            return row[0], labels.probabilities(_Branching(server, row[1], slot))

        found = dict(side_by_side(rate, rows, server.parallel))
        return [found[n] for n in range(len(rows))]

    def rating_tree(self, scale: RatingScale) -> RatingTree:
        """The labels as this model's tokens, from the answer's opening to the rationale's."""
        fixed = {label: answer_format.ANSWER_OPENING + label + answer_format.RATIONALE_OPENING for label in scale.labels}
        return rating_tree({label: self.tokenize(text) for label, text in fixed.items()})

    # --- the model in memory ---

    def _loaded(self) -> Server:
        if self._server is None:
            raise EngineError("the engine is closed")
        return self._server

    @property
    def trained_context(self) -> int:
        """Tokens that the model was made for."""
        return int(self._header.values.get(f"{self._header.values.get('general.architecture')}.context_length", 1 << 30))

    def _ready(self, prompts: Sequence[Ids], answer_tokens: int) -> Server:
        """The server with room for these prompts, what they all begin with already read."""
        server = self._room(max(map(len, prompts)) + answer_tokens)
        first, last = min(prompts), max(prompts)
        shared = next((n for n, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), min(len(first), len(last)))
        server.share(first[:shared], min(server.parallel, len(prompts)))
        return server

    def _room(self, tokens: int) -> Server:
        """The server with room for rows of that many tokens; the model is loaded anew when there is too little."""
        server = self._loaded()
        if server.row_tokens >= tokens:
            return server
        if tokens > self.trained_context:
            raise EngineError(f"a row needs {tokens} tokens and {self._model.name} was made for {self.trained_context}")
        self.close()
        self._server = self._load(tokens)
        return self._server

    def _load(self, tokens: int) -> Server:
        row_tokens = -(-tokens // 256) * 256
        return Server(self._model, self._adapter, row_tokens, self._parallel or self._rows_that_fit(row_tokens), self._threads)

    def _rows_that_fit(self, row_tokens: int) -> int:
        """Rows at once, so that keys and values (16 bits each, per layer and token) stay within _CACHE_BYTES."""

        def count(key: str, otherwise: int) -> int:
            value = self._header.values.get(f"{self._header.values.get('general.architecture')}.{key}", otherwise)
            return value if isinstance(value, int) and value > 0 else otherwise

        heads = count("attention.head_count", 1)
        width = count("embedding_length", 4096) * count("attention.head_count_kv", heads) // heads
        row_bytes = row_tokens * count("block_count", 32) * width * 2 * 2
        return max(1, min(ROWS_AT_ONCE, _CACHE_BYTES // max(row_bytes, 1)))

    def close(self) -> None:
        """Frees the model's memory and ends its threads. An engine that is closed stays closed."""
        server, self._server = self._server, None
        if server is not None:
            server.close()

    def __enter__(self) -> LlamaCppEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def by_length(
    prompts: Sequence[Prompt], token_ids: Callable[[Sequence[Message]], Ids], limit: int
) -> tuple[list[tuple[Prompt, Ids]], list[Completion]]:
    """The prompts of at most `limit` tokens, with their ids, and the refusals of the others."""
    fitting: list[tuple[Prompt, Ids]] = []
    too_long: list[Completion] = []
    for prompt in prompts:
        ids = token_ids(prompt.messages)
        if len(ids) <= limit:
            fitting.append((prompt, ids))
        else:
            reason = f"the prompt has {len(ids)} tokens; {max(limit, 0)} are allowed"
            too_long.append(Completion(prompt.record_id, "", "too_long", reason, len(ids), 0, 0.0, None))
    return fitting, too_long


# --- one row ---------------------------------------------------------------------------------------------------------


class _Branching:
    """Asks the model how it would branch after one prompt; remembers what it was told."""

    def __init__(self, server: Server, prompt: Ids, slot: int) -> None:
        self.server, self.prompt, self.slot = server, prompt, slot
        self.known: dict[Ids, Mapping[int, float]] = {}

    def __call__(self, path: Ids, tokens: Ids) -> Mapping[int, float]:
        if path not in self.known:
            self.known[path] = self._ask(path, tokens)
        return self.known[path]

    def _ask(self, path: Ids, tokens: Ids) -> Mapping[int, float]:
        reply = self.server.generate(
            self.prompt + path,
            1,
            slot=self.slot,
            temperature=1.0,
            samplers=["temperature"],
            logit_bias=[[token, _BIAS] for token in tokens],
            n_probs=len(tokens),
            post_sampling_probs=True,
        )
        given = {int(top["id"]): float(top["prob"]) for top in _first_token(_checked(reply))["top_probs"]}
        total = sum(given.get(token, 0.0) for token in tokens)
        if not total > 0:
            raise _RowFailed("the engine gave no probability for any rating")
        return {token: given.get(token, 0.0) / total for token in tokens}


class _RowFailed(EngineError):
    """One request went wrong; the engine lives."""


@dataclass(frozen=True)
class _Answering:
    server: Server
    labels: RatingTree
    generate: GenerateConfig

    def answer(self, prompt: Prompt, ids: Ids, slot: int) -> Completion:
        """The answer to one prompt, or why there is none."""
        started = time.perf_counter()
        try:
            branching = _Branching(self.server, ids, slot)
            probabilities = self.labels.probabilities(branching)
            chance = random.Random(f"{SEED}:{prompt.record_id}")
            label = self.labels.choose(branching, self.generate.temperature, chance)
            text, finish, output_tokens = self._text(ids, label, slot)
        except _RowFailed as error:
            return Completion(prompt.record_id, "", "failed", str(error), len(ids), 0, time.perf_counter() - started, None)
        return Completion(prompt.record_id, text, finish, None, len(ids), output_tokens, time.perf_counter() - started, probabilities)

    def _text(self, ids: Ids, label: str, slot: int) -> tuple[str, Finish, int]:
        """(answer, finish, tokens) with that rating. The fixed text counts among the tokens, as it does for a server."""
        path, room = self.labels.paths[label], self.generate.max_tokens
        if room <= len(path):
            return self.server.detokenize(path[:room]), "length", room
        fixed = answer_format.ANSWER_OPENING + label + answer_format.RATIONALE_OPENING
        drawn: dict[str, Any] = {"temperature": 0.0, "samplers": ["top_k"], "top_k": 1}
        if self.generate.temperature > 0:
            drawn = {"temperature": self.generate.temperature, "samplers": ["temperature"]}
        grammar = answer_format.rationale_grammar()
        reply = _checked(self.server.generate(ids + path, room - len(path), slot=slot, grammar=grammar, **drawn))
        choice = reply["choices"][0]
        finish: Finish = "stop" if choice["finish_reason"] == "stop" else "length"
        return fixed + choice["text"], finish, len(path) + int(reply["usage"]["completion_tokens"])


def _checked(reply: Any) -> dict[str, Any]:
    if not isinstance(reply, dict) or "choices" not in reply:
        problem = reply.get("error", {}) if isinstance(reply, dict) else {}
        raise _RowFailed(f"llama.cpp refused the request: {problem.get('message', 'no answer')}")
    return reply


def _first_token(reply: Mapping[str, Any]) -> Mapping[str, Any]:
    content = (reply["choices"][0].get("logprobs") or {}).get("content") or []
    if not content:
        raise _RowFailed("llama.cpp gave no probabilities")
    first: Mapping[str, Any] = content[0]
    return first

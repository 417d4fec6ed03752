"""Stand-ins that keep the ports' contracts and count what they are asked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

from pipeline.config import GenerateConfig
from pipeline.errors import EngineError
from pipeline.prompts import ANSWER_OPENING, RATIONALE_OPENING, answer_text
from pipeline.rating_tree import RatingTree, rating_tree
from pipeline.records import Completion, Message, Prompt, RatingScale, digest_text


class FakeEngine:
    """An engine whose answers follow from the prompt's text alone. Tokens are characters.

    Args:
        fails: record ids whose row fails.
        dies_after: raises this after so many answers.
        respond: text for a prompt, instead of a well-formed answer.
    """

    name = "embedded"

    def __init__(
        self,
        model_digest: str = "sha256:fake",
        *,
        fails: frozenset[str] = frozenset(),
        dies_after: tuple[int, BaseException] | None = None,
        respond: Callable[[Prompt], str] | None = None,
    ) -> None:
        self.model_digest = model_digest
        self.fails, self.dies_after, self.respond = fails, dies_after, respond
        self.asked: list[str] = []  # record ids, in order
        self.opened, self.closed = 1, 0

    def render(self, messages: Sequence[Message]) -> str:
        return "".join(f"<{message.role}>{message.content}" for message in messages) + "<assistant>"

    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return tuple(map(ord, self.render(messages)))

    def complete(
        self, prompts: Sequence[Prompt], scale: RatingScale, generate: GenerateConfig, *, max_prompt_tokens: int
    ) -> Iterator[Completion]:
        for n, prompt in enumerate(prompts):
            if self.dies_after is not None and n == self.dies_after[0]:
                raise self.dies_after[1]
            self.asked.append(prompt.record_id)
            yield self._complete(prompt, scale, generate, max_prompt_tokens)

    def _complete(self, prompt: Prompt, scale: RatingScale, generate: GenerateConfig, max_prompt_tokens: int) -> Completion:
        n_tokens = len(self.token_ids(prompt.messages))
        if n_tokens > max_prompt_tokens:
            return Completion(
                prompt.record_id, "", "too_long", f"{n_tokens} tokens; {max_prompt_tokens} are allowed", n_tokens, 0, 0.0, None
            )
        if prompt.record_id in self.fails:
            return Completion(prompt.record_id, "", "failed", "the fake was told to fail", n_tokens, 0, 0.0, None)
        [probabilities] = self.rating_probabilities([prompt], scale)
        label = max(probabilities, key=lambda name: probabilities[name])
        text = self.respond(prompt) if self.respond else answer_text(label, "because it says so")
        cut = text[: generate.max_tokens]
        return Completion(prompt.record_id, cut, "stop" if cut == text else "length", None, n_tokens, len(cut), 0.001, probabilities)

    def rating_probabilities(self, prompts: Sequence[Prompt], scale: RatingScale) -> list[Mapping[str, float]]:
        found: list[Mapping[str, float]] = []
        for prompt in prompts:
            text = prompt.messages[-1].content
            weights = {label: math.exp(int(digest_text(text + label)[7:15], 16) / 2**31) for label in scale.labels}
            found.append({label: weight / sum(weights.values()) for label, weight in weights.items()})
        return found

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> FakeEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class FakeTokenizer:
    """What an OllamaEngine needs of the engine in this process on the same GGUF. Tokens are characters.

    Args:
        system: the text that the file's own template puts in where a chat has no system message.
    """

    name = "embedded"

    def __init__(self, model_digest: str = "sha256:fake", *, trained_context: int = 8192, system: str = "") -> None:
        self.model_digest, self.trained_context, self.system = model_digest, trained_context, system
        self.closed = 0

    def render(self, messages: Sequence[Message]) -> str:
        if self.system and messages[0].role != "system":
            messages = [Message("system", self.system), *messages]
        return "".join(f"<{message.role}>{message.content}" for message in messages) + "<assistant>"

    def prompt_ids(self, text: str) -> tuple[int, ...]:
        return self.tokenize(text)

    def token_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self.prompt_ids(self.render(messages))

    def tokenize(self, text: str, special: bool = False) -> tuple[int, ...]:
        if self.closed:
            raise EngineError("the engine is closed")
        return tuple(map(ord, text))

    def detokenize(self, ids: Sequence[int]) -> str:
        return "".join(map(chr, ids))

    def rating_tree(self, scale: RatingScale) -> RatingTree:
        return rating_tree({label: self.tokenize(ANSWER_OPENING + label + RATIONALE_OPENING) for label in scale.labels})

    def close(self) -> None:
        self.closed += 1

    def __enter__(self) -> FakeTokenizer:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

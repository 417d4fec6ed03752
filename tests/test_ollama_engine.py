"""Answers of a server become Completions; requests are the same for every row; nothing is cut and nothing is lost."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backends.ollama_engine import FAILED_IN_A_ROW, TOP, UNLISTED, OllamaEngine, _Unlisted, shares
from pipeline.backends.ollama_server import OllamaServer
from pipeline.backends.ollama_wire import Patience
from pipeline.config import GenerateConfig
from pipeline.errors import EngineError
from pipeline.prompts import ANSWER_OPENING, answer_schema, answer_text, parse_answer
from pipeline.records import Completion, Message, Prompt, Rating, RatingScale
from tests.fakes import FakeTokenizer
from tests.scripted_ollama import BUSY, Model, ScriptedOllama, drops, page, plain, says

SCALE = RatingScale((Rating(0, "No"), Rating(-1, "Not sure", abstain=True), Rating(1, "Yes")))
PROMPTS = [Prompt(f"r{n}", (Message("user", f"SECRET {n}: {'cough ' * n}"),)) for n in range(1, 13)]
GENERATE = GenerateConfig(max_tokens=120)
QUICK = Patience(waits_s=(0.01, 0.02, 0.02, 0.02), connect_s=2.0, answer_s=20.0)


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[ScriptedOllama]:
    with ScriptedOllama(tmp_path / "ollama", labels=SCALE.labels) as double:
        double.models["m:latest"] = Model(double.add_blob(b"GGUF m"))
        yield double


@pytest.fixture
def engine(ollama: ScriptedOllama) -> Iterator[OllamaEngine]:
    with OllamaServer(ollama.address, patience=QUICK) as server, OllamaEngine(server, "m", "sha256:m", FakeTokenizer()) as opened:
        yield opened


def answers(engine: OllamaEngine, prompts: list[Prompt] = PROMPTS, generate: GenerateConfig = GENERATE) -> dict[str, Completion]:
    done = list(engine.complete(prompts, SCALE, generate, max_prompt_tokens=2000))
    assert len({completion.record_id for completion in done}) == len(done)
    return {completion.record_id: completion for completion in done}


def one(engine: OllamaEngine) -> Completion:
    [completion] = answers(engine, PROMPTS[:1]).values()
    assert "SECRET" not in str(completion.error)
    return completion


# --- good answers ----------------------------------------------------------------------------------------------------


def test_every_row_gets_its_answer(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    done = answers(engine)
    assert sorted(done) == sorted(prompt.record_id for prompt in PROMPTS)
    for prompt in PROMPTS:
        completion, text = done[prompt.record_id], engine.render(prompt.messages)
        label, rationale, error = parse_answer(completion.text, completion.finish, SCALE)
        assert (error, completion.error, completion.finish, rationale) == (None, None, "stop", "because it says so")
        assert completion.probabilities == pytest.approx(ollama.shares(text), abs=0.005)
        assert label == max(ollama.shares(text), key=lambda name: ollama.shares(text)[name])
        assert completion.prompt_tokens == len(text) == len(engine.token_ids(prompt.messages))
        assert completion.output_tokens == len(completion.text)
        assert completion.seconds > 0
    # the answer's own log-probabilities are enough, but for branches that it did not come by
    assert len(ollama.bodies("/api/generate")) == sum("Yes" in completion.text for completion in done.values())


def test_all_requests_are_alike(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    answers(engine)
    rows = ollama.rows()
    assert len(rows) == len(PROMPTS)
    for body in rows:
        assert body["format"] == answer_schema(SCALE)
        assert (body["logprobs"], body["top_logprobs"], body["stream"], body["think"]) == (True, TOP, False, False)
        assert (body["truncate"], body["shift"], body["keep_alive"]) == (False, False, "30m")
        assert body["options"] == rows[0]["options"]
    longest = max(len(engine.token_ids(prompt.messages)) for prompt in PROMPTS)
    options = rows[0]["options"]
    assert longest + GENERATE.max_tokens <= options["num_ctx"] < longest + GENERATE.max_tokens + 1024
    assert (options["num_predict"], options["temperature"], options["top_k"], options["repeat_penalty"]) == (120, 0.0, 1, 1.0)
    assert ollama.loads <= 2  # rendering, then answering: never one a row
    answers(engine)
    assert ollama.loads <= 2


def test_drawn_answers_have_no_settings_of_the_models_own(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    answers(engine, PROMPTS[:1], GenerateConfig(temperature=0.7))
    options = ollama.rows()[0]["options"]
    assert (options["temperature"], options["top_k"], options["top_p"], options["min_p"]) == (0.7, 0, 1.0, 0.0)
    assert options["seed"] == 42


def test_prompts_are_rendered_once_and_by_the_server(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    ollama.models["m:latest"].system = "Be brief."
    assert engine.render(PROMPTS[0].messages).startswith("<system>Be brief.<user>SECRET 1")
    asked = len(ollama.asked)
    engine.render(PROMPTS[0].messages)
    engine.token_ids(PROMPTS[0].messages)
    assert len(ollama.asked) == asked
    assert engine.tokenize("ab") == (97, 98)


def test_a_server_that_does_not_tell_its_prompts(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    ollama.tells_prompts = False
    assert engine.render(PROMPTS[0].messages) == FakeTokenizer().render(PROMPTS[0].messages)


@pytest.mark.parametrize(("slots", "parallel"), [("", 2), ("4", 5), ("0", 2), ("many", 2), ("1000", 2), ("-1", 2)])
def test_rows_at_once(ollama: ScriptedOllama, monkeypatch: pytest.MonkeyPatch, slots: str, parallel: int) -> None:
    monkeypatch.setenv("OLLAMA_NUM_PARALLEL", slots)
    with OllamaServer(ollama.address, patience=QUICK) as server, OllamaEngine(server, "m", "sha256:m", FakeTokenizer()) as engine:
        assert engine.parallel == parallel
        assert len(answers(engine)) == len(PROMPTS)


@pytest.mark.parametrize(("version", "told", "counted"), [("0.12.11", 3, None), ("0.12.11", 10_000, 10_000), ("0.34.2", 3, 3)])
def test_prompt_tokens_of_servers_that_leave_out_the_cache(
    engine: OllamaEngine, ollama: ScriptedOllama, version: str, told: int, counted: int | None
) -> None:
    engine.server.version = tuple(map(int, version.split(".")))
    ollama.amend = lambda reply: {**reply, "prompt_eval_count": told}
    assert one(engine).prompt_tokens == (counted or len(engine.token_ids(PROMPTS[0].messages)))


# --- rows that fail, each in its own words ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "finish", "words"),
    [
        ({"done": False}, "length", "broke off an answer that repeated itself"),
        ({"done_reason": "length"}, "length", None),
        ({"done_reason": "cancelled"}, "stop", "the answer ended with done_reason 'cancelled'"),
        ({"done_reason": None}, "stop", "done_reason 'None'"),
        ({"message": {"content": "", "thinking": "SECRET thoughts"}}, "stop", "no answer: it only thought (done_reason stop)"),
        ({"message": {"content": " \n"}}, "stop", "no answer: it wrote nothing (done_reason stop)"),
        ({"message": {}}, "stop", "it wrote nothing"),
        ({"message": "SECRET"}, "stop", "it wrote nothing"),
        ({"message": None, "done": False}, "stop", "it wrote nothing"),
        ({"logprobs": 7}, "failed", "Ollama 0.34.2 answered in a form that is not its API's"),
        ({"logprobs": [{"token": t, "top_logprobs": ["SECRET"]} for t in ANSWER_OPENING + "N"]}, "failed", "form that is not"),
        ({"logprobs": [{"token": t, "top_logprobs": [{"logprob": "SECRET"}]} for t in ANSWER_OPENING + "N"]}, "failed", "form that is not"),
        ({"eval_count": "SECRET"}, "failed", "a form that is not its API's"),
        ({"eval_count": None, "prompt_eval_count": None}, "stop", None),
    ],
)  # fmt: skip
def test_answers_that_are_none(
    engine: OllamaEngine, ollama: ScriptedOllama, change: dict[str, Any], finish: str, words: str | None
) -> None:
    ollama.amend = lambda reply: {**reply, **change}
    completion = one(engine)
    assert completion.finish == finish
    assert words in str(completion.error) if words else completion.error is None
    assert completion.probabilities is None or finish != "failed"


@pytest.mark.parametrize(
    ("fault", "finish", "words"),
    [
        (says(400, "request (900 tokens) exceeds the available context size"), "too_long", "exceeds the available context"),
        (says(400, "the input is too long"), "too_long", "too long"),
        (says(400, "invalid format"), "failed", "invalid format"),
        (says(500, "prediction aborted, token repeat limit reached"), "failed", "token repeat limit"),
        (says(500, "model runner has unexpectedly stopped"), "failed", "model runner"),
    ],
)
def test_rows_that_the_server_refuses(engine: OllamaEngine, ollama: ScriptedOllama, fault: Any, finish: str, words: str) -> None:
    answers(engine, PROMPTS[:1])  # rendered and loaded
    ollama.fail("/api/chat", *[fault] * 3)
    completion = one(engine)
    assert (completion.finish, completion.text, completion.probabilities) == (finish, "", None)
    assert words in str(completion.error)
    assert completion.prompt_tokens == len(engine.token_ids(PROMPTS[0].messages))


def test_a_long_prompt_is_not_sent(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    long = Prompt("long", (Message("user", "word " * 500),))
    done = answers(engine, [long, PROMPTS[0]])
    assert (done["long"].finish, done["long"].text) == ("too_long", "")
    assert done["long"].error == f"the prompt has {2500 + len('<user><assistant>')} tokens; 2000 are allowed"
    assert done["r1"].error is None
    assert len(ollama.rows()) == 1
    assert list(engine.complete([], SCALE, GENERATE, max_prompt_tokens=10)) == []


def test_a_model_with_less_context_than_is_allowed(ollama: ScriptedOllama) -> None:
    tokenizer = FakeTokenizer(trained_context=200)
    with OllamaServer(ollama.address, patience=QUICK) as server, OllamaEngine(server, "m", "sha256:m", tokenizer) as engine:
        done = answers(engine)
    limit = 200 - GENERATE.max_tokens
    for prompt in PROMPTS:
        fits = len(tokenizer.render(prompt.messages)) <= limit
        assert done[prompt.record_id].finish == ("stop" if fits else "too_long")
    assert f"{limit} are allowed" in str(done["r12"].error)


def test_a_server_with_less_context_than_is_needed(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    ollama.most_context = 128
    with pytest.raises(EngineError, match=r"m: the server gives it a context of 128 tokens; \d+ are needed") as caught:
        answers(engine)
    assert "OLLAMA_NUM_PARALLEL" in caught.value.hint


def test_the_token_limit_holds(engine: OllamaEngine) -> None:
    for limit in (3, len(ANSWER_OPENING) + 8):
        [completion] = answers(engine, PROMPTS[:1], GenerateConfig(max_tokens=limit)).values()
        assert (completion.finish, completion.output_tokens) == ("length", limit)


# --- the engine as a whole -------------------------------------------------------------------------------------------


def test_a_model_that_was_deleted_meanwhile(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    answers(engine)
    model = ollama.models.pop("m:latest")
    works: list[Callable[[], object]] = [
        lambda: answers(engine),
        lambda: engine.render([Message("user", "new")]),
        lambda: engine.rating_probabilities(PROMPTS, SCALE),
        lambda: engine.next_token_logprobs((65,), 5),
    ]
    for work in works:
        with pytest.raises(EngineError, match="m: was deleted from the Ollama server meanwhile") as caught:
            work()
        assert "run again" in caught.value.hint
        assert caught.value.exit_code == 3
    ollama.models["m:latest"] = model
    assert len(answers(engine)) == len(PROMPTS)


def test_a_server_that_fails_for_every_row(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    ollama.amend = lambda reply: {**reply, "logprobs": 7}
    done = []
    with pytest.raises(EngineError, match=f"failed for {FAILED_IN_A_ROW} rows in a row, last with: Ollama 0.34.2 answered") as caught:
        done.extend(engine.complete(PROMPTS, SCALE, GENERATE, max_prompt_tokens=2000))
    assert "log" in caught.value.hint
    assert "SECRET" not in str(caught.value)
    # a few bad rows among good ones are values
    n = iter(range(1000))
    ollama.amend = lambda reply: reply if next(n) % 3 == 0 else {**reply, "logprobs": 7}
    assert [c.finish for c in answers(engine).values()].count("stop") == 4


def test_a_model_that_writes_nothing_is_a_model_that_is_wrong(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    """The server did its work: asking again and again would give the same."""
    ollama.amend = lambda reply: {**reply, "message": {"content": "", "thinking": "hm"}}
    for completion in answers(engine).values():
        assert parse_answer(completion.text, completion.finish, SCALE) == (None, None, "invalid_json")


def test_a_server_that_goes_away(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    completions = engine.complete(PROMPTS, SCALE, GENERATE, max_prompt_tokens=2000)
    next(completions)
    ollama.stop()
    with pytest.raises(EngineError, match=r"no Ollama server answers|broke off"):
        list(completions)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("row-")]
    started = time.perf_counter()
    engine.close()
    assert time.perf_counter() - started < 2  # nobody is waited for


def test_restarts_and_busy_moments_cost_no_row(ollama: ScriptedOllama) -> None:
    patience = Patience(waits_s=(0.05,) * 60)
    with OllamaServer(ollama.address, patience=patience) as server, OllamaEngine(server, "m", "sha256:m", FakeTokenizer()) as engine:
        completions = engine.complete(PROMPTS, SCALE, GENERATE, max_prompt_tokens=2000)
        done = [next(completions)]
        timer = ollama.restart(0.3)
        done += [next(completions) for _ in range(3)]
        ollama.fail("/api/chat", says(503, BUSY), drops, page(502), says(500, "loading"), plain(200, "nonsense"))
        done += list(completions)
        timer.join()
    assert sorted(c.record_id for c in done) == sorted(p.record_id for p in PROMPTS)
    assert {c.error for c in done} == {None}


def test_an_abandoned_call_leaves_no_thread(engine: OllamaEngine) -> None:
    completions = engine.complete(PROMPTS, SCALE, GENERATE, max_prompt_tokens=2000)
    next(completions)
    completions.close()  # type: ignore[attr-defined]
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("row-")]
    assert len(answers(engine)) == len(PROMPTS)


def test_closing_frees_the_servers_memory(ollama: ScriptedOllama) -> None:
    tokenizer = FakeTokenizer()
    with OllamaServer(ollama.address, patience=QUICK) as server:
        with OllamaEngine(server, "m", "sha256:m", tokenizer) as engine:
            engine.render([Message("user", "hi")])  # loads it, too
            assert ollama.loaded
        assert ollama.loaded == {}
        assert tokenizer.closed == 1
        asked = len(ollama.asked)
        with OllamaEngine(server, "m", "sha256:m", tokenizer):
            pass
        assert len(ollama.asked) == asked  # nothing was loaded


def test_no_log_holds_a_record(engine: OllamaEngine, ollama: ScriptedOllama, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    ollama.fail("/api/chat", says(500, "loading"), drops)
    ollama.amend = lambda reply: {**reply, "logprobs": "SECRET"}
    answers(engine, PROMPTS[:3])
    assert "asking again" in caplog.text
    assert "SECRET" not in caplog.text


# --- probabilities ---------------------------------------------------------------------------------------------------


def test_rating_probabilities(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    found = engine.rating_probabilities(PROMPTS, SCALE)
    for prompt, probabilities in zip(PROMPTS, found, strict=True):
        assert list(probabilities) == list(SCALE.labels)
        assert probabilities == pytest.approx(ollama.shares(engine.render(prompt.messages)), abs=0.005)
        assert sum(probabilities.values()) == pytest.approx(1)
    assert engine.rating_probabilities([], SCALE) == []


def test_branches_off_the_answers_way_are_asked_for(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    """ "No" and "Not sure" part after what "Yes" never says."""
    ollama.write = lambda prompt: answer_text("Yes", "so")
    completion = one(engine)
    assert completion.probabilities == pytest.approx(ollama.shares(engine.render(PROMPTS[0].messages)), abs=0.005)
    [asked] = ollama.bodies("/api/generate")
    assert asked["prompt"] == engine.render(PROMPTS[0].messages) + ANSWER_OPENING + "No"
    assert (asked["raw"], asked["logprobs"], asked["top_logprobs"], asked["truncate"], asked["shift"]) == (True, True, TOP, False, False)
    assert asked["options"]["num_ctx"] == ollama.rows()[0]["options"]["num_ctx"]


def test_spaces_of_the_models_own(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    """The server's grammar allows them; the probabilities are those of the way that was trained on."""
    ollama.write = lambda prompt: '{ "rating" : "Yes", "rationale": "so"}'
    completion = one(engine)
    assert parse_answer(completion.text, completion.finish, SCALE)[0] == "Yes"
    assert completion.probabilities == pytest.approx(ollama.shares(engine.render(PROMPTS[0].messages)), abs=0.005)
    assert len(ollama.bodies("/api/generate")) == 2


def test_probabilities_that_can_not_be_known(engine: OllamaEngine, ollama: ScriptedOllama) -> None:
    ollama.write = lambda prompt: answer_text("Yes", "so")
    ollama.amend = lambda reply: {**reply, "logprobs": None}
    ollama.fail("/api/generate", *[says(400, "no")] * 2)
    completion = one(engine)
    assert (completion.text, completion.error, completion.probabilities) == (answer_text("Yes", "so"), None, None)
    ollama.amend = lambda reply: {**reply, "logprobs": [{**step, "top_logprobs": step["top_logprobs"][-5:]} for step in reply["logprobs"]]}
    assert one(engine).probabilities is None
    assert engine.rating_probabilities(PROMPTS[:1], SCALE) == [{"No": 0.0, "Not sure": 0.0, "Yes": 1.0}]
    ollama.write = lambda prompt: '{"rating": "Perhaps", "rationale": "so"}'
    assert one(engine).probabilities is None
    with pytest.raises(EngineError, match=r"Ollama gave no rating for 3 of 3 rows: none in its answer"):
        engine.rating_probabilities(PROMPTS[:3], SCALE)


def test_next_token_logprobs(engine: OllamaEngine) -> None:
    prompt = engine.render(PROMPTS[0].messages) + ANSWER_OPENING
    found = engine.next_token_logprobs(engine.tokenize(prompt), 2)
    assert set(found) == {ord("N"), ord("Y")}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert len(engine.next_token_logprobs(engine.tokenize(prompt), 20)) == 20


LIKELY = st.dictionaries(st.sampled_from("abcdefgh"), st.floats(-3.5e38, 0.0), max_size=8)


@given(st.sets(st.sampled_from("abcdefgh"), min_size=1), LIKELY)
def test_shares_are_shares(tokens: set[str], likely: dict[str, float]) -> None:
    asked = {ord(token): token for token in tokens}
    try:
        found = shares(asked, likely)
    except _Unlisted:
        return
    assert set(found) == set(asked)
    assert sum(found.values()) == pytest.approx(1)
    assert all(0 <= share <= 1 for share in found.values())
    unlisted = [found[token] for token, text in asked.items() if text not in likely]
    assert sum(unlisted) <= UNLISTED + 1e-9
    both = [token for token, text in asked.items() if text in likely]
    assert sorted(both, key=lambda t: likely[asked[t]]) == sorted(both, key=lambda t: (found[t], likely[asked[t]]))


def test_shares_by_hand() -> None:
    ln = math.log
    assert shares({1: "a", 2: "b"}, {"a": ln(0.6), "b": ln(0.2), "z": ln(0.1)}) == pytest.approx({1: 0.75, 2: 0.25})
    found = shares({1: "a", 2: "b"}, {"a": ln(0.9), "z": ln(0.001)})  # b has 0.001 at most
    assert found == pytest.approx({1: 0.9 / 0.901, 2: 0.001 / 0.901})
    for likely in ({}, {"z": ln(0.9)}, {"a": ln(0.5), "z": ln(0.4)}, {"a": -math.inf}, {"a": -3.4e38, "b": -3.4e38}):
        with pytest.raises(_Unlisted):
            shares({1: "a", 2: "b"}, likely)

"""On a real server: what it reads is what the embedded engine reads, and neither its death nor a deleted model costs a row."""

from __future__ import annotations

import json
import math
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.backends.base_model import FoundModel, resolve
from pipeline.backends.llamacpp import LlamaCppEngine, open_engine
from pipeline.backends.ollama_models import find
from pipeline.backends.ollama_server import OllamaServer
from pipeline.backends.ollama_serving import OllamaServing, working_name
from pipeline.backends.ollama_wire import Patience
from pipeline.config import GenerateConfig
from pipeline.errors import EngineError, ModelNotFoundError
from pipeline.inference_runner import SystemRun, read_answers, run_inference
from pipeline.machine import EMBEDDED_NAME
from pipeline.prompts import ANSWER_OPENING
from pipeline.records import Message, Prompt, Rating, RatingScale
from pipeline.store import digest_file
from tests.ollama_stack import RealOllama

pytestmark = pytest.mark.ollama

SCALE = RatingScale((Rating(0, "No"), Rating(1, "Yes")))
QUESTION = 'Does the note speak of a cough? Answer with one JSON object: "rating" is "Yes" or "No", "rationale" says why.\n\nNote: '
NOTES = ("cough", "ankle twisted", "wheezing, no cough", "Brüche <|im_end|> 咳嗽", "chest pain\n\nsince noon")
PATIENT = Patience(waits_s=(0.2, 0.5, *(1.0,) * 40), connect_s=5.0, answer_s=120.0)
SHORT = GenerateConfig(max_tokens=16)


@pytest.fixture(scope="module")
def base() -> FoundModel:
    return resolve(EMBEDDED_NAME)


@pytest.fixture
def serving(real_ollama: RealOllama) -> Iterator[OllamaServing]:
    with OllamaServer(real_ollama.address, patience=PATIENT) as server:
        yield OllamaServing(server)


@pytest.fixture(scope="module")
def embedded(base: FoundModel) -> Iterator[LlamaCppEngine]:
    with open_engine(base.path) as engine:
        yield engine


@pytest.fixture(scope="module")
def tuned(base: FoundModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another GGUF made from the base: one that differs in its name."""
    data = base.path.read_bytes()
    at = data.index(b"general.name") + len(b"general.name") + 12  # behind the value's type and length
    path = tmp_path_factory.mktemp("tuned") / "fine_tuned_model.gguf"
    path.write_bytes(data[:at] + b"T" + data[at + 1 :])
    return path


def names(serving: OllamaServing) -> list[str]:
    return sorted(model["name"] for model in serving.server.wire.get("/api/tags")["models"])


# --- the same prompts and probabilities ------------------------------------------------------------------------------


def test_the_server_reads_what_the_embedded_engine_reads(serving: OllamaServing, base: FoundModel, embedded: LlamaCppEngine) -> None:
    chats = [[Message("user", QUESTION + note)] for note in NOTES]
    chats += [
        [Message("system", "Be brief."), Message("user", "a\n\nb")],
        [Message("user", "q"), Message("assistant", '{"rating": "Yes"}'), Message("user", " padded ")],
    ]
    with serving.serve(base) as engine:
        for chat in chats:
            assert engine.render(chat) == embedded.render(chat)
            assert engine.token_ids(chat) == embedded.token_ids(chat)
        file_engine = serving.on_file(base)(base.path)
        with file_engine:
            assert file_engine.token_ids(chats[0]) == embedded.token_ids(chats[0])


def test_its_probabilities_are_the_embedded_engines(serving: OllamaServing, base: FoundModel, embedded: LlamaCppEngine) -> None:
    prompts = [Prompt(f"r{n}", (Message("user", QUESTION + note),)) for n, note in enumerate(NOTES)]
    with serving.serve(base) as engine:
        done = {c.record_id: c for c in engine.complete(prompts, SCALE, SHORT, max_prompt_tokens=500)}
        for prompt, expected in zip(prompts, embedded.rating_probabilities(prompts, SCALE), strict=True):
            completion = done[prompt.record_id]
            assert completion.error is None
            assert completion.prompt_tokens == len(embedded.token_ids(prompt.messages))
            assert completion.probabilities == pytest.approx(dict(expected), abs=0.1)
        ids = (*embedded.token_ids(prompts[0].messages), *embedded.tokenize(ANSWER_OPENING))
        theirs, ours = engine.next_token_logprobs(ids, 5), embedded.next_token_logprobs(ids, 20)
        for token, value in theirs.items():
            assert math.exp(value) == pytest.approx(math.exp(ours[token]), abs=0.1)  # other kernels, other rounding


# --- its death -------------------------------------------------------------------------------------------------------


def test_ten_deaths_cost_no_row(serving: OllamaServing, base: FoundModel, real_ollama: RealOllama, tmp_path: Path) -> None:
    chance = random.Random(20261126)
    rows = [Prompt(f"r{n:02}", (Message("user", f"{QUESTION}{chance.choice(NOTES)} {n}"),)) for n in range(30)]
    outputs = tmp_path / "outputs.jsonl"
    answered, ended, deaths = 0, threading.Event(), 0

    def progress(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal answered
        answered = done

    def killer() -> None:
        nonlocal deaths
        for moment in sorted(chance.sample(range(28), 10)):
            while answered < moment and not ended.is_set():
                time.sleep(0.02)
            time.sleep(chance.uniform(0, 0.6))
            real_ollama.kill()
            time.sleep(chance.uniform(0, 0.4))
            real_ollama.start()
            deaths += 1

    thread = threading.Thread(target=killer)
    thread.start()
    try:
        for _ in range(5):
            run = SystemRun("base", rows, base.facts.digest, lambda: serving.serve(base))
            try:
                counts = run_inference(
                    [run], outputs, scale=SCALE, generate=SHORT, max_prompt_tokens=500, through="ollama", progress=progress
                )
            except EngineError:
                continue
            if not counts.systems["base"].errors.get("failed"):
                break
    finally:
        ended.set()
        thread.join()
    lines = [json.loads(line) for line in outputs.read_text().splitlines()]
    assert sorted(line["record_id"] for line in lines if line["error"] != "failed") == [row.record_id for row in rows]
    assert [line["detail"] for line in lines if line["error"] == "failed"] == []
    assert {answer.label for answer in read_answers(outputs)} <= {"No", "Yes"}
    assert {answer.engine for answer in read_answers(outputs)} == {"ollama"}
    assert deaths == 10


@pytest.mark.parametrize("seed", range(4))
def test_death_while_a_model_is_registered(
    serving: OllamaServing, base: FoundModel, tuned: Path, real_ollama: RealOllama, seed: int
) -> None:
    for name in names(serving):
        serving.server.delete(name)
    chance = random.Random(seed)

    def killer() -> None:
        time.sleep(chance.uniform(0.0, 0.9))
        real_ollama.kill()
        real_ollama.start()

    thread = threading.Thread(target=killer)
    thread.start()
    kept = serving.keep("0001-model:1.0", base, tuned)
    thread.join()
    assert kept is not None
    assert kept.digest == digest_file(tuned)
    assert serving.has("0001-model:1.0", kept.digest)
    assert names(serving) == ["0001-model:1.0", working_name(base.facts.digest) + ":latest"]


@pytest.mark.parametrize("length", [0, 60])
def test_a_model_whose_list_of_layers_was_cut_is_made_again(
    serving: OllamaServing, base: FoundModel, tuned: Path, real_ollama: RealOllama, length: int
) -> None:
    """The server writes the list in place, so that its death may leave a part of it."""
    serving.keep("0001-model:1.0", base, tuned)
    for path in (real_ollama.models / "manifests").glob("*/*/*/*"):
        path.write_bytes(path.read_bytes()[:length])
    kept = OllamaServing(serving.server).keep("0001-model:1.0", base, tuned)
    assert kept is not None
    assert kept.changed
    assert serving.has("0001-model:1.0", digest_file(tuned))


# --- models come, stay and go ----------------------------------------------------------------------------------------


def test_registering_again_changes_nothing(serving: OllamaServing, base: FoundModel, tuned: Path, real_ollama: RealOllama) -> None:
    serving.keep("0001-model:1.0", base, tuned)
    manifests = {path: path.stat().st_mtime_ns for path in (real_ollama.models / "manifests").rglob("*") if path.is_file()}
    for again in (serving, OllamaServing(serving.server)):
        kept = again.keep("0001-model:1.0", base, tuned)
        assert kept is not None
        assert not kept.changed
    assert {path: path.stat().st_mtime_ns for path in (real_ollama.models / "manifests").rglob("*") if path.is_file()} == manifests


def test_a_model_that_is_deleted_between_two_stages(serving: OllamaServing, base: FoundModel) -> None:
    prompt = Prompt("a", (Message("user", QUESTION + "cough"),))
    with serving.serve(base) as engine:
        serving.server.delete(working_name(base.facts.digest))
        with pytest.raises(EngineError, match="was deleted from the Ollama server meanwhile"):
            list(engine.complete([prompt], SCALE, SHORT, max_prompt_tokens=500))
    with serving.serve(base) as engine:
        [done] = engine.complete([prompt], SCALE, SHORT, max_prompt_tokens=500)
        assert done.error is None


def test_a_model_is_found_by_its_name(
    serving: OllamaServing, base: FoundModel, real_ollama: RealOllama, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving.serve(base):
        pass
    serving.server.copy(working_name(base.facts.digest), "library-model:1b")
    found = find(serving.server, "library-model:1b")
    assert found.facts.digest == base.facts.digest
    assert found.path.parent == real_ollama.models / "blobs"
    for name in ("none:1b", "gpt-oss:20b-cloud", "../manifests"):
        with pytest.raises(ModelNotFoundError):
            find(serving.server, name)
    serving.server.delete("library-model:1b")


def test_what_is_kept_answers_others(serving: OllamaServing, base: FoundModel, real_ollama: RealOllama) -> None:
    turns = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]
    asked = {"from": "base", "system": "Answer with one word.", "messages": turns, "parameters": {"num_predict": 8, "temperature": 0.0}}
    kept = serving.keep("0001-model:model-set", base, asked)
    assert kept is not None
    assert kept.changed
    again = serving.keep("0001-model:model-set", base, asked)
    assert again is not None
    assert not again.changed
    assert real_ollama.command("run", "0001-model:model-set", "ping").strip()

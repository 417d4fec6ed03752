"""A server is asked with patience, and every way in which its answer can be bad is told apart."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backends.ollama_server import OllamaServer, go_template, parameters_of
from pipeline.backends.ollama_wire import Patience, Refusal
from pipeline.errors import ArtifactError, EngineError, ModelNotFoundError, PipelineError
from pipeline.records import Message
from pipeline.store import digest_file
from tests.scripted_ollama import BUSY, DETECTED, Model, ScriptedOllama, drops, hangs, lines, page, plain, says

SECRET = "Patient X coughs"
ROW = {"model": "m", "messages": [{"role": "user", "content": SECRET}], "options": {"num_ctx": 512, "num_predict": 200}}
QUICK = Patience(waits_s=(0.01, 0.02, 0.02, 0.02), connect_s=2.0, answer_s=20.0)


@pytest.fixture
def ollama(tmp_path: Path) -> Iterator[ScriptedOllama]:
    with ScriptedOllama(tmp_path / "ollama") as double:
        double.models["m:latest"] = Model(double.add_blob(b"GGUF m"))
        yield double


@pytest.fixture
def server(ollama: ScriptedOllama) -> Iterator[OllamaServer]:
    with OllamaServer(ollama.address, patience=QUICK) as opened:
        yield opened


@pytest.fixture(autouse=True)
def _no_record_text(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Whatever goes wrong, no log above debug level holds a record's text."""
    caplog.set_level(logging.INFO)
    yield
    assert SECRET not in caplog.text


def failure(work: Callable[[], object]) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        work()
    assert SECRET not in str(caught.value) + caught.value.hint
    assert "HTTP 200" not in str(caught.value)
    return caught.value


# --- which server ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("version", "rewrites", "counts_cached"),
    [
        ("0.12.11", False, False),
        ("0.13.0-rc1", False, False),
        ("0.30.0", True, True),
        ("0.34.0", True, True),
        ("0.34.1", False, True),
        ("v0.34.2", False, True),
        ("1.0.0", False, True),
    ],
)
def test_versions_that_work(tmp_path: Path, version: str, rewrites: bool, counts_cached: bool) -> None:
    with ScriptedOllama(tmp_path / "o", version=version) as double, OllamaServer(double.address, patience=QUICK) as server:
        assert server.version_text == version
        assert (server.rewrites, server.counts_cached) == (rewrites, counts_cached)


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("0.9.6", "Ollama 0.9.6 at .* is too old: it gives no log-probabilities before 0.12.11"),
        ("0.12.10", "too old"),
        ("0.0.0", "calls its version '0.0.0', which tells nothing"),
        ("garbage", "'garbage', which tells nothing"),
        ("x" * 1000, "'x{40}', which tells nothing"),
        (None, "'None', which tells nothing"),
        (34, "'34', which tells nothing"),
    ],
)
def test_versions_that_do_not(tmp_path: Path, version: object, words: str) -> None:
    with ScriptedOllama(tmp_path / "o", version=version) as double:
        with pytest.raises(EngineError, match=words) as caught:
            OllamaServer(double.address, patience=QUICK)
        assert "install Ollama 0.12.11 or later" in caught.value.hint
        assert caught.value.exit_code == 3
        assert OllamaServer.if_there(double.address) is None


@pytest.mark.parametrize(
    "fault", [page(200), page(404), page(500), plain(200, "[]"), plain(200, "nonsense"), plain(301, "{}"), plain(401, '"Unauthorized"')]
)
def test_what_answers_is_not_ollama(ollama: ScriptedOllama, fault: object) -> None:
    ollama.fail("/api/version", *[fault] * 3)  # type: ignore[list-item]
    error = failure(lambda: OllamaServer(ollama.address, patience=QUICK))
    assert "is not an Ollama server" in str(error)
    assert ollama.address in str(error)
    assert "OLLAMA_HOST" in error.hint
    assert error.exit_code == 3


@pytest.mark.parametrize("address", ["http://[::1", "127.0.0.1:99999", "http://exa\x00mple"])
def test_an_address_that_is_none(address: str) -> None:
    error = failure(lambda: OllamaServer(address, patience=QUICK))
    assert "is no address of a server" in str(error)
    assert "OLLAMA_HOST" in error.hint


def test_the_address_comes_from_the_environment(ollama: ScriptedOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{ollama.port}")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # for the wide world, not for what runs beside
    with OllamaServer(patience=QUICK) as server:
        assert server.address == ollama.address
        server.copy("m", "n")  # through the package
    assert "n:latest" in ollama.models


def test_nobody_there(ollama: ScriptedOllama, caplog: pytest.LogCaptureFixture) -> None:
    ollama.stop()
    for address in (ollama.address, "nowhere.invalid"):
        error = failure(lambda address=address: OllamaServer(address, patience=QUICK))  # type: ignore[misc]
        assert "no Ollama server answers at http://" in str(error)
        assert "ollama serve" in error.hint
        assert "model.engine: embedded" in error.hint
    started = time.perf_counter()
    assert OllamaServer.if_there(ollama.address) is None
    assert time.perf_counter() - started < 2
    assert "no Ollama server is used" in caplog.text


def test_a_server_that_is_there_is_used_patiently(ollama: ScriptedOllama) -> None:
    server = OllamaServer.if_there(ollama.address)
    assert server is not None
    with server:
        assert server.wire.patience == Patience()


# --- tried again, or not ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("faults", "tries"),
    [
        ([says(500, "model runner has unexpectedly stopped")] * 2, 3),
        ([says(503, BUSY)] * 4, 5),
        ([says(500, BUSY)] * 4, 5),
        ([page(502)] * 4, 5),
        ([plain(429, "slow down")] * 4, 5),
        ([drops] * 4, 5),
        ([page(200), plain(200, "nonsense")], 3),
        ([says(500, "loading"), drops, says(503, BUSY), says(500, "loading")], 5),
    ],
)
def test_what_may_pass_is_asked_again(server: OllamaServer, ollama: ScriptedOllama, faults: list[object], tries: int) -> None:
    ollama.fail("/api/chat", *faults)  # type: ignore[arg-type]
    assert server.chat(ROW)["done"] is True
    assert len(ollama.rows()) == tries


@pytest.mark.parametrize(
    ("fault", "words", "hint", "tries"),
    [
        (says(500, "model runner has unexpectedly stopped"), r"Ollama failed \(HTTP 500\): model runner has", "out of memory", 3),
        (says(503, BUSY), r"stays busy or out of reach \(HTTP 503\)", "log", 5),
        (page(502), r"stays busy or out of reach \(HTTP 502\)", "log", 5),
        (drops, "broke off", "it goes on from here", 5),
        (plain(200, '{"error": "it went wrong"}'), "Ollama failed: it went wrong", "log", 3),
        (page(200), "is not an Ollama server, or a broken one: an HTML page", "a proxy in front", 3),
        (plain(200, "nonsense"), "or a broken one: 8 characters that are no JSON", "OLLAMA_HOST", 3),
        (plain(200, "[" * 100_000), "100000 characters that are no JSON", "OLLAMA_HOST", 3),
        (plain(200, "[1]"), "a JSON list instead of an object", "OLLAMA_HOST", 3),
        (plain(302, "{}"), "or a broken one: HTTP 302", "OLLAMA_HOST", 3),
        (says(400, "invalid format"), r"Ollama refused the request \(HTTP 400\): invalid format", "", 1),
        (page(403), r"refused the request \(HTTP 403\): no reason given", "a proxy in front", 1),
        (says(404, "model 'm' not found"), "m: was deleted from the Ollama server meanwhile", "run again", 1),
        (says(500, "prediction aborted, token repeat limit reached"), "token repeat limit", "", 1),
        (says(500, "write /x: no space left on device"), "the disk of the Ollama server at .* is full", "free some space", 1),
        (plain(200, '{"error": {"message": "nested", "code": 500}}'), "Ollama failed: nested", "log", 3),
        (says(400, '{"error":{"code":400,"message":"llama.cpp\'s"}}'), "HTTP 400.: llama.cpp's$", "", 1),
        (says(500, ""), "no reason given", "log", 3),
    ],
)
def test_what_does_not_pass_is_told(server: OllamaServer, ollama: ScriptedOllama, fault: object, words: str, hint: str, tries: int) -> None:
    ollama.fail("/api/chat", *[fault] * 6)  # type: ignore[list-item]
    with pytest.raises(EngineError, match=words) as caught:
        server.chat(ROW)
    assert hint in caught.value.hint
    assert SECRET not in str(caught.value)
    assert caught.value.exit_code == 3
    assert len(ollama.bodies("/api/chat")) == tries


def test_a_silent_server_is_asked_twice(ollama: ScriptedOllama) -> None:
    with OllamaServer(ollama.address, patience=QUICK) as server:
        pass
    with OllamaServer(ollama.address, patience=Patience(waits_s=(0.01,) * 5, answer_s=0.3)) as server:
        ollama.fail("/api/chat", *[hangs(1.0)] * 3)
        error = failure(lambda: server.chat(ROW))
    assert "gave no answer in 0 s" in str(error)
    assert "run again" in error.hint
    assert len(ollama.rows()) == 2


def test_a_content_encoding_that_is_a_lie(server: OllamaServer, ollama: ScriptedOllama) -> None:
    def lie(handler) -> None:  # type: ignore[no-untyped-def]
        handler.send_response(200)
        handler.send_header("Content-Encoding", "gzip")
        handler.send_header("Content-Length", "8")
        handler.end_headers()
        handler.wfile.write(b"no gzip!")

    ollama.fail("/api/chat", *[lie] * 3)
    assert "is not an Ollama server, or a broken one" in str(failure(lambda: server.chat(ROW)))


def test_a_restart_is_waited_for(ollama: ScriptedOllama, caplog: pytest.LogCaptureFixture) -> None:
    with OllamaServer(ollama.address, patience=Patience(waits_s=(0.05,) * 60)) as server:
        assert server.chat(ROW)["done"] is True  # a connection is open
        timer = ollama.restart(0.3)
        assert server.chat(ROW)["done"] is True
        timer.join()
    assert "asking again in" in caplog.text


def test_a_restart_that_takes_too_long(server: OllamaServer, ollama: ScriptedOllama) -> None:
    ollama.stop()
    assert "no Ollama server answers" in str(failure(lambda: server.chat(ROW)))
    assert "no Ollama server answers" in str(failure(lambda: server.copy("m", "n")))


def test_waits_grow_and_spread(ollama: ScriptedOllama, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    with OllamaServer(ollama.address) as server:
        monkeypatch.setattr(time, "sleep", waited.append)
        ollama.fail("/api/show", *[says(503, BUSY)] * 20)
        failure(lambda: server.show("m"))
    plan = Patience().waits_s
    assert len(waited) == len(plan)
    assert all(0.75 * due <= took <= 1.25 * due for took, due in zip(waited, plan, strict=True))
    assert 90 < sum(plan) < 180


def test_unloading_is_tried_once(server: OllamaServer, ollama: ScriptedOllama) -> None:
    server.chat({**ROW, "messages": []})
    assert list(ollama.loaded) == ["m:latest"]
    server.unload("m")
    assert ollama.loaded == {}
    assert ollama.bodies("/api/chat")[-1] == {"model": "m", "messages": [], "keep_alive": 0}
    ollama.fail("/api/chat", *[says(503, BUSY)] * 3)
    asked = len(ollama.asked)
    server.unload("m")
    assert len(ollama.asked) == asked + 1
    ollama.stop()
    server.unload("m")  # says nothing, waits for nobody


# --- what is asked and read ------------------------------------------------------------------------------------------


def test_half_a_character_reaches_the_server(server: OllamaServer, ollama: ScriptedOllama) -> None:
    server.chat({**ROW, "messages": [{"role": "user", "content": "half \ud83d of one, ü 咳"}]})
    assert ollama.rows()[-1]["messages"][0]["content"] == "half \ud83d of one, ü 咳"


def test_how_a_prompt_is_rendered(server: OllamaServer, ollama: ScriptedOllama) -> None:
    assert server.render("m", [Message("user", "hi")], {"num_ctx": 512}, "10s") == "<user>hi<assistant>"
    asked = ollama.bodies("/api/chat")[-1]
    assert (asked["think"], asked["truncate"], asked["shift"], asked["stream"]) == (False, False, False, False)
    assert (asked["options"], asked["keep_alive"]) == ({"num_ctx": 512}, "10s")
    ollama.fail("/api/chat", plain(200, '{"_debug_info": 1}'), plain(200, '{"message": {"content": "hello"}}'))
    assert server.render("m", [Message("user", "hi")], {}, "10s") is None
    assert server.render("m", [Message("user", "hi")], {}, "10s") is None


def test_a_model_as_it_is_served(server: OllamaServer, ollama: ScriptedOllama) -> None:
    digest, picture = ollama.add_blob(b"GGUF"), ollama.add_blob(b"GGUF picture")
    ollama.models["x:1"] = Model(
        digest, system="Be brief.", parameters={"stop": ["<|end|>", 'a "b"'], "num_ctx": 4096}, license="MIT License", projector=picture,
        messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}), renderer="qwen3", parser="qwen3",
    )  # fmt: skip
    found = server.show("x:1")
    assert found is not None
    assert (found.digest, found.file) == (digest, str(ollama.blob(digest)))
    assert (found.template, found.system, found.license) == (DETECTED, "Be brief.", "MIT License")
    assert found.parameters == {"stop": ["<|end|>", 'a "b"'], "num_ctx": 4096}
    assert (found.format, found.capabilities, found.has_projector, found.has_adapter) == ("gguf", {"completion"}, True, False)
    assert found.messages[1] == {"role": "assistant", "content": "a"}
    assert found.manner == {
        "template": DETECTED, "system": "Be brief.", "messages": found.messages, "renderer": "qwen3", "parser": "qwen3",
        "parameters": found.parameters,
    }  # fmt: skip
    ollama.models["y:1"] = Model(digest, template="{% for m in messages %}{% endfor %}", adapter=picture)
    other = server.show("y:1")
    assert other is not None
    assert (other.template, other.system, other.has_projector, other.has_adapter) == (None, None, False, True)


def test_models_that_are_not_there(server: OllamaServer, ollama: ScriptedOllama) -> None:
    assert server.show("none") is None
    assert server.show("../none") is None
    ollama.fail("/api/show", *[says(500, "unexpected EOF")] * 3)  # its list was being written when the server was killed
    assert server.show("m") is None
    ollama.fail("/api/show", says(403, "ollama cloud is disabled"))
    assert failure(lambda: server.show("m:cloud")).exit_code == 3


def test_models_in_memory(server: OllamaServer) -> None:
    assert server.loaded() == []
    server.chat(ROW)
    assert server.loaded() == [{"name": "m:latest", "context_length": 512}]


def test_copies_and_deletes(server: OllamaServer, ollama: ScriptedOllama) -> None:
    server.copy("m", "n:2")
    assert ollama.models["n:2"] == ollama.models["m:latest"]
    server.delete("n:2")
    server.delete("n:2")  # nothing to do
    assert list(ollama.models) == ["m:latest"]
    with pytest.raises(Refusal, match=r"HTTP 404\): model 'none' not found"):
        server.copy("none", "n")


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (plain(500, "[]"), "no JSON object"),
        (plain(500, "null"), "no JSON object"),
        (page(500), r"HTTP 500\): an HTML page"),
        (page(502), r"HTTP 502"),
        (says(500, {"message": "nested"}), "nested"),
        (says(409, "taken"), r"refused the request \(HTTP 409\): taken"),
    ],
)
def test_bad_answers_to_the_package(server: OllamaServer, ollama: ScriptedOllama, fault: object, words: str) -> None:
    ollama.fail("/api/copy", *[fault] * 5)  # type: ignore[list-item]
    with pytest.raises(EngineError, match=words):
        server.copy("m", "n")


# --- pulling ---------------------------------------------------------------------------------------------------------


def test_pulling(server: OllamaServer, ollama: ScriptedOllama) -> None:
    ollama.registry["new:1b"] = Model(ollama.add_blob(b"GGUF new"))
    seen: list[tuple[str, int, int, str]] = []
    server.pull("new:1b", lambda stage, done, total, note="": seen.append((stage, done, total, note)))
    assert "new:1b" in ollama.models
    assert ("pull", 2, 4, "new:1b, MiB: pulling 0123") in seen


def test_pulling_goes_on_after_a_break(server: OllamaServer, ollama: ScriptedOllama) -> None:
    ollama.registry["new:1b"] = Model(ollama.add_blob(b"GGUF new"))
    ollama.fail("/api/pull", drops, lines({"status": "pulling manifest"}), lines({"status": "pulling"}, {"error": "EOF"}))
    server.pull("new:1b")
    assert len(ollama.bodies("/api/pull")) == 4


def test_pulling_what_the_registry_does_not_have(server: OllamaServer, ollama: ScriptedOllama) -> None:
    with pytest.raises(ModelNotFoundError, match="nope: the registry has no such model") as caught:
        server.pull("nope")
    assert "ollama.com/library" in caught.value.hint
    assert caught.value.exit_code == 2
    assert len(ollama.bodies("/api/pull")) == 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (
            lines({"status": "pulling manifest"}, {"error": 'Get "https://registry": no such host'}),
            "m: the server could not pull it: .*no such host",
        ),
        (lines({"status": "pulling"}, {"error": "write /x: no space left on device"}), "the disk of the Ollama server at .* is full"),
        (lines({"status": "pulling"}, rest="[]\n"), "no JSON object"),
        (lines({"status": "pulling"}, rest="{torn"), "no JSON object"),
        (lines({"status": "pulling"}, {"error": {"message": "an object"}}), "an object|no JSON object"),
        (page(200), "no JSON object"),
    ],
)
def test_pulling_fails(server: OllamaServer, ollama: ScriptedOllama, fault: object, words: str) -> None:
    ollama.fail("/api/pull", *[fault] * 5)  # type: ignore[list-item]
    with pytest.raises(EngineError, match=words) as caught:
        server.pull("m")
    assert caught.value.hint


# --- creating --------------------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path: Path) -> tuple[Path, str]:
    path = tmp_path / "new.gguf"
    path.write_bytes(b"GGUF new")
    return path, digest_file(path)


def create(server: OllamaServer, file: tuple[Path, str]) -> None:
    server.create({"model": "new", "files": {"model.gguf": file[1]}}, uploads={file[1]: file[0]})


def test_a_file_is_sent_once(server: OllamaServer, ollama: ScriptedOllama, file: tuple[Path, str]) -> None:
    create(server, file)
    create(server, file)
    assert ollama.models["new:latest"].digest == file[1]
    assert [path for path, _ in ollama.asked if "blobs" in path] == ["HEAD /api/blobs", "POST /api/blobs", "HEAD /api/blobs"]


@pytest.mark.parametrize(
    "fault", [drops, lines({"status": "parsing GGUF"}), lines({"status": "parsing GGUF"}, rest='{"sta'), says(500, "unexpected"), page(502)]
)
def test_a_creation_that_is_cut_is_done_again(server: OllamaServer, ollama: ScriptedOllama, file: tuple[Path, str], fault: object) -> None:
    ollama.fail("/api/create", *[fault] * 2)  # type: ignore[list-item]
    create(server, file)
    assert ollama.models["new:latest"].digest == file[1]
    assert len(ollama.bodies("/api/create")) == 3


def test_a_file_that_a_restart_cleared_away_is_sent_again(server: OllamaServer, ollama: ScriptedOllama, file: tuple[Path, str]) -> None:
    """Servers clear away files of which no model was made when they start."""

    def killed(handler) -> None:  # type: ignore[no-untyped-def]
        ollama.blob(file[1]).unlink()
        drops(handler)

    ollama.fail("/api/create", killed)
    create(server, file)
    assert ollama.models["new:latest"].digest == file[1]
    assert [path for path, _ in ollama.asked].count("POST /api/blobs") == 2


def test_creations_that_fail(server: OllamaServer, ollama: ScriptedOllama, file: tuple[Path, str], tmp_path: Path) -> None:
    ollama.fail("/api/create", *[lines({"status": "parsing GGUF"}, {"error": "invalid file magic"})] * 3)
    assert "Ollama failed: invalid file magic" in str(failure(lambda: create(server, file)))
    ollama.fail("/api/create", says(400, "invalid model name"))
    assert "HTTP 400): invalid model name" in str(failure(lambda: create(server, file)))
    ollama.blob(file[1]).unlink()
    full = says(500, "write /models/blobs/sha256-1234: no space left on device")
    ollama.fail("/api/blobs", plain(404, "{}"), full)
    error = failure(lambda: create(server, file))
    assert f"the disk of the Ollama server at {ollama.address} is full" in str(error)
    assert "free some space" in error.hint
    ollama.fail("/api/create", lines({"status": "parsing GGUF"}, {"error": "no space left on device"}))
    assert "is full" in str(failure(lambda: create(server, file)))


def test_a_file_that_changes_or_goes(server: OllamaServer, file: tuple[Path, str]) -> None:
    path, digest = file
    path.write_bytes(b"GGUF other")
    assert "new.gguf: changed while it was sent" in str(failure(lambda: create(server, (path, digest))))
    path.unlink()
    error = failure(lambda: create(server, file))
    assert isinstance(error, ArtifactError)
    assert "No such file" in str(error)


# --- pure ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", {}),
        ('stop            "<|im_start|>"\nstop            "<|im_end|>"', {"stop": ["<|im_start|>", "<|im_end|>"]}),
        ('stop   "\\n"', {"stop": ["\n"]}),
        ("num_ctx   4096\ntemperature  0.7\nuse_mmap true", {"num_ctx": 4096, "temperature": 0.7, "use_mmap": True}),
        ("num_predict  1.048576e+06", {"num_predict": 1048576}),
        ('stop   "\\x00 not JSON"', {"stop": ["\\x00 not JSON"]}),
        ("name\n   \nother   ", {}),
        ("mirostat 1\nmirostat 2", {"mirostat": [1, 2]}),
    ],
)
def test_parameters_of(text: str, found: dict[str, object]) -> None:
    assert parameters_of(text) == found


@given(
    st.dictionaries(st.sampled_from(["temperature", "num_ctx", "top_k", "use_mmap"]), st.integers() | st.booleans()),
    st.lists(st.text(st.characters(min_codepoint=32, max_codepoint=126)), min_size=1, max_size=4),
)
def test_parameters_survive_the_way(values: dict[str, object], stops: list[str]) -> None:
    written = [f"{name:<30} {str(value).lower()}" for name, value in values.items()]
    quoted = ['"' + stop.replace("\\", "\\\\").replace('"', '\\"') + '"' for stop in stops]
    assert parameters_of("\n".join([*written, *(f"{'stop':<30} {stop}" for stop in quoted)])) == {**values, "stop": stops}


@given(st.text())
def test_any_text_of_parameters_is_read(text: str) -> None:
    assert all(name for name in parameters_of(text))


@pytest.mark.parametrize("text", ["", "  \n", "{{ .Prompt }}", " {{ .Prompt }}\n", "{% if x %}{{ x }}{% endif %}", "{%- set a = 1 %}"])
def test_no_template_of_the_servers_own(text: str) -> None:
    assert go_template(text) is None


@pytest.mark.parametrize("text", [DETECTED, "{{ .System }} {{ .Prompt }}", "<|user|>{{ .Prompt }}"])
def test_a_template_of_the_servers_own(text: str) -> None:
    assert go_template(text) == text


def test_a_port_that_never_answers(ollama: ScriptedOllama) -> None:
    """A listener that accepts and says nothing is told from one that is not there."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        error = failure(lambda: OllamaServer(address, patience=Patience(waits_s=(0.01,), answer_s=0.2)))
    assert "gave no answer" in str(error)

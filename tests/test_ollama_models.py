"""The GGUF behind a name, or why there is none; names for GGUFs that were made here, never over another one's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.backends import ollama_serving
from pipeline.backends.base_model import resolve
from pipeline.backends.ollama_models import ServedModel, _license, find, may_be_name
from pipeline.backends.ollama_server import OllamaServer
from pipeline.backends.ollama_serving import _MARK, OllamaServing, default_system, working_name
from pipeline.backends.ollama_wire import Patience
from pipeline.config import GenerateConfig
from pipeline.errors import ArtifactError, EngineError, ModelNotFoundError, PipelineError, UserError
from pipeline.records import Message, Prompt, Rating, RatingScale
from pipeline.store import digest_file
from tests.fakes import FakeTokenizer
from tests.scripted_ollama import Model, ScriptedOllama, drops, lines, says
from tests.test_base_model import write_gguf

QUICK = Patience(waits_s=(0.01, 0.02, 0.02, 0.02), connect_s=2.0, answer_s=20.0)
SCALE = RatingScale((Rating(0, "No"), Rating(1, "Yes")))
HELLO = [Message("user", "hello")]


@pytest.fixture
def ollama(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedOllama]:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    with ScriptedOllama(tmp_path / "ollama", labels=SCALE.labels) as double:
        yield double


@pytest.fixture
def server(ollama: ScriptedOllama) -> Iterator[OllamaServer]:
    with OllamaServer(ollama.address, patience=QUICK) as opened:
        yield opened


def gguf_bytes(folder: Path, **keys: object) -> bytes:
    path = write_gguf(folder / "made.gguf", **keys)
    data = path.read_bytes()
    path.unlink()
    return data


def put(ollama: ScriptedOllama, name: str = "small:1b", **facts: Any) -> Model:
    """A model that the server has."""
    ollama.models[name] = Model(ollama.add_blob(gguf_bytes(ollama.folder)), **facts)
    return ollama.models[name]


def refused(server: OllamaServer, name: str, **settings: Any) -> PipelineError:
    with pytest.raises(PipelineError) as caught:
        find(server, name, **settings)
    assert caught.value.hint
    return caught.value


# --- finding ---------------------------------------------------------------------------------------------------------


def test_the_gguf_behind_a_name(server: OllamaServer, ollama: ScriptedOllama, tmp_path: Path) -> None:
    model = put(ollama, license="Apache License\n   Version 2.0, January 2004", system="Be brief.")
    found = find(server, "small:1b")
    assert found.path == ollama.blob(str(model.digest))
    assert (found.facts.name, found.facts.digest, found.facts.license) == ("small:1b", model.digest, "apache-2.0")
    assert found.facts == dataclasses.replace(resolve(str(found.path)).facts, name="small:1b", license="apache-2.0")
    assert found.why_untrainable is None
    assert found.served is not None
    assert found.served.system == "Be brief."


def test_where_the_servers_folder_is_seen_from_here(
    server: OllamaServer, ollama: ScriptedOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digest = str(put(ollama).digest)
    mounted = tmp_path / "mounted"
    (mounted / "blobs").mkdir(parents=True)
    ollama.blob(digest).rename(mounted / "blobs" / ollama.blob(digest).name)
    error = refused(server, "small:1b")
    assert isinstance(error, ModelNotFoundError)
    assert f"has it in {ollama.folder / 'blobs'}, which can't be read from here" in str(error)
    assert "set OLLAMA_MODELS" in error.hint
    monkeypatch.setenv("OLLAMA_MODELS", str(mounted))
    assert find(server, "small:1b").path.parent == mounted / "blobs"
    monkeypatch.setenv("OLLAMA_MODELS", "")
    home = tmp_path / "home" / ".ollama"
    home.mkdir(parents=True)
    mounted.rename(home / "models")
    assert find(server, "small:1b").path.parent == home / "models" / "blobs"


def test_a_file_that_is_not_what_its_name_says(server: OllamaServer, ollama: ScriptedOllama) -> None:
    digest = str(put(ollama).digest)
    with ollama.blob(digest).open("ab") as blob:
        blob.write(b"more")
    error = refused(server, "small:1b")
    assert isinstance(error, ArtifactError)
    assert error.exit_code == 4
    assert "another SHA-256 than its name says" in str(error)
    assert "`ollama pull small:1b`" in error.hint
    assert find(server, "small:1b", verify=False).facts.digest == digest
    ollama.blob(digest).write_bytes(b"GGUF torn")
    assert isinstance(refused(server, "small:1b", verify=False), ArtifactError)


@pytest.mark.parametrize(
    ("facts", "words"),
    [
        (
            {"remote_host": "https://ollama.com:443"},
            "runs in the cloud at https://ollama.com:443, so there is no file to train and records",
        ),
        ({"format": "safetensors"}, "has no GGUF (its format is safetensors: safetensors run in MLX)"),
        ({"format": ""}, "has no GGUF (its format is unknown"),
        ({"digest": None}, "has no GGUF"),
        ({"capabilities": ("embedding",)}, "writes no text, it can do: embedding"),
        ({"capabilities": ("image", "vision")}, "writes no text, it can do: image, vision"),
        ({"adapter": "sha256:" + "1" * 64}, "is a GGUF with an adapter on top"),
    ],
)
def test_models_that_can_be_no_base(server: OllamaServer, ollama: ScriptedOllama, facts: dict[str, Any], words: str) -> None:
    ollama.models["small:1b"] = dataclasses.replace(put(ollama), **facts)
    error = refused(server, "small:1b")
    assert isinstance(error, ModelNotFoundError)
    assert error.exit_code == 2
    assert words in str(error)
    assert str(error).startswith("small:1b: ")


def test_a_model_with_an_image_part_serves_and_is_not_trained(server: OllamaServer, ollama: ScriptedOllama) -> None:
    put(ollama, projector="sha256:" + "1" * 64)
    assert "has an image part (a projector)" in str(find(server, "small:1b").why_untrainable)


def test_a_gguf_that_is_something_else(server: OllamaServer, ollama: ScriptedOllama) -> None:
    ollama.models["part:1"] = Model(ollama.add_blob(gguf_bytes(ollama.folder, split__count=3)))
    error = refused(server, "part:1")
    assert isinstance(error, UserError)
    assert "one part of 3" in str(error)


def test_a_server_that_says_no_capabilities(server: OllamaServer, ollama: ScriptedOllama) -> None:
    put(ollama, capabilities=())
    assert find(server, "small:1b").facts.name == "small:1b"


@pytest.mark.parametrize("name", ["gpt-oss:20b-cloud", "gpt-oss:cloud", "deepseek:671B-CLOUD"])
def test_models_of_the_cloud_are_not_even_asked_for(server: OllamaServer, ollama: ScriptedOllama, name: str) -> None:
    asked = len(ollama.asked)
    assert "runs in the cloud" in str(refused(server, name, allow_pull=True))
    assert len(ollama.asked) == asked


def test_a_server_whose_cloud_is_switched_off(server: OllamaServer, ollama: ScriptedOllama) -> None:
    ollama.fail("/api/show", says(403, "ollama cloud is disabled: remote model details are unavailable"), says(403, "who are you"))
    assert "runs in the cloud" in str(refused(server, "stub:1b"))
    with pytest.raises(EngineError, match="who are you"):
        find(server, "stub:1b")


NO_NAMES = [
    "", " ", "a b", "../../etc/passwd", "..", "a/../b", "/etc/passwd", "a//b", "a:", ":a", "a\x00b", "a\nb", "a" * 1000, "x:" + "y" * 81,
    "-a", ".a", "a:b:c", "a/b/c/d", "model.gguf", "hf.co/owner/repo/model.GGUF", "C:\\models\\x", "http://host/x", "ünï", "a%2e%2e",
    "host/own.er/m",
]  # fmt: skip
NAMES = [
    "llama3.2:1b", "smollm2", "a", "_a", "hf.co/owner/repo:Q4_K_M", "owner/model:tag", "localhost:5000/owner/model",
    "0001-model-1.1.1.0:q8",
    "registry.ollama.ai/library/smollm2:135m", "x" * 80,
]  # fmt: skip


@pytest.mark.parametrize("name", NO_NAMES)
def test_what_can_be_no_name(server: OllamaServer, ollama: ScriptedOllama, name: str) -> None:
    assert not may_be_name(name)
    asked = len(ollama.asked)
    error = refused(server, name, allow_pull=True)
    assert isinstance(error, ModelNotFoundError)
    assert "not a name that Ollama allows" in str(error)
    assert len(str(error)) < 300
    assert len(ollama.asked) == asked


@pytest.mark.parametrize("name", NAMES)
def test_what_can_be_a_name(name: str) -> None:
    assert may_be_name(name)


@given(st.text(max_size=200))
def test_names_never_leave_their_folder(text: str) -> None:
    if may_be_name(text):
        assert ".." not in text.split("/")
        assert not set(text) & set(" \\\x00\n%?#")
        assert not text.startswith("/")


def test_pulling_is_allowed_or_not(server: OllamaServer, ollama: ScriptedOllama) -> None:
    model = put(ollama)
    ollama.registry["small:1b"] = ollama.models.pop("small:1b")
    error = refused(server, "small:1b")
    assert isinstance(error, ModelNotFoundError)
    assert f"small:1b: the Ollama server at {ollama.address} has no such model" in str(error)
    assert "`ollama pull small:1b`" in error.hint
    assert ollama.bodies("/api/pull") == []
    seen: list[str] = []
    found = find(server, "small:1b", allow_pull=True, progress=lambda stage, done, total, note="": seen.append(note))
    assert found.facts.digest == model.digest
    assert any("small:1b" in note for note in seen)
    find(server, "small:1b", allow_pull=True)
    assert len(ollama.bodies("/api/pull")) == 1
    assert "the registry has no such model" in str(refused(server, "none:1b", allow_pull=True))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("                 Apache License\n           Version 2.0, January 2004", "apache-2.0"),
        ("MIT License\n\nCopyright (c) 2024", "mit"),
        ("Permission is hereby granted, free of charge, to any", "mit"),
        ("LLAMA 3.3 COMMUNITY LICENSE AGREEMENT", "llama3.3"),
        ("LLAMA 3.2 COMMUNITY\nLICENSE AGREEMENT", "llama3.2"),
        ("META LLAMA 3 COMMUNITY LICENSE AGREEMENT", "llama3"),
        ("LLAMA 2 COMMUNITY LICENSE AGREEMENT", "llama2"),
        ("Gemma Terms of Use", "gemma"),
        ("permit licensees", None),
        ("", None),
        (None, None),
    ],
)
def test_licences(text: str | None, name: str | None) -> None:
    assert _license(text) == name


# --- registering: a base from its file -------------------------------------------------------------------------------


class Desk:
    """A serving on the double, with files; the engine in this process is a FakeTokenizer."""

    def __init__(self, server: OllamaServer, ollama: ScriptedOllama, folder: Path) -> None:
        self.serving, self.ollama, self.folder = OllamaServing(server), ollama, folder
        self.system = ""  # what the file's own template puts in
        self.opened: list[tuple[Path, Any]] = []
        self.base_file = write_gguf(folder / "base.gguf")
        self.base = resolve(str(self.base_file))
        self.tuned = write_gguf(folder / "tuned.gguf", general__name="tuned")
        self.digest = digest_file(self.tuned)

    def open_engine(self, path: Path, **settings: Any) -> FakeTokenizer:
        tokenizer = FakeTokenizer(digest_file(path), system=self.system)
        self.opened.append((path, settings.get("render")))
        return tokenizer

    def created(self) -> list[dict[str, Any]]:
        return self.ollama.bodies("/api/create")


@pytest.fixture
def desk(server: OllamaServer, ollama: ScriptedOllama, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Desk:
    (tmp_path / "files").mkdir()
    made = Desk(server, ollama, tmp_path / "files")
    monkeypatch.setattr(ollama_serving, "open_engine", made.open_engine)
    return made


def served_base(desk: Desk, **facts: Any) -> ServedModel:
    put(desk.ollama, **facts)
    return find(desk.serving.server, "small:1b")


def test_a_base_is_served_from_its_file(desk: Desk) -> None:
    with desk.serving.serve(desk.base) as engine:
        assert engine.model_digest == desk.base.facts.digest
        [done] = engine.complete([Prompt("a", (Message("user", "hi"),))], SCALE, GenerateConfig(), max_prompt_tokens=500)
        assert done.error is None
    name = working_name(desk.base.facts.digest)
    assert desk.created() == [{"model": name, "files": {"model.gguf": desk.base.facts.digest}, "stream": True}]
    with desk.serving.serve(desk.base), OllamaServing(desk.serving.server).serve(desk.base):
        assert len(desk.created()) == 1


def test_the_system_text_of_the_files_template_is_given_to_the_server(desk: Desk) -> None:
    desk.system = "You are a helpful assistant."
    with desk.serving.serve(desk.base) as engine:
        assert engine.render(HELLO) == FakeTokenizer(system=desk.system).render(HELLO)
    name = working_name(desk.base.facts.digest)
    assert desk.created()[1] == {"model": name, "from": name, "system": desk.system, "stream": True}
    with OllamaServing(desk.serving.server).serve(desk.base):
        assert len(desk.created()) == 2  # the same again changes nothing


def test_a_template_that_refuses_system_messages(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = FakeTokenizer.render

    def render(self: FakeTokenizer, messages: Sequence[Message]) -> str:
        if messages[0].role == "system":
            raise EngineError("llama.cpp's /apply-template failed: System role not supported")
        return "<bos>" + plain(self, messages)

    monkeypatch.setattr(FakeTokenizer, "render", render)
    with desk.serving.serve(desk.base) as engine:
        assert engine.render(HELLO) == "<user>hello<assistant>"  # as the server has it; the parity stage compares
    assert len(desk.created()) == 1


def test_a_base_that_was_deleted_is_registered_anew(desk: Desk) -> None:
    with desk.serving.serve(desk.base):
        pass
    desk.ollama.models.clear()
    with desk.serving.serve(desk.base):
        assert list(desk.ollama.models) == [working_name(desk.base.facts.digest) + ":latest"]


def test_a_server_that_does_not_tell_its_prompts(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    base = served_base(desk)
    desk.ollama.fail("/api/chat", lines({"message": {"content": "hi"}, "done": True}))
    desk.serving.on_file(base)(desk.tuned)
    assert desk.opened == [(desk.tuned, None)]  # by the file's own template
    assert "Ollama 0.34.2 does not tell how it renders a prompt: only its length is checked" in caplog.text


def test_engines_in_this_process_read_what_the_server_would(desk: Desk) -> None:
    base = served_base(desk, system="Be brief.")
    desk.serving.on_file(base)(desk.tuned)
    [(path, render)] = desk.opened
    assert path == desk.tuned
    assert render(HELLO) == "<system>Be brief.<user>hello<assistant>"
    assert desk.ollama.bodies("/api/chat")[-1]["keep_alive"] == "10s"
    asked = len(desk.ollama.asked)
    assert render(HELLO).endswith("hello<assistant>")
    assert len(desk.ollama.asked) == asked  # each chat is rendered once
    other = [Message("user", "other")]
    desk.ollama.fail("/api/chat", lines({"message": {"content": "hi"}, "done": True}))
    with pytest.raises(EngineError, match="Ollama does not tell any more how it renders a prompt"):
        render(other)
    del desk.ollama.models["small:1b"]
    with pytest.raises(EngineError, match="small:1b: was deleted from the Ollama server"):
        render(other)


def test_a_base_of_the_servers_own(desk: Desk) -> None:
    base = served_base(desk)
    with desk.serving.serve(base) as engine:
        assert engine.render(HELLO) == "<user>hello<assistant>"
    assert desk.created() == []
    put(desk.ollama).digest = desk.ollama.add_blob(b"GGUF another")
    with pytest.raises(EngineError, match="small:1b: means another model on the Ollama server than when it was looked for"):
        desk.serving.serve(base)
    del desk.ollama.models["small:1b"]
    with pytest.raises(EngineError, match="small:1b: was deleted") as caught:
        desk.serving.serve(base)
    assert "run again" in caught.value.hint


def test_the_manner_is_what_decides_prompts(desk: Desk) -> None:
    assert desk.serving.manner(desk.base) is None
    manners = [
        desk.serving.manner(served_base(desk, **facts)) for facts in ({}, {}, {"system": "S"}, {"template": "{{ .X }}"}, {"renderer": "r"})
    ]
    assert manners[0] == manners[1]
    assert len(set(manners)) == 4


# --- registering: what was made here ---------------------------------------------------------------------------------

TURNS = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
LIKE = {
    "template": "{{- range .Messages }}<{{ .Role }}>{{ .Content }}{{ end }}<assistant>{{/* the base's */}}",
    "system": "Be brief.",
    "parameters": {"stop": ["<|end|>", "<|x|>"], "temperature": 0.7},
    "license": "MIT License",
    "renderer": "qwen3",
    "parser": "qwen3",
}


def test_a_fine_tuned_model_gets_what_its_base_has(desk: Desk) -> None:
    base = served_base(desk, messages=TURNS, **LIKE)
    with desk.serving.serve(base, desk.tuned) as engine:
        assert engine.model_digest == desk.digest
        assert engine.render(HELLO) == "<system>Be brief.<user>q<assistant>a<user>hello<assistant>"
    [body] = desk.created()
    name = working_name(desk.digest)
    assert body == {"model": name, "files": {"model.gguf": desk.digest}, "stream": True, "messages": list(TURNS), **LIKE}
    assert desk.ollama.models[name + ":latest"] == Model(desk.digest, messages=TURNS, **LIKE)  # type: ignore[arg-type]
    with desk.serving.serve(base, desk.tuned):
        assert len(desk.created()) == 1


def test_keeping_copies_and_clears_the_working_name(desk: Desk) -> None:
    base = served_base(desk, **LIKE)
    with desk.serving.serve(base, desk.tuned):
        pass
    kept = desk.serving.keep("0001-model:1.0", base, desk.tuned)
    assert kept is not None
    assert (kept.name, kept.digest, kept.changed) == ("0001-model:1.0", desk.digest, True)
    assert sorted(desk.ollama.models) == ["0001-model:1.0", "small:1b"]
    assert desk.ollama.models["0001-model:1.0"] == Model(desk.digest, **LIKE)  # type: ignore[arg-type]
    assert desk.serving.has("0001-model:1.0", desk.digest)
    assert not desk.serving.has("0001-model:1.0", "sha256:" + "0" * 64)
    assert not desk.serving.has("0001-model:2.0", desk.digest)


def test_the_same_again_asks_for_nothing(desk: Desk) -> None:
    base = served_base(desk, **LIKE)
    desk.serving.keep("v:1", base, desk.tuned)
    asked = len(desk.ollama.asked)
    again = desk.serving.keep("v:1", base, desk.tuned)
    assert again is not None
    assert (again.digest, again.changed) == (desk.digest, False)
    assert {path for path, _ in desk.ollama.asked[asked:]} == {"/api/show", "/api/delete"}
    with desk.serving.serve(base, desk.tuned):  # left behind by another run
        pass
    desk.serving.keep("v:1", base, desk.tuned)
    assert sorted(desk.ollama.models) == ["small:1b", "v:1"]


@pytest.mark.parametrize(
    "other", [{"digest": "sha256:" + "0" * 64}, {"template": "{{ .Prompt }} other"}, {"system": "Other."}, {"messages": TURNS}]
)
def test_another_model_of_that_name_is_not_touched(desk: Desk, other: dict[str, Any]) -> None:
    base = served_base(desk, **LIKE)
    desk.serving.keep("v:1", base, desk.tuned)
    theirs = desk.ollama.models["v:1"] = dataclasses.replace(desk.ollama.models["v:1"], **other)
    with pytest.raises(UserError, match="has another model called v:1") as caught:
        desk.serving.keep("v:1", base, desk.tuned)
    assert "`pipeline register --replace`" in caught.value.hint
    assert "`ollama cp v:1 OTHER`" in caught.value.hint
    assert caught.value.exit_code == 2
    assert desk.ollama.models["v:1"] == theirs
    kept = desk.serving.keep("v:1", base, desk.tuned, replace=True)
    assert kept is not None
    assert kept.changed
    assert desk.ollama.models["v:1"] == Model(desk.digest, **LIKE)  # type: ignore[arg-type]


def test_another_file_is_refused_before_it_is_sent(desk: Desk) -> None:
    base = served_base(desk)
    desk.ollama.models["v:1"] = Model("sha256:" + "0" * 64)
    with pytest.raises(UserError):
        desk.serving.keep("v:1", base, desk.tuned)
    assert "POST /api/blobs" not in [path for path, _ in desk.ollama.asked]


@pytest.mark.parametrize("version", ["0.30.0", "0.34.0"])
def test_servers_that_rewrite_files(desk: Desk, version: str) -> None:
    """Their digest is another than that of the file; it is read back, and counts from then on."""
    desk.ollama.version, desk.serving.server.version = version, tuple(map(int, version.split(".")))
    base = served_base(desk, **LIKE)
    with desk.serving.serve(base, desk.tuned) as engine:
        assert engine.model_digest == desk.digest  # what it was made from
    kept = desk.serving.keep("v:1", base, desk.tuned)
    assert kept is not None
    assert kept.digest == desk.ollama.models["v:1"].digest != desk.digest
    assert desk.serving.has("v:1", kept.digest)
    again = desk.serving.keep("v:1", base, desk.tuned)
    assert again == dataclasses.replace(kept, changed=False)
    other = write_gguf(desk.folder / "other.gguf", general__name="other")
    with pytest.raises(UserError, match="has another model called v:1"):
        desk.serving.keep("v:1", base, other)
    with desk.serving.serve(desk.base), desk.serving.serve(desk.base):
        assert [body["model"] for body in desk.created()].count(working_name(desk.base.facts.digest)) == 1


def test_a_server_that_stores_another_file(desk: Desk) -> None:
    desk.serving.server.version, desk.ollama.version = (0, 34, 2), "0.33.0"
    with pytest.raises(EngineError, match=r"tuned\.gguf: the Ollama server stored another file than it was sent"):
        desk.serving.serve(served_base(desk), desk.tuned)


@pytest.mark.parametrize("fault", [drops, lines({"status": "parsing GGUF"}), says(500, "unexpected")])
def test_a_registration_that_is_cut_is_done_again(desk: Desk, fault: Any) -> None:
    base = served_base(desk, **LIKE)
    desk.ollama.fail("/api/create", fault)
    desk.ollama.fail("/api/copy", drops)
    desk.ollama.fail("/api/delete", says(503, "busy"))
    kept = desk.serving.keep("v:1", base, desk.tuned)
    assert kept is not None
    assert sorted(desk.ollama.models) == ["small:1b", "v:1"]


def test_a_server_that_loses_what_it_made(desk: Desk) -> None:
    base = served_base(desk)
    desk.ollama.fail("/api/create", lines({"status": "success"}))
    with pytest.raises(EngineError, match="made this model and does not have it"):
        desk.serving.serve(base, desk.tuned)
    desk.ollama.fail("/api/copy", lines({}))
    with pytest.raises(EngineError, match="did not keep what it was given"):
        desk.serving.keep("v:1", base, desk.tuned)


def test_a_file_that_is_gone(desk: Desk) -> None:
    base = served_base(desk)
    desk.tuned.unlink()
    with pytest.raises(ArtifactError, match=r"tuned\.gguf"):
        desk.serving.serve(base, desk.tuned)
    with pytest.raises(ArtifactError, match=r"tuned\.gguf"):
        desk.serving.keep("v:1", base, desk.tuned)


# --- registering: a model set ----------------------------------------------------------------------------------------

SET = {"from": "base", "system": "Rate.", "messages": list(TURNS), "parameters": {"temperature": 0.0, "num_predict": 160}}


def test_a_model_set(desk: Desk) -> None:
    base = served_base(desk, **LIKE)
    kept = desk.serving.keep("v:model-set", base, SET)
    assert kept is not None
    assert (kept.digest, kept.changed) == (base.facts.digest, True)
    assert desk.created() == [{**SET, "from": "small:1b", "model": "v:model-set", "stream": True}]
    model = desk.ollama.models["v:model-set"]
    assert (model.system, model.messages, model.template) == ("Rate.", TURNS, LIKE["template"])
    assert model.parameters == {"stop": ["<|end|>", "<|x|>"], "temperature": 0.0, "num_predict": 160}
    again = desk.serving.keep("v:model-set", base, SET)
    assert again == dataclasses.replace(kept, changed=False)
    assert len(desk.created()) == 1
    with pytest.raises(UserError, match="has another model called v:model-set"):
        desk.serving.keep("v:model-set", base, {**SET, "messages": []})
    replaced = desk.serving.keep("v:model-set", base, {**SET, "system": "Other."}, replace=True)
    assert replaced is not None
    assert replaced.changed
    assert desk.ollama.models["v:model-set"].system == "Other."


def test_a_model_set_on_a_base_from_a_file_and_without_a_system_text(desk: Desk) -> None:
    desk.system = "You are helpful."
    asked = {key: value for key, value in SET.items() if key != "system"}
    kept = desk.serving.keep("v:1", desk.base, asked)
    assert kept is not None
    assert desk.ollama.models["v:1"].system == "You are helpful."
    assert desk.created()[-1]["from"] == working_name(desk.base.facts.digest)
    again = desk.serving.keep("v:1", desk.base, asked)
    assert again is not None
    assert not again.changed


def test_a_model_set_whose_base_is_gone_is_not_looked_for_in_the_registry(desk: Desk) -> None:
    base = served_base(desk)
    del desk.ollama.models["small:1b"]
    with pytest.raises(EngineError, match="small:1b: was deleted"):
        desk.serving.keep("v:1", base, SET)
    assert desk.created() == []


# --- pure ------------------------------------------------------------------------------------------------------------


@given(st.text(), st.text(min_size=1), st.text(), st.text())
def test_default_system(before: str, system: str, between: str, after: str) -> None:
    assert default_system(before + system + between + after, before + _MARK + between + after) == system


@given(st.text(), st.text())
def test_default_system_where_there_may_be_none(without: str, marked: str) -> None:
    found = default_system(without, marked)
    if found is not None:
        assert found
        assert marked.replace(_MARK, found, 1) == without


@pytest.mark.parametrize(
    ("without", "marked"),
    [
        ("<user>hi<assistant>", f"<system>{_MARK}<user>hi<assistant>"),  # none is put in
        ("<system><user>hi", f"<system>{_MARK}<user>hi"),  # an empty one
        ("<user>hi", "<user>hi"),  # the template has no place for one
        ("<system>S<user>hi", f"<user>{_MARK}\nhi"),  # it goes into the user's turn
        ("aba", f"ab{_MARK}ba"),  # the two ends overlap
    ],
)
def test_no_default_system(without: str, marked: str) -> None:
    assert default_system(without, marked) is None


def test_working_names_are_names() -> None:
    name = working_name("sha256:" + "0123456789abcdef" * 4)
    assert name == "pipeline-0123456789ab"
    assert may_be_name(name)

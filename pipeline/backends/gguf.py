"""Reads, merges and writes GGUF files, byte for byte where nothing changes.

Format: the GGUF specification, version 3 (magic, version, counts, key/values, tensor infos, aligned tensor data; little-endian).
Tensor shapes here are numpy's (rows, columns); the file stores them reversed.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFWriter, quants

from pipeline.backends.gguf_header import TensorInfo, read_header
from pipeline.errors import ArtifactError
from pipeline.store import writing

Float32 = npt.NDArray[np.float32]

KEPT_COSINE = 0.99  # Q8_0 is used where it keeps this much of the change's direction; F16 otherwise
_UNQUANTISED = (GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.BF16)
_ROTATED = ("attn_q", "attn_k")  # rows stored in another order than PyTorch's for architecture llama


@dataclass
class GgufFile:
    """A GGUF file; tensor data is mapped, not read. Close it, or use it in a `with`."""

    path: Path
    keys: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    keys_end: int  # bytes [24, keys_end) hold the key/values
    _map: mmap.mmap = field(repr=False)

    @property
    def architecture(self) -> str:
        return str(self.keys.get("general.architecture", ""))

    def number(self, key: str, default: float | None = None) -> float:
        """The number under `<architecture>.<key>`.

        Raises:
            ArtifactError: absent without a default, or not one number.
        """
        value = self.keys.get(f"{self.architecture}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ArtifactError(f"{self.path}: {self.architecture}.{key} is {'missing' if value is None else 'not one number'}")
        return value

    def raw(self, name: str) -> memoryview:
        info = self.tensors[name]
        return memoryview(self._map)[info.offset : info.offset + info.size]

    def dequantised(self, name: str) -> Float32:
        """The tensor's values, float32, in the file's row order.

        Raises:
            ArtifactError: values that are not finite, or of a type that has none.
        """
        info = self.tensors[name]
        if not readable(info.type):
            raise ArtifactError(f"{self.path}: tensor {name} has type {info.type.name}, which can't be turned into numbers")
        data: Any = np.frombuffer(self.raw(name), dtype=np.uint8)
        if info.type in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
            data = data.view(np.float32 if info.type is GGMLQuantizationType.F32 else np.float16)
            values = data.astype(np.float32).reshape(info.shape)
        else:
            values = quants.dequantize(data.reshape(*info.shape[:-1], -1), info.type).reshape(info.shape)
        if not np.isfinite(values).all():
            raise ArtifactError(f"{self.path}: tensor {name} holds values that are not finite", hint="the file is damaged: fetch it again")
        return np.ascontiguousarray(values, dtype=np.float32)

    def close(self) -> None:
        self._map.close()

    def __enter__(self) -> GgufFile:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def readable(kind: GGMLQuantizationType) -> bool:
    """Whether tensors of this type can be dequantised."""
    if kind in (GGMLQuantizationType.F32, GGMLQuantizationType.F16):
        return True
    try:
        quants.dequantize(np.zeros((1, GGML_QUANT_SIZES[kind][1]), dtype=np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def open_gguf(path: Path) -> GgufFile:
    """
    Raises:
        ArtifactError: not GGUF, another version or byte order, truncated, or a header that contradicts itself.
    """
    header = read_header(path)
    with path.open("rb") as handle:
        mapped = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ)
    return GgufFile(path, header.values, header.tensors, header.alignment, header.values_end, mapped)


# --- names and row order ---------------------------------------------------------------------------------------------

_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def tensor_name(parameter: str) -> str:
    """`model.layers.3.self_attn.q_proj.weight` -> `blk.3.attn_q.weight` (architectures llama, qwen2, qwen3)."""
    module, _, kind = parameter.rpartition(".")
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{kind}"
    _, _, layer, inner = module.split(".", 3)
    return f"blk.{layer}.{_LAYER_NAMES[inner]}.{kind}"


def row_order(base: GgufFile, name: str) -> npt.NDArray[np.intp] | None:
    """Index that takes rows in PyTorch's order to the file's, or None where both are the same.

    llama files interleave the two halves of each rotated head. Source: llama.cpp, conversion of architecture llama.
    """
    if base.architecture != "llama" or name.split(".")[-2] not in _ROTATED:
        return None
    heads = int(base.number("attention.head_count"))
    if name.split(".")[-2] == "attn_k":
        heads = int(base.number("attention.head_count_kv", heads))
    rows = base.tensors[name].shape[0]
    index: npt.NDArray[np.intp] = np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(rows)
    return index


# --- writing ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class MergeReport:
    """How the merged tensors were stored."""

    types: Mapping[str, str]  # tensor -> "Q8_0" or "F16"
    lowest_kept_cosine: float  # over tensors, between the change that was asked for and the one the file holds
    median_kept_cosine: float


def write_merged(
    base: GgufFile,
    deltas: Iterable[tuple[str, Float32]],
    names: frozenset[str],
    path: Path,
    *,
    types: Mapping[str, str] | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> MergeReport:
    """Writes the base with `deltas` added; all other tensors and every key/value are copied byte for byte.

    Args:
        deltas: (tensor name, change of shape (rows, columns) float32 in the file's row order), in the file's order.
        names: the tensors that `deltas` will name.
        types: how to store each; by default F16 where the base was not quantised, Q8_0 where the kept change has cosine >= 0.99
            with the true one, else F16.
    """
    chosen: dict[str, str] = {}
    cosines: list[float] = []
    coming = iter(deltas)

    def contents() -> Iterator[tuple[TensorInfo, GGMLQuantizationType, Any]]:
        for done, info in enumerate(base.tensors.values()):
            progress(done, len(base.tensors))
            if info.name not in names:
                yield info, info.type, base.raw(info.name)
                continue
            name, delta = next(coming)
            if name != info.name:
                raise ValueError(f"expected the change of {info.name}, got that of {name}")
            wanted = types[name] if types else "F16" if info.type in _UNQUANTISED else None
            kind, data, cosine = _stored(base.dequantised(name), delta, wanted)
            chosen[name] = kind.name
            cosines.append(cosine)
            yield info, kind, data

    with writing(path) as temporary, temporary.open("wb") as out:
        _write_file(base, contents(), out)
    return MergeReport(chosen, min(cosines, default=1.0), float(np.median(cosines)) if cosines else 1.0)


def _stored(weight: Float32, delta: Float32, kind: str | None) -> tuple[GGMLQuantizationType, Any, float]:
    merged = weight + delta
    if kind != "F16" and weight.shape[-1] % 32 == 0:
        packed = quants.quantize(merged, GGMLQuantizationType.Q8_0)
        kept = quants.dequantize(packed, GGMLQuantizationType.Q8_0) - weight
        cosine = _cosine(kept, delta)
        if kind == "Q8_0" or cosine >= KEPT_COSINE:
            return GGMLQuantizationType.Q8_0, packed, cosine
    half = merged.astype(np.float16)
    return GGMLQuantizationType.F16, half, _cosine(half.astype(np.float32) - weight, delta)


def _cosine(a: Float32, b: Float32) -> float:
    scale = float(np.linalg.norm(a)) * float(np.linalg.norm(b))
    return float(np.vdot(a, b)) / scale if scale else float(not b.any())


def _write_file(base: GgufFile, contents: Iterable[tuple[TensorInfo, GGMLQuantizationType, Any]], out: BinaryIO) -> None:
    """Key/values as they are, then room for the tensor infos (their size is known), the data, and the infos at last."""
    with base.path.open("rb") as source:
        out.write(source.read(base.keys_end))
    infos_size = sum(8 + len(info.name.encode()) + 4 + 8 * len(info.shape) + 4 + 8 for info in base.tensors.values())
    infos_at, start = out.tell(), _aligned(out.tell() + infos_size, base.alignment)
    out.write(b"\0" * (start - infos_at))
    infos = bytearray()
    for info, kind, data in contents:
        name = info.name.encode()
        infos += struct.pack(
            f"<Q{len(name)}sI{len(info.shape)}QIQ", len(name), name, len(info.shape), *info.shape[::-1], kind, out.tell() - start
        )
        out.write(memoryview(data).cast("B"))
        out.write(b"\0" * (_aligned(out.tell(), base.alignment) - out.tell()))
    out.seek(infos_at)
    out.write(infos)


def write_adapter(base: GgufFile, pairs: Mapping[str, tuple[Float32, Float32]], *, alpha: float, path: Path) -> None:
    """Writes the LoRA weights alone as llama.cpp reads them.

    Args:
        pairs: tensor name -> (A of shape (rank, columns), B of shape (rows, rank) in the file's row order), float32.
        alpha: llama.cpp scales B @ A by alpha / rank.
    """
    with writing(path) as temporary:
        writer = GGUFWriter(temporary, base.architecture)
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha)
        for name, (a, b) in pairs.items():
            writer.add_tensor(f"{name}.lora_a", np.ascontiguousarray(a, dtype=np.float32))
            writer.add_tensor(f"{name}.lora_b", np.ascontiguousarray(b, dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment

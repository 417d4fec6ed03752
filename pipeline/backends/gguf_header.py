"""The header of a GGUF, read cheaply and with every count checked against the file's size before it is believed.

gguf.GGUFReader takes seconds on a large vocabulary and believes the file; this walks the header once and steps over arrays.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf

from pipeline.errors import ArtifactError

_VERSIONS = (2, 3)
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}  # GGUF value type -> struct
_STRING, _ARRAY = 8, 9
_MAX_ENTRIES, _MAX_ITEMS, _MAX_DEPTH = 100_000, 8_000_000, 4  # far above any real file; hostile counts end here


@dataclass(frozen=True, slots=True)
class TensorInfo:
    name: str
    shape: tuple[int, ...]  # numpy's order: rows, columns
    type: gguf.GGMLQuantizationType
    offset: int  # from the start of the file
    size: int  # bytes


@dataclass(frozen=True, slots=True)
class ArrayInfo:
    """An array among the key/values, left in the file."""

    length: int


@dataclass(frozen=True, slots=True)
class Header:
    """A GGUF's key/values and where its tensors lie."""

    values: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]
    alignment: int
    values_end: int  # the key/values are the bytes from 24 to here

    @property
    def parameters(self) -> int:
        """Elements over all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    @property
    def tensor_types(self) -> dict[int, int]:
        """ggml type -> elements."""
        types: Counter[int] = Counter()
        for tensor in self.tensors.values():
            types[tensor.type] += math.prod(tensor.shape)
        return dict(types)


def read_header(path: Path) -> Header:
    """The header of a GGUF, every count checked against the file's size before it is believed.

    Raises:
        ArtifactError: not a GGUF, truncated, or corrupt; names the file and the place.
    """
    try:
        with path.open("rb") as handle:
            if handle.read(4) != b"GGUF":
                raise damaged(path, "not a GGUF file (it does not start with GGUF)")
            with mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(path, data).header()
    except OSError as error:
        raise ArtifactError(f"{path}: can't be read: {error}", hint="restore the file or fetch it again") from error


def damaged(path: Path, problem: str) -> ArtifactError:
    return ArtifactError(f"{path}: damaged GGUF: {problem}", hint="fetch or make the file again, and compare its size and digest")


class _Reader:
    """Walks the header once. Nothing is allocated on the word of the file."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 4
        self.items = 0  # entries of arrays that had to be walked one by one

    def header(self) -> Header:
        version = self._number("I")
        if version not in _VERSIONS:
            order = " (big-endian files are not read)" if version and version % 65536 == 0 else ""
            raise damaged(self.path, f"version {version}{order}; versions {_VERSIONS[0]} and {_VERSIONS[1]} are known")
        n_tensors, n_values = self._number("Q"), self._number("Q")
        self._must_fit(n_values, 13, "key/values")
        self._must_fit(n_tensors, 32, "tensors")
        values: dict[str, Any] = {}
        for _ in range(n_values):
            key = self._string()
            if key in values:
                raise damaged(self.path, f"the key {key[:80]!r} stands there twice")
            values[key] = self._value(self._number("I"))
        return self._with_tensors(values, n_tensors)

    def _with_tensors(self, values: dict[str, Any], n_tensors: int) -> Header:
        alignment, values_end = values.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT), self.at
        if not isinstance(alignment, int) or alignment < 1 or alignment & (alignment - 1):
            raise damaged(self.path, f"alignment {alignment!r} is not a power of two")
        found: dict[str, TensorInfo] = {}
        for _ in range(n_tensors):
            tensor = self._tensor()
            if tensor.name in found:
                raise damaged(self.path, f"the tensor {tensor.name[:80]!r} stands there twice")
            if tensor.offset % alignment:
                raise damaged(self.path, f"the tensor {tensor.name[:80]!r} starts at {tensor.offset}, not a multiple of {alignment}")
            found[tensor.name] = tensor
        self._must_not_overlap(found)
        start = -(-self.at // alignment) * alignment
        end, last = max(((tensor.offset + tensor.size, tensor.name) for tensor in found.values()), default=(0, ""))
        if n_tensors and start + end > len(self.data):
            missing = start + end - len(self.data)
            raise damaged(self.path, f"truncated: {missing:,} of {start + end:,} bytes are missing (the tensor {last[:80]!r} ends there)")
        placed = {name: replace(tensor, offset=start + tensor.offset) for name, tensor in found.items()}
        return Header(values, placed, alignment, values_end)

    def _must_not_overlap(self, tensors: Mapping[str, TensorInfo]) -> None:
        placed = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for before, after in itertools.pairwise(placed):
            if before.offset + before.size > after.offset:
                raise damaged(self.path, f"the tensors {before.name[:80]!r} and {after.name[:80]!r} overlap")

    def _tensor(self) -> TensorInfo:
        """Its offset is still from the start of the data."""
        name, n_dims = self._string(), self._number("I")
        if not 1 <= n_dims <= 4:
            raise damaged(self.path, f"the tensor {name[:80]!r} has {n_dims} dimensions")
        shape = [self._number("Q") for _ in range(n_dims)]
        kind, offset = self._number("I"), self._number("Q")
        try:
            quantisation = gguf.GGMLQuantizationType(kind)
            block, block_bytes = gguf.GGML_QUANT_SIZES[quantisation]
        except (KeyError, ValueError):
            raise damaged(self.path, f"the tensor {name[:80]!r} has type {kind}, which is not known") from None
        if 0 in shape or shape[0] % block:
            raise damaged(self.path, f"the tensor {name[:80]!r} has shape {shape}, impossible for its type")
        return TensorInfo(name, tuple(shape[::-1]), quantisation, offset, math.prod(shape) // block * block_bytes)

    def _value(self, kind: int, depth: int = 0) -> Any:
        if kind in _SCALARS:
            return self._number(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth >= _MAX_DEPTH:
            raise damaged(self.path, f"value type {kind} at byte {self.at}")
        return self._skip_array(depth)

    def _skip_array(self, depth: int) -> ArrayInfo:
        """Steps over an array; nothing here needs what is in one."""
        kind, count = self._number("I"), self._number("Q")
        if kind in _SCALARS:
            self._step(count * struct.calcsize("<" + _SCALARS[kind]))
            return ArrayInfo(count)
        self.items += count
        if self.items > _MAX_ITEMS:
            raise damaged(self.path, f"an array of {count:,} entries at byte {self.at}")
        if kind != _STRING:
            for _ in range(count):
                self._value(kind, depth + 1)
            return ArrayInfo(count)
        data, at, end, unpack = self.data, self.at, len(self.data) - 8, struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > end:
                raise self._too_short()
            at += 8 + unpack(data, at)[0]
        self.at = at
        self._step(0)
        return ArrayInfo(count)

    def _string(self) -> str:
        length = self._number("Q")
        start = self.at
        self._step(length)
        try:
            return self.data[start : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise damaged(self.path, f"the text at byte {start} is not UTF-8") from None

    def _number(self, code: str) -> Any:
        layout = struct.Struct("<" + code)
        start = self.at
        self._step(layout.size)
        return layout.unpack_from(self.data, start)[0]

    def _step(self, n_bytes: int) -> None:
        if self.at + n_bytes > len(self.data):
            raise self._too_short()
        self.at += n_bytes

    def _must_fit(self, count: int, least_bytes: int, what: str) -> None:
        if count > _MAX_ENTRIES or count * least_bytes > len(self.data) - self.at:
            raise damaged(self.path, f"it announces {count:,} {what}, more than fit into {len(self.data):,} bytes")

    def _too_short(self) -> ArtifactError:
        return damaged(self.path, f"the header runs past the end of the file ({len(self.data):,} bytes): truncated or corrupt")

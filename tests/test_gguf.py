"""Reading, merging and writing GGUF: nothing but the named tensors changes, and no header does harm."""

from __future__ import annotations

import random
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf as official
import numpy as np
import numpy.typing as npt
import pytest

from pipeline.backends import gguf
from pipeline.backends.gguf_header import ArrayInfo
from pipeline.errors import ArtifactError
from tests.tiny_models import HEADS, KV_HEADS, tiny_model  # noqa: F401  a fixture

Array = npt.NDArray[np.float32]
Q8_0, Q4_0, F16 = official.GGMLQuantizationType.Q8_0, official.GGMLQuantizationType.Q4_0, official.GGMLQuantizationType.F16
SMALL = 2304  # a vocabulary that is quick to write and to read
RNG = np.random.default_rng(3)


def write_small(path: Path, tensors: dict[str, object] | None = None, alignment: int = 32) -> Path:
    """A GGUF of a few kilobytes; tensors are arrays, or (array, type) to be quantised."""
    writer = official.GGUFWriter(path, "llama")
    if alignment != 32:
        writer.add_custom_alignment(alignment)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list(["a", "bc", "déf"])
    writer.add_array("odd.numbers", [1, 2, 3])
    writer.add_bool("odd.truth", True)
    for name, value in (tensors if tensors is not None else {"blk.0.attn_q.weight": matrix(), "output_norm.weight": matrix()[0]}).items():
        if isinstance(value, tuple):
            writer.add_tensor(name, official.quants.quantize(value[0], value[1]), raw_dtype=value[1])
        else:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def matrix(rows: int = 16, columns: int = 64) -> Array:
    return RNG.standard_normal((rows, columns)).astype(np.float32)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small(tmp_path / "small.gguf")


# --- reading ---------------------------------------------------------------------------------------------------------


def test_the_layout_is_what_ggufs_own_reader_sees(tiny_model: Callable[..., Path]) -> None:  # noqa: F811
    path = tiny_model("qwen2", weights="Q8_0", tied=False, vocabulary=SMALL)
    theirs = official.GGUFReader(path)
    with gguf.open_gguf(path) as ours:
        assert ours.architecture == "qwen2"
        assert ours.number("attention.head_count") == HEADS
        assert ours.number("attention.layer_norm_rms_epsilon") == pytest.approx(1e-5)
        assert [tensor.name for tensor in theirs.tensors] == list(ours.tensors)
        for tensor in theirs.tensors:
            info = ours.tensors[tensor.name]
            assert info.shape == tuple(tensor.shape.tolist()[::-1])
            assert (info.type, info.offset, info.size) == (tensor.tensor_type, tensor.data_offset, tensor.n_bytes)
        name = "blk.0.attn_q.weight"
        expected = official.quants.dequantize(theirs.tensors[list(ours.tensors).index(name)].data, Q8_0)
        assert np.array_equal(ours.dequantised(name), expected)


def test_missing_and_odd_numbers_are_named(small: Path) -> None:
    with gguf.open_gguf(small) as file:
        assert file.keys["tokenizer.ggml.tokens"] == ArrayInfo(3)
        assert file.keys["odd.truth"] is True
        assert file.number("rope.freq_base", 10000.0) == 10000.0
        with pytest.raises(ArtifactError, match=r"llama\.block_count is missing"):
            file.number("block_count")
        file.keys = {**file.keys, "llama.block_count": ArrayInfo(3)}
        with pytest.raises(ArtifactError, match="not one number"):
            file.number("block_count")


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_values_that_are_not_finite(tmp_path: Path, wrong: float) -> None:
    values = matrix()
    values[3, 5] = wrong
    with (
        gguf.open_gguf(write_small(tmp_path / "m.gguf", {"blk.0.attn_q.weight": values})) as file,
        pytest.raises(ArtifactError, match=r"blk\.0\.attn_q\.weight holds values that are not finite"),
    ):
        file.dequantised("blk.0.attn_q.weight")


def test_a_type_without_numbers(tmp_path: Path) -> None:
    path = write_small(tmp_path / "m.gguf", {"blk.0.attn_q.weight": np.ones((2, 32), dtype=np.int32)})
    with gguf.open_gguf(path) as file, pytest.raises(ArtifactError, match="I32"):
        file.dequantised("blk.0.attn_q.weight")
    assert not gguf.readable(official.GGMLQuantizationType.I32)
    assert all(gguf.readable(official.GGMLQuantizationType[name]) for name in ("F32", "F16", "BF16", "Q4_1", "Q8_0", "Q4_K", "Q6_K"))


# --- hostile files ---------------------------------------------------------------------------------------------------


def opens(path: Path, content: bytes) -> bool:
    """Whether it opens; anything but ArtifactError comes through, and so does a tensor that lies outside the file."""
    path.write_bytes(content)
    said = ""
    try:
        with gguf.open_gguf(path) as file:
            for info in file.tensors.values():
                assert 0 <= info.offset <= info.offset + info.size <= len(content)
            said = _read_all(file)
            return True
    except ArtifactError as error:
        said = str(error)
        return False
    finally:
        assert not said or str(path) in said


def _read_all(file: gguf.GgufFile) -> str:
    """Dequantises each tensor; the last error's text."""
    said = ""
    for name, info in file.tensors.items():
        try:
            assert file.dequantised(name).shape == info.shape
        except ArtifactError as error:
            said = str(error)
    return said


@pytest.fixture
def little_memory() -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("little_memory")
def test_a_file_cut_anywhere(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    assert opens(tmp_path / "whole.gguf", whole)
    data_end = max(tensor.data_offset + tensor.n_bytes for tensor in official.GGUFReader(small).tensors)
    cuts = [*range(600), *range(600, data_end, 37), data_end - 1]
    assert not [cut for cut in cuts if opens(tmp_path / "cut.gguf", whole[:cut])]


@pytest.mark.usefixtures("little_memory")
def test_flipped_bits_in_the_header(small: Path, tmp_path: Path) -> None:
    whole = small.read_bytes()
    with gguf.open_gguf(small) as file:
        header = min(info.offset for info in file.tensors.values())
    rng = random.Random(1)
    opened = 0
    for at in range(header):
        for bit in rng.sample(range(8), 1):
            flipped = bytearray(whole)
            flipped[at] ^= 1 << bit
            opened += opens(tmp_path / "flipped.gguf", bytes(flipped))
    for _ in range(200):
        broken = bytearray(whole)
        at = rng.randrange(4, header - 8)
        broken[at : at + 8] = rng.choice([b"\xff" * 8, b"\0" * 8, rng.randbytes(8)])
        opened += opens(tmp_path / "broken.gguf", bytes(broken))
    assert 0 < opened < header  # some flips only change a name or a number


def header(n_tensors: int = 0, n_keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_keys) + body


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def tensor_info(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


HOSTILE = {
    "empty": b"",
    "short": b"GGUF\x03",
    "another magic": b"PK\x03\x04" + bytes(100),
    "other byte order": b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(64),
    "version 1": header(version=1),
    "2^64 tensors": header(n_tensors=2**64 - 1),
    "2^64 keys": header(n_keys=2**64 - 1),
    "a million keys in no bytes": header(n_keys=1 << 20),
    "a key of 2^63 bytes": header(n_keys=1, body=struct.pack("<Q", 2**63)),
    "an array of 2^64 numbers": header(n_keys=1, body=text("a") + struct.pack("<IIQ", 9, 4, 2**64 - 1)),
    "an array of 2^64 texts": header(n_keys=1, body=text("a") + struct.pack("<IIQ", 9, 8, 2**64 - 1) + bytes(64)),
    "arrays in arrays without end": header(n_keys=1, body=text("a") + struct.pack("<I", 9) + struct.pack("<IQ", 9, 1) * 5000),
    "an array of 2^40 arrays": header(n_keys=1, body=text("a") + struct.pack("<IIQ", 9, 9, 2**40) + bytes(64)),
    "an unknown value type": header(n_keys=1, body=text("a") + struct.pack("<I", 77) + bytes(64)),
    "a key that is not UTF-8": header(n_keys=1, body=struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<I", 0) + bytes(64)),
    "a key twice": header(n_keys=2, body=(text("a") + struct.pack("<II", 4, 1)) * 2),
    "alignment 0": header(n_keys=1, body=text("general.alignment") + struct.pack("<II", 4, 0)),
    "alignment a text": header(n_keys=1, body=text("general.alignment") + struct.pack("<I", 8) + text("32")),
    "alignment an array": header(n_keys=1, body=text("general.alignment") + struct.pack("<IIQI", 9, 4, 1, 32)),
    "a tensor of 2^252 numbers": header(n_tensors=1, body=tensor_info("t", 2**63, 2**63, 2**63, 2**63) + bytes(64)),
    "a tensor without dimensions": header(n_tensors=1, body=tensor_info("t") + bytes(64)),
    "a tensor of 2^32 dimensions": header(n_tensors=1, body=text("t") + struct.pack("<I", 2**32 - 1) + bytes(64)),
    "an unknown tensor type": header(n_tensors=1, body=tensor_info("t", 4, kind=255) + bytes(64)),
    "half a block": header(n_tensors=1, body=tensor_info("t", 33, kind=8) + bytes(128)),
    "an offset of 2^64": header(n_tensors=1, body=tensor_info("t", 4, offset=2**64 - 32) + bytes(64)),
    "a tensor twice": header(n_tensors=2, body=tensor_info("t", 4) + tensor_info("t", 4, offset=32) + bytes(128)),
    "overlapping tensors": header(n_tensors=2, body=tensor_info("t", 16) + tensor_info("u", 16, offset=32) + bytes(256)),
}


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header(tmp_path: Path, content: bytes) -> None:
    assert not opens(tmp_path / "hostile.gguf", content)


def test_a_folder_and_nothing_at_all(tmp_path: Path) -> None:
    for path in (tmp_path, tmp_path / "none.gguf"):
        with pytest.raises(ArtifactError, match="can't be read"):
            gguf.open_gguf(path)


# --- merging ---------------------------------------------------------------------------------------------------------

NAMES = ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")


def merge(base: Path, deltas: dict[str, Array], path: Path, types: dict[str, str] | None = None) -> gguf.MergeReport:
    with gguf.open_gguf(base) as file:
        ordered = [(name, deltas[name]) for name in file.tensors if name in deltas]
        return gguf.write_merged(file, ordered, frozenset(deltas), path, types=types)


def values(path: Path) -> dict[str, tuple[str, Array]]:
    """name -> (type, values), by gguf's own reader."""
    found = {}
    for tensor in official.GGUFReader(path).tensors:
        found[tensor.name] = tensor.tensor_type.name, official.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    return found


def assert_rest_is_untouched(base: Path, merged: Path, changed: set[str]) -> None:
    with gguf.open_gguf(base) as before, gguf.open_gguf(merged) as after:
        assert base.read_bytes()[: before.keys_end] == merged.read_bytes()[: after.keys_end]
        assert list(before.tensors) == list(after.tensors)
        for name, info in before.tensors.items():
            assert after.tensors[name].offset % after.alignment == 0
            assert after.tensors[name].shape == info.shape
            if name not in changed:
                assert after.tensors[name].type == info.type
                assert bytes(before.raw(name)) == bytes(after.raw(name))


@pytest.mark.parametrize("alignment", [32, 64])
@pytest.mark.parametrize("base_type", ["F32", "F16"])
def test_no_change_keeps_every_value(tmp_path: Path, base_type: str, alignment: int) -> None:
    halves = {name: matrix().astype(np.float16) for name in NAMES}
    tensors: dict[str, object] = {name: half.astype(base_type.replace("F", "float")) for name, half in halves.items()}
    base = write_small(tmp_path / "base.gguf", {**tensors, "output_norm.weight": matrix()[0], "odd.weight": matrix(3, 5)}, alignment)
    report = merge(base, {name: np.zeros((16, 64), dtype=np.float32) for name in NAMES}, tmp_path / "merged.gguf")
    assert report == gguf.MergeReport(dict.fromkeys(NAMES, "F16"), 1.0, 1.0)
    found = values(tmp_path / "merged.gguf")
    for name in NAMES:
        assert np.array_equal(found[name][1], halves[name].astype(np.float32))
    assert_rest_is_untouched(base, tmp_path / "merged.gguf", set(NAMES))


def test_a_large_change_on_a_quantised_base_is_stored_in_eight_bits(tmp_path: Path) -> None:
    weight, delta = matrix(), matrix() * 0.3
    base = write_small(tmp_path / "base.gguf", {NAMES[0]: (weight, Q4_0), NAMES[1]: (weight, Q8_0), "output_norm.weight": weight[0]})
    report = merge(base, {NAMES[0]: delta}, tmp_path / "merged.gguf")
    assert report.types == {NAMES[0]: "Q8_0"}
    assert 0.99 <= report.lowest_kept_cosine == report.median_kept_cosine < 1
    kind, found = values(tmp_path / "merged.gguf")[NAMES[0]]
    expected = values(base)[NAMES[0]][1] + delta
    step = np.abs(expected).reshape(16, 2, 32).max(-1, keepdims=True) / 127
    assert kind == "Q8_0"
    assert np.all(np.abs(found - expected).reshape(16, 2, 32) <= step * 0.54)  # the step itself has eleven bits
    assert_rest_is_untouched(base, tmp_path / "merged.gguf", {NAMES[0]})


def test_a_small_change_on_a_quantised_base_is_stored_in_sixteen_bits(tmp_path: Path) -> None:
    weight, delta = matrix(), matrix() * 0.01
    base = write_small(tmp_path / "base.gguf", {NAMES[0]: (weight, Q4_0), NAMES[1]: (weight, Q8_0)})
    report = merge(base, dict.fromkeys(NAMES, delta), tmp_path / "merged.gguf")
    assert report.types == dict.fromkeys(NAMES, "F16")
    assert report.lowest_kept_cosine > 0.999  # eight bits would keep about 0.9 of it
    for name in NAMES:
        kind, found = values(tmp_path / "merged.gguf")[name]
        expected = values(base)[name][1] + delta
        assert kind == "F16"
        assert np.all(np.abs(found - expected) <= np.abs(expected) * 2**-11 + 2**-25)


def test_types_can_be_given(tmp_path: Path) -> None:
    base = write_small(tmp_path / "base.gguf", dict.fromkeys(NAMES, (matrix(), Q4_0)))
    zeros = dict.fromkeys(NAMES, np.zeros((16, 64), dtype=np.float32))
    wanted = {NAMES[0]: "Q8_0", NAMES[1]: "F16"}
    assert merge(base, zeros, tmp_path / "merged.gguf", wanted).types == wanted
    found = values(tmp_path / "merged.gguf")
    assert {name: found[name][0] for name in NAMES} == wanted
    assert np.allclose(found[NAMES[1]][1], values(base)[NAMES[1]][1], rtol=2**-11)


def test_changes_in_another_order_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    base = write_small(tmp_path / "base.gguf", dict.fromkeys(NAMES, matrix()))
    (tmp_path / "merged.gguf").write_text("what was there")
    with gguf.open_gguf(base) as file, pytest.raises(ValueError, match="expected the change of"):
        gguf.write_merged(file, [(NAMES[1], matrix()), (NAMES[0], matrix())], frozenset(NAMES), tmp_path / "merged.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "merged.gguf"]
    assert (tmp_path / "merged.gguf").read_text() == "what was there"


# --- names, rows, adapters -------------------------------------------------------------------------------------------


def test_names() -> None:
    assert gguf.tensor_name("model.layers.13.self_attn.q_proj.weight") == "blk.13.attn_q.weight"
    assert gguf.tensor_name("model.layers.0.self_attn.k_proj.bias") == "blk.0.attn_k.bias"
    assert gguf.tensor_name("model.layers.2.mlp.down_proj.weight") == "blk.2.ffn_down.weight"
    assert gguf.tensor_name("model.layers.2.post_attention_layernorm.weight") == "blk.2.ffn_norm.weight"
    assert gguf.tensor_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf.tensor_name("lm_head.weight") == "output.weight"


@pytest.mark.parametrize(("part", "heads"), [("attn_q", HEADS), ("attn_k", KV_HEADS)])
def test_rows_of_llama_are_interleaved(tiny_model: Callable[..., Path], part: str, heads: int) -> None:  # noqa: F811
    """Row r of the first half of a head goes to 2 r, row r of its second half to 2 r + 1."""
    with gguf.open_gguf(tiny_model("llama", vocabulary=SMALL)) as file:
        order = gguf.row_order(file, f"blk.1.{part}.weight")
        rows = file.tensors[f"blk.1.{part}.weight"].shape[0]
    size = rows // heads
    by_hand = np.zeros(rows, dtype=int)
    for head in range(heads):
        for row in range(size // 2):
            by_hand[head * size + 2 * row] = head * size + row
            by_hand[head * size + 2 * row + 1] = head * size + size // 2 + row
    assert order is not None
    assert np.array_equal(order, by_hand)
    assert sorted(order) == list(range(rows))


def test_other_rows_keep_their_order(tiny_model: Callable[..., Path]) -> None:  # noqa: F811
    with gguf.open_gguf(tiny_model("llama", vocabulary=SMALL)) as file:
        for part in ("attn_v", "attn_output", "attn_norm", "ffn_up"):
            assert gguf.row_order(file, f"blk.0.{part}.weight") is None
        assert gguf.row_order(file, "token_embd.weight") is None
    for architecture in ("qwen2", "qwen3"):
        with gguf.open_gguf(tiny_model(architecture, vocabulary=SMALL)) as file:
            assert gguf.row_order(file, "blk.0.attn_q.weight") is None


def test_an_adapter_holds_what_llama_cpp_asks_for(tmp_path: Path, small: Path) -> None:
    a, b = matrix(4, 64), matrix(16, 4)
    with gguf.open_gguf(small) as file:
        gguf.write_adapter(file, {"blk.0.attn_q.weight": (a, b)}, alpha=8.0, path=tmp_path / "adapter.gguf")
    reader = official.GGUFReader(tmp_path / "adapter.gguf")
    keys = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert keys == {"general.architecture": "llama", "general.type": "adapter", "adapter.type": "lora", "adapter.lora.alpha": 8.0}
    found = values(tmp_path / "adapter.gguf")
    assert set(found) == {"blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"}
    assert np.array_equal(found["blk.0.attn_q.weight.lora_a"][1], a)
    assert np.array_equal(found["blk.0.attn_q.weight.lora_b"][1], b)

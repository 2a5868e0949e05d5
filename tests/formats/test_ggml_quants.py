from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.gguf_header import GGML_TYPES
from tests.formats import builders as b
from worker_svc.models.checkpoint import CheckpointError, open_checkpoint
from worker_svc.models.ggml_quants import QUANTS, dequantize
from worker_svc.models.raw_tensor import RawTensor

CODES = {kind.name: code for code, kind in GGML_TYPES.items()}


def half(block: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", block, at)[0])


def f32(value: float) -> float:
    return float(np.float32(value))


def nibble(block: bytes, at: int, i: int) -> int:
    """Weight i of a run of 32 packed in 16 bytes."""
    return block[at + i % 16] >> 4 * (i // 16) & 15


def q4_0(block: bytes, i: int) -> float:
    return f32((nibble(block, 2, i) - 8) * half(block, 0))


def q4_1(block: bytes, i: int) -> float:
    return f32(f32(nibble(block, 4, i) * half(block, 0)) + half(block, 2))


def q5_0(block: bytes, i: int) -> float:
    fifth = int.from_bytes(block[2:6], "little") >> i & 1
    return f32((nibble(block, 6, i) + 16 * fifth - 16) * half(block, 0))


def q5_1(block: bytes, i: int) -> float:
    fifth = int.from_bytes(block[4:8], "little") >> i & 1
    return f32(f32((nibble(block, 8, i) + 16 * fifth) * half(block, 0)) + half(block, 2))


def q8_0(block: bytes, i: int) -> float:
    return f32(struct.unpack_from("<b", block, 2 + i)[0] * half(block, 0))


def scale_and_min(block: bytes, run: int) -> tuple[float, float]:
    packed = block[4:16]
    if run < 4:
        scale, least = packed[run] & 63, packed[run + 4] & 63
    else:
        scale = packed[run + 4] & 15 | packed[run - 4] >> 6 << 4
        least = packed[run + 4] >> 4 | packed[run] >> 6 << 4
    return f32(half(block, 0) * scale), f32(half(block, 2) * least)


def q4_k(block: bytes, i: int) -> float:
    run, at = divmod(i, 32)
    scale, least = scale_and_min(block, run)
    quant = block[16 + run // 2 * 32 + at] >> 4 * (run % 2) & 15
    return f32(f32(quant * scale) - least)


def q5_k(block: bytes, i: int) -> float:
    run, at = divmod(i, 32)
    scale, least = scale_and_min(block, run)
    quant = (block[48 + run // 2 * 32 + at] >> 4 * (run % 2) & 15) + 16 * (block[16 + at] >> run & 1)
    return f32(f32(quant * scale) - least)


def q6_k(block: bytes, i: int) -> float:
    half_block, within = divmod(i, 128)
    run, at = divmod(within, 32)
    low = block[64 * half_block + 32 * (run % 2) + at] >> 4 * (run // 2) & 15
    high = block[128 + 32 * half_block + at] >> 2 * run & 3
    scale = struct.unpack_from("<b", block, 192 + i // 16)[0]
    return f32((low + 16 * high - 32) * f32(scale * half(block, 208)))


SLOW: dict[str, Callable[[bytes, int], float]] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
# Bytes of the float16 scales: kept finite, since a NaN is equal to nothing.
HALVES = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}


def some_blocks(kind: str, count: int, seed: int) -> bytes:
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (count, GGML_TYPES[CODES[kind]].block_bytes), dtype=np.uint8)
    for at in HALVES.get(kind, (0,)):
        blocks[:, at : at + 2] = rng.normal(0, 0.02, (count, 1)).astype("<f2").view(np.uint8)
    return blocks.tobytes()


@pytest.mark.parametrize("kind", QUANTS)
@given(count=st.integers(0, 5), seed=st.integers(0, 1 << 32))
def test_each_weight_is_what_the_format_says(kind: str, count: int, seed: int) -> None:
    size = GGML_TYPES[CODES[kind]].block_bytes
    data = some_blocks(kind, count, seed)
    blocks = [data[i * size : (i + 1) * size] for i in range(count)]
    expected = [[SLOW[kind](block, i) for i in range(QUANTS[kind].block_size)] for block in blocks]
    got = dequantize(kind, np.frombuffer(data, np.uint8).reshape(count, size))
    assert got.dtype == np.float32
    assert got.tolist() == expected


def test_chunks_meet_without_a_seam() -> None:
    """More weights than are worked on at once."""
    blocks = np.frombuffer(some_blocks("Q4_1", 9000, 1), np.uint8).reshape(-1, 20)
    assert (dequantize("Q4_1", blocks) == np.concatenate([dequantize("Q4_1", part) for part in blocks[:, None]])).all()


def gguf(path: Path, kind: str, shape: tuple[int, ...], data: bytes) -> Path:
    file = path / "model.gguf"
    file.write_bytes(b.gguf([], [("pad", (1,), CODES["F32"], bytes(4)), ("w", shape, CODES[kind], data)]))
    return file


def test_a_quantized_tensor_comes_in_its_shape(tmp_path: Path) -> None:
    data = some_blocks("Q8_0", 6, 2)
    checkpoint = open_checkpoint(gguf(tmp_path, "Q8_0", (3, 64), data))
    weights = checkpoint.tensor("w").float32()
    assert checkpoint.names() == ["pad", "w"]
    assert weights.shape == (3, 64)
    assert weights[1, 33] == q8_0(data[34 * 3 : 34 * 4], 1)


def test_float_types(tmp_path: Path) -> None:
    values = np.array([[0.0, -0.0, 1.5], [-2.0, np.inf, 3.140625]], np.float32)
    for kind, data in {
        "F32": values.tobytes(),
        "F16": values.astype("<f2").tobytes(),
        "F64": values.astype("<f8").tobytes(),
        "BF16": (values.view(np.uint32) >> 16).astype("<u2").tobytes(),
    }.items():
        tensor = open_checkpoint(gguf(tmp_path, kind, (2, 3), data)).tensor("w")
        assert tensor.float32().tolist() == values.tolist(), kind
        assert (tensor.bfloat16() == values.view(np.uint32) >> 16).all(), kind
        assert not tensor.data.flags.writeable


@pytest.mark.parametrize("bits", [0x7C00, 0xFC00, 0x7E00, 0xFE01, 0x7FFF])
@pytest.mark.parametrize("kind", QUANTS)
def test_a_scale_that_is_no_number_is_found_in_every_form(kind: str, bits: int) -> None:
    """As the weights themselves tell, which neither form that is asked for computes for this."""
    block = len(some_blocks(kind, 1, 0))
    data = np.frombuffer(some_blocks(kind, 4, 3), np.uint8).reshape(4, block)
    good = RawTensor("w", kind, (4, QUANTS[kind].block_size), data)
    assert np.array_equal(good.finite(), good.float32())
    assert np.array_equal(good.finite_bfloat16(), good.bfloat16())
    for at in HALVES.get(kind, (0,)):
        spoiled = data.copy()
        spoiled[2, at : at + 2] = np.array([bits], "<u2").view(np.uint8)
        bad = RawTensor("w", kind, good.shape, spoiled)
        with np.errstate(invalid="ignore"):
            assert not np.isfinite(bad.float32()[2]).all()
        for form in (bad.finite, bad.finite_bfloat16):
            with pytest.raises(CheckpointError, match="'w' has weights that are not finite numbers"):
                form()


def test_what_overflows_bfloat16_is_not_finite() -> None:
    tensor = RawTensor("w", "F32", (1,), np.array([3.4e38], np.float32))
    assert tensor.finite() == np.float32(3.4e38)
    with pytest.raises(CheckpointError, match="'w' has weights that are not finite numbers"):
        tensor.finite_bfloat16()


def test_what_needs_no_conversion_is_a_view(tmp_path: Path) -> None:
    tensor = open_checkpoint(gguf(tmp_path, "F32", (4,), bytes(16))).tensor("w")
    assert np.shares_memory(tensor.float32(), tensor.data)
    tensor = open_checkpoint(gguf(tmp_path, "BF16", (4,), bytes(8))).tensor("w")
    assert np.shares_memory(tensor.bfloat16(), tensor.data)


@given(
    st.lists(
        st.tuples(st.integers(0, 0xFFFF), st.sampled_from([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])),
        min_size=1,
        max_size=20,
    )
)
def test_bfloat16_rounds_to_the_nearest_even(
    tmp_path_factory: pytest.TempPathFactory, halves: list[tuple[int, int]]
) -> None:
    """Every upper half, with lower halves around the middle, where ties are."""
    values = np.array([upper << 16 | lower for upper, lower in halves], np.uint32).view(np.float32)
    file = gguf(tmp_path_factory.getbasetemp(), "F32", (len(values),), values.tobytes())
    got = (open_checkpoint(file).tensor("w").bfloat16().astype(np.uint32) << 16).view(np.float32)
    for value, rounded in zip(values, got, strict=True):
        if not np.isfinite(value):
            assert (np.isnan(value) and np.isnan(rounded)) or value == rounded
            continue
        bits = int(np.float32(value).view(np.uint32))
        below, above = (np.uint32(b << 16).view(np.float32) for b in (bits >> 16, (bits >> 16) + 1))
        low, high = abs(float(value) - float(below)), abs(float(above) - float(value))
        up = low > high or (low == high and bits >> 16 & 1 == 1)
        if np.isfinite(above):
            assert rounded == (above if up else below)


def test_a_type_that_cannot_be_read_names_the_tensor(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(gguf(tmp_path, "IQ2_XXS", (256,), bytes(66)))
    with pytest.raises(CheckpointError, match="'w' has type IQ2_XXS"):
        checkpoint.tensor("w")
    with pytest.raises(CheckpointError, match="no tensor 'v'"):
        checkpoint.tensor("v")
    with pytest.raises(CheckpointError, match="'w' has type I32"):
        open_checkpoint(gguf(tmp_path, "I32", (1,), bytes(4))).tensor("w").float32()


def test_a_corrupt_file_is_a_checkpoint_error(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(CheckpointError, match=r"model\.gguf: header: version 0"):
        open_checkpoint(tmp_path / "model.gguf")


def test_the_real_weights(model_path: Path) -> None:
    """Norm weights near 1, matrices near 0, nothing lost: a wrong layout shows in any of these."""
    checkpoint = open_checkpoint(model_path)
    embedding = checkpoint.tensor("token_embd.weight").float32()
    assert embedding.shape == (49152, 576)
    raw = checkpoint.tensor("blk.7.ffn_up.weight")
    assert raw.dtype == "Q4_1"
    weights = raw.float32()
    block = raw.data[1000].tobytes()
    assert weights.reshape(-1, 32)[1000].tolist() == [q4_1(block, i) for i in range(32)]
    for array in (embedding, weights):
        assert np.isfinite(array).all()
        assert abs(float(array.mean())) < 0.01 < float(array.std()) < 0.5

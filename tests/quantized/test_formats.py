"""Every packing, from the bits to the weights: random bits, groups and shapes, zero points at both ends."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.quantized import packers
from tests.quantized.packers import Matrix, random_matrix
from worker_svc.models.raw_tensor import Cut
from worker_svc.quant.bits import unpacked
from worker_svc.quant.form import E4M3, QuantizedTensor
from worker_svc.quant.formats.awq import Awq
from worker_svc.quant.formats.compressed_tensors import CompressedTensors
from worker_svc.quant.formats.fp8 import Fp8
from worker_svc.quant.formats.gptq import Gptq

SEED = st.integers(0, 2**32 - 1)
BITS = st.sampled_from([2, 3, 4, 8])
SIZES = st.sampled_from([0, 16, 32, 48, 128])


def same(tensor: QuantizedTensor, matrix: Matrix) -> None:
    """All of it, rows in any order, and a part of it."""
    expected = matrix.weights().astype(np.float32)
    np.testing.assert_array_equal(tensor.float32(), expected)
    rows = np.arange(len(expected))[::-2]
    np.testing.assert_array_equal(tensor.take(rows).float32(), expected[rows])
    n, k = expected.shape
    cut, columns = tensor.cut(Cut(n // 3, n, k // 4, k - 1))
    np.testing.assert_array_equal(cut.float32()[:, columns], expected[n // 3 :, k // 4 : k - 1])
    sorted_form, order = tensor.form().sorted(), tensor.order()
    np.testing.assert_array_equal(sorted_form.float32(), expected if order is None else expected[:, order])
    assert (np.diff(sorted_form.groups) >= 0).all()
    assert tensor.scheme.permuted == (order is not None)


@settings(max_examples=60)
@given(SEED, BITS, st.integers(1, 9), st.integers(1, 6), SIZES, st.booleans(), st.booleans())
def test_gptq(seed: int, bits: int, rows: int, columns: int, size: int, v2: bool, g_idx: bool) -> None:
    """N is such that zero points fill words; K such that codes do, unless g_idx says how many there are."""
    k = columns * 32 - (5 if g_idx else 0)
    matrix = random_matrix(seed, bits, rows * 32, k, size, permuted=g_idx)
    config: dict[str, Any] = {
        "bits": bits,
        "group_size": size or -1,
        "checkpoint_format": "gptq_v2" if v2 else "gptq",
        "sym": False,
    }
    config["meta"] = {"quantizer": ["gptqmodel:7.7.0"]}
    same(Gptq(config).read(packers.module(**packers.gptq(matrix, v2=v2, g_idx=g_idx))), matrix)


@settings(max_examples=40)
@given(SEED, st.integers(1, 9), st.integers(2, 200), SIZES)
def test_awq_gemm(seed: int, rows: int, columns: int, size: int) -> None:
    matrix = random_matrix(seed, 4, rows * 8, columns, size)
    config = {"bits": 4, "group_size": size or -1, "version": "gemm"}
    same(Awq(config).read(packers.module(**packers.awq_gemm(matrix))), matrix)


@settings(max_examples=40)
@given(SEED, st.integers(2, 50), st.integers(1, 40), SIZES)
def test_awq_gemv(seed: int, rows: int, columns: int, size: int) -> None:
    matrix = random_matrix(seed, 4, rows, columns * 8, size)
    config = {"w_bit": 4, "q_group_size": size or -1, "version": "GEMV"}
    same(Awq(config).read(packers.module(**packers.awq_gemv(matrix))), matrix)


@settings(max_examples=60)
@given(SEED, BITS, st.integers(2, 70), st.integers(2, 200), SIZES, st.booleans(), st.booleans())
def test_pack_quantized(
    seed: int, bits: int, rows: int, columns: int, size: int, symmetric: bool, permuted: bool
) -> None:
    """N odd and K no multiple of a word or a group."""
    matrix = random_matrix(seed, bits, rows, columns, size, symmetric=symmetric, permuted=permuted and bool(size))
    config = packed_config(bits, size, symmetric)
    module = packers.module(**packers.pack_quantized(matrix, symmetric=symmetric, g_idx=permuted))
    same(CompressedTensors(config).read(module), matrix)


def packed_config(bits: int, size: int, symmetric: bool) -> dict[str, Any]:
    weights = {
        "num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group" if size else "channel",
        "group_size": size or None,
    }  # fmt: skip
    return {"format": "pack-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}


@pytest.mark.parametrize("symmetric", [True, False])
def test_bytes(symmetric: bool) -> None:
    rng = np.random.default_rng(7)
    weight = rng.integers(-128, 128, (5, 33)).astype(np.int8)
    scale = rng.random((5, 1)).astype(np.float32)
    zero = rng.integers(-128, 128, (5, 1)).astype(np.int8)
    tensors: dict[str, Any] = {"weight": weight, "weight_scale": scale}
    if not symmetric:
        tensors["weight_zero_point"] = zero
    weights = {"num_bits": 8, "type": "int", "symmetric": symmetric, "strategy": "channel"}
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    config = {"format": "int-quantized", "config_groups": {"group_0": group}}
    tensor = CompressedTensors(config).read(packers.module(**tensors))
    taken = weight.astype(np.float32) - (0 if symmetric else zero.astype(np.float32))
    np.testing.assert_array_equal(tensor.float32(), taken * scale)
    assert tensor.scheme.activations is not None
    assert (tensor.scheme.activations.kind, tensor.scheme.activations.per) == ("int8", "token")


def test_an_order_that_was_never_set_is_none() -> None:
    matrix = random_matrix(3, 4, 10, 64, 32)
    tensors = packers.pack_quantized(matrix) | {"weight_g_idx": np.full(64, -1, np.int32)}
    same(CompressedTensors(packed_config(4, 32, False)).read(packers.module(**tensors)), matrix)


def test_names_come_before_patterns_and_those_before_classes() -> None:
    """Whatever the order of the groups."""
    matrix = random_matrix(4, 4, 10, 64, 32)
    right = packed_config(4, 32, False)["config_groups"]["group_0"]
    wrong = packed_config(8, 16, True)["config_groups"]["group_0"]
    for better, worse in ((packers.NAME, "re:.*up_proj"), ("re:.*up_proj", "Linear")):
        groups = {"a": wrong | {"targets": [worse]}, "b": right | {"targets": [better]}}
        config = {"format": "pack-quantized", "config_groups": groups}
        same(CompressedTensors(config).read(packers.module(**packers.pack_quantized(matrix))), matrix)


def test_bytes_in_an_order_of_their_own() -> None:
    rng = np.random.default_rng(8)
    weight, scale = rng.integers(-128, 128, (5, 64)).astype(np.int8), rng.random((5, 4)).astype(np.float32)
    groups = rng.permutation(np.arange(64) // 16)
    weights = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 16, "actorder": "group"}
    config = {"format": "int-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    tensors: dict[str, Any] = {"weight": weight, "weight_scale": scale, "weight_g_idx": groups.astype(np.int32)}
    tensor = CompressedTensors(config).read(packers.module(**tensors))
    np.testing.assert_array_equal(tensor.float32(), weight * scale[:, groups])


@settings(max_examples=40)
@given(SEED, st.integers(1, 300), st.integers(1, 300), st.sampled_from(["tensor", "channel", "block"]))
def test_fp8(seed: int, rows: int, columns: int, per: str) -> None:
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, 127, (rows, columns)).astype(np.uint8) | rng.integers(0, 2, (rows, columns)).astype(
        np.uint8
    ) << np.uint8(7)
    shape = {"tensor": (1,), "channel": (rows, 1), "block": (-(-rows // 128), -(-columns // 64))}[per]
    scales = (rng.random(shape) + 0.1).astype(np.float32)
    spread = scales.reshape(-1, 1)
    if per == "block":
        spread = scales[np.arange(rows)[:, None] // 128, np.arange(columns) // 64]
    config = {"activation_scheme": "dynamic", "weight_block_size": [128, 64] if per == "block" else None}
    tensor = Fp8(config).read(packers.module(weight=codes, weight_scale_inv=scales))
    np.testing.assert_array_equal(tensor.float32(), E4M3[codes] * spread)


def test_values_of_e4m3() -> None:
    """Against torch's own."""
    torch = pytest.importorskip("torch")
    theirs = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float().numpy()
    np.testing.assert_array_equal(E4M3, theirs)


@given(SEED, BITS, st.integers(1, 5), st.integers(1, 100))
def test_unpacking(seed: int, bits: int, rows: int, count: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, count)).astype(np.uint8)
    np.testing.assert_array_equal(unpacked(packers.words(codes, bits).view(np.uint32), bits, count), codes)

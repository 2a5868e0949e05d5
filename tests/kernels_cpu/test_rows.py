"""Rows of activations, as the products want them: embedding, norm, rounding, quantizing."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int, c_int32, c_int64, c_void_p
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from kernels.cpu import library
from kernels.cpu.library import Spec, Struct, Weight, address
from kernels.reference import rms_norm

Array = NDArray[Any]

SIZES = [1, 16, 31, 48, 576, 1000]
EPS = 1e-5


class Operand(Struct):
    _fields_ = (
        ("kind", c_int32), ("stride", c_int64), ("data", c_void_p), ("scale", c_void_p), ("sums", c_void_p),
        ("offsets", c_void_p),
    )  # fmt: skip
    _arrays_: ClassVar = {"scale": np.float32, "sums": np.int32, "offsets": np.float32}


def at(array: Array | None) -> c_void_p:
    return c_void_p(None if array is None else address(array))


def normal(k: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(k, np.float32)


def prepared(
    cdll: ctypes.CDLL, isa: str, kind: str, x: Array, weight: Array | None = None
) -> tuple[Array, Array, Array, Array]:
    """Row 1 of an operand of 3, whose other rows are looked at: data, scales, sums, offsets."""
    padded = -(-len(x) // 32) * 32
    groups = padded // 32 if kind == "int4" else 1
    data = np.full((3, padded), 77, np.uint16 if kind == "bf16" else np.int8)
    scale, offsets = (np.full((3, groups), 7.0, np.float32) for _ in range(2))
    sums = np.full((3, 1), 7, np.int32)
    operand = Operand(kind=library.KINDS[kind], stride=padded, data=address(data))
    operand.point(scale=scale, sums=sums, offsets=offsets)
    cdll.pw_test_prepare(isa.encode(), at(x), at(weight), c_float(EPS), c_int(len(x)), byref(operand), c_int(1))
    assert all((whole[[0, 2]] == untouched).all() for whole, untouched in ((data, 77), (scale, 7), (sums, 7)))
    return data[1], scale[1], sums[1], offsets[1]


def hadamard(x: Array) -> Array:
    """Times Hadamard's matrix of 64, a last block of 32 by that of 32; x is a multiple of 32 long."""
    i, parts = np.arange(64), []
    matrix = np.array([[(-1.0) ** bin(a & b).count("1") for a in i] for b in i])
    for start in range(0, len(x), 64):
        part = x[start : start + 64].astype(np.float64)
        parts.append(part @ matrix[: len(part), : len(part)])
    return np.concatenate(parts)


def padded(x: Array) -> Array:
    return np.pad(x, (0, -len(x) % 32))


@pytest.mark.parametrize("k", SIZES)
def test_normalize(cdll: ctypes.CDLL, isa: str, k: int) -> None:
    x, weight = normal(k) * 30, normal(k, 1)
    y = np.full(k + 1, 5.0, np.float32)
    cdll.pw_test_normalize(isa.encode(), at(x), at(weight), c_float(EPS), c_int(k), at(y))
    expected = rms_norm(torch.from_numpy(x), torch.from_numpy(weight), EPS).numpy()
    np.testing.assert_allclose(y[:-1], expected, rtol=2e-6)
    assert y[-1] == 5.0
    cdll.pw_test_normalize(isa.encode(), at(x), at(weight), c_float(EPS), c_int(k), at(x))  # in place
    assert x.tobytes() == y[:-1].tobytes()


@pytest.mark.parametrize("k", SIZES)
def test_rounding(cdll: ctypes.CDLL, isa: str, k: int) -> None:
    x = normal(k)
    data, *_ = prepared(cdll, isa, "bf16", x)
    expected = torch.from_numpy(padded(x)).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert data.tobytes() == expected.tobytes()
    weight = normal(k, 1)
    data, *_ = prepared(cdll, isa, "bf16", x, weight)
    expected = padded(rms_norm(torch.from_numpy(x), torch.from_numpy(weight), EPS).numpy())
    np.testing.assert_allclose((data.astype(np.uint32) << 16).view(np.float32), expected, rtol=2**-8, atol=1e-30)


@pytest.mark.parametrize("k", [*SIZES, 4096 + 96])
def test_int8_is_rotated_with_one_scale_a_row(cdll: ctypes.CDLL, isa: str, k: int) -> None:
    x, weight = normal(k), normal(k, 1)
    for norm in (None, weight):
        data, scale, sums, _ = prepared(cdll, isa, "int8", x, norm)
        y = x if norm is None else rms_norm(torch.from_numpy(x), torch.from_numpy(norm), EPS).numpy()
        rotated = hadamard(padded(y))
        np.testing.assert_allclose(scale, np.abs(rotated).max() / 127, rtol=1e-5)
        assert np.abs(data - rotated / scale).max() < 0.501
        assert sums[0] == data.astype(int).sum()


@pytest.mark.parametrize("k", [*SIZES, 160, 224])
def test_int4_has_a_scale_a_group(cdll: ctypes.CDLL, isa: str, k: int) -> None:
    x, weight = normal(k), normal(k, 1)
    for norm in (None, weight):
        data, scale, _, offsets = prepared(cdll, isa, "int4", x, norm)
        y = x if norm is None else rms_norm(torch.from_numpy(x), torch.from_numpy(norm), EPS).numpy()
        groups = padded(y).reshape(-1, 32)
        np.testing.assert_allclose(scale, np.abs(groups).max(1) / 127, rtol=1e-6 if norm is None else 3e-6)
        codes = data.reshape(-1, 32)
        assert np.abs(codes - groups / scale[:, None]).max() < 0.501
        assert offsets.tobytes() == (scale * codes.sum(1, dtype=np.float32)).astype(np.float32).tobytes()


def test_rows_of_nothing_and_of_no_numbers(cdll: ctypes.CDLL, isa: str) -> None:
    for kind in ("int8", "int4"):
        for x in (np.zeros(64, np.float32), np.full(64, 1e-38, np.float32)):
            data, scale, *_ = prepared(cdll, isa, kind, x)
            assert not data.any()
            assert not scale.any()
        for bad in (np.nan, np.inf, -np.inf):
            x = normal(64)
            x[37] = bad
            _, scale, *_ = prepared(cdll, isa, kind, x)
            assert not np.isfinite(scale).all(), (kind, bad)


def test_embedding_rows(cdll: ctypes.CDLL, isa: str) -> None:
    """Of a table, or out of the head's panels: the same."""
    vocab, hidden = 100, 80
    rows = torch.randn(vocab, hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
    bits = rows.view(torch.int16).numpy().view(np.uint16)
    kp, panels = -(-hidden // 32) * 32, -(-vocab // 48)
    packed = np.zeros((panels * 48, kp), np.uint16)
    packed[:vocab, :hidden] = bits
    packed = np.ascontiguousarray(packed.reshape(panels, 48, kp // 2, 2).transpose(0, 2, 1, 3))
    head = Weight(kind=library.KINDS["bf16"], n=vocab, k=hidden, data=address(packed))
    for spec in (
        Spec(hidden_size=hidden, embedding_scale=3.0).point(embed=bits),
        Spec(hidden_size=hidden, embedding_scale=3.0, lm_head=head),
    ):
        for token in (0, 47, 48, 99):
            x = np.empty(hidden, np.float32)
            cdll.pw_test_embed(isa.encode(), byref(spec), c_int64(token), at(x))
            np.testing.assert_array_equal(x, rows[token].float().numpy() * np.float32(3.0))

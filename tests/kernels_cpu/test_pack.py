"""Packed forms, read back by their description in abi.h."""

from __future__ import annotations

import ctypes
from ctypes import c_int64, c_uint64, c_void_p

import numpy as np
import pytest
import torch

from kernels.cpu.library import GROUP, KINDS, PANEL, Bytes, address
from kernels.reference import hadamard_blocks
from tests.kernels_cpu.products import aligned, packed, round_up, unpack_int8

SIZES = [(1, 1), (48, 64), (49, 33), (100, 95), (96, 576), (200, 160)]


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_bf16(cdll: ctypes.CDLL, n: int, k: int) -> None:
    w = np.random.default_rng(0).integers(1, 2**16, (n, k), np.uint16)
    kp = round_up(k, GROUP)
    panels = packed(cdll, "bf16", n, k, w).view(np.uint16).reshape(-1, kp // 2, PANEL, 2)
    got = panels.transpose(0, 2, 1, 3).reshape(-1, kp)
    expected = np.zeros_like(got)
    expected[:n, :k] = w
    np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int8(cdll: ctypes.CDLL, n: int, k: int) -> None:
    """Each row is rotated, then rounded to 255 levels of its own."""
    w = np.random.default_rng(0).standard_normal((n, k)).astype(np.float32)
    w[1 : n // 2] = 0
    kp, padded = round_up(k, GROUP), round_up(n, PANEL)
    scale = np.full(padded, np.nan, np.float32)
    data = packed(cdll, "int8", n, k, w, scale)
    rotated = hadamard_blocks(torch.from_numpy(np.pad(w, [(0, 0), (0, kp - k)])).double()).numpy()
    np.testing.assert_allclose(scale[:n], np.abs(rotated).max(1) / 127, rtol=1e-5)
    codes = unpack_int8(data, padded, k)
    assert np.abs(codes).max() == 127
    error = np.abs(codes[:n] * scale[:n, None] - rotated)
    assert (error <= scale[:n, None] * 0.5001).all()
    assert not codes[n:].any()
    assert not scale[n:].any()
    assert not codes[1 : n // 2].any()


def test_rotation_keeps_products() -> None:
    """x Wᵀ = (x H)(W H / size)ᵀ, which is what lets both be rounded after it."""
    x, w = torch.randn(5, 160, dtype=torch.float64), torch.randn(7, 160, dtype=torch.float64)
    sizes = torch.tensor([64.0] * 128 + [32.0] * 32)
    torch.testing.assert_close((hadamard_blocks(x) * sizes) @ hadamard_blocks(w).T, x @ w.T)


@pytest.mark.parametrize(("n", "k"), SIZES)
def test_int4(cdll: ctypes.CDLL, n: int, k: int) -> None:
    rng = np.random.default_rng(0)
    padded, groups = round_up(n, PANEL), round_up(k, GROUP) // GROUP
    codes = rng.integers(0, 16, (n, k), np.uint8)
    d, m = (rng.integers(0, 2**16, (n, groups), np.uint16) for _ in range(2))
    data = packed(cdll, "int4", n, k, codes, d, m).reshape(padded // PANEL, groups, -1)
    halves = data[..., : 4 * PANEL].copy().view(np.uint16).reshape(-1, groups, 2, PANEL)
    for i, expected in enumerate((d, m)):
        got = halves[:, :, i].transpose(0, 2, 1).reshape(padded, groups)
        np.testing.assert_array_equal(got[:n], expected)
        assert not got[n:].any()
    q = data[..., 4 * PANEL :].reshape(-1, groups, 4, PANEL, 4).transpose(0, 3, 1, 2, 4).reshape(padded, groups, 16)
    got = np.concatenate([q & 15, q >> 4], 2).reshape(padded, groups * GROUP)
    np.testing.assert_array_equal(got[:n, :k], codes)
    assert not got[n:].any()
    assert not got[:, k:].any()


def test_sizes_beyond_2_gib(cdll: ctypes.CDLL) -> None:
    cdll.pw_packed_bytes.restype = c_int64
    n, k = 152064, 8192
    assert cdll.pw_packed_bytes(KINDS["bf16"], n, k, 0) == n * k * 2
    assert cdll.pw_packed_bytes(KINDS["int8"], 2 * n, 2 * k, 0) == 4 * n * k
    assert cdll.pw_packed_bytes(KINDS["int4"], 4 * n, 4 * k, 0) == 16 * n * k * 5 // 8


def checksum(cdll: ctypes.CDLL, data: Bytes) -> int:
    cdll.pw_checksum.restype, cdll.pw_checksum.argtypes = c_uint64, (c_void_p, c_int64)
    value: int = cdll.pw_checksum(address(data), data.nbytes)
    return value


def test_checksum(cdll: ctypes.CDLL) -> None:
    """Of the bytes and their number alone; any bit counts."""
    data = np.random.default_rng(0).integers(0, 256, 1000, np.uint8)
    expected = checksum(cdll, data)
    elsewhere = aligned(1100)[3:][:1000]
    elsewhere[:] = data
    assert checksum(cdll, elsewhere) == expected
    seen = {expected}
    for length in range(1000):
        seen.add(checksum(cdll, data[:length]))
    for bit in range(8000):
        elsewhere[bit // 8] ^= 1 << bit % 8
        seen.add(checksum(cdll, elsewhere))
        elsewhere[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 9001
    assert checksum(cdll, np.arange(256, dtype=np.uint8)) == KNOWN, "files that older versions wrote would be refused"


KNOWN = 0x68030D3B3B0BE6FD

"""Products over packed panels against float64, and their bits against a row's own, on every instruction set."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
import torch

from kernels.cpu.library import ACTIVATIONS, PANEL, Floats, weight
from kernels.reference import gated
from tests.kernels_cpu.products import (
    ADD,
    GLU,
    KINDS_TESTED,
    Doubles,
    Matrix,
    Rows,
    aligned,
    argmax,
    from_bf16,
    make_rows,
    matrix,
    packed,
    product,
    rows_for,
    to_bf16,
)

# n and k that are multiples of nothing; one span of k and several, widened or not; a k whose last block is half of one.
SHAPES = [(1, 1), (48, 32), (100, 95), (145, 576), (50, 3300)]
MANY = [1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 31, 33, 63, 64, 65, 128, 200]


def expected(w: Matrix, x: Rows) -> Doubles:
    return x.dense @ w.dense.T


def close(got: Floats, w: Matrix, x: Rows, want: Doubles) -> None:
    """Within what float32 sums of that many products may lose."""
    bound = np.abs(x.dense) @ w.terms.T
    assert (np.abs(got - want) <= bound * 2e-6 + 1e-30).all(), np.abs((got - want) / bound).max()


@pytest.mark.parametrize("kind", KINDS_TESTED)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products(cdll: ctypes.CDLL, isa: str, kind: str, n: int, k: int) -> None:
    for bias in (False, True):
        w = matrix(cdll, kind, n, k, bias=bias)
        for m in (1, 4, 6, 13, 70):
            x = rows_for(w, m)
            close(product(cdll, isa, w, x, threads=2, then_read=w), w, x, expected(w, x))


@pytest.mark.parametrize("kind", KINDS_TESTED)
def test_adds_and_writes_nothing_beside(cdll: ctypes.CDLL, isa: str, kind: str) -> None:
    w = matrix(cdll, kind, 100, 64, bias=True)
    for m in (1, 9):
        x = rows_for(w, m)
        into = np.random.default_rng(0).standard_normal((m, 117)).astype(np.float32)
        got = product(cdll, isa, w, x, ADD, into=into.copy())
        np.testing.assert_array_equal(got[:, :100], into[:, :100] + product(cdll, isa, w, x))
        np.testing.assert_array_equal(got[:, 100:], into[:, 100:])


@pytest.mark.parametrize("kind", KINDS_TESTED)
@pytest.mark.parametrize("bias", [False, True])
def test_glu(cdll: ctypes.CDLL, isa: str, kind: str, bias: bool) -> None:
    """Panels alternate gate and up; columns that the output has no room for are dropped."""
    w = matrix(cdll, kind, 4 * PANEL, 100, bias=bias)
    panels = [slice(i * PANEL, (i + 1) * PANEL) for i in range(4)]
    for m in (1, 11, 66):
        x = rows_for(w, m)
        y = torch.from_numpy(expected(w, x))
        gate, up = (torch.cat([y[:, panels[i]], y[:, panels[i + 2]]], 1) for i in (0, 1))
        want = gated(gate, up, "silu").numpy()
        got = product(cdll, isa, w, x, GLU, threads=2)
        np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max(), rtol=1e-4)
        narrow = product(cdll, isa, w, x, GLU, into=np.zeros((m, 80), np.float32))
        np.testing.assert_array_equal(narrow, got[:, :80])
        wide = product(cdll, isa, w, x, GLU, into=np.full((m, 100), 7, np.float32))
        np.testing.assert_array_equal(wide, np.pad(got, [(0, 0), (0, 4)], constant_values=7))
        rounded = product(cdll, isa, w, x, GLU, into=np.full((m, 70), 7, np.uint16))
        np.testing.assert_array_equal(rounded, to_bf16(got[:, :70].copy()))


@pytest.mark.parametrize("activation", list(ACTIVATIONS))
def test_activations(cdll: ctypes.CDLL, isa: str, activation: str) -> None:
    """act(v) · 1, of every v that a float32 makes of two bfloat16, near zero and far."""
    values = np.concatenate([np.linspace(-12, 12, 400), np.geomspace(1e-6, 90, 50), -np.geomspace(1e-6, 90, 50)])
    high = from_bf16(to_bf16(values.astype(np.float32)))
    low = from_bf16(to_bf16((values - high).astype(np.float32)))
    ones = np.zeros((2 * PANEL, 32), np.float32)
    ones[:PANEL, :2], ones[PANEL:, 2] = 1, 1
    w = matrix(cdll, "bf16", 2 * PANEL, 32)
    w.packed = weight("bf16", 2 * PANEL, 32, packed(cdll, "bf16", 2 * PANEL, 32, to_bf16(ones)))
    rows = np.zeros((len(values), 32), np.float32)
    rows[:, 0], rows[:, 1], rows[:, 2] = high, low, 1
    x = make_rows(0, 32, rows.astype(float), {"data": to_bf16(rows), "scale": None, "sums": None, "offsets": None})
    got = product(cdll, isa, w, x, GLU, activation=activation)
    exact = torch.from_numpy(high.astype(float) + low)
    want = gated(exact, torch.ones_like(exact), activation).numpy()
    np.testing.assert_allclose(got, np.broadcast_to(want[:, None], got.shape), rtol=2e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS_TESTED)
@pytest.mark.parametrize(("n", "k"), [(145, 576), (50, 3300)])
def test_a_row_has_the_same_bits_in_any_company(cdll: ctypes.CDLL, isa: str, kind: str, n: int, k: int) -> None:
    w = matrix(cdll, kind, n, k, bias=True)
    x = rows_for(w, max(MANY))
    alone = np.concatenate([product(cdll, isa, w, x.only(slice(i, i + 1))) for i in range(max(MANY))])
    for m in MANY:
        for threads in (1, 2, 3):
            first = (7 * m) % (max(MANY) - m + 1)
            rows = slice(first, first + m)
            np.testing.assert_array_equal(product(cdll, isa, w, x.only(rows), threads=threads), alone[rows])


@pytest.mark.parametrize("kind", KINDS_TESTED)
def test_glu_has_the_same_bits_in_any_company(cdll: ctypes.CDLL, isa: str, kind: str) -> None:
    w = matrix(cdll, kind, 4 * PANEL, 576)
    x = rows_for(w, 150)
    whole = product(cdll, isa, w, x, GLU, threads=3)
    for m in (1, 3, 5, 8, 37, 64, 65):
        np.testing.assert_array_equal(product(cdll, isa, w, x.only(slice(80, 80 + m)), GLU), whole[80 : 80 + m])


@pytest.mark.parametrize("kind", KINDS_TESTED)
@pytest.mark.parametrize("capped", [False, True])
def test_argmax_is_that_of_the_logits(cdll: ctypes.CDLL, isa: str, kind: str, capped: bool) -> None:
    w = matrix(cdll, kind, 1003, 96, bias=True)
    for m in (1, 5, 8, 70):
        x = rows_for(w, m)
        logits = product(cdll, isa, w, x)
        softcap = float(np.abs(logits).max()) if capped else 0.0
        for threads in (1, 3):
            values, columns = argmax(cdll, isa, w, x, threads=threads, softcap=softcap)
            if capped:
                best = np.take_along_axis(logits, columns[:, None], 1)[:, 0]
                np.testing.assert_allclose(values, softcap * np.tanh(best / softcap), rtol=1e-6)
                assert (best >= logits.max(1) - 1e-4 * np.abs(best)).all()
            else:
                np.testing.assert_array_equal(columns, logits.argmax(1))
                np.testing.assert_array_equal(values, logits.max(1))


def test_argmax_of_equals_is_the_first(cdll: ctypes.CDLL, isa: str) -> None:
    """Whoever found it: the greatest is in several panels, of several threads."""
    w = matrix(cdll, "bf16", 500, 32, bias=True)
    x = rows_for(w, 20)
    bias = np.full(528, -1000, np.float32)
    bias[500:] = 0  # beyond n, where products are 0: they must not win
    w.packed.point(bias=bias)
    data = np.frombuffer(w.packed.__dict__["_kept"]["data"], np.uint16)
    data[:] = 0
    for columns in ([499], [0, 499], [47, 48], [300, 301, 460], [96, 240, 430]):
        bias[:500] = -1000
        bias[columns] = -3
        for threads in (1, 2, 3):
            values, found = argmax(cdll, isa, w, x, threads=threads)
            assert (found == columns[0]).all()
            assert (values == -3).all()


def test_argmax_of_no_numbers_is_none(cdll: ctypes.CDLL, isa: str) -> None:
    w = matrix(cdll, "bf16", 100, 32)
    x = rows_for(w, 3)
    data = x.arrays["data"]
    assert data is not None
    data[1] = 0x7FC0
    values, columns = argmax(cdll, isa, w, x, threads=2)
    assert columns[1] == -1
    assert np.isneginf(values[1])
    assert (columns[[0, 2]] >= 0).all()


def test_panels_beyond_2_gib(cdll: ctypes.CDLL, isa: str) -> None:
    """Of zeros, which take no memory, but for the last one."""
    n, k = 152_000, 8192
    data = aligned(-(-n // PANEL) * PANEL * k * 2)
    last = data[-k * PANEL * 2 :].view(np.uint16).reshape(k // 2, PANEL, 2)
    last[-1, 5] = to_bf16(np.array([2.0, 3.0], np.float32))
    column = n // PANEL * PANEL + 5
    bits = np.zeros((1, k), np.uint16)
    bits[0, -2:] = to_bf16(np.ones(2, np.float32))
    x = make_rows(0, k, np.zeros((1, k)), {"data": bits, "scale": None, "sums": None, "offsets": None})
    w = Matrix("bf16", n, k, weight("bf16", n, k, data), np.zeros((0, k)), np.zeros((0, k)))
    values, columns = argmax(cdll, isa, w, x, threads=2)
    assert (values[0], columns[0]) == (5.0, column)

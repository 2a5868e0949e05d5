"""Matrices in the library's packed forms beside what they stand for, rows of activations for them, their products."""

from __future__ import annotations

import ctypes
from ctypes import byref, c_float, c_int32, c_int64, c_void_p
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import ACTIVATIONS, GROUP, KINDS, PANEL, Bytes, Floats, Struct, Weight, address, weight

KINDS_TESTED: Final = list(KINDS)
STORE, ADD, GLU = range(3)
Doubles = NDArray[np.float64]


class Operand(Struct):
    _fields_ = (
        ("kind", c_int32), ("stride", c_int64),
        ("data", c_void_p), ("scale", c_void_p), ("sums", c_void_p), ("offsets", c_void_p),
    )  # fmt: skip


class Output(Struct):
    _fields_ = (
        ("then", c_int32), ("c", c_void_p), ("ldc", c_int64), ("c_bf16", c_void_p), ("activation", c_int32),
        ("next", c_void_p), ("addition", c_void_p),
    )  # fmt: skip


BEST: Final = np.dtype([("value", np.float32), ("index", np.int32)])


def round_up(x: int, to: int) -> int:
    return -(-x // to) * to


def aligned(size: int, fill: int = 0) -> Bytes:
    raw = np.zeros(size + 64, np.uint8)
    if fill:
        raw[:] = fill
    return raw[-address(raw) % 64 :][:size]


def to_bf16(values: Floats) -> NDArray[np.uint16]:
    bits = values.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: NDArray[np.uint16]) -> Floats:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def packed(cdll: ctypes.CDLL, kind: str, n: int, k: int, *arrays: NDArray[Any], group: int = 0) -> Bytes:
    """What pw_pack_<kind> makes of row-major `arrays`; those after the sizes and the output are outputs too."""
    cdll.pw_packed_bytes.restype = c_int64
    out = aligned(cdll.pw_packed_bytes(KINDS[kind], n, k, group), fill=0xAB)
    if group:
        where = [c_void_p(address(array)) for array in arrays]
        assert cdll.pw_pack_affine(KINDS[kind], *where, n, k, group, c_void_p(address(out))) == 0
        return out
    inputs, outputs = (arrays[:-1], arrays[-1:]) if kind == "int8" else (arrays, ())
    arguments = [c_void_p(address(array)) for array in inputs]
    results = [c_void_p(address(array)) for array in (out, *outputs)]
    assert getattr(cdll, f"pw_pack_{kind}")(*arguments, n, k, *results) == 0
    return out


@dataclass
class Matrix:
    """W[n, k]: packed, and `dense` [n, kp], what a row of codes is multiplied by."""

    kind: str
    n: int
    k: int
    packed: Weight
    dense: Doubles
    terms: Doubles  # of what size the numbers are that are added up for it

    @property
    def kp(self) -> int:
        return round_up(self.k, GROUP)


def matrix(cdll: ctypes.CDLL, kind: str, n: int, k: int, *, bias: bool = False, seed: int = 0) -> Matrix:
    rng = np.random.default_rng(seed)
    kp, padded = round_up(k, GROUP), round_up(n, PANEL)
    values = rng.standard_normal((n, k)).astype(np.float32) / np.float32(np.sqrt(k))
    dense, scale, group, terms = np.zeros((n, kp)), None, 0, None
    if kind == "bf16":
        bits = to_bf16(values)
        data = packed(cdll, kind, n, k, bits)
        dense[:, :k] = from_bf16(bits)
    elif kind == "int8":
        scale = np.empty(padded, np.float32)
        data = packed(cdll, kind, n, k, values, scale)
        dense = unpack_int8(data, n, k) * scale[:n, None].astype(np.float64)
    elif kind == "w8a8":
        scale = np.zeros(padded, np.float32)
        scale[:n] = rng.uniform(0.01, 0.02, n)
        data = packed(cdll, kind, n, k, rng.integers(0, 256, (n, k), np.uint8))
        dense = unpack_int8(data, n, k) * scale[:n, None].astype(np.float64)
    elif kind in ("w4a16", "w8a16"):
        top, group = 16 if kind == "w4a16" else 256, (GROUP, 2 * GROUP, kp)[(n + k + seed) % 3]
        codes, groups = rng.integers(0, top, (n, k), np.uint8), -(-kp // group)
        scales = (rng.uniform(0.1, 0.2, (n, groups)) / top).astype(np.float32)
        zeros = rng.integers(0, top, (n, groups), np.uint8)
        data = packed(cdll, kind, n, k, codes, scales, zeros, group=group)
        each = np.arange(k) // group
        dense[:, :k] = (codes - zeros.astype(float)[:, each]) * scales.astype(float)[:, each]
        terms = np.zeros((n, kp))
        terms[:, :k] = (codes + 128 + zeros.astype(float)[:, each]) * scales.astype(float)[:, each]
    else:
        codes, groups = rng.integers(0, 16, (n, k), np.uint8), kp // GROUP
        d = rng.uniform(0.01, 0.02, (n, groups)).astype(np.float16)
        m = rng.uniform(-0.2, -0.1, (n, groups)).astype(np.float16)
        data = packed(cdll, kind, n, k, codes, d.view(np.uint16), m.view(np.uint16))
        each = np.arange(k) // GROUP
        dense[:, :k] = d.astype(float)[:, each] * codes + m.astype(float)[:, each]
    biases = np.zeros(padded, np.float32)
    biases[:n] = rng.standard_normal(n)
    packed_weight = weight(kind, n, k, data, scale, biases if bias else None, group)
    if bias:
        dense = np.concatenate([dense, biases[:n, None]], 1)  # of the column of ones that a row ends with
        terms = None if terms is None else np.concatenate([terms, np.abs(biases[:n, None])], 1)
    return Matrix(kind, n, k, packed_weight, dense, np.abs(dense) if terms is None else terms)


def unpack_int8(data: Bytes, n: int, k: int) -> Doubles:
    """Codes [n, kp]."""
    panels = data.reshape(-1, round_up(k, GROUP) // 4, PANEL, 4)
    return panels.transpose(0, 2, 1, 3).reshape(-1, round_up(k, GROUP))[:n].astype(float) - 128


@dataclass
class Rows:
    """Activations [m, kp] in the form that a kind multiplies, and `dense`, what they stand for."""

    operand: Operand
    dense: Doubles

    def only(self, rows: slice) -> Rows:
        """Some of them, copied: nothing of the others is near."""
        kept = {name: None if a is None else a[rows].copy() for name, a in self.arrays.items()}
        return make_rows(self.operand.kind, self.operand.stride, self.dense[rows], kept)

    @property
    def arrays(self) -> dict[str, NDArray[Any] | None]:
        return self.operand.__dict__["_kept"]  # type: ignore[no-any-return]


def make_rows(kind: int, stride: int, dense: Doubles, arrays: dict[str, NDArray[Any] | None]) -> Rows:
    operand = Operand(kind, stride)
    operand.__dict__["_kept"] = arrays
    for name, array in arrays.items():
        setattr(operand, name, None if array is None else address(array))
    return Rows(operand, dense)


def rows_for(w: Matrix, m: int, *, seed: int = 1) -> Rows:
    """Random ones. Beyond k they are zeros, but not for int8, whose padding is mixed into its block by the rotation."""
    rng = np.random.default_rng(seed)
    kp, groups = w.kp, w.kp // GROUP
    arrays: dict[str, NDArray[Any] | None] = {"scale": None, "sums": None, "offsets": None}
    if w.kind in ("bf16", "w4a16", "w8a16"):
        bits = to_bf16(rng.standard_normal((m, kp)).astype(np.float32))
        bits[:, w.k :] = 0
        arrays["data"], dense = bits, from_bf16(bits).astype(float)
        if w.kind != "bf16":
            arrays["offsets"] = dense.reshape(m, groups, GROUP).sum(2).astype(np.float32)
    else:
        codes = rng.integers(-127, 128, (m, kp), np.int8)
        if w.kind == "int4":
            codes[:, w.k :] = 0
        by_group = codes.reshape(m, groups, GROUP).astype(np.int32).sum(2)
        scale = rng.uniform(0.5, 2, (m, groups if w.kind == "int4" else 1)).astype(np.float32)
        dense = codes * np.repeat(scale, kp // scale.shape[1], 1).astype(float)
        arrays |= {"data": codes, "scale": scale}
        if w.kind != "int4":
            arrays["sums"] = by_group.sum(1, dtype=np.int32)
        else:
            arrays["offsets"] = scale * by_group.astype(np.float32)
    if w.dense.shape[1] > kp:
        dense = np.concatenate([dense, np.ones((m, 1))], 1)
    return make_rows(KINDS[w.kind], kp, dense, arrays)


def product(
    cdll: ctypes.CDLL,
    isa: str,
    w: Matrix,
    x: Rows,
    then: int = STORE,
    *,
    threads: int = 1,
    into: NDArray[Any] | None = None,
    activation: str = "silu",
    then_read: Matrix | None = None,
) -> NDArray[Any]:
    """[m, n], or half of it for GLU; or what `into` becomes: float32, or bfloat16 bits for GLU."""
    m, columns = len(x.dense), w.n // 2 if then == GLU else w.n
    out = np.full((m, columns), np.nan, np.float32) if into is None else into
    rounded = out.dtype == np.uint16
    where = (None, out.shape[1], address(out)) if rounded else (address(out), out.shape[1], None)
    following = None if then_read is None else ctypes.addressof(then_read.packed)
    output = Output(then, *where, ACTIVATIONS[activation], following)
    cdll.pw_test_gemm(isa.encode(), threads, byref(w.packed), byref(x.operand), m, byref(output))
    return out


def argmax(
    cdll: ctypes.CDLL, isa: str, w: Matrix, x: Rows, *, threads: int = 1, softcap: float = 0.0
) -> tuple[Floats, NDArray[np.int32]]:
    """Values and columns [m]: the best of the threads' bests."""
    best = np.zeros((threads, len(x.dense)), BEST)
    where = c_void_p(address(best))
    cdll.pw_test_gemm_argmax(
        isa.encode(), threads, byref(w.packed), byref(x.operand), len(x.dense), c_float(softcap), where
    )
    values, columns = best["value"], best["index"]
    order = np.lexsort((columns.astype(np.uint32), -values), axis=0)[0]
    each = np.arange(len(x.dense))
    return values[order, each], columns[order, each]

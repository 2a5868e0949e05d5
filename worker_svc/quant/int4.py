"""Weights as codes of four bits: w = d · q + m by groups of 32 in a row. A file's own, or chosen here. numpy only."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from worker_svc.models.raw_tensor import CheckpointError, RawTensor, Tensor

GROUP: Final = 32
SPANS: Final = (1.0, 0.95, 0.9, 0.85, 0.8)  # of a group's range, tried in turn: an outlier may cost less than its reach
CHUNK: Final = 1 << 13  # groups at a time: what is between weights and codes stays in the cache

Halves = NDArray[np.uint16]
Floats = NDArray[np.float32]


class Int4(NamedTuple):
    codes: NDArray[np.uint8]  # [n, k] 0…15
    d: Halves  # [n, ceil(k / 32)] bits of float16
    m: Halves  # likewise


def int4(tensor: Tensor) -> Int4:
    """A matrix [n, k]. Q4_0 and Q4_1 stay as they are, to the last bit; whatever else is rounded.

    Raises CheckpointError for weights that are not finite, or greater than a float16 scale can say.
    """
    with np.errstate(over="ignore", invalid="ignore"):  # looked for below
        match tensor:
            case RawTensor(dtype="Q4_0" | "Q4_1"):
                made = _kept(tensor)
            case _:
                made = rounded(tensor.finite())
    if any((part & 0x7C00 == 0x7C00).any() for part in (made.d, made.m)):
        raise CheckpointError(f"tensor {tensor.name!r} has weights too great for int4: its scales are of float16")
    return made


def _kept(tensor: RawTensor) -> Int4:
    tensor.check_blocks()
    n, k = tensor.shape
    d = _halves(tensor.data, 0)
    # Q4_0 is d · (q − 8); eight times a float16 is one unless it overflows.
    m = _halves(tensor.data, 2) if tensor.dtype == "Q4_1" else (d.view(np.float16) * np.float16(-8)).view(np.uint16)
    nibbles = tensor.data[:, -GROUP // 2 :]
    codes = np.empty((len(nibbles), GROUP), np.uint8)
    np.bitwise_and(nibbles, 0x0F, out=codes[:, : GROUP // 2])
    np.right_shift(nibbles, 4, out=codes[:, GROUP // 2 :])
    return Int4(codes.reshape(n, k), d.reshape(n, -1), m.reshape(n, -1))


def rounded(weights: Floats) -> Int4:
    """[n, k] float32. Of several spans for each group, the one whose rounded weights are nearest in the mean square.

    For each span: codes on an even grid, then d and m by least squares over those codes, then codes again for the d and
    m that a float16 can say.
    """
    n, k = weights.shape
    groups = -(-k // GROUP)
    # A short last group is filled up with its own last weight, so that its range stays what it is.
    padded = np.pad(weights, ((0, 0), (0, groups * GROUP - k)), mode="edge").reshape(-1, GROUP)
    codes = np.zeros(padded.shape, np.uint8)
    d, m = np.full((2, len(padded)), np.nan, np.float16)  # until there is a span whose error is a number
    for begin in range(0, len(padded), CHUNK):
        part = slice(begin, begin + CHUNK)
        _choose(padded[part], codes[part], d[part], m[part])
    codes = np.ascontiguousarray(codes.reshape(n, -1)[:, :k])
    return Int4(codes, d.view(np.uint16).reshape(n, -1), m.view(np.uint16).reshape(n, -1))


def _choose(w: Floats, codes: NDArray[np.uint8], d: NDArray[np.float16], m: NDArray[np.float16]) -> None:
    low, high = w.min(1, keepdims=True), w.max(1, keepdims=True)
    middle, mean = (low + high) / 2, w.mean(1, keepdims=True)
    least = np.full((len(w), 1), np.inf, np.float32)
    for span in SPANS:
        width = (high - low) * np.float32(span)
        q = _codes(w, width / 15, middle - width / 2)
        spread = q - q.mean(1, keepdims=True)
        step = (spread * w).sum(1, keepdims=True) / np.maximum((spread * spread).sum(1, keepdims=True), 1e-9)
        d16 = step.astype(np.float16)
        m16 = (mean - d16.astype(np.float32) * q.mean(1, keepdims=True)).astype(np.float16)
        q = _codes(w, d16.astype(np.float32), m16.astype(np.float32))
        error = w - (d16.astype(np.float32) * q + m16.astype(np.float32))
        error = (error * error).sum(1, keepdims=True)
        better = (error < least)[:, 0]
        least[better] = error[better]
        codes[better] = q[better].astype(np.uint8)
        d[better], m[better] = d16[better, 0], m16[better, 0]


def _codes(w: Floats, d: Floats, m: Floats) -> Floats:
    """Nearest codes, as floats; 0 for a group of one value, which m holds alone."""
    scale = np.divide(1, d, out=np.zeros_like(d), where=d != 0)
    q: Floats = np.rint((w - m) * scale)
    return np.clip(q, 0, 15, out=q)


def _halves(blocks: NDArray[np.uint8], at: int) -> Halves:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2")[:, 0]

"""The block-quantized types of ggml, as float32. numpy only.

A block is a run of 32 or 256 weights that share scales; the layouts are those of ggml-common.h. Where nibbles are
packed, a run's first half is in the low nibbles and its second half in the high ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Floats = NDArray[np.float32]

CHUNK: Final = 1 << 18  # weights at a time: what is between file and result stays in the cache


def dequantize(kind: str, blocks: Bytes) -> Floats:
    """[n, block_bytes] → [n, block_size]."""
    quant = QUANTS[kind]
    out = np.empty((len(blocks), quant.block_size), np.float32)
    step = CHUNK // quant.block_size
    for begin in range(0, len(blocks), step):
        quant.decode(blocks[begin : begin + step], out[begin : begin + step])
    return out


def finite(kind: str, blocks: Bytes) -> bool:
    """Whether all weights are. Their scales tell: a finite float16 times a few bits overflows no float32."""
    halves = [np.ascontiguousarray(blocks[:, at : at + 2]).view("<u2") for at in QUANTS[kind].scales]
    return not any((half & 0x7C00 == 0x7C00).any() for half in halves)


def _half(blocks: Bytes, at: int) -> Floats:
    """[n, 1] the float16 at byte `at` of each block."""
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """[…, h] → […, 2h]: the low nibbles, then the high ones."""
    return np.concatenate([packed & 0x0F, packed >> 4], axis=-1)


def _fifth_bits(blocks: Bytes, at: int) -> Bytes:
    """[n, 32] the bits of the u32 at byte `at`, lowest first, as 0 or 16."""
    return np.unpackbits(blocks[:, at : at + 4], axis=1, bitorder="little") << np.uint8(4)


def _q4_0(blocks: Bytes, out: Floats) -> None:
    out[:] = _nibbles(blocks[:, 2:])
    out -= 8
    out *= _half(blocks, 0)


def _q4_1(blocks: Bytes, out: Floats) -> None:
    out[:] = _nibbles(blocks[:, 4:])
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q5_0(blocks: Bytes, out: Floats) -> None:
    out[:] = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    out -= 16
    out *= _half(blocks, 0)


def _q5_1(blocks: Bytes, out: Floats) -> None:
    out[:] = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    out *= _half(blocks, 0)
    out += _half(blocks, 2)


def _q8_0(blocks: Bytes, out: Floats) -> None:
    out[:] = blocks[:, 2:].view(np.int8)
    out *= _half(blocks, 0)


def _scales_and_mins(packed: Bytes) -> tuple[Floats, Floats]:
    """[n, 12] → two of [n, 8]: eight scales and eight minima of 6 bits.

    The first four of each are the low 6 bits of bytes 0..3 and 4..7; the other four have their low nibbles in bytes
    8..11 (scale low, minimum high) and their upper two bits in the upper two bits of those first eight bytes.
    """
    first, second, last = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([first & 63, (last & 15) | (first >> 6 << 4)], axis=1)
    mins = np.concatenate([second & 63, (last >> 4) | (second >> 6 << 4)], axis=1)
    return scales.astype(np.float32), mins.astype(np.float32)


def _affine_runs(blocks: Bytes, quants: Bytes, out: Floats) -> None:
    """Eight runs of 32, each with its scale and minimum; `quants` is [n, 8, 32]."""
    scales, mins = _scales_and_mins(blocks[:, 4:16])
    runs = out.reshape(-1, 8, 32)
    runs[:] = quants
    runs *= (_half(blocks, 0) * scales)[:, :, None]
    runs -= (_half(blocks, 2) * mins)[:, :, None]


def _q4_k(blocks: Bytes, out: Floats) -> None:
    _affine_runs(blocks, _nibbles(blocks[:, 16:].reshape(-1, 4, 32)).reshape(-1, 8, 32), out)


def _q5_k(blocks: Bytes, out: Floats) -> None:
    low = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32)
    # Bit g of byte l is the fifth bit of weight l in run g.
    fifth = (blocks[:, 16:48][:, None, :] >> np.arange(8, dtype=np.uint8)[:, None] & np.uint8(1)) << np.uint8(4)
    _affine_runs(blocks, low | fifth, out)


def _q6_k(blocks: Bytes, out: Floats) -> None:
    """Two halves of 128 weights, each four runs of 32: nibbles in 64 bytes, two more bits in 32, a scale a 16."""
    low = blocks[:, :128].reshape(-1, 2, 64)
    high = blocks[:, 128:192].reshape(-1, 2, 1, 32)
    upper = (high >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
    quants = _nibbles(low).reshape(-1, 2, 4, 32) | (upper << 4)
    scales = blocks[:, 192:208].view(np.int8).astype(np.float32) * _half(blocks, 208)
    runs = out.reshape(-1, 16, 16)
    runs[:] = quants.reshape(-1, 16, 16)
    runs -= 32
    runs *= scales[:, :, None]


class Quant(NamedTuple):
    block_size: int
    decode: Callable[[Bytes, Floats], None]
    scales: tuple[int, ...]  # where in a block its float16 are: all else of it is integers


QUANTS: Final = {
    "Q4_0": Quant(32, _q4_0, (0,)),
    "Q4_1": Quant(32, _q4_1, (0, 2)),
    "Q5_0": Quant(32, _q5_0, (0,)),
    "Q5_1": Quant(32, _q5_1, (0, 2)),
    "Q8_0": Quant(32, _q8_0, (0,)),
    "Q4_K": Quant(256, _q4_k, (0, 2)),
    "Q5_K": Quant(256, _q5_k, (0, 2)),
    "Q6_K": Quant(256, _q6_k, (208,)),
}

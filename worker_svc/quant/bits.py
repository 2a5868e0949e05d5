"""Codes of a few bits in words of 32, lowest bits first: the packing that GPTQ and compressed-tensors share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint32]
Codes = NDArray[np.uint8]


def unpacked(words: Words, bits: int, count: int) -> Codes:
    """[R, W] → [R, count]: codes run along the last axis, and go on from one word into the next. `bits` 2, 3, 4 or 8.

    Where bits do not divide 32 (3), 32 codes fill `bits` words exactly.
    """
    if bits in (2, 4, 8):
        per_byte, octets = 8 // bits, np.ascontiguousarray(words, dtype="<u4").view(np.uint8)
        if bits == 8:
            return octets[:, :count]
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes = octets[:, :, None] >> shifts & np.uint8((1 << bits) - 1)
        return codes.reshape(len(words), octets.shape[1] * per_byte)[:, :count]
    at = np.arange(count) * bits
    word, shift = at // 32, (at % 32).astype(np.uint64)
    wide = np.concatenate([words, np.zeros_like(words[:, :1])], axis=1).astype(np.uint64)
    both = wide[:, word] | wide[:, word + 1] << np.uint64(32)
    return (both >> shift & np.uint64((1 << bits) - 1)).astype(np.uint8)


def num_words(count: int, bits: int) -> int:
    """Of a run of codes, the last of which may be filled up."""
    return -(-count * bits // 32)

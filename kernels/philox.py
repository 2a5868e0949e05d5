"""Counter-based noise: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) in torch.

The noise of a token is a function of (seed, position, vocabulary index) and of nothing else, so a stream goes on after
a crash, a preemption or in another batch as it would have gone on:

    key      seed & 0xffffffff, seed >> 32
    counter  index // 4, position, 0, 0        one call serves four neighbouring indices: word index % 4
    uniform  ((word >> 9) + 0.5) · 2⁻²³        exact in float32 and strictly inside (0, 1)
    gumbel   −log(−log(uniform))

32-bit words live in int64 tensors, which every device has: products wrap modulo 2⁶⁴, as they should.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

ROUNDS: Final = 10
MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
WEYL: Final = (0x9E3779B9, 0xBB67AE85)  # golden ratio and √3 − 1: added to the key before each round but the first
MASK32: Final = 0xFFFFFFFF
CHUNK: Final = 1 << 13  # calls at a time: their words stay in a core's cache through all rounds
# The greatest noise there is: of the greatest uniform, 1 − 2⁻²⁴, and a little, for a logarithm that rounds.
MAX_GUMBEL: Final = -math.log(-math.log1p(-(2.0**-24))) * (1 + 1e-5)


def philox4x32(counter: Tensor, key: Tensor) -> Tensor:
    """[4, n] words from a counter [4, n] and a key [2, n]: int64 with values below 2³²."""
    words = torch.empty_like(counter)
    for begin in range(0, counter.shape[1], CHUNK):
        part = slice(begin, begin + CHUNK)
        _rounds(counter[:, part], key[:, part], words[:, part])
    return words


def _rounds(counter: Tensor, key: Tensor, out: Tensor) -> None:
    """In place and with few masks, for speed: only what is multiplied next has to be clean above bit 31."""
    c0, c1, c2, c3 = counter.clone().unbind()
    k0, k1 = key.clone().unbind()
    for _ in range(ROUNDS):
        low, high = c0.mul_(MULTIPLIERS[0]), c2.mul_(MULTIPLIERS[1])
        # The shift is arithmetic: it drags the sign along, which the mask takes off.
        c0 = (high >> 32).bitwise_xor_(c1).bitwise_xor_(k0).bitwise_and_(MASK32)
        c2 = (low >> 32).bitwise_xor_(c3).bitwise_xor_(k1).bitwise_and_(MASK32)
        c1, c3 = high, low
        k0 += WEYL[0]
        k1 += WEYL[1]
    torch.stack((c0, c1 & MASK32, c2, c3 & MASK32), out=out)


def gumbel(seeds: Tensor, positions: Tensor, indices: Tensor) -> Tensor:
    """[n] float32 standard Gumbel noise for (seed, position, vocabulary index), each int64 [n].

    A seed of 64 bits arrives as the int64 with the same bits. Costs least when neighbouring indices of one stream are
    neighbours here: four of them share a call of Philox.
    """
    quads = indices >> 2
    first = torch.ones_like(quads, dtype=torch.bool)  # of its run of neighbours that share a call
    first[1:] = (quads[1:] != quads[:-1]) | (seeds[1:] != seeds[:-1]) | (positions[1:] != positions[:-1])
    call = torch.cumsum(first, 0) - 1
    counter = torch.zeros((4, int(first.sum())), dtype=torch.int64, device=indices.device)
    counter[0], counter[1] = quads[first], positions[first]
    key = torch.stack((seeds[first] & MASK32, seeds[first] >> 32 & MASK32))
    word = philox4x32(counter, key)[indices & 3, call]
    uniform = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    return -torch.log(-torch.log(uniform))

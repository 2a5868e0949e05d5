"""What a sampler computes of a token on a device, by the rules of kernels/philox.py and worker_svc/sampler.py.

    rank key   int64: the tokens of a row in one order, by logit down, then by id up; no two have the same
    weight     int64: exp in units of 2⁻⁴⁰, so that sums have no order
    gumbel     float32: the noise of (seed, position, token)

All three have the same bits on every device, and interpreted: see docs/decisions/0035-sampling-on-a-gpu.md.
"""

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from kernels.gpu.slot_state import SAMPLING_WORDS

ID_BITS: Final = 20  # of a rank key: more tokens than any vocabulary has

UNIT = tl.constexpr(2.0**40)
LIMIT = tl.constexpr(3e33)  # as worker_svc/sampling_rules.py has it: no sound logit is greater
GREEDY_BELOW = tl.constexpr(1e-5)
LAST_ID = tl.constexpr((1 << ID_BITS) - 1)
LOWEST = tl.constexpr(-3.4028234663852886e38)
_ID_BITS = tl.constexpr(ID_BITS)
_WORDS = tl.constexpr(SAMPLING_WORDS)


@triton.jit
def ascending(x):
    """int32, greater for a greater float32, the same for an equal one; never of −0."""
    bits = x.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def rank_key(logit, token):
    """Greater for a likelier token."""
    return (ascending(logit).to(tl.int64) << _ID_BITS) + (LAST_ID - token)


@triton.jit
def weight(x):
    """int64 eˣ in units of 2⁻⁴⁰, cut to an integer; x ≤ 0. Only products and sums: where they are not fused, the same
    bits on every device. Coefficients: minimax on ±½ ln 2 (Cephes' expf)."""
    x = tl.where(x > -28.0, x, -28.0)  # which weighs nothing
    n = tl.floor(x * 1.44269504 + 0.5)
    r = (x - n * 0.693359375) + n * 2.12194440e-4  # ln 2 in two parts, the first of nine bits
    p = 1.9875691500e-4
    p = p * r + 1.3981999507e-3
    p = p * r + 8.3334519073e-3
    p = p * r + 4.1665795894e-2
    p = p * r + 1.6666665459e-1
    p = p * r + 5.0000001201e-1
    mantissa = p * (r * r) + r + 1.0
    power = ((n.to(tl.int32) + (127 + 40)) << 23).to(tl.float32, bitcast=True)
    return (mantissa * power).to(tl.int64)


@triton.jit
def rounded_log(x):
    """Of float32, taken in float64: of all uniforms that there are, and of their logarithms, none comes so near to the
    middle of two float32 that 49 places of float64 would matter. So these are the same bits on every device."""
    return tl.log(x.to(tl.float64)).to(tl.float32)


@triton.jit
def gumbel(seed, position, first, BLOCK: tl.constexpr):
    """[BLOCK] noise of the tokens from `first` on, a multiple of four."""
    quads = (first // 4 + tl.arange(0, BLOCK // 4)).to(tl.uint32)
    zero = quads * 0
    w0, w1, w2, w3 = tl.philox(seed, quads, zero + position.to(tl.uint32), zero, zero)
    words = tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), [BLOCK])
    uniform = ((words >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07  # 2⁻²³
    return -rounded_log(-rounded_log(uniform))


@triton.jit
def load_param(sampling, slot, word: tl.constexpr):
    return tl.load(sampling + slot * _WORDS + word)


@triton.jit
def load_float(sampling, slot, word: tl.constexpr):
    return tl.load(sampling + slot * _WORDS + word).to(tl.float32, bitcast=True)


@triton.jit
def load_wide(sampling, slot, word: tl.constexpr):
    low = tl.load(sampling + slot * _WORDS + word).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(sampling + slot * _WORDS + word + 1).to(tl.uint32, bitcast=True).to(tl.uint64)
    return low | (high << 32)

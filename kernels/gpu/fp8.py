"""float8 e4m3 (Micikevicius et al., "FP8 formats for deep learning", 2022) made of float32 by integer arithmetic.

Triton knows the type on sm_89 and later only, AMD's gfx942 converts to another e4m3 (fnuz: half the range, other NaN),
and the interpreter rounds half up. Pages are bytes that all of them must read alike, so none of them is asked: a dozen
integer operations an element, behind a store that waits for memory, on every target the same bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def to_e4m3(x):
    """float32 → uint8: the nearest float8_e4m3fn, ties to even, ±448 for whatever is greater, NaN for NaN."""
    bits = x.to(tl.uint32, bitcast=True)
    size = bits & 0x7FFFFFFF
    capped = tl.minimum(size, 0x43E00000)  # 448.0: without its sign, a float orders as its bits do
    # Exponents are biased by 127 and by 7; half of the last place that stays is added, less one bit if that is even.
    normal = (capped - 0x3C000000 + 0x7FFFF + ((capped >> 20) & 1)) >> 20
    # Below 2⁻⁶ the places stay where they are, 2⁻⁹ apart, as those of float32 between 2¹⁴ and 2¹⁵.
    shifted = size.to(tl.float32, bitcast=True) + 16384.0
    subnormal = shifted.to(tl.uint32, bitcast=True) - 0x46800000
    byte = tl.where(size < 0x3C800000, subnormal, normal)
    byte = tl.where(size > 0x7F800000, 0x7F, byte)
    return (byte | ((bits >> 24) & 0x80)).to(tl.uint8)


@triton.jit
def from_e4m3(bits, NANS: tl.constexpr, dtype: tl.constexpr):
    """float8_e4m3fn as its byte → bfloat16, float16 or float32, exactly; the two NaN codes become ±480 without NANS.

    The bits moved into place are a number whose exponent lacks the difference of the biases.
    """
    if dtype == tl.float16:
        moved = ((bits.to(tl.uint16) & 0x80) << 8) | ((bits.to(tl.uint16) & 0x7F) << 7)
        number = moved.to(tl.float16, bitcast=True) * 256.0
    else:
        moved = ((bits.to(tl.uint32) & 0x80) << 24) | ((bits.to(tl.uint32) & 0x7F) << 20)
        number = moved.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^(127 − 7)
    if NANS:
        number = tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
    if dtype == tl.bfloat16:  # its bits are the upper half, and there are none below
        return (number.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return number


@triton.jit
def fn_to_fnuz(byte):
    """The byte of a float8_e4m3fn → that of the float8_e4m3fnuz of half the value: the same, but for −0 and NaN."""
    byte = tl.where(byte == 0x80, 0, byte)
    return tl.where((byte & 0x7F) == 0x7F, 0x80, byte).to(tl.uint8)

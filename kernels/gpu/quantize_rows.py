"""Activations as int8 or float8 e4m3 and their scales: of each token, of 128 columns of a token, or one given for all.

A scale is the greatest of its values over the greatest code, so that nothing is cut off; a given one may be too small,
and then values become the greatest code. Values are divided, not multiplied by a reciprocal, and rounded half to even:
the codes are those of the libraries that made the checkpoint, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, expect
from kernels.gpu.fp8 import fn_to_fnuz, to_e4m3

GROUP: Final = 128  # columns of a token that share a scale
BLOCK: Final = 4096
WARPS: Final = 4
NAMES: Final = {torch.int8: "int8", torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz"}


@triton.jit
def size_bits(x):
    """|x| as bits, which order as the numbers do, infinity and NaN above all: what is not finite becomes the scale."""
    return (x.to(tl.uint32, bitcast=True) & 0x7FFFFFFF).to(tl.int32)


@triton.jit
def scale_of(greatest, FORM: tl.constexpr):
    """From the bits of the greatest; no less than the smallest normal float32, so that zeros are 0 / scale = 0."""
    most: tl.constexpr = 127.0 if FORM == "int8" else 448.0  # fnuz: 224 of its own, for the same bytes as elsewhere
    least: tl.constexpr = most * 2.0**-126
    greatest = tl.where(greatest.to(tl.float32, bitcast=True) < least, least, greatest.to(tl.float32, bitcast=True))
    return tl.div_rn(greatest, tl.full(greatest.shape, most, tl.float32))


@triton.jit
def code_of(x, scale, FORM: tl.constexpr):
    quotient = tl.div_rn(x, scale)
    if FORM == "int8":
        quotient = tl.minimum(tl.maximum(quotient, -127.0), 127.0)
        # A float32 near 1.5 · 2^23 has no places below 1: the sum is rounded half to even, and ends in the integer.
        return (quotient + 12582912.0).to(tl.int32, bitcast=True).to(tl.int8)
    elif FORM == "e4m3fn":
        return to_e4m3(quotient)
    else:
        return fn_to_fnuz(to_e4m3(quotient))


@triton.jit
def quantize_rows_kernel(
    x, out, scales, x_stride, out_stride, K: tl.constexpr, FORM: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """A row twice: for its greatest, and for its codes, when it is in the cache."""
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    greatest = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, K, BLOCK):
        value = tl.load(x + row * x_stride + begin + at, mask=begin + at < K, other=0.0).to(tl.float32)
        greatest = tl.maximum(greatest, size_bits(value))
    scale = scale_of(tl.max(greatest, 0)[None], FORM)
    for begin in range(0, K, BLOCK):
        inside = begin + at < K
        value = tl.load(x + row * x_stride + begin + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * out_stride + begin + at, code_of(value, scale, FORM), mask=inside)
    if FORM == "e4m3fnuz":
        scale *= 2.0
    tl.store(scales + row + tl.arange(0, 1), scale)


@triton.jit
def quantize_groups_kernel(
    x, out, scales, given, x_stride, out_stride,
    K: tl.constexpr, FORM: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of a row; `given`: the scale of all, in units of FORM. Grid (rows, ⌈groups / GROUPS⌉)."""
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    at = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    value = tl.load(x + row * x_stride + at, mask=at < K, other=0.0).to(tl.float32)
    unit: tl.constexpr = 2.0 if FORM == "e4m3fnuz" else 1.0
    if given is None:
        scale = scale_of(tl.max(size_bits(value), 1), FORM)
        groups: tl.constexpr = (K + GROUP - 1) // GROUP
        tl.store(scales + row * groups + group, scale * unit, mask=group < groups)
        code = code_of(value, scale[:, None], FORM)
    else:
        code = code_of(value, tl.load(given) / unit, FORM)
    tl.store(out + row * out_stride + at, code, mask=at < K)


def quantize_rows(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [M, K] → codes of `dtype` [M, K] and float32 scales [M, 1]: x ≈ codes · scales, a scale a row.

    x bfloat16, float16 or float32, rows may be strided; dtype int8, float8_e4m3fn or float8_e4m3fnuz (MI300's). What is
    not finite makes its row's scale so. Raises ValueError naming the argument.
    """
    out = _codes(x, dtype)
    scales = x.new_empty(x.shape[0], 1, dtype=torch.float32)
    rows, k = x.shape
    if out.numel():
        quantize_rows_kernel[(rows,)](
            x, _bytes(out), scales, x.stride(0), out.stride(0), K=k, FORM=NAMES[dtype], BLOCK=_block(k), num_warps=WARPS
        )
    return out, scales


def quantize_groups(x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """As `quantize_rows`, a scale for each 128 columns of a row, of which the last may be fewer: [M, ⌈K / 128⌉]."""
    out = _codes(x, dtype)
    scales = x.new_empty(x.shape[0], triton.cdiv(x.shape[1], GROUP), dtype=torch.float32)
    _launch_groups(x, out, scales, None)
    return out, scales


def quantize_by(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x [M, K] / scale [1], float32 and above 0, to codes; beyond the greatest code, that. A code times scale is x's.

    So for float8_e4m3fnuz `scale` is twice a checkpoint's, whose codes are float8_e4m3fn. Raises ValueError naming the
    argument.
    """
    expect("scale", scale, (1,), (torch.float32,), x)
    out = _codes(x, dtype)
    _launch_groups(x, out, scale, scale)
    return out


def _block(k: int) -> int:
    return min(int(triton.next_power_of_2(k)), BLOCK)


def _groups(k: int) -> int:
    return min(int(triton.next_power_of_2(triton.cdiv(k, GROUP))), BLOCK // GROUP)


def _codes(x: Tensor, dtype: torch.dtype) -> Tensor:
    expect("x", x, (None, None), FLOATS, x)
    if dtype not in NAMES:
        raise ValueError(f"dtype is {dtype}, not {' or '.join(map(str, NAMES))}")
    return torch.empty(x.shape, dtype=dtype, device=x.device)


def _bytes(codes: Tensor) -> Tensor:
    return codes if codes.dtype == torch.int8 else codes.view(torch.uint8)


def _launch_groups(x: Tensor, out: Tensor, scales: Tensor, given: Tensor | None) -> None:
    rows, k = x.shape
    if out.numel():
        groups = _groups(k)
        quantize_groups_kernel[(rows, triton.cdiv(k, groups * GROUP))](
            x, _bytes(out), scales, given, x.stride(0), out.stride(0),
            K=k, FORM=NAMES[out.dtype], GROUPS=groups, GROUP=GROUP, num_warps=WARPS,
        )  # fmt: skip


def ahead() -> Iterator[Ahead]:
    for model in (MODELS[0], MODELS[-1]):
        k = model.intermediate
        for dtype, form in NAMES.items():
            targets = ("gfx942",) if form == "e4m3fnuz" else ("sm_80", "sm_90", "gfx942")
            out = "*i8" if dtype == torch.int8 else "*u8"
            common = {"x": "*bf16", "out": out, "scales": "*fp32", "x_stride": "i32", "out_stride": "i32"}
            strides = ("x_stride", "out_stride")
            constants = {"K": k, "FORM": form}
            yield Ahead(
                quantize_rows_kernel, f"{model.name} {form}", common, {**constants, "BLOCK": _block(k)},
                WARPS, multiples_of_16=strides, targets=targets,
            )  # fmt: skip
            groups = {**constants, "GROUPS": _groups(k), "GROUP": GROUP}
            yield Ahead(
                quantize_groups_kernel, f"{model.name} {form} given", {**common, "given": "*fp32"}, groups,
                WARPS, multiples_of_16=strides, targets=targets,
            )  # fmt: skip
            if dtype != torch.int8:
                yield Ahead(
                    quantize_groups_kernel, f"{model.name} {form}", common, {**groups, "given": None},
                    WARPS, multiples_of_16=strides, targets=targets,
                )  # fmt: skip

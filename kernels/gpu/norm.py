"""RMS norm (Zhang and Sennrich, 2019) of the residual stream, with the addition before it.

A row is one program's, in one block: the same row gives the same bits in any batch.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, POINTERS, expect

MAX_HIDDEN = 1 << 15  # of a block in registers


@triton.jit
def rms_norm_kernel(
    x,
    residual,
    weight,
    out,
    eps,
    offset,
    x_stride,
    residual_stride,
    out_stride,
    HIDDEN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < HIDDEN
    value = tl.load(x + row * x_stride + at, mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        kept = residual + row * residual_stride + at
        value += tl.load(kept, mask=inside, other=0.0).to(tl.float32)
        # Rounded as the stream is: the norm is of what later layers will read.
        value = value.to(residual.dtype.element_ty)
        tl.store(kept, value, mask=inside)
        value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value, 0) / HIDDEN + eps)
    gain = tl.load(weight + at, mask=inside, other=0.0).to(tl.float32) + offset
    tl.store(out + row * out_stride + at, value * scale * gain, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor, *, weight_offset: float = 0.0) -> None:
    """out = x / rms(x) · (weight + weight_offset), in float32 and rounded once.

    x and out [T, D], weight [D], each bfloat16, float16 or float32; rows may be strided. Gemma's weights are stored
    less one: weight_offset 1. Raises ValueError naming the argument.
    """
    _launch(x, None, weight, eps, out, weight_offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, out: Tensor, *, weight_offset: float = 0.0
) -> None:
    """residual += x, in place and rounded to its dtype; then out = rms_norm(residual). Shapes as of `rms_norm`."""
    _launch(x, residual, weight, eps, out, weight_offset)


def _launch(x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, out: Tensor, offset: float) -> None:
    expect("x", x, (None, None), FLOATS, x)
    rows, hidden = x.shape
    if residual is not None:
        expect("residual", residual, (rows, hidden), FLOATS, x)
    expect("weight", weight, (hidden,), FLOATS, x)
    expect("out", out, (rows, hidden), FLOATS, x)
    if not 0 < hidden <= MAX_HIDDEN:
        raise ValueError(f"x has rows of {hidden} elements, not 1 to {MAX_HIDDEN}")
    if rows == 0:
        return
    block, warps = blocks(hidden)
    residual_stride = 0 if residual is None else residual.stride(0)
    strides = (x.stride(0), residual_stride, out.stride(0))
    rms_norm_kernel[(rows,)](
        x, residual, weight, out, eps, offset, *strides, HIDDEN=hidden, BLOCK=block, num_warps=warps
    )


def blocks(hidden: int) -> tuple[int, int]:
    """Elements of a block, and its warps: 16 elements a thread, up to 16 warps."""
    block = triton.next_power_of_2(hidden)
    return block, min(max(block // 512, 1), 16)


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        block, warps = blocks(model.hidden)
        for dtype in (torch.bfloat16, torch.float16) if model.name.startswith("llama") else (torch.bfloat16,):
            for adds in (False, True):
                pointer = POINTERS[dtype]
                tensors = dict.fromkeys(("x", "residual", "weight", "out") if adds else ("x", "weight", "out"), pointer)
                strides = ("x_stride", "residual_stride", "out_stride")
                constants = {"HIDDEN": model.hidden, "BLOCK": block}
                yield Ahead(
                    rms_norm_kernel,
                    f"{model.name} {pointer[1:]}{' with residual' if adds else ''}",
                    {**tensors, "eps": "fp32", "offset": "fp32", **dict.fromkeys(strides, "i32")},
                    constants if adds else {**constants, "residual": None},
                    num_warps=warps,
                    multiples_of_16=strides,
                )

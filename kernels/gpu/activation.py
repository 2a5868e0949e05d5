"""Gated activations (Shazeer, "GLU variants improve transformer", 2020) over a packed product: SwiGLU and GeGLU.

tanh is written as a sigmoid, 1 + tanh(u) = 2 · sigmoid(2 u): Triton has one and not the other on every target.
"""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, expect

ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
BLOCK = 1024
WARPS = 4


@triton.jit
def gated_kernel(
    gate_up, out, in_stride, out_stride, SIZE: tl.constexpr, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = at < SIZE
    gate = tl.load(gate_up + row * in_stride + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up + row * in_stride + SIZE + at, mask=inside, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        share = tl.sigmoid(gate)
    elif ACTIVATION == "gelu_tanh":
        share = tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))  # 2 · √(2 / π)
    else:
        share = 0.5 + 0.5 * tl.erf(gate * 0.7071067811865476)
    tl.store(out + row * out_stride + at, gate * share * up, mask=inside)


def gated(gate_up: Tensor, activation: str, out: Tensor) -> None:
    """out [T, I] = act(gate) · up, of gate_up [T, 2 I]: gates, then ups; activation as in ACTIVATIONS.

    Each bfloat16, float16 or float32, rows may be strided; float32 arithmetic, rounded once. Raises ValueError naming
    the argument.
    """
    expect("out", out, (None, None), FLOATS, gate_up)
    rows, size = out.shape
    expect("gate_up", gate_up, (rows, 2 * size), FLOATS, gate_up)
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}, not one of {', '.join(ACTIVATIONS)}")
    if out.numel() == 0:
        return
    gated_kernel[(rows, triton.cdiv(size, BLOCK))](
        gate_up, out, gate_up.stride(0), out.stride(0), SIZE=size, ACTIVATION=activation, BLOCK=BLOCK, num_warps=WARPS
    )


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        for activation in ACTIVATIONS if model.name.startswith("llama") else ("silu",):
            yield Ahead(
                gated_kernel,
                f"{model.name} bf16, {activation}",
                {"gate_up": "*bf16", "out": "*bf16", "in_stride": "i32", "out_stride": "i32"},
                {"SIZE": model.intermediate, "ACTIVATION": activation, "BLOCK": BLOCK},
                num_warps=WARPS,
                multiples_of_16=("in_stride", "out_stride"),
            )

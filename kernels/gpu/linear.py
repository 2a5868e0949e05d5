"""x Wᵀ + b whose rows do not feel each other: one tile and one order over K, however many rows there are.

A library takes another kernel, or splits K, for another number of rows, and a token's bits then depend on who else is
in the step (He et al., "Defeating Nondeterminism in LLM Inference", 2025). It is faster; this is what
`--batch-invariant` asks for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, expect
from kernels.gpu.tile import Tile

# 64 rows are what sm_90's warpgroup instruction needs; few columns leave programs for all multiprocessors in a step of
# few rows, which is bound by reading weights. Reasoned, not measured.
TILES: Final = {
    "sm_80": Tile(64, 64, 64, 4, 4),
    "sm_90": Tile(64, 64, 128, 4, 4),
    "gfx942": Tile(64, 64, 64, 4, 2),
}
FLOAT32_TILE: Final = Tile(16, 32, 32, 4, 1)  # multiplies without tensor cores, for checks


@triton.jit(do_not_specialize=["num_rows"])  # one compilation, whatever the number is
def linear_kernel(
    x, weight, bias, out, num_rows, x_stride, weight_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N / COLUMNS⌉, ⌈rows / ROWS⌉)."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    rows = x + (row * x_stride)[:, None] + depth[None, :]
    columns = weight + (column.to(tl.int64) * weight_stride)[None, :] + depth[:, None]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for begin in range(0, K, DEPTH):
        there = begin + depth < K
        a = tl.load(rows + begin, mask=(row < num_rows)[:, None] & there[None, :], other=0.0)
        b = tl.load(columns + begin, mask=there[:, None] & (column < N)[None, :], other=0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    if bias is not None:
        acc += tl.load(bias + column, mask=column < N, other=0.0).to(tl.float32)[None, :]
    to = out + (row * out_stride)[:, None] + column[None, :]
    tl.store(to, acc, mask=(row < num_rows)[:, None] & (column < N)[None, :])


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, kind: str) -> Tensor:
    """x [T, K] · weight [N, K] + bias [N] → [T, N], float32 and rounded once; all of one dtype.

    bfloat16, float16 or float32; rows may be strided. `kind` is a key of TILES. Raises ValueError naming the argument.
    """
    expect("x", x, (None, None), FLOATS, x)
    rows, k = x.shape
    expect("weight", weight, (None, k), (x.dtype,), x)
    n = weight.shape[0]
    if bias is not None:
        expect("bias", bias, (n,), (x.dtype,), x)
    out = x.new_empty(rows, n)
    tile = FLOAT32_TILE if x.dtype == torch.float32 else TILES[kind]
    if rows:
        linear_kernel[(triton.cdiv(n, tile.columns), triton.cdiv(rows, tile.rows))](
            x, weight, bias, out, rows, x.stride(0), weight.stride(0), out.stride(0), **_constants(n, k, tile),
            num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _constants(n: int, k: int, tile: Tile) -> dict[str, Any]:
    return {"N": n, "K": k, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        heads = (model.heads + 2 * model.kv_heads) * model.head_dim
        shapes = {
            "qkv": (heads, model.hidden),
            "o": (model.hidden, model.heads * model.head_dim),
            "gate_up": (2 * model.intermediate, model.hidden),
            "down": (model.hidden, model.intermediate),
            "lm_head": (model.vocab, model.hidden),
        }
        strides = ("x_stride", "weight_stride", "out_stride")
        for kind, tile in TILES.items():
            for what, (n, k) in shapes.items():
                yield Ahead(
                    linear_kernel,
                    f"{model.name} {what}",
                    {
                        **dict.fromkeys(("x", "weight", "out"), "*bf16"),
                        "num_rows": "i32",
                        **dict.fromkeys(strides, "i32"),
                    },
                    {**_constants(n, k, tile), "bias": None},
                    tile.num_warps,
                    tile.num_stages,
                    multiples_of_16=strides,
                    targets=(kind,),
                )

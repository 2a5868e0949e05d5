"""Low-rank additions for rows of different adapters in one launch (Punica: Chen et al., 2310.18547).

    shrunk[t] = A[adapter of t] · x[t]                       float32, one program a row
    y[t, first …] += scale · B[adapter of t] · shrunk[t]     one program a row and a run of columns

All adapters of a role lie in two tensors of fixed places, so a captured graph reads whatever was loaded there since. A
row is computed by itself, in one order: its bits are its own. Rows of index 0, and those whose adapter has a scale of 0
(it does not have this role), are left as they are, and cost a program that ends at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, POINTERS, expect

DEPTH: Final = 128  # columns of x at a time
COLUMNS: Final = 128  # of y in a program
RANKS: Final = (16, 32, 64, 128)  # that tensors of adapters are made for


@triton.jit
def lora_shrink_kernel(
    x, a, scales, index, shrunk, x_stride, K: tl.constexpr, RANK: tl.constexpr, DEPTH: tl.constexpr
):  # fmt: skip
    """Grid (rows). a [adapters, RANK, K], dense; shrunk [rows, RANK]."""
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(index + row).to(tl.int64)
    if tl.load(scales + adapter, mask=adapter > 0, other=0.0) != 0:
        rank, depth = tl.arange(0, RANK), tl.arange(0, DEPTH)
        weights = a + (adapter * RANK + rank)[:, None] * K + depth[None, :]
        acc = tl.zeros([RANK], tl.float32)
        for begin in range(0, K, DEPTH):
            there = begin + depth < K
            of_x = tl.load(x + row * x_stride + begin + depth, mask=there, other=0.0).to(tl.float32)
            of_a = tl.load(weights + begin, mask=there[None, :], other=0.0).to(tl.float32)
            acc += tl.sum(of_a * of_x[None, :], 1)
        tl.store(shrunk + row * RANK + rank, acc)


@triton.jit
def lora_expand_kernel(
    shrunk, b, scales, index, y, y_stride, N: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr
):  # fmt: skip
    """Grid (rows, ⌈N / COLUMNS⌉). b [adapters, N, RANK], dense; y from the role's first column on."""
    row = tl.program_id(0).to(tl.int64)
    adapter = tl.load(index + row).to(tl.int64)
    scale = tl.load(scales + adapter, mask=adapter > 0, other=0.0)
    if scale != 0:
        rank, column = tl.arange(0, RANK), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        inside = column < N
        of_x = tl.load(shrunk + row * RANK + rank)
        weights = b + (adapter * N + column)[:, None] * RANK + rank[None, :]
        of_b = tl.load(weights, mask=inside[:, None], other=0.0).to(tl.float32)
        added = tl.sum(of_b * of_x[None, :], 1) * scale
        to = y + row * y_stride + column
        tl.store(to, tl.load(to, mask=inside, other=0.0).to(tl.float32) + added, mask=inside)


def lora(x: Tensor, a: Tensor, b: Tensor, scales: Tensor, index: Tensor, y: Tensor, first: int = 0) -> None:
    """In place: y[t, first : first + N] += scales[i] · b[i] · (a[i] · x[t]) where i = index[t] > 0 and scales[i] ≠ 0.

    x [T, K], y [T, any], a [adapters + 1, R, K] and b [adapters + 1, N, R] of one dtype, bfloat16, float16 or float32;
    scales [adapters + 1] float32; index [T] int32; R one of RANKS, zeros beyond an adapter's own. Sums are float32, and
    y is rounded once. Raises ValueError naming the argument.
    """
    expect("x", x, (None, None), FLOATS, x)
    rows, k = x.shape
    expect("a", a, (None, None, k), (x.dtype,), x, contiguous=True)
    places, rank = a.shape[:2]
    if rank not in RANKS:
        raise ValueError(f"a has rank {rank}, not one of {', '.join(map(str, RANKS))}")
    expect("b", b, (places, None, rank), (x.dtype,), x, contiguous=True)
    expect("scales", scales, (places,), (torch.float32,), x)
    expect("index", index, (rows,), (torch.int32,), x)
    expect("y", y, (rows, None), (x.dtype,), x)
    n = b.shape[1]
    if not 0 <= first <= y.shape[1] - n:
        raise ValueError(f"first is {first}: y has {y.shape[1]} columns, and b adds to {n}")
    if not rows:
        return
    shrunk = torch.empty(rows, rank, dtype=torch.float32, device=x.device)
    lora_shrink_kernel[(rows,)](x, a, scales, index, shrunk, x.stride(0), K=k, RANK=rank, DEPTH=DEPTH, num_warps=4)
    lora_expand_kernel[(rows, triton.cdiv(n, COLUMNS))](
        shrunk, b, scales, index, y[:, first:], y.stride(0), N=n, RANK=rank, COLUMNS=COLUMNS, num_warps=4
    )


def ahead() -> Iterator[Ahead]:
    kind = POINTERS[torch.bfloat16]
    for model in MODELS:
        shapes = {
            "q": (model.heads * model.head_dim, model.hidden),
            "down": (model.hidden, model.intermediate),
        }
        for what, (n, k) in shapes.items():
            for rank in (16, 64) if model is MODELS[0] else (16,):
                name = f"{model.name} {what}, rank {rank}"
                yield Ahead(
                    lora_shrink_kernel,
                    name,
                    {"x": kind, "a": kind, "scales": "*fp32", "index": "*i32", "shrunk": "*fp32", "x_stride": "i32"},
                    {"K": k, "RANK": rank, "DEPTH": DEPTH},
                    multiples_of_16=("x_stride",),
                )
                pointers = {"shrunk": "*fp32", "b": kind, "scales": "*fp32", "index": "*i32", "y": kind}
                yield Ahead(
                    lora_expand_kernel,
                    name,
                    {**pointers, "y_stride": "i32"},
                    {"N": n, "RANK": rank, "COLUMNS": COLUMNS},
                    multiples_of_16=("y_stride",),
                )

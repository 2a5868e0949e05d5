"""Rows of the embedding table, of the whole vocabulary or of one rank's part of it."""

from __future__ import annotations

from collections.abc import Iterator

import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, INTEGERS, expect

BLOCK = 1024
WARPS = 4


@triton.jit
def embedding_kernel(
    token_ids, table, out, first_id, num_ids, scale, table_stride, out_stride, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids + row).to(tl.int64) - first_id
    ours = (token >= 0) & (token < num_ids)
    value = tl.load(table + token * table_stride + at, mask=(at < HIDDEN) & ours, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + at, value * scale, mask=at < HIDDEN)


def embed(token_ids: Tensor, table: Tensor, out: Tensor, *, first_id: int = 0, scale: float = 1.0) -> None:
    """out [T, D] = scale · table[token_ids - first_id], and zeros for ids that `table` [V, D] does not have.

    token_ids [T]. Zeros, so that ranks of tensor parallelism, each with `V` ids from its `first_id` on, add up to the
    whole. Table and out are bfloat16, float16 or float32, rows may be strided. Raises ValueError naming the argument.
    """
    expect("out", out, (None, None), FLOATS, token_ids)
    tokens, hidden = out.shape
    expect("token_ids", token_ids, (tokens,), INTEGERS, token_ids)
    expect("table", table, (None, hidden), FLOATS, token_ids)
    if out.numel() == 0:
        return
    embedding_kernel[(tokens, triton.cdiv(hidden, BLOCK))](
        token_ids, table, out, first_id, table.shape[0], float(scale), table.stride(0), out.stride(0),
        HIDDEN=hidden, BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        strides = ("table_stride", "out_stride")
        tensors = {"token_ids": "*i32", "table": "*bf16", "out": "*bf16"}
        yield Ahead(
            embedding_kernel,
            f"{model.name} bf16",
            {**tensors, "first_id": "i32", "num_ids": "i32", "scale": "fp32", **dict.fromkeys(strides, "i32")},
            {"HIDDEN": model.hidden, "BLOCK": BLOCK},
            num_warps=WARPS,
            multiples_of_16=strides,
        )

"""Block tables as FlashInfer reads them: the rows' blocks one behind the other."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import expect

BLOCK = 128
WARPS = 1


@triton.jit
def flat_tables_kernel(block_tables, borders, blocks, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    first = tl.load(borders + row)
    count = tl.load(borders + row + 1) - first
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        block = tl.load(block_tables + row * stride + at, mask=at < count)
        tl.store(blocks + first + at, block, mask=at < count)


def flatten_tables(block_tables: Tensor, borders: Tensor, blocks: Tensor) -> None:
    """blocks[borders[r] + i] = block_tables[r, i] for i < borders[r + 1] − borders[r].

    block_tables [R, B], borders [R + 1] ascending from 0, blocks at least borders[R] long: nobody looks. All int32.
    Raises ValueError naming the argument.
    """
    expect("block_tables", block_tables, (None, None), (torch.int32,), block_tables)
    rows = block_tables.shape[0]
    expect("borders", borders, (rows + 1,), (torch.int32,), block_tables)
    expect("blocks", blocks, (None,), (torch.int32,), block_tables)
    if rows:
        flat_tables_kernel[(rows,)](block_tables, borders, blocks, block_tables.stride(0), BLOCK=BLOCK, num_warps=WARPS)


def ahead() -> Iterator[Ahead]:
    yield Ahead(
        flat_tables_kernel,
        MODELS[0].name,
        {"block_tables": "*i32", "borders": "*i32", "blocks": "*i32", "stride": "i32"},
        {"BLOCK": BLOCK},
        num_warps=WARPS,
    )

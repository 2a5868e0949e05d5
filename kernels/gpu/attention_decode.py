"""Attention of rows with few queries: the keys of a row are split among programs, and the parts are combined.

A row's keys are its whole context and its queries are few, so the launch is bound by reading keys and values, and a
batch of few rows would leave most of the device idle: split-KV ("Flash-Decoding", Dao et al., 2023). Both launches read
all lengths from device memory, and their grids depend on the number of rows and the most splits only: so a graph that
captured them serves any lengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_tile import attend, finish, merge, split_borders, tile_queries


@triton.jit
def row_bounds(
    row: tl.tensor, cu_ptr: tl.tensor, context_ptr: tl.tensor, WINDOW: tl.constexpr
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """→ first token, number of queries, position of the first query, low, high: the positions that its queries see."""
    token = tl.load(cu_ptr + row)
    num_queries = tl.load(cu_ptr + row + 1) - token
    high = tl.load(context_ptr + row)
    start = high - num_queries
    low = tl.maximum(start - WINDOW + 1, 0) if WINDOW else 0
    return token, num_queries, start, low, high


@triton.jit(do_not_specialize=["table_stride", "num_splits", "split_tiles"])
def decode_kernel(
    q_ptr: tl.tensor,  # [tokens, heads, dim]
    k_ptr: tl.tensor,  # [blocks, kv heads, block_size, dim]
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,  # [rows, table_stride] block ids
    cu_ptr: tl.tensor,  # [rows + 1] first token of each row
    context_ptr: tl.tensor,  # [rows]
    rows_ptr: tl.tensor,  # [n] the rows of this launch, if MAPPED
    out_ptr: tl.tensor,  # [tokens, heads, dim]
    sums_ptr: tl.tensor,  # [n · QUERIES, heads, num_splits, 2] peak and total of each part
    parts_ptr: tl.tensor,  # [n · QUERIES, heads, num_splits, dim] acc of each part
    k_scale_ptr: tl.tensor,  # [1], if SCALED
    v_scale_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_stride: tl.tensor,
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    Q_STRIDE: tl.constexpr,
    NUM_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    SCALED: tl.constexpr,
    MAPPED: tl.constexpr,
    SPLIT: tl.constexpr,  # False: the only split writes the answer itself
    BATCH_INVARIANT: tl.constexpr,
    QUERIES: tl.constexpr,  # the most a row has
    HEADS: tl.constexpr,  # of one kv head, in one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid (n, kv heads · ⌈group / HEADS⌉, num_splits)."""
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    index, split = tl.program_id(0), tl.program_id(2)
    kv_head, chunk = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS
    row = tl.load(rows_ptr + index) if MAPPED else index
    token, num_queries, start, low, high = row_bounds(row, cu_ptr, context_ptr, WINDOW)
    first, last, base, per = split_borders(low, high, num_splits, split_tiles, BLOCK_N, BATCH_INVARIANT)
    begin = tl.maximum(base + split * per, first)
    end = tl.minimum(base + (split + 1) * per, last)
    if SPLIT and begin >= end:
        return

    first_head = kv_head * GROUP + chunk * HEADS
    queries, query, head, valid = tile_queries(
        q_ptr + token.to(tl.int64) * Q_STRIDE + first_head * DIM,
        num_queries, GROUP - chunk * HEADS, Q_STRIDE, HEADS, DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    logit_scale = scale * tl.load(k_scale_ptr) if SCALED else scale
    head_offset = kv_head * BLOCK_SIZE * DIM
    peak, total, acc = attend(
        queries, tl.where(valid, start + query, -1), k_ptr + head_offset, v_ptr + head_offset,
        table_ptr + row.to(tl.int64) * table_stride, begin, end, low, high, logit_scale, softcap,
        KV_HEADS, DIM, BLOCK_SIZE, WINDOW, SOFTCAP, FP8, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    dims = tl.arange(0, BLOCK_D)
    stored = valid[:, None] & (dims < DIM)[None, :]
    if SPLIT:
        at = ((index * QUERIES + query).to(tl.int64) * NUM_HEADS + first_head + head) * num_splits + split
        tl.store(sums_ptr + at * 2, peak, mask=valid)
        tl.store(sums_ptr + at * 2 + 1, total, mask=valid)
        tl.store(parts_ptr + at[:, None] * DIM + dims[None, :], acc, mask=stored)
    else:
        v_scale = tl.load(v_scale_ptr) if SCALED else 1.0
        at = (token + query).to(tl.int64) * NUM_HEADS + first_head + head
        answer = finish(total, acc, v_scale).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + at[:, None] * DIM + dims[None, :], answer, mask=stored)


@triton.jit(do_not_specialize=["num_splits", "split_tiles"])
def combine_kernel(
    cu_ptr: tl.tensor,
    context_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    out_ptr: tl.tensor,
    sums_ptr: tl.tensor,
    parts_ptr: tl.tensor,
    v_scale_ptr: tl.tensor,
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    NUM_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
    MAPPED: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
    QUERIES: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Merges a query's parts in the order of their positions. Arguments as in decode_kernel.

    Grid (n · QUERIES, ⌈heads / HEADS⌉).
    """
    index, query = tl.program_id(0) // QUERIES, tl.program_id(0) % QUERIES
    row = tl.load(rows_ptr + index) if MAPPED else index
    token, num_queries, _, low, high = row_bounds(row, cu_ptr, context_ptr, WINDOW)
    if query >= num_queries:
        return
    _, last, base, per = split_borders(low, high, num_splits, split_tiles, BLOCK_N, BATCH_INVARIANT)

    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    dims = tl.arange(0, BLOCK_D)
    valid = head < NUM_HEADS
    loaded = valid[:, None] & (dims < DIM)[None, :]
    peak = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    acc = tl.zeros([HEADS, BLOCK_D], tl.float32)
    at = (tl.program_id(0).to(tl.int64) * NUM_HEADS + head) * num_splits
    # Unrolled so that the loads of some parts are under way together: the merges wait for one another anyway.
    for split in tl.range(0, tl.cdiv(last - base, per), loop_unroll_factor=4):
        peak2 = tl.load(sums_ptr + (at + split) * 2, mask=valid, other=float("-inf"))
        total2 = tl.load(sums_ptr + (at + split) * 2 + 1, mask=valid, other=0.0)
        acc2 = tl.load(parts_ptr + (at + split)[:, None] * DIM + dims[None, :], mask=loaded, other=0.0)
        peak, total, acc = merge(peak, total, acc, peak2, total2, acc2)

    v_scale = tl.load(v_scale_ptr) if SCALED else 1.0
    answer = finish(total, acc, v_scale).to(out_ptr.dtype.element_ty)
    at = (token + query).to(tl.int64) * NUM_HEADS + head
    tl.store(out_ptr + at[:, None] * DIM + dims[None, :], answer, mask=loaded)

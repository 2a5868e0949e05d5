"""Attention of rows with many queries, and of mixed batches: one launch over tiles of queries of all rows.

The host cuts the rows into tiles and gives each program its row and first query, so no program is idle and none has to
search. A tile holds neighbouring queries of one row with the heads that share a kv head (GQA), so that keys and values
are read once for all of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.attention_tile import attend, finish, merge, split_borders, tile_queries


@triton.jit(do_not_specialize=["table_stride", "split_tiles"])
def prefill_kernel(
    q_ptr: tl.tensor,  # [tokens, heads, dim]
    k_ptr: tl.tensor,  # [blocks, kv heads, block_size, dim]
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,  # [rows, table_stride] block ids
    cu_ptr: tl.tensor,  # [rows + 1] first token of each row
    context_ptr: tl.tensor,  # [rows]
    tiles_ptr: tl.tensor,  # [tiles, 2] row and first query in it
    out_ptr: tl.tensor,  # [tokens, heads, dim]
    k_scale_ptr: tl.tensor,  # [1], if SCALED
    v_scale_ptr: tl.tensor,
    scale: tl.tensor,
    softcap: tl.tensor,
    table_stride: tl.tensor,
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
    BATCH_INVARIANT: tl.constexpr,
    HEADS: tl.constexpr,  # of one kv head, in one program
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """Grid (tiles, kv heads · ⌈group / HEADS⌉). A tile has BLOCK_M // HEADS queries.

    Batch-invariant: the same states of the same splits as in decode_kernel, merged in the same order as there.
    """
    GROUP: tl.constexpr = NUM_HEADS // KV_HEADS
    CHUNKS: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    QUERIES: tl.constexpr = BLOCK_M // HEADS
    kv_head, chunk = tl.program_id(1) // CHUNKS, tl.program_id(1) % CHUNKS
    row = tl.load(tiles_ptr + tl.program_id(0) * 2)
    skipped = tl.load(tiles_ptr + tl.program_id(0) * 2 + 1)
    token = tl.load(cu_ptr + row) + skipped
    num_queries = tl.minimum(tl.load(cu_ptr + row + 1) - token, QUERIES)
    start = tl.load(context_ptr + row) - (tl.load(cu_ptr + row + 1) - token)
    low, high = tl.maximum(start - WINDOW + 1, 0) if WINDOW else 0, start + num_queries

    first_head = kv_head * GROUP + chunk * HEADS
    queries, query, head, valid = tile_queries(
        q_ptr + token.to(tl.int64) * Q_STRIDE + first_head * DIM,
        num_queries, GROUP - chunk * HEADS, Q_STRIDE, HEADS, DIM, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    positions = tl.where(valid, start + query, -1)
    logit_scale = scale * tl.load(k_scale_ptr) if SCALED else scale
    head_offset = kv_head * BLOCK_SIZE * DIM
    k_ptr += head_offset
    v_ptr += head_offset
    table_ptr += row.to(tl.int64) * table_stride
    if BATCH_INVARIANT:
        first, last, base, per = split_borders(low, high, 1, split_tiles, BLOCK_N, BATCH_INVARIANT)
        peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for border in range(base, last, per):
            peak2, total2, acc2 = attend(
                queries, positions, k_ptr, v_ptr, table_ptr,
                tl.maximum(border, first), tl.minimum(border + per, last), low, high, logit_scale, softcap,
                KV_HEADS, DIM, BLOCK_SIZE, WINDOW, SOFTCAP, FP8, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            peak, total, acc = merge(peak, total, acc, peak2, total2, acc2)
    else:
        peak, total, acc = attend(
            queries, positions, k_ptr, v_ptr, table_ptr,
            low // BLOCK_N, tl.cdiv(high, BLOCK_N), low, high, logit_scale, softcap,
            KV_HEADS, DIM, BLOCK_SIZE, WINDOW, SOFTCAP, FP8, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip

    dims = tl.arange(0, BLOCK_D)
    v_scale = tl.load(v_scale_ptr) if SCALED else 1.0
    at = (token + query).to(tl.int64) * NUM_HEADS + first_head + head
    answer = finish(total, acc, v_scale).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + at[:, None] * DIM + dims[None, :], answer, mask=valid[:, None] & (dims < DIM)[None, :])

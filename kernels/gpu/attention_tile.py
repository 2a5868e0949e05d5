"""What every launch of the paged attention does to a tile of queries: walk over keys, merge, finish.

The softmax is the online one (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018) in base 2, as
FlashAttention has it (Dao, 2023): a state (peak, total, acc) stands for the keys seen so far,

    peak [M]    the greatest score, −inf if none was seen     scores are logits · log2(e)
    total [M]   Σ 2^(score − peak)
    acc [M, D]  Σ 2^(score − peak) · value                    all in float32

and the empty state (−inf, 0, 0) is neutral. Batch invariance rests on three things that hold here by construction:

- A tile of keys begins at a multiple of BLOCK_N, whoever asks. A key that a query does not see weighs exactly 0, and a
  tile without any that it sees changes none of its state's bits: so a query does not feel which others share its tile.
- Merging the empty state changes no bits either, on either side.
- Products that are added are fused by name (`fma`), and the batch-invariant variant compiles without other fusion, so
  that no compiler decides it differently in two kernels.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def fp8_to_float16(bits: tl.tensor) -> tl.tensor:
    """float8 e4m3fn (OCP 8-bit floating point, 2023) as its byte → float16, exactly, for devices without a conversion.

    The bits moved into place are a float16 whose exponent lacks the difference of the biases, 15 − 7 = 8. The two NaN
    codes, which no writer of pages stores, become ±480.
    """
    wide = bits.to(tl.uint16)
    moved = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    return moved.to(tl.float16, bitcast=True) * 256.0


@triton.jit
def load_kv(pointers: tl.tensor, mask: tl.tensor, like: tl.tensor, FP8: tl.constexpr) -> tl.tensor:
    """Keys or values in the type of the queries; 0 where masked. FP8: "" or how its bytes are converted."""
    loaded = tl.load(pointers, mask=mask, other=0)
    if FP8 == "native":
        loaded = loaded.to(tl.float8e4nv, bitcast=True)
    elif FP8 == "bits":
        loaded = fp8_to_float16(loaded)
    return loaded.to(like.dtype)


@triton.jit
def tile_queries(
    q_ptr: tl.tensor,  # of the head group's first head of the first token of the tile
    num_queries: tl.tensor,  # in this tile, from its first
    num_heads: tl.tensor,  # of this program, at most HEADS
    Q_STRIDE: tl.constexpr,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """Row m of a tile is query m // HEADS with head m % HEADS. → queries [M, D], query [M], head [M], valid [M]"""
    m = tl.arange(0, BLOCK_M)
    query, head = m // HEADS, m % HEADS
    valid = (query < num_queries) & (head < num_heads)
    dims = tl.arange(0, BLOCK_D)
    pointers = q_ptr + (query * Q_STRIDE + head * DIM)[:, None] + dims[None, :]
    return tl.load(pointers, mask=valid[:, None] & (dims < DIM)[None, :], other=0), query, head, valid


@triton.jit
def attend(
    queries: tl.tensor,  # [M, D]
    positions: tl.tensor,  # [M] absolute; −1: sees nothing
    k_ptr: tl.tensor,  # of this head in block 0
    v_ptr: tl.tensor,
    table_ptr: tl.tensor,  # of this row
    first_tile: tl.tensor,  # tiles first_tile … last_tile − 1 of BLOCK_N positions are walked
    last_tile: tl.tensor,
    low: tl.tensor,  # positions low … high − 1 are loaded, no other: they are the row's own
    high: tl.tensor,
    logit_scale: tl.tensor,  # what makes a product of query and key a logit
    softcap: tl.tensor,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr,
    FP8: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state (peak, total, acc) of the tile's queries over some tiles of keys, from the empty one."""
    LOG2E: tl.constexpr = 1.4426950408889634
    peak = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    dims = tl.arange(0, BLOCK_D)
    for tile in range(first_tile, last_tile):
        at = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = (at >= low) & (at < high)
        block = tl.load(table_ptr + at // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
        offsets = ((block * KV_HEADS * BLOCK_SIZE + at % BLOCK_SIZE) * DIM)[:, None] + dims[None, :]
        loaded = inside[:, None] & (dims < DIM)[None, :]
        keys = load_kv(k_ptr + offsets, loaded, queries, FP8)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee")
        if SOFTCAP:
            # tanh(x) = 1 − 2 / (e^2x + 1), which is right at both infinities
            e2x = tl.exp2(scores * (logit_scale * (2 * LOG2E) / softcap))
            scores = (1.0 - 2.0 / (e2x + 1.0)) * (softcap * LOG2E)
        else:
            scores = scores * (logit_scale * LOG2E)
        seen = inside[None, :] & (at[None, :] <= positions[:, None])
        if WINDOW:
            seen &= at[None, :] > positions[:, None] - WINDOW
        scores = tl.where(seen, scores, float("-inf"))

        higher = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # −inf − −inf would be NaN
        weights = tl.exp2(scores - base[:, None])
        shrink = tl.exp2(peak - base)
        total = tl.fma(total, shrink, tl.sum(weights, 1))
        values = load_kv(v_ptr + offsets, loaded, queries, FP8)
        acc = tl.dot(weights.to(queries.dtype), values, acc * shrink[:, None], input_precision="ieee")
        peak = higher
    return peak, total, acc


@triton.jit
def merge(
    peak: tl.tensor, total: tl.tensor, acc: tl.tensor, peak2: tl.tensor, total2: tl.tensor, acc2: tl.tensor
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """The state over the keys of both, shapes [M], [M], [M, D]; not associative in its bits, so the order is fixed."""
    higher = tl.maximum(peak, peak2)
    base = tl.where(higher == float("-inf"), 0.0, higher)
    keep, take = tl.exp2(peak - base), tl.exp2(peak2 - base)
    total = tl.fma(total, keep, total2 * take)
    acc = tl.fma(acc, tl.broadcast_to(keep[:, None], acc.shape), acc2 * take[:, None])
    return higher, total, acc


@triton.jit
def finish(total: tl.tensor, acc: tl.tensor, v_scale: tl.tensor) -> tl.tensor:
    """What attention answers [M, D]; 0 for a query that saw nothing."""
    return acc / tl.where(total == 0.0, 1.0, total)[:, None] * v_scale


@triton.jit
def split_borders(
    low: tl.tensor,
    high: tl.tensor,
    num_splits: tl.tensor,
    split_tiles: tl.tensor,
    BLOCK_N: tl.constexpr,
    BATCH_INVARIANT: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor, tl.tensor]:
    """How the keys low … high − 1 are cut: split s is `per` tiles from base + s · per on, within first … last − 1.

    Batch-invariant: every split_tiles tiles from position 0. Otherwise into at most num_splits equal parts, none of
    them (but the last) below split_tiles. → first, last, base, per
    """
    first, last = low // BLOCK_N, tl.cdiv(high, BLOCK_N)
    if BATCH_INVARIANT:
        per = split_tiles
        base = first // per * per
    else:
        per = tl.maximum(tl.cdiv(last - first, num_splits), split_tiles)
        base = first
    return first, last, base, per

"""Rotary embedding (Su et al., "RoFormer", 2021) of queries and keys, the norm of their heads before it (Qwen3), and
the write of keys and values into pages after it: one pass over what the qkv product gave.

    qkv    [T, (heads + 2 · kv heads) · dim]    queries, keys, values; heads beside each other
    table  [positions, rotary dim] float32      cos of rotary dim / 2 angles, then their sin
    turn   dimensions (j, j + rotary dim / 2) together ("NeoX" halves); those from rotary dim on stay

A program has some heads of one token, queries or else keys with their values, and all arithmetic is float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead, Model
from kernels.gpu.arguments import FLOATS, INTEGERS, POINTERS, expect
from kernels.gpu.kv_write import (
    PAGES,
    STRIDES,
    as_bytes,
    expect_pages,
    page_row,
    page_signature,
    per_unit,
    store_stored,
)

TILE = 4  # heads of a program
WARPS = 1


@triton.jit
def _turned(heads, weight, cos, sin, eps, offset, inside, half, rest, DIM: tl.constexpr, HALF: tl.constexpr):
    """`heads` [TILE, 1] point to where each begins → first and second half and the rest of them, float32.

    Without a rest (DIM is 2 · HALF) the third is the first once more.
    """
    paired = inside & (half < HALF)
    first = tl.load(heads + half, mask=paired, other=0.0).to(tl.float32)
    second = tl.load(heads + HALF + half, mask=paired, other=0.0).to(tl.float32)
    others = first
    alone = inside & (rest < DIM - 2 * HALF)
    if 2 * HALF < DIM:
        others = tl.load(heads + 2 * HALF + rest, mask=alone, other=0.0).to(tl.float32)
    if weight is not None:
        squares = tl.sum(first * first + second * second, 1)
        if 2 * HALF < DIM:
            squares += tl.sum(others * others, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        first *= scale * (tl.load(weight + half, mask=half < HALF, other=0.0).to(tl.float32) + offset)
        second *= scale * (tl.load(weight + HALF + half, mask=half < HALF, other=0.0).to(tl.float32) + offset)
        if 2 * HALF < DIM:
            gain = tl.load(weight + 2 * HALF + rest, mask=rest < DIM - 2 * HALF, other=0.0).to(tl.float32)
            others *= scale * (gain + offset)
    return first * cos - second * sin, second * cos + first * sin, others


@triton.jit
def rope_kernel(
    qkv, positions, table, slots, q_weight, k_weight, q_out, pages, k_scale, v_scale, eps, offset,
    qkv_stride, table_stride, plane_stride, block_stride, head_stride, position_stride,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    HALF_BLOCK: tl.constexpr, REST_BLOCK: tl.constexpr, DIM_BLOCK: tl.constexpr, TILE: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    part = tl.program_id(1)
    q_parts: tl.constexpr = (HEADS + TILE - 1) // TILE
    half = tl.arange(0, HALF_BLOCK)[None, :]
    rest = tl.arange(0, REST_BLOCK)[None, :]
    angles = table + tl.load(positions + token).to(tl.int64) * table_stride + half
    cos = tl.load(angles, mask=half < HALF, other=0.0)
    sin = tl.load(angles + HALF, mask=half < HALF, other=0.0)
    row = qkv + token * qkv_stride
    if part < q_parts:
        head = part * TILE + tl.arange(0, TILE)[:, None]
        inside = head < HEADS
        first, second, others = _turned(
            row + head * DIM, q_weight, cos, sin, eps, offset, inside, half, rest, DIM, HALF
        )
        to = q_out + (token * HEADS + head) * DIM
        tl.store(to + half, first, mask=inside & (half < HALF))
        tl.store(to + HALF + half, second, mask=inside & (half < HALF))
        if 2 * HALF < DIM:
            tl.store(to + 2 * HALF + rest, others, mask=inside & (rest < DIM - 2 * HALF))
    else:
        slot = tl.load(slots + token)
        if slot >= 0:
            head = (part - q_parts) * TILE + tl.arange(0, TILE)[:, None]
            inside = head < KV_HEADS
            keys = row + (HEADS + head) * DIM
            first, second, others = _turned(keys, k_weight, cos, sin, eps, offset, inside, half, rest, DIM, HALF)
            page = pages + page_row(slot, block_stride, position_stride, BLOCK_SIZE) + head.to(tl.int64) * head_stride
            units = per_unit(k_scale)
            store_stored(page + half, first, units, inside & (half < HALF), FP8)
            store_stored(page + HALF + half, second, units, inside & (half < HALF), FP8)
            if 2 * HALF < DIM:
                store_stored(page + 2 * HALF + rest, others, units, inside & (rest < DIM - 2 * HALF), FP8)
            at = tl.arange(0, DIM_BLOCK)[None, :]
            here = inside & (at < DIM)
            value = tl.load(keys + KV_HEADS * DIM + at, mask=here).to(tl.float32)
            store_stored(page + plane_stride + at, value, per_unit(v_scale), here, FP8)


def rope_kv_write(
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    q_out: Tensor,
    pages: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    weight_offset: float = 0.0,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Turned queries into q_out [T, heads, dim], turned keys and values into `pages` (kv_write.py, of one layer).

    qkv [T, (heads + 2 · kv heads) · dim] and table as above; positions and slot_mapping [T], -1 for a token whose keys
    are not kept. q_norm and k_norm [dim] are weights of an RMS norm of each head before the turn, both or neither.
    q_out is rounded once, to its own dtype, and may not overlap qkv. Positions and slots must lie inside table and
    pages: nobody looks. Raises ValueError naming the argument.
    """
    expect("q_out", q_out, (None, None, None), FLOATS, qkv, contiguous=True)
    tokens, heads, dim = q_out.shape
    kv_heads = pages.shape[2] if pages.dim() == 5 else 0
    expect_pages(pages, kv_heads, dim, k_scale, v_scale, like=qkv)
    expect("qkv", qkv, (tokens, (heads + 2 * kv_heads) * dim), FLOATS, qkv)
    expect("positions", positions, (tokens,), INTEGERS, qkv)
    expect("slot_mapping", slot_mapping, (tokens,), INTEGERS, qkv)
    expect("table", table, (None, None), (torch.float32,), qkv)
    rotary = table.shape[1]
    if rotary % 2 or not 0 < rotary <= dim:
        raise ValueError(f"table turns {rotary} dimensions, not an even number up to {dim}")
    if (q_norm is None) != (k_norm is None):
        raise ValueError(f"{'q_norm' if q_norm is None else 'k_norm'} is missing, and the other one given")
    for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
        if weight is not None:
            expect(name, weight, (dim,), FLOATS, qkv)
    if tokens == 0:
        return
    rope_kernel[(tokens, triton.cdiv(heads, TILE) + triton.cdiv(kv_heads, TILE))](
        qkv, positions, table, slot_mapping, q_norm, k_norm, q_out, as_bytes(pages), k_scale, v_scale, eps,
        weight_offset, qkv.stride(0), table.stride(0), *pages.stride()[:4],
        **_constants(heads, kv_heads, dim, rotary, pages.shape[3], pages.dtype), num_warps=WARPS,
    )  # fmt: skip


def _constants(heads: int, kv_heads: int, dim: int, rotary: int, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "KV_HEADS": kv_heads,
        "DIM": dim,
        "HALF": rotary // 2,
        "BLOCK_SIZE": block_size,
        "HALF_BLOCK": triton.next_power_of_2(rotary // 2),
        "REST_BLOCK": triton.next_power_of_2(max(dim - rotary, 1)),
        "DIM_BLOCK": triton.next_power_of_2(dim),
        "TILE": TILE,
        "FP8": dtype == torch.float8_e4m3fn,
    }


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        for dtype in PAGES:
            yield _ahead(model, dtype)


def _ahead(model: Model, dtype: torch.dtype) -> Ahead:
    pages, none = page_signature(dtype)
    floats = "*fp16" if dtype == torch.float16 else "*bf16"
    strides = ("qkv_stride", "table_stride")
    norms = dict.fromkeys(("q_weight", "k_weight"), floats)
    tensors = {"qkv": floats, "positions": "*i64", "table": "*fp32", "slots": "*i64", "q_out": floats}
    constants = {**_constants(model.heads, model.kv_heads, model.head_dim, model.head_dim, 16, dtype), **none}
    return Ahead(
        rope_kernel,
        f"{model.name} {floats[1:]}, pages {POINTERS[dtype][1:]}",
        {
            **tensors,
            **(norms if model.qk_norm else {}),
            "eps": "fp32",
            "offset": "fp32",
            **dict.fromkeys(strides, "i32"),
            **pages,
        },
        constants if model.qk_norm else {**constants, **dict.fromkeys(norms)},
        num_warps=WARPS,
        multiples_of_16=(*strides, *STRIDES),
    )

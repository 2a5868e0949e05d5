"""The fused MLPs of a layer with experts (Shazeer et al., "Outrageously Large Neural Networks", 2017).

    route ─► sort ─► x of each pair · its expert's gate and up ─► gated ─► · its expert's down ─► sum by weight

A product is made for all pairs at once, tile by tile of pairs that share an expert, whose rows are gathered and put
back by the pairs' numbers: nothing is moved in between. A token adds up its own choices, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import Ahead
from kernels.gpu.activation import gated
from kernels.gpu.arguments import FLOATS, expect
from kernels.gpu.routing import Pairs, route, sort_pairs
from kernels.gpu.tile import Tile

SUM_BLOCK: Final = 1024


# Few rows read all weights of many experts once: deep tiles keep bytes in flight. Many rows are bound by the tensor
# cores. gfx942 has 64 KiB of shared memory. Reasoned, not measured.
TILES: Final = {
    "sm_80": (Tile(16, 64, 64, 4, 5), Tile(32, 64, 128, 4, 4), Tile(64, 128, 64, 4, 3), Tile(128, 128, 64, 8, 3)),
    "sm_90": (Tile(16, 64, 128, 4, 5), Tile(32, 64, 128, 4, 5), Tile(64, 128, 64, 4, 4), Tile(128, 128, 64, 8, 4)),
    "gfx942": (Tile(16, 64, 128, 4, 2), Tile(32, 64, 128, 4, 2), Tile(64, 128, 64, 4, 2), Tile(128, 128, 64, 8, 2)),
}
FLOAT32_TILE: Final = Tile(16, 32, 32, 4, 1)  # multiplies without tensor cores, for checks


def tile_for(kind: str, dtype: torch.dtype, pairs: int, experts: int, *, batch_invariant: bool = False) -> Tile:
    """The smallest whose rows are not fewer than an expert gets on the mean; batch-invariant, one for all."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    tiles = TILES[kind]
    if batch_invariant:
        return tiles[2]
    return next((tile for tile in tiles if tile.rows * experts >= pairs), tiles[-1])


@triton.jit
def expert_product_kernel(
    x, weight, out, order, tiles, num_tiles, x_stride, expert_stride, row_stride, out_stride,
    SHARED_BY: tl.constexpr, N: tl.constexpr, K: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """out[p] = weight[expert of p] · x[p // SHARED_BY]. Grid (tiles · ⌈N / COLUMNS⌉)."""
    parts: tl.constexpr = (N + COLUMNS - 1) // COLUMNS
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    first, end = tl.load(tiles + num_tiles + tile), tl.load(tiles + 2 * num_tiles + tile)
    if first < end:
        expert = tl.load(tiles + tile).to(tl.int64)
        at = first + tl.arange(0, ROWS)
        inside = at < end
        pair = tl.load(order + at, mask=inside, other=0).to(tl.int64)
        column = part * COLUMNS + tl.arange(0, COLUMNS)
        depth = tl.arange(0, DEPTH)
        rows = x + (pair // SHARED_BY * x_stride)[:, None] + depth[None, :]
        columns = weight + expert * expert_stride + (column.to(tl.int64) * row_stride)[None, :] + depth[:, None]
        acc = tl.zeros([ROWS, COLUMNS], tl.float32)
        for begin in range(0, K, DEPTH):
            there = begin + depth < K
            a = tl.load(rows + begin, mask=inside[:, None] & there[None, :], other=0.0)
            b = tl.load(columns + begin, mask=there[:, None] & (column < N)[None, :], other=0.0)
            acc = tl.dot(a, b, acc, input_precision="ieee")
        to = out + (pair * out_stride)[:, None] + column[None, :]
        tl.store(to, acc, mask=inside[:, None] & (column < N)[None, :])


@triton.jit
def weighted_sum_kernel(each, weights, out, out_stride, D: tl.constexpr, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros([BLOCK], tl.float32)
    for j in tl.static_range(TOP_K):
        pair = token * TOP_K + j
        acc += tl.load(each + pair * D + at, mask=at < D, other=0.0).to(tl.float32) * tl.load(weights + pair)
    tl.store(out + token * out_stride + at, acc, mask=at < D)


def experts(
    x: Tensor,
    logits: Tensor,
    gate_up: Tensor,
    down: Tensor,
    activation: str,
    top_k: int,
    out: Tensor,
    *,
    normalized: bool,
    kind: str,
    batch_invariant: bool = False,
) -> None:
    """out [T, D] = Σ over a token's experts of weight · down(gated(gate_up(x))).

    x [T, D] and out bfloat16, float16 or float32, as gate_up [E, 2 · inner, D] (all gates, then all ups) and down
    [E, D, inner]; logits [T, E] float32, of the router. `kind` is a key of TILES. Products are float32 and rounded once
    each; batch-invariant, a token's bits are its own. Raises ValueError naming the argument.
    """
    expect("x", x, (None, None), FLOATS, x)
    tokens, hidden = x.shape
    expect("gate_up", gate_up, (None, None, hidden), (x.dtype,), x)
    num, double = gate_up.shape[:2]
    expect("down", down, (num, hidden, double // 2), (x.dtype,), x)
    expect("logits", logits, (tokens, num), (torch.float32,), x)
    expect("out", out, (tokens, hidden), (x.dtype,), x)
    if tokens == 0:
        return
    chosen, weights = route(logits, top_k, normalized=normalized)
    tile = tile_for(kind, x.dtype, tokens * top_k, num, batch_invariant=batch_invariant)
    pairs = sort_pairs(chosen, num, tile.rows)
    both = x.new_empty(tokens * top_k, double)
    _product(x, gate_up, pairs, tile, both, shared_by=top_k)
    inner = x.new_empty(tokens * top_k, double // 2)
    gated(both, activation, inner)
    each = x.new_empty(tokens * top_k, hidden)
    _product(inner, down, pairs, tile, each, shared_by=1)
    weighted_sum_kernel[(tokens, triton.cdiv(hidden, SUM_BLOCK))](
        each, weights, out, out.stride(0), D=hidden, TOP_K=top_k, BLOCK=SUM_BLOCK, num_warps=4
    )


def _product(x: Tensor, weight: Tensor, pairs: Pairs, tile: Tile, out: Tensor, *, shared_by: int) -> None:
    num_tiles = pairs.tiles.shape[1]
    expert_product_kernel[(num_tiles * triton.cdiv(weight.shape[1], tile.columns),)](
        x, weight, out, pairs.order, pairs.tiles, num_tiles, x.stride(0), *weight.stride()[:2], out.stride(0),
        **_constants(weight.shape[1], weight.shape[2], tile, shared_by),
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip


def _constants(n: int, k: int, tile: Tile, shared_by: int) -> dict[str, Any]:
    sizes = {"ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}
    return {"SHARED_BY": shared_by, "N": n, "K": k, **sizes}


def ahead() -> Iterator[Ahead]:
    for name, hidden, inner, top_k in (("mixtral-8x7b", 4096, 14336, 2), ("qwen3-30b-a3b", 2048, 768, 8)):
        strides = ("x_stride", "expert_stride", "row_stride", "out_stride")
        pointers = {"x": "*bf16", "weight": "*bf16", "out": "*bf16", "order": "*i32", "tiles": "*i32"}
        for kind, tiles in TILES.items():
            for tile in tiles:
                for what, n, k, shared_by in (("gate_up", 2 * inner, hidden, top_k), ("down", hidden, inner, 1)):
                    yield Ahead(
                        expert_product_kernel,
                        f"{name} {what}, {tile.rows} rows",
                        {**pointers, "num_tiles": "i32", **dict.fromkeys(strides, "i32")},
                        _constants(n, k, tile, shared_by),
                        tile.num_warps,
                        tile.num_stages,
                        multiples_of_16=strides,
                        targets=(kind,),
                    )
        yield Ahead(
            weighted_sum_kernel,
            name,
            {"each": "*bf16", "weights": "*fp32", "out": "*bf16", "out_stride": "i32"},
            {"D": hidden, "TOP_K": top_k, "BLOCK": SUM_BLOCK},
            num_warps=4,
            multiples_of_16=("out_stride",),
        )

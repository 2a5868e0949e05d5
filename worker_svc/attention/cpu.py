"""Attention over paged KV on the CPU, in tiles whose borders are absolute positions.

    keys      |tile 0          |tile 1          |tile 2 … masked  |      KV_TILE positions each
    queries   decode rows together, one token each; longer rows in query tiles of a few fixed sizes

What a query gets does not depend on who else is in the step or how its row was cut: its scores are products over
head_dim, masked keys weigh exactly 0, the largest score is found without rounding, and the sums over keys are made
tile by tile in order, where a tile of zeros adds nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache

KV_TILE = 128  # positions, rounded up to whole blocks
QUERY_TILES = (4, 16, 64)  # tokens of one row taken together
# MKL's batched product has another kernel, which adds in another order, for rows past a multiple of 4, and on some CPUs
# for few rows of a long product: seen with AMX for up to 5 rows of 128, 10 of 256 and 15 of 512 factors.
ROW_MULTIPLE, FACTORS_PER_ROW = 4, 16


@dataclass(frozen=True)
class QueryTile:
    """Tokens of one row that attend together: queries [start, stop) of the step, over the row's first `length` keys."""

    start: int
    stop: int
    bias: Tensor  # [query tile, 1, length], 0 or −inf


@dataclass(frozen=True)
class LongRow:
    runs: Tensor
    tiles: list[QueryTile]


@dataclass(frozen=True)
class ShortRows:
    """Rows of one token each, over the same padded number of keys."""

    tokens: Tensor  # [B] index of each row's token in the step
    runs: Tensor
    bias: Tensor  # [B, 1, length]


@dataclass(frozen=True)
class Layout:
    """How a step's queries are cut, for the layers of one window size."""

    short: list[ShortRows]
    long: list[LongRow]


def kv_tile(block_size: int) -> int:
    return -(-KV_TILE // block_size) * block_size


def lay_out(inputs: StepInputs, cache: KVCache, window: int) -> Layout:
    """`window` positions are seen, the token's own included; 0 is all."""
    tile = kv_tile(cache.block_size)
    counts = np.diff(inputs.cu)
    buckets: dict[int, list[int]] = {}
    long = []
    for row, (count, context) in enumerate(zip(counts.tolist(), inputs.context_lens.tolist(), strict=True)):
        num_tiles = -(-context // tile)
        if count == 1:
            buckets.setdefault(_bucket(num_tiles), []).append(row)
        elif count:
            table = _tables(inputs, [row], num_tiles * tile // cache.block_size)
            long.append(LongRow(cache.runs_of(table), _query_tiles(inputs, row, tile, window)))
    short = []
    for num_tiles, rows in sorted(buckets.items()):
        length = num_tiles * tile
        positions = inputs.context_lens[rows] - 1
        short.append(
            ShortRows(
                torch.from_numpy(inputs.cu[rows]),
                cache.runs_of(_tables(inputs, rows, length // cache.block_size)),
                _bias(positions, length, window)[:, None, :],
            )
        )
    return Layout(short, long)


def attend(q: Tensor, layout: Layout, cache: KVCache, layer: int, scale: float, softcap: float) -> Tensor:
    """q [T, H, D] float32, of which the layout's tokens are computed → [T, H * D]; other rows are zeros."""
    num_tokens, num_heads, head_dim = q.shape
    kv_heads = cache.num_kv_heads
    group = num_heads // kv_heads
    q = q * scale
    out = torch.zeros(num_tokens, num_heads * head_dim)
    for rows in layout.short:
        size = rows.tokens.shape[0] * kv_heads
        keys, values = (cache.gather(layer, which, rows.runs, size) for which in (0, 1))
        queries = q.index_select(0, rows.tokens).view(size, group, head_dim)
        bias = rows.bias[:, None].expand(-1, kv_heads, -1, -1).reshape(size, 1, -1)
        result = _tiled_attention(queries, keys, values, bias, kv_tile(cache.block_size), softcap)
        out.index_copy_(0, rows.tokens, result.reshape(-1, num_heads * head_dim))
    for row in layout.long:
        keys, values = (cache.gather(layer, which, row.runs, kv_heads) for which in (0, 1))
        for tile in row.tiles:
            size, length = tile.bias.shape[0], tile.bias.shape[2]
            count = tile.stop - tile.start
            queries = q.new_zeros(kv_heads, size, group, head_dim)
            queries[:, :count] = q[tile.start : tile.stop].view(count, kv_heads, group, head_dim).transpose(0, 1)
            bias = tile.bias.expand(-1, group, -1).reshape(1, size * group, length)
            result = _tiled_attention(
                queries.view(kv_heads, size * group, head_dim),
                keys[:, :length],
                values[:, :length],
                bias,
                kv_tile(cache.block_size),
                softcap,
            )
            mine = result.view(kv_heads, size, group, head_dim)[:, :count].transpose(0, 1)
            out[tile.start : tile.stop] = mine.reshape(count, -1)
    return out


def _tiled_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor, tile: int, softcap: float) -> Tensor:
    """q [N, M, D], keys and values [N, L, D], bias [N or 1, M or 1, L] → [N, M, D]; L a multiple of `tile`."""
    num_rows, head_dim = q.shape[1:]
    enough = max(num_rows, head_dim // FACTORS_PER_ROW)
    padding = -(-enough // ROW_MULTIPLE) * ROW_MULTIPLE - num_rows
    if padding:
        q = functional.pad(q, (0, 0, 0, padding))
        bias = functional.pad(bias, (0, 0, 0, padding)) if bias.shape[1] > 1 else bias
    scores = torch.bmm(q, keys.transpose(1, 2))
    if softcap:
        scores = torch.tanh(scores / softcap).mul_(softcap)
    scores += bias
    weights = scores.sub_(scores.amax(-1, keepdim=True)).exp_()
    sums = weights.unflatten(-1, (-1, tile)).sum(-1)
    total = torch.zeros_like(sums[..., :1])
    out = torch.zeros_like(q)
    for i in range(sums.shape[-1]):
        total += sums[..., i : i + 1]
        part = slice(i * tile, (i + 1) * tile)
        out.baddbmm_(weights[..., part], values[:, part])
    return out.div_(total)[:, :num_rows]


def _query_tiles(inputs: StepInputs, row: int, tile: int, window: int) -> list[QueryTile]:
    begin, end = int(inputs.cu[row]), int(inputs.cu[row + 1])
    tiles = []
    while begin < end:
        size = next((size for size in QUERY_TILES if size >= end - begin), QUERY_TILES[-1])
        stop = min(begin + size, end)
        positions = inputs.positions[begin:stop]
        length = -(-int(positions[-1] + 1) // tile) * tile
        padded = np.concatenate([positions, np.full(size - len(positions), positions[-1])])
        tiles.append(QueryTile(begin, stop, _bias(padded, length, window)[:, None, :]))
        begin = stop
    return tiles


def _bias(positions: Ints, length: int, window: int) -> Tensor:
    """[Q, length]: 0 where the query at that position sees the key, −inf elsewhere."""
    keys = np.arange(length)
    hidden = keys > positions[:, None]
    if window:
        hidden |= keys <= positions[:, None] - window
    return torch.zeros(hidden.shape).masked_fill_(torch.from_numpy(hidden), float("-inf"))


def _tables(inputs: StepInputs, rows: list[int], num_blocks: int) -> Tensor:
    """The rows' block tables, cut or padded with the null block to `num_blocks`."""
    tables = np.zeros((len(rows), num_blocks), np.int64)
    width = min(num_blocks, inputs.block_tables.shape[1])
    tables[:, :width] = inputs.block_tables[rows, :width]
    return torch.from_numpy(tables)


def _bucket(num_tiles: int) -> int:
    """Rounded up to 2^k or 3 * 2^k: rows of like length share a call, at a third more keys at most."""
    power = 1 << (num_tiles - 1).bit_length()
    return power * 3 // 4 if power >= 4 and num_tiles <= power * 3 // 4 else power

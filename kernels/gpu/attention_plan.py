"""What the paged attention of a step launches, decided on the host from upper bounds of the rows' lengths.

Rows with few queries and many keys have their keys split among programs; all others are cut into tiles of queries. In
the batch-invariant variant both give a token the same bits, so the choice is free there, too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import torch
from torch import Tensor

from kernels.gpu.attention_tuning import Device, Tile, tile_for

MAX_QUERIES: Final = 16  # of a row whose keys may be split; 16 rows are the least that tensor cores multiply
MAX_SPLITS: Final = 64
MIN_SPLIT: Final = 256  # positions: below, combining costs more than the split gains
LONG_SPLIT: Final = 4096  # positions of one program, however full the device is: no row holds up all others
SPLIT_FROM: Final = 1024  # positions of a row with few queries, in a batch with others, from which its keys are split
WAVES: Final = 2  # programs wanted for each multiprocessor


@dataclass(frozen=True)
class AttentionShape:
    """A layer's attention. Layers of equal shapes share the plan of a step.

    `scale` multiplies q · k; `window` positions are seen, the token's own included, 0 is all; `softcap` c > 0 makes a
    logit x into c · tanh(x / c). No row's context exceeds `max_context` positions: it decides where the batch-invariant
    variant splits, so it must be one number for the life of a worker. Raises ValueError for what no kernel computes.
    """

    num_heads: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: torch.dtype  # of queries and answers
    kv_dtype: torch.dtype
    scale: float
    max_context: int
    window: int = 0
    softcap: float = 0.0
    batch_invariant: bool = False

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"{self.num_heads} heads do not share {self.num_kv_heads} kv heads evenly")
        if not 16 <= self.head_dim <= 256:
            raise ValueError(f"heads of {self.head_dim}: paged attention takes 16 to 256")
        if self.block_size & (self.block_size - 1):
            raise ValueError(f"blocks of {self.block_size} positions: paged attention takes powers of two")
        if self.dtype not in (torch.bfloat16, torch.float16, torch.float32):
            raise ValueError(f"paged attention takes no {self.dtype} queries")
        halves = (torch.bfloat16, torch.float16) if self.dtype == torch.float32 else ()
        if self.kv_dtype not in (self.dtype, torch.float8_e4m3fn, *halves):
            raise ValueError(f"paged attention takes no {self.kv_dtype} pages with {self.dtype} queries")
        if self.max_context <= 0 or self.window < 0 or self.softcap < 0:
            raise ValueError(
                f"max_context {self.max_context}, window {self.window} or softcap {self.softcap}: too small"
            )

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    @property
    def padded_dim(self) -> int:
        return 1 << (self.head_dim - 1).bit_length()

    @property
    def split(self) -> int:
        """Positions from one border to the next in the batch-invariant variant: a power of two; at most 32 splits."""
        return max(2 * MIN_SPLIT, 1 << (-(-self.max_context // 32) - 1).bit_length())

    def tile(self, device: Device, use: str) -> Tile:
        return tile_for(device.kind, "invariant" if self.batch_invariant else use, self.padded_dim, self.dtype)


@dataclass(frozen=True)
class SplitLaunch:
    """Rows with at most `num_queries` queries each, their keys cut into up to `num_splits` parts."""

    rows: Tensor | None  # [n] int32; None: the first `num_rows` rows
    num_rows: int
    num_queries: int
    heads: int  # of one kv head, in one program
    tile: Tile
    num_splits: int
    split_tiles: int  # tiles of keys of a split (batch-invariant), or the least
    sums: Tensor  # [n · num_queries, heads, num_splits, 2] float32: peak and total of each part
    parts: Tensor  # [n · num_queries, heads, num_splits, dim] float32


@dataclass(frozen=True)
class TileLaunch:
    tiles: Tensor  # [tiles, 2] int32: row and first query in it
    heads: int
    tile: Tile
    split_tiles: int


@dataclass(frozen=True)
class AttentionPlan:
    shape: AttentionShape
    device: Device
    splits: SplitLaunch | None
    tiles: TileLaunch | None

    @cached_property
    def fp8(self) -> str:
        """How the kernels convert what the pages hold, see load_kv."""
        if self.shape.kv_dtype != torch.float8_e4m3fn:
            return ""
        return "native" if self.device.native_fp8 else "bits"


def plan_step(
    shape: AttentionShape,
    device: Device,
    query_lens: Sequence[int],
    context_lens: Sequence[int],
    where: torch.device,
) -> AttentionPlan:
    """A step whose rows have exactly `query_lens` queries and at most `context_lens` positions, queries included."""
    few = [i for i, n in enumerate(query_lens) if 0 < n <= MAX_QUERIES]
    many = [i for i, n in enumerate(query_lens) if n > MAX_QUERIES]
    if many:
        many += [i for i in few if _seen(shape, query_lens[i], context_lens[i]) < SPLIT_FROM]
        few = [i for i in few if _seen(shape, query_lens[i], context_lens[i]) >= SPLIT_FROM]
    splits = tiles = None
    if few:
        everyone = len(few) == len(query_lens)
        splits = _split_launch(
            shape,
            device,
            None if everyone else _upload(torch.tensor(few, dtype=torch.int32), where),
            [_seen(shape, query_lens[i], context_lens[i]) for i in few],
            1 << (max(query_lens[i] for i in few) - 1).bit_length(),  # five kernels to compile, not sixteen
            max(context_lens[i] for i in few),
            where,
        )
    if many:
        tiles = _tile_launch(shape, device, [(i, query_lens[i], context_lens[i]) for i in many], where)
    return AttentionPlan(shape, device, splits, tiles)


def plan_capture(
    shape: AttentionShape, device: Device, num_rows: int, num_queries: int, where: torch.device
) -> AttentionPlan:
    """For a graph: `num_rows` rows with up to `num_queries` queries each, of any lengths up to shape.max_context."""
    if not 1 <= num_queries <= MAX_QUERIES:
        raise ValueError(f"{num_queries} queries a row: a captured step takes 1 to {MAX_QUERIES}")
    most = _seen(shape, num_queries, shape.max_context)
    return AttentionPlan(
        shape,
        device,
        _split_launch(shape, device, None, [most] * num_rows, num_queries, shape.max_context, where),
        None,
    )


def _seen(shape: AttentionShape, num_queries: int, context: int) -> int:
    """Positions that a row's queries see together."""
    return min(context, shape.window + num_queries - 1) if shape.window else context


def _split_launch(
    shape: AttentionShape,
    device: Device,
    rows: Tensor | None,
    seen: Sequence[int],
    num_queries: int,
    max_context: int,
    where: torch.device,
) -> SplitLaunch:
    tile = shape.tile(device, "decode")
    heads = min(shape.group, max(1, tile.rows // num_queries))
    if not shape.batch_invariant:
        needed = max(16, 1 << (num_queries * heads - 1).bit_length())
        tile = Tile(needed, tile.keys, tile.num_warps, tile.num_stages)
    if shape.batch_invariant:
        # A window may begin inside a split and so touch one more than its length says.
        num_splits = max(1, min(-(-max_context // shape.split), -(-max(seen) // shape.split) + 1))
        split_tiles = shape.split // tile.keys
    else:
        columns = shape.num_kv_heads * -(-shape.group // heads)
        share = -(-sum(seen) * columns // (WAVES * device.num_units))  # positions of a program, were all alike
        share = min(max(share, MIN_SPLIT), LONG_SPLIT)
        num_splits = max(1, min(-(-max(seen) // share), MAX_SPLITS))
        split_tiles = -(-min(share, LONG_SPLIT // 2) // tile.keys)
    size = len(seen) * num_queries * shape.num_heads * num_splits if num_splits > 1 else 0
    return SplitLaunch(
        rows, len(seen), num_queries, heads, tile, num_splits, split_tiles,
        torch.empty(2 * size, dtype=torch.float32, device=where),
        torch.empty(size * shape.head_dim, dtype=torch.float32, device=where),
    )  # fmt: skip


def _tile_launch(
    shape: AttentionShape, device: Device, rows: Sequence[tuple[int, int, int]], where: torch.device
) -> TileLaunch:
    tile = shape.tile(device, "prefill")
    heads = min(shape.group, tile.rows)
    queries = tile.rows // heads
    work = []
    for row, num_queries, context in rows:
        for first in range(0, num_queries, queries):
            high = context - num_queries + min(first + queries, num_queries)
            work.append((-_seen(shape, queries, high), row, first))
    work.sort()  # the longest first: what is left for the end is short
    tiles = torch.tensor([(row, first) for _, row, first in work], dtype=torch.int32)
    return TileLaunch(_upload(tiles, where), heads, tile, shape.split // tile.keys)


def _upload(values: Tensor, where: torch.device) -> Tensor:
    if where.type == "cuda":
        values = values.pin_memory()
    return values.to(where, non_blocking=True)

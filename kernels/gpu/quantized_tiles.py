"""Tiles of the products of quantized weights, by kind of device. Nothing is tuned at start-up.

Those products are made turned over, Wᵀ's side first: [columns, K] · [K, rows]. An instruction's first side is 64 high
on sm_90 and 16 elsewhere, its second as narrow as 8: so a step of few rows wastes little, and what is unpacked from
bytes goes from registers into the product, which sm_90 allows on the first side alone.
"""

from __future__ import annotations

from typing import Final

import torch

from kernels.gpu.tile import Tile

# Few rows are bound by reading weights: many stages keep bytes in flight, and 128 of K are a cache line of codes of 8
# bits, or two sectors of 32 bytes of codes of 4 bits. Many rows are bound by the tensor cores; the tallest tiles of
# sm_80 and gfx942 are less deep, since unpacked weights and two sets of accumulators would not fit into registers.
# gfx942 has 64 KiB of shared memory and prefetches into registers. Reasoned and compiled without a spill, not measured.
TILES: Final = {
    "sm_80": (Tile(16, 64, 128, 4, 5), Tile(32, 64, 128, 4, 4), Tile(64, 128, 128, 8, 3), Tile(128, 64, 64, 8, 3)),
    "sm_90": (Tile(16, 64, 128, 4, 5), Tile(32, 64, 128, 4, 5), Tile(64, 128, 128, 8, 4), Tile(128, 128, 128, 8, 4)),
    "gfx942": (Tile(16, 64, 128, 4, 2), Tile(32, 64, 128, 4, 2), Tile(64, 128, 128, 8, 2), Tile(128, 128, 64, 8, 2)),
}
FLOAT32_TILE: Final = Tile(16, 32, 64, 4, 1)  # multiplies without tensor cores, for checks


def tile_for(kind: str, dtype: torch.dtype, rows: int, *, batch_invariant: bool = False) -> Tile:
    """The smallest that takes all rows; batch-invariant, one for all: another may add in another order."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    tiles = TILES[kind]
    if batch_invariant:
        return tiles[2]
    return next((tile for tile in tiles if tile.rows >= rows), tiles[-1])

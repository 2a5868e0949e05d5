"""Tile sizes, warps and pipeline stages of the paged attention, by kind of device. Nothing is tuned at start-up.

Where the numbers come from, for keys and values of 16 bits (of 8 bits: half the memory, the same tiles):

- Stages: the pipeliner gives one to the block table, from which the addresses come, so that keys and values are held
  once with up to four stages (the next tile is copied while other programs of the multiprocessor compute) and twice
  with five.
- decode reads each key once, so it wants bytes in flight and no more rows than the instructions' 16: many keys a tile,
  few warps. A tile of 64 keys of 128 is 32 KiB with its values; two tiles a program, where shared memory allows, are
  more than a multiprocessor of an H100 has to have under way (25 GB/s · 1 µs) even when it runs one program.
- prefill is bound by the tensor cores: 128 rows (two warpgroups of 64 on sm_90) amortize a tile of keys. On sm_80
  tiles of 64 keys spill where float8 is converted by hand, and the 99 KiB of the smaller sm_8x would be full; gfx942
  has 64 KiB and prefetches into registers.
- batch-invariant, decode and prefill share one tile, since the instruction that multiplies depends on its rows and
  another one may add in another order. 64 rows are what sm_90's warpgroup instruction needs. In decode most of them are
  empty, which costs no time while the bytes of a tile take longer than its products: 1.3 µs against 0.3 µs on an H100,
  1.7 µs against 0.7 µs on an A100. It holds two states at a time (a split's and the row's), hence more warps and,
  on sm_80, fewer keys: with 64 it spills.
- float32 multiplies without tensor cores, for checks rather than for speed: small tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

WARP_SIZES: Final = {"sm_80": 32, "sm_90": 32, "gfx942": 64}


@dataclass(frozen=True)
class Device:
    """What a launch depends on. `kind` is a key of the tables below; `num_units` counts multiprocessors."""

    kind: str
    num_units: int
    native_fp8: bool  # converts float8 e4m3fn itself

    @classmethod
    def of(cls, device: torch.device) -> Device:
        """Raises ValueError for a device that no table covers."""
        properties = torch.cuda.get_device_properties(device)
        if torch.version.hip:
            arch = properties.gcnArchName.partition(":")[0]
            if arch not in ("gfx90a", "gfx942", "gfx950"):
                raise ValueError(f"paged attention has no tile sizes for {arch}: it knows gfx90a, gfx942 and gfx950")
            return cls("gfx942", properties.multi_processor_count, native_fp8=False)
        capability = (properties.major, properties.minor)
        if capability < (8, 0):
            raise ValueError(f"paged attention needs compute capability 8.0, and {properties.name} has {capability}")
        # From 12.0 on consumer devices have the 99 KiB of sm_86 again.
        kind = "sm_90" if (9, 0) <= capability < (12, 0) else "sm_80"
        return cls(kind, properties.multi_processor_count, native_fp8=capability >= (8, 9))


@dataclass(frozen=True)
class Tile:
    """`rows` of queries and heads (decode: the most), `keys` positions."""

    rows: int
    keys: int
    num_warps: int
    num_stages: int


# (kind, use, padded head dim); a head dim below 64 takes the tile of 64
TILES: Final = {
    ("sm_80", "decode", 64): Tile(64, 128, 4, 3),
    ("sm_80", "decode", 128): Tile(64, 64, 4, 3),
    ("sm_80", "decode", 256): Tile(64, 32, 4, 3),
    ("sm_80", "prefill", 64): Tile(128, 64, 8, 5),
    ("sm_80", "prefill", 128): Tile(128, 32, 8, 5),
    ("sm_80", "prefill", 256): Tile(64, 32, 8, 2),
    ("sm_80", "invariant", 64): Tile(64, 32, 4, 3),
    ("sm_80", "invariant", 128): Tile(64, 32, 8, 3),
    ("sm_80", "invariant", 256): Tile(64, 16, 8, 3),
    ("sm_90", "decode", 64): Tile(64, 128, 4, 3),
    ("sm_90", "decode", 128): Tile(64, 64, 4, 5),
    ("sm_90", "decode", 256): Tile(64, 32, 4, 3),
    ("sm_90", "prefill", 64): Tile(128, 128, 8, 3),
    ("sm_90", "prefill", 128): Tile(128, 64, 8, 3),
    ("sm_90", "prefill", 256): Tile(128, 64, 8, 2),
    ("sm_90", "invariant", 64): Tile(64, 64, 4, 3),
    ("sm_90", "invariant", 128): Tile(64, 64, 8, 3),
    ("sm_90", "invariant", 256): Tile(64, 32, 8, 2),
    ("gfx942", "decode", 64): Tile(64, 64, 4, 2),
    ("gfx942", "decode", 128): Tile(64, 32, 4, 2),
    ("gfx942", "decode", 256): Tile(64, 16, 4, 2),
    ("gfx942", "prefill", 64): Tile(128, 64, 4, 2),
    ("gfx942", "prefill", 128): Tile(128, 32, 4, 2),
    ("gfx942", "prefill", 256): Tile(64, 32, 4, 2),
    ("gfx942", "invariant", 64): Tile(64, 64, 4, 2),
    ("gfx942", "invariant", 128): Tile(64, 32, 4, 2),
    ("gfx942", "invariant", 256): Tile(64, 16, 4, 2),
}
FLOAT32_TILE: Final = Tile(16, 32, 4, 1)


def tile_for(kind: str, use: str, padded_dim: int, dtype: torch.dtype) -> Tile:
    """`use` is "decode", "prefill" or "invariant". Raises ValueError where no table entry fits."""
    if dtype == torch.float32:
        return FLOAT32_TILE
    tile = TILES.get((kind, use, max(padded_dim, 64)))
    if tile is None:
        raise ValueError(f"paged attention has no tile for heads of {padded_dim} on {kind}")
    return tile

"""Attention of a device over paged KV, behind one interface: planned once a step, run once a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """A step's rows as its attention reads them, all int32 and on the device."""

    cu: Tensor  # [R + 1] borders of the rows in the flat token arrays
    context_lens: Tensor  # [R] positions that a row sees, its own included
    block_tables: Tensor  # [R, B] in position order


class PagedAttention(Protocol):
    """Causal attention of one shape (heads, window, softcap): layers of equal shapes share it, and a step's plan."""

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Any:
        """For a step whose rows have exactly `query_lens` queries and at most `context_lens` positions."""

    def plan_capture(self, num_rows: int) -> Any:
        """For a graph of steps of `num_rows` rows with one query each, whatever their lengths. May be called while it
        is captured, and then its memory is the graph's.
        """

    def run(self, plan: Any, q: Tensor, pages: Tensor, rows: Rows, out: Tensor) -> None:
        """q [T, heads, dim] over pages [2, blocks, kv heads, block_size, dim] of one layer, into `out`, like q."""

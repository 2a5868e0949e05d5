"""Attention of a device over paged KV, behind one interface: planned once a step, run once a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


class UnsuitedAttention(Exception):
    """This library cannot compute this attention here, in words that follow its name."""


@dataclass(frozen=True)
class Rows:
    """A step's rows as its attention reads them, all int32 and on the device."""

    cu: Tensor  # [R + 1] borders of the rows in the flat token arrays
    context_lens: Tensor  # [R] positions that a row sees, its own included
    block_tables: Tensor  # [R, B] in position order


# Of one layer's keys and of its values: what float8 pages hold is to be multiplied by. Of one float32 on the device.
Scales = tuple[Tensor, Tensor]


class PagedAttention(Protocol):
    """Causal attention of one shape (heads, window, softcap): layers of equal shapes share it, and a step's plan.

    Of one step: `plan`, or for a captured one `plan_capture` once and `replan` ahead of each replay; then `begin`, then
    `run` for each layer, the last two captured where the step is.
    """

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Any:
        """For a step whose rows have exactly `query_lens` queries and at most `context_lens` positions."""

    def plan_capture(self, num_rows: int, num_queries: int = 1) -> Any:
        """For a graph of steps of `num_rows` rows with so many queries each, whatever their lengths. Is called once
        outside the capture and once within it, where memory that it takes is the graph's.
        """

    def replan(self, num_rows: int, context_lens: Sequence[int]) -> None:
        """Ahead of a replay of the graph of `num_rows` rows, on its stream. `context_lens` are those of the first rows,
        the others are null rows of one position.
        """

    def begin(self, plan: Any, rows: Rows) -> None:
        """What `run` needs of the rows, as they are on the device by now."""

    def run(self, plan: Any, q: Tensor, pages: Tensor, rows: Rows, out: Tensor, scales: Scales | None = None) -> None:
        """q [T, heads, dim] over pages [2, blocks, kv heads, block_size, dim] of one layer, into `out`, like q."""


class PlanOnDevice:
    """Of a library that reads all lengths on the device."""

    def replan(self, num_rows: int, context_lens: Sequence[int]) -> None:
        """Nothing of it depends on the host."""

    def begin(self, plan: Any, rows: Rows) -> None:
        """It reads the rows as they are."""

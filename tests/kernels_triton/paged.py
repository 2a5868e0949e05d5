"""Sequences on paged KV memory, and what the Triton kernels and the oracle make of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.gpu.attention import paged_attention
from kernels.gpu.attention_plan import AttentionPlan, AttentionShape, plan_step
from kernels.gpu.attention_tuning import Device
from tests.kernels_triton import compare, interpreter

if compare.INTERPRETED:
    interpreter.repair()

SM80 = Device("sm_80", 108, native_fp8=False)
SM90 = Device("sm_90", 132, native_fp8=True)
GFX942 = Device("gfx942", 304, native_fp8=False)
WHERE = torch.device(compare.DEVICE)
FP8 = torch.float8_e4m3fn


def a_shape(
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 64,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    kv_dtype: torch.dtype | None = None,
    window: int = 0,
    softcap: float = 0.0,
    batch_invariant: bool = False,
    max_context: int = 2048,
) -> AttentionShape:
    return AttentionShape(
        heads,
        kv_heads,
        dim,
        block_size,
        dtype,
        kv_dtype or dtype,
        dim**-0.5,
        max_context,
        window,
        softcap,
        batch_invariant,
    )


def this_device(device: Device) -> Device:
    """On a GPU there is one kind only: its own."""
    return device if compare.INTERPRETED else Device.of(WHERE)


@dataclass
class Row:
    """`queries` tokens at the end of `context` positions, of the sequence that `seed` draws."""

    context: int
    queries: int
    seed: int = 0


@dataclass
class Batch:
    """Rows on pages whose every other element is NaN: nobody may read what is not a row's own.

    Blocks lie in the order that `shuffle` draws. With a window the positions before it are NaN as well, and their
    entries of the block table name no block: the scheduler has given them to others.
    """

    shape: AttentionShape
    rows: Sequence[Row]
    shuffle: int = 0
    q: Tensor = field(init=False)
    pages: Tensor = field(init=False)
    tables: Tensor = field(init=False)
    scales: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        shape, size = self.shape, self.shape.block_size
        counts = [-(-row.context // size) for row in self.rows]
        order = torch.randperm(sum(counts), generator=torch.Generator().manual_seed(self.shuffle)) + 1
        pages = torch.full(
            (2, sum(counts) + 1, shape.num_kv_heads, size, shape.head_dim), torch.nan, dtype=torch.float32
        )
        self.tables = torch.full((len(self.rows), max(counts) + 3), -(2**30), dtype=torch.int32)
        queries = []
        for i, (row, blocks) in enumerate(zip(self.rows, order.split(counts), strict=True)):
            q, kv = self._tokens(row)
            queries.append(q[row.context - row.queries : row.context] if row.context else q[: row.queries])
            first = max(0, row.context - row.queries + 1 - shape.window) if shape.window else 0
            at = torch.arange(first, row.context)
            pages[:, blocks[at // size], :, at % size] = kv[at]
            held = torch.arange(first // size, len(blocks))
            self.tables[i, held] = blocks[held].int()
        self.q = torch.cat(queries).to(shape.dtype).to(WHERE)
        self.pages = pages.to(shape.kv_dtype).to(WHERE)
        self.tables = self.tables.to(WHERE)
        if shape.kv_dtype == FP8:
            self.scales = torch.tensor([0.75], device=WHERE), torch.tensor([1.5], device=WHERE)

    def _tokens(self, row: Row) -> tuple[Tensor, Tensor]:
        """q [n, heads, dim] and kv [n, 2, kv heads, dim] of a sequence's positions: of them alone, whatever n is."""
        shape, n = self.shape, max(row.context, row.queries)
        heads, kv_heads = shape.num_heads, shape.num_kv_heads
        generator = torch.Generator().manual_seed(row.seed)
        x = torch.randn(n, heads + 2 * kv_heads, shape.head_dim, generator=generator)
        return x[:, :heads], x[:, heads:].unflatten(1, (2, kv_heads))

    @property
    def cu(self) -> Tensor:
        return torch.tensor([0, *(row.queries for row in self.rows)], device=WHERE).cumsum(0).int()

    @property
    def contexts(self) -> Tensor:
        return torch.tensor([row.context for row in self.rows], dtype=torch.int32, device=WHERE)

    def plan(self, device: Device) -> AttentionPlan:
        queries, contexts = [row.queries for row in self.rows], [row.context for row in self.rows]
        return plan_step(self.shape, this_device(device), queries, contexts, WHERE)

    def attend(self, plan: AttentionPlan) -> list[Tensor]:
        """The kernels' answers, each row's [queries, heads, dim]."""
        out = torch.full_like(self.q, torch.nan)
        paged_attention(plan, out=out, **self.inputs())
        return list(out.cpu().split([row.queries for row in self.rows]))

    def inputs(self) -> dict[str, Any]:
        """All arguments of paged_attention but the plan and `out`."""
        inputs = {
            "q": self.q, "pages": self.pages, "block_tables": self.tables, "cu_seqlens": self.cu,
            "context_lens": self.contexts,
        }  # fmt: skip
        if self.scales:
            inputs["k_scale"], inputs["v_scale"] = self.scales
        return inputs

    def expected(self) -> list[Tensor]:
        """The oracle's, in float32; zeros for a row without context."""
        shape, answers = self.shape, []
        scales = (float(self.scales[0]), float(self.scales[1])) if self.scales else (1.0, 1.0)
        pages = self.pages.float().cpu().nan_to_num(0.0)
        for i, (row, q) in enumerate(
            zip(self.rows, self.q.float().cpu().split([r.queries for r in self.rows]), strict=True)
        ):
            if not row.context:
                answers.append(torch.zeros_like(q))
                continue
            positions = torch.arange(row.context - row.queries, row.context)
            table = self.tables[i].cpu().clamp(0).long()
            answers.append(
                reference.paged_attention(q, pages, table, positions, shape.scale, shape.window, shape.softcap, *scales)
            )
        return answers

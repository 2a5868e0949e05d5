"""Attention in plain torch, row by row: slow, on any device, and what the others are compared with."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gpu.attention_plan import AttentionShape
from worker_svc.attention.paged import PlanOnDevice, Rows, Scales, UnsuitedAttention

Plan = list[tuple[int, int]]  # queries, and the most positions, of each row


class TorchAttention(PlanOnDevice):
    """Scores, softmax and sums in float32."""

    def __init__(self, shape: AttentionShape) -> None:
        """Raises UnsuitedAttention."""
        if shape.batch_invariant:
            raise UnsuitedAttention("has its library's products, which depend on what they are made beside")
        self._shape = shape

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Plan:
        return list(zip(query_lens, context_lens, strict=True))

    def plan_capture(self, num_rows: int, num_queries: int = 1) -> Plan:
        return [(num_queries, self._shape.max_context)] * num_rows

    def run(self, plan: Plan, q: Tensor, pages: Tensor, rows: Rows, out: Tensor, scales: Scales | None = None) -> None:
        first = 0
        for i, (queries, most) in enumerate(plan):
            part = slice(first, first + queries)
            blocks = rows.block_tables[i, : -(-most // self._shape.block_size)]
            kv = pages[:, blocks].float()
            if scales:
                kv *= torch.stack(scales).view(2, 1, 1, 1, 1)
            out[part] = self._row(q[part], kv, rows.context_lens[i])
            first += queries

    def _row(self, q: Tensor, pages: Tensor, context: Tensor) -> Tensor:
        """q [Q, heads, dim]; float32 pages [2, blocks, kv heads, block_size, dim], of the row alone and in order."""
        shape, (queries, heads, dim) = self._shape, q.shape
        keys, values = pages.transpose(1, 2).reshape(2, shape.num_kv_heads, -1, dim)
        grouped = q.float().view(queries, shape.num_kv_heads, shape.group, dim)
        scores = torch.einsum("qhgd,hkd->hgqk", grouped, keys) * shape.scale
        if shape.softcap:
            scores = torch.tanh(scores / shape.softcap) * shape.softcap
        at = (context - queries + torch.arange(queries, device=q.device))[:, None]
        key = torch.arange(keys.shape[1], device=q.device)
        seen = (key <= at) & (key > at - shape.window) if shape.window else key <= at
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        values = values.masked_fill(~seen.any(0)[:, None], 0.0)  # what lies there is nobody's: 0 · NaN is NaN
        return torch.einsum("hgqk,hkd->qhgd", weights, values).reshape(queries, heads, dim).to(q.dtype)

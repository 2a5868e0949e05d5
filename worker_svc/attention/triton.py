"""Our own Triton kernels (kernels/gpu/attention.py) behind the interface: any device that Triton knows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.gpu.attention import paged_attention
from kernels.gpu.attention_plan import AttentionPlan, AttentionShape, plan_capture, plan_step
from kernels.gpu.attention_tuning import Device
from worker_svc.attention.paged import PlanOnDevice, Rows, Scales


class TritonAttention(PlanOnDevice):
    def __init__(self, shape: AttentionShape, kind: Device, where: torch.device) -> None:
        self._shape, self._kind, self._where = shape, kind, where

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> AttentionPlan:
        return plan_step(self._shape, self._kind, query_lens, context_lens, self._where)

    def plan_capture(self, num_rows: int, num_queries: int = 1) -> AttentionPlan:
        queries = 1 << (num_queries - 1).bit_length()  # five kernels to compile, not sixteen
        return plan_capture(self._shape, self._kind, num_rows, queries, self._where)

    def run(
        self, plan: AttentionPlan, q: Tensor, pages: Tensor, rows: Rows, out: Tensor, scales: Scales | None = None
    ) -> None:
        paged_attention(plan, q, pages, rows.block_tables, rows.cu, rows.context_lens, out, *(scales or ()))

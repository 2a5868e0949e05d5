"""FlashAttention behind the interface: version 3 on Hopper with blocks of any size, version 2 where they suit it.

Dao, "FlashAttention-2" (2023); Shah et al., "FlashAttention-3" (2024). Both read lengths and block tables on the
device, so a graph of them needs nothing of the host.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.attention_plan import AttentionShape
from worker_svc.attention.paged import PlanOnDevice, Rows, Scales, UnsuitedAttention

BLOCK_MULTIPLE = 256  # positions: what version 2 reads pages in


@dataclass(frozen=True)
class Plan:
    most_queries: int  # of a row
    most_positions: int


class FlashAttention(PlanOnDevice):
    def __init__(self, shape: AttentionShape, capability: tuple[int, int]) -> None:
        """Raises UnsuitedAttention."""
        _check(shape, capability)
        self._shape = shape
        three = _module("flash_attn_interface") if capability[0] == 9 else None
        two = _module("flash_attn") if three is None else None
        if three is None and two is None:
            raise UnsuitedAttention("is not installed (flash_attn_interface is version 3, flash_attn version 2)")
        if two is not None and shape.block_size % BLOCK_MULTIPLE:
            raise UnsuitedAttention(
                f"2 takes blocks of a multiple of {BLOCK_MULTIPLE} positions, and these have {shape.block_size}"
            )
        self._three = three.flash_attn_with_kvcache if three is not None else None
        self._two = two.flash_attn_varlen_func if two is not None else None
        self._window = (shape.window - 1, 0) if shape.window else (-1, -1)

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Plan:
        return Plan(max(query_lens), max(context_lens))

    def plan_capture(self, num_rows: int, num_queries: int = 1) -> Plan:
        return Plan(num_queries, self._shape.max_context)

    def run(self, plan: Plan, q: Tensor, pages: Tensor, rows: Rows, out: Tensor, scales: Scales | None = None) -> None:
        assert scales is None, "the shape said so"
        keys, values = pages.transpose(2, 3)  # [blocks, block_size, kv heads, dim], as both count
        common = {
            "softmax_scale": self._shape.scale,
            "causal": True,
            "window_size": self._window,
            "softcap": self._shape.softcap,
        }
        if self._three is not None:
            answer = self._three(
                q, keys, values, cache_seqlens=rows.context_lens, page_table=rows.block_tables,
                cu_seqlens_q=rows.cu, max_seqlen_q=plan.most_queries, **common,
            )  # fmt: skip
        else:
            assert self._two is not None
            borders = torch.zeros_like(rows.cu)
            torch.cumsum(rows.context_lens, 0, dtype=torch.int32, out=borders[1:])
            answer = self._two(
                q, keys, values, rows.cu, borders, plan.most_queries, plan.most_positions,
                block_table=rows.block_tables, **common,
            )  # fmt: skip
        out.copy_(answer)


def _check(shape: AttentionShape, capability: tuple[int, int]) -> None:
    if capability < (8, 0):
        raise UnsuitedAttention("needs an NVIDIA GPU of compute capability 8.0")
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise UnsuitedAttention(f"takes no {str(shape.dtype).removeprefix('torch.')}")
    if shape.kv_dtype != shape.dtype:
        raise UnsuitedAttention(f"would want queries of {str(shape.kv_dtype).removeprefix('torch.')}, as the pages")
    if shape.batch_invariant:
        raise UnsuitedAttention("splits keys by what else is in the batch")


def _module(name: str) -> Any:
    """None where it is not installed. What is installed and does not load is the reason of a refusal."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError:
        return None
    except (ImportError, OSError) as error:
        raise UnsuitedAttention(f"does not load: {error}") from error

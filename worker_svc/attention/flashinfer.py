"""FlashInfer behind the interface (Ye et al., "FlashInfer", MLSys 2025): fa2, and fa3 on Hopper, as it chooses itself.

It plans on the host, from exact lengths, into pinned memory that it copies to the device later: the next plan must not
write there before. So each step in flight has pinned memory of its own, taken in turn. Steps of one token a row have a
wrapper for each captured number of rows, whose device memory stays where the graph has it.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.gpu.attention_plan import AttentionShape
from kernels.gpu.flat_tables import flatten_tables
from worker_svc.attention.paged import Rows, Scales, UnsuitedAttention

WORKSPACE = 256 << 20  # bytes, of partial answers: one for all layers, since they run one after the other
TENSOR_CORES_FROM = 4  # heads of a kv head: fewer leave most of the instructions' 16 rows empty
_PINNED = "_pin_memory_int_workspace_buffer"


@dataclass(frozen=True)
class Plan:
    wrapper: Any
    borders: Tensor  # [rows + 1] int32, on the device: of the rows' blocks in `blocks`
    blocks: Tensor  # int32, on the device
    tokens: int


class FlashInferAttention:
    def __init__(
        self, shape: AttentionShape, capability: tuple[int, int], where: torch.device, flights: int, max_rows: int
    ) -> None:
        """`flights`: steps that may be planned before the first of them is done. Raises UnsuitedAttention."""
        self._library = _library(shape, capability)
        self._shape, self._where = shape, where
        most = -(-shape.max_context // shape.block_size)
        self._blocks = torch.zeros(max_rows * most, dtype=torch.int32, device=where)
        self._workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=where)
        # Each with memory of its own on both sides: mixed steps are planned anew, and launched eagerly.
        self._eager = cycle(
            [self._library.BatchPrefillWithPagedKVCacheWrapper(self._workspace, "HND") for _ in range(flights)]
        )
        pinned = [_pin(torch.empty_like(_pinned(next(self._eager)))) for _ in range(flights)]
        self._pinned = cycle(pinned)
        self._captured: dict[int, Plan] = {}

    def plan(self, query_lens: Sequence[int], context_lens: Sequence[int]) -> Plan:
        wrapper = next(self._eager)
        queries, (borders, last) = _borders(query_lens), self._pages(context_lens)
        wrapper.plan(
            queries, borders, self._blocks[: int(borders[-1])], last, self._shape.num_heads, self._shape.num_kv_heads,
            self._shape.head_dim, self._shape.block_size, causal=True, **self._options(),
        )  # fmt: skip
        return Plan(wrapper, borders.to(self._where, non_blocking=True), self._blocks, int(queries[-1]))

    def plan_capture(self, num_rows: int, num_queries: int = 1) -> Plan:
        """The first time it plans, which no capture may see."""
        assert num_queries == 1, "rows with drafts have lengths that no host knows: `choose` refuses them"
        plan = self._captured.get(num_rows)
        if plan is None:
            borders = torch.zeros(num_rows + 1, dtype=torch.int32, device=self._where)
            wrapper = self._library.BatchDecodeWithPagedKVCacheWrapper(
                self._workspace,
                "HND",
                use_cuda_graph=True,
                use_tensor_cores=self._shape.group >= TENSOR_CORES_FROM,
                paged_kv_indptr_buffer=borders,
                paged_kv_indices_buffer=self._blocks,
                paged_kv_last_page_len_buffer=torch.ones(num_rows, dtype=torch.int32, device=self._where),
            )
            plan = self._captured[num_rows] = Plan(wrapper, borders, self._blocks, num_rows)
            self.replan(num_rows, [])
        return plan

    def replan(self, num_rows: int, context_lens: Sequence[int]) -> None:
        wrapper = self._captured[num_rows].wrapper
        borders, last = self._pages([*context_lens, *[1] * (num_rows - len(context_lens))])
        setattr(wrapper, _PINNED, next(self._pinned))
        wrapper.plan(
            borders, self._blocks[: int(borders[-1])], last, self._shape.num_heads, self._shape.num_kv_heads,
            self._shape.head_dim, self._shape.block_size, **self._options(),
        )  # fmt: skip

    def begin(self, plan: Plan, rows: Rows) -> None:
        flatten_tables(rows.block_tables, plan.borders, plan.blocks)

    def run(self, plan: Plan, q: Tensor, pages: Tensor, rows: Rows, out: Tensor, scales: Scales | None = None) -> None:
        assert scales is None, "the shape said so"
        # Tokens behind the last row's belong to nobody.
        plan.wrapper.run(q[: plan.tokens], (pages[0], pages[1]), out=out[: plan.tokens])

    def _options(self) -> dict[str, Any]:
        shape = self._shape
        return {
            "sm_scale": shape.scale,
            "window_left": shape.window - 1,  # −1 is all
            "logits_soft_cap": shape.softcap,
            "q_data_type": shape.dtype,
            "kv_data_type": shape.kv_dtype,
        }

    def _pages(self, context_lens: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Borders of the rows' blocks, and the positions in each last one. Both pinned: what copies them later keeps
        them until then.
        """
        size = self._shape.block_size
        contexts = np.array(context_lens, np.int32)
        return _borders(-(-contexts // size)), _pin(torch.from_numpy((contexts - 1) % size + 1))


def _borders(counts: Sequence[int] | np.ndarray[Any, Any]) -> Tensor:
    borders = np.zeros(len(counts) + 1, np.int32)
    np.cumsum(counts, out=borders[1:])
    return _pin(torch.from_numpy(borders))


def _pin(values: Tensor) -> Tensor:
    return values.pin_memory() if torch.cuda.is_available() else values


def _pinned(wrapper: Any) -> Tensor:
    """Raises UnsuitedAttention where this version keeps it elsewhere: then nothing says when it may be written."""
    memory = getattr(wrapper, _PINNED, None)
    if not isinstance(memory, Tensor):
        raise UnsuitedAttention("is of a version whose pinned memory is not known here; 0.6.14 is the tried one")
    return memory


def _library(shape: AttentionShape, capability: tuple[int, int]) -> Any:
    """Raises UnsuitedAttention."""
    if capability < (8, 0):
        raise UnsuitedAttention("needs an NVIDIA GPU of compute capability 8.0")
    if shape.dtype not in (torch.bfloat16, torch.float16):
        raise UnsuitedAttention(f"takes no {str(shape.dtype).removeprefix('torch.')}")
    if shape.kv_dtype != shape.dtype:
        raise UnsuitedAttention("would need its scales on the host, and they are the device's")
    if shape.head_dim not in (64, 128, 256):
        raise UnsuitedAttention(f"takes heads of 64, 128 or 256, and these have {shape.head_dim}")
    if shape.batch_invariant:
        raise UnsuitedAttention("splits keys by what else is in the batch")
    try:
        return importlib.import_module("flashinfer")
    except ModuleNotFoundError as error:
        raise UnsuitedAttention(f"is not installed ({error})") from error
    except (ImportError, OSError, RuntimeError) as error:
        raise UnsuitedAttention(f"does not load: {error}") from error

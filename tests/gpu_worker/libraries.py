"""FlashInfer and FlashAttention as their documentation says they behave, computed in torch.

What is passed to them, when they plan and what a graph of them keeps is tested with these; that the real ones answer
so, only on a GPU.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor

from kernels.gpu.attention_plan import AttentionShape
from worker_svc.attention.paged import Rows
from worker_svc.attention.reference import TorchAttention


def _attend(q: Tensor, cu: Tensor, pages: Tensor, tables: Tensor, lens: Tensor, **shape: Any) -> Tensor:
    """pages [2, blocks, kv heads, block_size, dim]; tokens behind the last row's: zeros."""
    attention = TorchAttention(
        AttentionShape(
            q.shape[1], pages.shape[2], q.shape[2], pages.shape[3], q.dtype, pages.dtype, max_context=1 << 20, **shape
        )
    )
    out = torch.zeros_like(q)
    plan = attention.plan((cu[1:] - cu[:-1]).tolist(), lens.tolist())
    attention.run(plan, q, pages, Rows(cu, lens, tables), out)
    return out


class _Wrapper:
    """FlashInfer 0.6.14's, of both kinds: queries are one for each row unless planned otherwise."""

    options: dict[str, Any]

    def __init__(self, workspace: Tensor, layout: str) -> None:
        assert (workspace.dtype, layout) == (torch.uint8, "HND")
        self._pin_memory_int_workspace_buffer = torch.empty(64, dtype=torch.uint8)

    def _plan(self, queries: Tensor, borders: Tensor, blocks: Tensor, last: Tensor, shape: tuple[int, ...]) -> None:
        assert all(values.dtype == torch.int32 for values in (queries, borders, blocks, last))
        assert len(blocks) == int(borders[-1])
        assert bool((last >= 1).all())
        assert bool((last <= shape[3]).all())
        self.queries, self.borders, self.blocks, self.last, self.shape = queries, borders, blocks, last, shape

    def run(self, q: Tensor, pages: tuple[Tensor, Tensor], out: Tensor) -> Tensor:
        heads, kv_heads, dim, block_size = self.shape
        assert q.shape == (int(self.queries[-1]), heads, dim)
        assert all(part.shape[1:] == (kv_heads, block_size, dim) for part in pages)
        assert self.options["q_data_type"] == q.dtype
        assert self.options["kv_data_type"] == pages[0].dtype
        counts = self.borders[1:] - self.borders[:-1]
        tables = torch.zeros(len(counts), int(counts.max()), dtype=torch.int32)
        for row, (first, count) in enumerate(zip(self.borders.tolist(), counts.tolist(), strict=False)):
            tables[row, :count] = self.blocks[first : first + count]
        answer = _attend(
            q, self.queries, torch.stack(pages), tables, (counts - 1) * block_size + self.last,
            scale=self.options["sm_scale"], window=self.options["window_left"] + 1,
            softcap=self.options["logits_soft_cap"],
        )  # fmt: skip
        return out.copy_(answer)


class PrefillWrapper(_Wrapper):
    def plan(
        self, queries: Tensor, borders: Tensor, blocks: Tensor, last: Tensor, *shape: int, causal: bool, **options: Any
    ) -> None:
        assert causal
        self._plan(queries, borders, blocks, last, shape)
        self.options = options


class DecodeWrapper(_Wrapper):
    """In its graph it has the memory that it was made with, and as many rows."""

    def __init__(
        self,
        workspace: Tensor,
        layout: str,
        *,
        use_cuda_graph: bool,
        use_tensor_cores: bool,
        paged_kv_indptr_buffer: Tensor,
        paged_kv_indices_buffer: Tensor,
        paged_kv_last_page_len_buffer: Tensor,
    ) -> None:
        super().__init__(workspace, layout)
        assert use_cuda_graph
        self.kept = paged_kv_indptr_buffer, paged_kv_indices_buffer, paged_kv_last_page_len_buffer
        self.planned_from: list[int] = []  # the pinned memory of each plan

    def plan(self, borders: Tensor, blocks: Tensor, last: Tensor, *shape: int, **options: Any) -> None:
        kept_borders, kept_blocks, kept_last = self.kept
        assert len(last) == len(kept_last)
        assert len(blocks) <= len(kept_blocks)
        self.planned_from.append(self._pin_memory_int_workspace_buffer.data_ptr())
        kept_borders.copy_(borders)
        kept_last.copy_(last)
        kept_blocks[: len(blocks)].copy_(blocks)
        queries = torch.arange(len(last) + 1, dtype=torch.int32)
        self._plan(queries, kept_borders, kept_blocks[: len(blocks)], kept_last, shape)
        self.options = options


def flashinfer() -> types.ModuleType:
    module = types.ModuleType("flashinfer")
    module.BatchPrefillWithPagedKVCacheWrapper = PrefillWrapper  # type: ignore[attr-defined]
    module.BatchDecodeWithPagedKVCacheWrapper = DecodeWrapper  # type: ignore[attr-defined]
    return module


def flash_attn_3() -> types.ModuleType:
    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        page_table: Tensor,
        cu_seqlens_q: Tensor,
        max_seqlen_q: int,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
    ) -> Tensor:
        assert causal
        assert max_seqlen_q == int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
        assert page_table.dtype == cache_seqlens.dtype == cu_seqlens_q.dtype == torch.int32
        return _attend(
            q, cu_seqlens_q, torch.stack([k_cache, v_cache]).transpose(2, 3), page_table, cache_seqlens,
            scale=softmax_scale, window=_window(window_size), softcap=softcap,
        )  # fmt: skip

    module = types.ModuleType("flash_attn_interface")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    return module


def flash_attn_2() -> types.ModuleType:
    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        *,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int],
        softcap: float,
        block_table: Tensor,
    ) -> Tensor:
        assert causal
        assert k.shape[1] % 256 == 0
        lens = cu_seqlens_k[1:] - cu_seqlens_k[:-1]
        assert max_seqlen_q == int((cu_seqlens_q[1:] - cu_seqlens_q[:-1]).max())
        assert max_seqlen_k >= int(lens.max())
        return _attend(
            q, cu_seqlens_q, torch.stack([k, v]).transpose(2, 3), block_table, lens,
            scale=softmax_scale, window=_window(window_size), softcap=softcap,
        )  # fmt: skip

    module = types.ModuleType("flash_attn")
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


def _window(size: tuple[int, int]) -> int:
    left, right = size
    assert (left, right) == (-1, -1) or (left >= 0 and right == 0)
    return left + 1

"""Paged attention in Triton: up to three launches (tiles of queries, split keys, combine) behind one function.

    plan = plan_step(shape, device, query_lens, context_lens, where)     once a step, for all layers of that shape
    paged_attention(plan, q, pages, block_tables, cu_seqlens, context_lens, out)     once a layer

or, to capture a graph of a decode step, plan_capture(…): its launches read all lengths from device memory. A row with
context length 0 (padding, on the null block) gets zeros.

The bits of an answer depend on the batch (how keys are split) unless `shape.batch_invariant`: then a token's answer is
a function of its query and of the keys and values it sees, whoever else is in the batch and however its row came here.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from kernels.gpu.attention_decode import combine_kernel, decode_kernel
from kernels.gpu.attention_plan import AttentionPlan, SplitLaunch, TileLaunch
from kernels.gpu.attention_prefill import prefill_kernel

COMBINED_HEADS: Final = 4  # that one program of combine_kernel merges: a warp each
COMBINE_WARPS: Final = 4


class Inputs(NamedTuple):
    """The tensors of one call, see paged_attention."""

    q: Tensor
    pages: Tensor
    block_tables: Tensor
    cu_seqlens: Tensor
    context_lens: Tensor
    out: Tensor
    k_scale: Tensor | None
    v_scale: Tensor | None


def paged_attention(
    plan: AttentionPlan,
    q: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    context_lens: Tensor,
    out: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """Causal attention of a step's tokens over paged keys and values, into `out`.

    q [tokens, heads, dim], its tokens at any stride; pages [2, blocks, kv heads, block_size, dim], K and V;
    block_tables [rows, max_blocks] int32, in position order; cu_seqlens [rows + 1] int32, where each row's tokens
    begin; context_lens [rows] int32, a row's positions with its tokens, which are the last of them; out like q, dense.
    k_scale and v_scale are float32 scalars on the device that multiply what the pages hold, both or none.
    Raises ValueError where a tensor is not of the plan's shape.
    """
    inputs = Inputs(q, pages, block_tables, cu_seqlens, context_lens, out, k_scale, v_scale)
    _check(plan, inputs)
    if plan.fp8:
        inputs = inputs._replace(pages=pages.view(torch.uint8))
    if plan.tiles is not None:
        _launch_tiles(plan, plan.tiles, inputs)
    if plan.splits is not None:
        _launch_splits(plan, plan.splits, inputs)


def _launch_tiles(plan: AttentionPlan, launch: TileLaunch, inputs: Inputs) -> None:
    shape = plan.shape
    grid = (len(launch.tiles), shape.num_kv_heads * -(-shape.group // launch.heads))
    prefill_kernel[grid](
        inputs.q, inputs.pages[0], inputs.pages[1], inputs.block_tables, inputs.cu_seqlens, inputs.context_lens,
        launch.tiles, inputs.out, inputs.k_scale, inputs.v_scale, shape.scale, shape.softcap,
        inputs.block_tables.stride(0), launch.split_tiles,
        **prefill_constants(plan, launch, inputs.q.stride(0), inputs.k_scale is not None),
        num_warps=launch.tile.num_warps, num_stages=launch.tile.num_stages,
        enable_fp_fusion=not shape.batch_invariant,
    )  # fmt: skip


def _launch_splits(plan: AttentionPlan, launch: SplitLaunch, inputs: Inputs) -> None:
    shape, scaled = plan.shape, inputs.k_scale is not None
    columns = shape.num_kv_heads * -(-shape.group // launch.heads)
    decode_kernel[launch.num_rows, columns, launch.num_splits](
        inputs.q, inputs.pages[0], inputs.pages[1], inputs.block_tables, inputs.cu_seqlens, inputs.context_lens,
        launch.rows, inputs.out, launch.sums, launch.parts, inputs.k_scale, inputs.v_scale, shape.scale, shape.softcap,
        inputs.block_tables.stride(0), launch.num_splits, launch.split_tiles,
        **decode_constants(plan, launch, inputs.q.stride(0), scaled),
        num_warps=launch.tile.num_warps, num_stages=launch.tile.num_stages,
        enable_fp_fusion=not shape.batch_invariant,
    )  # fmt: skip
    if launch.num_splits == 1:
        return
    combine_kernel[launch.num_rows * launch.num_queries, -(-shape.num_heads // COMBINED_HEADS)](
        inputs.cu_seqlens, inputs.context_lens, launch.rows, inputs.out, launch.sums, launch.parts, inputs.v_scale,
        launch.num_splits, launch.split_tiles,
        **combine_constants(plan, launch, scaled),
        num_warps=COMBINE_WARPS, enable_fp_fusion=not shape.batch_invariant,
    )  # fmt: skip


def prefill_constants(plan: AttentionPlan, launch: TileLaunch, q_stride: int, scaled: bool) -> dict[str, Any]:
    return {
        **_attend_constants(plan),
        "Q_STRIDE": q_stride,
        "SCALED": scaled,
        "HEADS": launch.heads,
        "BLOCK_M": launch.tile.rows,
        "BLOCK_N": launch.tile.keys,
    }


def decode_constants(plan: AttentionPlan, launch: SplitLaunch, q_stride: int, scaled: bool) -> dict[str, Any]:
    return {
        **_attend_constants(plan),
        "Q_STRIDE": q_stride,
        "SCALED": scaled,
        "MAPPED": launch.rows is not None,
        "SPLIT": launch.num_splits > 1,
        "QUERIES": launch.num_queries,
        "HEADS": launch.heads,
        "BLOCK_M": launch.tile.rows,
        "BLOCK_N": launch.tile.keys,
    }


def combine_constants(plan: AttentionPlan, launch: SplitLaunch, scaled: bool) -> dict[str, Any]:
    return {
        "NUM_HEADS": plan.shape.num_heads,
        "DIM": plan.shape.head_dim,
        "BLOCK_D": plan.shape.padded_dim,
        "WINDOW": plan.shape.window,
        "BATCH_INVARIANT": plan.shape.batch_invariant,
        "SCALED": scaled,
        "MAPPED": launch.rows is not None,
        "QUERIES": launch.num_queries,
        "HEADS": COMBINED_HEADS,
        "BLOCK_N": launch.tile.keys,
    }


def _attend_constants(plan: AttentionPlan) -> dict[str, Any]:
    """What both kernels that attend are compiled for."""
    shape = plan.shape
    return {
        "NUM_HEADS": shape.num_heads,
        "KV_HEADS": shape.num_kv_heads,
        "DIM": shape.head_dim,
        "BLOCK_D": shape.padded_dim,
        "BLOCK_SIZE": shape.block_size,
        "WINDOW": shape.window,
        "SOFTCAP": shape.softcap > 0,
        "FP8": plan.fp8,
        "BATCH_INVARIANT": shape.batch_invariant,
    }


def _check(plan: AttentionPlan, inputs: Inputs) -> None:
    shape, (q, pages, block_tables, cu_seqlens, context_lens, out, k_scale, v_scale) = plan.shape, inputs
    width = (shape.num_heads, shape.head_dim)
    if q.shape[1:] != width or q.dtype != shape.dtype or q.stride()[1:] != (shape.head_dim, 1):
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)}; planned were dense {shape.dtype} heads {width} in each token"
        )
    if out.shape != q.shape or out.dtype != q.dtype or not out.is_contiguous():
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; it must be as q, and contiguous")
    page = (shape.num_kv_heads, shape.block_size, shape.head_dim)
    if pages.shape[0] != 2 or pages.shape[2:] != page or pages.dtype != shape.kv_dtype:
        raise ValueError(f"pages are {pages.dtype} {list(pages.shape)}; planned were {shape.kv_dtype} pages {page}")
    if not (pages[0].is_contiguous() and block_tables.stride(1) == 1):
        raise ValueError("pages and the rows of block_tables must be contiguous")
    if not block_tables.dtype == cu_seqlens.dtype == context_lens.dtype == torch.int32:
        raise ValueError("block_tables, cu_seqlens and context_lens must be int32")
    if (k_scale is None) != (v_scale is None):
        raise ValueError("k_scale and v_scale come together")

"""Keys and values into the pages of one layer.

    pages [2, blocks, kv heads, block size, dim]      K, then V; a block's positions lie together for each head
    slot  block · block size + offset in block        -1: nothing is written

bfloat16 and float16 pages hold what is given, rounded. float8 (e4m3) pages hold it divided by a scale of the layer, one
for keys and one for values, in device memory: a graph that was captured follows a scale that is loaded later.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead, Model
from kernels.gpu.arguments import FLOATS, INTEGERS, POINTERS, expect
from kernels.gpu.fp8 import to_e4m3

PAGES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)  # float32: for checks
TILE = 4  # heads of a token in one program
WARPS = 1
STRIDES = ("plane_stride", "block_stride", "head_stride", "position_stride")


@triton.jit
def page_row(slot, block_stride, position_stride, BLOCK_SIZE: tl.constexpr):
    """Elements before a slot's row of the first head: past 2³¹ in a large cache."""
    slot = slot.to(tl.int64)
    return slot // BLOCK_SIZE * block_stride + slot % BLOCK_SIZE * position_stride


@triton.jit
def per_unit(scale):
    """How many stored units one is: 1 where there is no scale."""
    if scale is None:
        return 1.0
    else:
        return tl.div_rn(1.0, tl.load(scale))


@triton.jit
def store_stored(pointer, value, units, mask, FP8: tl.constexpr):
    """value float32, into pages of bytes that are float8, or of floats."""
    if FP8:
        tl.store(pointer, to_e4m3(value * units), mask=mask)
    else:
        tl.store(pointer, value, mask=mask)


@triton.jit
def kv_write_kernel(
    k, v, slots, pages, k_scale, v_scale, k_stride, k_head_stride, v_stride, v_head_stride,
    plane_stride, block_stride, head_stride, position_stride,
    HEADS: tl.constexpr, DIM: tl.constexpr, DIM_BLOCK: tl.constexpr, BLOCK_SIZE: tl.constexpr, TILE: tl.constexpr,
    FP8: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token)
    if slot >= 0:
        head = tl.program_id(1) * TILE + tl.arange(0, TILE)[:, None]
        at = tl.arange(0, DIM_BLOCK)[None, :]
        inside = (head < HEADS) & (at < DIM)
        page = pages + page_row(slot, block_stride, position_stride, BLOCK_SIZE) + head.to(tl.int64) * head_stride + at
        key = tl.load(k + token * k_stride + head * k_head_stride + at, mask=inside).to(tl.float32)
        store_stored(page, key, per_unit(k_scale), inside, FP8)
        value = tl.load(v + token * v_stride + head * v_head_stride + at, mask=inside).to(tl.float32)
        store_stored(page + plane_stride, value, per_unit(v_scale), inside, FP8)


def kv_write(
    k: Tensor,
    v: Tensor,
    slot_mapping: Tensor,
    pages: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """k, v [T, kv heads, dim] go to the slots `slot_mapping` [T] of `pages`.

    k and v are bfloat16, float16 or float32 and may be strided (views of a packed qkv). Slots must be below
    blocks · block size: nobody looks. k_scale and v_scale, float32 of one element, go with float8 pages and with no
    others. Raises ValueError naming the argument.
    """
    expect("k", k, (None, None, None), FLOATS, k)
    tokens, heads, dim = k.shape
    expect("v", v, (tokens, heads, dim), (k.dtype,), k)
    expect_pages(pages, heads, dim, k_scale, v_scale, like=k)
    expect("slot_mapping", slot_mapping, (tokens,), INTEGERS, k)
    if tokens == 0:
        return
    kv_write_kernel[(tokens, triton.cdiv(heads, TILE))](
        k, v, slot_mapping, as_bytes(pages), k_scale, v_scale,
        *k.stride()[:2], *v.stride()[:2], *pages.stride()[:4], **_constants(heads, dim, pages.shape[3], pages.dtype),
        num_warps=WARPS,
    )  # fmt: skip


def expect_pages(
    pages: Tensor, kv_heads: int, dim: int, k_scale: Tensor | None, v_scale: Tensor | None, *, like: Tensor
) -> None:
    expect("pages", pages, (2, None, kv_heads, None, dim), PAGES, like)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (pages.dtype == torch.float8_e4m3fn):
            raise ValueError(f"{name} is {'missing' if scale is None else 'given'}, and pages are {pages.dtype}")
        if scale is not None:
            expect(name, scale.reshape(-1) if scale.numel() == 1 else scale, (1,), (torch.float32,), like)


def as_bytes(pages: Tensor) -> Tensor:
    """float8 as what a kernel can point to on every target."""
    return pages.view(torch.uint8) if pages.dtype == torch.float8_e4m3fn else pages


def _constants(heads: int, dim: int, block_size: int, dtype: torch.dtype) -> dict[str, Any]:
    return {
        "HEADS": heads,
        "DIM": dim,
        "DIM_BLOCK": triton.next_power_of_2(dim),
        "BLOCK_SIZE": block_size,
        "TILE": TILE,
        "FP8": dtype == torch.float8_e4m3fn,
    }


def page_signature(dtype: torch.dtype) -> tuple[Mapping[str, str], Mapping[str, None]]:
    """The part of a signature, and of its constants, that pages of a dtype make."""
    scales = ("k_scale", "v_scale")
    strides = dict.fromkeys(STRIDES, "i32")
    if dtype == torch.float8_e4m3fn:
        return {"pages": POINTERS[dtype], **strides, **dict.fromkeys(scales, "*fp32")}, {}
    return {"pages": POINTERS[dtype], **strides}, dict.fromkeys(scales)


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        for dtype in (torch.bfloat16, torch.float8_e4m3fn):
            yield _ahead(model, dtype)


def _ahead(model: Model, dtype: torch.dtype) -> Ahead:
    pages, none = page_signature(dtype)
    strides = ("k_stride", "k_head_stride", "v_stride", "v_head_stride")
    return Ahead(
        kv_write_kernel,
        f"{model.name} bf16, pages {POINTERS[dtype][1:]}",
        {"k": "*bf16", "v": "*bf16", "slots": "*i64", **dict.fromkeys(strides, "i32"), **pages},
        {**_constants(model.kv_heads, model.head_dim, 16, dtype), **none},
        num_warps=WARPS,
        multiples_of_16=(*strides, *STRIDES),
    )

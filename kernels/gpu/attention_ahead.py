"""The compilations of paged attention that models ask for, by kind of device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, Final

import torch

from kernels.ahead import MODELS, Ahead
from kernels.gpu.attention import COMBINE_WARPS, combine_constants, decode_constants, prefill_constants
from kernels.gpu.attention_decode import combine_kernel, decode_kernel
from kernels.gpu.attention_plan import AttentionPlan, AttentionShape, plan_capture, plan_step
from kernels.gpu.attention_prefill import prefill_kernel
from kernels.gpu.attention_tuning import Device

DEVICES: Final = (
    Device("sm_80", 108, native_fp8=False),
    Device("sm_90", 132, native_fp8=True),
    Device("gfx942", 304, native_fp8=False),
)
TYPES: Final = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float8_e4m3fn: "*u8", torch.float32: "*fp32"}
NOWHERE: Final = torch.device("meta")

COMMON: Final = {"table_ptr": "*i32", "cu_ptr": "*i32", "context_ptr": "*i32", "table_stride": "i32"}
SCALARS: Final = {"scale": "fp32", "softcap": "fp32", "split_tiles": "i32"}
PARTS: Final = {"sums_ptr": "*fp32", "parts_ptr": "*fp32", "num_splits": "i32"}


def ahead() -> Iterator[Ahead]:
    """Decode, combine and prefill of each model in bfloat16, on bfloat16 and float8 pages, blocks of 16 and 32."""
    names: dict[tuple[int, int, int], str] = {}  # some models agree in their attention
    for model in MODELS:
        heads = (model.heads, model.kv_heads, model.head_dim)
        names[heads] = f"{names[heads]}, {model.name}" if heads in names else model.name
    pages, block_sizes = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}, (16, 32)
    for (heads, kind, block_size, invariant), device in product(
        product(names, pages, block_sizes, (False, True)), DEVICES
    ):
        shape = AttentionShape(
            *heads, block_size, torch.bfloat16, pages[kind], heads[-1] ** -0.5, 32768, batch_invariant=invariant
        )
        name = f"{names[heads]}: {kind} pages, blocks of {block_size}{', invariant' if invariant else ''}"
        yield from compilations(shape, device, name)


def compilations(shape: AttentionShape, device: Device, name: str) -> Iterator[Ahead]:
    """The kernels of one shape, as a decode step of 8 rows and a prefill launch them."""
    decode = plan_capture(shape, device, 8, 1, NOWHERE)
    prefill = plan_step(shape, device, [4096], [4096], NOWHERE)
    assert decode.splits is not None
    assert prefill.tiles is not None
    scaled = shape.kv_dtype == torch.float8_e4m3fn
    stride = (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim  # q in a fused product
    yield _one(
        decode_kernel, name, decode, decode_constants(decode, decode.splits, stride, scaled),
        {**COMMON, **SCALARS, **PARTS}, {"rows_ptr": None}, decode.splits.tile.num_warps, decode.splits.tile.num_stages,
    )  # fmt: skip
    yield _one(
        prefill_kernel, name, prefill, prefill_constants(prefill, prefill.tiles, stride, scaled),
        {**COMMON, **SCALARS, "tiles_ptr": "*i32"}, {}, prefill.tiles.tile.num_warps, prefill.tiles.tile.num_stages,
    )  # fmt: skip
    yield _one(
        combine_kernel, name, decode, combine_constants(decode, decode.splits, scaled),
        {"cu_ptr": "*i32", "context_ptr": "*i32", "split_tiles": "i32", **PARTS}, {"rows_ptr": None}, COMBINE_WARPS, 1,
    )  # fmt: skip


def _one(
    kernel: Any,
    name: str,
    plan: AttentionPlan,
    constants: Mapping[str, object],
    signature: Mapping[str, str],
    absent: Mapping[str, None],
    num_warps: int,
    num_stages: int,
) -> Ahead:
    shape = plan.shape
    pointers = {"out_ptr": TYPES[shape.dtype], "v_scale_ptr": "*fp32"}
    if kernel is not combine_kernel:
        pages = TYPES[shape.kv_dtype]
        pointers |= {"q_ptr": TYPES[shape.dtype], "k_ptr": pages, "v_ptr": pages, "k_scale_ptr": "*fp32"}
    without = dict(absent)
    if not constants["SCALED"]:
        without |= dict.fromkeys(argument for argument in pointers if argument.endswith("scale_ptr"))
    return Ahead(
        kernel,
        name,
        {argument: kind for argument, kind in {**pointers, **signature}.items() if argument not in without},
        {**constants, **without},
        num_warps,
        num_stages,
        targets=(plan.device.kind,),
        fp_fusion=not shape.batch_invariant,
    )

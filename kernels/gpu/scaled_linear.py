"""x Wᵀ + b of int8 or float8 e4m3 and their scales: W8A8, and float8 weights with x as it is.

    out[m, n] = Σ_g x_scales[m, g] · w_scales[n, g] · Σ_{k of g} x[m, k] · W[n, k]

int8: one g, sums of integers, exact in int32. float8: one g, or runs of 128 columns, whose sums are scaled one by one.
Which float8 a device multiplies `native_float8` says: e4m3fn from sm_89 on and on gfx950, e4m3fnuz on gfx942 (half the
value for the same byte, so scales double: `as_fnuz`), and none before; there its bytes become bfloat16 or float16 on
the way into the product, exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, expect
from kernels.gpu.fp8 import from_e4m3
from kernels.gpu.quantize_rows import GROUP
from kernels.gpu.quantized_tiles import TILES, tile_for
from kernels.gpu.tile import Tile

FLOAT8: Final = (torch.float8_e4m3fn, torch.float8_e4m3fnuz)
MOST_COLUMNS: Final = (1 << 31) // (1 << 14) - 1  # of K, whose sum of products of int8 is an int32


@triton.jit
def scaled_linear_kernel(
    x, x_scales, weight, w_scales, bias, out, num_rows,
    x_stride, x_scale_stride, weight_stride, w_scale_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, FORM: tl.constexpr, GROUP: tl.constexpr,
    X_GROUPED: tl.constexpr, W_GROUPED: tl.constexpr, W_ROWS: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N / COLUMNS⌉, ⌈rows / ROWS⌉). FORM: "int8"; "float8", multiplied as such; "bytes" of float8, which are
    converted, x's as well if it has scales. GROUP: columns that share a scale, a multiple of DEPTH; 0: all of them.
    W_ROWS: rows of W that do."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    inside, there = row < num_rows, column < N
    rows = x + (row * x_stride)[None, :] + depth[:, None]
    columns = weight + (column.to(tl.int64) * weight_stride)[:, None] + depth[None, :]
    if x_scales is not None:
        x_scales += row * x_scale_stride
    if W_ROWS == 1:
        w_scales += column * w_scale_stride
        of_w = there
    else:  # all columns of this program share them
        tl.static_assert(W_ROWS % COLUMNS == 0)
        w_scales += tl.program_id(0) * COLUMNS // W_ROWS * w_scale_stride + tl.arange(0, 1)
        of_w = tl.full([1], True, tl.int1)
    acc = tl.zeros([COLUMNS, ROWS], tl.int32 if FORM == "int8" else tl.float32)
    for begin in range(0, K, DEPTH):
        of_k = begin + depth < K
        w = tl.load(columns + begin, mask=there[:, None] & of_k[None, :], other=0.0)
        a = tl.load(rows + begin, mask=of_k[:, None] & inside[None, :], other=0.0)
        if FORM == "int8":
            acc = tl.dot(w, a, acc, out_dtype=tl.int32)
        else:
            if FORM == "bytes":
                a = a if x_scales is None else from_e4m3(a, True, tl.float16)
                w = from_e4m3(w, False, a.dtype)
            # sm_90 adds products of float8 in less than float32: no more than those of one DEPTH, here.
            part = tl.dot(w, a, input_precision="ieee")
            if GROUP:
                scale = tl.load(w_scales + (begin // GROUP if W_GROUPED else 0), mask=of_w, other=0.0)[:, None]
                if x_scales is not None:
                    by = tl.load(x_scales + (begin // GROUP if X_GROUPED else 0), mask=inside, other=0.0)
                    scale = scale * by[None, :]
                acc += part * scale
            else:
                acc += part
    total = acc.to(tl.float32)
    if GROUP == 0:
        if x_scales is not None:
            total *= tl.load(x_scales, mask=inside, other=0.0)[None, :]
        total *= tl.load(w_scales, mask=of_w, other=0.0)[:, None]
    if bias is not None:
        total += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[:, None]
    to = out + (row * out_stride)[None, :] + column[:, None]
    tl.store(to, total, mask=there[:, None] & inside[None, :])


def int8_linear(
    x: Tensor,
    x_scales: Tensor,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kind: str,
    *,
    batch_invariant: bool = False,
) -> Tensor:
    """x int8 [M, K] · weight int8 [N, K], scaled, + bias [N] → [M, N] of `dtype`, rounded once.

    x_scales [M, 1] or [1], w_scales [N, 1] or [1], float32. `kind` is a key of TILES. Sums are integers: the same bits
    whatever the tile. Raises ValueError naming the argument.
    """
    expect("x", x, (None, None), (torch.int8,), x)
    if x.shape[1] > MOST_COLUMNS:
        raise ValueError(f"x has {x.shape[1]} columns, and sums of int8 hold {MOST_COLUMNS}")
    expect("weight", weight, (None, x.shape[1]), (torch.int8,), x)
    x_stride, _ = _scale_strides("x_scales", x_scales, x.shape[0], 1, x)
    w_stride, _ = _scale_strides("w_scales", w_scales, weight.shape[0], 1, x)
    tile = tile_for(kind, x.dtype, x.shape[0], batch_invariant=batch_invariant)
    return _launch(x, x_scales, weight, w_scales, bias, dtype, (x_stride, w_stride), _form("int8"), tile)


def fp8_linear(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    kind: str,
    *,
    native: torch.dtype | None,
    batch_invariant: bool = False,
) -> Tensor:
    """x [M, K] · weight float8 [N, K], scaled, + bias [N] → [M, N] of `dtype`, float32 sums, rounded once.

    x is float8 as the weight is, with x_scales float32 [M, 1], [1] or, of 128 columns each, [M, ⌈K / 128⌉]; or it is
    bfloat16, float16 or float32 without scales. w_scales float32 [N, 1], [1], or of 128 × 128 blocks
    [⌈N / 128⌉, ⌈K / 128⌉], or of 128 columns each [N, ⌈K / 128⌉]. `native` is what `native_float8` says of the device;
    another float8 than that has to be e4m3fn, and is converted. `kind` is a key of TILES; batch-invariant, a row's bits
    are its own. Raises ValueError naming the argument.
    """
    expect("weight", weight, (None, None), FLOAT8, x)
    n, k = weight.shape
    expect("x", x, (None, k), FLOATS if x_scales is None else (weight.dtype,), weight)
    converted = weight.dtype != native or x_scales is None
    if converted and weight.dtype != torch.float8_e4m3fn:
        raise ValueError(f"weight is {weight.dtype}, which is converted by no kernel of ours")
    groups, blocks = triton.cdiv(k, GROUP), triton.cdiv(n, GROUP)
    x_stride, x_grouped = 0, False
    if x_scales is not None:
        x_stride, x_grouped = _scale_strides("x_scales", x_scales, x.shape[0], groups, x)
    w_rows = GROUP if w_scales.dim() == 2 and w_scales.shape[0] == blocks != n else 1
    w_stride, w_grouped = _scale_strides("w_scales", w_scales, blocks if w_rows == GROUP else n, groups, x)
    form = _form("bytes" if converted else "float8", x_grouped, w_grouped, w_rows)
    if converted:
        x, weight = x if x_scales is None else x.view(torch.uint8), weight.view(torch.uint8)
    tile = tile_for(kind, x.dtype, x.shape[0], batch_invariant=batch_invariant)
    return _launch(x, x_scales, weight, w_scales, bias, dtype, (x_stride, w_stride), form, tile)


def _scale_strides(name: str, scales: Tensor, rows: int, groups: int, like: Tensor) -> tuple[int, bool]:
    """Elements from one row's scales to the next one's, 0 if they share one; and whether a row has several."""
    if scales.numel() == 1:
        expect(name, scales, (1,) * scales.dim(), (torch.float32,), like)
        return 0, False
    grouped = scales.dim() == 2 and scales.shape[1] != 1
    expect(name, scales, (rows, groups if grouped else 1), (torch.float32,), like)
    return scales.stride(0), grouped


def _form(form: str, x_grouped: bool = False, w_grouped: bool = False, w_rows: int = 1) -> dict[str, Any]:
    group = GROUP if x_grouped or w_grouped else 0
    return {"FORM": form, "GROUP": group, "X_GROUPED": x_grouped, "W_GROUPED": w_grouped, "W_ROWS": w_rows}


def _launch(
    x: Tensor,
    x_scales: Tensor | None,
    weight: Tensor,
    w_scales: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
    scale_strides: tuple[int, int],
    form: dict[str, Any],
    tile: Tile,
) -> Tensor:
    (rows, k), n = x.shape, weight.shape[0]
    if dtype not in FLOATS:
        raise ValueError(f"dtype is {dtype}, not {' or '.join(map(str, FLOATS))}")
    if bias is not None:
        expect("bias", bias, (n,), FLOATS, x)
    out = torch.empty(rows, n, dtype=dtype, device=x.device)
    if out.numel():
        scaled_linear_kernel[(triton.cdiv(n, tile.columns), triton.cdiv(rows, tile.rows))](
            x, x_scales, weight, w_scales, bias, out, rows,
            x.stride(0), scale_strides[0], weight.stride(0), scale_strides[1], out.stride(0),
            **form, **_sizes(n, k, tile), num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _sizes(n: int, k: int, tile: Tile) -> dict[str, int]:
    return {"N": n, "K": k, "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": tile.depth}


def native_float8(device: torch.device) -> torch.dtype | None:
    """The float8 e4m3 that a GPU multiplies; None: it has no such instruction."""
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch = properties.gcnArchName.partition(":")[0]
        return {"gfx942": torch.float8_e4m3fnuz, "gfx950": torch.float8_e4m3fn}.get(arch)
    return torch.float8_e4m3fn if (properties.major, properties.minor) >= (8, 9) else None


def as_fnuz(weight: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
    """float8_e4m3fn and scales → the same numbers as float8_e4m3fnuz: half the values, exactly, by twice the scales."""
    code = weight.view(torch.uint8)
    code = torch.where(code == 0x80, 0, code)  # −0, which would be NaN
    code = torch.where((code & 0x7F) == 0x7F, 0x80, code)
    return code.view(torch.float8_e4m3fnuz), scales * 2


def ahead() -> Iterator[Ahead]:
    """A wide product of a large and of a small model in every form of checkpoints and devices; of the first by every
    tile.
    """
    native = {"sm_90": "*fp8e4nv", "gfx942": "*fp8e4b8"}
    for model in (MODELS[0], MODELS[-1]):
        llama = model.name.startswith("llama")
        n, k = (2 * model.intermediate, model.hidden) if llama else (model.hidden, model.intermediate)
        for kind, tiles in TILES.items():
            float8 = native.get(kind, "*u8")
            form = "float8" if kind in native else "bytes"
            forms = [
                ("int8", "*i8", "*i8", _form("int8")),
                ("float8 channel", float8, float8, _form(form)),
                ("float8 block", float8, float8, _form(form, True, True, GROUP)),
                ("float8 channel bf16", "*bf16", "*u8", _form("bytes")),
                ("float8 block bf16", "*bf16", "*u8", _form("bytes", False, True, GROUP)),
            ]
            for what, x, weight, constants in forms:
                for tile in tiles if llama else tiles[:1]:
                    yield _ahead(f"{model.name} {what}, {tile.rows} rows", kind, x, weight, constants, n, k, tile)


def _ahead(
    name: str, kind: str, x: str, weight: str, form: dict[str, Any], n: int, k: int, tile: Tile
) -> Ahead:  # fmt: skip
    absent = ("bias", "x_scales") if x == "*bf16" else ("bias",)
    pointers = {"x": x, "x_scales": "*fp32", "weight": weight, "w_scales": "*fp32", "out": "*bf16"}
    strides = ("x_stride", "x_scale_stride", "weight_stride", "w_scale_stride", "out_stride")
    return Ahead(
        scaled_linear_kernel,
        name,
        {
            **{argument: kind for argument, kind in pointers.items() if argument not in absent},
            "num_rows": "i32",
            **dict.fromkeys(strides, "i32"),
        },
        {**form, **_sizes(n, k, tile), **dict.fromkeys(absent)},
        tile.num_warps,
        tile.num_stages,
        multiples_of_16=("x_stride", "weight_stride", "out_stride"),
        targets=(kind,),
    )

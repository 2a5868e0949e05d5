"""x Wᵀ + b of weights in codes of 4 or 8 bits by groups of columns, x as it is: W4A16 and W8A16.

    W[n, k] = (codes[n, k] − zeros[n, g]) · scales[n, g]        g = k // group_size

The accumulators are scaled, not the weights. A code less its zero point is an integer below 256 and so exact in
bfloat16: the product of a group is made of exact integers, and nothing is rounded before float32. It is cheaper, too,
where that counts: a step of few rows has about four operations a weight on an H100 until reading weights is no longer
what it waits for (unpacking takes as many), and scaling costs one a sum instead of one and a rounding a weight. In
tiles of 128 rows both cost the same with groups of 128; with groups of 32 accumulators cost four times as much, an
eighth to a half of the product.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, expect
from kernels.gpu.quantized_tiles import TILES, tile_for
from kernels.gpu.tile import Tile

TYPES: Final = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}
# Rows of a tile whose x is gathered as it is read. Taller ones would hold more addresses than registers, and every one
# of ⌈N / columns⌉ programs would gather again: then x is put in order before.
GATHERED: Final = 64
HALF: Final = 32  # columns whose codes are the low halves of as many bytes; those of the next 32 are the high halves


@dataclass(frozen=True)
class GroupedWeight:
    """A matrix [N, K] as the kernel reads it; made by `pack_grouped`."""

    codes: Tensor  # uint8 [N, K], or [N, ⌈K / 64⌉ · 32] where `bits` is 4
    grid: Tensor  # [G, N] of a scale's bits above a zero point: int32 of scales of 16 bits, int64 of float32
    scales: torch.dtype
    columns: int  # K
    bits: int  # of a code's place: 4 or 8
    group_size: int  # G = ⌈K / group_size⌉
    order: Tensor | None  # int32 [K]: column k of the matrix goes with column order[k] of x


def pack_grouped(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group_size: int, order: Tensor | None = None
) -> GroupedWeight:
    """codes uint8 [N, K] below 2^bits, scales and zeros (uint8) [N, G] of runs of `group_size` columns, 0 being all.

    Where the groups are not runs (act-order), the codes' columns are in order of the groups, and `order` [K] tells
    which column of x each goes with. Groups are of 32 columns or a multiple of 64, except where there is one. Raises
    ValueError naming the argument.
    """
    if bits not in (4, 8):
        raise ValueError(f"bits is {bits}, not 4 or 8")
    expect("codes", codes, (None, None), (torch.uint8,), codes)
    rows, columns = codes.shape
    size = group_size or columns
    groups = triton.cdiv(columns, size)
    if groups > 1 and size != HALF and size % (2 * HALF):
        raise ValueError(f"group_size is {group_size}, not 32 or a multiple of 64")
    expect("scales", scales, (rows, groups), FLOATS, codes)
    expect("zeros", zeros, (rows, groups), (torch.uint8,), codes)
    if codes.numel() and (most := int(codes.max())) >> bits:
        raise ValueError(f"a code is {most}, and bits is {bits}")
    if order is not None:
        expect("order", order, (columns,), (torch.int32,), codes)
        if not order.sort().values.equal(torch.arange(columns, dtype=torch.int32, device=order.device)):
            raise ValueError(f"order is not an order of {columns} columns")
    packed = _halves(codes) if bits == 4 else codes.contiguous()
    scales = _narrowed(scales)
    return GroupedWeight(packed, _grid(scales, zeros), scales.dtype, columns, bits, size, order)


def _halves(codes: Tensor) -> Tensor:
    """Byte 32 b + j of a row holds column 64 b + j below and column 64 b + 32 + j above it, b counting blocks.

    So both halves of a tile of bytes are runs of columns as they are, one operation away, and no element changes its
    place among the registers. Columns past the last are 0, and x is taken as 0 there.
    """
    rows, columns = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -columns % (2 * HALF)))
    low, high = padded.view(rows, -1, 2, HALF).unbind(2)
    return (low | high << 4).reshape(rows, -1)


def _grid(scales: Tensor, zeros: Tensor) -> Tensor:
    """A scale and a zero point in one word, [G, N]: what a tile loads lies together, and is copied while other products
    are made, which hardware does with no less than 32 bits."""
    word, bits, shift = (
        (torch.int64, torch.int32, 32) if scales.dtype == torch.float32 else (torch.int32, torch.int16, 16)
    )
    return ((scales.contiguous().view(bits).to(word) << shift) | zeros.to(word)).T.contiguous()


def _narrowed(scales: Tensor) -> Tensor:
    """In 16 bits, if each is a float16 or each a bfloat16: most checkpoints' are, whatever they were read as."""
    for dtype in (torch.float16, torch.bfloat16):
        if scales.dtype == dtype or scales.to(dtype).to(scales.dtype).equal(scales):
            return scales.to(dtype)
    return scales


@triton.jit
def less_zero(codes, words, PLACE: tl.constexpr, dtype: tl.constexpr):
    """codes [columns, depth], uint32 in their places from bit PLACE on, − the words' zero points, exactly, in `dtype`.

    Without shifts and conversions, of which a multiprocessor makes few: bits below the implicit one of 2^(23 − PLACE)
    are a float32 of that and the code, and the upper half of a float32 whose lower half is 0 is its bfloat16.
    """
    one: tl.constexpr = 8388608.0 / (1 << PLACE)
    ones: tl.constexpr = (150 - PLACE) << 23  # the same as bits
    number = (codes | ones).to(tl.float32, bitcast=True) - ((words & 0xFF).to(tl.float32) + one)[:, None]
    if dtype == tl.bfloat16:
        return (number.to(tl.uint32, bitcast=True) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        return number.to(dtype)


@triton.jit
def load_columns(x, order, k, inside, K: tl.constexpr):
    """x [depth, rows] at columns k, or where `order` puts them; 0 past the last."""
    at = k if order is None else tl.load(order + k, mask=k < K, other=0)
    return tl.load(x[None, :] + at[:, None], mask=(k < K)[:, None] & inside[None, :], other=0.0)


@triton.jit
def scale_of(words, SCALES: tl.constexpr):
    wide: tl.constexpr = SCALES == tl.float32  # noqa: SIM300, in this order Triton compares types
    if wide:
        return (words >> 32).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return (words >> 16).to(tl.uint16).to(SCALES, bitcast=True).to(tl.float32)


@triton.jit(do_not_specialize=["num_rows"])  # one compilation, whatever the number is
def grouped_linear_kernel(
    x, codes, grid, order, bias, out, num_rows, x_stride, codes_stride, out_stride,
    N: tl.constexpr, K: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, SCALES: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Grid (⌈N / COLUMNS⌉, ⌈rows / ROWS⌉). GROUP: columns of one, a multiple of DEPTH; 0: all of them; 32 with 4 bits:
    DEPTH is 64, and a byte's halves belong to two groups."""
    row = tl.program_id(1).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    inside, there = row < num_rows, column < N
    rows = x + row * x_stride
    halves: tl.constexpr = 8 // BITS
    row_bytes: tl.constexpr = K if BITS == 8 else (K + 63) // 64 * 32
    at = tl.arange(0, DEPTH // halves)
    byte = codes + (column.to(tl.int64) * codes_stride)[:, None] + at[None, :]
    k = at if BITS == 8 else at // 32 * 64 + at % 32
    two_groups: tl.constexpr = GROUP == 32 and BITS == 4
    grid += column
    words = tl.load(grid, mask=there, other=0)
    acc = tl.zeros([COLUMNS, ROWS], tl.float32)
    for begin in range(0, K, DEPTH):
        first = begin // halves
        loaded = tl.load(byte + first, mask=there[:, None] & (first + at < row_bytes)[None, :], other=0)
        if GROUP:
            words = tl.load(grid + begin // GROUP * N, mask=there, other=0)
        a = load_columns(rows, order, begin + k, inside, K)
        low = less_zero((loaded if BITS == 8 else loaded & 15).to(tl.uint32), words, 0, a.dtype)
        part = tl.dot(low, a, None if GROUP else acc, input_precision="ieee")
        if two_groups:
            acc += part * scale_of(words, SCALES)[:, None]
            words = tl.load(grid + (begin // GROUP + 1) * N, mask=there & (begin + 32 < K), other=0)
        if BITS == 4:
            b = load_columns(rows, order, begin + 32 + k, inside, K)
            high = less_zero((loaded & 0xF0).to(tl.uint32), words, 4, a.dtype)
            part = tl.dot(high, b, None if two_groups else part, input_precision="ieee")
        if GROUP:
            acc += part * scale_of(words, SCALES)[:, None]
        else:
            acc = part
    if GROUP == 0:
        acc *= scale_of(words, SCALES)[:, None]
    if bias is not None:
        acc += tl.load(bias + column, mask=there, other=0.0).to(tl.float32)[:, None]
    to = out + (row * out_stride)[None, :] + column[:, None]
    tl.store(to, acc, mask=there[:, None] & inside[None, :])


def grouped_linear(
    x: Tensor, weight: GroupedWeight, bias: Tensor | None, kind: str, *, batch_invariant: bool = False
) -> Tensor:
    """x [M, K] · W [N, K] + bias [N] → [M, N] of x's dtype: bfloat16, float16, or float32 for checks.

    float32 sums, rounded once; x's rows may be strided. `kind` is a key of TILES; batch-invariant, a row's bits are its
    own. Raises ValueError naming the argument.
    """
    expect("x", x, (None, weight.columns), FLOATS, x)
    rows, k = x.shape
    n = weight.grid.shape[1]
    groups = triton.cdiv(k, weight.group_size)
    expect("codes", weight.codes, (n, None), (torch.uint8,), x)
    expect("grid", weight.grid, (groups, n), (torch.int32, torch.int64), x, contiguous=True)
    if weight.order is not None:
        expect("order", weight.order, (k,), (torch.int32,), x)
    if bias is not None:
        expect("bias", bias, (n,), FLOATS, x)
    out = x.new_empty(rows, n)
    if out.numel() == 0:
        return out
    tile, order = tile_for(kind, x.dtype, rows, batch_invariant=batch_invariant), weight.order
    if order is not None and tile.rows > GATHERED:
        x, order = x.index_select(1, order), None
    constants = _constants(n, k, weight.bits, weight.group_size, weight.scales, tile)
    grouped_linear_kernel[(triton.cdiv(n, tile.columns), triton.cdiv(rows, tile.rows))](
        x, weight.codes, weight.grid, order, bias, out, rows,
        x.stride(0), weight.codes.stride(0), out.stride(0), **constants,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out


def _constants(n: int, k: int, bits: int, group_size: int, scales: torch.dtype, tile: Tile) -> dict[str, Any]:
    group = group_size if group_size < k else 0
    depth = next(d for d in (128, 64, 32) if d <= tile.depth and group % d == 0)
    if (bits, depth) == (4, HALF):
        depth = 2 * HALF
    return {
        "N": n, "K": k, "BITS": bits, "GROUP": group, "SCALES": TYPES[scales],
        "ROWS": tile.rows, "COLUMNS": tile.columns, "DEPTH": depth
    }  # fmt: skip


def ahead() -> Iterator[Ahead]:
    """A wide product of a large and of a small model; of the first by every tile, in the groups that most checkpoints
    have, and by the least and the greatest tile in the others, and permuted.
    """
    strides = ("x_stride", "codes_stride", "out_stride")
    pointers = {"x": "*bf16", "codes": "*u8", "grid": "*i32", "out": "*bf16"}
    for model in (MODELS[0], MODELS[-1]):
        llama = model.name.startswith("llama")
        schemes = [(4, 128, False), (8, 128, False)]
        if llama:
            schemes = [(4, group, False) for group in (32, 64, 128, 0)] + [
                (8, 128, False),
                (8, 0, False),
                (4, 128, True),
            ]
        for bits, group, permuted in schemes:
            n, k = (2 * model.intermediate, model.hidden) if llama else (model.hidden, model.intermediate)
            for kind, tiles in TILES.items():
                every = tiles[:3] if permuted else tiles if group == 128 else (tiles[0], tiles[-1])
                for tile in every if llama else tiles[:1]:
                    ordered = {"order": "*i32"} if permuted else {}
                    yield Ahead(
                        grouped_linear_kernel,
                        f"{model.name} int{bits} g{group or k}{' permuted' if permuted else ''}, {tile.rows} rows",
                        {**pointers, **ordered, "num_rows": "i32", **dict.fromkeys(strides, "i32")},
                        {
                            **_constants(n, k, bits, group or k, torch.float16, tile),
                            "bias": None,
                            **({} if permuted else {"order": None}),
                        },
                        tile.num_warps,
                        tile.num_stages,
                        multiples_of_16=strides,
                        targets=(kind,),
                    )

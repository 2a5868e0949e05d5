"""Products of weights in codes of 4 and 8 bits by groups, against float64; and the form they are packed into."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.gpu.quantized_linear import GroupedWeight, grouped_linear, pack_grouped
from kernels.gpu.quantized_tiles import TILES, tile_for
from tests.kernels_triton.compare import DEVICE, INTERPRETED, PLACE, normal
from tests.kernels_triton.paged import SM90, this_device

KIND = "sm_90" if INTERPRETED else this_device(SM90).kind


def a_matrix(
    n: int, k: int, bits: int, group_size: int, *, permuted: bool = False, zero: int | None = None, seed: int = 0
) -> tuple[GroupedWeight, Tensor]:
    """Random codes and scales, zero points too unless all are `zero`; packed, and in float64."""
    generator = torch.Generator().manual_seed(seed)
    groups = -(-k // (group_size or k))
    codes = torch.randint(0, 1 << bits, (n, k), generator=generator).byte()
    zeros = torch.randint(0, 1 << bits, (n, groups), generator=generator).byte()
    if zero is not None:
        zeros.fill_(zero)
    scales = (torch.rand(n, groups, generator=generator) / 64 + 0.001).half()
    order = torch.randperm(k, generator=generator).int() if permuted else None
    weight = reference.grouped_weight(codes, scales, zeros, group_size, order)
    on_device = (codes.to(DEVICE), scales.to(DEVICE), zeros.to(DEVICE))
    packed = pack_grouped(*on_device, bits, group_size, None if order is None else order.to(DEVICE))
    return packed, weight.to(DEVICE)


def check(x: Tensor, packed: GroupedWeight, weight: Tensor, bias: Tensor | None = None, kind: str = KIND) -> None:
    """Within a place of the result's dtype, and what float32 sums lose of the greatest that were added."""
    expected = x.double() @ weight.T + (bias.double() if bias is not None else 0.0)
    size = (x.double().abs() @ weight.abs().T).max().item()
    actual = grouped_linear(x, packed, bias, kind)
    assert actual.dtype == x.dtype
    place = PLACE[x.dtype]
    torch.testing.assert_close(actual.double(), expected, rtol=place, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", list(PLACE), ids=str)
@pytest.mark.parametrize("group_size", [32, 64, 128, 0])
@pytest.mark.parametrize("bits", [4, 8])
def test_every_scheme(bits: int, group_size: int, dtype: torch.dtype) -> None:
    """N odd, rows strided; K no multiple of a block, and a short last group."""
    for rows, n, k in ((1, 1, 1), (3, 65, 129), (2, 7, 300), (5, 3, 33)):
        x = normal(rows, k + 3, dtype=dtype)[:, :k]
        check(x, *a_matrix(n, k, bits, group_size))


@pytest.mark.parametrize("group_size", [64, 256])
def test_columns_that_fill_their_groups(group_size: int) -> None:
    for bits in (4, 8):
        check(normal(4, 512, dtype=torch.bfloat16), *a_matrix(40, 512, bits, group_size))


@pytest.mark.parametrize("rows", range(1, 18))
def test_rows(rows: int) -> None:
    check(normal(rows, 130, dtype=torch.bfloat16), *a_matrix(33, 130, 4, 64), bias=normal(33, dtype=torch.bfloat16))


@pytest.mark.parametrize("kind", list(TILES) if INTERPRETED else [KIND])
@pytest.mark.parametrize("rows", [16, 32, 64, 130])
def test_every_tile(rows: int, kind: str) -> None:
    packed, weight = a_matrix(130, 140, 4, 128)
    check(normal(rows, 140, dtype=torch.float16), packed, weight, normal(130, dtype=torch.float16, seed=3), kind)


@pytest.mark.parametrize("group_size", [32, 128])
@pytest.mark.parametrize("bits", [4, 8])
def test_columns_out_of_order(bits: int, group_size: int) -> None:
    packed, weight = a_matrix(9, 203, bits, group_size, permuted=True)
    for rows in (5, 70):  # gathered in the kernel, and before it
        check(normal(rows, 206, dtype=torch.bfloat16)[:, :203], packed, weight)


@pytest.mark.parametrize(("bits", "zero"), [(4, 0), (4, 15), (8, 0), (8, 255)])
def test_extreme_zero_points(bits: int, zero: int) -> None:
    check(normal(3, 96, dtype=torch.bfloat16), *a_matrix(17, 96, bits, 32, zero=zero))


@pytest.mark.parametrize("bits", [4, 8])
def test_every_code_and_zero_point_is_exact(bits: int) -> None:
    """One column is 1: the product is the code less the zero point, an integer below 256 that bfloat16 has."""
    size = 1 << bits
    codes = torch.arange(size, device=DEVICE).byte().repeat(size, 1)
    zeros = torch.arange(size, device=DEVICE).byte()[:, None]
    packed = pack_grouped(codes, torch.ones(size, 1, device=DEVICE), zeros, bits, 0)
    rows = torch.arange(size) if bits == 4 else torch.arange(0, size, 15)
    x = torch.eye(size, dtype=torch.bfloat16, device=DEVICE)[rows]
    expected = codes.double().T[rows] - zeros.double().T
    assert grouped_linear(x, packed, None, KIND).double().equal(expected)


def test_bytes_hold_columns_32_apart() -> None:
    codes = (torch.arange(3 * 70) % 16).byte().view(3, 70)
    packed = pack_grouped(codes, torch.ones(3, 1), torch.zeros(3, 1).byte(), 4, 0).codes
    assert packed.shape == (3, 64)
    for block, j in ((0, 0), (0, 31), (1, 0), (1, 5)):
        low, high = 64 * block + j, 64 * block + 32 + j
        above = codes[:, high] if high < 70 else torch.zeros(3).byte()
        assert packed[:, 32 * block + j].equal(codes[:, low] + 16 * above)
    assert not packed[:, 32 + 6 :].any(), "columns past the last"


@pytest.mark.parametrize("scale", [0.1, 2.0**-30, 1e5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_scales_keep_their_bits(dtype: torch.dtype, scale: float) -> None:
    """Given as float32, they are kept in 16 bits where those are the same number."""
    scales = torch.full((2, 3), scale).to(dtype if scale < 6e4 or dtype != torch.float16 else torch.float32)
    codes, zeros = torch.full((2, 96), 9).byte(), torch.full((2, 3), 8).byte()
    for given in (scales, scales.float()):
        packed = pack_grouped(codes.to(DEVICE), given.to(DEVICE), zeros.to(DEVICE), 4, 32)
        assert packed.grid.dtype == (torch.int64 if packed.scales == torch.float32 else torch.int32)
        x = torch.ones(1, 96, device=DEVICE)
        x[:, 32:] = 0
        expected = scales[:, 0].double().to(DEVICE) * 32
        torch.testing.assert_close(grouped_linear(x, packed, None, KIND)[0].double(), expected, rtol=1e-7, atol=0)
    assert pack_grouped(codes, torch.full((2, 3), 0.1).half().float(), zeros, 4, 32).scales == torch.float16
    assert pack_grouped(codes, torch.full((2, 3), 1e5).bfloat16().float(), zeros, 4, 32).scales == torch.bfloat16
    assert pack_grouped(codes, torch.full((2, 3), 0.1), zeros, 4, 32).scales == torch.float32


@pytest.mark.parametrize(("bits", "group_size"), [(4, 32), (8, 64)])
def test_a_row_has_the_same_bits_among_any_others(bits: int, group_size: int) -> None:
    packed, _ = a_matrix(70, 140, bits, group_size)
    x = normal(70, 140, dtype=torch.bfloat16)
    whole = grouped_linear(x, packed, None, KIND, batch_invariant=True)
    for first, count in ((0, 1), (5, 20), (63, 2), (69, 1)):
        one = grouped_linear(x[first : first + count], packed, None, KIND, batch_invariant=True)
        assert one.equal(whole[first : first + count])


def test_the_smallest_tile_that_takes_all_rows() -> None:
    for kind, tiles in TILES.items():
        assert [tile_for(kind, torch.bfloat16, rows).rows for rows in (1, 16, 17, 64, 65, 999)] == [
            16, 16, 32, 64, 128, 128
        ]  # fmt: skip
        assert {tile_for(kind, torch.bfloat16, rows, batch_invariant=True) for rows in (1, 99)} == {tiles[2]}


def test_nothing_of_no_rows() -> None:
    packed, _ = a_matrix(3, 40, 4, 32)
    assert grouped_linear(normal(0, 40), packed, None, KIND).shape == (0, 3)


def test_refusals() -> None:
    codes, scales, zeros = torch.zeros(2, 64).byte(), torch.ones(2, 2), torch.zeros(2, 2).byte()
    packed = pack_grouped(codes, scales, zeros, 4, 32)
    with pytest.raises(ValueError, match=r"x has shape \[1, 65\], not \[any, 64\]"):
        grouped_linear(torch.zeros(1, 65), packed, None, KIND)
    with pytest.raises(ValueError, match=r"bias has shape \[3\], not \[2\]"):
        grouped_linear(torch.zeros(1, 64), packed, torch.zeros(3), KIND)
    with pytest.raises(ValueError, match="bits is 3, not 4 or 8"):
        pack_grouped(codes, scales, zeros, 3, 32)
    with pytest.raises(ValueError, match="group_size is 96, not 32 or a multiple of 64"):
        a_matrix(4, 200, 4, 96)
    with pytest.raises(ValueError, match=r"scales has shape \[2, 2\], not \[2, 1\]"):
        pack_grouped(codes, scales, zeros, 4, 64)
    with pytest.raises(ValueError, match="order is not an order of 64 columns"):
        pack_grouped(codes, scales, zeros, 4, 32, torch.zeros(64).int())
    with pytest.raises(ValueError, match="a code is 16, and bits is 4"):
        pack_grouped(codes + 16, scales, zeros, 4, 32)

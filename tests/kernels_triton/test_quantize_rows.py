"""Activations to int8 and float8: codes and scales, bit for bit, as torch makes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels.gpu.quantize_rows import quantize_by, quantize_groups, quantize_rows
from tests.kernels_triton.compare import DEVICE, PLACE, normal
from tests.kernels_triton.paged import WHERE

FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
SHAPES = [(1, 1), (3, 129), (5, 576), (2, 5000)]
LEAST = 2.0**-126


def expected_scales(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Of the last dimension, which stays as one."""
    most = 127 if dtype == torch.int8 else 448
    greatest = torch.nn.functional.pad(x.float(), (0, 1)).abs().amax(-1, keepdim=True)
    return (greatest / most).clamp(min=LEAST) * (2 if dtype == FNUZ else 1)


def expected_codes(x: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    if dtype == torch.int8:
        return (x.float() / scales).round().clamp(-127, 127).to(torch.int8)
    if dtype == FN:
        return (x.float() / scales).clamp(-448, 448).to(FN)
    half = (x.float() / (scales / 2)).clamp(-448, 448).to(FN).float() / 2  # which every float8_e4m3fnuz can be
    return half.to(FNUZ)


def same(actual: Tensor, expected: Tensor) -> None:
    """Bytes, but for the sign of zeros: they tell nothing, and fnuz has none."""
    assert actual.dtype == expected.dtype
    ours, theirs = (codes.view(torch.uint8).cpu().where(codes.cpu().float() != 0, 0) for codes in (actual, expected))
    assert ours.equal(theirs)


@pytest.mark.parametrize("source", list(PLACE), ids=str)
@pytest.mark.parametrize("dtype", [torch.int8, FN, FNUZ], ids=str)
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_a_scale_a_row(rows: int, k: int, dtype: torch.dtype, source: torch.dtype) -> None:
    x = normal(rows, k + 3, dtype=source)[:, :k]
    codes, scales = quantize_rows(x, dtype)
    assert scales.equal(expected_scales(x, dtype))
    same(codes, expected_codes(x, scales, dtype))


@pytest.mark.parametrize("dtype", [torch.int8, FN, FNUZ], ids=str)
@pytest.mark.parametrize(("rows", "k"), SHAPES)
def test_a_scale_a_group(rows: int, k: int, dtype: torch.dtype) -> None:
    """Each group's scale is its own: they differ by powers of ten."""
    x = normal(rows, k + 3, dtype=torch.bfloat16)[:, :k] * 10.0 ** (torch.arange(k, device=WHERE) // 128 % 7).bfloat16()
    codes, scales = quantize_groups(x, dtype)
    assert scales.shape == (rows, -(-k // 128))
    for group, scale in enumerate(scales.split(1, 1)):
        part = slice(128 * group, 128 * group + 128)
        assert scale.equal(expected_scales(x[:, part], dtype))
        same(codes[:, part].contiguous(), expected_codes(x[:, part], scale, dtype))


@pytest.mark.parametrize("dtype", [torch.int8, FN, FNUZ], ids=str)
@pytest.mark.parametrize("scale", [1e-3, 0.01, 3.0])
def test_one_scale_given(scale: float, dtype: torch.dtype) -> None:
    """The smallest cuts most off: those become the greatest code."""
    x, given = normal(4, 700), torch.tensor([scale], device=WHERE)
    codes = quantize_by(x, given, dtype)
    same(codes, expected_codes(x, given, dtype))
    if scale == 1e-3:
        greatest = {torch.int8: 127, FN: 448, FNUZ: 224}[dtype]
        assert (codes.float().abs() == greatest).float().mean() > 0.5


@pytest.mark.parametrize("dtype", [FN, FNUZ], ids=str)
def test_every_float8_is_its_own_code(dtype: torch.dtype) -> None:
    """Subnormals too; a scale of 1 (fnuz: 2) leaves them as they are."""
    numbers = torch.arange(0x7F, dtype=torch.uint8).view(FN).float()
    x = torch.cat([numbers, -numbers])[None].to(DEVICE)
    codes = quantize_by(x, torch.tensor([2.0 if dtype == FNUZ else 1.0], device=WHERE), dtype)
    assert (codes.float() * (2 if dtype == FNUZ else 1)).equal(x)
    assert codes.view(torch.uint8)[0, :0x7F].cpu().equal(torch.arange(0x7F, dtype=torch.uint8))
    between = (numbers[1:] + numbers[:-1])[None].to(DEVICE) / 2  # ties: to the even one
    same(quantize_by(between, torch.tensor([1.0], device=WHERE), FN), between.to(FN))


def test_halves_are_rounded_to_even() -> None:
    x = torch.cat([torch.arange(-126, 126) + 0.5, torch.tensor([127.0])])[None].to(DEVICE)
    codes, scales = quantize_rows(x, torch.int8)
    assert scales.item() == 1
    assert codes.equal(x.round().to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.int8, FN, FNUZ], ids=str)
def test_rows_of_zeros_and_of_almost_nothing(dtype: torch.dtype) -> None:
    x = torch.zeros(3, 200, device=DEVICE)
    x[1, 5], x[2, 150] = 2.0**-133, 1.0
    for codes, scales in (quantize_rows(x, dtype), quantize_groups(x, dtype)):
        assert (scales >= LEAST).all()
        assert not codes[0].float().any()
        assert scales.isfinite().all()
    codes, scales = quantize_rows(x, dtype)
    assert (codes.float() * scales)[2].equal(x[2])
    assert scales[0].item() == LEAST * (2 if dtype == FNUZ else 1)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.int8, FN, FNUZ], ids=str)
def test_what_is_not_finite_shows(dtype: torch.dtype, bad: float) -> None:
    x = torch.ones(2, 300, device=DEVICE)
    x[1, 7] = bad
    _, scales = quantize_rows(x, dtype)
    assert scales[:, 0].isfinite().tolist() == [True, False]
    _, scales = quantize_groups(x, dtype)
    assert scales.isfinite().tolist() == [[True] * 3, [False, True, True]]
    if dtype != torch.int8 and bad != bad:
        assert quantize_by(x, torch.ones(1, device=WHERE), dtype).float().isnan().sum() == 1


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"dtype is torch.float16, not torch.int8 or"):
        quantize_rows(normal(2, 8), torch.float16)
    with pytest.raises(ValueError, match=r"scale has shape \[2\], not \[1\]"):
        quantize_by(normal(2, 8), normal(2), FN)
    assert quantize_rows(normal(0, 8), torch.int8)[0].shape == (0, 8)

"""Products of int8 and of float8 by their scales, against float64."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from kernels.gpu.quantize_rows import quantize_rows
from kernels.gpu.quantized_tiles import TILES
from kernels.gpu.scaled_linear import as_fnuz, fp8_linear, int8_linear, native_float8
from tests.kernels_triton.compare import DEVICE, INTERPRETED, PLACE, normal
from tests.kernels_triton.paged import SM90, WHERE, this_device

KIND = "sm_90" if INTERPRETED else this_device(SM90).kind
FN, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
# What is said to be native: nothing, and what this device can; the interpreter can all.
NATIVE = [FN, FNUZ, None] if INTERPRETED else [*{native_float8(WHERE), None}]
SHAPES = [(1, 1, 1), (3, 65, 129), (2, 131, 300), (17, 40, 256)]


def codes_of(rows: int, k: int, dtype: torch.dtype, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random codes [rows, k], their rows further apart, and scales [rows, 1] that keep products within float16."""
    values = normal(rows, k + 3, seed=seed)[:, :k]
    codes = (values * 40).round().clamp(-128, 127).to(torch.int8) if dtype == torch.int8 else values.to(dtype)
    return codes, (normal(rows, 1, seed=seed + 100).abs() + 0.01) * (0.03 if dtype == torch.int8 else 1.0)


def near(actual: Tensor, expected: Tensor, dtype: torch.dtype, sizes: Tensor) -> None:
    """Within a place of the result's dtype, and what float32 sums lose of the greatest that were added."""
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), expected, rtol=PLACE[dtype], atol=1e-6 * sizes.max().item())


def spread(scales: Tensor, rows: int, columns: int, *, height: int = 1) -> Tensor:
    """A scale for each element: of 128 columns, or of all; of `height` rows, or of all."""
    wide = scales.double() if scales.dim() == 2 else scales.double()[:, None]
    if wide.shape[1] > 1:
        wide = wide.repeat_interleave(128, 1)[:, :columns]
    return wide.repeat_interleave(height, 0)[:rows].expand(rows, columns)


@pytest.mark.parametrize("dtype", list(PLACE), ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), SHAPES)
def test_int8(rows: int, n: int, k: int, dtype: torch.dtype) -> None:
    x, x_scales = codes_of(rows, k, torch.int8, 2)
    weight, w_scales = codes_of(n, k, torch.int8)
    bias = normal(n, dtype=dtype, seed=2)
    for by_x, by_w, plus in ((x_scales, w_scales, bias), (x_scales[:1, 0], w_scales[0], None)):
        a, b = x.double() * spread(by_x, rows, k), weight.double() * spread(by_w, n, k)
        expected = a @ b.T + (0 if plus is None else plus.double())
        near(int8_linear(x, by_x, weight, by_w, plus, dtype, KIND), expected, dtype, a.abs() @ b.abs().T)


def test_sums_of_int8_are_exact_at_their_greatest() -> None:
    k = 1024
    x, weight = torch.full((2, k), -128).to(torch.int8).to(DEVICE), torch.full((3, k), -128).to(torch.int8).to(DEVICE)
    weight[:, 0] = 127
    ones = torch.ones(1, device=DEVICE)
    expected = (k - 1) * 128 * 128 - 128 * 127
    assert (int8_linear(x, ones, weight, ones, None, torch.float32, KIND) == expected).all()
    with pytest.raises(ValueError, match=r"x has 131072 columns, and sums of int8 hold 131071"):
        int8_linear(x[:, :1].repeat(1, 1 << 17), ones, weight, ones, None, torch.float32, KIND)


@pytest.mark.parametrize("rows", range(1, 18))
def test_rows(rows: int) -> None:
    """From activations on, as a layer has it."""
    x = normal(rows, 140)
    for dtype in (torch.int8, FN):
        codes, x_scales = quantize_rows(x, dtype)
        weight, w_scales = codes_of(33, 140, dtype)
        if dtype == torch.int8:
            actual = int8_linear(codes, x_scales, weight, w_scales, None, torch.bfloat16, KIND)
        else:
            actual = fp8_linear(codes, x_scales, weight, w_scales, None, torch.bfloat16, KIND, native=NATIVE[0])
        a, b = codes.double() * x_scales.double(), weight.double() * w_scales.double()
        near(actual, a @ b.T, torch.bfloat16, a.abs() @ b.abs().T)
        assert (a - x).norm() < (0.01 if dtype == torch.int8 else 0.04) * x.norm()


@pytest.mark.parametrize("native", NATIVE, ids=str)
@pytest.mark.parametrize("of_weight", ["row", "tensor", "block", "rows' groups"])
@pytest.mark.parametrize("of_x", ["token", "tensor", "group", "none"])
@pytest.mark.parametrize(
    ("rows", "n", "k"), [*SHAPES[1:3], *(pytest.param(*shape, marks=pytest.mark.full) for shape in SHAPES[::3])]
)
def test_float8(rows: int, n: int, k: int, of_x: str, of_weight: str, native: torch.dtype | None) -> None:
    stored = FNUZ if native == FNUZ and of_x != "none" else FN
    weight, by_row = codes_of(n, k, stored)
    generator = torch.Generator().manual_seed(2)
    groups, blocks = -(-k // 128), -(-n // 128)
    w_scales, height = {
        "row": (by_row, 1),
        "tensor": (by_row[:1, 0], n),
        "block": ((torch.rand(blocks, groups, generator=generator) + 0.01).to(DEVICE), 128),
        "rows' groups": ((torch.rand(n, groups, generator=generator) + 0.01).to(DEVICE), 1),
    }[of_weight]
    x, by_token = codes_of(rows, k, torch.bfloat16 if of_x == "none" else stored, 4)
    x_scales = {
        "token": by_token,
        "tensor": by_token[:1, 0],
        "group": (torch.rand(rows, groups, generator=generator) + 0.01).to(DEVICE),
        "none": None,
    }[of_x]
    a = x.double() * (1 if x_scales is None else spread(x_scales, rows, k, height=rows if of_x == "tensor" else 1))
    b = weight.double() * spread(w_scales, n, k, height=height)
    bias = normal(n, dtype=torch.bfloat16, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        actual = fp8_linear(x, x_scales, weight, w_scales, bias, dtype, KIND, native=native)
        near(actual, a @ b.T + bias.double(), dtype, a.abs() @ b.abs().T)


@pytest.mark.parametrize("kind", list(TILES) if INTERPRETED else [KIND])
@pytest.mark.parametrize("rows", [16, 32, 64, 130])
def test_every_tile(rows: int, kind: str) -> None:
    x, by_token = codes_of(rows, 200, FN)
    x_scales = by_token * torch.tensor([[1.0, 7.0]], device=WHERE)
    weight, w_scales = normal(140, 200, seed=1).to(FN), torch.tensor([[0.5, 3.0], [2.0, 0.1]], device=WHERE)
    a, b = x.double() * spread(x_scales, rows, 200), weight.double() * spread(w_scales, 140, 200, height=128)
    actual = fp8_linear(x, x_scales, weight, w_scales, None, torch.float16, kind, native=NATIVE[0])
    near(actual, a @ b.T, torch.float16, a.abs() @ b.abs().T)


@pytest.mark.parametrize(
    ("native", "source"),
    [(native, source) for native in NATIVE for source in (*PLACE, FN) if (native, source) != (FNUZ, FN)],
    ids=str,
)
def test_every_float8_is_converted_exactly(native: torch.dtype | None, source: torch.dtype) -> None:
    """Subnormals among them; one column is 1, so that the product is the weight."""
    codes = torch.tensor([code for code in range(256) if code & 0x7F != 0x7F], dtype=torch.uint8, device=DEVICE)
    weight, one = codes.view(FN)[:, None].repeat(1, 3), torch.ones(1, device=DEVICE)
    x = torch.tensor([[0.0, 1.0, 0.0]], device=DEVICE).to(source)
    x_scales = one if source == FN else None
    actual = fp8_linear(x, x_scales, weight, one, None, torch.float32, KIND, native=native)
    assert actual[0].equal(codes.view(FN).float())


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("native", NATIVE, ids=str)
def test_nan_of_x_is_seen(native: torch.dtype | None) -> None:
    stored = native or FN
    x = torch.ones(2, 70, device=DEVICE)
    x[1, 69] = torch.nan
    ones = torch.ones(1, device=DEVICE)
    weight = torch.ones(3, 70, device=DEVICE).to(stored)
    actual = fp8_linear(x.to(stored), ones, weight, ones, None, torch.float32, KIND, native=native)
    assert actual[0].equal(torch.full((3,), 70.0, device=DEVICE))
    assert actual[1].isnan().all()


def test_rows_of_zeros_give_the_bias() -> None:
    zeros, bias = torch.zeros(2, 40, device=DEVICE), normal(5, seed=1)
    one = torch.ones(1, device=DEVICE)
    x, x_scales = quantize_rows(zeros, torch.int8)
    weight = torch.ones(5, 40, device=DEVICE)
    assert int8_linear(x, x_scales, weight.to(torch.int8), one, bias, torch.float32, KIND).equal(bias.repeat(2, 1))
    for native in NATIVE:
        x, x_scales = quantize_rows(zeros, native or FN)
        stored = weight.to(native or FN)
        actual = fp8_linear(x, x_scales, stored, one, bias, torch.float32, KIND, native=native)
        assert actual.equal(bias.repeat(2, 1))


def test_as_fnuz() -> None:
    codes = torch.arange(256).to(torch.uint8)
    weight, scales = as_fnuz(codes.view(FN), torch.ones(1))
    assert weight.dtype == FNUZ
    torch.testing.assert_close(weight.float() * scales, codes.view(FN).float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("grouped", [False, True])
def test_a_row_has_the_same_bits_among_any_others(grouped: bool) -> None:
    x, x_scales = codes_of(70, 300, FN)
    weight, w_scales = codes_of(9, 300, FN)
    if grouped:
        x_scales = x_scales * torch.tensor([[1.0, 0.3, 5.0]], device=WHERE)

    def product(some: slice) -> Tensor:
        return fp8_linear(
            x[some], x_scales[some], weight, w_scales, None, torch.float32, KIND, native=NATIVE[0], batch_invariant=True
        )

    whole = product(slice(None))
    for some in (slice(1), slice(5, 25), slice(63, 65), slice(69, 70)):
        assert product(some).equal(whole[some])


def test_which_float8_a_device_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(hip: str | None, **properties: object) -> torch.dtype | None:
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(**properties))
        return native_float8(torch.device("cuda"))

    assert [said(None, major=a, minor=b) for a, b in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0))] == [
        None,
        None,
        FN,
        FN,
        FN,
    ]
    named = [said("7.0", gcnArchName=name) for name in ("gfx90a:sramecc+", "gfx942:sramecc+:xnack-", "gfx950")]
    assert named == [None, FNUZ, FN]


def test_refusals() -> None:
    one, x = torch.ones(1), torch.zeros(2, 300)
    weight = torch.zeros(4, 300).to(FN)
    with pytest.raises(ValueError, match=r"x is torch.float32, not torch.float8_e4m3fn"):
        fp8_linear(x, one, weight, one, None, torch.float32, KIND, native=FN)
    with pytest.raises(ValueError, match=r"weight is torch.float8_e4m3fnuz, which is converted by no kernel of ours"):
        fp8_linear(x, None, x.to(FNUZ), one, None, torch.float32, KIND, native=FNUZ)
    with pytest.raises(ValueError, match=r"w_scales has shape \[4, 2\], not \[4, 3\]"):
        fp8_linear(x, None, weight, torch.ones(4, 2), None, torch.float32, KIND, native=FN)
    with pytest.raises(ValueError, match=r"x_scales has shape \[3, 1\], not \[2, 1\]"):
        fp8_linear(x.to(FN), torch.ones(3, 1), weight, one, None, torch.float32, KIND, native=FN)
    with pytest.raises(ValueError, match=r"w_scales has shape \[4, 3\], not \[4, 1\]"):
        int8_linear(x.to(torch.int8), one, x.repeat(2, 1).to(torch.int8), torch.ones(4, 3), None, torch.float32, KIND)
    with pytest.raises(ValueError, match=r"dtype is torch.float64"):
        fp8_linear(x, None, weight, one, None, torch.float64, KIND, native=FN)

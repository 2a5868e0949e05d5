"""RMS norm, alone and after the addition to the residual stream."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu.norm import add_rms_norm, rms_norm
from tests.kernels_triton.compare import DEVICE, PLACE, beside, near, normal, padded

DTYPES = list(PLACE)
EPS = 1e-5


@pytest.mark.parametrize("hidden", [1, 3, 64, 576, 1000, 4096])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm(hidden: int, dtype: torch.dtype) -> None:
    x, weight = normal(5, hidden, dtype=dtype) * 30, normal(hidden, dtype=dtype, seed=1)
    out = padded(5, hidden, 8, dtype)
    rms_norm(x, weight, EPS, out)
    near(out, reference.rms_norm(x.double(), weight.double(), EPS))
    assert (beside(out) == 7).all()


@settings(max_examples=30)
@given(
    rows=st.integers(1, 4),
    hidden=st.integers(1, 700),
    x_dtype=st.sampled_from(DTYPES),
    stream=st.sampled_from(DTYPES),
    out_dtype=st.sampled_from(DTYPES),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_add_and_norm(
    rows: int, hidden: int, x_dtype: torch.dtype, stream: torch.dtype, out_dtype: torch.dtype, offset: float, seed: int
) -> None:
    x, before = normal(rows, hidden, dtype=x_dtype, seed=seed), normal(rows, hidden, seed=seed + 1)
    weight = normal(hidden, dtype=out_dtype, seed=seed + 2) / 8
    residual, out = padded(rows, hidden, 5, stream), padded(rows, hidden, 3, out_dtype)
    residual.copy_(before)
    expected = residual.clone()
    add_rms_norm(x, residual, weight, EPS, out, weight_offset=offset)
    reference.add_rms_norm(x, expected, weight, EPS, offset)
    near(residual, expected)
    # Of what the stream now holds, not of the sum before it was rounded.
    near(out, reference.rms_norm(residual.float(), weight.float() + offset, EPS))
    assert (beside(residual) == 7).all()
    assert (beside(out) == 7).all()


def test_the_norm_is_of_the_rounded_stream() -> None:
    """2048 + 1 has no float16: what is lost must not be in the norm either."""
    residual = torch.full((1, 2), 2048.0, dtype=torch.float16, device=DEVICE)
    x = torch.tensor([[1.0, 0.0]], dtype=torch.float16, device=DEVICE)
    out = torch.empty(1, 2, device=DEVICE)
    add_rms_norm(x, residual, torch.ones(2, device=DEVICE), 0.0, out)
    assert residual.tolist() == [[2048.0, 2048.0]]
    assert out[0, 0] == out[0, 1]


def test_no_rows() -> None:
    empty = torch.empty(0, 64, device=DEVICE)
    rms_norm(empty, normal(64), EPS, torch.empty(0, 64, device=DEVICE))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"x": normal(3, 64).long()}, r"x is torch\.int64, not torch\.bfloat16 or torch\.float16 or torch\.float32"),
        ({"x": normal(64)}, r"x has shape \[64\], not \[any, any\]"),
        ({"x": normal(64, 3).T}, "x has stride 3 in its last dimension, not 1"),
        ({"weight": normal(63)}, r"weight has shape \[63\], not \[64\]"),
        ({"out": normal(3, 63)}, r"out has shape \[3, 63\], not \[3, 64\]"),
        ({"residual": normal(2, 64)}, r"residual has shape \[2, 64\], not \[3, 64\]"),
        ({"residual": normal(3, 64).double()}, "residual is torch.float64"),
        ({"weight": torch.empty(64, device="meta")}, "weight is on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(changed: dict[str, torch.Tensor], message: str) -> None:
    fine = {"x": normal(3, 64), "residual": normal(3, 64), "weight": normal(64), "out": normal(3, 64)}
    with pytest.raises(ValueError, match=message):
        add_rms_norm(**{**fine, **changed}, eps=EPS)  # type: ignore[arg-type]


def test_rows_that_no_block_holds() -> None:
    wide = torch.empty(1, 40_000, device=DEVICE)
    with pytest.raises(ValueError, match="x has rows of 40000 elements, not 1 to 32768"):
        rms_norm(wide, wide[0], EPS, wide)

"""The product whose rows do not feel each other: against torch, and the same bits among any rows."""

from __future__ import annotations

import pytest
import torch

from kernels.gpu.linear import linear
from tests.kernels_triton.compare import INTERPRETED, PLACE, normal
from tests.kernels_triton.paged import SM90, this_device

KIND = "sm_90" if INTERPRETED else this_device(SM90).kind


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", list(PLACE), ids=str)
@pytest.mark.parametrize(("rows", "n", "k"), [(1, 1, 1), (3, 65, 129), (70, 40, 300)])
def test_products(rows: int, n: int, k: int, dtype: torch.dtype, biased: bool) -> None:
    x = normal(rows, k + 3, dtype=dtype)[:, :k]
    weight, bias = normal(n, k + 5, dtype=dtype, seed=1)[:, :k], normal(n, dtype=dtype, seed=2) if biased else None
    expected = x.double() @ weight.double().T + (bias.double() if bias is not None else 0.0)
    place = PLACE[dtype]
    torch.testing.assert_close(linear(x, weight, bias, KIND).double(), expected, rtol=place, atol=place * k**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_a_row_has_the_same_bits_among_any_others(dtype: torch.dtype) -> None:
    x, weight = normal(140, 300, dtype=dtype), normal(70, 300, dtype=dtype, seed=1)
    whole = linear(x, weight, None, KIND)
    for first, count in ((0, 1), (5, 1), (63, 2), (64, 64), (100, 40), (139, 1)):
        assert torch.equal(linear(x[first : first + count], weight, None, KIND), whole[first : first + count])


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"weight has shape \[4, 7\], not \[any, 8\]"):
        linear(normal(2, 8), normal(4, 7), None, KIND)
    with pytest.raises(ValueError, match=r"weight is torch.float16, not torch.float32"):
        linear(normal(2, 8), normal(4, 8, dtype=torch.float16), None, KIND)

"""Additions of adapters: against the oracle, the same bits among any rows, and nothing to rows without one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.gpu.lora import lora
from tests.kernels_triton.compare import DEVICE, PLACE, beside, near, normal, padded

INDEX = [2, 0, 1, 3, 3, 0, 2]


def made(k: int, n: int, rank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    x = normal(len(INDEX), k + 3, dtype=dtype)[:, :k]
    a, b = normal(4, rank, k, dtype=dtype, seed=1) * k**-0.5, normal(4, n, rank, dtype=dtype, seed=2) * rank**-0.5
    scales = torch.tensor([9.0, 2.0, 0.5, 1.0], device=DEVICE)
    return x, a, b, scales, torch.tensor(INDEX, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", list(PLACE), ids=str)
@pytest.mark.parametrize(("k", "n", "rank", "first"), [(64, 48, 16, 0), (300, 129, 16, 7), (129, 200, 32, 40)])
def test_it_is_the_oracle(k: int, n: int, rank: int, first: int, dtype: torch.dtype) -> None:
    x, a, b, scales, index = made(k, n, rank, dtype)
    y = padded(len(INDEX), first + n + 5, 3, dtype)
    expected = y.clone().cpu()
    lora(x, a, b, scales, index, y, first)
    reference.lora(x.cpu(), a.cpu(), b.cpu(), scales.cpu(), index.cpu(), expected, first)
    near(y, expected, atol=1e-5 if dtype == torch.float32 else PLACE[dtype] * 8)
    assert (beside(y) == 7).all()
    outside = torch.cat([y[:, :first], y[:, first + n :]], 1)
    assert (outside == 7).all()
    assert (y[[1, 5]] == 7).all()


def test_a_row_has_the_same_bits_among_any_others() -> None:
    x, a, b, scales, index = made(300, 129, 16, torch.float32)
    whole = normal(len(INDEX), 129, seed=3)
    parts = whole.clone()
    lora(x, a, b, scales, index, whole)
    for rows in (slice(0, 1), slice(1, 4), slice(4, 7)):
        lora(x[rows], a, b, scales, index[rows], parts[rows])
    assert torch.equal(whole, parts)


def test_refusals() -> None:
    x, a, b, scales, index = made(64, 48, 16, torch.float32)
    y = normal(len(INDEX), 50)
    with pytest.raises(ValueError, match="first is 3: y has 50 columns, and b adds to 48"):
        lora(x, a, b, scales, index, y, 3)
    with pytest.raises(ValueError, match="a has rank 8, not one of 16, 32"):
        lora(x, a[:, :8].contiguous(), b, scales, index, y)
    with pytest.raises(ValueError, match=r"b has shape \[4, 48, 8\], not \[4, any, 16\]"):
        lora(x, a, b[..., :8].contiguous(), scales, index, y)
    with pytest.raises(ValueError, match=r"index is torch.int64, not torch.int32"):
        lora(x, a, b, scales, index.long(), y)


def test_what_an_adapter_does_not_have_is_not_read() -> None:
    x, a, b, scales, index = made(64, 48, 16, torch.float32)
    scales[2], a[2], b[2] = 0.0, torch.nan, torch.nan
    y = normal(len(INDEX), 48, seed=3)
    before = y.clone()
    lora(x, a, b, scales, index, y)
    assert torch.equal((y != before).any(1).cpu(), torch.tensor([i in (1, 3) for i in INDEX]))

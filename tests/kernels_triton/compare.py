"""What the tests of kernels share: where they run, and how near is near enough."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

INTERPRETED = bool(triton.knobs.runtime.interpret)
DEVICE = "cpu" if INTERPRETED else "cuda"
# One place of the result's dtype: a GPU rounds bfloat16 to nearest, the interpreter cuts it off.
PLACE = {torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10, torch.float32: 3e-6}


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)


def padded(rows: int, width: int, more: int, dtype: torch.dtype) -> Tensor:
    """[rows, width] of rows that lie `more` elements further apart, all 7: what is beside must stay so."""
    return torch.full((rows, width + more), 7.0, dtype=dtype, device=DEVICE)[:, :width]


def beside(view: Tensor) -> Tensor:
    """What lies between the rows of `padded`."""
    whole = view._base
    assert whole is not None
    return whole[:, view.shape[1] :]


def near(actual: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    torch.testing.assert_close(
        actual.float().cpu(), expected.float().cpu(), rtol=PLACE[actual.dtype], atol=atol, equal_nan=True
    )

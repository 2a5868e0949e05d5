"""Sums of states by slot: the bits of the oracle, whatever part of them is there."""

from __future__ import annotations

import pytest
import torch

from kernels import reference
from kernels.gpu.pooling import add_states
from tests.kernels_triton.compare import DEVICE, normal


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "count"), [(0, 9), (0, 3), (3, 4), (7, 2)])
def test_it_is_the_oracle(first: int, count: int, dtype: torch.dtype) -> None:
    states = normal(count, 150, dtype=dtype)[:, :130]
    totals = torch.full((5, 130), 0.1, dtype=torch.float64, device=DEVICE)
    expected = totals.clone().cpu()
    slots, borders = ints(4, 1, 2), ints(0, 5, 6, 9)
    add_states(states, slots, borders, first, totals)
    reference.add_states(states.cpu(), slots.cpu(), borders.cpu(), first, expected)
    assert torch.equal(totals.cpu(), expected)


def test_refusals() -> None:
    states, totals = normal(3, 8), torch.zeros(2, 8, device=DEVICE)
    with pytest.raises(ValueError, match=r"totals is torch.float32, not torch.float64"):
        add_states(states, ints(1), ints(0, 3), 0, totals)
    with pytest.raises(ValueError, match=r"borders has shape \[1\], not \[2\]"):
        add_states(states, ints(1), ints(0), 0, totals.double())

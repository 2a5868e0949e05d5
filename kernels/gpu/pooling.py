"""Sums of hidden states, kept by slot: what the mean of a prompt is made of, however it is cut.

    totals [slots + 1, hidden]    float64, added to one state after the other, in the order of tokens

A sum of many at once has an order of its own; this one has the bits of worker_svc/pooling.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.arguments import FLOATS, expect

COLUMNS: Final = 128  # of a program
INT32: Final = (torch.int32,)


@triton.jit(do_not_specialize=["first", "count"])
def add_states_kernel(
    states, slots, borders, totals, states_stride, first, count, HIDDEN: tl.constexpr, COLUMNS: tl.constexpr
):
    """Grid (groups, ⌈hidden / COLUMNS⌉)."""
    group = tl.program_id(0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < HIDDEN
    begin = tl.maximum(tl.load(borders + group) - first, 0)
    end = tl.minimum(tl.load(borders + group + 1) - first, count)
    to = totals + tl.load(slots + group).to(tl.int64) * HIDDEN + column
    total = tl.load(to, mask=inside, other=0.0)
    state = states + begin.to(tl.int64) * states_stride + column
    for _ in range(begin, end):
        total += tl.load(state, mask=inside, other=0.0).to(tl.float64)
        state += states_stride
    tl.store(to, total, mask=inside)


def add_states(states: Tensor, slots: Tensor, borders: Tensor, first: int, totals: Tensor) -> None:
    """In place: totals[slots[g]] += states[t − first] for each t of borders[g] : borders[g + 1], one after the other.

    states [P, hidden] bfloat16, float16 or float32 are those of tokens first … first + P − 1, others are left out;
    slots [G] int32, none twice; borders [G + 1] int32; totals [any, hidden] float64. Raises ValueError naming the
    argument.
    """
    expect("states", states, (None, None), FLOATS, states)
    count, hidden = states.shape
    expect("slots", slots, (None,), INT32, states)
    groups = slots.shape[0]
    expect("borders", borders, (groups + 1,), INT32, states)
    expect("totals", totals, (None, hidden), (torch.float64,), states, contiguous=True)
    if groups and count:
        add_states_kernel[(groups, triton.cdiv(hidden, COLUMNS))](
            states, slots, borders, totals, states.stride(0), first, count, HIDDEN=hidden, COLUMNS=COLUMNS
        )


def ahead() -> Iterator[Ahead]:
    for model in MODELS:
        yield Ahead(
            add_states_kernel,
            model.name,
            {
                **dict.fromkeys(("slots", "borders"), "*i32"),
                "states": "*fp32",
                "totals": "*fp64",
                **dict.fromkeys(("states_stride", "first", "count"), "i32"),
            },
            {"HIDDEN": model.hidden, "COLUMNS": COLUMNS},
            multiples_of_16=("states_stride",),
        )

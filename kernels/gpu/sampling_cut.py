"""Where top_k and top_p end a row, without a sort: all tokens from one rank key on are left.

    bound     [rows]          what min_p leaves, and at most a few more than top_k
    weigh     [rows, parts]   for top_p alone: what that weighs
    collect   [rows, parts]   a list of the tokens that may be left: mostly few
    cut       [rows]          narrows a range of keys: each pass counts, or weighs, what of the list is above eight keys
                              in it (compare FlashInfer's "Sorting-free GPU kernels for LLM sampling", 2025)

As in the C++ step, only few tokens are looked at again. A list is in any order, since it is only counted and weighed,
in integers. Rows that are not cut take part in nothing but the bound.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import MODELS, Ahead
from kernels.gpu.sampling_values import (
    GREEDY_BELOW,
    LAST_ID,
    LOWEST,
    ascending,
    load_float,
    load_param,
    load_wide,
    rank_key,
    weight,
)
from kernels.gpu.slot_state import SlotState

BLOCK: Final = 1024
PART: Final = 8192  # tokens of a program of `weigh` and `collect`
RUN: Final = 64  # tokens of which the greatest logit is known
PIVOTS: Final = 8
WARPS: Final = 8


def runs_of(vocab: int) -> int:
    """Of a row: those of its blocks, the last one's as well."""
    return int(triton.cdiv(vocab, BLOCK)) * (BLOCK // RUN)


@triton.jit
def load_cuts(sampling, slot, VOCAB: tl.constexpr):
    """Temperature, top_k or 0, top_p; both off in a greedy row."""
    temperature = load_float(sampling, slot, 2)
    top_k = load_param(sampling, slot, 4)
    share = load_wide(sampling, slot, 5).to(tl.float64, bitcast=True)
    drawn = temperature >= GREEDY_BELOW
    return temperature, tl.where(drawn & (top_k > 0) & (top_k < VOCAB), top_k, 0), tl.where(drawn, share, 1.0)


@triton.jit
def load_scaled(logits, row, stride, at, mask, temperature):
    """Adding 0 turns −0 into +0."""
    return tl.div_rn(tl.load(logits + row * stride + at, mask=mask, other=float("-inf")), temperature) + 0.0


@triton.jit
def bound_kernel(
    slots, sampling, maxima, tops, lows, found,
    VOCAB: tl.constexpr, RUNS: tl.constexpr, RUNS_BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    run = tl.arange(0, RUNS_BLOCK)
    greatest = tl.load(maxima + row * RUNS + run, mask=run < RUNS, other=float("-inf"))
    raw_top = tl.max(greatest, 0)
    tl.store(tops + row, raw_top)
    tl.store(found + row, 0)
    temperature, top_k, _ = load_cuts(sampling, slot, VOCAB)
    low = tl.full((), -(1 << 40), tl.int64)
    if temperature >= GREEDY_BELOW:
        top = tl.div_rn(raw_top, temperature) + 0.0
        floor = tl.maximum(top + load_float(sampling, slot, 3), LOWEST)  # never −inf, which is banned
        low = ascending(floor + 0.0).to(tl.int64)
        if top_k > 0:
            # As many runs as that reach the k-th greatest of their maxima, so as many tokens do, and few more.
            keys = ascending(tl.div_rn(greatest, temperature) + 0.0)
            high = ascending(top).to(tl.int64) + 1
            while low + 1 < high:
                middle = low + (high - low) // 2
                enough = tl.sum((keys >= middle).to(tl.int32), 0) >= top_k
                low = tl.where(enough, middle, low)
                high = tl.where(enough, high, middle)
    tl.store(lows + row, low * (LAST_ID + 1))


@triton.jit
def weigh_kernel(
    logits, slots, sampling, tops, lows, totals, stride,
    VOCAB: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part, parts = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    temperature, top_k, share = load_cuts(sampling, tl.load(slots + row).to(tl.int64), VOCAB)
    if (top_k == 0) & (share < 1.0):
        low, top = tl.load(lows + row), tl.div_rn(tl.load(tops + row), temperature) + 0.0
        total = tl.zeros([BLOCK], tl.int64)
        for begin in range(part * PART, min(part * PART + PART, VOCAB), BLOCK):
            at = begin + tl.arange(0, BLOCK)
            value = load_scaled(logits, row, stride, at, at < VOCAB, temperature)
            total += tl.where((rank_key(value, at) >= low) & (at < VOCAB), weight(value - top), 0)
        tl.store(totals + row * parts + part, tl.sum(total, 0))


@triton.jit
def collect_kernel(
    logits, slots, sampling, tops, lows, totals, found, listed, stride,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PART: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature, top_k, share = load_cuts(sampling, tl.load(slots + row).to(tl.int64), VOCAB)
    if (top_k > 0) | (share < 1.0):
        low, top = tl.load(lows + row), tl.div_rn(tl.load(tops + row), temperature) + 0.0
        least = tl.full((), 0, tl.int64)
        if top_k == 0:
            # All tokens of a weight below (1 − p) · total / V together weigh less than (1 − p) · total: top_p drops
            # them. 1/8 less is far more than what rounds here.
            of_part = tl.arange(0, PARTS_BLOCK)
            total = tl.sum(tl.load(totals + row * PARTS + of_part, mask=of_part < PARTS, other=0), 0)
            least = (0.875 * (1.0 - share) * total.to(tl.float64) / VOCAB).to(tl.int64)
        for begin in range(part * PART, min(part * PART + PART, VOCAB), BLOCK):
            at = begin + tl.arange(0, BLOCK)
            value = load_scaled(logits, row, stride, at, at < VOCAB, temperature)
            keep = (rank_key(value, at) >= low) & (weight(value - top) >= least) & (at < VOCAB)
            count = tl.sum(keep.to(tl.int32), 0)
            if count > 0:
                place = tl.atomic_add(found + row, count) + tl.cumsum(keep.to(tl.int32), 0) - 1
                tl.store(listed + row * VOCAB + place, at, mask=keep)


@triton.jit
def _above(
    logits, row, stride, temperature, top, ids, count, pivots, WEIGH: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """How many of the `count` tokens `ids`, or how much weight, each of the keys `pivots` [P] has from it on: int64."""
    total = pivots * 0
    for begin in range(0, count, BLOCK):
        i = begin + tl.arange(0, BLOCK)
        at = tl.load(ids + i, mask=i < count, other=0)
        value = load_scaled(logits, row, stride, at, i < count, temperature)
        inside = (rank_key(value, at)[None, :] >= pivots[:, None]) & (i < count)[None, :]
        amount = weight(value - top) if WEIGH else tl.full([BLOCK], 1, tl.int64)
        total += tl.sum(tl.where(inside, amount[None, :], 0), 1)
    return total


@triton.jit
def _narrow(
    logits, row, stride, temperature, top, ids, count, low, high, needed,
    WEIGH: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The greatest key in [low, high) from which on there is as much as `needed`; there is from `low` on."""
    while low + 1 < high:
        pivots = low + (high - low) * (tl.arange(0, PIVOTS).to(tl.int64) + 1) // (PIVOTS + 1)
        if high - low <= PIVOTS:
            pivots = tl.minimum(low + tl.arange(0, PIVOTS).to(tl.int64) + 1, high - 1)
        amount = _above(logits, row, stride, temperature, top, ids, count, pivots, WEIGH, BLOCK)
        enough = amount >= needed
        low = tl.maximum(low, tl.max(tl.where(enough, pivots, low), 0))
        high = tl.minimum(high, tl.min(tl.where(enough, high, pivots), 0))
        # Where no more tokens than were asked for are above a key, any key down to it means the same tokens.
        if (not WEIGH) & (tl.max((amount == needed).to(tl.int32), 0) == 1):
            high = low + 1
    return low


@triton.jit
def cut_kernel(
    logits, slots, sampling, tops, lows, totals, found, listed, cuts, stride,
    VOCAB: tl.constexpr, PARTS: tl.constexpr, PARTS_BLOCK: tl.constexpr, PIVOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    temperature, top_k, share = load_cuts(sampling, tl.load(slots + row).to(tl.int64), VOCAB)
    low = tl.load(lows + row)
    if (top_k > 0) | (share < 1.0):
        ids, count = listed + row * VOCAB, tl.load(found + row)
        top = tl.div_rn(tl.load(tops + row), temperature) + 0.0
        high = rank_key(top, tl.zeros((), tl.int64)) + 1
        if (top_k > 0) & (count > top_k):
            low = _narrow(
                logits, row, stride, temperature, top, ids, count, low, high, top_k.to(tl.int64), False, PIVOTS, BLOCK
            )
        if share < 1.0:
            of_part = tl.arange(0, PARTS_BLOCK)
            inside = (of_part < PARTS) & (top_k == 0)
            total = tl.sum(tl.load(totals + row * PARTS + of_part, mask=inside, other=0), 0)
            if top_k > 0:
                alone = low + tl.zeros([PIVOTS], tl.int64)
                total = tl.max(_above(logits, row, stride, temperature, top, ids, count, alone, True, BLOCK), 0)
            needed = tl.maximum(tl.ceil(share * total.to(tl.float64)).to(tl.int64), 1)
            low = _narrow(logits, row, stride, temperature, top, ids, count, low, high, needed, True, PIVOTS, BLOCK)
    tl.store(cuts + row, low)


def cut_rows(logits: Tensor, slots: Tensor, state: SlotState, maxima: Tensor, tops: Tensor) -> Tensor:
    """The rank key [S] int64 from which on the tokens of each row are left by min_p, top_k and top_p.

    logits [S, V] float32, maxima [S, runs_of(V)] the greatest logit of each run; writes tops [S], those of the rows.
    """
    rows, vocab = logits.shape
    parts, runs, sampling = triton.cdiv(vocab, PART), runs_of(vocab), state.sampling
    lows = torch.empty(rows, dtype=torch.int64, device=logits.device)
    cuts = torch.empty_like(lows)
    totals = torch.empty(rows, parts, dtype=torch.int64, device=logits.device)
    found = torch.empty(rows, dtype=torch.int32, device=logits.device)
    listed = torch.empty(rows, vocab, dtype=torch.int32, device=logits.device)
    of_parts = {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}
    stride, exactly = logits.stride(0), {"enable_fp_fusion": False}
    bound_kernel[(rows,)](
        slots, sampling, maxima, tops, lows, found,
        VOCAB=vocab, RUNS=runs, RUNS_BLOCK=triton.next_power_of_2(runs), num_warps=WARPS,
    )  # fmt: skip
    weigh_kernel[(rows, parts)](
        logits, slots, sampling, tops, lows, totals, stride, VOCAB=vocab, PART=PART, BLOCK=BLOCK, **exactly
    )
    collect_kernel[(rows, parts)](
        logits, slots, sampling, tops, lows, totals, found, listed, stride,
        VOCAB=vocab, **of_parts, PART=PART, BLOCK=BLOCK, **exactly,
    )  # fmt: skip
    cut_kernel[(rows,)](
        logits, slots, sampling, tops, lows, totals, found, listed, cuts, stride,
        VOCAB=vocab, **of_parts, PIVOTS=PIVOTS, BLOCK=BLOCK, num_warps=WARPS, **exactly,
    )  # fmt: skip
    return cuts


def ahead() -> Iterator[Ahead]:
    parameters = {"slots": "*i32", "sampling": "*i32"}
    row = {"logits": "*fp32", **parameters, "tops": "*fp32", "lows": "*i64", "totals": "*i64", "stride": "i32"}
    lists = {"found": "*i32", "listed": "*i32"}
    for model in MODELS:
        vocab, parts, runs = model.vocab, triton.cdiv(model.vocab, PART), runs_of(model.vocab)
        of_parts = {"PARTS": parts, "PARTS_BLOCK": triton.next_power_of_2(parts)}
        bounds = {"maxima": "*fp32", "tops": "*fp32", "lows": "*i64", "found": "*i32"}
        constants = {"VOCAB": vocab, "RUNS": runs, "RUNS_BLOCK": triton.next_power_of_2(runs)}
        yield Ahead(bound_kernel, model.name, {**parameters, **bounds}, constants, num_warps=WARPS)
        each = {"VOCAB": vocab, "BLOCK": BLOCK}
        for kernel, signature, constants, warps in (
            (weigh_kernel, row, {**each, "PART": PART}, 4),
            (collect_kernel, {**row, **lists}, {**each, **of_parts, "PART": PART}, 4),
            (cut_kernel, {**row, **lists, "cuts": "*i64"}, {**each, **of_parts, "PIVOTS": PIVOTS}, WARPS),
        ):
            yield Ahead(
                kernel, model.name, signature, constants, num_warps=warps, multiples_of_16=("stride",), fp_fusion=False
            )

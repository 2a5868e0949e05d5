"""Drafts on the device: which of them stand behind a step's samples, and which are proposed for the next step.

A slot's drafts lie behind its known tokens, as worker_svc/slots.py has them, and `SlotState.drafts` says how many. Both
kernels have one program for each row that samples, and the host waits for neither (R1): it learns what became of the
drafts with the step's results.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.ahead import Ahead
from kernels.gpu.arguments import expect
from kernels.gpu.slot_state import SlotState

LEAST, LONGEST, LATEST = 2, 8, 4096  # tokens: as worker_svc/speculation/ngram.py has them
BLOCK: Final = 1024
VERIFY_WARPS: Final = 1  # more would read drafts and lengths that the first has overwritten
LENGTHS, COUNTS, DRAFTED = range(3)  # rows of `outcome`
INT32 = (torch.int32,)


@triton.jit
def verify_kernel(
    rows, ends, slots, asked, tokens, all_token_ids, lengths, computed, drafts, outcome, outcome_stride, tokens_stride,
    MOST: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    row = tl.load(rows + i)
    slot = tl.load(slots + row).to(tl.int64)
    length, count, held = slot.to(tl.int32) * 0, slot.to(tl.int32) * 0, slot.to(tl.int32) * 0
    if slot > 0:
        most = tl.load(asked + row)
        length = tl.load(lengths + slot)
        held = tl.minimum(most, tl.load(drafts + slot))
        at = tl.arange(0, MOST)
        ahead = all_token_ids + slot * tokens_stride + length + at
        draft = tl.load(ahead, mask=at < held, other=-1)
        token = tl.load(tokens + tl.load(ends + i) - 1 - most + at, mask=at <= held, other=0)
        last = tl.min(tl.where((at < held) & (draft == token), MOST, at), 0)  # behind the last draft that stands
        tl.store(ahead, token, mask=at <= last)
        count = last + 1
        tl.store(lengths + slot, length + count)
        tl.store(computed + slot, length + last)
        tl.store(drafts + slot, 0)
    tl.store(outcome + i, length)
    tl.store(outcome + outcome_stride + i, count)
    tl.store(outcome + 2 * outcome_stride + i, held)


@triton.jit
def propose_kernel(
    rows, wanted, slots, all_token_ids, lengths, limits, drafts, tokens_stride,
    LEAST: tl.constexpr, LONGEST: tl.constexpr, LATEST: tl.constexpr, MOST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0)
    slot = tl.load(slots + tl.load(rows + i)).to(tl.int64)
    length = tl.load(lengths + slot)
    most = tl.minimum(tl.load(wanted + i), tl.load(limits + slot) - length - 1)
    if (slot > 0) & (most > 0):
        known, first = all_token_ids + slot * tokens_stride, tl.maximum(length - LATEST, 0)
        best = tl.zeros([BLOCK], tl.int32)  # how long a match is, then where it ends: the latest of the longest
        for begin in range(first, length - 1, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            same, size = at < length - 1, tl.zeros([BLOCK], tl.int32)
            for back in tl.static_range(LONGEST):
                said = tl.load(known + length - 1 - back, mask=length - 1 - back >= first, other=-1)
                token = tl.load(known + at - back, mask=same & (at - back >= first), other=-2)
                same = same & (token == said)
                size += same.to(tl.int32)
            best = tl.maximum(best, size * (2 * LATEST) + at - first)
        found = tl.max(best, 0)
        if found >= LEAST * 2 * LATEST:
            behind = first + found % (2 * LATEST) + 1
            at = tl.arange(0, MOST)
            # Where the continuation ends with what is known, it begins anew: so it was since `behind`.
            token = tl.load(known + behind + at % (length - behind), mask=at < most)
            tl.store(known + length + at, token, mask=at < most)
            tl.store(drafts + slot, most)


def verify(
    state: SlotState,
    slots: Tensor,
    asked: Tensor,
    rows: Tensor,
    ends: Tensor,
    tokens: Tensor,
    outcome: Tensor,
    most: int,
) -> None:
    """Appends what was sampled to the slots: up to the first token of a row that is not the draft behind it.

    slots and asked [R] are those of the step's rows, asked[i] how many drafts a row was laid out with, at most `most`;
    rows [Q] are those that sample, and ends [Q] where their outputs end in `tokens` [S], the last 1 + asked of them
    being the row's own. Drafts that a slot does not hold count as wrong. Writes outcome [3, Q]: each slot's length
    before, how many tokens it was given, and how many drafts it held; zeros for null rows. All int32. Slots must have
    the room: nobody looks. Raises ValueError naming the argument.
    """
    expect("rows", rows, (None,), INT32, state.words)
    count = len(rows)
    expect("ends", ends, (count,), INT32, state.words)
    expect("asked", asked, slots.shape, INT32, state.words)
    expect("outcome", outcome, (3, count), INT32, state.words)
    if count:
        verify_kernel[(count,)](
            rows, ends, slots, asked, tokens, state.token_ids, state.lengths, state.computed, state.drafts, outcome,
            outcome.stride(0), state.token_ids.stride(0), MOST=triton.next_power_of_2(1 + most),
            num_warps=VERIFY_WARPS,
        )  # fmt: skip


def propose(state: SlotState, slots: Tensor, rows: Tensor, wanted: Tensor, most: int) -> None:
    """Prompt lookup (Saxena 2023): what followed the latest of the longest earlier occurrences of a slot's last tokens.

    `slots` [R] of the step's rows; rows [Q] are those that sample, and wanted [Q] how many drafts each may have, at
    most `most`. They are put behind the slot's tokens, and go no further than its last token but one. All int32. Raises
    ValueError naming the argument.
    """
    expect("rows", rows, (None,), INT32, state.words)
    expect("wanted", wanted, rows.shape, INT32, state.words)
    if len(rows):
        propose_kernel[(len(rows),)](
            rows, wanted, slots, state.token_ids, state.lengths, state.limits, state.drafts, state.token_ids.stride(0),
            LEAST=LEAST, LONGEST=LONGEST, LATEST=LATEST, MOST=triton.next_power_of_2(most), BLOCK=BLOCK,
        )  # fmt: skip


def ahead() -> Iterator[Ahead]:
    verified = ("rows", "ends", "slots", "asked", "tokens", "all_token_ids", "lengths", "computed", "drafts", "outcome")
    proposed = ("rows", "wanted", "slots", "all_token_ids", "lengths", "limits", "drafts")
    sizes = {"LEAST": LEAST, "LONGEST": LONGEST, "LATEST": LATEST, "BLOCK": BLOCK}
    for most in (1, 8):
        signature = {**dict.fromkeys(verified, "*i32"), "outcome_stride": "i32", "tokens_stride": "i32"}
        yield Ahead(verify_kernel, f"{most} a row", signature, {"MOST": most}, num_warps=VERIFY_WARPS)
        signature = {**dict.fromkeys(proposed, "*i32"), "tokens_stride": "i32"}
        yield Ahead(propose_kernel, f"{most} a row", signature, {**sizes, "MOST": most})

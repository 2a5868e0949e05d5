"""A step as flat arrays: what a plan and the slots say, in the form that a forward pass reads. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from protos.wire import Row, StepPlan
from worker_svc.slots import SlotError, SlotTable

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepInputs:
    """R rows, T tokens in all, in the plan's row order; a row's tokens are consecutive positions of one slot.

    row i is tokens cu[i]:cu[i+1], at positions context_lens[i] − (cu[i+1] − cu[i]) … context_lens[i] − 1
    """

    slots: Ints  # [R]
    cu: Ints  # [R+1] borders of the rows in the flat token arrays
    context_lens: Ints  # [R] tokens whose KV the row sees, its own included
    token_ids: Ints  # [T]
    positions: Ints  # [T]
    slot_mapping: Ints  # [T] block * block_size + offset: where each token's K and V are written
    block_tables: Ints  # [R, B] padded with the null block; B covers the longest row
    sample_rows: Ints  # [S] rows that sample, in row order
    sample_tokens: Ints  # [S] index into T of the token whose logits they sample from (the row's last)
    prompt_logprob_rows: Ints  # [Q] for each logit wanted for prompt logprobs: its row …
    prompt_logprob_tokens: Ints  # [Q] … and its index into T (the logits there score the next prompt token)


def build_inputs(plan: StepPlan, slots: SlotTable) -> StepInputs:
    """The plan's rows as arrays, after `slots.apply(plan)`; counts their positions as computed.

    Raises SlotError where a row does not go on where its slot stands, or names positions without tokens or blocks.
    """
    rows = plan.rows
    ids = np.array([row.slot for row in rows], np.int64)
    asked = np.array([row.start for row in rows], np.int64)
    most = np.array([row.num_tokens for row in rows], np.int64)
    samples = np.array([row.sample for row in rows], bool)
    starts = np.where(asked < 0, slots.computed[ids], asked)
    # A row at the slot's own length computes what is there: drafts that were rejected leave less than was planned for.
    counts = np.where(asked < 0, np.minimum(most, slots.lengths[ids] - starts), most)
    ends = starts + counts
    _check(rows, slots, starts, ends, samples)
    slots.computed[ids] = ends

    cu = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(counts, out=cu[1:])
    owners = np.repeat(np.arange(len(rows)), counts)  # [T] row of each token
    positions = np.arange(cu[-1]) - cu[owners] + starts[owners]
    blocks = slots.block_tables[ids[owners], positions // slots.block_size].astype(np.int64)
    width = -(-int(ends.max(initial=0)) // slots.block_size)
    scored = _scored(rows, slots, owners, positions)
    return StepInputs(
        slots=ids,
        cu=cu,
        context_lens=ends,
        token_ids=slots.token_ids[ids[owners], positions].astype(np.int64),
        positions=positions,
        slot_mapping=blocks * slots.block_size + positions % slots.block_size,
        block_tables=slots.block_tables[ids, :width].astype(np.int64),
        sample_rows=np.flatnonzero(samples),
        sample_tokens=cu[1:][samples] - 1,
        prompt_logprob_rows=owners[scored],
        prompt_logprob_tokens=np.flatnonzero(scored),
    )


def _scored(rows: list[Row], slots: SlotTable, owners: Ints, positions: Ints) -> NDArray[np.bool_]:
    """[T] tokens whose logits score the next prompt token, where the request asked for that."""
    wanted = np.array([slots.held(row.slot).prompt_logprobs >= 0 for row in rows], bool)
    if not wanted.any():
        return np.zeros(len(owners), bool)
    prompt_lens = slots.prompt_lens[[row.slot for row in rows]]
    return wanted[owners] & (positions + 1 < prompt_lens[owners])


def _check(rows: list[Row], slots: SlotTable, starts: Ints, ends: Ints, samples: NDArray[np.bool_]) -> None:
    """What R1 promises of a row. The arrays first, so that a sound step costs a few comparisons."""
    ids = np.array([row.slot for row in rows], np.int64)
    computed, known = slots.computed[ids], slots.lengths[ids]
    covered = slots.block_counts[ids] * slots.block_size
    fresh = (computed < 0) & (starts >= 0)
    sound = (fresh | ((computed >= 0) & (starts == computed))) & (starts < ends) & (ends <= known) & (ends <= covered)
    sound &= ~samples | (ends == known)
    for i in np.flatnonzero(~sound):
        raise SlotError(
            f"slot {ids[i]} cannot compute positions {starts[i]}..{ends[i] - 1}{' and sample' * bool(samples[i])}: "
            f"it knows {known[i]} tokens, has computed {computed[i]} (−1: none yet) and has blocks for {covered[i]}"
        )

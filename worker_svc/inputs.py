"""A step as flat arrays: what a plan and the slots say, in the form that a forward pass reads. numpy only."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protos.wire import StepPlan
from worker_svc.slots import SlotError, SlotTable

Ints = NDArray[np.int64]
_NONE: Final = np.zeros(0, np.int64)


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
    adapters: NDArray[np.int32] | None = None  # [R] index of each row's, 0 for none; None: no row has one


def build_inputs(plan: StepPlan, slots: SlotTable) -> StepInputs:
    """The plan's rows as arrays, after `slots.apply(plan)`; counts their positions as computed.

    Raises SlotError where a row does not go on where its slot stands, or names positions without tokens or blocks.
    """
    asked = np.array([(row.slot, row.start, row.num_tokens, row.sample) for row in plan.rows], np.int64)
    ids, starts, most, samples = asked.reshape(-1, 4).T
    computed, known = slots.computed[ids], slots.lengths[ids]
    own = starts < 0
    # A row at the slot's own length computes what is there: drafts that were rejected leave less than was planned for.
    counts = np.where(own, np.minimum(most, known - computed), most)
    starts = np.where(own, computed, starts)
    ends = starts + counts
    check(slots, ids, starts, ends, samples)
    slots.computed[ids] = ends

    if (counts == 1).all():  # nobody is in a prompt: most steps
        cu, owners, positions = np.arange(len(ids) + 1), np.arange(len(ids)), starts
    else:
        cu = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(counts, out=cu[1:])
        owners = np.repeat(np.arange(len(ids)), counts)  # [T] row of each token
        positions = np.arange(cu[-1]) - cu[owners] + starts[owners]
    of_tokens = ids[owners]
    pages, offsets = np.divmod(positions, slots.block_size)
    width = -(-int(ends.max(initial=0)) // slots.block_size)
    scored = _scored(slots, ids, owners, positions)
    sampling = np.flatnonzero(samples)
    return StepInputs(
        slots=ids,
        cu=cu,
        context_lens=ends,
        token_ids=slots.token_ids[of_tokens, positions].astype(np.int64),
        positions=positions,
        slot_mapping=slots.block_tables[of_tokens, pages] * np.int64(slots.block_size) + offsets,
        block_tables=slots.block_tables[ids, :width].astype(np.int64),
        sample_rows=sampling,
        sample_tokens=cu[sampling + 1] - 1,
        prompt_logprob_rows=owners[scored],
        prompt_logprob_tokens=scored,
        adapters=slots.adapters_of(ids),
    )


def _scored(slots: SlotTable, ids: Ints, owners: Ints, positions: Ints) -> Ints:
    """Tokens whose logits score the next prompt token, where the request asked for that."""
    wanted = slots.params["prompt_logprobs"][ids] >= 0
    if not wanted.any():
        return _NONE
    return np.flatnonzero(wanted[owners] & (positions + 1 < slots.prompt_lens[ids][owners]))


def check(slots: SlotTable, ids: Ints, starts: Ints, ends: Ints, samples: Ints) -> None:
    """What R1 promises of a row. The arrays first, so that a sound step costs a few comparisons."""
    computed, known = slots.computed[ids], slots.lengths[ids]
    covered = slots.block_counts[ids] * slots.block_size
    going_on = (starts == computed) | (computed < 0)
    sound = going_on & (starts >= 0) & (starts < ends) & (ends <= known) & (ends <= covered)
    sound &= (samples == 0) | (ends == known)
    if sound.all():
        return
    i = int(np.flatnonzero(~sound)[0])
    raise SlotError(
        f"slot {ids[i]} cannot compute positions {starts[i]}..{ends[i] - 1}{' and sample' * bool(samples[i])}: "
        f"it knows {known[i]} tokens, has computed {computed[i]} (−1: none yet) and has blocks for {covered[i]}"
    )

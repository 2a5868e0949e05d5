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

    A row that samples has 1 + num_drafts outputs: one behind its last known token, and one behind each draft.
    """

    slots: Ints  # [R]
    cu: Ints  # [R+1] borders of the rows in the flat token arrays
    context_lens: Ints  # [R] tokens whose KV the row sees, its own included
    token_ids: Ints  # [T]
    positions: Ints  # [T]
    slot_mapping: Ints  # [T] block * block_size + offset: where each token's K and V are written
    block_tables: Ints  # [R, B] padded with the null block; B covers the longest row
    num_drafts: Ints  # [R] how many of the row's last tokens are drafts
    sample_rows: Ints  # [S] the row of each output, in row order
    sample_tokens: Ints  # [S] index into T of the token whose logits it is sampled from
    prompt_logprob_rows: Ints  # [Q] for each logit wanted for prompt logprobs: its row …
    prompt_logprob_tokens: Ints  # [Q] … and its index into T (the logits there score the next prompt token)
    pooled_rows: Ints  # [P] for each token whose state a pooled output is made of: its row …
    pooled_tokens: Ints  # [P] … and its index into T

    @property
    def sample_slots(self) -> Ints:
        """[S]"""
        return self.slots[self.sample_rows]

    @property
    def sample_positions(self) -> Ints:
        """[S] where the token stands that is sampled."""
        return self.positions[self.sample_tokens] + 1


def build_inputs(plan: StepPlan, slots: SlotTable) -> StepInputs:
    """The plan's rows as arrays, after `slots.apply(plan)`; counts their positions as computed.

    Raises SlotError where a row does not go on where its slot stands, or names positions without tokens or blocks.
    """
    rows = [(row.slot, row.start, row.num_tokens, row.sample, row.num_drafts) for row in plan.rows]
    ids, starts, most, samples, drafts = np.array(rows, np.int64).reshape(-1, 5).T
    computed, known = slots.computed[ids], slots.lengths[ids]
    own = starts < 0
    # A row at the slot's own length computes what is there: drafts that were rejected leave less than was planned for.
    counts = np.where(own, np.minimum(most, known - computed), most)
    starts = np.where(own, computed, starts)
    ends = starts + counts
    if drafts.any():
        drafts = np.where(samples, np.minimum(drafts, slots.drafts[ids]), 0)
    check(slots, ids, starts, ends, samples, drafts)
    slots.computed[ids] = ends
    return flat_inputs(slots, ids, starts, ends + drafts, np.flatnonzero(samples), drafts=drafts)


def flat_inputs(
    slots: SlotTable,
    ids: Ints,
    starts: Ints,
    ends: Ints,
    sample_rows: Ints,
    block_tables: Ints | None = None,
    drafts: Ints | None = None,
) -> StepInputs:
    """Positions starts[i]:ends[i] of slots ids[i] as rows, the last drafts[i] of them drafts.

    `block_tables` [R, B]: others than the slots' own.
    """
    counts = ends - starts
    if (counts == 1).all():  # nobody is in a prompt: most steps
        cu, owners, positions = np.arange(len(ids) + 1), np.arange(len(ids)), starts
    else:
        cu = np.zeros(len(ids) + 1, np.int64)
        np.cumsum(counts, out=cu[1:])
        owners = np.repeat(np.arange(len(ids)), counts)  # [T] row of each token
        positions = np.arange(cu[-1]) - cu[owners] + starts[owners]
    if block_tables is None:
        width = -(-int(ends.max(initial=0)) // slots.block_size)
        block_tables = slots.block_tables[ids, :width].astype(np.int64)
    pages, offsets = np.divmod(positions, slots.block_size)
    scored, pooled = _scored(slots, ids, owners, positions), _pooled(slots, ids, owners, positions)
    sample_tokens = cu[sample_rows + 1] - 1
    if drafts is None:
        drafts = np.zeros_like(ids)
    elif drafts.any():
        sample_rows, sample_tokens = _outputs(sample_rows, sample_tokens, drafts[sample_rows])
    return StepInputs(
        slots=ids,
        cu=cu,
        context_lens=ends,
        token_ids=slots.token_ids[ids[owners], positions].astype(np.int64),
        positions=positions,
        slot_mapping=block_tables[owners, pages] * slots.block_size + offsets,
        block_tables=block_tables,
        num_drafts=drafts,
        sample_rows=sample_rows,
        sample_tokens=sample_tokens,
        prompt_logprob_rows=owners[scored],
        prompt_logprob_tokens=scored,
        pooled_rows=owners[pooled],
        pooled_tokens=pooled,
    )


def _outputs(rows: Ints, last: Ints, drafts: Ints) -> tuple[Ints, Ints]:
    """Row and token of each output of `rows` whose last tokens are `last`, `drafts` of them drafts."""
    outputs = drafts + 1
    ends = np.cumsum(outputs)
    behind = np.repeat(ends, outputs) - 1 - np.arange(ends[-1])  # how many outputs of its row come after it
    return np.repeat(rows, outputs), np.repeat(last, outputs) - behind


def _scored(slots: SlotTable, ids: Ints, owners: Ints, positions: Ints) -> Ints:
    """Tokens whose logits score the next prompt token, where the request asked for that."""
    wanted = slots.params["prompt_logprobs"][ids] >= 0
    if not wanted.any():
        return _NONE
    first, end = slots.params["prompt_logprobs_from"][ids], slots.prompt_lens[ids]
    return np.flatnonzero(wanted[owners] & (positions + 1 >= first[owners]) & (positions + 1 < end[owners]))


def _pooled(slots: SlotTable, ids: Ints, owners: Ints, positions: Ints) -> Ints:
    """Tokens whose states pooled outputs are made of: a prompt's last, all of them, or its first."""
    kinds = slots.pooling[ids]
    if not kinds.any():
        return _NONE
    is_last = positions + 1 == slots.prompt_lens[ids][owners]
    of_kind = np.stack([np.zeros_like(is_last), is_last, np.ones_like(is_last), positions == 0])  # as in POOLINGS
    return np.flatnonzero(of_kind[kinds[owners], np.arange(len(owners))])


def check(slots: SlotTable, ids: Ints, starts: Ints, ends: Ints, samples: Ints, drafts: Ints) -> None:
    """What R1 promises of a row that computes starts:ends, then `drafts`.

    The arrays first, so that a sound step costs a few comparisons.
    """
    computed, known = slots.computed[ids], slots.lengths[ids]
    covered = slots.block_counts[ids] * slots.block_size
    going_on = (starts == computed) | (computed < 0)
    sound = going_on & (starts >= 0) & (starts < ends) & (ends <= known) & (ends + drafts <= covered)
    sound &= (samples == 0) | (ends == known)
    if sound.all():
        return
    i = int(np.flatnonzero(~sound)[0])
    behind = f" and {drafts[i]} drafts" * bool(drafts[i]) + " and sample" * bool(samples[i])
    raise SlotError(
        f"slot {ids[i]} cannot compute positions {starts[i]}..{ends[i] - 1}{behind}: "
        f"it knows {known[i]} tokens, has computed {computed[i]} (−1: none yet) and has blocks for {covered[i]}"
    )

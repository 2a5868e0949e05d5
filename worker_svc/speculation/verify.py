"""Which drafts stand: those that the target, sampled behind each of them, would have said itself (R2). numpy only."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable


def accept(inputs: StepInputs, slots: SlotTable, token_ids: Ints) -> NDArray[np.bool_]:
    """Appends what was sampled to the slots, `token_ids` [S] of inputs.sample_rows. Returns which of it counts [S].

    A row's outputs count up to the first that is not the draft behind it: that one is the target's own token, and what
    was sampled after it follows a draft that fell. KV of accepted drafts is computed; that of others is written over.
    """
    if not inputs.num_drafts.any():
        slots.append_each(inputs.sample_slots, token_ids)
        return np.ones(len(token_ids), np.bool_)
    outputs = np.arange(len(token_ids))
    first = np.append(True, inputs.sample_rows[1:] != inputs.sample_rows[:-1])
    last = np.append(first[1:], True)
    draft_behind = inputs.token_ids[np.minimum(inputs.sample_tokens + 1, len(inputs.token_ids) - 1)]
    differs = np.where(last | (token_ids != draft_behind), outputs, len(outputs))
    begins = np.flatnonzero(first)
    counts = outputs <= np.repeat(np.minimum.reduceat(differs, begins), np.diff(begins, append=len(outputs)))
    ids, positions = inputs.sample_slots[counts], inputs.sample_positions[counts]
    slots.append_each(ids, token_ids[counts], positions)
    slots.computed[ids] = positions  # of the last: whatever comes before it
    return counts

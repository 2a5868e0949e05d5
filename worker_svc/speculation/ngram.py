"""Prompt lookup (Saxena 2023): what followed the same words before, in the stream itself, will follow them again."""

from __future__ import annotations

from typing import Final

import numpy as np

from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable

LEAST, MOST = 2, 8  # tokens that have to be the same, and that are looked at
BACK: Final = np.arange(1, MOST + 1)
LATEST: Final = 4096  # of a slot's tokens: who is longer forgets what came before


class NgramProposer:
    """Drafts what stands behind the latest of the longest matches of a slot's last tokens.

    Keeps nothing: to look through the tokens of all slots at once costs less than an index that follows them.
    """

    def propose(self, inputs: StepInputs, slots: SlotTable, most: Ints) -> None:
        ids, most = inputs.slots[most > 0], most[most > 0]
        if not len(ids):
            return
        ends = slots.lengths[ids]
        sizes = np.minimum(ends, LATEST)
        parts = zip(ids.tolist(), (ends - sizes).tolist(), ends.tolist(), strict=True)
        known = np.concatenate([slots.token_ids[slot, begin:end] for slot, begin, end in parts])
        borders = np.cumsum(sizes)
        tails = known[np.maximum(borders[:, None] - BACK, 0)]
        same = known == np.repeat(tails[:, 0], sizes)
        same[1:] &= known[:-1] == np.repeat(tails[:, 1], sizes)[1:]
        at = np.flatnonzero(same)
        owners = np.searchsorted(borders, at, "right")
        earlier = at != borders[owners] - 1
        at, owners = at[earlier], owners[earlier]
        back = at[:, None] + 1 - BACK
        alike = (known[np.maximum(back, 0)] == tails[owners]) & (back >= (borders - sizes)[owners, None])
        lengths = np.logical_and.accumulate(alike, 1).sum(1)
        best = np.full(len(ids), -1)
        np.maximum.at(best, owners, lengths * len(known) + at)
        for slot, most_of, found, end in zip(ids.tolist(), most.tolist(), best.tolist(), borders.tolist(), strict=True):
            if found >= LEAST * len(known):
                begin = found % len(known) + 1
                # Where the continuation ends with what is known, it begins anew: so it was since `begin`.
                again = known[begin : min(begin + most_of, end)].tolist()
                slots.propose(slot, (again * most_of)[:most_of])

    def release(self, slots: SlotTable, slot: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass

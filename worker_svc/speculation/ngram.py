"""Prompt lookup (Saxena 2023): what followed the same words before, in the stream itself, will follow them again."""

from __future__ import annotations

from typing import Final

import numpy as np

from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import SlotTable

LEAST, MOST = 2, 8  # tokens that have to be the same, and that are looked at
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
        known = np.concatenate(
            [slots.token_ids[slot, end - size : end] for slot, end, size in zip(ids, ends, sizes, strict=True)]
        )
        borders = np.cumsum(sizes)
        owners = np.repeat(np.arange(len(ids)), sizes)
        # Where the last token stands: the end of a match of one token. Then those of which a token more is the same.
        at = np.flatnonzero(known == known[borders - 1][owners])
        at = at[at != borders[owners[at]] - 1]
        lengths = np.zeros(len(at), np.int64)
        same = np.arange(len(at))
        for length in range(1, MOST + 1):
            lengths[same] = length
            owner = owners[at[same]]
            before = at[same] - length
            inside = before >= borders[owner] - sizes[owner]
            same, before, owner = same[inside], before[inside], owner[inside]
            same = same[known[before] == known[borders[owner] - 1 - length]]
            if not len(same):
                break
        best = np.full(len(ids), -1, np.int64)
        np.maximum.at(best, owners[at], lengths * len(known) + at)
        for i in np.flatnonzero(best >= LEAST * len(known)).tolist():
            begin, end = int(best[i]) % len(known) + 1, int(borders[i])
            # Where the continuation ends with what is known, it begins anew: so it was since `begin`.
            slots.propose(int(ids[i]), known[begin + np.arange(most[i]) % (end - begin)])

    def release(self, slots: SlotTable, slot: int) -> None:
        pass

    def reset(self) -> None:
        pass

    def close(self) -> None:
        pass

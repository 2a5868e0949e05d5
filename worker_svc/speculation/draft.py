"""A smaller model that goes ahead of the target and says what it would.

Its keys and values lie under the target's block ids: a mirror of the target's blocks, so whoever is admitted, hits a
cached prefix or leaves does so here, too, and nothing is told twice. A block whose mirror was never written (its owner
took no drafts, or it came from the host's tier) costs acceptance and nothing else.

    target  |prompt …        |sampled …    |L
    draft   |=== computed ===>      lags   |d d d      L … L + K − 1, one after the other, for all slots at once
"""

from __future__ import annotations

from typing import Final, Protocol

import numpy as np

from worker_svc.inputs import Ints, StepInputs, flat_inputs
from worker_svc.slots import SlotTable

FOLLOWED: Final = 1024  # positions in a step at most, beside drafts: whoever lags further behind catches up in several


class DraftModel(Protocol):
    max_model_len: int

    def greedy(self, inputs: StepInputs) -> Ints:
        """Computes the tokens, and answers with the likeliest behind each of inputs.sample_tokens [S]."""

    def close(self) -> None: ...


def spare_blocks(max_slots: int, num_drafts: int, block_size: int) -> int:
    """Blocks of the mirror behind the target's own, for drafts beyond those that a slot has."""
    return max_slots * -(-num_drafts // block_size)


class DraftProposer:
    """`num_blocks`: the target's; the mirror has spare_blocks more."""

    def __init__(self, model: DraftModel, num_blocks: int, num_drafts: int, block_size: int) -> None:
        self._model, self._num_blocks = model, num_blocks
        self._spare = spare_blocks(1, num_drafts, block_size)
        self.reset()

    def reset(self) -> None:
        self._known = self._computed = np.zeros(
            0, np.int64
        )  # by slot: whose admission, and its positions in the mirror

    def release(self, slots: SlotTable, slot: int) -> None:
        pass

    def close(self) -> None:
        self._model.close()

    def propose(self, inputs: StepInputs, slots: SlotTable, most: Ints) -> None:
        ids = inputs.slots
        self._meet(inputs, slots)
        lengths, longest = slots.lengths[ids], self._model.max_model_len
        ahead = np.clip(longest - lengths, 0, most)
        # The mirror's last positions may be of drafts that fell.
        starts = np.minimum(np.minimum(self._computed[ids], slots.computed[ids]), longest)
        chunks = np.diff(inputs.cu) - inputs.num_drafts > 1
        ends = np.where(ahead > 0, lengths, np.where(chunks, np.minimum(slots.computed[ids], longest), starts))
        before = np.cumsum(ends - starts) - (ends - starts)
        reached = np.clip(starts + FOLLOWED - before, starts, ends)
        ahead = np.where(reached < ends, 0, ahead)
        tables = self._tables(slots, ids, lengths + ahead)

        moving = reached > starts
        wanting = ahead[moving] > 0
        self._step(slots, ids[moving], tables[moving], starts[moving], reached[moving], wanting, lengths[moving])
        for k in range(1, int(ahead.max(initial=0))):
            going = ahead > k
            at = lengths[going] + k
            self._step(slots, ids[going], tables[going], at - 1, at, np.ones(len(at), np.bool_), at)
        slots.drafts[ids] = ahead
        covered = slots.block_counts[ids] * slots.block_size  # what lies in spare blocks is lost
        self._computed[ids] = np.where(ahead > 0, np.minimum(lengths + ahead - 1, covered), reached)

    def _meet(self, inputs: StepInputs, slots: SlotTable) -> None:
        """What a slot's new holder found in cached blocks is taken to be in their mirror."""
        ids = inputs.slots
        if len(self._known) != len(slots.admissions):
            self._known, self._computed = np.zeros_like(slots.admissions), np.zeros_like(slots.admissions)
        new = self._known[ids] != slots.admissions[ids]
        self._known[ids[new]] = slots.admissions[ids[new]]
        self._computed[ids[new]] = inputs.positions[inputs.cu[:-1][new]]

    def _tables(self, slots: SlotTable, ids: Ints, ends: Ints) -> Ints:
        """The slots' blocks [R, B], and spare ones where they end before `ends`."""
        width = -(-int(ends.max(initial=0)) // slots.block_size)
        tables = slots.block_tables[ids, :width].astype(np.int64)
        for i in np.flatnonzero(slots.block_counts[ids] * slots.block_size < ends).tolist():
            count = int(slots.block_counts[ids[i]])
            spare = self._num_blocks + i * self._spare + np.arange(self._spare)
            tables[i, count : count + self._spare] = spare[: width - count]
        return tables

    def _step(
        self, slots: SlotTable, ids: Ints, tables: Ints, starts: Ints, ends: Ints, drafts: Ints, positions: Ints
    ) -> None:
        """Computes starts:ends of each slot; where `drafts`, what comes next becomes its token at `positions`."""
        if not len(ids):
            return
        inputs = flat_inputs(slots, ids, starts, ends, np.flatnonzero(drafts), tables)
        tokens = self._model.greedy(inputs)
        slots.token_ids[inputs.sample_slots, positions[inputs.sample_rows]] = tokens

"""A smaller model that goes ahead of the target and says what it would; or a head that reads the target's states.

Its keys and values lie under the target's block ids: a mirror of the target's blocks, so whoever is admitted, hits a
cached prefix or leaves does so here, too, and nothing is told twice. A block whose mirror was never written (its owner
took no drafts, or it came from the host's tier) costs acceptance and nothing else.

    target  |prompt …        |sampled …    |L
    draft   |=== computed ===>      lags   |d d d      L … L + K − 1, one after the other, for all slots at once

A head's position p is made of the target's state there and of token p + 1: it is `shift` = 1 behind. What it makes of
its own states is made again of the target's, once that has been there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, Protocol

import numpy as np

from worker_svc.inputs import Ints, StepInputs, flat_inputs
from worker_svc.slots import SlotTable

FOLLOWED: Final = 1024  # positions in a step at most, beside drafts: whoever lags further behind catches up in several


class DraftModel(Protocol):
    max_model_len: int
    shift: int

    def greedy(self, inputs: StepInputs, before: Ints | None) -> Ints:
        """Computes the tokens, and answers with the likeliest behind each of inputs.sample_tokens [S].

        `before` [R]: which output of the call before each row of one token goes on from; None: the target's tokens.
        """

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
        shift = self._model.shift
        lengths, longest = slots.lengths[ids] - shift, self._model.max_model_len
        ahead = np.clip(longest - lengths, 0, most)
        # The mirror's last positions may be of drafts that fell.
        known = np.minimum(slots.computed[ids], lengths)
        starts = np.minimum(np.minimum(self._computed[ids], known), longest)
        chunks = np.diff(inputs.cu) - inputs.num_drafts > 1
        ends = np.where(ahead > 0, lengths, np.where(chunks, np.minimum(known, longest), starts))
        before = np.cumsum(ends - starts) - (ends - starts)
        reached = np.clip(starts + FOLLOWED - before, starts, ends)
        ahead = np.where(reached < ends, 0, ahead)
        tables = self._tables(slots, ids, lengths + ahead)

        moving = reached > starts
        if moving.any():
            sampling = np.flatnonzero(ahead[moving] > 0)
            step = self._inputs(slots, ids[moving], starts[moving], reached[moving], sampling, tables[moving])
            self._step(slots, step, None)
        going = np.flatnonzero(ahead > 0)
        for k in range(1, int(ahead.max(initial=0))):
            before, going = going, going[ahead[going] > k]
            if k == 1 or len(going) < len(before):
                at, every = lengths[going] + k, np.arange(len(going))
                step = self._inputs(slots, ids[going], at - 1, at, every, tables[going])
            step = _one_further(step, self._step(slots, step, np.searchsorted(before, going)), slots.block_size)
        slots.drafts[ids] = ahead
        covered = slots.block_counts[ids] * slots.block_size  # what lies in spare blocks is lost
        kept = lengths if shift else lengths + ahead - 1
        self._computed[ids] = np.where(ahead > 0, np.minimum(kept, covered), reached)

    def _inputs(
        self, slots: SlotTable, ids: Ints, starts: Ints, ends: Ints, sample_rows: Ints, tables: Ints
    ) -> StepInputs:
        step, shift = flat_inputs(slots, ids, starts, ends, sample_rows, tables), self._model.shift
        if not shift:
            return step
        return replace(
            step, token_ids=slots.token_ids[np.repeat(ids, ends - starts), step.positions + shift].astype(np.int64)
        )

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

    def _step(self, slots: SlotTable, inputs: StepInputs, before: Ints | None) -> Ints:
        """Computes it, and puts what comes next where it would stand."""
        tokens = self._model.greedy(inputs, before)
        slots.token_ids[inputs.sample_slots, inputs.sample_positions + self._model.shift] = tokens
        return tokens


def _one_further(inputs: StepInputs, tokens: Ints, block_size: int) -> StepInputs:
    """The same rows of one token each, a position on: `tokens`."""
    positions = inputs.positions + 1
    pages, offsets = np.divmod(positions, block_size)
    return replace(
        inputs,
        context_lens=positions + 1,
        token_ids=tokens,
        positions=positions,
        slot_mapping=inputs.block_tables[inputs.sample_rows, pages] * block_size + offsets,
    )

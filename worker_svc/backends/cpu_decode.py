"""The same slots, one token further: most steps, for which arrays and structs are made once and then counted up.

A step is short against what a cold cache makes of a hundred lines of numpy: so whatever does not change stays where it
is. Whenever a plan asks for anything else, the general way takes over (`settle`), with the same results and errors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np

from kernels.cpu.library import Batch, Model
from protos.wire import Mask, Row, RowResult, StepPlan
from worker_svc.backends.cpu_sampling import CpuSampler, Outputs
from worker_svc.inputs import StepInputs, check
from worker_svc.results import sampled_results
from worker_svc.sampling_rules import step_mask
from worker_svc.slots import SlotTable

SPARE = 16  # blocks that a table may grow by before it is copied


def repeatable(inputs: StepInputs, outputs: Outputs) -> bool:
    """Whether each row was one token that was sampled from, without edits; a mask comes anew with each step."""
    rows = len(inputs.slots)
    alike = len(inputs.token_ids) == len(inputs.sample_rows) == rows
    return alike and not outputs.edited and not len(inputs.prompt_logprob_tokens)


class Decode:
    """Begins behind a step that `repeatable` says may be repeated, whose structs it takes over.

    Between `advance` and `settle` the table knows the sampled tokens, but not yet how many they are.
    """

    def __init__(
        self, model: Model, plan: StepPlan, inputs: StepInputs, batch: Batch, outputs: Outputs, slots: SlotTable
    ) -> None:
        ids = inputs.slots
        self._model, self._plan, self._inputs = model, plan, inputs
        self._slots, self._ids, self._batch, self.outputs = slots, ids, batch, outputs
        self._slot_list = ids.tolist()
        self._plain = [
            Row(slot, -1, 1, 0, [], True, row.masked) for slot, row in zip(ids.tolist(), plan.rows, strict=True)
        ]
        self._known = slots.token_ids.reshape(-1)  # a view of all tables in a row
        known_at = ids * slots.max_model_len + inputs.context_lens
        # All that is one more in each step, in one array.
        self._counts = np.stack((inputs.positions, inputs.context_lens, inputs.slot_mapping, known_at))
        self._positions, self._ends, self._mapping, self._known_at = self._counts
        self._sampled_at = outputs.asked["position"]
        self._token_ids = inputs.token_ids
        self._left = slots.max_model_len - 1 - int(self._ends.max())  # steps until a table is full
        self._look_at_blocks()
        self._look_at_offsets()
        batch.point(positions=self._positions, context_lens=self._ends, slot_mapping=self._mapping)
        self._masked = any(row.masked for row in plan.rows)  # what is sampled has to wait for the mask
        self.run = partial(model.forward, batch) if self._masked else model.repeated(batch, outputs)

    def advance(self, plan: StepPlan) -> bool:
        """Makes arrays and structs those of the plan's step. False, and nothing is changed, where it is another kind.

        Raises SlotError as the general way would.
        """
        if plan.release or plan.admit or plan.copies or plan.num_propose or not self._left:
            return False
        rows = plan.rows
        if rows != self._plain:
            bringing = self._bringing(rows)
            if bringing is None:
                return False
            for i in bringing:
                self._slots.add_blocks(rows[i].slot, rows[i].new_block_ids)
            self._look_at_blocks()
        if not self._room:
            self.settle()
            starts = self._ends
            check(self._slots, self._ids, starts, starts + 1, np.ones_like(starts), np.zeros_like(starts))
        self._plan = plan
        np.copyto(self._token_ids, self.outputs.sampled)
        self._counts += 1
        self._sampled_at += 1
        self._left -= 1
        self._room -= 1
        self._to_border -= 1
        if not self._to_border:
            self._look_at_offsets()
        return True

    def results(self, mask: Mask | None) -> list[RowResult]:
        """Of the step that was run. Raises SamplerError for a mask that does not fit, and LibraryError or SamplerError
        for a slot that could not be sampled.
        """
        out, starts = self.outputs, self._ends.tolist()
        if self._masked:
            masks = step_mask(self._plan, self._inputs, mask, self._slots.vocab_size)
            assert masks
            self._model.sample(out.point(mask_rows=masks.rows, bitmask=masks.words))
        token_ids = out.sampled.tolist()
        if out.scores is not None or min(token_ids) < 0:
            results = sampled_results(self._plain, starts, token_ids, CpuSampler.finish(out)[1])
        else:
            results = list(map(RowResult, self._slot_list, starts, [[token] for token in token_ids]))
        self._known[self._known_at] = out.sampled
        return results

    def settle(self) -> None:
        """The table learns how far its slots have come."""
        self._slots.computed[self._ids] = self._ends
        self._slots.lengths[self._ids] = self._ends + 1

    def _bringing(self, rows: Sequence[Row]) -> list[int] | None:
        """Which rows bring blocks; None where one asks for anything but its next token."""
        if len(rows) != len(self._plain):
            return None
        bringing = []
        for i, (row, plain) in enumerate(zip(rows, self._plain, strict=True)):
            if row.slot != plain.slot or row.num_tokens != 1 or not row.sample or row.append_token_ids:
                return None
            if row.num_drafts or row.masked != plain.masked:
                return None
            if row.start >= 0 and row.start != self._ends[i]:
                return None
            if row.new_block_ids:
                bringing.append(i)
        return bringing

    def _look_at_blocks(self) -> None:
        """Takes over the slots' blocks, and counts the steps that they have room for."""
        slots, ids = self._slots, self._ids
        counts = slots.block_counts[ids]
        width = min(int(counts.max()) + SPARE, slots.block_tables.shape[1])
        self._tables = slots.block_tables[ids, :width].astype(np.int64)
        self._batch.table_stride = width
        self._batch.point(block_tables=self._tables)
        self._room = int((counts * slots.block_size - self._ends).min())

    def _look_at_offsets(self) -> None:
        """Where the tokens go, and after how many steps one of them is the first of its block."""
        pages, offsets = np.divmod(self._positions, self._slots.block_size)
        self._mapping[:] = self._tables[np.arange(len(pages)), pages] * self._slots.block_size + offsets
        self._to_border = self._slots.block_size - int(offsets.max())

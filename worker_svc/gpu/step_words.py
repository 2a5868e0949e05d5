"""A plan as the words that go up to the device, and what the host knows of the step besides.

    addresses [n] | values [n] | rows (slots, starts, most, drafts) [4, R] | sampling rows (row, end of its outputs,
    drafts to propose) [3, Q] | outputs (row, tokens behind it in that) [2, S] | forced (slots [F], counts [F],
    tokens [F, K])

The host follows every slot's lengths as the scheduler does, so it refuses what cannot be followed before anything is
launched, and knows each shape; of the tokens that steps in flight are sampling it knows the number alone. Of drafts in
flight it does not know how many stand: it counts all of them, until their step has landed, and so do the scheduler's
blocks. A row is laid out with as many drafts as the plan says, whether its slot holds them or not.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from kernels.gpu.slot_state import SlotState, sampling_words
from protos.wire import Copy, StepPlan
from worker_svc.inputs import StepInputs, build_inputs
from worker_svc.slots import SlotTable

Words = NDArray[np.int32]


@dataclass(frozen=True)
class StepShape:
    """What a step's launches depend on. `rows` counts null rows too: `captured` is what they fill up to, 0 is none, and
    `laid` the positions that each of them has then.
    """

    pairs: int
    rows: int
    tokens: int
    samples: int  # rows that sample
    outputs: int  # what they sample from: as many more as there are drafts
    forced: tuple[int, int]  # rows, and the most tokens of one
    captured: int
    laid: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    copies: tuple[Copy, ...] = ()
    adapted: bool = False  # some token has an adapter, or, in a captured step, may have one


@dataclass(frozen=True)
class PackedStep:
    words: Words
    shape: StepShape
    inputs: StepInputs
    outputs: NDArray[np.int64]  # [S] place of each of inputs.sample_rows among those of the device
    starts: NDArray[np.int64]  # [R] the length of each row's slot before what it samples, at most
    least: NDArray[np.int64]  # [R] … and at least
    admissions: NDArray[np.int64]  # [R] of the slots' holders


class StepPacker:
    """`captured`: rows of the steps that are captured, ascending. Null rows, position 0 of the null slot, fill them.
    `verifying`: those that are captured with `num_drafts` in each row besides.
    """

    def __init__(
        self,
        slots: SlotTable,
        state: SlotState,
        captured: Sequence[int],
        verifying: Sequence[int] = (),
        num_drafts: int = 0,
    ) -> None:
        self._slots, self._state, self._num_drafts = slots, state, num_drafts
        self._captured = {1: captured, 1 + num_drafts: verifying if num_drafts else captured}
        self._open = np.zeros(len(slots.lengths), np.int64)  # drafts of each slot that are in flight

    def pack(self, plan: StepPlan) -> PackedStep:
        """Follows the plan on the host, too. Raises SlotError."""
        slots = self._slots
        slots.apply(plan)
        self._open[[admit.slot for admit in plan.admit]] = 0
        inputs, starts, least = self._follow(plan)
        shape_rows, laid = self._shape_for(inputs, least)
        padding = shape_rows - len(plan.rows) if shape_rows else 0
        pairs = self._pairs(plan)
        rows = np.zeros((4, len(plan.rows) + padding), np.int64)
        rows[:3, : len(plan.rows)] = np.array([(r.slot, r.start, r.num_tokens) for r in plan.rows]).reshape(-1, 3).T
        rows[3, : len(plan.rows)] = inputs.num_drafts
        rows[2, len(plan.rows) :], rows[3, len(plan.rows) :] = 1, laid - 1
        samples, outputs, places = _laid_out(plan, inputs, shape_rows, laid)
        forced, forced_words = self._forced(plan)
        parts: list[NDArray[np.int64] | Words] = [pairs.T, rows, samples, outputs, forced_words]
        shape = StepShape(
            pairs=len(pairs),
            rows=rows.shape[1],
            tokens=shape_rows * laid or int(inputs.cu[-1]),
            samples=samples.shape[1],
            outputs=outputs.shape[1],
            forced=forced,
            captured=shape_rows,
            laid=laid,
            query_lens=tuple(np.diff(inputs.cu).tolist()),
            context_lens=tuple(inputs.context_lens.tolist()),
            copies=tuple(plan.copies),
            adapted=inputs.adapters is not None,
        )
        words = np.concatenate([part.astype(np.int32, copy=False).ravel() for part in parts])
        return PackedStep(words, shape, inputs, places, starts, least, slots.admissions[inputs.slots])

    def settle(self, packed: PackedStep, counts: Words) -> None:
        """Once the step has landed: `counts` [Q] is how many tokens each row was given that samples."""
        slots, inputs = self._slots, packed.inputs
        rows = np.unique(inputs.sample_rows)
        ids, drafts = inputs.slots[rows], inputs.num_drafts[rows]
        held = (slots.admissions[ids] == packed.admissions[rows]) & (slots.lengths[ids] > 0)
        ids, drafts, fell = ids[held], drafts[held], (1 + drafts - counts)[held]
        self._open[ids] -= drafts
        slots.lengths[ids] -= fell
        slots.computed[ids] -= fell

    def _follow(self, plan: StepPlan) -> tuple[StepInputs, NDArray[np.int64], NDArray[np.int64]]:
        """The step's rows, and the lengths of their slots, at most and at least; then as many more as it samples."""
        slots = self._slots
        ids = np.array([row.slot for row in plan.rows], np.int64)
        masked = np.array([row.masked for row in plan.rows], np.bool_)
        room = np.clip(slots.max_model_len - slots.lengths[ids] - 1, 0, None)
        slots.drafts[ids] = np.where(masked, 0, np.minimum(slots.drafts[ids], room))
        starts = slots.lengths[ids]
        least = starts - self._open[ids]
        inputs = build_inputs(plan, slots)
        sampling, positions = inputs.sample_slots, inputs.sample_positions
        slots.append_each(sampling, np.zeros(len(sampling), np.int64), positions)  # whatever they will be
        slots.computed[sampling] = positions
        self._open[inputs.slots] += inputs.num_drafts
        slots.drafts[sampling] = min(plan.num_propose, self._num_drafts)
        return inputs, starts, least

    def _shape_for(self, inputs: StepInputs, least: NDArray[np.int64]) -> tuple[int, int]:
        """The captured shape that the step runs as: where each row has one token, and samples it and its drafts."""
        rows, drafts = len(inputs.slots), inputs.num_drafts
        if not rows or len(inputs.token_ids) != len(inputs.sample_rows):
            return 0, 1
        laid = 1 + self._num_drafts if drafts.any() else 1
        captured = self._captured[laid]
        at = bisect_left(captured, rows)
        fits = at < len(captured) and (least + drafts >= laid).all()  # what is laid out besides was computed before
        return (captured[at], laid) if fits else (0, 1)

    def _pairs(self, plan: StepPlan) -> Words:
        """[n, 2] address and value of all that the plan says about slots."""
        at, state, slots = SlotState.address, self._state, self._slots
        runs: list[tuple[int, Sequence[int] | Words]] = []
        for admit in plan.admit:
            blocks = admit.block_ids[0]
            runs.append((at(state.token_ids, admit.slot, 0), admit.token_ids))
            runs.append((at(state.block_tables, admit.slot, 0), blocks))
            runs.append((at(state.lengths, admit.slot), [len(admit.token_ids)]))
            runs.append((at(state.limits, admit.slot), [int(slots.limits[admit.slot])]))
            runs.append((at(state.drafts, admit.slot), [0]))
            runs.append((at(state.sampling, admit.slot, 0), self._sampling(admit.slot)))
            if len(state.adapters):
                runs.append((at(state.adapters, admit.slot), [int(slots.adapters[admit.slot])]))
        for row in plan.rows:
            if row.new_block_ids and (new := row.new_block_ids[0]):
                first = int(slots.block_counts[row.slot]) - len(new)
                runs.append((at(state.block_tables, row.slot, first), new))
        if not runs:
            return np.zeros((0, 2), np.int32)
        addresses = np.concatenate([np.arange(first, first + len(values)) for first, values in runs])
        return np.stack([addresses, np.concatenate([np.asarray(v, np.int64) for _, v in runs])], 1).astype(np.int32)

    def _sampling(self, slot: int) -> Words:
        of = self._slots.params[slot]
        top_k = min(int(of["top_k"]), self._slots.vocab_size)
        return sampling_words(int(of["seed"]), float(of["temperature"]), float(of["min_p"]), top_k, float(of["top_p"]))

    def _forced(self, plan: StepPlan) -> tuple[tuple[int, int], Words]:
        """Tokens that a grammar leaves no choice about: they go to the ends of slots that only the device knows."""
        rows = [row for row in plan.rows if row.append_token_ids]
        most = max((len(row.append_token_ids) for row in rows), default=0)
        tokens = np.zeros((len(rows), most), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row.append_token_ids)] = row.append_token_ids
        heads = np.array([(row.slot, len(row.append_token_ids)) for row in rows], np.int32).reshape(-1, 2)
        return (len(rows), most), np.concatenate([heads.T.ravel(), tokens.ravel()]).astype(np.int32)


def _laid_out(
    plan: StepPlan, inputs: StepInputs, shape_rows: int, laid: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """The rows that sample [3, Q] and their outputs [2, S], as words; and where inputs.sample_rows are among those."""
    rows, counts = np.unique(inputs.sample_rows, return_counts=True)
    wanted = [0 if plan.rows[row].masked else plan.num_propose for row in rows.tolist()]
    ends = np.cumsum(counts)
    behind = np.repeat(ends, counts) - 1 - np.arange(len(inputs.sample_rows))
    if not shape_rows:
        return np.stack([rows, ends, wanted]), np.stack([inputs.sample_rows, behind]), np.arange(len(behind))
    every = np.arange(shape_rows)
    samples = np.stack([every, laid * (every + 1), np.pad(wanted, (0, shape_rows - len(rows)))])
    outputs = np.stack([np.repeat(every, laid), laid - 1 - np.arange(shape_rows * laid) % laid])
    return samples, outputs, laid * (inputs.sample_rows + 1) - 1 - behind

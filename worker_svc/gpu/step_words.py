"""A plan as the words that go up to the device, and what the host knows of the step besides.

    addresses [n] | values [n] | slots [R] | starts [R] | most [R] | sample rows [S] | forced (slots [F], counts [F],
    tokens [F, K])

The host follows every slot's lengths as the scheduler does, so it refuses what cannot be followed before anything is
launched, and knows each shape; of the tokens that steps in flight are sampling it knows the number alone.
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
    """What a step's launches depend on. `rows` counts null rows too: `captured` is what they fill up to, 0 is none."""

    pairs: int
    rows: int
    tokens: int
    samples: int
    forced: tuple[int, int]  # rows, and the most tokens of one
    captured: int
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    copies: tuple[Copy, ...] = ()
    adapted: bool = False  # some token has an adapter, or, in a captured step, may have one


@dataclass(frozen=True)
class PackedStep:
    words: Words
    shape: StepShape
    inputs: StepInputs
    starts: NDArray[np.int64]  # [R] the known length of each row's slot, before what it samples


class StepPacker:
    """`captured`: rows of the steps that are captured, ascending. Null rows, position 0 of the null slot, fill them."""

    def __init__(self, slots: SlotTable, state: SlotState, captured: Sequence[int]) -> None:
        self._slots, self._state, self._captured = slots, state, captured

    def pack(self, plan: StepPlan) -> PackedStep:
        """Follows the plan on the host, too. Raises SlotError."""
        slots = self._slots
        slots.apply(plan)
        known = slots.lengths.copy()
        inputs = build_inputs(plan, slots)
        sampling = inputs.slots[inputs.sample_rows]
        starts = known[inputs.slots]
        slots.append_each(sampling, np.zeros(len(sampling), np.int64))  # whatever they will be
        shape_rows = self._rows_for(plan, inputs)
        padding = shape_rows - len(plan.rows) if shape_rows else 0
        pairs = self._pairs(plan)
        rows = np.array([(row.slot, row.start, row.num_tokens) for row in plan.rows] + [(0, 0, 1)] * padding, np.int32)
        samples = np.arange(shape_rows) if shape_rows else inputs.sample_rows
        forced, forced_words = self._forced(plan)
        parts = [pairs.T.ravel(), rows.reshape(-1, 3).T.ravel(), samples.astype(np.int32), forced_words]
        shape = StepShape(
            pairs=len(pairs),
            rows=len(rows),
            tokens=int(inputs.cu[-1]) + padding,
            samples=len(samples),
            forced=forced,
            captured=shape_rows,
            query_lens=tuple(np.diff(inputs.cu).tolist()),
            context_lens=tuple(inputs.context_lens.tolist()),
            copies=tuple(plan.copies),
            adapted=inputs.adapters is not None,
        )
        return PackedStep(np.concatenate(parts), shape, inputs, starts)

    def _rows_for(self, plan: StepPlan, inputs: StepInputs) -> int:
        """The captured shape that the step runs as: where each row samples one token from one position."""
        rows = len(plan.rows)
        decodes = rows and len(inputs.token_ids) == len(inputs.sample_rows) == rows
        at = bisect_left(self._captured, rows)
        return self._captured[at] if decodes and at < len(self._captured) else 0

    def _pairs(self, plan: StepPlan) -> Words:
        """[n, 2] address and value of all that the plan says about slots."""
        at, state, slots = SlotState.address, self._state, self._slots
        runs: list[tuple[int, Sequence[int] | Words]] = []
        for admit in plan.admit:
            blocks = admit.block_ids[0]
            runs.append((at(state.token_ids, admit.slot, 0), admit.token_ids))
            runs.append((at(state.block_tables, admit.slot, 0), blocks))
            runs.append((at(state.lengths, admit.slot), [len(admit.token_ids)]))
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

"""A table of slots with their sampler: what a backend does around it, for tests."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from protos.wire import Admit, Epoch, Mask, Row, Sampling, StepPlan
from worker_svc.inputs import StepInputs, build_inputs
from worker_svc.results import build_results
from worker_svc.sampler import Sampled, Sampler
from worker_svc.slots import SlotTable


class Bench:
    def __init__(self, vocab_size: int, max_slots: int = 64, max_model_len: int = 64) -> None:
        self.slots = SlotTable(
            max_slots=max_slots,
            max_model_len=max_model_len,
            block_size=max_model_len,
            num_blocks=2,
            vocab_size=vocab_size,
        )
        self.sampler = Sampler(vocab_size)
        self.max_slots = max_slots

    def admit(self, slot: int, prompt: Sequence[int], output: Sequence[int], sampling: Sampling) -> None:
        admit = Admit(slot, [*prompt, *output], len(prompt), [[1]], sampling)
        self.slots.apply(StepPlan(Epoch(1, 1), 1, [], [admit], [], []))

    def release(self, slot: int) -> None:
        self.slots.apply(StepPlan(Epoch(1, 1), 1, [slot], [], [], []))

    def plan(self, slots: Sequence[int], masked: Sequence[int] = ()) -> tuple[StepPlan, StepInputs]:
        """A step in which each of `slots` computes what it lacks and samples."""
        rows = []
        for slot in slots:
            computed, length = int(self.slots.computed[slot]), int(self.slots.lengths[slot])
            rows.append(Row(slot, max(computed, 0), length - max(computed, 0), sample=True, masked=slot in masked))
        plan = StepPlan(Epoch(1, 1), 1, [], [], [], rows)
        return plan, build_inputs(plan, self.slots)

    def step(
        self, slots: Sequence[int], logits: NDArray[np.float32], mask: Mask | None = None, masked: Sequence[int] = ()
    ) -> Sampled:
        """`logits` [len(slots), V]; appends what was sampled."""
        plan, inputs = self.plan(slots, masked)
        sampled = self.sampler.sample(torch.from_numpy(logits), plan, inputs, self.slots, mask)
        build_results(plan, inputs, self.slots, sampled.token_ids, sampled.logprobs)
        return sampled

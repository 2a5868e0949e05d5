"""Slots that hold given tokens, and steps over them, without a model."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from protos.wire import Admit, Epoch, Row, Sampling, StepPlan
from worker_svc.inputs import StepInputs, build_inputs
from worker_svc.slots import SlotTable

BLOCK, LENGTH = 4, 64


def table(
    *histories: Sequence[int], prompt_len: int = 1, domains: Sequence[bytes] = (), vocab_size: int = 50
) -> SlotTable:
    """Slot i + 1 holds histories[i], all but the last computed."""
    slots = SlotTable(max_slots=8, max_model_len=LENGTH, block_size=BLOCK, num_blocks=200, vocab_size=vocab_size)
    admit(slots, *histories, prompt_len=prompt_len, domains=domains)
    return slots


def admit(slots: SlotTable, *histories: Sequence[int], prompt_len: int = 1, domains: Sequence[bytes] = ()) -> None:
    sampling = Sampling(max_tokens=LENGTH, repetition_penalty=1.5, bad_words=((1, 2, 3), (4,)), min_tokens=3)
    admits = [
        Admit(
            slot=i,
            token_ids=list(history),
            prompt_len=prompt_len,
            block_ids=[list(range(1 + (i - 1) * 16, 1 + i * 16))],
            sampling=sampling,
            domain=domains[i - 1] if domains else b"",
        )
        for i, history in enumerate(histories, 1)
    ]
    slots.apply(StepPlan(Epoch(1, 1), 1, [], admits, [], []))
    for slot, history in enumerate(histories, 1):
        slots.computed[slot] = len(history) - 1


def step(slots: SlotTable, *rows: Row) -> tuple[StepPlan, StepInputs]:
    plan = StepPlan(Epoch(1, 1), 1, [], [], [], list(rows), num_propose=4)
    slots.apply(plan)
    return plan, build_inputs(plan, slots)


def known(slots: SlotTable, slot: int) -> list[int]:
    tokens: list[int] = slots.token_ids[slot, : slots.lengths[slot]].tolist()
    return tokens


def drafts(slots: SlotTable, slot: int) -> list[int]:
    length = int(slots.lengths[slot])
    ahead: list[int] = slots.token_ids[slot, length : length + slots.drafts[slot]].tolist()
    return ahead


def wishes(*most: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    return np.array(most, np.int64)

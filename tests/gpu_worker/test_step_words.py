"""What the host knows of slots whose drafts are in flight, and what it lays out for them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kernels.gpu.slot_state import SlotState, scatter_words
from protos.wire import Admit, Row, Sampling, StepPlan
from tests.gpu_worker.plans import EPOCH
from worker_svc.gpu.step_words import PackedStep, StepPacker
from worker_svc.slots import SlotError, SlotTable

DRAFTS, BLOCK, LENGTH = 3, 8, 40


class Packing:
    """Slots 1 … with `lengths` known tokens, all but the last computed; each step behind the other, none landed."""

    def __init__(self, *lengths: int, blocks: int = 5) -> None:
        self.slots = SlotTable(max_slots=4, max_model_len=LENGTH, block_size=BLOCK, num_blocks=30, vocab_size=50)
        self.state = SlotState.empty(4, LENGTH, LENGTH // BLOCK, torch.device("cpu"))
        self.packer = StepPacker(self.slots, self.state, (1, 2, 4), (2, 4), DRAFTS)
        self.steps = 0
        admits = [
            Admit(slot, [7] * length, 1, [list(range(slot, slot + blocks))], Sampling(max_tokens=30))
            for slot, length in enumerate(lengths, 1)
        ]
        self.pack([Row(slot, 0, length - 1) for slot, length in enumerate(lengths, 1) if length > 1], admit=admits)

    def pack(self, rows: list[Row], num_propose: int = DRAFTS, **fields: Any) -> PackedStep:
        self.steps += 1
        plan = StepPlan(EPOCH, self.steps, fields.get("release", []), fields.get("admit", []), [], rows, num_propose)
        return self.packer.pack(plan)

    def sampled(self, *drafts: int, num_propose: int = DRAFTS) -> PackedStep:
        return self.pack([Row(slot, -1, 1, count, sample=True) for slot, count in enumerate(drafts, 1)], num_propose)


def settle(packing: Packing, packed: PackedStep, *counts: int) -> None:
    packing.packer.settle(packed, np.array(counts, np.int32))


def test_drafts_in_flight_count_until_they_fell() -> None:
    packing = Packing(10, 12)
    packing.sampled(0, 0)
    first, second = packing.sampled(3, 2), packing.sampled(1, 3)
    assert (first.starts.tolist(), first.least.tolist()) == ([11, 13], [11, 13])
    assert (second.starts.tolist(), second.least.tolist()) == ([15, 16], [12, 14])
    assert second.shape.context_lens == (16, 19)
    settle(packing, first, 1, 3)
    settle(packing, second, 2, 1)
    assert packing.slots.lengths[1:3].tolist() == [14, 17]
    assert packing.slots.computed[1:3].tolist() == [13, 16]
    third = packing.sampled(0, 0)
    assert third.starts.tolist() == third.least.tolist() == [14, 17]


def test_who_came_into_a_slot_owes_nothing_of_its_holder_before() -> None:
    packing = Packing(10)
    packing.sampled(0)
    old = packing.sampled(3)
    again = Admit(1, [7] * 5, 5, [[9]], Sampling(max_tokens=30))
    packing.pack([Row(1, 0, 5, sample=True)], release=[1], admit=[again])
    settle(packing, old, 1)
    new = packing.sampled(2)
    assert new.starts.tolist() == new.least.tolist() == [6]
    packing.pack([], release=[1])
    settle(packing, new, 1)
    assert packing.slots.lengths[1] == 0


def test_an_admission_drops_drafts_and_says_how_long_it_may_become() -> None:
    packing = Packing(4)
    state = packing.state
    state.drafts[:] = 9
    packed = packing.pack([], release=[1], admit=[Admit(1, [7] * 5, 5, [[9]], Sampling(max_tokens=30))])
    pairs = torch.from_numpy(packed.words[: 2 * packed.shape.pairs]).view(2, -1)
    scatter_words(state, pairs[0].contiguous(), pairs[1].contiguous())
    assert [int(words[1]) for words in (state.drafts, state.limits, state.lengths)] == [0, 35, 5]
    assert int(state.drafts[2]) == 9


@pytest.mark.parametrize(
    ("lengths", "drafts", "captured", "laid"),
    [
        ((10, 12), (0, 0), 2, 1),
        ((10, 12), (3, 3), 2, 4),
        ((10, 12), (3, 0), 2, 4),
        ((10,), (1,), 2, 4),
        ((10, 12, 9), (0, 1, 2), 4, 4),
        ((10, 2), (3, 0), 0, 1),  # the second has not as many positions as are laid out
        ((10, 3), (3, 0), 2, 4),
    ],
)
def test_the_shape_that_a_step_runs_as(
    lengths: tuple[int, ...], drafts: tuple[int, ...], captured: int, laid: int
) -> None:
    packing = Packing(*lengths)
    packing.sampled(*[0] * len(lengths))
    packed = packing.sampled(*drafts)
    shape = packed.shape
    assert (shape.captured, shape.laid) == (captured, laid)
    if captured:
        assert (shape.rows, shape.tokens, shape.outputs) == (captured, captured * laid, captured * laid)
    else:
        assert (shape.tokens, shape.outputs) == (sum(drafts) + len(drafts), sum(drafts) + len(drafts))
    ends = [place for i, count in enumerate(drafts) for place in range(laid * (i + 1) - 1 - count, laid * (i + 1))]
    assert packed.outputs.tolist() == (ends if captured else list(range(shape.outputs)))


def test_lengths_that_may_be_less_are_not_relied_upon() -> None:
    """What is known at least is what may be computed a second time."""
    packing = Packing(1, 10)
    packing.pack([Row(1, 0, 1, sample=True), Row(2, -1, 1, sample=True)])
    first = packing.sampled(2, 0)
    second = packing.sampled(0, 3)
    assert (second.least[0], second.starts[0], second.shape.captured) == (3, 5, 0)
    settle(packing, first, 1, 1)
    settle(packing, second, 1, 1)
    assert packing.sampled(0, 3).shape.laid == 4


def test_nobody_has_drafts_that_were_not_proposed_or_have_no_room() -> None:
    packing = Packing(10, 12, 37)
    assert packing.sampled(2, 2, 0, num_propose=2).inputs.num_drafts.tolist() == [0, 0, 0]
    rows = [Row(1, -1, 3, 3, sample=True, append_token_ids=[5, 6]), Row(2, -1, 1, 3, sample=True, masked=True)]
    packed = packing.pack([*rows, Row(3, -1, 1, 3, sample=True)])
    assert packed.inputs.num_drafts.tolist() == [0, 0, 1]


def test_drafts_without_blocks_are_refused() -> None:
    packing = Packing(14, blocks=2)
    packing.sampled(0)
    with pytest.raises(SlotError, match=r"slot 1 cannot compute positions 14\.\.14 and 2 drafts and sample"):
        packing.sampled(2)

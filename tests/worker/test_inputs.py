from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Admit, Epoch, Row, Sampling, StepPlan
from worker_svc.inputs import StepInputs, build_inputs
from worker_svc.slots import SlotError, SlotTable

BLOCK = 4
LENGTH = 32


def table(*lengths: int, prompt_logprobs: int = -1, blocks: int = LENGTH // BLOCK) -> SlotTable:
    """Slot i + 1 holds lengths[i] tokens, 100 (i + 1) + position; all but the last are its prompt."""
    slots = SlotTable(
        max_slots=len(lengths), max_model_len=LENGTH, block_size=BLOCK, num_blocks=1 + len(lengths) * 8, vocab_size=999
    )
    admit = [
        Admit(
            slot=i + 1,
            token_ids=[100 * (i + 1) + position for position in range(length)],
            prompt_len=max(length - 1, 1),
            block_ids=[[1 + i + len(lengths) * b for b in range(blocks)]],
            sampling=Sampling(max_tokens=9, prompt_logprobs=prompt_logprobs),
        )
        for i, length in enumerate(lengths)
    ]
    slots.apply(StepPlan(Epoch(1, 1), 1, [], admit, [], []))
    return slots


def inputs(slots: SlotTable, *rows: Row) -> StepInputs:
    plan = StepPlan(Epoch(1, 1), 1, [], [], [], list(rows))
    slots.apply(plan)
    return build_inputs(plan, slots)


def test_rows_become_flat_arrays() -> None:
    slots = table(5, 9, 3)
    step = inputs(slots, Row(2, 4, 5, sample=True), Row(1, 0, 3), Row(3, 2, 1, sample=True))
    assert step.slots.tolist() == [2, 1, 3]
    assert step.cu.tolist() == [0, 5, 8, 9]
    assert step.context_lens.tolist() == [9, 3, 3]
    assert step.token_ids.tolist() == [204, 205, 206, 207, 208, 100, 101, 102, 302]
    assert step.positions.tolist() == [4, 5, 6, 7, 8, 0, 1, 2, 2]
    # Slot 2 has the blocks 2, 5, 8 …, slot 1 the blocks 1, 4, 7 …, slot 3 the blocks 3, 6, 9 …
    assert step.slot_mapping.tolist() == [20, 21, 22, 23, 32, 4, 5, 6, 14]
    assert step.block_tables.tolist() == [[2, 5, 8], [1, 4, 7], [3, 6, 9]]
    assert step.sample_rows.tolist() == [0, 2]
    assert step.sample_tokens.tolist() == [4, 8]
    assert step.adapters is None
    others = StepInputs.__dataclass_fields__.keys() - {"adapters"}
    assert all(getattr(step, name).dtype == np.int64 for name in others)


def test_adapters_are_told_where_a_row_has_one() -> None:
    loaded: dict[str, int] = {}
    slots = SlotTable(max_slots=3, max_model_len=16, block_size=4, num_blocks=9, vocab_size=9, adapters=loaded)
    loaded |= {"one": 2, "other": 1}  # as time goes by
    admits = [
        Admit(slot, [1, 2], 2, [[slot]], Sampling(4), adapter=name) for slot, name in enumerate(("one", "", "other"), 1)
    ]
    slots.apply(StepPlan(Epoch(1, 1), 1, [], admits, [], []))
    adapters = inputs(slots, Row(3, 0, 1), Row(2, 0, 1), Row(1, 0, 1)).adapters
    assert adapters is not None
    assert adapters.tolist() == [1, 0, 2]
    assert adapters.dtype == np.int32
    assert inputs(slots, Row(2, 1, 1)).adapters is None


def test_tables_are_padded_with_the_null_block() -> None:
    slots = table(4, 9, blocks=1)
    slots.apply(StepPlan(Epoch(1, 1), 1, [], [], [], [Row(2, 0, 1, new_block_ids=[[11, 12]])]))
    assert inputs(slots, Row(1, 0, 4), Row(2, 0, 9)).block_tables.tolist() == [[1, 0, 0], [2, 11, 12]]


def test_minus_one_goes_on_where_the_slot_stands() -> None:
    slots = table(5)
    inputs(slots, Row(1, 2, 3, sample=True))
    slots.append(1, [7])
    step = inputs(slots, Row(1, -1, 1, sample=True))
    assert (step.token_ids.tolist(), step.positions.tolist(), step.context_lens.tolist()) == ([7], [5], [6])
    slots.append(1, [8])
    assert inputs(slots, Row(1, 6, 1, sample=True)).token_ids.tolist() == [8]


def test_minus_one_computes_no_more_than_is_there() -> None:
    """num_tokens is a maximum: rejected drafts leave less than the scheduler planned for."""
    slots = table(5)
    inputs(slots, Row(1, 0, 5, sample=True))
    slots.append(1, [7])
    step = inputs(slots, Row(1, -1, 4, sample=True))
    assert step.cu.tolist() == [0, 1]
    assert slots.computed[1] == 6


def test_forced_tokens_are_computed_in_the_same_step() -> None:
    slots = table(5)
    step = inputs(slots, Row(1, 4, 3, append_token_ids=[50, 60], sample=True))
    assert step.token_ids.tolist() == [104, 50, 60]
    assert step.sample_tokens.tolist() == [2]


def test_prompt_logprobs_score_prompt_tokens_only() -> None:
    slots = table(6, prompt_logprobs=0)  # prompt_len 5: positions 1..4 are scored, by the logits at 0..3
    first = inputs(slots, Row(1, 0, 2))
    assert (first.prompt_logprob_rows.tolist(), first.prompt_logprob_tokens.tolist()) == ([0, 0], [0, 1])
    second = inputs(slots, Row(1, 2, 4, sample=True))
    assert second.prompt_logprob_tokens.tolist() == [0, 1]
    assert table(6).held(1).prompt_logprobs == -1
    assert inputs(table(6), Row(1, 0, 6)).prompt_logprob_tokens.tolist() == []


def test_a_plan_without_rows() -> None:
    step = inputs(table(5))
    assert step.cu.tolist() == [0]
    assert step.block_tables.shape == (0, 0)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Row(1, -1, 1)], "none yet"),
        ([Row(1, 0, 0)], r"0\.\.-1"),
        ([Row(1, 0, 10)], "knows 9 tokens"),
        ([Row(1, 9, 1)], "knows 9 tokens"),
        ([Row(1, 0, 8, sample=True)], "and sample: it knows 9 tokens"),
        ([Row(1, 0, 4), Row(1, 5, 1)], "has computed 4"),
        ([Row(1, 0, 4), Row(1, 3, 1)], "has computed 4"),
        ([Row(1, 0, 9), Row(1, -1, 1)], "has computed 9"),
    ],
)
def test_a_row_that_contradicts_its_slot_is_refused(rows: list[Row], message: str) -> None:
    slots = table(9)
    for row in rows[:-1]:
        inputs(slots, row)
    before = slots.computed.copy()
    with pytest.raises(SlotError, match=message):
        inputs(slots, rows[-1])
    assert (slots.computed == before).all()


def test_a_position_without_a_block_is_refused() -> None:
    slots = table(9, blocks=2)
    inputs(slots, Row(1, 0, 8))
    with pytest.raises(SlotError, match="has blocks for 8"):
        inputs(slots, Row(1, -1, 1, sample=True))


@given(st.data())
def test_arrays_equal_a_row_by_row_reading(data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(1, LENGTH), min_size=1, max_size=5))
    slots = table(*lengths)
    rows = []
    for slot in data.draw(st.permutations(range(1, len(lengths) + 1))):
        start = data.draw(st.integers(0, lengths[slot - 1] - 1))
        end = data.draw(st.integers(start + 1, lengths[slot - 1]))
        rows.append(Row(slot, start, end - start, sample=end == lengths[slot - 1]))
    step = inputs(slots, *rows)
    for i, row in enumerate(rows):
        part = slice(int(step.cu[i]), int(step.cu[i + 1]))
        positions = list(range(row.start, row.start + row.num_tokens))
        assert step.positions[part].tolist() == positions
        assert step.token_ids[part].tolist() == [100 * row.slot + p for p in positions]
        blocks = [slots.block_tables[row.slot, p // BLOCK] for p in positions]
        assert step.slot_mapping[part].tolist() == [
            b * BLOCK + p % BLOCK for b, p in zip(blocks, positions, strict=True)
        ]
        assert step.context_lens[i] == positions[-1] + 1
    sampling = [i for i, row in enumerate(rows) if row.sample]
    assert step.sample_rows.tolist() == sampling
    assert step.sample_tokens.tolist() == [step.cu[i + 1] - 1 for i in sampling]

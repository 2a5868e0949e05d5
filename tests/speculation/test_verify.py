"""Drafts in a step's arrays, what of them stands, and what changes the logits behind each."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Row, RowResult, TokenLogprobs
from tests.speculation.tables import drafts, known, step, table
from worker_svc.logit_edits import LogitEditor, TokenCounts
from worker_svc.results import build_results
from worker_svc.slots import SlotError


def test_a_row_with_drafts_has_an_output_behind_each() -> None:
    slots = table([5, 6, 7], [8, 9], [1, 2, 3, 4, 5])
    slots.propose(1, [11, 12, 13])
    slots.propose(2, [14])
    _, inputs = step(slots, Row(1, -1, 1, 2, sample=True), Row(3, -1, 1, 2, sample=True), Row(2, -1, 1, 3, sample=True))
    assert inputs.token_ids.tolist() == [7, 11, 12, 5, 9, 14]
    assert inputs.positions.tolist() == [2, 3, 4, 4, 1, 2]
    assert inputs.context_lens.tolist() == [5, 5, 3]
    assert inputs.num_drafts.tolist() == [2, 0, 1]  # no more than are held
    assert inputs.sample_rows.tolist() == [0, 0, 0, 1, 2, 2]
    assert inputs.sample_tokens.tolist() == [0, 1, 2, 3, 4, 5]
    assert inputs.sample_positions.tolist() == [3, 4, 5, 5, 2, 3]


def test_drafts_without_blocks_are_refused() -> None:
    slots = table(range(10))
    slots.block_counts[1] = 3
    slots.propose(1, [1, 2, 3])
    with pytest.raises(SlotError, match=r"positions 9\.\.9 and 3 drafts and sample: .* has blocks for 12"):
        step(slots, Row(1, -1, 1, 3, sample=True))


def test_what_a_grammar_forces_takes_the_place_of_drafts() -> None:
    slots = table([5, 6, 7])
    slots.propose(1, [11, 12])
    _, inputs = step(slots, Row(1, -1, 2, 2, sample=True, append_token_ids=[20]))
    assert (inputs.token_ids.tolist(), inputs.num_drafts.tolist()) == ([7, 20], [0])


@given(st.data())
def test_results_are_what_one_token_after_the_other_gives(data: Any) -> None:
    """The target says one after what ends in …; drafts are of few tokens, so that many are right."""

    def target(slot: int, position: int, before: int) -> int:
        return (slot + position + before) % 3

    lengths = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    slots = table(*([1] * length for length in lengths))
    rows = []
    for slot in data.draw(st.permutations(range(1, len(lengths) + 1))):
        slots.propose(slot, data.draw(st.lists(st.integers(0, 2), max_size=5)))
        rows.append(Row(slot, -1, 1, data.draw(st.integers(0, 5)), sample=True))
    held = {row.slot: drafts(slots, row.slot)[: row.num_drafts] for row in rows}
    plan, inputs = step(slots, *rows)
    sampled = [
        target(slot, position, before)
        for slot, position, before in zip(
            inputs.sample_slots.tolist(), inputs.sample_positions.tolist(), inputs.token_ids.tolist(), strict=True
        )
    ]
    scores = [TokenLogprobs(token, -float(i), 1) for i, token in enumerate(sampled)]
    results = build_results(plan, inputs, slots, np.array(sampled), scores)
    for row, result in zip(rows, results, strict=True):
        history, length = [1] * lengths[row.slot - 1], lengths[row.slot - 1]
        while True:  # the oracle
            history.append(target(row.slot, len(history), history[-1]))
            at = len(history) - length - 1
            if at >= len(held[row.slot]) or held[row.slot][at] != history[-1]:
                break
        assert (result.slot, result.start, result.num_drafted) == (row.slot, length, len(held[row.slot]))
        assert result.token_ids == history[length:]
        assert [score.token_id for score in result.logprobs] == result.token_ids
        assert known(slots, row.slot) == history
        assert (slots.computed[row.slot], slots.drafts[row.slot]) == (len(history) - 1, 0)


def test_a_prompt_beside_drafts() -> None:
    slots = table([5, 6, 7], [1, 2, 3, 4, 5])
    slots.computed[2] = 1
    slots.propose(1, [11, 12])
    plan, inputs = step(slots, Row(2, 1, 2), Row(1, -1, 1, 2, sample=True))
    assert build_results(plan, inputs, slots, np.array([11, 30, 40]), [None] * 3) == [
        RowResult(2, 5, []),
        RowResult(1, 3, [11, 30], [], 2),
    ]
    assert slots.computed[[1, 2]].tolist() == [4, 3]


def test_edits_are_of_the_prefix_with_its_drafts() -> None:
    slots = table([7, 8, 1])
    slots.propose(1, [2, 9, 2])
    _, inputs = step(slots, Row(1, -1, 1, 3, sample=True))
    positions = inputs.sample_positions
    edits = LogitEditor(50).edits(slots, inputs.sample_slots, positions, None)
    assert edits is not None
    bans = [edits.ban_at[edits.ban_at // 50 == i] % 50 for i in range(4)]
    assert [ban.tolist() for ban in bans] == [[4], [3, 4], [4], [4]]  # (1, 2, 3) is banned behind 1 2
    counts = [
        dict(zip((edits.penalty_at[of] % 50).tolist(), edits.penalty_counts[of].tolist(), strict=True))
        for of in (edits.penalty_rows == i for i in range(4))
    ]
    base = {7: 0, 8: 1, 1: 1}
    assert counts == [base, base | {2: 1}, base | {2: 1, 9: 1}, base | {2: 2, 9: 1}]


def test_min_tokens_counts_drafts() -> None:
    slots = table([7, 8])
    slots.propose(1, [2, 3, 5])
    slots.sampling[1] = type(slots.held(1))(max_tokens=9, min_tokens=3, eos_token_ids=(40,))
    _, inputs = step(slots, Row(1, -1, 1, 3, sample=True))
    edits = LogitEditor(50).edits(slots, inputs.sample_slots, inputs.sample_positions, None)
    assert edits is not None
    assert edits.ban_at.tolist() == [40, 50 + 40]  # one token is in the output: two more before an end


@given(st.lists(st.integers(0, 5), max_size=20), st.integers(0, 20), st.lists(st.integers(0, 7), max_size=5))
def test_counts_after_drafts_are_those_of_all_tokens(tokens: list[int], prompt_len: int, ahead: list[int]) -> None:
    seen, whole = TokenCounts(), TokenCounts()
    seen.catch_up(np.array(tokens, np.int32), min(prompt_len, len(tokens)))
    whole.catch_up(np.array(tokens + ahead, np.int32), min(prompt_len, len(tokens)))
    distinct, counts = seen.after(ahead)
    assert (distinct.tolist(), counts.tolist()) == (whole.token_ids.tolist(), whole.counts.tolist())
    again = seen.after([])
    assert len(again[0]) == len(set(tokens))

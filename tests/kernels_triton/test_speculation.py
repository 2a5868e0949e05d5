"""Drafts on the device, beside what the host proposes and accepts (worker_svc/speculation)."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gpu import speculation
from kernels.gpu.slot_state import SlotState, append_tokens
from protos.wire import Row
from tests.kernels_triton.compare import DEVICE
from tests.speculation.tables import LENGTH, drafts, known, step, table
from worker_svc.results import build_results
from worker_svc.slots import SlotTable
from worker_svc.speculation import ngram
from worker_svc.speculation.ngram import NgramProposer


def words(values: object) -> Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.int32, device=DEVICE)


def mirrored(slots: SlotTable) -> SlotState:
    """The same slots on the device, with rubbish behind their tokens."""
    state = SlotState.empty(slots.max_slots, slots.max_model_len, 1, torch.device(DEVICE))
    state.token_ids.copy_(words(slots.token_ids))
    for name in ("lengths", "computed", "limits", "drafts"):
        getattr(state, name).copy_(words(getattr(slots, name)))
    behind = torch.arange(slots.max_model_len, device=DEVICE) >= (state.lengths + state.drafts)[:, None]
    state.token_ids[behind] = 3
    return state


def on_the_device(slots: SlotTable, ids: list[int], most: list[int]) -> list[list[int]]:
    """A null row, and one that is not asked about, beside those."""
    state = mirrored(slots)
    rows = words([*range(1, len(ids) + 1), 0])
    speculation.propose(state, words([0, *ids, 1]), rows, words([*most, 5]), max(*most, 5))
    ends = (state.lengths + state.drafts).tolist()
    return [state.token_ids[slot, state.lengths[slot] : ends[slot]].tolist() for slot in ids]


def by_the_host(slots: SlotTable, ids: list[int], most: list[int]) -> list[list[int]]:
    inputs = step(slots, *(Row(slot, -1, 1, sample=True) for slot in ids))[1]
    NgramProposer().propose(inputs, slots, np.minimum(most, slots.limits[ids] - slots.lengths[ids] - 1).clip(0))
    return [drafts(slots, slot) for slot in ids]


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=60), st.integers(0, 9)), min_size=1, max_size=4
    ),
    st.integers(1, LENGTH),
)
def test_what_is_proposed_is_what_the_host_proposes(each: list[tuple[list[int], int]], limit: int) -> None:
    histories, most = [history for history, _ in each], [wanted for _, wanted in each]
    slots = table(*histories)
    ids = list(range(1, len(histories) + 1))
    slots.limits[1] = max(limit, len(histories[0]))
    assert on_the_device(slots, ids, most) == by_the_host(slots, ids, most)


@pytest.mark.parametrize("seed", range(4))
def test_who_is_longer_forgets_what_came_before(seed: int) -> None:
    """Matches of every length, in several programs' parts, and one before the last LATEST tokens."""
    rng, longest = random.Random(seed), ngram.LATEST + 700
    assert (speculation.LEAST, speculation.LONGEST, speculation.LATEST) == (ngram.LEAST, ngram.MOST, ngram.LATEST)
    slots = SlotTable(max_slots=3, max_model_len=longest + 9, block_size=64, num_blocks=9, vocab_size=10**6)
    for slot, length in ((1, longest), (2, ngram.LATEST), (3, 2000)):
        history = rng.sample(range(10**6), length)
        for place in (1, 500, 699 + 4, 699 + 9, 1500, length - 9):
            if slot == 1 or place > 1000:
                size = rng.randint(1, 9)
                history[max(0, place - size) : place] = history[-size:][-place:]
        slots.token_ids[slot, :length] = history
        slots.lengths[slot], slots.limits[slot], slots.computed[slot] = length, longest + 9, length - 1
        slots.block_counts[slot] = 100
    ids, most = [1, 2, 3], [8, 3, 5]
    ours = on_the_device(slots, ids, most)
    limits = np.minimum(most, slots.limits[ids] - slots.lengths[ids] - 1)
    inputs = step(table([1], [1], [1]), *(Row(slot, -1, 1, sample=True) for slot in ids))[1]
    NgramProposer().propose(inputs, slots, limits)
    assert ours == [drafts(slots, slot) for slot in ids]
    assert any(ours)


def test_a_match_is_as_long_as_what_is_known_of_it() -> None:
    """The last eight tokens came before, but for five of them too long ago; of a later match there are six."""
    length = ngram.LATEST + 50
    history = list(range(100, 100 + length))
    history[45:53] = history[-8:]  # of which 50 … 52 are among the last LATEST
    history[994:1000] = history[-6:]
    slots = SlotTable(max_slots=1, max_model_len=length + 9, block_size=64, num_blocks=9, vocab_size=10**6)
    slots.token_ids[1, :length] = history
    slots.lengths[1], slots.limits[1] = length, length + 9
    assert on_the_device(slots, [1], [3]) == [history[1000:1003]]


@settings(max_examples=40)
@given(st.data())
def test_what_stands_is_what_the_host_accepts(data: st.DataObject) -> None:
    """All right, some, none; fewer held than laid out; outputs that are nobody's before a row's own."""
    histories = data.draw(st.lists(st.lists(st.just(1), min_size=1, max_size=LENGTH - 7), min_size=1, max_size=4))
    slots = table(*histories)
    rows = []
    for slot in data.draw(st.permutations(range(1, len(histories) + 1))):
        slots.propose(slot, data.draw(st.lists(st.integers(0, 1), max_size=5)))
        rows.append(Row(slot, -1, 1, data.draw(st.integers(0, 5)), sample=True))
    state = mirrored(slots)
    asked, spare = [row.num_drafts for row in rows], data.draw(st.integers(0, 2))
    ends = np.cumsum([1 + drafts + spare for drafts in asked])
    sampled = data.draw(st.lists(st.integers(0, 1), min_size=int(ends[-1]), max_size=int(ends[-1])))
    outcome = words(np.full((3, len(rows)), 77))
    speculation.verify(
        state, words([0, *(row.slot for row in rows)]), words([0, *asked]), words(range(1, len(rows) + 1)), words(ends),
        words(sampled), outcome, 5,
    )  # fmt: skip
    plan, inputs = step(slots, *rows)
    own = [
        sampled[end - 1 - most :][: 1 + held] for end, most, held in zip(ends, asked, inputs.num_drafts, strict=True)
    ]
    results = build_results(plan, inputs, slots, np.concatenate(own), [None] * sum(map(len, own)))
    assert outcome.T.tolist() == [[each.start, len(each.token_ids), each.num_drafted] for each in results]
    for row in rows:
        length = int(slots.lengths[row.slot])
        assert state.lengths[row.slot] == length
        assert state.computed[row.slot] == slots.computed[row.slot] == length - 1
        assert state.token_ids[row.slot, :length].tolist() == known(slots, row.slot)
        assert state.drafts[row.slot] == 0


def test_null_rows_are_given_nothing() -> None:
    slots = table([1, 2, 3])
    state = mirrored(slots)
    before, outcome = state.words.clone(), words(np.full((3, 2), 77))
    zeros = words([0, 0])
    speculation.verify(state, zeros, zeros, zeros, words([1, 2]), words([4, 5]), outcome, 3)
    speculation.propose(state, zeros, zeros, words([3, 3]), 3)
    assert torch.equal(state.words, before)
    assert not outcome.any()


def test_forced_tokens_take_the_place_of_drafts() -> None:
    slots = table([1, 2, 3])
    slots.propose(1, [4, 5])
    state = mirrored(slots)
    append_tokens(state, words([1]), words([[9]]), words([1]))
    assert (int(state.lengths[1]), int(state.drafts[1])) == (4, 0)


def test_what_does_not_fit_is_named() -> None:
    state, one = mirrored(table([1])), words([1])
    with pytest.raises(ValueError, match="ends has shape"):
        speculation.verify(state, one, one, one, words([1, 2]), one, words([[0]] * 3), 1)
    with pytest.raises(ValueError, match="wanted has shape"):
        speculation.propose(state, one, one, words([1, 2]), 1)

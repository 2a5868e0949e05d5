"""What prompt lookup and suffix decoding propose, and of whom they know."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Admit, Epoch, Row, Sampling, StepPlan
from tests.speculation.tables import LENGTH, admit, drafts, known, step, table
from worker_svc.slots import SlotTable
from worker_svc.speculation import suffix
from worker_svc.speculation.base import Proposer, propose, release
from worker_svc.speculation.ngram import LEAST, MOST, NgramProposer
from worker_svc.speculation.suffix import SuffixProposer


def proposed(proposer: Proposer, slots: SlotTable, *ids: int) -> list[list[int]]:
    """Four drafts of each, where there are any."""
    plan, inputs = step(slots, *(Row(slot, -1, 1, sample=True) for slot in ids))
    slots.computed[list(ids)] -= 1  # as if nothing had been sampled
    propose(proposer, plan, inputs, slots)
    return [drafts(slots, slot) for slot in ids]


def longest_latest(tokens: list[int], most: int) -> list[int]:
    """The oracle of prompt lookup."""
    for length in range(min(MOST, len(tokens) - 1), LEAST - 1, -1):
        for begin in range(len(tokens) - length - 1, -1, -1):
            if tokens[begin : begin + length] == tokens[-length:]:
                after = tokens[begin + length :]
                return (after * most)[:most]
    return []


@given(st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=40), min_size=1, max_size=5))
def test_the_latest_of_the_longest_matches(histories: list[list[int]]) -> None:
    slots = table(*histories)
    got = proposed(NgramProposer(), slots, *range(1, len(histories) + 1))
    assert got == [longest_latest(history, 4) for history in histories]


def test_nobody_drafts_beyond_its_last_token_but_one() -> None:
    slots = table([1, 2, 3] * 3, [1, 2, 3] * 3, [1, 2, 3] * 3)
    slots.limits[[1, 2, 3]] = 12, 10, 9
    assert [len(made) for made in proposed(NgramProposer(), slots, 1, 2, 3)] == [2, 0, 0]


@pytest.mark.parametrize("proposer", [NgramProposer(), SuffixProposer()])
def test_who_is_masked_or_in_a_prompt_gets_none(proposer: Proposer) -> None:
    slots = table([1, 2, 3] * 3, [1, 2, 3] * 3)
    slots.computed[2] = 2
    plan, inputs = step(slots, Row(1, -1, 1, sample=True, masked=True), Row(2, 2, 3))
    propose(proposer, plan, inputs, slots)
    assert slots.drafts.sum() == 0


def test_the_most_frequent_continuation() -> None:
    slots = table([5, 6, 1, 5, 6, 2, 9, 5, 6, 3, 5, 6, 2, 8, 7, 5, 6])
    assert proposed(SuffixProposer(), slots, 1) == [[2, 8, 7, 5]]  # 9 as often as 8, but earlier


def test_a_continuation_that_is_unlikely_is_left_out() -> None:
    slots = table([token for after in range(12, 24) for token in (5, 6, after)] + [5, 6])
    assert proposed(SuffixProposer(), slots, 1) == [[]]  # each once of twelve times


def test_drafts_are_as_many_as_the_match_is_long() -> None:
    slots = table([5, 1, 2, 30, 31, 32, 33, 34, 35, 6, 1, 2])
    inputs = step(slots, Row(1, -1, 1, sample=True))[1]
    SuffixProposer().propose(inputs, slots, np.array([40]))
    assert slots.drafts[1] == suffix.FACTOR * 2


def test_earlier_outputs_of_the_same_domain_alone() -> None:
    proposer, domains = SuffixProposer(), [b"a", b"a", b"b"]
    slots = table([0, 21, 22, 23, 24, 25], [0, 21, 22], [0, 21, 22], domains=domains)
    assert proposed(proposer, slots, 2, 3) == [[], []]
    leaving = StepPlan(Epoch(1, 1), 2, [1], [], [], [])
    release(proposer, leaving, slots)
    slots.apply(leaving)
    assert proposed(proposer, slots, 2, 3) == [[23, 24, 25], []]


def test_one_output_does_not_go_on_in_the_next() -> None:
    proposer = SuffixProposer()
    slots = table([0, 21, 22, 23], [0, 31, 32, 33], [0, 21, 22])
    for slot in (1, 2):
        release(proposer, StepPlan(Epoch(1, 1), 2, [slot], [], [], []), slots)
    assert proposed(proposer, slots, 3) == [[23]]


def test_a_slot_is_known_by_its_holder() -> None:
    proposer = SuffixProposer()
    slots = table([1, 2, 3, 4, 1, 2])
    assert proposed(proposer, slots, 1) == [[3, 4, 1, 2]]
    leaving = StepPlan(Epoch(1, 1), 2, [1], [], [], [])
    release(proposer, leaving, slots)
    slots.apply(leaving)
    admit(slots, [9, 9, 9, 1, 2], domains=[b"another"])
    assert proposed(proposer, slots, 1) == [[]]


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "DOMAIN_TOKENS", 200)
    monkeypatch.setattr(suffix, "ALL_TOKENS", 1000)
    proposer, rng = SuffixProposer(), np.random.default_rng(0)
    slots = table([1])
    for i in range(400):
        leaving = StepPlan(Epoch(1, 1), 2, [1], [], [], [])
        release(proposer, leaving, slots)
        slots.apply(leaving)
        admit(slots, rng.integers(0, 50, LENGTH - 1).tolist(), domains=[b"%d" % (i // 7)])
        sizes = [len(domain) for domain in proposer._domains.values()]
        assert max(sizes) <= 200
        assert sum(sizes) == proposer._size <= 1000
    assert len(proposer._domains) > 1


@given(st.data())
def test_the_store_is_a_cache_that_never_fails(data: Any) -> None:
    """Slots come, grow and go in any order."""
    proposer, slots = SuffixProposer(), table()
    held: set[int] = set()
    for _ in range(data.draw(st.integers(1, 25))):
        slot = data.draw(st.integers(1, 4))
        tokens = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
        if slot not in held:
            held.add(slot)
            blocks = [list(range(1 + slot * 16, 17 + slot * 16))]
            domain = data.draw(st.sampled_from([b"", b"x"]))
            new = Admit(slot, tokens, 1, blocks, Sampling(max_tokens=LENGTH), domain=domain)
            slots.apply(StepPlan(Epoch(1, 1), 1, [], [new], [], []))
            slots.computed[slot] = len(tokens) - 1
        elif data.draw(st.booleans()) or slots.lengths[slot] > 40:
            held.remove(slot)
            leaving = StepPlan(Epoch(1, 1), 2, [slot], [], [], [])
            release(proposer, leaving, slots)
            slots.apply(leaving)
        else:
            slots.append(slot, tokens)
            slots.computed[slot] = slots.lengths[slot] - 1
            before = known(slots, slot)
            (made,) = proposed(proposer, slots, slot)
            assert len(made) <= 4
            assert suffix.GAP not in made
            assert known(slots, slot) == before

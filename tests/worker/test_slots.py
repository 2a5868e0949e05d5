from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Admit, Epoch, Row, Sampling, StepPlan
from worker_svc.slots import SlotError, SlotTable

EPOCH = Epoch(1, 1)


def table(**changes: int) -> SlotTable:
    sizes: dict[str, Any] = {"max_slots": 3, "max_model_len": 10, "block_size": 4, "num_blocks": 9, "vocab_size": 100}
    return SlotTable(**(sizes | changes))


def plan(
    *, release: tuple[int, ...] = (), admit: tuple[Admit, ...] = (), rows: tuple[Row, ...] = (), **more: Any
) -> StepPlan:
    return StepPlan(EPOCH, 1, list(release), list(admit), more.pop("copies", []), list(rows), **more)


def entrant(slot: int = 1, tokens: int = 5, blocks: tuple[int, ...] = (3, 5), **changes: Any) -> Admit:
    fields: dict[str, Any] = {
        "slot": slot,
        "token_ids": list(range(10, 10 + tokens)),
        "prompt_len": min(tokens, 4),
        "block_ids": [list(blocks)],
        "sampling": Sampling(max_tokens=4),
    }
    return Admit(**(fields | changes))


def test_an_admit_is_all_that_a_slot_needs() -> None:
    slots = table()
    sampling = Sampling(max_tokens=4, seed=(1 << 64) - 1, temperature=0.5, top_k=7, top_p=0.25, min_tokens=2)
    slots.apply(plan(admit=(entrant(sampling=sampling),)))
    assert slots.token_ids[1].tolist() == [10, 11, 12, 13, 14, 0, 0, 0, 0, 0]
    assert (slots.lengths[1], slots.prompt_lens[1], slots.computed[1]) == (5, 4, -1)
    assert slots.block_tables[1].tolist() == [3, 5, 0]
    assert slots.output_ids(1).tolist() == [14]
    assert slots.held(1) is sampling
    params = slots.params[1]
    assert (params["seed"], params["temperature"], params["top_k"]) == ((1 << 64) - 1, 0.5, 7)
    assert (params["top_p"], params["min_tokens"]) == (0.25, 2)


def test_a_released_slot_is_as_new_and_may_be_admitted_in_the_same_plan() -> None:
    slots = table()
    slots.apply(plan(admit=(entrant(),)))
    before = int(slots.admissions[1])
    slots.apply(plan(release=(1,), admit=(entrant(tokens=2, blocks=(8,)),)))
    assert slots.block_tables[1].tolist() == [8, 0, 0]
    assert slots.lengths[1] == 2
    assert slots.admissions[1] != before


def test_rows_bring_blocks_and_forced_tokens() -> None:
    slots = table()
    slots.apply(plan(admit=(entrant(),)))
    slots.apply(plan(rows=(Row(1, 0, 5, new_block_ids=[[7]], append_token_ids=[42, 43]),)))
    assert slots.block_tables[1].tolist() == [3, 5, 7]
    assert slots.token_ids[1, :8].tolist() == [10, 11, 12, 13, 14, 42, 43, 0]


def test_append_answers_with_the_length_before() -> None:
    slots = table()
    slots.apply(plan(admit=(entrant(),)))
    assert slots.append(1, [99]) == 5
    assert slots.append(1, []) == 6
    assert slots.lengths[1] == 6


def test_reset_forgets_everything() -> None:
    slots = table()
    slots.apply(plan(admit=(entrant(),)))
    slots.reset()
    assert slots.sampling == [None] * 4
    assert not slots.token_ids.any()
    assert not slots.block_tables.any()


REFUSED = {
    "release of a free slot": (plan(release=(2,)), "slot 2 is not admitted"),
    "release of the null slot": (plan(release=(0,)), "slot 0 is not admitted"),
    "release past the table": (plan(release=(4,)), "slot 4 is not admitted"),
    "admit to the null slot": (plan(admit=(entrant(0),)), "slot 0 is not in 1..3"),
    "admit past the table": (plan(admit=(entrant(4),)), "slot 4 is not in 1..3"),
    "admit to a slot in use": (plan(admit=(entrant(1),)), "slot 1 is admitted twice"),
    "admit without tokens": (plan(admit=(entrant(2, tokens=0),)), "prompt_len 0 of 0 tokens"),
    "prompt longer than tokens": (plan(admit=(entrant(2, prompt_len=6),)), "prompt_len 6 of 5 tokens"),
    "too many tokens": (plan(admit=(entrant(2, tokens=11),)), "11 tokens, more than max_model_len 10"),
    "a token past the vocabulary": (plan(admit=(entrant(2, token_ids=[5, 100], prompt_len=1),)), "token 100"),
    "a negative token": (plan(admit=(entrant(2, token_ids=[-1, 5], prompt_len=1),)), "token -1"),
    "the null block": (plan(admit=(entrant(2, blocks=(0,)),)), r"blocks 0..0, where 1..8"),
    "a block past the pool": (plan(admit=(entrant(2, blocks=(1, 9)),)), r"blocks 1..9, where 1..8"),
    "more blocks than positions": (plan(admit=(entrant(2, blocks=(1, 2, 3, 4)),)), "4 blocks"),
    "two KV groups": (plan(admit=(entrant(2, block_ids=[[1], [2]]),)), "2 KV groups"),
    "an adapter": (plan(admit=(entrant(2, adapter="x"),)), "adapter 'x'"),
    "a seed of 65 bits": (plan(admit=(entrant(2, sampling=Sampling(4, seed=1 << 64)),)), "seed"),
    "a row of a free slot": (plan(rows=(Row(3, 0, 1),)), "slot 3 is not admitted"),
    "two rows of a slot": (plan(rows=(Row(1, 0, 1), Row(1, 1, 1))), "two rows for slot 1"),
    "forced tokens past the end": (plan(rows=(Row(1, 0, 1, append_token_ids=[1] * 6),)), "11 tokens"),
    "a forced token past the vocabulary": (plan(rows=(Row(1, 0, 1, append_token_ids=[100]),)), "token 100"),
    "copies": (plan(copies=[(0, 1, 2)]), "copies"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_plan_that_contradicts_the_table_is_refused(name: str) -> None:
    bad, message = REFUSED[name]
    slots = table()
    slots.apply(plan(admit=(entrant(1),)))
    with pytest.raises(SlotError, match=message):
        slots.apply(bad)


@given(st.lists(st.tuples(st.sampled_from(["admit", "append", "release"]), st.integers(1, 3)), max_size=40))
def test_the_table_equals_a_dictionary_of_lists(moves: list[tuple[str, int]]) -> None:
    slots = table()
    model: dict[int, list[int]] = {}
    for i, (move, slot) in enumerate(moves):
        if move == "admit" and slot not in model:
            tokens = [(i + n) % 100 for n in range(i % 4 + 1)]
            slots.apply(plan(admit=(entrant(slot, token_ids=tokens, prompt_len=1, blocks=(i % 8 + 1,)),)))
            model[slot] = tokens
        elif move == "append" and slot in model and len(model[slot]) < 10:
            assert slots.append(slot, [i]) == len(model[slot])
            model[slot].append(i)
        elif move == "release" and slot in model:
            slots.apply(plan(release=(slot,)))
            del model[slot]
    for slot in (1, 2, 3):
        known = model.get(slot, [])
        assert slots.token_ids[slot, : slots.lengths[slot]].tolist() == known
        assert (slots.sampling[slot] is not None) == (slot in model)
        assert np.count_nonzero(slots.block_tables[slot]) == (slot in model)

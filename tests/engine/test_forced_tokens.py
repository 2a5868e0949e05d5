"""Tokens that a grammar forces need blocks all at once: whoever makes room for them has no row in the same plan."""

from __future__ import annotations

import random

import pytest

from protos.engine_wire import Grammar
from scheduler_svc.engine.config import EngineConfig
from tests.engine.world import VOCAB_SIZE, World, request
from tests.fakes import FakeGrammar

FORCING = [
    seed
    for seed in range(400)
    if FakeGrammar(seed).length > 12
    and any(len(FakeGrammar(seed).forced(count, VOCAB_SIZE)) > 3 for count in range(2, 12))
]


@pytest.mark.parametrize("seed", range(6))
def test_they_take_nothing_from_a_row_of_the_same_plan(seed: int) -> None:
    """World looks at every plan: no slot and no block of it is another's in a plan in flight, or in the same one."""
    choose = random.Random(seed)
    config = EngineConfig(block_size=2, max_num_seqs=6, max_step_tokens=40, depth=2, num_drafts=2)
    w = World(config, num_blocks=28)
    w.ready()
    for number in range(40):
        prompt = [choose.randrange(VOCAB_SIZE) for _ in range(choose.randrange(1, 8))]
        grammar = Grammar("regex", str(choose.choice(FORCING))) if number % 2 else None
        w.submit(request(f"r{number}", prompt, 16, seed=number, grammar=grammar))
        while w.compiling:
            w.compiled()
        w.land(choose.randrange(3))
    w.run()
    w.check_ends()
    assert any(row.append_token_ids for plan in w.plans for row in plan.rows)
    assert w.scheduler.stats().preemptions > 3


def test_they_leave_everybody_his_next_token() -> None:
    """However many they are, and in however small a step."""
    w = World(EngineConfig(block_size=2, max_num_seqs=6, max_step_tokens=6, depth=1))
    w.ready()
    for number in range(6):
        grammar = Grammar("regex", str(FORCING[0])) if number < 3 else None
        w.submit(request(f"r{number}", [number + 1], 16, seed=number, grammar=grammar))
        while w.compiling:
            w.compiled()
    w.run()
    w.check_ends()
    longest = max(len(row.append_token_ids) for plan in w.plans for row in plan.rows)
    assert longest > 3
    for slot in {row.slot for plan in w.plans for row in plan.rows if row.sample and not row.masked}:
        named = [i for i, plan in enumerate(w.plans) if any(row.slot == slot for row in plan.rows)]
        assert len(named) == 1 + named[-1] - named[0], "somebody waits for what another is forced to say"

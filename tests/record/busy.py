"""A busy run of an engine to record: shared prefixes, tenants, siblings, grammars, crashes, too few blocks."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace

from protos.engine_wire import FinishReason, Grammar
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.events import FlushCache
from tests.engine.world import VOCAB_SIZE, World, request
from tests.fakes import FakeGrammar

CONFIG = EngineConfig(
    block_size=4,
    max_num_seqs=6,
    max_step_tokens=40,
    depth=2,
    num_drafts=2,
    max_waiting=5,
    tenants=(Tenant("a", 3.0), Tenant("b", 1.0, 50.0, 300.0)),
)
GRAMMARS = [str(seed) for seed in range(100) if FakeGrammar(seed).length > 8]  # the others force next to nothing


def _submit(world: World, choose: random.Random, number: int) -> None:
    prompt = [choose.randrange(2)] * choose.randrange(1, 20) + [choose.randrange(VOCAB_SIZE) for _ in range(5)]
    resumed = choose.choice([0, 0, 0, 2])
    fields: dict[str, Any] = {
        "priority": choose.randrange(2),
        "cache_salt": choose.choice(["", "salt"]),
        "eos_token_ids": (2,),
        "stop_token_ids": choose.choice([(), (9, 17)]),
        "logprobs": choose.choice([-1, 0]),
        "prompt_logprobs": choose.choice([-1, -1, -1, 0]),
        "tenant": choose.choice(["", "a", "b", f"guest-{number % 5}"]),
        "deadline": world.now + 5.0 if choose.random() < 0.2 else 0.0,
    }
    if choose.random() < 0.5:
        fields |= {"grammar": Grammar("regex", choose.choice(GRAMMARS)), "logprobs": -1, "prompt_logprobs": -1}
    count = choose.choice([1, 1, 1, 3])
    for index in range(count):
        made = request(
            *(f"request-{number}", prompt + [3] * resumed, choose.randrange(3, 15)),
            **fields,
            seed=100 * index + number,
            index=index,
            num_siblings=count,
        )
        world.submit(replace(made, prompt_len=len(prompt)))


def run(seed: int, requests: int = 150, between: Callable[[World], None] = lambda world: None) -> World:
    """To its end, with every check of World; `between` is called after each request's turn."""
    choose = random.Random(seed)
    world = World(CONFIG, num_blocks=24, align=4, max_model_len=60, seconds=lambda positions: 0.01 + 0.001 * positions)
    world.ready()
    for number in range(requests):
        _submit(world, choose, number)
        world.land(choose.randrange(5))
        while world.compiling and choose.random() < 0.7:
            world.compiled(choose.choice([None, None, None, FinishReason.GRAMMAR]))
        if choose.random() < 0.1:
            world.abort(f"request-{choose.randrange(max(0, number - 3), number + 1)}", FinishReason.ABORTED)
        if choose.random() < 0.05:
            world.crash()
            world.ready()
        if choose.random() < 0.05:
            _settle(world)
            world.send(FlushCache())
        world.tick(0.05)
        between(world)
    _settle(world)
    world.check_ends()
    return world


def _settle(world: World) -> None:
    while world.compiling:
        world.compiled()
    world.run()

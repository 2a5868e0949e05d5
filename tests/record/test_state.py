"""An engine's state as bytes: exact, whole, and nothing but the engine's."""

from __future__ import annotations

import contextlib
import random
from array import array

import msgspec
import pytest

from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.engine.sequence import Sequence
from scheduler_svc.record_state import StateError, restore, snapshot
from tests.engine.world import World, request
from tests.record import busy


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_engine_made_from_its_state_answers_as_the_first_one_would(seed: int) -> None:
    """One takes over from the other all the time, so that whatever is lost on the way is lost for good."""
    world = busy.run(seed)
    stats = world.scheduler.stats()
    assert min(stats.preemptions, stats.recoveries, stats.cached_tokens, stats.rejected, stats.aborted) > 0
    engine = Scheduler(busy.CONFIG)
    for number, (event, answer) in enumerate(zip(world.log, world.answers, strict=True)):
        assert engine.handle(event) == answer
        if number % 7 == 0:
            state = snapshot(engine)
            engine = restore(state)
            engine.check_integrity()
            assert snapshot(engine) == state
    assert engine.stats() == stats


def test_what_is_shared_stays_shared() -> None:
    world = World(busy.CONFIG)
    world.submit(request("r", 8))
    engine = restore(snapshot(world.scheduler))
    (sequence,) = engine.roster.find("r")
    assert engine.roster.waiting.first() is sequence
    assert sequence.account is next(iter(engine.roster.ledger))
    assert sequence.token_ids == array("I", request("r", 8).token_ids)


def test_a_kind_of_value_that_is_not_known_is_an_error_and_never_left_out() -> None:
    engine = Scheduler(busy.CONFIG)
    engine.roster.told = lambda: None  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"holds a builtins\.function"):
        snapshot(engine)
    engine.roster.told = {1, 2}  # type: ignore[attr-defined]
    with pytest.raises(StateError, match=r"holds a builtins\.set"):
        snapshot(engine)
    engine.roster.told = 1 << 70  # type: ignore[attr-defined]
    with pytest.raises(StateError, match="cannot be written"):
        snapshot(engine)


def test_a_state_can_be_asked_to_hold_nobody() -> None:
    world = World(busy.CONFIG)
    snapshot(world.scheduler, without=Sequence)
    world.submit(request("r", 8))
    with pytest.raises(StateError, match="holds a Sequence"):
        snapshot(world.scheduler, without=Sequence)


@pytest.mark.parametrize("name", ["subprocess.Popen", "builtins.eval", "pathlib.Path", "scheduler_svc.record.Recorder"])
def test_no_class_but_the_engines_is_ever_made(name: str) -> None:
    for tag in "ime":
        forged = msgspec.msgpack.encode([[(name, [])], [tag, 0, "x"]])
        with pytest.raises(StateError, match="no state of this engine"):
            restore(forged)


def test_bytes_that_are_no_state_are_refused() -> None:
    good = snapshot(busy.run(1, requests=5).scheduler)
    choose = random.Random(0)
    bad = [b"", b"\xc1", msgspec.msgpack.encode([[], 3]), msgspec.msgpack.encode([[], ["z"]]), good[:-1]]
    for data in bad:
        with pytest.raises(StateError):
            restore(data)
    for _ in range(300):
        spoiled = bytearray(good)
        spoiled[choose.randrange(len(good))] ^= 1 << choose.randrange(8)
        with contextlib.suppress(StateError):  # or nothing: a number that is another number is a state, too
            restore(bytes(spoiled))

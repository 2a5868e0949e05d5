"""Several worker groups behind one engine: who goes where, what is one over all of them, and what is each one's own."""

from __future__ import annotations

from typing import Any

import pytest

from protos.engine_wire import FinishReason
from protos.wire import Epoch, StepPlan
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.engine.placement import SEQUENCE_COST
from scheduler_svc.engine.sequence import State
from tests.engine.crowd import Crowd, Party
from tests.engine.world import World, request

LONG = [(5 * i + 3) % 31 for i in range(160)]  # a prefix that is worth to be waited for: some SEQUENCE_COST
SHORT = LONG[:40]  # one that is not


def world(groups: int = 2, *, num_blocks: int = 64, ready: bool = True, **config: Any) -> World:
    defaults = {"block_size": 4, "max_num_seqs": 4, "max_step_tokens": 64}
    made = World(EngineConfig(**{**defaults, **config}), num_blocks=num_blocks, groups=groups)
    if ready:
        made.ready_all()
    return made


def group_of(w: World, request_id: str) -> int | None:
    """Where it runs, holds or leaves; None while it waits."""
    (sequence,) = w.scheduler.roster.find(request_id)
    return sequence.device.group if sequence.device else None


def running(w: World) -> list[int]:
    return [len(device.running) for device in w.scheduler.devices.values()]


# ---------------------------------------------------------------- placement


@pytest.mark.parametrize("groups", [2, 3])
def test_idle_groups_take_one_each_at_once(groups: int) -> None:
    w = world(groups)
    for i in range(groups):
        w.submit(request(f"r{i}", [i + 1] * 6, 30))
    assert running(w) == [1] * groups
    assert {plan.epoch for plan in w.plans} == {Epoch(1, 1 + group) for group in range(groups)}
    w.run()
    w.check_ends()


def test_a_burst_is_shared() -> None:
    w = world(max_num_seqs=16, max_step_tokens=256)
    for i in range(24):
        w.submit(request(f"r{i}", [i + 1] * 9, 40, seed=i))
    for _ in range(6):
        w.land(group=0)
        w.land(group=1)
    assert sum(running(w)) == 24
    assert max(running(w)) - min(running(w)) <= 2
    w.run()
    w.check_ends()


def busy(**config: Any) -> World:
    """Two groups with one stream each; the second has LONG in its cache, and both have a plan in flight."""
    w = world(max_num_seqs=8, max_step_tokens=16, num_blocks=128, **config)
    w.submit(request("elsewhere", [9] * 4, 60))
    w.submit(request("warm", LONG, 60))
    assert (group_of(w, "elsewhere"), group_of(w, "warm")) == (0, 1)
    w.land(12, group=1)
    return w


def test_a_prefix_is_found_where_it_is() -> None:
    w = busy()
    w.submit(request("r", [*LONG, 5], 4))
    w.run()
    assert w.streams["r", 0].deltas[0].cached_tokens == len(LONG)
    w.check_ends()


def test_a_prefix_is_computed_again_where_waiting_for_it_costs_more() -> None:
    """One more that runs beside it outweighs SHORT."""
    assert len(SHORT) < SEQUENCE_COST
    w = world(max_num_seqs=8)
    w.submit(request("first", SHORT, 2))
    w.run()
    w.submit(request("beside", [*SHORT, 1, 2], 60))
    assert group_of(w, "beside") == 0
    w.submit(request("away", [*SHORT, 3, 4], 60))
    assert group_of(w, "away") == 1
    w.run()
    assert w.streams["beside", 0].deltas[0].cached_tokens == len(SHORT)
    assert w.streams["away", 0].deltas[0].cached_tokens == 0
    w.check_ends()


def test_who_could_begin_now_is_not_kept_waiting_for_a_little() -> None:
    """The second group has 16 tokens of it, and a plan in flight; the first can begin."""
    w = busy()
    w.submit(request("r", [*LONG[:16], *[7] * 5], 60))
    w.land(group=0)
    assert group_of(w, "r") == 0
    w.run()
    w.check_ends()


def test_who_waits_for_a_busy_group_keeps_nobody_else_waiting() -> None:
    """The first in the queue is better off in a group that cannot plan now; the second goes into the other at once."""
    w = busy()
    w.submit(request("waits", [*LONG, 1], 8))
    w.submit(request("goes on", [8] * 5, 8))
    w.land(group=0)
    states = [(w.scheduler.roster.find(name)[0].state, group_of(w, name)) for name in ("waits", "goes on")]
    assert states == [(State.HOLDING, 1), (State.RUNNING, 0)]
    w.land(group=1)
    assert w.scheduler.roster.find("waits")[0].state is State.RUNNING
    w.run()
    assert w.streams["waits", 0].deltas[0].cached_tokens == len(LONG)
    w.check_ends()


def test_whoever_waits_for_a_group_goes_elsewhere_when_it_dies() -> None:
    w = busy()
    w.submit(request("waits", [*LONG, 1], 8))
    w.land(group=0)
    assert w.scheduler.roster.find("waits")[0].state is State.HOLDING
    w.crash(group=1)
    w.run()
    w.check_ends()


def test_an_abort_finds_whoever_waits_for_a_group() -> None:
    w = busy()
    w.submit(request("waits", [*LONG, 1], 8))
    w.land(group=0)
    assert w.scheduler.roster.find("waits")[0].state is State.HOLDING
    w.abort("waits")
    assert w.streams["waits", 0].reason is FinishReason.ABORTED
    w.run()
    w.check_ends()


def test_who_has_no_room_where_the_prefix_is_goes_where_there_is_some() -> None:
    w = world(num_blocks=80, max_num_seqs=2)
    w.submit(request("first", LONG, 2))
    w.run()
    w.submit(request("fills", [9] * 4, 150))
    w.submit(request("beside", [8] * 4, 20))
    assert (group_of(w, "fills"), group_of(w, "beside")) == (0, 1)
    w.land(130, group=0)
    w.submit(request("second", [*LONG, *[1] * 30], 10))
    w.land(group=1)
    assert group_of(w, "second") == 1
    w.run()
    w.check_ends()


# ---------------------------------------------------------------- each its own


def test_a_group_that_dies_hands_its_streams_to_the_other() -> None:
    w = world(depth=2)
    for i in range(6):
        w.submit(request(f"r{i}", [i + 1] * 6, 20, seed=i))
    w.land(3, group=0)
    w.land(3, group=1)
    assert all(running(w))
    plans = w.scheduler.devices[1].step
    w.crash(group=0)
    assert w.scheduler.stats().recoveries == 1
    assert w.scheduler.devices[1].step >= plans, "the other goes on"
    w.run()  # without the first
    w.check_ends()
    assert all(stream.reason is FinishReason.LENGTH for stream in w.streams.values())


def test_only_those_in_flight_in_the_dead_group_are_suspects() -> None:
    w = world(max_num_seqs=2)
    for i in range(4):
        w.submit(request(f"r{i}", [i + 1] * 6, 20, seed=i))
    for _ in range(3):
        w.land(group=0)
        w.land(group=1)
    there = [s.request_id for s in w.scheduler.devices[0].running]
    w.crash(group=0)
    deaths = {s.request_id: s.deaths for s in w.scheduler.roster}
    assert {name for name, count in deaths.items() if count} == set(there)
    w.run()
    w.check_ends()


def test_a_poisonous_request_fails_alone_and_the_other_group_serves_on() -> None:
    w = world(depth=2)
    for i in range(3):
        w.submit(request(f"r{i}", [i + 1] * 6, 30, seed=i))
    w.submit(request("poison", [9] * 6, 5))
    for _ in range(400):
        w.ready_all()
        for group, side in enumerate(w.sides):
            if not side.results:
                continue
            flight = w.scheduler.devices[group].sent[0]
            if any(s.request_id == "poison" and s.state is not State.FINISHED for s in flight.sequences):
                w.crash(group=group)
            else:
                w.land(group=group)
    assert w.crashes == 5
    assert w.streams["poison", 0].reason is FinishReason.ERROR
    assert [w.streams[f"r{i}", 0].reason for i in range(3)] == [FinishReason.LENGTH] * 3
    w.check_ends()


def test_epochs_are_compared_within_their_group() -> None:
    """A group that was slow to load is no echo of one that began later."""
    scheduler = world(ready=False).scheduler
    scheduler.handle(WorkerReady(Epoch(1, 5), 64, 8, group=1))
    scheduler.handle(WorkerReady(Epoch(1, 3), 64, 8, group=0))
    scheduler.handle(WorkerReady(Epoch(1, 2), 64, 8, group=0))
    assert {group: device.epoch for group, device in scheduler.devices.items()} == {0: Epoch(1, 3), 1: Epoch(1, 5)}


def test_the_smallest_group_limits_the_lengths() -> None:
    w = world(3, ready=False)
    w.ready(0)
    w.submit(request("fits", 100, 4))
    w.num_blocks = 16
    w.ready(1)
    w.num_blocks = 64
    w.ready(2)
    w.submit(request("does not", 100, 4))
    assert w.streams["fits", 0].reason is FinishReason.INVALID, "it might come into the smaller one"
    end = w.streams["does not", 0].end
    assert end
    assert "the 15 KV blocks of 4 tokens" in end.detail


# ---------------------------------------------------------------- one over all


def test_the_queue_is_one() -> None:
    w = world(max_num_seqs=1, max_waiting=2)
    for i in range(5):
        w.submit(request(f"r{i}", [i + 1] * 6, 20))
    assert running(w) == [1, 1]
    assert [w.streams[f"r{i}", 0].reason for i in range(5)] == [None] * 4 + [FinishReason.REJECTED]
    w.run()
    w.check_ends()


def test_a_quota_is_one() -> None:
    w = world(tenants=(Tenant("a", 1.0, 1.0, 10.0),))
    w.tick(0.1)
    for i in range(2):
        w.submit(request(f"r{i}", [i + 1] * 6, 4, tenant="a"))
    assert w.streams["r1", 0].reason is FinishReason.QUOTA
    w.run()
    w.check_ends()


def share(parties: list[Party], groups: int) -> float:
    config = EngineConfig(block_size=8, max_num_seqs=12, max_step_tokens=64, depth=2, long_step=12)
    crowd = Crowd(config, parties, groups=groups)
    crowd.run(2400)
    shares = [crowd.share("a", first, 800) for first in (400, 800, 1200, 1600)]
    assert max(shares) - min(shares) < 0.1
    return sum(shares) / len(shares)


@pytest.mark.parametrize("groups", [1, 2, 3])
def test_tenants_share_by_their_counters_over_groups_and_frontends(groups: int) -> None:
    """A tenant that asks through two frontends is no two tenants, nor is one whose streams run in two groups."""
    parties = [
        Party("a", 60, (5, 60), (5, 60), frontends=2),
        Party("b", 30, (40, 120), (40, 120)),
    ]
    assert 0.45 < share(parties, groups) < 0.55


def test_plans_of_all_groups_are_told_before_what_frontends_hear() -> None:
    w = world()
    w.submit(request("a", [1] * 6, 5))
    w.submit(request("b", [2] * 6, 5))
    kinds = [type(instruction) is StepPlan for answer in w.answers for instruction in answer]
    assert kinds == [True] * len(kinds)
    w.run()
    for answer in w.answers:
        kinds = [isinstance(instruction, StepPlan) for instruction in answer]
        assert kinds == sorted(kinds, reverse=True)

"""Deadlines: refused at once where they cannot be met, given up in the queue, and the estimates behind it."""

from __future__ import annotations

from typing import Any

import pytest

from protos.engine_wire import FinishReason, Outputs, Submit, TokenDelta
from protos.wire import Sampling
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.forecast import OUTLIER, Habit, Pace
from tests.engine.crowd import Crowd, Party
from tests.engine.world import World, request


def seconds(positions: int) -> float:
    return 0.1 + 0.01 * positions


def world(**fields: Any) -> World:
    defaults = {"block_size": 4, "max_num_seqs": 2, "max_step_tokens": 64}
    made = World(EngineConfig(**{**defaults, **fields}), num_blocks=200, seconds=seconds)
    made.tick(0.0)
    made.ready()
    return made


def learn(w: World) -> None:
    """Steps of two lengths, so that the pace is known exactly."""
    w.submit(request("learn", 20, 12))
    w.run()


def refuse(w: World, submit: Submit) -> TokenDelta:
    (outputs,) = (i for i in w.scheduler.handle(submit) if isinstance(i, Outputs))
    (delta,) = outputs.items
    return delta


# ---------------------------------------------------------------- at the door


def test_what_cannot_be_met_is_refused_with_the_estimate() -> None:
    w = world()
    learn(w)
    delta = refuse(w, request("r", 10, 21, deadline=w.now + 2.0))
    assert delta.finish_reason is FinishReason.DEADLINE
    assert delta.detail == (
        "the deadline in 2.00 s cannot be met: estimated are 0.00 s until it runs, then at least 2.40 s "
        "for 10 prompt and 21 output tokens"
    )
    assert w.scheduler.stats().rejected == 1
    w.submit(request("in time", 10, 21, deadline=w.now + 2.5))
    w.run()
    w.check_ends()
    assert w.streams["in time", 0].reason is FinishReason.LENGTH, "the estimate was right"


def test_what_a_resumed_stream_brings_is_not_estimated_again() -> None:
    """30 given tokens are computed like a prompt, and one more is made of the 21."""
    w = world()
    learn(w)
    resumed = Submit("r", [3] * 30, 10, request("x", 1, 21).sampling, deadline=w.now + 0.3)
    assert refuse(w, resumed).detail == (
        "the deadline in 0.30 s cannot be met: estimated are 0.00 s until it runs, then at least 0.40 s "
        "for 10 prompt and 1 output tokens"
    )
    w.submit(Submit("in time", [3] * 30, 10, resumed.sampling, deadline=w.now + 0.45))
    assert w.scheduler.roster.find("in time")[0].likely_tokens == 1
    w.run()
    w.check_ends()
    assert w.streams["in time", 0].reason is FinishReason.LENGTH, "the estimate was right"


def test_nothing_is_claimed_before_anything_is_known() -> None:
    w = world()
    w.submit(request("r", 10, 21, deadline=w.now + 0.01))
    w.run()
    w.check_ends()
    assert w.streams["r", 0].end is not None
    assert w.streams["r", 0].end.detail == "the deadline has passed"


def test_a_first_step_that_stalls_is_no_pace() -> None:
    """As the first of a service does that starts on a busy machine: those behind it have their time all the same."""
    w = world(max_num_seqs=1)
    w.seconds = lambda positions: 5.0
    w.submit(request("first", 10, 5))
    w.land(1)
    w.seconds = seconds
    w.submit(request("r", 10, 21, deadline=w.now + 20.0))
    w.run()
    w.check_ends()
    assert w.streams["r", 0].reason is FinishReason.LENGTH


def test_a_deadline_that_has_passed_is_refused() -> None:
    w = world()
    delta = refuse(w, request("r", deadline=w.now - 1))
    assert (delta.finish_reason, delta.detail) == (FinishReason.DEADLINE, "the deadline has passed")


def test_the_queue_ahead_is_counted() -> None:
    w = world()
    learn(w)
    for i in range(6):
        w.submit(request(f"r{i}", [i + 1] * 10, 21, seed=i))
    w.land()
    delta = refuse(w, request("late", 10, 2, deadline=w.now + 1.0))
    wait = float(delta.detail.split("estimated are ")[1].split(" s")[0])
    assert wait == pytest.approx(4 * (10 * 0.01 + 21 * (0.01 + 0.1 / 2)), abs=0.01), "four wait, two share a step"
    low = refuse(w, request("low", 10, 2, deadline=w.now + 1.0, priority=5))
    assert low.detail.split(" until")[0] == delta.detail.split(" until")[0], "all of better priority is before it"
    w.submit(request("high", 10, 2, deadline=w.now + 3.0, priority=-1))
    assert w.streams["high", 0].end is None, "those of worse priority are not before it"
    w.abort("high")
    w.run()
    w.check_ends()


def test_a_full_house_is_waited_for() -> None:
    w = world()
    learn(w)
    for i in range(2):
        w.submit(request(f"r{i}", [i + 1] * 10, 31 + 10 * i, seed=i))
    w.land(1)
    delta = refuse(w, request("late", 10, 2, deadline=w.now + 2.0))
    assert "estimated are 3.48 s until it runs" in delta.detail, "29 steps of two"
    w.submit(request("other", 10, 2, deadline=w.now + 2.0, tenant="other"))
    assert w.streams["other", 0].end is None, "a tenant with nothing need not wait for it"
    w.run()
    w.check_ends()


def test_those_who_follow_others_out_of_the_queue_take_time_for_their_prompts() -> None:
    w = world()
    learn(w)
    for i in range(6):
        w.submit(request(f"r{i}", [i + 1] * 10, 21, seed=i))
    w.land()
    assert w.scheduler.stats().waiting == 4
    delta = refuse(w, request("late", 10, 43, deadline=w.now + 1.0))
    service = float(delta.detail.split("at least ")[1].split(" s")[0])
    own = 0.1 + 10 * 0.01 + 42 * (0.1 + 3 * 0.01)
    followers = 42 / (4 * 21) * 40 * 0.01  # beside 42 tokens the other slot makes half of what the queue will
    assert service == pytest.approx(own + followers, abs=0.011)


def test_another_tenants_queue_counts_by_turns() -> None:
    """Of a long queue of others, only as much as is served before the tenant's own."""
    w = world(tenants=(Tenant("c", 0.5),))
    learn(w)
    for i in range(12):
        w.submit(request(f"r{i}", [i + 1] * 10, 21, seed=i, tenant="a"))
    w.submit(request("mine", [99 % 31] * 10, 21, seed=99, tenant="b"))
    w.submit(request("theirs", [98 % 31] * 10, 21, seed=98, tenant="c"))
    assert w.scheduler.stats().waiting == 13
    each = 10 * 0.01 + 21 * (0.01 + 0.1 / 2)
    waits = {}
    for tenant in ("b", "c"):
        delta = refuse(w, request("late", 10, 2, tenant=tenant, deadline=w.now + 0.5))
        waits[tenant] = float(delta.detail.split("estimated are ")[1].split(" s")[0]) / each
    assert waits["b"] == pytest.approx(1 + 1 + 0.5, abs=0.05)
    assert waits["c"] == pytest.approx(1 + 2 + 1, abs=0.05)
    w.run()
    w.check_ends()


# ---------------------------------------------------------------- in the queue


def test_what_becomes_hopeless_is_dropped_from_the_queue() -> None:
    w = world(max_num_seqs=1)
    learn(w)
    w.submit(request("long", 10, 60, stop_token_ids=(99,)))
    w.submit(request("r", [3] * 10, 10, deadline=w.now + 7.0))
    while w.streams["r", 0].end is None:
        w.land()
    end = w.streams["r", 0].end
    assert end.finish_reason is FinishReason.DEADLINE
    assert end.detail.startswith("given up in the queue: its deadline is in 1.")
    assert w.now < w.streams["r", 0].submit.deadline - 1.0, "as soon as it is known"
    assert w.streams["long", 0].end is None
    w.run()
    w.check_ends()


@pytest.mark.parametrize("lifetime", [2.0 + 0.07 * i for i in range(30)])
def test_nothing_is_begun_that_comes_too_late(lifetime: float) -> None:
    """Whenever the slot becomes free: the planner looks for itself, and takes the next."""
    w = world(max_num_seqs=1)
    learn(w)
    w.submit(request("first", [7] * 10, 20, stop_token_ids=(99,)))
    w.submit(request("r", [3] * 10, 10, deadline=w.now + lifetime))
    w.submit(request("next", [4] * 10, 2))
    w.run()
    w.check_ends()
    admitted = [admit.token_ids[0] for plan in w.plans for admit in plan.admit]
    in_time = w.streams["r", 0].reason is FinishReason.LENGTH
    assert (3 in admitted) == in_time
    assert in_time == (lifetime > 3.48) or 3.48 < lifetime < 3.6, "2.29 s until the first ends, and 1.19 s for its own"


def test_what_runs_is_not_given_up() -> None:
    w = world()
    w.submit(request("r", 10, 60, deadline=w.now + 3.0))
    w.run()
    w.check_ends()
    end = w.streams["r", 0].end
    assert end is not None
    assert (end.finish_reason, end.detail) == (FinishReason.DEADLINE, "the deadline has passed")
    assert len(w.streams["r", 0].token_ids) > 10


def test_lengths_are_learned_from_those_that_ended() -> None:
    """Who may end early is taken at what others of its size used at the least."""
    w = world()
    for i in range(3):
        w.submit(request(f"r{i}", [i + 1] * 10, 40, seed=i, stop_token_ids=(99,)))
        w.run()
    delta = refuse(w, request("late", 10, 40, deadline=w.now + 2.0, stop_token_ids=(99,)))
    assert "at least 4.49 s for 10 prompt and 40 output tokens" in delta.detail
    w.submit(request("other", 10, 400, deadline=w.now + 2.0, stop_token_ids=(99,)))
    assert w.streams["other", 0].end is None, "of such as this none has ended yet"
    w.abort("other")
    w.run()


# ---------------------------------------------------------------- overload


def test_a_burst_wastes_little() -> None:
    """Nearly every token is of a request that meets its deadline, and as many come as without any deadlines."""
    config = EngineConfig(max_num_seqs=16, max_step_tokens=128, depth=2, long_step=16, max_waiting=5000)
    usual = Crowd(config, [Party("", 48, (8, 64), (8, 60))], num_blocks=400)
    burst = Crowd(config, [Party("", 3000, (8, 64), (8, 60), lifetime=(0.5, 40.0), again=False)], num_blocks=400)
    end = burst.now + 40.0
    while usual.now < end:
        usual.run(1)
    while burst.steps < 2 or not burst.scheduler.idle:
        burst.run(1)
    good = sum(a.tokens for a in burst.asked.values() if a.end is FinishReason.LENGTH and a.ended_at <= a.deadline)
    assert good >= 0.95 * sum(a.tokens for a in burst.asked.values()), "hardly a token for nothing"
    assert good >= 0.85 * sum(a.tokens for a in usual.asked.values() if a.ended_at)
    assert {a.end for a in burst.asked.values()} == {FinishReason.LENGTH, FinishReason.DEADLINE}
    burst.scheduler.check_integrity()
    stats = burst.scheduler.stats()
    assert (stats.running, stats.waiting, stats.owned_blocks) == (0, 0, 0)


# ---------------------------------------------------------------- estimates


def test_the_pace_is_fitted() -> None:
    pace = Pace()
    assert not pace.known
    for positions in (1, 2, 512, 3, 100):
        pace.learn(positions, seconds(positions))
    assert pace.fit() == pytest.approx((0.1, 0.01))


def test_of_steps_of_one_length_all_is_base() -> None:
    pace = Pace()
    for _ in range(5):
        pace.learn(4, 0.2)
    pace.learn(4, 0.0)
    assert pace.fit() == pytest.approx((0.2, 0.0)), "no more is claimed than is known"


def test_a_stall_is_no_pace() -> None:
    pace = Pace()
    for positions in (1, 64) * 50:
        pace.learn(positions, seconds(positions))
    pace.learn(1, 1000.0)
    base, each = pace.fit()
    assert base + each < 1.3 * OUTLIER * seconds(1)


def test_a_habit_knows_its_least() -> None:
    habit = Habit()
    for _ in range(3):
        habit.learn(0.5)
    assert (habit.mean, habit.least) == (0.5, 0.5)
    for value in (0.1, 0.9) * 10:
        habit.learn(value)
    assert habit.mean == pytest.approx(0.5, abs=0.1)
    assert habit.least < 0.1


def test_a_request_of_no_tokens_is_expected_to_take_its_prompt() -> None:
    w = world()
    learn(w)
    forecast = w.scheduler._forecast
    one, none = (Submit(str(n), [1, 2], 2, Sampling(n), deadline=w.now + 5) for n in (1, 0))
    assert (forecast.likely_tokens(none), forecast.estimate(none).output_tokens) == (0, 0)
    assert forecast.estimate(none).total == forecast.estimate(one).total > 0
    w.submit(none)
    w.run()
    assert w.streams["0", 0].reason is FinishReason.STOP

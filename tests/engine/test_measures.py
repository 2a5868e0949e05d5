"""What the engine says of itself: waits, steps, refusals, and what each tenant got."""

from __future__ import annotations

from typing import Any

from protos.engine_wire import FinishReason, Histogram, TenantFigures
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.measures import MAX_STRANGERS, OTHERS, SECONDS, Spread, Tallies
from tests.engine.world import World, request


def world(**config: Any) -> World:
    made = World(EngineConfig(**{"block_size": 4, "max_num_seqs": 2, "max_step_tokens": 64, **config}))
    made.ready()
    return made


def count(histogram: Histogram) -> int:
    return sum(histogram.counts)


def figures(w: World) -> dict[str, TenantFigures]:
    return {tenant.name: tenant for tenant in w.scheduler.stats().tenants}


def test_a_value_on_a_bound_belongs_below_it() -> None:
    spread = Spread((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 2.0, 9.0):
        spread.add(value)
    spread.add(1.5, 3)
    assert spread.freeze() == Histogram((1.0, 2.0), (2, 5, 1), 18.5)


def test_the_bounds_rise() -> None:
    assert list(SECONDS) == sorted(set(SECONDS))
    assert (SECONDS[0], SECONDS[-1]) == (0.001, 75.0)


def test_a_wait_goes_from_the_submit_to_the_first_admission_and_to_the_client() -> None:
    w = world(max_num_seqs=1)
    w.tick(1)
    w.submit(request("first", max_tokens=3))
    w.tick(2)
    w.submit(request("second", max_tokens=2))
    w.tick(4)
    w.run()
    w.check_ends()
    wait = w.scheduler.stats().queue_wait
    assert (count(wait), wait.total) == (2, 4.0)
    assert [d.queued for d in w.streams["first", 0].deltas] == [0.0] * 3
    assert [d.queued for d in w.streams["second", 0].deltas] == [4.0] * 2


def test_a_worker_that_dies_makes_no_second_wait() -> None:
    w = world()
    w.submit(request("r", max_tokens=6))
    w.land(2)
    w.crash()
    w.tick(5)
    w.ready()
    w.run()
    w.check_ends()
    assert count(w.scheduler.stats().queue_wait) == 1
    assert w.scheduler.stats().queue_wait.total == 0.0


def test_steps_are_observed_with_their_rows_positions_and_seconds() -> None:
    w = World(EngineConfig(block_size=4, max_num_seqs=4, max_step_tokens=64), seconds=lambda positions: positions / 100)
    w.ready()
    for name in ("a", "b"):
        w.submit(request(name, 8, 3))
    w.run()
    stats = w.scheduler.stats()
    assert stats.steps == count(stats.step_rows) == count(stats.step_tokens) == count(stats.step_seconds)
    assert stats.step_rows.total == sum(len(plan.rows) for plan in w.plans)
    positions = sum(row.num_tokens for plan in w.plans for row in plan.rows)
    assert stats.step_tokens.total == positions
    assert abs(stats.step_seconds.total - positions / 100) < 1e-9


def test_refusals_are_counted_by_reason_and_tenant() -> None:
    w = world(max_num_seqs=1, max_waiting=2, tenants=(Tenant("poor", 1.0, 10.0, 10.0),))
    for name, prompt, tenant in (
        ("runs", 4, "rich"),
        ("waits", 4, "rich"),
        ("broke", 8, "poor"),
        ("again", 8, "poor"),  # over its quota
        ("much", 11, "poor"),  # over its burst
        ("full", 4, "rich"),
    ):
        w.submit(request(name, prompt, 30, tenant=tenant))
    refused = dict(w.scheduler.stats().refused)
    ended = [stream.reason for stream in w.streams.values() if stream.reason]
    assert refused == {reason: ended.count(reason) for reason in ended}
    assert sum(refused.values()) == w.scheduler.stats().rejected
    assert (figures(w)["poor"].refused, figures(w)["rich"].refused) == (2, 1)


def test_who_gives_up_in_the_queue_was_refused_and_who_ran_was_not() -> None:
    w = world(max_num_seqs=1)
    w.submit(request("runs", 4, 30, deadline=w.now + 1))
    w.submit(request("waits", 4, 4, deadline=w.now + 1))
    w.submit(request("leaves", 4, 4))
    w.abort("leaves")
    w.land(2)
    w.tick(2)
    assert dict(w.scheduler.stats().refused) == {FinishReason.DEADLINE: 1}
    assert {s.reason for s in w.streams.values()} == {FinishReason.DEADLINE, FinishReason.ABORTED}


def test_a_tenants_figures_outlive_its_account() -> None:
    w = world()
    for i in range(3):
        w.submit(request(f"r{i}", [i] * 8, 4, tenant="a"))
        w.land()
    live = figures(w)["a"]
    assert (live.running, live.waiting, live.requests) == (2, 1, 3)
    w.submit(request("nobody's", [9] * 5, 2))
    w.run()
    before = figures(w)
    assert (before["a"].prompt_tokens, before["a"].output_tokens) == (24, 12)
    assert (before[""].prompt_tokens, before[""].output_tokens) == (5, 2)
    w.tick(10)
    w.tick(10)
    assert not list(w.scheduler.roster.ledger), "the accounts are forgotten"
    assert figures(w) == before
    w.submit(request("more", [3] * 8, 4, tenant="a"))
    w.run()
    assert figures(w)["a"].output_tokens == 16
    assert sum(t.output_tokens for t in figures(w).values()) == w.scheduler.stats().generated_tokens


def test_strangers_are_bounded_and_the_named_are_not_crowded_out() -> None:
    w = world(tenants=(Tenant("known"),), max_waiting=1000)
    for i in range(MAX_STRANGERS + 10):
        w.submit(request(f"r{i}", [i % 30] * 4, 2, tenant=f"stranger {i}"))
    w.submit(request("late", 4, 2, tenant="known"))
    w.run()
    found = figures(w)
    assert len(found) == MAX_STRANGERS + 2
    assert (found[OTHERS].requests, found[OTHERS].output_tokens) == (10, 20)
    assert found["known"].output_tokens == 2
    w.tick(10)
    w.tick(10)
    assert figures(w) == found


def test_tallies_add_up_the_accounts_that_share_one() -> None:
    tallies = Tallies(EngineConfig())
    shared = [tallies.of(f"t{i}") for i in range(MAX_STRANGERS + 2)][-2:]
    assert shared[0] is shared[1]
    shared[0].requests = 2
    (others,) = [f for f in tallies.figures([(t, 1, 2, 3) for t in shared]) if f.name == OTHERS]
    assert (others.running, others.waiting, others.output_tokens) == (2, 4, 6)

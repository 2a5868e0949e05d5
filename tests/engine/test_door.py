"""Who is let into the queue, who is not, and what they are told."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.engine_wire import FinishReason, Outputs, Shed, Submit, TokenDelta
from scheduler_svc.engine.config import EngineConfig, Tenant
from scheduler_svc.engine.door import MAX_SHED, UNKNOWN_RETRY
from scheduler_svc.engine.fairness import Ledger
from scheduler_svc.engine.policy import Agenda
from scheduler_svc.engine.sequence import Sequence
from tests.engine.world import World, request


def world(**config: Any) -> World:
    return World(EngineConfig(**{"block_size": 4, "max_num_seqs": 2, "max_step_tokens": 64, **config}))


def refuse(w: World, submit: Submit) -> TokenDelta:
    (outputs,) = w.scheduler.handle(submit)
    assert isinstance(outputs, Outputs)
    (delta,) = outputs.items
    return delta


def test_the_queue_is_bounded_in_sequences() -> None:
    w = world(max_waiting=3)
    for i in range(3):
        w.submit(request(f"r{i}", [i] * 8))
    delta = refuse(w, request("late"))
    assert delta.finish_reason is FinishReason.REJECTED
    assert delta.retry_after == UNKNOWN_RETRY
    assert "max_waiting 3" in delta.detail
    assert w.scheduler.stats().rejected == 1
    w.ready()
    assert w.scheduler.stats().waiting == 1, "who runs does not wait"
    w.submit(request("again"))
    w.run()
    w.check_ends()


def test_the_queue_is_bounded_in_tokens() -> None:
    w = world(max_waiting_tokens=30)
    w.submit(request("a", 20))
    delta = refuse(w, request("b", 11))
    assert delta.finish_reason is FinishReason.REJECTED
    assert "max_waiting_tokens 30" in delta.detail
    w.submit(request("c", 10))
    w.ready()
    w.run()
    w.check_ends()


def test_siblings_come_in_together_or_not_at_all() -> None:
    w = world(max_waiting=3)
    w.submit(request("before"))
    assert refuse(w, request("three", index=0, num_siblings=3)).finish_reason is FinishReason.REJECTED
    w.abort("before")
    for index in range(3):
        w.submit(request("three", seed=index, index=index, num_siblings=3))
    assert w.scheduler.stats().waiting == 3
    w.ready()
    w.run()
    w.check_ends()


@pytest.mark.parametrize(
    "second",
    [
        request("r"),
        request("r", index=0, num_siblings=2),
        request("r", index=1, num_siblings=2),
        request("r", frontend="g"),
    ],
    ids=lambda s: f"index {s.index} of {s.num_siblings} from {s.frontend!r}",
)
def test_an_id_runs_once(second: Submit) -> None:
    w = world()
    w.submit(request("r"))
    delta = refuse(w, second)
    assert delta.finish_reason is FinishReason.DUPLICATE
    assert "'r'" in delta.detail
    w.ready()
    w.run()
    w.check_ends()
    w.streams.clear()
    w.submit(request("r"))
    w.run()
    w.check_ends()


@pytest.mark.parametrize(
    ("token_ids", "prompt_len", "named"),
    [([], 0, "prompt_len"), ([1], 2, "prompt_len"), ([1, -1], 2, "token_ids"), ([1 << 32], 1, "token_ids")],
)
def test_what_is_no_prompt_is_invalid(token_ids: list[int], prompt_len: int, named: str) -> None:
    w = world()
    delta = refuse(w, Submit("r", token_ids, prompt_len, request("x").sampling))
    assert delta.finish_reason is FinishReason.INVALID
    assert delta.detail.startswith(named)


def test_retry_after_is_the_time_until_there_should_be_room() -> None:
    w = world(max_waiting=10, max_num_seqs=1)
    w.ready()
    for i in range(10):
        w.submit(request(f"r{i}", [i + 1] * 4, 5, seed=i))
    for i in range(10, 25):  # one sequence of five steps leaves the queue each half second
        w.land(5)
        w.tick(0.5)
        w.submit(request(f"r{i}", [i + 1] * 4, 5, seed=i))
    while w.scheduler.stats().waiting < 10:
        w.submit(request(f"more{w.scheduler.stats().waiting}", 4, 5))
    first, second, third = (refuse(w, request(f"late{i}")).retry_after for i in range(3))
    assert first == pytest.approx(0.5, rel=0.2)
    assert second == pytest.approx(1.0, rel=0.2), "those refused before stand before it"
    assert third == pytest.approx(1.5, rel=0.2)
    w.land(5)
    w.tick(0.5)
    w.submit(request("came back", 4, 5))
    assert refuse(w, request("late4")).retry_after == pytest.approx(1.5, rel=0.2), "one departed, one more was refused"


def full(rate: float, waiting: int = 10) -> World:
    """A queue that is full, which so many sequences a second leave; 0: none has yet."""
    w = world(max_waiting=waiting, max_num_seqs=1)
    w.ready()
    for i in range(waiting):
        w.submit(request(f"r{i}", [i + 1] * 4, 5, seed=i))
    for i in range(waiting, waiting + 10 if rate else waiting):
        w.land(5)
        w.tick(1 / rate)
        w.submit(request(f"r{i}", [i + 1] * 4, 5, seed=i))
    while w.scheduler.stats().waiting < waiting:
        w.submit(request(f"more{w.scheduler.stats().waiting}", 4, 5))
    return w


@pytest.mark.parametrize(("rate", "shed_for"), [(0.0, 0.0), (2.0, MAX_SHED), (20.0, 0.05)])
def test_a_refusal_may_be_said_again_while_hardly_a_place_comes_free(rate: float, shed_for: float) -> None:
    assert refuse(full(rate), request("late")).shed_for == pytest.approx(shed_for, rel=0.3)


def test_only_the_queue_of_sequences_is_full_for_everybody() -> None:
    w = world(max_waiting_tokens=30, max_num_seqs=1)
    w.ready()
    for i in range(8):
        w.submit(request(f"r{i}", [i + 1] * 10, 5, seed=i))
        if i < 6:  # and two of them stay
            w.land(5)
            w.tick(0.5)
    delta = refuse(w, request("late", 30))
    assert delta.finish_reason is FinishReason.REJECTED
    assert delta.shed_for == 0.0, "a shorter prompt may fit"


def test_what_a_frontend_has_shed_stands_in_the_line_and_is_counted() -> None:
    w = full(2.0)
    before = refuse(w, request("late"))
    assert w.send(Shed("f", "t", 4)) == []
    after = refuse(w, request("later"))
    assert after.retry_after - before.retry_after == pytest.approx(5 * 0.5, rel=0.2)
    stats = w.scheduler.stats()
    assert (stats.rejected, dict(stats.refused)) == (6, {FinishReason.REJECTED: 6})
    assert [(t.name, t.refused) for t in stats.tenants if t.refused] == [("", 2), ("t", 4)]
    for count in (0, -1, 1 << 40):
        w.send(Shed("f", "t", count))
    assert w.scheduler.stats().rejected == 6


def test_siblings_are_refused_as_one_request() -> None:
    w = world(max_waiting=4, max_num_seqs=1)
    w.ready()
    for i in range(5):
        w.submit(request(f"r{i}", [i + 1] * 4, 5, seed=i))
    for i in range(5, 20):  # one sequence of five steps leaves the queue each half second
        w.land(5)
        w.tick(0.5)
        w.submit(request(f"r{i}", [i + 1] * 4, 5, seed=i))
    assert w.scheduler.stats().waiting == 4
    told = [refuse(w, request("three", index=i, num_siblings=3)).retry_after for i in range(3)]
    assert told == [pytest.approx(1.5, rel=0.2)] * 3, "three places, and not three for each of three"


@pytest.mark.parametrize(
    ("submit", "limit"),
    [(request("r", 5, num_siblings=4), "max_waiting 3"), (request("r", 11, num_siblings=3), "max_waiting_tokens 30")],
    ids=["sequences", "tokens"],
)
def test_what_no_queue_can_hold_is_invalid(submit: Submit, limit: str) -> None:
    """To come back later would not help, so it is not asked for."""
    w = world(max_waiting=3, max_waiting_tokens=30)
    delta = refuse(w, submit)
    assert (delta.finish_reason, delta.retry_after) == (FinishReason.INVALID, 0.0)
    assert limit in delta.detail


def crowd(w: World) -> list[str]:
    """Those that were crowded out so far, in order."""
    ended = [(s.end, name) for (name, _), s in w.streams.items() if s.reason is FinishReason.REJECTED]
    for end, _ in ended:
        assert end is not None
        assert end.retry_after > 0
        assert "made room for another" in end.detail
    return [name for _, name in ended]


def test_a_tenant_does_not_fill_the_queue_for_others() -> None:
    """The newest of the tenant with the most make room, until both have as many."""
    w = world(max_waiting=6)
    for i in range(6):
        w.submit(request(f"a{i}", [i + 1] * 8, seed=i, tenant="a"))
    assert refuse(w, request("a6", tenant="a")).finish_reason is FinishReason.REJECTED
    for i in range(3):
        w.submit(request(f"b{i}", [i + 11] * 8, seed=i, tenant="b"))
    assert crowd(w) == ["a3", "a4", "a5"]
    assert refuse(w, request("b3", tenant="b")).finish_reason is FinishReason.REJECTED
    assert w.scheduler.stats().rejected == 5
    w.ready()
    w.run()
    w.check_ends()


def test_siblings_are_made_room_for_together() -> None:
    w = world(max_waiting=6)
    for i in range(6):
        w.submit(request(f"a{i}", [i + 1] * 8, seed=i, tenant="a"))
    assert refuse(w, request("four", num_siblings=4, tenant="b")).finish_reason is FinishReason.REJECTED
    assert crowd(w) == [], "they would have more than the other"
    for index in range(3):
        w.submit(request("three", seed=index, index=index, num_siblings=3, tenant="b"))
    assert crowd(w) == ["a3", "a4", "a5"]
    w.ready()
    w.run()
    w.check_ends()


def test_tokens_are_made_room_for() -> None:
    w = world(max_waiting_tokens=40)
    for i in range(4):
        w.submit(request(f"a{i}", [i + 1] * 10, seed=i, tenant="a"))
    w.submit(request("b", [9] * 15, tenant="b"))
    assert crowd(w) == ["a2", "a3"]
    w.ready()
    w.run()
    w.check_ends()


def test_a_place_in_the_queue_is_weighed() -> None:
    w = world(max_waiting=6, tenants=(Tenant("a", 2.0),))
    for i in range(6):
        w.submit(request(f"a{i}", [i + 1] * 8, seed=i, tenant="a"))
    for i in range(2):
        w.submit(request(f"b{i}", [i + 11] * 8, seed=i, tenant="b"))
    assert crowd(w) == ["a4", "a5"]
    assert refuse(w, request("b2", tenant="b")).finish_reason is FinishReason.REJECTED
    w.ready()
    w.run()
    w.check_ends()


def test_nobody_is_crowded_out_by_a_worse_priority_nor_in_vain() -> None:
    w = world(max_waiting=3, tenants=(Tenant("b", 1.0, 1.0, 5.0),))
    for i in range(3):
        w.submit(request(f"a{i}", [i + 1] * 8, seed=i, tenant="a"))
    assert refuse(w, request("low", 4, priority=1, tenant="c")).finish_reason is FinishReason.REJECTED
    assert refuse(w, request("poor", 6, tenant="b")).finish_reason is FinishReason.INVALID
    assert crowd(w) == []
    w.ready()
    w.run()
    w.check_ends()


def test_who_has_begun_is_not_crowded_out() -> None:
    w = world(max_waiting=2, max_num_seqs=2)
    w.ready()
    for i in range(2):
        w.submit(request(f"a{i}", [i + 1] * 8, 12, seed=i, tenant="a"))
    w.land(3)
    w.crash()
    assert w.scheduler.stats().waiting == 2
    assert refuse(w, request("b", tenant="b")).finish_reason is FinishReason.REJECTED
    w.ready()
    w.run()
    w.check_ends()


def test_an_agenda_keeps_order_and_forgets_what_left() -> None:
    agenda: Agenda[tuple[int, int], Sequence] = Agenda()
    account = Ledger(EngineConfig()).account("")
    made = {i: Sequence(request(f"r{i}"), i, 0, account) for i in range(1000)}
    for i, sequence in made.items():
        agenda.add((i % 3, i), sequence)
    for i in range(1000):
        if i % 10:
            agenda.discard((i % 3, i))
    agenda.discard((0, 5000))
    assert len(agenda) == 100
    assert len(agenda._heap) <= 2 * 100 + 64, "what left is swept out"
    seen = []
    while first := agenda.first():
        key, sequence = first
        assert sequence is made[key[1]]
        seen.append(key)
        agenda.discard(key)
    assert seen == sorted(seen)
    assert len(seen) == 100


@given(st.integers(1, 6), st.integers(1, 6), st.integers(0, 6), st.integers(0, 20))
def test_free_slots_take_nobodys_place_in_the_queue(slots: int, places: int, running: int, burst: int) -> None:
    """While a plan is in flight nobody comes in: whoever the next one has a slot for does not wait for long."""
    w = world(max_num_seqs=slots, max_waiting=places)
    w.ready()
    running = min(running, slots)
    for i in range(running):
        w.submit(request(f"first{i}", [i + 1] * 4, 12, seed=i))
        w.land()
    assert w.scheduler.stats().running == running
    for i in range(burst):
        w.submit(request(f"late{i}", [i + 9] * 4, seed=i))
    at_once = 1 if burst and not running else 0  # nothing was in flight yet
    refused = [s.end for s in w.streams.values() if s.end]
    assert len(refused) == max(0, burst - (slots - running) - places)
    assert w.scheduler.stats().waiting == burst - len(refused) - at_once
    free = slots - running - at_once
    for end in refused:
        assert end.detail.endswith(f"max_waiting {places}" + (f" beside {free} free slots" if free else ""))
    w.run()
    w.check_ends()

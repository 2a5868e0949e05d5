"""Quotas: what a tenant may use, what it is told, and what comes back."""

from __future__ import annotations

from typing import Any

import pytest

from protos.engine_wire import FinishReason, Outputs, Submit, TokenDelta
from scheduler_svc.engine.config import EngineConfig, Tenant
from tests.engine.world import World, request

QUOTA = Tenant("t", 1.0, tokens_per_second=10.0, burst=50.0)


def world(**fields: Any) -> World:
    defaults = {"block_size": 4, "max_num_seqs": 4, "max_step_tokens": 64, "tenants": (QUOTA,)}
    made = World(EngineConfig(**{**defaults, **fields}))
    made.tick(0.0)
    made.ready()
    return made


def refuse(w: World, submit: Submit) -> TokenDelta:
    (outputs,) = (i for i in w.scheduler.handle(submit) if isinstance(i, Outputs))
    (delta,) = outputs.items
    return delta


def level(w: World) -> float:
    account = w.scheduler.roster.ledger.account("t")
    assert account.bucket is not None
    account.bucket.settle(w.now, account.output_tokens)
    return account.bucket.level


def test_a_prompt_is_taken_at_once_and_tokens_as_they_come() -> None:
    w = world()
    w.submit(request("r", 20, 8, tenant="t"))
    assert level(w) == 30
    w.land(3)
    assert level(w) == 27
    w.run()
    assert level(w) == 22
    w.tick(1.0)
    assert level(w) == 32
    w.tick(60.0)
    assert level(w) == 50, "no more than the burst"
    w.check_ends()


def test_what_is_missing_is_refused_with_the_time_until_it_is_there() -> None:
    w = world()
    w.submit(request("r", 40, 4, tenant="t"))
    w.run()
    delta = refuse(w, request("more", 20, 4, tenant="t"))
    assert (delta.finish_reason, delta.tenant) == (FinishReason.QUOTA, "t")
    assert delta.retry_after == pytest.approx(1.4), "6 are left, 14 more come at 10 a second"
    assert delta.detail == (
        "tenant 't' has 6 tokens left, the prompt needs 20; its quota is 10 tokens a second, 50 at once"
    )
    assert w.scheduler.stats().rejected == 1
    w.tick(delta.retry_after - 0.01)
    assert refuse(w, request("early", 20, 4, tenant="t")).finish_reason is FinishReason.QUOTA
    w.tick(0.02)
    w.submit(request("more", 20, 4, tenant="t"))
    w.run()
    w.check_ends()


def test_others_are_not_concerned() -> None:
    w = world()
    w.submit(request("r", 50, 4, tenant="t"))
    w.submit(request("other", 50, 4, tenant="u"))
    w.submit(request("nameless", 50, 4))
    w.run()
    w.check_ends()
    assert {stream.reason for stream in w.streams.values()} == {FinishReason.LENGTH}


def test_the_default_holds_for_each_by_itself() -> None:
    w = world(tenants=(), default_tenant=Tenant("", 1.0, 10.0, 50.0))
    for tenant in ("a", "b"):
        w.submit(request(tenant, 45, 4, tenant=tenant))
    assert refuse(w, request("again", 45, 4, tenant="a")).finish_reason is FinishReason.QUOTA
    w.run()
    w.check_ends()


def test_a_stream_that_runs_is_not_cut_and_its_debt_is_paid_first() -> None:
    w = world()
    w.submit(request("r", 40, 30, tenant="t"))
    w.run()
    w.check_ends()
    assert level(w) == -20
    assert refuse(w, request("next", 10, 4, tenant="t")).retry_after == pytest.approx(3.0)


def test_all_siblings_count() -> None:
    w = world()
    for index in range(3):
        delta = refuse(w, request("three", 17, 4, tenant="t", index=index, num_siblings=3))
        assert delta.finish_reason is FinishReason.INVALID
    for index in range(3):
        w.submit(request("r", 16, 4, tenant="t", index=index, num_siblings=3))
    assert level(w) == 2
    w.run()
    w.check_ends()


def test_a_prompt_over_the_burst_is_invalid() -> None:
    """To come back later would not help."""
    delta = refuse(world(), request("r", 51, 4, tenant="t"))
    assert (delta.finish_reason, delta.retry_after) == (FinishReason.INVALID, 0.0)
    assert delta.detail == "51 prompt tokens are over the burst of tenant 't', 50, even after a pause"


def test_what_never_ran_is_given_back() -> None:
    w = world(max_num_seqs=1)
    w.submit(request("runs", 10, 4, tenant="t"))
    w.submit(request("waits", 20, 4, tenant="t"))
    assert level(w) == 20
    w.abort("waits")
    assert level(w) == 40
    w.abort("runs")
    assert level(w) == 40, "what was computed is used"
    w.run()
    w.check_ends()


def test_a_tenant_is_not_forgotten_before_its_bucket_is_full() -> None:
    w = world()
    w.submit(request("r", 40, 4, tenant="t"))
    w.run()
    w.tick(2.0)
    assert level(w) == 26
    w.tick(3.0)
    assert list(w.scheduler.roster.ledger) == []

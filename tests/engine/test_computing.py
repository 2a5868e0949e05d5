"""Sequences that sample nothing: their prompt is computed, and what is wanted of it ends them."""

from __future__ import annotations

from typing import Any

import pytest

from protos.engine_wire import FinishReason, Submit
from protos.wire import Sampling
from scheduler_svc.engine.config import EngineConfig, Tenant
from tests.engine.world import World, request


def world(num_blocks: int = 64, ready: bool = True, **fields: Any) -> World:
    w = World(EngineConfig(block_size=4, **{"max_num_seqs": 4, "max_step_tokens": 32, **fields}), num_blocks=num_blocks)
    if ready:
        w.ready()
    return w


def starts(w: World, slot: int) -> list[int]:
    return [row.start for plan in w.plans for row in plan.rows if row.slot == slot]


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 9, 24])
@pytest.mark.parametrize("pooling", ["last", "mean", "cls"])
def test_the_row_in_which_a_prompt_ends_brings_the_state(pooling: str, length: int, depth: int) -> None:
    w = world(max_step_tokens=8, depth=depth)
    w.submit(request("r", length, 0, pooling=pooling))
    w.run()
    w.check_ends()
    (delta,) = w.streams["r", 0].deltas
    assert (delta.finish_reason, delta.token_ids, len(delta.pooled)) == (FinishReason.STOP, [], 8)
    assert all(not row.sample and not row.num_drafts for plan in w.plans for row in plan.rows)
    assert len(w.plans) == -(-length // 8), "nothing is planned behind its prompt"


def test_one_that_samples_goes_on_beside_it() -> None:
    w = world(depth=2, max_step_tokens=8, num_drafts=1)
    w.submit(request("s", 3, 6))
    w.submit(request("r", 12, 0, pooling="mean"))
    w.run()
    w.check_ends()


def test_its_prompt_may_fill_the_context() -> None:
    w = world(max_model_len=16)
    w.submit(request("whole", 16, 0, pooling="last"))
    w.submit(request("more", 17, 0, pooling="last"))
    w.run()
    w.check_ends()
    assert w.streams["whole", 0].reason is FinishReason.STOP
    end = w.streams["more", 0].end
    assert end is not None
    assert (end.finish_reason, end.detail) == (
        FinishReason.INVALID,
        "the prompt of 17 tokens exceeds max_model_len 16",
    )


def test_the_last_state_may_follow_from_the_cache_and_the_others_not() -> None:
    w = world()
    w.submit(request("a", 16, 1))
    w.run()
    for pooling in ("last", "mean", "cls"):
        w.submit(request(pooling, 16, 0, pooling=pooling))
        w.run()
    w.check_ends()
    cached = [w.streams[name, 0].deltas[0].cached_tokens for name in ("last", "mean", "cls")]
    assert cached == [12, 0, 0], "one position at least is computed"


def test_what_is_in_front_of_the_scored_tokens_may_come_from_the_cache() -> None:
    w = world()
    w.submit(request("a", 20, 1))
    w.run()
    for begin in (1, 12, 13, 20):
        w.submit(request(f"from {begin}", 20, 0, prompt_logprobs=0, prompt_logprobs_from=begin))
        w.run()
    w.check_ends()  # all that are wanted came, and once
    cached = {begin: w.streams[f"from {begin}", 0].deltas[0].cached_tokens for begin in (1, 12, 13, 20)}
    assert cached == {1: 0, 12: 8, 13: 12, 20: 16}, "the position before a token is what scores it"


def test_those_that_score_one_prompt_wait_for_the_first_of_them() -> None:
    w = world(depth=2)
    prompt = list(range(12))
    for i in range(3):
        sampling = Sampling(0, prompt_logprobs=0, prompt_logprobs_from=12)
        w.submit(Submit("r", [*prompt, i, 30], 14, sampling, i, 3))
    w.run()
    w.check_ends()
    assert sorted(w.streams["r", i].deltas[-1].cached_tokens for i in range(3)) == [0, 8, 8]


@pytest.mark.parametrize("pooling", ["", "mean"])
def test_it_begins_again_when_its_worker_dies(pooling: str) -> None:
    w = world(max_step_tokens=4)
    w.submit(request("r", 12, 0, pooling=pooling, prompt_logprobs=0))
    w.land(2)
    w.crash()
    w.ready()
    w.run()
    w.check_ends()
    assert starts(w, 1) == [0, 4, 8, 0, 4, 8]


@pytest.mark.parametrize(
    ("submit", "named"),
    [
        (Submit("r", [1], 1, Sampling(0), pooling="max"), "pooling is 'max'"),
        (Submit("r", [1], 1, Sampling(1), pooling="last"), "max_tokens is 1"),
        (Submit("r", [1, 2], 1, Sampling(0)), "prompt_len is 1"),
        (Submit("r", [1], 1, Sampling(1, prompt_logprobs=0, prompt_logprobs_from=0)), "prompt_logprobs_from is 0"),
    ],
)
def test_what_cannot_be_computed_is_refused(submit: Submit, named: str) -> None:
    w = world()
    w.submit(submit)
    (delta,) = w.streams["r", 0].deltas
    assert delta.finish_reason is FinishReason.INVALID
    assert named in delta.detail


def test_a_request_is_charged_for_the_prompts_of_all_its_sequences() -> None:
    """Where they differ in length the first does not stand for the others."""
    w = world(tenants=(Tenant("a", 1.0, 1.0, 20.0),))
    for index, length in enumerate((2, 17)):
        w.submit(
            Submit("r", [1] * length, length, Sampling(0), index, 2, tenant="a", pooling="last", request_tokens=19)
        )
    w.submit(Submit("s", [1, 1], 2, Sampling(0), tenant="a", pooling="last"))
    w.run()
    w.check_ends()
    assert [w.streams[name, 0].reason for name in ("r", "s")] == [FinishReason.STOP, FinishReason.QUOTA]
    w.submit(Submit("t", [1], 1, Sampling(0), 0, 2, tenant="a", pooling="last", request_tokens=21))
    assert "21 prompt tokens are over the burst" in w.streams["t", 0].deltas[0].detail

"""The second tier of KV through real processes and sockets: what a worker kept dies with it, and nothing else does."""

from __future__ import annotations

import os
import random
import signal
from dataclasses import replace

import pytest
from msgspec.structs import replace as with_fields

from protos.engine_wire import EngineStats, Question
from scheduler_svc.config import LoopConfig
from tests.loop.harness import Observer, assert_undisturbed, loop_config, running, submits

BLOCK = 8 * 1024  # bytes of the fake backend's


def small(host_blocks: int, ranks: int = 1, workers: int = 1) -> LoopConfig:
    config = loop_config("fake:delay_ms=1,blocks=40")
    setup = with_fields(config.setup, kv_host_bytes=host_blocks * BLOCK, tp_size=ranks)
    return replace(config, engine=replace(config.engine, depth=2), setup=setup, workers=workers)


def stats(observer: Observer) -> EngineStats:
    return observer.ask(Question.STATS).status.stats


@pytest.mark.parametrize(("workers", "ranks"), [(1, 1), (2, 1), (1, 2)])
def test_kill_9_takes_the_tier_along_and_no_token(workers: int, ranks: int) -> None:
    made = submits(30, random.Random(workers))
    with running(small(400, ranks, workers)) as observer:
        observer.until_serving()
        for turn in range(4):
            again = [with_fields(submit, request_id=f"{submit.request_id}.{turn}") for submit in made]
            hits = stats(observer).host_cached_tokens
            for submit in again:
                observer.loop.send(submit)
            if turn == 2:
                observer.until_tokens(observer.tokens + 50)
                os.kill(observer.status.workers[0].pid, signal.SIGKILL)
            observer.until_finished(again)
            assert_undisturbed(observer, again)
            now = stats(observer)
            assert now.num_blocks == now.free_blocks + now.cached_blocks
            assert turn != 1 or now.host_cached_tokens > hits
        assert stats(observer).recoveries == 1
        assert stats(observer).host_cached_tokens > hits, "the last turn found what was kept since"


def test_a_tier_too_small_for_a_block_is_a_clear_error() -> None:
    with running(small(0)) as observer:
        observer.until_serving()
        assert observer.status.ready
        assert observer.status.ready.num_host_blocks == 0
    config = small(1)
    with running(replace(config, setup=with_fields(config.setup, kv_host_bytes=BLOCK - 1))) as observer:
        observer.until(lambda: observer.statuses and observer.status.failed, "failure")
        assert "8191 bytes of the host hold no block of 8 tokens" in observer.status.reason

"""Who shares whose blocks, from when on, and who waits for whom."""

from __future__ import annotations

from typing import Any

import pytest

from protos.engine_wire import FinishReason
from scheduler_svc.engine import planner
from scheduler_svc.engine.block_pool import BlockPool
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import FlushCache
from scheduler_svc.engine.prefix_cache import domain, root
from tests.engine.world import World, request


def world(*, num_blocks: int = 64, align: int = 1, **config: Any) -> World:
    made = World(
        EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_step_tokens": 64, **config}),
        num_blocks=num_blocks,
        align=align,
    )
    made.ready()
    return made


def last_row(w: World) -> tuple[int, int]:
    """Start and size of the newest plan's last row."""
    row = w.plans[-1].rows[-1]
    return row.start, row.num_tokens


# ---------------------------------------------------------------- blocks


def test_blank_blocks_go_first_then_the_oldest_cached_and_tails_before_heads() -> None:
    pool = BlockPool(7)
    a, b = pool.take(3), pool.take(2)
    for block in a:
        pool.publish(block, b"a%d" % block)
    for block in b:
        pool.publish(block, b"b%d" % block)
    pool.drop(a)
    pool.drop(b)
    assert (len(pool.blank), list(pool.cached)) == (1, [*reversed(a), *reversed(b)])
    assert pool.take(3) == [6, a[2], a[1]]
    assert pool.by_hash == {b"a%d" % a[0]: a[0], b"b%d" % b[0]: b[0], b"b%d" % b[1]: b[1]}


def test_a_hit_takes_a_block_out_of_the_line() -> None:
    pool = BlockPool(4)
    a = pool.take(3)
    for block in a:
        pool.publish(block, b"%d" % block)
    pool.drop(a)
    pool.share(a[:2])
    assert list(pool.cached) == [a[2]]
    pool.share(a[:1])
    pool.drop(a[:1])
    assert pool.refs[a[0]] == 1
    pool.drop(a[:2])
    assert list(pool.cached) == [a[2], a[1], a[0]]


def test_the_same_content_is_published_once() -> None:
    pool = BlockPool(4)
    one, other = pool.take(2)
    pool.publish(one, b"x")
    pool.publish(other, b"x")
    pool.drop([one])
    pool.drop([other])
    assert other in pool.blank
    assert list(pool.cached) == [one]


def test_flush_forgets_only_what_nobody_uses() -> None:
    pool = BlockPool(4)
    one, other = pool.take(2)
    pool.publish(one, b"x")
    pool.publish(other, b"y")
    pool.drop([one])
    pool.flush()
    assert pool.by_hash == {b"y": other}
    assert sorted(pool.blank) == sorted([one, 3])


def test_roots_differ_by_salt_and_adapter_and_by_nothing_else() -> None:
    roots = [root("", "", ""), root("s", "", ""), root("", "s", ""), root("", "", "s")]
    roots += [root("", "a", "b"), root("", "ab", ""), root("a", "b", ""), root("ab", "", "")]
    assert len(set(roots)) == 8
    assert domain("t", "s") != domain("ts", "")


# ---------------------------------------------------------------- hits


@pytest.mark.parametrize(
    ("prompt", "align", "start"),
    [
        (16, 1, 12),  # all four blocks are known, but one token at least is left to compute
        (17, 1, 16),
        (19, 1, 16),
        (16, 8, 8),  # 12 is no multiple of 8
        (17, 8, 16),
        (15, 4, 12),
        (4, 1, 0),
    ],
)
def test_a_hit_leaves_one_token_and_respects_align(prompt: int, align: int, start: int) -> None:
    w = world(align=align)
    w.submit(request("first", 24, 1))
    w.run()
    w.submit(request("second", prompt, 2, seed=1))
    assert last_row(w) == (start, prompt - start)
    w.run()
    assert {d.cached_tokens for d in w.streams["second", 0].deltas} == {start}
    w.check_ends()


def test_generated_tokens_are_shared_too() -> None:
    w = world()
    first = request("first", 6, 12)
    w.submit(first)
    w.run()
    w.submit(request("second", first.token_ids + w.streams["first", 0].token_ids, 2, seed=1))
    assert last_row(w)[0] == 16  # 17 of 18 positions are computed: the last token was never fed
    w.run()
    w.check_ends()


@pytest.mark.parametrize(
    "field", [{"cache_salt": "s"}, {"adapter": "a"}, {"skip_cache": True}, {"prompt_logprobs": 0}], ids=str
)
def test_who_reads_nothing(field: dict[str, Any]) -> None:
    w = world()
    w.submit(request("first", 24, 1))
    w.run()
    w.submit(request("second", 24, 2, seed=1, **field))
    assert last_row(w) == (0, 24)
    w.run()
    w.check_ends()


def test_caching_can_be_off() -> None:
    w = world(prefix_caching=False)
    w.submit(request("first", 24, 12))
    w.run()
    w.submit(request("second", 24, 2, seed=1))
    assert last_row(w) == (0, 24)
    w.run()
    assert w.scheduler.stats().cached_blocks == 0
    w.check_ends()


def test_a_flushed_cache_hits_nothing() -> None:
    w = world()
    w.submit(request("first", 24, 1))
    w.run()
    assert w.scheduler.stats().cached_blocks == 6
    w.send(FlushCache())
    assert w.scheduler.stats().cached_blocks == 0
    w.submit(request("second", 24, 2, seed=1))
    assert last_row(w) == (0, 24)
    w.run()
    w.check_ends()


def test_a_new_epoch_hits_nothing() -> None:
    w = world()
    w.submit(request("first", 24, 1))
    w.run()
    w.crash()
    w.ready()
    w.submit(request("second", 24, 2, seed=1))
    assert last_row(w) == (0, 24)
    w.run()
    w.check_ends()


def test_eviction_takes_the_tail_of_the_oldest() -> None:
    w = world(num_blocks=9)
    w.submit(request("first", 17, 1))
    w.run()  # 4 cached, 4 blank
    w.submit(request("other", [9] * 18, 1))
    w.run()  # took the blank ones and the last block of `first`
    w.submit(request("second", 17, 2, seed=1))
    assert last_row(w) == (12, 5)
    w.run()
    w.check_ends()


# ---------------------------------------------------------------- leaders and followers


def test_siblings_wait_for_the_first_and_share_its_blocks() -> None:
    w = world(max_step_tokens=8, max_num_seqs=4)
    for index in range(4):
        w.submit(request("r", 18, 3, seed=index, index=index, num_siblings=4))
    w.land(2)
    assert [len(plan.rows) for plan in w.plans] == [1, 1, 4], "four full blocks are in the first two chunks"
    newest = w.plans[-1]
    assert [(row.start, row.num_tokens) for row in newest.rows] == [(16, 2)] * 4
    tables = [admit.block_ids[0] for admit in newest.admit]
    assert [table[:4] for table in tables] == [[1, 2, 3, 4]] * 3
    assert len({table[4] for table in tables}) == 3
    w.run()
    assert w.scheduler.stats().cached_tokens == 48
    w.check_ends()


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_no_block_is_hit_in_the_step_that_fills_it(depth: int) -> None:
    w = World(EngineConfig(block_size=4, max_num_seqs=4, max_step_tokens=64, depth=depth))
    w.submit(request("a", 9, 2))
    w.submit(request("b", 9, 2, seed=1))
    w.ready()
    assert [len(plan.rows) for plan in w.plans] == [1] * len(w.plans)
    w.run()
    assert w.streams["b", 0].deltas[0].cached_tokens == 8
    w.check_ends()


def test_a_chunk_is_not_hit_in_the_step_that_fills_it() -> None:
    w = World(EngineConfig(block_size=4, max_num_seqs=4, max_step_tokens=20), align=8)
    w.submit(request("a", 40, 2))
    w.submit(request("b", 18, 2, seed=1))
    w.ready()  # a's first chunk is 16, so that 4 are left of the step; b lacks 2 behind it
    assert [(row.start, row.num_tokens) for row in w.plans[0].rows] == [(0, 16)]
    w.run()
    assert w.streams["b", 0].deltas[0].cached_tokens == 16
    w.check_ends()


def test_a_chunk_can_be_hit_while_it_is_in_flight() -> None:
    w = world(depth=2, max_step_tokens=16)
    w.submit(request("a", 40, 2))
    w.submit(request("b", 10, 2, seed=1))  # its 8 shared tokens are in a's first chunk
    assert [(row.slot, row.start, row.num_tokens) for row in w.plans[1].rows] == [(1, 16, 16)]
    w.land()
    assert [(row.slot, row.start, row.num_tokens) for row in w.plans[2].rows] == [(1, 32, 8), (2, 8, 2)]
    w.run()
    w.check_ends()


def test_when_the_leader_leaves_the_first_follower_leads() -> None:
    w = world(max_step_tokens=24)
    for name in ("a", "b", "c"):
        w.submit(request(name, 40, 2, seed=ord(name)))
    w.land()
    assert [s.state.name for s in w.scheduler.roster] == ["RUNNING", "HOLDING", "HOLDING"]
    w.abort("a")
    w.land()
    assert [(s.request_id, s.state.name) for s in w.scheduler.roster] == [("b", "RUNNING"), ("c", "HOLDING")]
    assert last_row(w)[0] == 24, "what the first leader had filled is not computed again"
    w.run()
    w.check_ends()


def test_a_follower_can_leave() -> None:
    w = world(max_step_tokens=24)
    for name in ("a", "b"):
        w.submit(request(name, 40, 2, seed=ord(name)))
    w.land()
    assert w.scheduler.roster.find("b")[0].state.name == "HOLDING"
    w.abort("b")
    assert w.streams["b", 0].reason is FinishReason.ABORTED
    w.run()
    w.check_ends()


def test_others_pass_those_who_hold() -> None:
    w = world(max_step_tokens=24)
    w.submit(request("a", 40, 2))
    w.submit(request("b", 40, 2, seed=1))
    w.submit(request("c", [9] * 6, 2))
    w.land()
    assert [(s.request_id, s.state.name) for s in w.scheduler.roster] == [
        ("a", "RUNNING"),
        ("b", "HOLDING"),
        ("c", "RUNNING"),
    ]
    w.run()
    w.check_ends()


def test_others_pass_however_many_hold() -> None:
    w = world(max_num_seqs=4, max_step_tokens=24)
    for i in range(12):
        w.submit(request(f"same{i}", 40, 2, seed=i))
    w.submit(request("other", [9] * 6, 2, seed=99))
    w.land()
    assert w.scheduler.roster.find("other")[0].state.name == "RUNNING", "slots are free"
    assert w.scheduler.stats().running == 2
    w.run()
    w.check_ends()


def test_a_step_sets_aside_no_more_than_so_many_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "MAX_ASIDE", 10)
    w = world(max_num_seqs=4, max_step_tokens=16)
    w.submit(request("first", 12, 2))
    for i in range(20):
        w.submit(request(f"r{i}", 12, 2, seed=i))
    assert [s.state.name for s in w.scheduler.roster].count("HOLDING") == 0
    w.crash()
    w.ready()
    assert [s.state.name for s in w.scheduler.roster].count("HOLDING") == 3, "1 + 3 blocks each"
    w.run()
    w.check_ends()


def test_a_block_with_unverified_drafts_is_not_published() -> None:
    w = world(depth=2, num_drafts=3)
    w.submit(request("a", 8, 12))
    while w.results:
        pool = w.scheduler.devices[0].kv.pool
        for s in w.scheduler.roster.running:
            assert all(not pool.hashes[b] for b in s.block_ids[s.settled // 4 :])
        w.land()
    w.check_ends()

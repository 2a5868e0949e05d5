"""What the device had no room for is found in the host, by the same rules as a block that a step fills."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protos.engine_wire import FinishReason
from protos.wire import Direction, Epoch
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import EndEpoch, FlushCache, WorkerReady
from scheduler_svc.engine.host_tier import HostTier
from tests.engine.world import World, request

OUT, IN = Direction.TO_HOST, Direction.TO_DEVICE
LONG = list(range(1, 20))  # four full blocks of 4, and three tokens
OTHER = [30 - token for token in LONG]


def world(num_blocks: int = 8, num_host_blocks: int = 16, **more: Any) -> World:
    config = {"block_size": 4, "max_num_seqs": 4, "max_step_tokens": 64}
    of_world = {name: more.pop(name) for name in ("align", "groups", "max_model_len") if name in more}
    made = World(EngineConfig(**{**config, **more}), num_blocks=num_blocks, num_host_blocks=num_host_blocks, **of_world)
    made.ready_all()
    return made


def ask(w: World, name: str, prompt: list[int], max_tokens: int = 1) -> int:
    """Runs a request to its end; the tokens that it found."""
    w.submit(request(name, prompt, max_tokens))
    w.run()
    return w.streams[name, 0].deltas[-1].cached_tokens


# ---------------------------------------------------------------- the tier by itself


def test_the_oldest_goes_first_and_what_comes_again_is_not_copied_again() -> None:
    host = HostTier(2)
    assert [host.save(b"a", 5), host.save(b"b", 6)] == [b"", b""]
    assert not host.by_hash, "found once the plan is sent"
    copies = host.take_copies()
    assert copies == [(OUT, 5, 0), (OUT, 6, 1)]
    host.land(copies)
    assert host.save(b"a", 3) == b""
    assert not host.copies
    assert host.save(b"c", 4) == b"b"
    assert host.take_copies() == [(OUT, 4, 1)]
    assert list(host.by_hash.items()) == [(b"a", 0), (b"c", 1)]


def test_what_is_being_copied_is_not_overwritten() -> None:
    host = HostTier(1)
    host.save(b"a", 5)
    first = host.take_copies()
    assert host.save(b"b", 6) == b"b", "there is no room before the copy has landed"
    host.load(host.fetch(b"a"), 7)
    second = host.take_copies()
    host.land(first)
    assert host.save(b"b", 6) == b"b", "and none while it is read"
    host.land(second)
    assert host.save(b"b", 6) == b"a"


def test_what_is_forgotten_while_it_is_copied_is_free_when_that_has_landed() -> None:
    host = HostTier(2)
    host.save(b"a", 5)
    copies = host.take_copies()
    assert host.clear() == [b"a"]
    assert host.free == [1]
    host.land(copies)
    assert host.free == [1, 0]


# ---------------------------------------------------------------- in plans


def test_an_evicted_prefix_comes_back_and_only_its_rest_is_computed() -> None:
    w = world()
    ask(w, "first", LONG)
    assert ask(w, "other", OTHER) == 0
    saved = [copy for plan in w.plans for copy in plan.copies]
    assert [direction for direction, _, _ in saved] == [OUT] * 2, "three blocks were blank, five were needed"
    assert ask(w, "again", LONG) == 16
    plan = w.plans[-1]
    assert (plan.rows[-1].start, plan.rows[-1].num_tokens) == (16, 3)
    loaded = [block for direction, block, _ in plan.copies if direction is IN]
    assert len(loaded) == 2
    assert set(loaded) < set(plan.admit[0].block_ids[0])
    stats = w.scheduler.stats()
    assert (stats.cached_tokens, stats.host_cached_tokens) == (16, 8)
    assert (stats.num_host_blocks, stats.copied_to_device) == (16, 2)
    assert stats.cached_host_blocks == stats.copied_to_host
    w.check_ends()


def test_a_prefix_may_be_spread_over_both_tiers() -> None:
    """Its beginning in the host, its end on the device: each block comes from where it is."""
    w = world(num_blocks=12)
    ask(w, "first", LONG)
    pool = w.scheduler.devices[0].kv.pool
    head = pool.by_hash[next(iter(w.scheduler.journal.blocks))]
    pool.cached.move_to_end(head, last=False)  # the next to be evicted
    w.submit(request("fills", [31] * 31, 1))
    w.run()
    assert pool.host.by_hash
    assert ask(w, "again", LONG) == 16
    copies = w.plans[-1].copies
    assert [block for direction, block, _ in copies if direction is IN] == [w.plans[-1].admit[0].block_ids[0][0]]
    w.check_ends()


def test_others_wait_for_a_block_that_comes_from_the_host_and_none_is_loaded_twice() -> None:
    w = world(num_blocks=17, max_num_seqs=3)
    ask(w, "first", LONG)
    ask(w, "other", (OTHER * 4)[:63])  # takes all blocks there are
    w.submit(request("runs", [29] * 3, 9))  # so that the next two come into one plan
    w.submit(request("one", LONG, 2))
    w.submit(request("two", LONG, 2, seed=1))
    w.run()
    loads = [[copy for copy in plan.copies if copy[0] is IN] for plan in w.plans]
    assert [len(each) for each in loads if each] == [4]
    assert w.streams["two", 0].deltas[-1].cached_tokens == 16
    first, second = (
        next(i for i, plan in enumerate(w.plans) for a in plan.admit if a.sampling.seed == seed and a.token_ids == LONG)
        for seed in (0, 1)
    )
    assert first != second
    w.check_ends()


def test_a_hit_in_the_host_respects_align_and_leaves_one_token() -> None:
    w = world(align=8)
    ask(w, "first", LONG[:16])
    ask(w, "other", OTHER)
    assert ask(w, "again", LONG[:16]) == 8
    w.check_ends()


def test_a_preempted_sequence_finds_its_blocks_in_the_host() -> None:
    w = world(num_blocks=10, max_num_seqs=2)
    w.submit(request("a", 13, 16))
    w.submit(request("b", [31, *LONG[:12]], 16))
    w.run()
    assert w.scheduler.stats().preemptions > 0
    assert w.scheduler.stats().copied_to_device > 0
    w.check_ends()


def test_a_lost_worker_takes_its_host_blocks_along_and_no_other() -> None:
    w = world(groups=2)
    ask(w, "first", LONG)
    ask(w, "other", OTHER)
    held = [len(device.kv.host.by_hash) for device in w.scheduler.devices.values()]
    group = held.index(max(held))
    w.crash(group=group)
    w.ready(group)
    assert not w.scheduler.devices[group].kv.host.by_hash
    assert ask(w, "again", LONG) in (0, 16)
    w.check_ends()


def test_a_result_without_its_copies_is_not_believed() -> None:
    w = world()
    ask(w, "first", LONG)
    w.submit(request("other", OTHER, 2))
    assert w.plans[-1].copies
    w.spoil("copied")
    w.ready()
    w.run()
    w.check_ends()


def test_flush_forgets_both_tiers() -> None:
    w = world()
    ask(w, "first", LONG)
    ask(w, "other", OTHER)
    w.send(FlushCache())
    stats = w.scheduler.stats()
    assert (stats.cached_blocks, stats.cached_host_blocks) == (0, 0)
    assert not w.scheduler.journal.blocks
    assert ask(w, "again", LONG) == 0


def test_without_a_tier_nothing_is_copied() -> None:
    w = world(num_host_blocks=0)
    ask(w, "first", LONG)
    ask(w, "other", OTHER)
    assert ask(w, "again", LONG) < 16
    assert not any(plan.copies for plan in w.plans)


def test_a_group_that_counts_wrong_is_not_used() -> None:
    w = World(EngineConfig(block_size=4))
    [end] = w.scheduler.handle(WorkerReady(Epoch(1, 1), 8, 128, num_host_blocks=-1))
    assert isinstance(end, EndEpoch)
    assert "num_host_blocks is -1" in end.reason


# ---------------------------------------------------------------- what watchers are told


def test_watchers_are_told_of_a_removal_when_both_tiers_have_forgotten() -> None:
    w = world(num_host_blocks=1)
    mirror = w.watch()
    ask(w, "first", LONG)
    assert len(mirror.blocks) == 4
    ask(w, "other", OTHER)  # two of the first's are evicted, and one of those is held by the host
    removed = [change for message in mirror.messages for change in message.changes if isinstance(change, bytes)]
    assert len(removed) == 1
    assert len(mirror.blocks) == 7
    before = len(mirror.messages)
    w.send(FlushCache())
    assert len(mirror.messages) == before + 1
    assert not mirror.blocks


# ---------------------------------------------------------------- and whatever else may happen

loaded = 0  # blocks, over all runs


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.randoms(use_true_random=True),
    st.sampled_from([9, 12, 20]),
    st.sampled_from([1, 3, 10, 40]),
    st.integers(1, 3),
    st.sampled_from([1, 4, 8]),
    st.sampled_from([0, 2]),
    st.sampled_from([1, 1, 2]),
)
def check_any(
    rng: random.Random, blocks: int, host_blocks: int, depth: int, align: int, drafts: int, groups: int
) -> None:
    """`rng` is seeded by hypothesis, and shrinks to a seed: drawn one by one, moves are too alike to evict anything."""
    global loaded
    config = {"depth": depth, "num_drafts": drafts, "max_step_tokens": 24}
    w = world(blocks, host_blocks, align=align, groups=groups, **config)
    w.watch()
    for number in range(rng.randrange(5, 30)):
        family, length = rng.randrange(4), rng.randrange(1, 31)
        prompt = [(7 * i + 3 * family) % 31 for i in range(length)]
        w.submit(request(f"r{number}", prompt, rng.randrange(1, 10), seed=family))
        match rng.choice(["run", "run", "land", "land", "land", "nothing", "abort", "rare"]):
            case "run":
                w.run()
            case "land":
                for group in range(groups):
                    w.land(rng.randrange(1, 8), group)
            case "abort":
                w.abort(f"r{rng.randrange(number + 1)}", FinishReason.ABORTED)
            case "rare":
                _disturb(w, rng.choice(["crash", "flush", "copied", "rows"]))
    w.run()
    w.check_ends()
    loaded += w.scheduler.stats().copied_to_device


def _disturb(w: World, how: str) -> None:
    if how == "crash":
        w.crash(blameless=True)
        w.ready()
    elif how == "flush":
        w.send(FlushCache())
    elif (sent := w.scheduler.devices[0].sent) and sent[0].sequences[0].state.name != "FINISHED":
        w.spoil(how)
        w.ready()


def test_any_conversations_keep_the_invariants() -> None:
    """World looks at them after every event; the FakeWorker knows what each block holds, in both tiers."""
    check_any()
    print(f"\n{loaded} blocks came back from the host")
    assert loaded > 300


@pytest.mark.parametrize("num_host_blocks", [0, 40])
def test_plans_do_not_depend_on_the_order_of_hashes(num_host_blocks: int) -> None:
    """The same events give the same plans: nothing here iterates a set."""
    first, second = world(num_host_blocks=num_host_blocks), world(num_host_blocks=num_host_blocks)
    for w in (first, second):
        for number, prompt in enumerate((LONG, OTHER, LONG, OTHER)):
            ask(w, f"r{number}", prompt, 3)
    assert first.plans == second.plans

"""Whoever watches knows what can be hit, and nothing is told where nobody does."""

from __future__ import annotations

from array import array
from typing import Any

from protos.engine_wire import FrontendLost, KvBlock, KvEvents, WatchKv
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import FlushCache
from scheduler_svc.engine.kv_journal import KvJournal
from scheduler_svc.engine.prefix_cache import chain, root
from tests.engine.world import World, request


def world(num_blocks: int = 64, **config: Any) -> World:
    made = World(
        EngineConfig(**{"block_size": 4, "max_num_seqs": 4, "max_step_tokens": 64, **config}), num_blocks=num_blocks
    )
    made.ready()
    return made


def told(w: World) -> list[KvEvents]:
    return [instruction for answer in w.answers for instruction in answer if isinstance(instruction, KvEvents)]


def test_a_watcher_begins_with_all_blocks_and_their_tokens() -> None:
    w = world()
    prompt = list(range(1, 12))
    w.submit(request("a", prompt, 1, tenant="t", cache_salt="s"))
    w.run()
    assert not told(w), "nobody watches"
    mirror = w.watch()
    first, second = mirror.blocks.values()
    assert (first.parent, second.parent) == (root("t", "s", ""), first.digest)
    assert first.root == second.root == root("t", "s", "")
    assert first.digest == chain(root("t", "s", ""), array("I", prompt[:4]))
    assert second.token_ids == array("I", prompt[4:8]).tobytes()


def test_changes_follow_in_their_order_until_nobody_watches() -> None:
    w = world(num_blocks=7)
    mirror = w.watch()
    w.submit(request("a", 9, 1))
    w.run()
    assert len(mirror.blocks) == 2
    w.submit(request("b", [31, *range(17)], 2))  # evicts what a left
    w.run()
    changes = [change for message in mirror.messages[1:] for change in message.changes]
    assert sum(isinstance(change, bytes) for change in changes) > 0
    count = len(told(w))
    w.unwatch("f")
    w.submit(request("c", 9, 1))
    w.run()
    assert len(told(w)) == count
    assert not w.scheduler.journal.dirty


def test_a_lost_worker_takes_everything_with_it() -> None:
    w = world()
    mirror = w.watch()
    w.submit(request("a", 17, 4))
    w.land()
    w.crash()
    assert (mirror.messages[-1].reset, mirror.messages[-1].changes) == (True, [])
    w.ready()
    w.run()
    assert mirror.messages[-1].changes
    w.send(FlushCache())
    assert not mirror.blocks
    assert not w.scheduler.journal.blocks


def test_a_second_watcher_gets_a_beginning_of_its_own_and_so_does_another_frontend() -> None:
    w = world()
    one = w.watch()
    w.submit(request("a", 9, 1))
    w.run()
    heard = len(one.messages)
    two, other = w.watch(), w.watch("g")
    assert len(one.messages) == heard
    assert one.blocks == two.blocks == other.blocks
    assert one.number == two.number == other.number
    w.submit(request("b", [30] * 9, 1))
    w.run()
    assert len(one.blocks) == 4
    assert one.blocks == two.blocks == other.blocks
    w.mirrors = w.mirrors[:2]
    w.send(FrontendLost("g"))
    w.send(FlushCache())
    assert [message.frontend for message in told(w)[-1:]] == ["f"]
    assert not one.blocks


def test_without_caching_there_is_nothing_to_tell() -> None:
    w = world(prefix_caching=False)
    mirror = w.watch()
    w.submit(request("a", 17, 4))
    w.run()
    assert len(mirror.messages) == 1


def test_copies_in_several_pools_are_one_block() -> None:
    """Told is the first that comes and the last that goes, whichever pools they are in."""
    journal, block = KvJournal(), KvBlock(b"d", b"r", b"r", b"")
    journal.watch(WatchKv(1))
    for _ in range(3):
        journal.stored(block)
    assert [message.changes for message in journal.take()] == [[block], [block]]
    journal.removed(b"d")
    journal.lost([b"d"])
    assert not journal.dirty
    journal.removed(b"d")
    assert [message.changes for message in journal.take()] == [[b"d"]]
    journal.stored(block)
    journal.stored(block)
    journal.lost([b"d"])
    journal.lost([b"d"])
    [message] = journal.take()
    assert (message.reset, message.changes) == (True, [])

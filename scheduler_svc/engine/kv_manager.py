"""Block tables: what a sequence needs, reuses, publishes and gives back."""

from __future__ import annotations

from math import lcm

from protos.engine_wire import KvBlock
from scheduler_svc.engine.block_pool import BlockPool
from scheduler_svc.engine.host_tier import HostTier
from scheduler_svc.engine.kv_journal import KvJournal
from scheduler_svc.engine.prefix_cache import NULL, PrefixCache
from scheduler_svc.engine.sequence import Sequence


class KVManager:
    """The blocks of one epoch.

    A sequence's table, from its admission to its next row:

    positions   |0 …            hits |          settled |         hi | + drafts |
    block_ids   |  shared, read-only |     its own, covered at admission  |  grown by rows  |
                                     ^ computed starts here, on a multiple of `align`

    A hit in the host takes a block of its own, which the plan copies to before its rows. From there on it is like one
    that the plan fills: published once that is sent.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        align: int,
        caching: bool,
        journal: KvJournal | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        self.block_size = block_size
        self.caching = caching
        self.host = HostTier(num_host_blocks)
        self.pool = BlockPool(num_blocks, journal, self.host)
        self.cache = PrefixCache(self.pool, block_size)
        self._hit_unit = lcm(block_size, align) // block_size  # blocks

    def blocks(self, num_positions: int) -> int:
        return -(-num_positions // self.block_size)

    def reusable(self, sequence: Sequence) -> list[int] | None:
        """Published blocks of the sequence's prefix, leaving at least one token to compute; None if it has to hold.

        The null block stands for each that has to come from the host.
        """
        hashes = self._usable(sequence)
        hits = self.cache.find(hashes)
        if digest := self.cache.being_filled(hashes, len(hits)):
            self.cache.hold(sequence, digest)
            return None
        return hits[: len(hits) - len(hits) % self._hit_unit]

    def outlook(self, sequence: Sequence, reserve: int) -> int | None:
        """How many of its tokens it would find here, now or once its leader is through; None where it has no room."""
        hashes = self._usable(sequence)
        hits = self.cache.find(hashes)
        if digest := self.cache.being_filled(hashes, len(hits)):
            return (hashes.index(digest) + 1) * self.block_size
        hits = hits[: len(hits) - len(hits) % self._hit_unit]
        return len(hits) * self.block_size if self.room_for(sequence, hits, reserve) else None

    def _usable(self, sequence: Sequence) -> list[bytes]:
        """Digests of the blocks that it may hit: at least one token is left to compute."""
        if not (self.caching and sequence.reusable):
            return []
        usable = min(sequence.settled - 1, sequence.reusable) // self.block_size
        return self.cache.extend_hashes(sequence)[: usable - usable % self._hit_unit]

    def room_for(self, sequence: Sequence, hits: list[int], reserve: int) -> bool:
        """Whether all its known tokens fit, with `reserve` blocks left."""
        shared = _shared(hits)
        evictable = sum(
            not self.pool.refs[block] for block in shared
        )  # hits that count as available until they are shared
        return self.blocks(sequence.settled) - len(shared) + reserve <= self.pool.available - evictable

    def admit(self, sequence: Sequence, hits: list[int]) -> int:
        """Gives it blocks for all its known tokens; answers how many tokens of its prompt come from the host."""
        shared = _shared(hits)
        self.pool.share(shared)
        loads = [i for i, block in enumerate(hits) if block == NULL]
        sources = [self.host.fetch(sequence.hashes[i]) for i in loads]  # fenced before blocks are taken for them
        own = iter(self.pool.take(self.blocks(sequence.settled) - len(shared)))
        sequence.block_ids = [next(own) if block == NULL else block for block in hits]
        sequence.block_ids += own
        for i, source in zip(loads, sources, strict=True):
            self.host.load(source, sequence.block_ids[i])
        sequence.computed = len(hits) * self.block_size
        sequence.published = loads[0] if loads else len(hits)
        sequence.publish_at = (sequence.published + 1) * self.block_size
        if self.caching:
            self.cache.extend_hashes(sequence)
            self.cache.lead(sequence)
        size, prompt_len = self.block_size, sequence.prompt_len
        return sum(max(0, min(size, prompt_len - i * size)) for i in loads)

    def grow(self, sequence: Sequence, num_positions: int) -> list[int]:
        """New blocks so that the table covers `num_positions`. The caller has looked at `missing`."""
        new = self.pool.take(self.missing(sequence, num_positions))
        sequence.block_ids += new
        return new

    def missing(self, sequence: Sequence, num_positions: int) -> int:
        return max(0, self.blocks(num_positions) - len(sequence.block_ids))

    def publish(self, sequence: Sequence) -> list[Sequence]:
        """Full blocks whose tokens are settled and positions computed; returns the followers that they wake."""
        full = min(sequence.computed, sequence.settled) // self.block_size
        woken: list[Sequence] = []
        if self.caching:
            hashes = self.cache.extend_hashes(sequence)
            for i in range(sequence.published, full):
                if not self.pool.holds(hashes[i]):
                    self.pool.journal.stored(self._as_published(sequence, i))
                woken += self.cache.publish(sequence.block_ids[i], hashes[i])
        sequence.published = full
        sequence.publish_at = (full + 1) * self.block_size
        return woken

    def _as_published(self, sequence: Sequence, i: int) -> KvBlock:
        hashes, root, size = sequence.hashes, sequence.root, self.block_size
        token_ids = sequence.token_ids[i * size : (i + 1) * size].tobytes()
        return KvBlock(hashes[i], hashes[i - 1] if i else root, root, token_ids)


def _shared(hits: list[int]) -> list[int]:
    """Those that are on the device."""
    return [block for block in hits if block != NULL]

"""Every KV block of one epoch: who refers to it, and which may be taken next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from scheduler_svc.engine.host_tier import HostTier
from scheduler_svc.engine.kv_journal import KvJournal


class BlockPool:
    """Blocks 1..num_blocks−1; block 0 is null and never handed out.

    A block is in use (refs > 0), or cached (refs == 0 and published; the free list is the LRU), or blank (refs == 0).
    Blank ones go first, so a cached block is evicted only when nothing else is left: to the host, where that has room.
    """

    def __init__(self, num_blocks: int, journal: KvJournal | None = None, host: HostTier | None = None) -> None:
        self.num_blocks = num_blocks
        self.journal = journal or KvJournal()
        self.host = host or HostTier(0)
        self.refs = [0] * num_blocks
        self.hashes: list[bytes] = [b""] * num_blocks  # of published blocks
        self.by_hash: dict[bytes, int] = {}
        self.blank = list(range(num_blocks - 1, 0, -1))
        self.cached: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        return len(self.blank) + len(self.cached)

    def take(self, count: int) -> list[int]:
        """`count` blocks for one owner. The caller has looked at `available`."""
        taken = []
        for _ in range(count):
            block = self.blank.pop() if self.blank else self._evict()
            self.refs[block] = 1
            taken.append(block)
        return taken

    def share(self, blocks: Iterable[int]) -> None:
        """One more reader of published blocks."""
        for block in blocks:
            if not self.refs[block]:
                del self.cached[block]
            self.refs[block] += 1

    def drop(self, blocks: list[int]) -> None:
        """One owner or reader less. The tail goes first: a prefix is worth more than what follows it."""
        for block in reversed(blocks):
            self.refs[block] -= 1
            if not self.refs[block]:
                if self.hashes[block]:
                    self.cached[block] = None
                else:
                    self.blank.append(block)

    def publish(self, block: int, digest: bytes) -> None:
        """From now on the block is read-only and may be found, unless another holds the same tokens already."""
        if digest not in self.by_hash:
            self.by_hash[digest] = block
            self.hashes[block] = digest

    def holds(self, digest: bytes) -> bool:
        """Whether its tokens can be found, here or in the host."""
        return digest in self.by_hash or digest in self.host.by_hash

    def digests(self) -> list[bytes]:
        """All that can be found."""
        return list(dict.fromkeys((*self.by_hash, *self.host.by_hash)))

    def flush(self) -> None:
        """Forgets what nobody uses, and all that the host holds."""
        before = self.digests()
        self.host.clear()
        while self.cached:
            self.blank.append(self._unpublish()[0])
        for digest in before:
            self._tell(digest)

    def _evict(self) -> int:
        block, digest = self._unpublish()
        self._tell(self.host.save(digest, block))
        return block

    def _unpublish(self) -> tuple[int, bytes]:
        """The block that was used least recently, and what it held."""
        block, _ = self.cached.popitem(last=False)
        digest, self.hashes[block] = self.hashes[block], b""
        del self.by_hash[digest]
        return block, digest

    def _tell(self, digest: bytes) -> None:
        """Watchers know of both tiers as one: what went to the host is not gone."""
        if digest and not self.holds(digest):
            self.journal.removed(digest)

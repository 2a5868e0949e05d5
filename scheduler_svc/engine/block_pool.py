"""Every KV block of one epoch: who refers to it, and which may be taken next."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from scheduler_svc.engine.kv_journal import KvJournal


class BlockPool:
    """Blocks 1..num_blocks−1; block 0 is null and never handed out.

    A block is in use (refs > 0), or cached (refs == 0 and published; the free list is the LRU), or blank (refs == 0).
    Blank ones go first, so a cached block is evicted only when nothing else is left.
    """

    def __init__(self, num_blocks: int, journal: KvJournal | None = None) -> None:
        self.num_blocks = num_blocks
        self.journal = journal or KvJournal()
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

    def flush(self) -> None:
        while self.cached:
            self.blank.append(self._evict())

    def _evict(self) -> int:
        block, _ = self.cached.popitem(last=False)
        self.journal.removed(self.hashes[block])
        del self.by_hash[self.hashes[block]]
        self.hashes[block] = b""
        return block

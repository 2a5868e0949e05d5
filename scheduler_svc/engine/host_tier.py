"""The second tier of the prefix cache: blocks that the device had no room for, in the host's memory."""

from __future__ import annotations

from collections import OrderedDict

from protos.wire import Copy, Direction


class HostTier:
    """Host blocks 0..num_blocks−1 of one epoch. Each is free, or holds the tokens of one digest; the oldest goes first.

    evicted from the device ── TO_HOST ──► held here ── TO_DEVICE ──► read again, and held here still
                                              └──► pushed out: its tokens are nowhere

    Copies belong to the plan in the making. A host block that one of them names is fenced until that plan has landed:
    nothing else is copied there. Like a block that a plan fills, it is found once the plan is sent (R4).
    """

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free = list(range(num_blocks - 1, -1, -1))
        self.by_hash: OrderedDict[bytes, int] = OrderedDict()
        self.hashes = [b""] * num_blocks  # of those that are held
        self.fences = [0] * num_blocks  # copies in flight that name each
        self.copies: list[Copy] = []  # of the plan in the making
        self._arriving: list[tuple[bytes, int]] = []  # by those

    def save(self, digest: bytes, block: int) -> bytes:
        """Copies a block that the device is about to reuse; answers the digest that is held here no more for it.

        That is its own where there is no room: what is oldest here is being copied itself.
        """
        if digest in self.by_hash:
            self.by_hash.move_to_end(digest)
            return b""
        lost = b""
        if not self.free:
            if not self.by_hash or self.fences[next(iter(self.by_hash.values()))]:
                return digest
            lost, oldest = self.by_hash.popitem(last=False)
            self._drop(oldest)
        host_block = self.free.pop()
        self.fences[host_block] += 1
        self.copies.append((Direction.TO_HOST, block, host_block))
        self._arriving.append((digest, host_block))
        return lost

    def fetch(self, digest: bytes) -> int:
        """The host block of a digest that is held, fenced: `load` follows in the same plan."""
        self.by_hash.move_to_end(digest)
        host_block = self.by_hash[digest]
        self.fences[host_block] += 1
        return host_block

    def load(self, host_block: int, block: int) -> None:
        """Copies what was fetched into a block that nobody else refers to."""
        self.copies.append((Direction.TO_DEVICE, block, host_block))

    def take_copies(self) -> list[Copy]:
        """Of the plan that is being sent: what they bring here can be found from the next one on."""
        copies, self.copies = self.copies, []
        for digest, host_block in self._arriving:
            self.by_hash[digest] = host_block
            self.hashes[host_block] = digest
        self._arriving = []
        return copies

    def land(self, copies: list[Copy]) -> None:
        """A plan with these has been answered."""
        for _, _, host_block in copies:
            self.fences[host_block] -= 1
            if not self.fences[host_block] and not self.hashes[host_block]:
                self.free.append(host_block)

    def clear(self) -> list[bytes]:
        """Forgets everything; answers what that was. What is fenced is free when its copies have landed."""
        digests = list(self.by_hash)
        for host_block in self.by_hash.values():
            self._drop(host_block)
        self.by_hash.clear()
        return digests

    def _drop(self, host_block: int) -> None:
        self.hashes[host_block] = b""
        if not self.fences[host_block]:
            self.free.append(host_block)

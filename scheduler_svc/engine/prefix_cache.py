"""Which blocks hold which tokens: a hash chain over full blocks, and who waits for whom."""

from __future__ import annotations

from array import array
from hashlib import blake2b

from scheduler_svc.engine.block_pool import BlockPool
from scheduler_svc.engine.sequence import Sequence

DIGEST_SIZE = 16  # bytes
NULL = 0  # the null block
_NEXT_PLAN = b""  # no block's digest: who holds on it waits for this group's next plan


def root(tenant: str, salt: str, adapter: str) -> bytes:
    """The parent of a first block. Other tenants, salts and adapters (by digest) never meet: nobody learns what others
    asked, and the same name for other files is another adapter.
    """
    return _digest(tenant.encode(), salt.encode(), adapter.encode())


def domain(tenant: str, salt: str) -> bytes:
    """What an Admit says about whose tokens these are, without saying it."""
    return _digest(tenant.encode(), salt.encode())


def chain(parent: bytes, token_ids: array[int]) -> bytes:
    return blake2b(parent + token_ids.tobytes(), digest_size=DIGEST_SIZE).digest()


def _digest(*parts: bytes) -> bytes:
    hasher = blake2b(digest_size=DIGEST_SIZE)
    for part in parts:
        hasher.update(len(part).to_bytes(4, "little") + part)  # so that no two lists of parts are the same bytes
    return hasher.digest()


class PrefixCache:
    """Finds published blocks, and makes those wait who would compute what a running sequence is about to publish.

    leader      |== published ==|-- filling --|       admitted, computes these blocks
    follower    |== published ==|-- filling --| …     holds on the last digest it shares with a leader
    """

    def __init__(self, pool: BlockPool, block_size: int) -> None:
        self.pool = pool
        self.block_size = block_size
        self._leaders: dict[bytes, Sequence] = {}  # by digest of a block being filled
        self._followers: dict[bytes, dict[int, Sequence]] = {}  # by digest, then arrival

    def extend_hashes(self, sequence: Sequence) -> list[bytes]:
        """Digests of all full blocks of settled tokens."""
        hashes, size = sequence.hashes, self.block_size
        if len(hashes) < sequence.settled // size:
            if not hashes:
                submit = sequence.submit
                sequence.root = root(submit.tenant, submit.cache_salt, submit.adapter_digest)
            parent = hashes[-1] if hashes else sequence.root
            for begin in range(len(hashes) * size, sequence.settled - size + 1, size):
                parent = chain(parent, sequence.token_ids[begin : begin + size])
                hashes.append(parent)
        return hashes

    def find(self, hashes: list[bytes]) -> list[int]:
        """The blocks of the longest published prefix; the null block for each that only the host holds.

        What somebody is about to fill is not loaded a second time.
        """
        by_hash, in_host, blocks = self.pool.by_hash, self.pool.host.by_hash, []
        for digest in hashes:
            block = by_hash.get(digest, NULL)
            if block == NULL and (digest not in in_host or digest in self._leaders):
                break
            blocks.append(block)
        return blocks

    def being_filled(self, hashes: list[bytes], first: int) -> bytes:
        """The last digest from `hashes[first]` on that is being filled, without a gap; empty if the first is not."""
        last = b""
        for digest in hashes[first:]:
            if digest in self._leaders:
                last = digest
            elif digest not in self.pool.by_hash:
                break
        return last

    def hold(self, sequence: Sequence, digest: bytes) -> None:
        sequence.holds_on = digest
        self._followers.setdefault(digest, {})[sequence.arrival] = sequence

    def expect(self, sequence: Sequence) -> None:
        """`sequence` is to come in here, with the next plan that has room for it."""
        self.hold(sequence, _NEXT_PLAN)

    def take_expected(self) -> list[Sequence]:
        return self._wake(_NEXT_PLAN)

    @property
    def num_expected(self) -> int:
        return len(self._followers.get(_NEXT_PLAN, ()))

    def let_go(self, sequence: Sequence) -> None:
        """A follower that leaves."""
        followers = self._followers[sequence.holds_on]
        del followers[sequence.arrival]
        if not followers:
            del self._followers[sequence.holds_on]

    def lead(self, sequence: Sequence) -> None:
        """`sequence` is going to fill its full blocks from `published` on."""
        for digest in sequence.hashes[sequence.published :]:
            if digest not in self.pool.by_hash:
                self._leaders.setdefault(digest, sequence)

    def stop_leading(self, sequence: Sequence) -> list[Sequence]:
        """Whoever held for blocks that `sequence` will not fill any more, first come first."""
        released: list[Sequence] = []
        for digest in sequence.hashes[sequence.published :]:
            if self._leaders.get(digest) is sequence:
                del self._leaders[digest]
                released += self._wake(digest)
        return released

    def publish(self, block: int, digest: bytes) -> list[Sequence]:
        """The block can be hit from the next step on; returns those who held for it."""
        self.pool.publish(block, digest)
        self._leaders.pop(digest, None)
        return self._wake(digest)

    def _wake(self, digest: bytes) -> list[Sequence]:
        return list(self._followers.pop(digest, {}).values())

"""What is published, and what changed of it: for routers that send a prompt to where its beginning is."""

from __future__ import annotations

from collections.abc import Iterable

from protos.engine_wire import KvBlock, KvEvents, WatchKv


class KvJournal:
    """Every published block's tokens, and the changes since the last `take` while somebody watches.

    The blocks are kept whether somebody watches or not, since a watcher begins with all of them: one entry a published
    block, under a thousandth of the block's own memory. Pools of several workers may hold copies of one block: told is
    the first that comes and the last that goes. A pool's two tiers are one to it: what moves to the host stays.
    """

    def __init__(self) -> None:
        self.blocks: dict[bytes, KvBlock] = {}  # in the order of their publication: parents come before children
        self.dirty = False  # `take` has something
        self._more: dict[bytes, int] = {}  # copies beside the first
        self._number = 0  # of the last change that was told
        self._watching: dict[str, None] = {}  # frontends
        self._newcomers: list[WatchKv] = []
        self._changes: list[KvBlock | bytes] = []
        self._reset = False

    def stored(self, block: KvBlock) -> None:
        if block.digest in self.blocks:
            self._more[block.digest] = self._more.get(block.digest, 0) + 1
            return
        self.blocks[block.digest] = block
        if self._watching:
            self._changes.append(block)
            self.dirty = True

    def removed(self, digest: bytes) -> None:
        more = self._more.pop(digest, 0)
        if more > 1:
            self._more[digest] = more - 1
        if more or self.blocks.pop(digest, None) is None:
            return
        if self._watching:
            self._changes.append(digest)
            self.dirty = True

    def lost(self, digests: Iterable[bytes]) -> None:
        """A whole pool is gone."""
        for digest in digests:
            self.removed(digest)
        if not self.blocks and self._watching:
            self._changes.clear()
            self._reset = self.dirty = True

    def watch(self, request: WatchKv) -> None:
        if not request.watcher:
            self.unwatch(request.frontend)
            return
        self._watching[request.frontend] = None
        self._newcomers.append(request)
        self.dirty = True

    def unwatch(self, frontend: str) -> None:
        self._watching.pop(frontend, None)
        self._newcomers = [newcomer for newcomer in self._newcomers if newcomer.frontend != frontend]
        if not self._watching:
            self._changes.clear()
            self._reset = self.dirty = False

    def take(self) -> list[KvEvents]:
        """For those who watch, what has changed; then, for those who begin, all that is there."""
        told: list[KvEvents] = []
        if self._changes or self._reset:
            self._number += len(self._changes) + self._reset
            told = [KvEvents(self._number, self._changes, self._reset, 0, frontend) for frontend in self._watching]
        for newcomer in self._newcomers:
            told.append(KvEvents(self._number, list(self.blocks.values()), True, newcomer.watcher, newcomer.frontend))
        self._changes, self._newcomers = [], []
        self._reset = self.dirty = False
        return told

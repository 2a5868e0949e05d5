"""Who watches the published blocks, and what waits for each of them: bounded, whatever a watcher does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

import grpc

from protos.engine_wire import KvBlock, KvEvents
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.errors import ServiceError

MAX_WATCHERS: Final = 64  # of one frontend
MAX_WAITING: Final = 16_384  # changes; a watcher with more of them begins anew with all that is there
IN_A_MESSAGE: Final = 512  # changes at most, so that the largest block's tokens stay far below 4 MiB


@dataclass(frozen=True, slots=True)
class Part:
    """What goes into one message. `left` more parts belong to the same beginning; 0 in all later ones."""

    number: int  # of its last change; in a beginning: of the last one that it takes in
    changes: list[KvBlock | bytes]
    reset: bool  # forget everything before: all that is there begins here
    left: int
    of: int = 0  # parts of the beginning; 0: not one of them
    blocks: int = 0  # in the whole beginning


class Watch:
    """One watcher, of all blocks or of those under one root. It gathers until it is asked for more; one that gathers
    too much is to begin anew.
    """

    def __init__(self, link: EngineLink, token: int, root: bytes) -> None:
        self.token = token
        self._link, self._root = link, root
        self._known: set[bytes] = set()  # under the root; only looked into
        self._begun = False  # it has had a beginning, so that what all are told is news to it
        self._closed = False
        self._beginning: KvEvents | None = None
        self._changes: list[KvBlock | bytes] = []
        self._number = 0
        self._wake = asyncio.Event()

    def take(self, message: KvEvents) -> None:
        if message.watcher:
            self._begun = True
            self._beginning, self._number = message, message.number
            self._changes = []
        elif not self._begun:
            return
        elif message.reset:
            self._beginning, self._number = message, message.number
            self._changes = []
        else:
            self._changes += message.changes
            self._number = message.number
            if len(self._changes) > MAX_WAITING:
                self._begun, self._beginning, self._changes = False, None, []
        self._wake.set()

    def close(self) -> None:
        self._closed = True
        self._wake.set()

    async def parts(self) -> AsyncIterator[Part]:
        """Everything that is there, then every change, until `close`. Between two parts it gathers."""
        self._link.watch_kv(self.token)
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._closed:
                return
            if not self._begun:
                self._link.watch_kv(self.token)  # not sooner: one that does not read needs no beginning
                continue
            beginning, changes, number = self._beginning, self._changes, self._number
            self._beginning, self._changes = None, []
            if beginning:
                self._known.clear()
                for part in _beginning(self._of_root(beginning.changes), beginning.number):
                    yield part
            if changes := self._of_root(changes):
                for part in _rest(changes, number):
                    yield part

    def _of_root(self, changes: list[KvBlock | bytes]) -> list[KvBlock | bytes]:
        if not self._root:
            return changes
        known, kept = self._known, list[KvBlock | bytes]()
        for change in changes:
            if isinstance(change, bytes):
                if change in known:
                    known.remove(change)
                    kept.append(change)
            elif change.root == self._root:
                known.add(change.digest)
                kept.append(change)
        return kept


def _beginning(changes: list[KvBlock | bytes], number: int) -> Iterator[Part]:
    pieces = _pieces(changes) or [[]]
    blocks = sum(isinstance(change, KvBlock) for change in changes)
    for i, piece in enumerate(pieces):
        yield Part(number, piece, i == 0, len(pieces) - 1 - i, len(pieces), blocks)


def _rest(changes: list[KvBlock | bytes], number: int) -> Iterator[Part]:
    left = len(changes)
    for piece in _pieces(changes):
        left -= len(piece)
        yield Part(number - left, piece, False, 0)


def _pieces(changes: list[KvBlock | bytes]) -> list[list[KvBlock | bytes]]:
    return [changes[i : i + IN_A_MESSAGE] for i in range(0, len(changes), IN_A_MESSAGE)]


class KvWatchers:
    """All watchers of one frontend. The engine tells of changes only while there is one."""

    def __init__(self, link: EngineLink) -> None:
        self._link = link
        self._watches: dict[int, Watch] = {}
        self._tokens = itertools.count(1)
        link.on_kv_events(self._take)

    def __len__(self) -> int:
        return len(self._watches)

    def close(self) -> None:
        """Ends every watch, so that a server that stops need not cancel them."""
        for watch in self._watches.values():
            watch.close()

    @contextmanager
    def watch(self, root: bytes = b"") -> Iterator[Watch]:
        """Of all blocks, or of those under `root`. Raises ServiceError where too many watch already."""
        if len(self._watches) >= MAX_WATCHERS:
            raise ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{MAX_WATCHERS} watch already, the most that may")
        watch = Watch(self._link, next(self._tokens), root)
        self._watches[watch.token] = watch
        try:
            yield watch
        finally:
            del self._watches[watch.token]
            if not self._watches:
                self._link.watch_kv(0)

    def _take(self, message: KvEvents) -> None:
        if message.watcher:
            if watch := self._watches.get(message.watcher):
                watch.take(message)
            return
        for watch in self._watches.values():
            watch.take(message)

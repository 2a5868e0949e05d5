"""Who goes first, and who has to leave."""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from scheduler_svc.engine.sequence import Sequence

Key = TypeVar("Key", bound=tuple[float, int])


class Agenda(Generic[Key]):
    """Sequences by key, smallest first. Any can be taken out at any time, at logarithmic cost (lazy deletion)."""

    def __init__(self) -> None:
        self._items: dict[Key, Sequence] = {}
        self._heap: list[Key] = []

    def __len__(self) -> int:
        return len(self._items)

    def add(self, key: Key, sequence: Sequence) -> None:
        if key not in self._items:
            heappush(self._heap, key)
        self._items[key] = sequence

    def discard(self, key: Key) -> None:
        if self._items.pop(key, None) is not None and len(self._heap) > 2 * len(self._items) + 64:
            self._heap = list(self._items)
            heapify(self._heap)

    def first(self) -> tuple[Key, Sequence] | None:
        while self._heap:
            key = self._heap[0]
            if (sequence := self._items.get(key)) is not None:
                return key, sequence
            heappop(self._heap)
        return None


def preempted(running: list[Sequence]) -> Sequence:
    """Whoever leaves when blocks are out: lowest priority, youngest. `running` is sorted by key.

    Never the oldest: others leave before it, and alone it fits, since no limit is longer than the pool.
    """
    return running[-1]

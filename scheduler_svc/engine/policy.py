"""Who goes first, who has to leave, and who is told to come back later."""

from __future__ import annotations

from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from typing import Generic, TypeVar

from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.sequence import Sequence

Key = TypeVar("Key", bound=tuple[float, int])


class Agenda(Generic[Key]):
    """Sequences by key, smallest first. Any can be taken out at any time; the cost stays logarithmic (lazy deletion)."""

    def __init__(self) -> None:
        self._items: dict[Key, Sequence] = {}
        self._heap: list[Key] = []

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[Sequence]:
        """In order of arrival here, not of the key."""
        return iter(self._items.values())

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


def preempted(running: list[Sequence]) -> Sequence | None:
    """Whoever leaves when blocks are out: lowest priority, youngest; never the oldest. `running` is in order of the key."""
    return running[-1] if len(running) > 1 else None


MIN_RETRY, MAX_RETRY = 0.05, 60.0  # seconds
UNKNOWN_RETRY = 1.0  # seconds, before any departure from the queue was seen
HALF_LIFE = 5.0  # seconds in which an old rate loses half of its weight


class Doorkeeper:
    """Bounds the queue, and tells the refused when there should be room for them.

    Those who were refused stand in a line of their own: each new one is told the time after all earlier ones, at the rate
    at which sequences leave the queue.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._max_waiting = config.max_waiting
        self._max_waiting_tokens = config.max_waiting_tokens
        self._since = 0.0  # time of the last measurement
        self._departed = 0  # sequences that had left the queue by then
        self._rate = 0.0  # sequences a second that leave the queue
        self._refused = 0.0  # sequences refused and not yet made room for

    def refuses(self, count: int, tokens: int, waiting: int, waiting_tokens: int) -> str:
        """Why `count` more sequences of `tokens` in all are too many; empty if they are not."""
        if waiting + count > self._max_waiting:
            return f"the queue is full: {waiting} sequences wait, max_waiting is {self._max_waiting}"
        if waiting_tokens + tokens > self._max_waiting_tokens:
            return (
                f"the queue is full: {waiting_tokens} tokens wait, {tokens} more are over max_waiting_tokens "
                f"{self._max_waiting_tokens}"
            )
        return ""

    def retry_after(self, count: int) -> float:
        self._refused += count
        if self._rate <= 0.0:
            return UNKNOWN_RETRY
        return min(MAX_RETRY, max(MIN_RETRY, self._refused / self._rate))

    def tick(self, now: float, departed: int, waiting: bool) -> None:
        """Measures the rate of departures, of which there were `departed` so far. Time in which nobody waited says nothing."""
        elapsed = now - self._since
        if elapsed < 0.1:
            return
        count = departed - self._departed
        if self._since and (waiting or count):
            keep = 0.5 ** (elapsed / HALF_LIFE) if self._rate else 0.0
            self._rate = keep * self._rate + (1 - keep) * count / elapsed
        self._refused = max(0.0, self._refused - count) if waiting else 0.0
        self._departed, self._since = departed, now

"""Who goes first, and who has to leave."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Generic, TypeVar

from scheduler_svc.engine.sequence import Sequence

if TYPE_CHECKING:
    from scheduler_svc.engine.fairness import Account

FAR = 4  # steps of all who run

Key = TypeVar("Key", bound=tuple[float, ...])
Item = TypeVar("Item")


class Agenda(Generic[Key, Item]):
    """Items by key, smallest first. Any can be taken out at any time, at logarithmic cost (lazy deletion)."""

    def __init__(self) -> None:
        self._items: dict[Key, Item] = {}
        self._heap: list[Key] = []

    def __len__(self) -> int:
        return len(self._items)

    def values(self) -> Iterable[Item]:
        """In the order in which they were added."""
        return self._items.values()

    def newest(self) -> Iterator[Item]:
        """Last added first."""
        return reversed(self._items.values())

    def add(self, key: Key, item: Item) -> None:
        if key not in self._items:
            heappush(self._heap, key)
        self._items[key] = item

    def discard(self, key: Key) -> None:
        if self._items.pop(key, None) is not None and len(self._heap) > 2 * len(self._items) + 64:
            self._heap = list(self._items)
            heapify(self._heap)

    def first(self) -> tuple[Key, Item] | None:
        while self._heap:
            key = self._heap[0]
            if (item := self._items.get(key)) is not None:
                return key, item
            heappop(self._heap)
        return None


def turn(sequence: Sequence) -> tuple[int, float, int]:
    """The one order: who is served first, and who is preempted last."""
    return (sequence.submit.priority, sequence.account.counter, sequence.arrival)


def preempted(running: list[Sequence], several_tenants: bool) -> Sequence:
    """Whoever leaves when blocks are out: lowest priority, tenant most above its share, youngest.

    `running` is sorted by priority and arrival. Never the oldest of a tenant: others leave before it, and alone it
    fits, since no limit is longer than the pool.
    """
    return max(running, key=turn) if several_tenants else running[-1]


def displaced(
    running: list[Sequence], accounts: Iterable[Account], waiting: Sequence, num_running: int
) -> Sequence | None:
    """Who leaves so that `waiting` may come in, where its tenant is below its share; None where it has to wait.
    `running` are those of one worker group, `num_running` counts those of all.

    The youngest of the tenant most above its share, of no better priority than `waiting`. A tenant that has had no more
    than another may take slots from it until it has half as many, for its weight; and until it has as many while it is
    FAR behind. The rest it gets as streams end: hardly anybody is displaced where streams are short, nobody in turns.
    """
    far = FAR * num_running * waiting.account.output_cost
    above = [account for account in accounts if account.running and _may_take(waiting.account, account, far)]
    if not above:
        return None
    priority = waiting.submit.priority
    victims = (s for s in running if s.account in above and s.submit.priority >= priority)
    return max(victims, key=turn, default=None)


def _may_take(newcomer: Account, other: Account, far: float) -> bool:
    behind = other.counter - newcomer.counter
    if other is newcomer or behind < 0:
        return False
    parts = 1 if behind > far else 2
    return parts * (newcomer.running + 1) * other.weight <= (other.running - 1) * newcomer.weight

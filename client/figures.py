"""What `pagewire top` shows, worked out of two readings of a service's counters."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from pagewire.v1.admin_pb2 import GetStatsResponse, Histogram

WINDOW = 10.0  # seconds that rates and quantiles are of


@dataclass(frozen=True)
class Reading:
    at: float  # seconds, of a clock that never goes back
    stats: GetStatsResponse


class History:
    """The newest readings, as many as the window holds and one before it. A service that began anew begins one."""

    def __init__(self) -> None:
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        if self._readings and reading.stats.uptime_seconds < self._readings[-1].stats.uptime_seconds:
            self._readings.clear()
        self._readings.append(reading)
        while len(self._readings) > 2 and self._readings[1].at <= reading.at - WINDOW:
            self._readings.popleft()

    @property
    def change(self) -> Change | None:
        return Change(self._readings[0], self._readings[-1]) if self._readings else None


@dataclass(frozen=True)
class Change:
    """From one reading to a later one; both may be the same, and then nothing has changed."""

    before: Reading
    after: Reading

    @property
    def now(self) -> GetStatsResponse:
        return self.after.stats

    @property
    def seconds(self) -> float:
        return self.after.at - self.before.at

    def rate(self, counter: str) -> float:
        """A second."""
        return self._rate(getattr(self.before.stats, counter), getattr(self.now, counter))

    def quantiles(self, histogram: str, shares: Iterable[float]) -> list[float] | None:
        """Of the window, or of all time where it holds nothing; None where nothing ever was."""
        after: Histogram = getattr(self.now, histogram)
        before: Histogram = getattr(self.before.stats, histogram)
        counts = list(after.counts)
        if len(before.counts) == len(counts) and sum(before.counts) < sum(counts):
            counts = [new - old for new, old in zip(counts, before.counts, strict=True)]
        if not sum(counts):
            return None
        return [quantile(list(after.bounds), counts, share) for share in shares]

    def tenant_rate(self, name: str, counter: str) -> float:
        before = next((getattr(t, counter) for t in self.before.stats.tenants if t.name == name), 0)
        after = next((getattr(t, counter) for t in self.now.tenants if t.name == name), 0)
        return self._rate(before, after)

    def worker_rate(self, place: int, counter: str) -> float:
        if place >= len(self.before.stats.workers):
            return 0.0
        return self._rate(getattr(self.before.stats.workers[place], counter), getattr(self.now.workers[place], counter))

    def _rate(self, before: float, after: float) -> float:
        return (after - before) / self.seconds if self.seconds > 0 else 0.0


def quantile(bounds: list[float], counts: list[int], share: float) -> float:
    """As Prometheus reckons: evenly within a range; what is above all bounds counts as the last of them."""
    rank, below = share * sum(counts), 0
    for place, count in enumerate(counts[:-1]):
        if count and below + count >= rank:
            low = bounds[place - 1] if place else 0.0
            return low + (bounds[place] - low) * (rank - below) / count
        below += count
    return bounds[-1]

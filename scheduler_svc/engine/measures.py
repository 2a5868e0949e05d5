"""What the engine observes and decides nothing by: how values spread, who was refused, what each tenant got.

Observed once a step, an admission or a refusal, never once a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from protos.engine_wire import FinishReason, Histogram, TenantFigures
from scheduler_svc.engine.config import EngineConfig

# 1 ms to 75 s, six to a decade.
SECONDS = tuple(round(digit * 10.0**power, 9) for power in range(-3, 2) for digit in (1, 1.5, 2, 3, 5, 7.5))
COUNTS = tuple(float(1 << power) for power in range(15))  # 1 to 16,384 rows or tokens
MAX_STRANGERS = 64  # tenants with figures of their own, besides those that the configuration names
OTHERS = "(others)"


class Spread:
    """A Histogram in the making."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float, times: int = 1) -> None:
        """`times` equal values that are `value` each."""
        self.counts[bisect_left(self.bounds, value)] += times
        self.total += value * times

    def freeze(self) -> Histogram:
        return Histogram(self.bounds, tuple(self.counts), self.total)


class Tally:
    """One tenant's since the start, whether or not the ledger still knows it."""

    __slots__ = ("forgotten_output_tokens", "name", "prompt_tokens", "refused", "requests")

    def __init__(self, name: str) -> None:
        self.name = name
        self.requests = self.refused = self.prompt_tokens = self.forgotten_output_tokens = 0


class Tallies:
    """A bounded number of them: names come from callers, and each is a label for ever.

    Who is named in the configuration has one from the start; strangers get theirs as they come, until there are enough.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._tallies = {tenant.name: Tally(tenant.name) for tenant in config.tenants}
        self._most = len(self._tallies) + MAX_STRANGERS
        self._others = Tally(OTHERS)

    def of(self, name: str) -> Tally:
        tally = self._tallies.get(name)
        if tally is None:
            if len(self._tallies) >= self._most:
                return self._others
            tally = self._tallies[name] = Tally(name)
        return tally

    def figures(self, live: Iterable[tuple[Tally, int, int, int]]) -> list[TenantFigures]:
        """`live` has (tally, running, waiting, output tokens) of every account that there is."""
        now: dict[str, list[int]] = {}
        for tally, *numbers in live:
            sums = now.setdefault(tally.name, [0, 0, 0])
            for place, number in enumerate(numbers):
                sums[place] += number
        figures = []
        for tally in (*self._tallies.values(), self._others):
            running, waiting, output_tokens = now.get(tally.name, (0, 0, 0))
            if not (tally.requests or tally.refused):
                continue
            output_tokens += tally.forgotten_output_tokens
            figures.append(
                TenantFigures(
                    tally.name, running, waiting, tally.requests, tally.refused, tally.prompt_tokens, output_tokens
                )
            )
        return figures


class Measures:
    def __init__(self) -> None:
        self.queue_wait = Spread(SECONDS)
        self.step_seconds = Spread(SECONDS)
        self.step_rows = Spread(COUNTS)
        self.step_tokens = Spread(COUNTS)
        self.refused: dict[FinishReason, int] = {}

    def planned(self, rows: int, tokens: int) -> None:
        self.step_rows.add(rows)
        self.step_tokens.add(tokens)

    def refuse(self, reason: FinishReason, count: int = 1) -> None:
        self.refused[reason] = self.refused.get(reason, 0) + count

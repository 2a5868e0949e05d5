"""What frontends see of their clients, as numbers that add up over any number of frontends.

Each process has one Observer. Its whole state goes to the engine's loop as `Observed`, before every question for stats
and, where there are several frontends, once a second while something happens. The loop keeps the newest of each and
what the departed had (Frontends), so that whoever asks, through whichever frontend, gets the sum.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from protos.engine_wire import FrontendStats, Histogram, Observed
from scheduler_svc.engine.measures import COUNTS, SECONDS, Spread

_LARGEST = 1 << 53  # of a count: up to here sums stay numbers that every client's floats can tell apart
_HISTOGRAMS = {
    "first_token": SECONDS,
    "between_tokens": SECONDS,
    "whole": SECONDS,
    "queue": SECONDS,
    "prefill": SECONDS,
    "decode": SECONDS,
    "prompt_tokens": COUNTS,
    "output_tokens": COUNTS,
}


@dataclass(frozen=True, slots=True)
class StreamFacts:
    """One stream at its end. Seconds since the call began; `queued` and `first_token` only where it had a token."""

    index: int
    finish: str  # stop or length; abort or error where it was broken off
    queued: float
    first_token: float
    total: float
    cached_tokens: int
    output_tokens: int


class Observer:
    """Belongs to the event loop's thread. Told once a message of a stream, never once a token."""

    def __init__(self) -> None:
        self._spreads = {name: Spread(bounds) for name, bounds in _HISTOGRAMS.items()}
        self._first_token, self._between = self._spreads["first_token"], self._spreads["between_tokens"]
        self._finished: Counter[str] = Counter()
        self._calls: Counter[str] = Counter()

    def first_token(self, seconds: float) -> None:
        self._first_token.add(seconds)

    def more_tokens(self, seconds: float, count: int) -> None:
        """A message with `count` tokens, so long after the last: each has an equal share of that time."""
        self._between.add(seconds / count, count)

    def stream_ended(self, facts: StreamFacts, prompt_tokens: int) -> None:
        self._finished[facts.finish] += 1
        if facts.finish not in ("stop", "length"):
            return
        spreads = self._spreads
        spreads["whole"].add(facts.total)
        spreads["prompt_tokens"].add(prompt_tokens)
        spreads["output_tokens"].add(facts.output_tokens)
        if facts.output_tokens:
            spreads["queue"].add(facts.queued)
            spreads["prefill"].add(max(0.0, facts.first_token - facts.queued))
            spreads["decode"].add(facts.total - facts.first_token)

    def call_ended(self, method: str, code: str) -> None:
        self._calls[f"{method} {code}"] += 1

    def snapshot(self, open_calls: int) -> FrontendStats:
        return FrontendStats(
            **{name: spread.freeze() for name, spread in self._spreads.items()},
            finished=tuple(self._finished.items()),
            calls=tuple(self._calls.items()),
            open_calls=open_calls,
        )


class Frontends:
    """The loop's side: the newest word of each frontend, and the sum of those that have gone."""

    def __init__(self) -> None:
        self._newest: dict[str, FrontendStats] = {}
        self._gone = FrontendStats()

    def take(self, message: Observed) -> None:
        self._newest[message.frontend] = message.stats

    def lost(self, frontend: str) -> None:
        """Its counts stay, or counters would fall; its open calls are closed."""
        if stats := self._newest.pop(frontend, None):
            self._gone = _without_calls(merged([self._gone, stats]))

    def sum(self) -> FrontendStats:
        return merged([self._gone, *self._newest.values()])


def check(stats: FrontendStats) -> None:
    """That the loop can add it up: what comes over a socket is right in form, and may still be nonsense.

    Raises msgspec.ValidationError, as for a message that is wrong in form.
    """
    counts = {"open_calls": stats.open_calls, **dict(stats.finished), **dict(stats.calls)}
    for name, bounds in _HISTOGRAMS.items():
        histogram: Histogram = getattr(stats, name)
        if histogram == Histogram():
            continue
        if histogram.bounds != bounds or len(histogram.counts) != len(bounds) + 1:
            raise msgspec.ValidationError(f"stats: the histogram `{name}` has not this service's bounds")
        if not (math.isfinite(histogram.total) and histogram.total >= 0):
            raise msgspec.ValidationError(f"stats: the sum of `{name}` is {histogram.total}")
        counts |= {f"{name}[{i}]": count for i, count in enumerate(histogram.counts)}
    for name, count in counts.items():
        if not 0 <= count <= _LARGEST:
            raise msgspec.ValidationError(f"stats: {name} is {count}")


def merged(parts: Sequence[FrontendStats]) -> FrontendStats:
    finished: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for part in parts:
        finished.update(dict(part.finished))
        calls.update(dict(part.calls))
    return FrontendStats(
        **{name: merged_histogram([getattr(part, name) for part in parts]) for name in _HISTOGRAMS},
        finished=tuple(finished.items()),
        calls=tuple(calls.items()),
        open_calls=sum(part.open_calls for part in parts),
    )


def merged_histogram(parts: Sequence[Histogram]) -> Histogram:
    """Of equal bounds, see `check`. Empty ones fit every other."""
    filled = [part for part in parts if part.counts]
    if not filled:
        return Histogram()
    bounds = filled[0].bounds
    if any(part.bounds != bounds for part in filled):
        raise ValueError("histograms of different bounds cannot be added up")
    counts = tuple(map(sum, zip(*(part.counts for part in filled), strict=True)))
    return Histogram(bounds, counts, sum(part.total for part in filled))


def _without_calls(stats: FrontendStats) -> FrontendStats:
    return merged([stats, FrontendStats(open_calls=-stats.open_calls)])

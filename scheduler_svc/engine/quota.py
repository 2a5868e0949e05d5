"""Tokens a second, and how many at once: a bucket that time fills and tokens empty."""

from __future__ import annotations


class Bucket:
    """A prompt is taken at once, and only where there is enough; output tokens as they come, even below 0.

    So a stream that runs is never cut, and what it took too much keeps later ones out until it has come back.
    """

    __slots__ = ("_at", "_seen", "burst", "level", "rate")

    def __init__(self, rate: float, burst: float) -> None:
        self.rate, self.burst = rate, burst
        self.level = burst
        self._at = 0.0
        self._seen = 0  # output tokens that were taken

    def settle(self, now: float, output_tokens: int) -> None:
        """Brings the level up to date; `output_tokens` in all so far."""
        self.level = min(self.burst, self.level + self.rate * (now - self._at)) - (output_tokens - self._seen)
        self._at, self._seen = now, output_tokens

    def is_full(self, now: float, output_tokens: int) -> bool:
        self.settle(now, output_tokens)
        return self.level >= self.burst

    def missing(self, tokens: int) -> float:
        """Seconds until there are so many, if nobody takes any meanwhile."""
        return max(0.0, tokens - self.level) / self.rate

"""When a refused call is made again: at the time that the service itself names, a bounded number of times.

    Client(address, retry=Retry(attempts=5, budget=60))

A call is made again only

- where the service says RESOURCE_EXHAUSTED with a time to come back (RetryInfo), or UNAVAILABLE: by its RetryInfo if it
  has one, else by a backoff of our own that doubles. RESOURCE_EXHAUSTED without a time is a message over a size limit,
  which would not fit later either;
- as long as no token has come: what a stream has brought is never brought twice;
- while attempts and budget last, and only if the call's own timeout leaves time for the pause. Otherwise the service's
  last refusal is raised at once, without waiting for a deadline that cannot be met.

Every pause is up to a quarter longer than what was named, so that those who were refused together do not come back
together.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from client.errors import OverloadedError, ServiceError, UnavailableError

JITTER = 0.25


@dataclass(frozen=True)
class Retry:
    """A policy: how often, how long. Without one, a client raises the first refusal."""

    attempts: int = 5  # calls in all, the first one included
    budget: float = 60.0  # seconds; no attempt begins later than this behind the first one
    backoff: float = 0.2  # seconds before the second attempt, where the service names no time; doubles from there
    max_backoff: float = 5.0  # seconds

    def __post_init__(self) -> None:
        for field in fields(self):
            value, least = getattr(self, field.name), 1 if field.name == "attempts" else 0
            if not least <= value < float("inf"):
                raise ValueError(f"retry {field.name} is {value}: must be a finite number from {least}")

    def delay(self, error: ServiceError, failures: int) -> float | None:
        """Seconds until the next attempt, after `failures` of them; None where there is no use in one."""
        match error:
            case OverloadedError():
                return error.retry_after
            case UnavailableError():
                own = min(self.max_backoff, self.backoff * 2.0 ** (failures - 1))
                return own if error.retry_after is None else error.retry_after
            case _:
                return None


ONCE = Retry(attempts=1)


class Attempts:
    """One call's: made when the first attempt begins."""

    def __init__(
        self,
        retry: Retry | None,
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._retry, self._timeout = retry or ONCE, timeout
        self._clock, self._chance = clock, chance
        self._began = clock()
        self._failures = 0

    def time_left(self) -> float | None:
        """Of the whole call's timeout, for the attempt that begins now; None where it has none."""
        if self._timeout is None:
            return None
        return max(0.0, self._timeout - (self._clock() - self._began))

    def pause(self, error: ServiceError) -> float | None:
        """How long to wait after an attempt that ended so; None where `error` is the last word."""
        self._failures += 1
        delay = self._retry.delay(error, self._failures)
        if delay is None or self._failures >= self._retry.attempts:
            return None
        delay *= 1 + JITTER * self._chance()
        again = self._clock() - self._began + delay
        if again > self._retry.budget or (self._timeout is not None and again >= self._timeout):
            return None
        return delay

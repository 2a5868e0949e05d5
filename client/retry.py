"""When a refused call is made again: at the time that the service itself names, a bounded number of times.

    Client(address, retry=Retry(attempts=5, budget=60))
    Client([address, another], retry=Resume())

A call is made again only

- where the service says RESOURCE_EXHAUSTED with a time to come back (RetryInfo), or UNAVAILABLE: by its RetryInfo if it
  has one, else by a backoff of our own that doubles. RESOURCE_EXHAUSTED without a time is a message over a size limit,
  which would not fit later either;
- as long as no token has come: what a stream has brought is never brought twice. With `Resume` a stream that broke goes
  on behind what it brought, with the very tokens that it would have brought;
- while attempts and budget last, and only if the call's own timeout leaves time for the pause. Otherwise the service's
  last refusal is raised at once, without waiting for a deadline that cannot be met.

Every pause is up to a quarter longer than what was named, so that those who were refused together do not come back
together. Where a client has several addresses, each attempt goes to the next one, without a pause until all were tried.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, fields

from client.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    OverloadedError,
    ServiceError,
    UnavailableError,
)

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
                return self._own(failures) if error.retry_after is None else error.retry_after
            case _:
                return None

    def _own(self, failures: int) -> float:
        return min(self.max_backoff, self.backoff * 2.0 ** (failures - 1))


@dataclass(frozen=True)
class Resume(Retry):
    """A policy by which a broken stream goes on, as well. Attempts and budget are of one trouble: they count from the
    first failure behind the last message that came.

    A stream that the service ended because nobody read it goes on, too: when somebody reads it again.
    """

    attempts: int = 30
    budget: float = 120.0
    allow_inexact: bool = False  # goes on where the service is not exact: other tokens may follow than would have

    def delay(self, error: ServiceError, failures: int) -> float | None:
        match error:
            case OverloadedError(reason="SLOW_READER"):
                return 0.0
            case AlreadyExistsError():  # the service has not noticed yet that the stream is broken
                return self._own(failures)
            case FailedPreconditionError(reason="RESUME_FINGERPRINT" | "RESUME_INEXACT"):
                return 0.0  # at another address, see Attempts
            case _:
                return super().delay(error, failures)


ONCE = Retry(attempts=1)


class Places:
    """Which of a client's addresses its calls go to: the same one, until it is unavailable, then the next, around."""

    def __init__(self, count: int) -> None:
        self.count, self.current = count, 0

    def leave(self, place: int) -> None:
        if self.current == place:
            self.current = self.following(place)[0]

    def following(self, place: int) -> list[int]:
        """All of them, in turn; `place` itself comes last."""
        return [(place + i) % self.count for i in range(1, self.count + 1)]


class Attempts:
    """One call's: made when the first attempt begins. `place` is the address of the next one."""

    def __init__(
        self,
        retry: Retry | None,
        timeout: float | None,
        clock: Callable[[], float] = time.monotonic,
        chance: Callable[[], float] = random.random,
        places: Places | None = None,
    ) -> None:
        self._retry, self._timeout = retry or ONCE, timeout
        self._clock, self._chance = clock, chance
        self._places = places or Places(1)
        self.place = self._places.current
        self._unfit: set[int] = set()  # places where this stream can never go on
        self._began = self._since = clock()
        self._failures = 0

    @property
    def resume(self) -> Resume | None:
        return self._retry if isinstance(self._retry, Resume) else None

    def time_left(self) -> float | None:
        """Of the whole call's timeout, for the attempt that begins now; None where it has none."""
        if self._timeout is None:
            return None
        return max(0.0, self._timeout - (self._clock() - self._began))

    def progressed(self) -> None:
        """A message has come: whatever fails from now on is a trouble of its own."""
        self._failures = 0

    def again(self, error: ServiceError) -> float:
        """How long to wait after an attempt that ended so. Raises `error` where it is the last word."""
        if isinstance(error, UnavailableError):
            self._places.leave(self.place)
        if (pause := self.pause(error)) is None:
            raise error
        return pause

    def pause(self, error: ServiceError) -> float | None:
        """The same; None where `error` is the last word."""
        self._failures += 1
        now = self._clock()
        if self.resume and self._failures == 1:
            self._since = now
        delay = self._retry.delay(error, self._failures)
        if delay is None or self._failures >= self._retry.attempts:
            return None
        if isinstance(error, FailedPreconditionError):
            self._unfit.add(self.place)
        fit = [place for place in self._places.following(self.place) if place not in self._unfit]
        if not fit:
            return None
        is_elsewhere, self.place = fit[0] != self.place, fit[0]
        delay *= 0.0 if is_elsewhere and self._failures < self._places.count else 1 + JITTER * self._chance()
        if now - self._since + delay > self._retry.budget:
            return None
        if self._timeout is not None and now - self._began + delay >= self._timeout:
            return None
        return delay

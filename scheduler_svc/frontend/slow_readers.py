"""A client that does not read is waited for, at its own cost alone: its tokens gather, and then its call ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final, Protocol

import grpc
from google.rpc import error_details_pb2

from scheduler_svc.frontend.errors import DOMAIN, ServiceError

LOOKS: Final = 8  # within the limit, so that it is passed by an eighth at most
REASON: Final = "SLOW_READER"


class Writer(Protocol):
    def writing_for(self, now: float) -> float: ...

    def give_up(self, error: ServiceError) -> None: ...


class SlowReaders:
    """Looks at all open calls now and then: a message that waits for its client costs no timer of its own.

    `limit` in seconds; 0: clients are waited for without end.
    """

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self._limit, self._clock = limit, clock
        self._writers: dict[Writer, None] = {}
        self._timer: asyncio.TimerHandle | None = None

    @contextmanager
    def watch(self, writer: Writer) -> Iterator[None]:
        self._writers[writer] = None
        self._arm()
        try:
            yield
        finally:
            del self._writers[writer]

    def _arm(self) -> None:
        if self._limit and self._timer is None and self._writers:
            self._timer = asyncio.get_running_loop().call_later(self._limit / LOOKS, self._look)

    def _look(self) -> None:
        self._timer = None
        now = self._clock()
        for writer in self._writers:
            if writer.writing_for(now) >= self._limit:
                writer.give_up(too_slow(self._limit))
        self._arm()


def too_slow(limit: float) -> ServiceError:
    return _exhausted(f"the client has read nothing for {limit:g} s, the service's slow-reader-timeout")


def too_much_gathered(limit: int) -> ServiceError:
    return _exhausted(f"the client reads more slowly than log probabilities are made: over {limit} numbers wait for it")


def _exhausted(message: str) -> ServiceError:
    info = error_details_pb2.ErrorInfo(reason=REASON, domain=DOMAIN)
    return ServiceError(grpc.StatusCode.RESOURCE_EXHAUSTED, message, info)

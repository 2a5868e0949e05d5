"""Load shedding: what the engine has just said of its full queue, said again to whoever comes next.

In a burst nearly all calls are refused, and each that has to be validated, handed to the engine's thread and awaited
there takes twice the time from the workers' processors. So for as long as the engine allows it (`TokenDelta.shed_for`,
a fraction of a second) calls that ask for no less than one that it refused are refused here, before they are looked
at. The engine is told how many those were: it counts them, and they stand in the line that `retry_after` is told by.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from protos.engine_wire import Shed, TokenDelta
from scheduler_svc.frontend.errors import ServiceError, from_finish
from scheduler_svc.frontend.validation import Caller, Prepared


@dataclass
class _Closed:
    """The gate for one tenant, and for those of a priority no better and with no fewer sequences."""

    until: float
    priority: int
    sequences: int
    refusal: TokenDelta
    shed: int = 0  # sequences, since the engine was told last


class Gate:
    """`send` and `call_later` are those of the link and of the event loop. Seconds of `clock`."""

    def __init__(
        self,
        frontend: str,
        send: Callable[[Shed], None],
        clock: Callable[[], float],
        call_later: Callable[..., object],
    ) -> None:
        self._frontend, self._send, self._clock, self._call_later = frontend, send, clock, call_later
        self._closed: dict[str, _Closed] = {}  # by tenant

    def heed(self, prepared: Prepared, refusal: TokenDelta) -> None:
        """What the engine said to a call that was let through."""
        if refusal.shed_for <= 0:
            return
        tenant, first = refusal.tenant, prepared.submits[0]
        before = self._closed.get(tenant)
        self._closed[tenant] = _Closed(
            self._clock() + refusal.shed_for, first.priority, first.num_siblings, refusal, before.shed if before else 0
        )
        if before is None:
            self._call_later(refusal.shed_for, self._open, tenant)

    def check(self, caller: Caller, priority: int, sequences: int) -> None:
        """Raises ServiceError RESOURCE_EXHAUSTED while the gate is closed for such a call."""
        closed = self._closed.get(caller.tenant)
        if closed is None or self._clock() >= closed.until:
            return
        if priority >= closed.priority and sequences >= closed.sequences:
            closed.shed += sequences
            _refuse(closed.refusal)

    def _open(self, tenant: str) -> None:
        """… or not yet: the engine may have said it again."""
        closed = self._closed[tenant]
        if closed.shed:
            self._send(Shed(self._frontend, tenant, closed.shed))
            closed.shed = 0
        if (left := closed.until - self._clock()) > 0:
            self._call_later(left, self._open, tenant)
        else:
            del self._closed[tenant]


def _refuse(refusal: TokenDelta) -> NoReturn:
    error = from_finish(refusal, "")
    assert isinstance(error, ServiceError)  # as REJECTED always is
    raise error

"""A worker's place in the service over time: who died, how long things have been as they are, what was done."""

from __future__ import annotations

from collections import deque

from protos.engine_wire import Loss, WorkerFigures
from protos.wire import Timings

_KEPT = 8  # losses


class WorkerHistory:
    """Nothing is decided by it."""

    def __init__(self) -> None:
        self._state, self._since = "", 0.0
        self._steps = self._losses = 0
        self._busy = 0.0
        self._newest: deque[tuple[float, int, str]] = deque(maxlen=_KEPT)

    def see(self, state: str, now: float) -> None:
        if state != self._state:
            self._state, self._since = state, now

    def answered(self, timings: Timings) -> None:
        self._steps += 1
        self._busy += timings.forward + timings.sample

    def lost(self, pid: int, reason: str, now: float) -> None:
        self._losses += 1
        self._newest.appendleft((now, pid, reason))

    def figures(self, in_flight: int, now: float) -> WorkerFigures:
        return WorkerFigures(max(0.0, now - self._since), self._steps, self._busy, in_flight, self._losses)

    def losses(self, now: float) -> list[Loss]:
        return [Loss(now - at, pid, reason) for at, pid, reason in self._newest]

"""A device that does everything as late, as early and in as odd an order as it may, and sees whoever relies on more.

Every piece of work knows what has certainly happened before it (a vector clock: its stream's past, what its stream had
waited for, and what the host knew when it launched it). Two accesses to one buffer, one of them a write, of which
neither certainly comes before the other, are a Hazard: found whether or not this run's order made it matter.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from worker_svc.device.base import Array, Buffer, Event, Work

Clock = dict[str, int]  # by stream: how many of its operations


class Hazard(Exception):
    """Somebody reads what may not be there yet, or overwrites what may still be read."""


@dataclass(eq=False)
class Op:
    """`reads` and `writes` are all that its work may touch."""

    stream: str
    number: int
    before: Clock
    work: Work
    reads: frozenset[str]
    writes: frozenset[str]
    after: list[Op] = field(default_factory=list)  # the operations that must be done before, directly
    done: bool = False

    def __str__(self) -> str:
        return f"{self.stream} {self.number}"

    def is_before(self, clock: Clock) -> bool:
        return clock.get(self.stream, 0) >= self.number


class FakeBuffer:
    def __init__(self, device: FakeDevice, name: str, size: int, dtype: np.dtype[Any]) -> None:
        self.name, self._device = name, device
        self._values = np.zeros(size, dtype)
        self.readers: list[Op] = []
        self.writers: list[Op] = []

    @property
    def memory(self) -> Array:
        """For work that said so, while it is done."""
        running = self._device.running
        if running is None or self.name not in running.reads | running.writes:
            raise Hazard(f"{running or 'the host'} touches {self.name}, and did not say so")
        return self._values

    def fill(self, values: Array) -> None:
        self._device.pass_time()
        self._known([*self.readers, *self.writers], "overwrites")
        self._values[: len(values)] = values

    def read(self, count: int) -> Array:
        self._device.pass_time()
        self._known(self.writers, "reads")
        return self._values[:count].copy()

    def _known(self, others: Sequence[Op], does: str) -> None:
        for op in others:
            if not op.is_before(self._device.known):
                raise Hazard(f"the host {does} {self.name}, and does not know that {op} is through with it")

    def touched_by(self, op: Op) -> None:
        """Raises Hazard."""
        writes = self.name in op.writes
        for other in [*self.writers, *(self.readers if writes else ())]:
            if not other.is_before(op.before):
                raise Hazard(f"{op} {'writes' if writes else 'reads'} {self.name}: {other} may still be at it")
        if writes:
            self.writers, self.readers = [op], []  # whoever comes after it comes after those before it
        else:
            self.readers.append(op)


class FakeEvent:
    def __init__(self, device: FakeDevice, last: Op | None, clock: Clock) -> None:
        self._device, self.last, self.clock = device, last, clock

    def wait(self) -> None:
        self._device.pass_time()
        if self.last:
            self._device.do(self.last)
        self._device.learn(self.clock)

    def has_come(self) -> bool:
        self._device.pass_time()
        if self.last and not self.last.done:
            return False
        self._device.learn(self.clock)
        return True


@dataclass(eq=False)
class FakeGraph:
    stream: FakeStream
    work: Work
    reads: Sequence[Buffer]
    writes: Sequence[Buffer]

    def replay(self) -> None:
        self.stream.run(self.work, reads=self.reads, writes=self.writes)


class FakeStream:
    def __init__(self, device: FakeDevice, name: str) -> None:
        self.name, self._device = name, device
        self._clock: Clock = {}
        self._last: Op | None = None
        self._awaited: list[Op] = []

    def run(self, work: Work, *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()) -> None:
        device = self._device
        device.pass_time()
        before = _later(self._clock, device.known)
        number = self._clock.get(self.name, 0) + 1
        after = [*self._awaited, *([self._last] if self._last else [])]
        op = Op(self.name, number, before, work, _names(reads), _names(writes), after)
        for touched in {id(each): each for each in (*reads, *writes)}.values():
            assert isinstance(touched, FakeBuffer)
            touched.touched_by(op)
        self._clock = {**before, self.name: number}
        self._last, self._awaited = op, []
        device.pending.append(op)

    def copy(self, to: Buffer, of: Buffer, count: int) -> None:
        def work() -> None:
            to.memory[:count] = of.memory[:count]

        self.run(work, reads=[of], writes=[to])

    def record(self) -> FakeEvent:
        return FakeEvent(self._device, self._last, dict(self._clock))

    def wait(self, event: Event) -> None:
        assert isinstance(event, FakeEvent)
        self._clock = _later(self._clock, event.clock)
        if event.last:
            self._awaited.append(event.last)

    def capture(self, work: Work, *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()) -> FakeGraph:
        return FakeGraph(self, work, reads, writes)


class FakeDevice:
    """`eager` is how likely it is, at each call, that a piece of work which may be done is done."""

    def __init__(self, rng: random.Random, eager: float = 0.3) -> None:
        self._rng, self._eager = rng, eager
        self.pending: list[Op] = []
        self.known: Clock = {}  # to the host
        self.running: Op | None = None
        self.waits = 0  # of the host for something that was not done

    def stream(self, name: str) -> FakeStream:
        return FakeStream(self, name)

    def host(self, name: str, size: int, dtype: np.dtype[Any]) -> FakeBuffer:
        return FakeBuffer(self, name, size, dtype)

    def buffer(self, name: str, size: int, dtype: np.dtype[Any]) -> FakeBuffer:
        return FakeBuffer(self, name, size, dtype)

    def learn(self, clock: Clock) -> None:
        self.known = _later(self.known, clock)

    def pass_time(self) -> None:
        """Some of what may be done is done, in any order."""
        while self._rng.random() < self._eager:
            ready = [op for op in self.pending if all(other.done for other in op.after)]
            if not ready:
                return
            self._do_one(self._rng.choice(ready))

    def do(self, op: Op) -> None:
        """And what it needs, and nothing else."""
        if op.done:
            return
        self.waits += 1
        todo = [op]
        while todo:
            missing = [other for other in todo[-1].after if not other.done]
            if missing:
                todo += missing
            elif (last := todo.pop()) and not last.done:
                self._do_one(last)

    def _do_one(self, op: Op) -> None:
        self.running = op
        try:
            op.work()
        finally:
            self.running = None
        op.done, op.after = True, []
        self.pending.remove(op)


def _names(buffers: Sequence[Buffer]) -> frozenset[str]:
    return frozenset(buffer.name for buffer in buffers)


def _later(one: Clock, other: Clock) -> Clock:
    return {name: max(one.get(name, 0), other.get(name, 0)) for name in one.keys() | other.keys()}

"""Steps in flight on a device: while one is computed, the next is packed, copied there and launched behind it.

    up       |copy N  |         |copy N+1|
    compute            |prepare N|forward N     |sample N|prepare N+1|forward N+1 …
    down                                                 |copy N|
    host     pack N ───────────► pack N+1 ──────► …       lands N

Nothing here waits but `land`. What each step brings and takes has a place of its own as often as steps may be in
flight, so nobody overwrites what is still read; everything between lives on the device and belongs to one stream, whose
order is the steps' order. So a step finds the tokens that the one before it sampled, and the host need not know them
(R1). Forward and sampling are two launches, since a mask may have to come between (R3).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from worker_svc.device.base import Array, Buffer, Device, Event, HostBuffer, Stream

WORD = np.dtype(np.int32)  # of everything that goes up and down; a float goes as its bits


@dataclass(frozen=True)
class Sizes:
    """Words that a step may bring, its mask, and what it may take back."""

    plan: int
    mask: int
    results: int


class StepEngine(Protocol):
    """What a step is on the device. Each call launches into `stream`, the same for all, and returns."""

    def warm_up(self, stream: Stream) -> None:
        """Once, before the first step: captures what is replayed later."""

    def prepare(self, stream: Stream, plan: Buffer) -> None:
        """Applies what the plan changes, and makes the inputs of the forward pass."""

    def forward(self, stream: Stream) -> None:
        """Up to the logits."""

    def sample(self, stream: Stream, mask: Buffer | None, results: Buffer) -> None:
        """From the logits to tokens: into the device's own tables, and into `results`."""


class StepError(Exception):
    """A step that cannot be launched: more words than there is room for, or too many in flight."""


@dataclass(eq=False)
class _Place:
    """One of the steps in flight has it from its launch until it has landed."""

    plan: tuple[HostBuffer, Buffer]
    mask: tuple[HostBuffer, Buffer]
    results: tuple[Buffer, HostBuffer]
    landing: Event | None = None
    num_results: int = 0


class Pipeline:
    """At most `depth` steps between `forward` and `land`."""

    def __init__(self, device: Device, engine: StepEngine, sizes: Sizes, depth: int = 2) -> None:
        self._engine, self._sizes = engine, sizes
        self._compute, self._up, self._down = (device.stream(name) for name in ("compute", "up", "down"))
        self._free = deque(_place(device, sizes, i) for i in range(depth))
        engine.warm_up(self._compute)
        self._launched: _Place | None = None  # computed up to the logits
        self._flying: deque[_Place] = deque()  # sampled as well

    def __len__(self) -> int:
        """Steps that have not landed."""
        return len(self._flying) + (self._launched is not None)

    @property
    def is_full(self) -> bool:
        """One step must land before another is launched."""
        return not self._free

    def forward(self, plan: Array) -> None:
        """Launches a step up to its logits. Raises StepError."""
        if self._launched:
            raise StepError("the step before has not been sampled")
        if not self._free:
            raise StepError(f"{len(self)} steps are in flight, and no more may be: one must land first")
        _check("plan", plan, self._sizes.plan)
        place = self._launched = self._free.popleft()
        self._bring(place.plan, plan)
        self._engine.prepare(self._compute, place.plan[1])
        self._engine.forward(self._compute)

    def sample(self, mask: Array | None, num_results: int) -> Event:
        """Launches the rest of it; `num_results` words are what `land` gives, without waiting once the event has come.
        Raises StepError.
        """
        place = self._launched
        if place is None:
            raise StepError("forward comes first")
        if num_results > self._sizes.results:
            raise StepError(f"a step takes back {num_results} words, and there is room for {self._sizes.results}")
        if mask is not None:
            _check("mask", mask, self._sizes.mask)
            self._bring(place.mask, mask)
        device, host = place.results
        self._engine.sample(self._compute, None if mask is None else place.mask[1], device)
        self._down.wait(self._compute.record())
        self._down.copy(host, device, num_results)
        landing = place.landing = self._down.record()
        place.num_results = num_results
        self._launched = None
        self._flying.append(place)
        return landing

    def between(self, launch: Callable[[Stream], None]) -> None:
        """`launch` is given the steps' own stream: behind all that was launched, ahead of what will be."""
        launch(self._compute)

    def land(self) -> Array:
        """Waits for the oldest step; what it takes back."""
        place = self._flying.popleft()
        _landing(place).wait()
        results = place.results[1].read(place.num_results)
        place.landing = None
        self._free.append(place)
        return results

    def _bring(self, way: tuple[HostBuffer, Buffer], words: Array) -> None:
        host, device = way
        host.fill(words)
        self._up.copy(device, host, len(words))
        self._compute.wait(self._up.record())


def _place(device: Device, sizes: Sizes, number: int) -> _Place:
    def pair(what: str, size: int) -> tuple[HostBuffer, Buffer]:
        return device.host(f"host {what} {number}", size, WORD), device.buffer(f"{what} {number}", size, WORD)

    results = pair("results", sizes.results)
    return _Place(pair("plan", sizes.plan), pair("mask", sizes.mask), (results[1], results[0]))


def _landing(place: _Place) -> Event:
    assert place.landing is not None, "a step that flies has been sampled"
    return place.landing


def _check(what: str, words: Array, room: int) -> None:
    if len(words) > room:
        raise StepError(f"the {what} of a step has {len(words)} words, and there is room for {room}")

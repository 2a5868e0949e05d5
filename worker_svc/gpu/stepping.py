"""Plans in, landings out: the host's side of a device that computes beside it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protos.wire import Mask, RowResult, StepPlan
from worker_svc.device.base import Event
from worker_svc.gpu.engine import GpuEngine
from worker_svc.gpu.sample_words import PackedSampling, SamplePacker
from worker_svc.gpu.sampler import counts_of, read_results
from worker_svc.gpu.step_words import PackedStep, StepPacker, Words
from worker_svc.pipeline import Pipeline


class Watch(Protocol):
    """Somebody who says when an event has come."""

    def follow(self, event: Event) -> None: ...

    def close(self) -> None: ...


class WatchThread:
    """Waits for one event after the other, in the order in which they come, and says so each time."""

    def __init__(self, say: Callable[[], None]) -> None:
        self._say = say
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="landings", daemon=True)
        self._thread.start()

    def follow(self, event: Event) -> None:
        self._events.put(event)

    def close(self) -> None:
        self._events.put(None)
        self._thread.join()

    def _run(self) -> None:
        while event := self._events.get():
            event.wait()
            self._say()


@dataclass(eq=False)
class Flight:
    """A Landing: the step's results, once they are here."""

    steps: Steps
    plan: StepPlan
    packed: PackedStep
    sampled: PackedSampling
    event: Event
    words: Words | None = None

    def has_come(self) -> bool:
        return self.words is not None or self.event.has_come()

    def rows(self) -> list[RowResult]:
        while self.words is None:
            self.steps.land()
        return read_results(self.words, self.plan, self.packed, self.sampled)


class Steps:
    """Between two epochs everything in flight is dropped, as the slots are."""

    def __init__(
        self, pipeline: Pipeline, engine: GpuEngine, packer: StepPacker, sampling: SamplePacker, watch: Watch
    ) -> None:
        self._pipeline, self._engine, self._packer, self._sampling = pipeline, engine, packer, sampling
        self._watch = watch
        self._flying: deque[Flight] = deque()
        self._launched: tuple[StepPlan, PackedStep] | None = None

    def forward(self, plan: StepPlan) -> None:
        """Waits where as many steps fly as may. Raises SlotError, ValueError or StepError, all before a launch."""
        packed = self._packer.pack(plan)
        self._engine.expect(packed.shape)
        if self._pipeline.is_full:
            self.land()
        self._pipeline.forward(packed.words)
        self._launched = plan, packed

    def sample(self, mask: Mask | None) -> Flight:
        assert self._launched is not None, "forward comes first"
        (plan, packed), self._launched = self._launched, None
        sampled = self._sampling.pack(plan, packed, mask)
        self._engine.expect_sampling(sampled.shape)
        shape, extra = packed.shape, sampled.shape.extra_results() + self._engine.pooled_words(sampled.shape)
        num_results = 2 * shape.outputs + 3 * shape.samples + extra
        event = self._pipeline.sample(sampled.words, num_results)
        flight = Flight(self, plan, packed, sampled, event)
        self._flying.append(flight)
        self._watch.follow(event)
        return flight

    def land(self) -> None:
        """The oldest flight has its words."""
        flight = self._flying.popleft()
        words = flight.words = self._pipeline.land()
        packed = flight.packed
        if packed.inputs.num_drafts.any():
            self._packer.settle(packed, counts_of(words, packed.shape, packed.inputs))

    def close(self) -> None:
        """Waits for what is in flight: its memory must not go before it."""
        while self._flying:
            self.land()
        self._watch.close()

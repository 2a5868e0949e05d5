"""Steps in flight on a device that finishes everything in any order: the tokens of one step after the other."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.device.fake import FakeBuffer, FakeDevice, Hazard
from worker_svc.device.base import Array, Buffer, Device, Event, Graph, Stream
from worker_svc.pipeline import WORD, Pipeline, Sizes, StepError

SLOTS, SIZES = 6, Sizes(plan=1 + 3 * 6, mask=6, results=6)
CAPTURED = (6, 4, 2)  # rows
MODULUS = 10_007


def mix(state: int, slot: int) -> int:
    return (state * 31 + 7 * slot + 1) % MODULUS


class ToyEngine:
    """A slot's next token is a mix of its last one; a mask adds to it. A plan has rows (slot, admitted, first)."""

    def __init__(self, device: Device, captured: Sequence[int] = ()) -> None:
        self.tables = device.buffer("tables", SLOTS, WORD)
        self.inputs = device.buffer("inputs", 1 + SLOTS, WORD)
        self.logits = device.buffer("logits", SLOTS, WORD)
        self._captured = captured
        self._graphs: dict[int, Graph] = {}
        self._rows = 0

    def warm_up(self, stream: Stream) -> None:
        for rows in self._captured:
            self._graphs[rows] = stream.capture(
                self._forward(rows), reads=[self.inputs, self.tables], writes=[self.logits]
            )

    def prepare(self, stream: Stream, plan: Buffer) -> None:
        def work() -> None:
            words = plan.memory
            count = int(words[0])
            self.inputs.memory[0] = count
            for i, (slot, admitted, first) in enumerate(words[1 : 1 + 3 * count].reshape(count, 3).tolist()):
                self.inputs.memory[1 + i] = slot
                if admitted:
                    self.tables.memory[slot] = first

        stream.run(work, reads=[plan], writes=[self.inputs, self.tables])

    def _forward(self, rows: int) -> Callable[[], None]:
        def work() -> None:
            for i in range(min(rows, int(self.inputs.memory[0]))):
                slot = int(self.inputs.memory[1 + i])
                self.logits.memory[i] = mix(int(self.tables.memory[slot]), slot)

        return work

    def forward(self, stream: Stream) -> None:
        fitting = [rows for rows in self._graphs if rows >= self._rows]
        if fitting:
            self._graphs[min(fitting)].replay()
        else:
            stream.run(self._forward(SLOTS), reads=[self.inputs, self.tables], writes=[self.logits])

    def expect(self, rows: int) -> None:
        """Of the next step: the host knows how many rows it has, and nothing of what is in them."""
        self._rows = rows

    def sample(self, stream: Stream, mask: Buffer | None, results: Buffer) -> None:
        def work() -> None:
            for i in range(int(self.inputs.memory[0])):
                token = int(self.logits.memory[i]) + (int(mask.memory[i]) if mask else 0)
                self.tables.memory[int(self.inputs.memory[1 + i])] = token
                results.memory[i] = token

        reads = [self.logits, self.inputs, *([mask] if mask else [])]
        stream.run(work, reads=reads, writes=[self.tables, results])


@dataclass
class Step:
    rows: list[tuple[int, int, int]]
    mask: list[int] | None

    def words(self) -> Array:
        return np.array([len(self.rows), *(number for row in self.rows for number in row)], WORD)


def steps_of(rng: random.Random, count: int) -> list[Step]:
    steps = []
    begun: set[int] = set()
    for _ in range(count):
        slots = rng.sample(range(SLOTS), rng.randint(1, SLOTS))
        rows = [(slot, int(slot not in begun or rng.random() < 0.2), rng.randrange(MODULUS)) for slot in slots]
        begun.update(slots)
        steps.append(Step(rows, [rng.randrange(5) for _ in rows] if rng.random() < 0.3 else None))
    return steps


def one_after_the_other(steps: list[Step]) -> list[list[int]]:
    tables, tokens = [0] * SLOTS, []
    for step in steps:
        for slot, admitted, first in step.rows:
            tables[slot] = first if admitted else tables[slot]
        token_of = [
            mix(tables[slot], slot) + (step.mask[i] if step.mask else 0) for i, (slot, _, _) in enumerate(step.rows)
        ]
        for (slot, _, _), token in zip(step.rows, token_of, strict=True):
            tables[slot] = token
        tokens.append(token_of)
    return tokens


def flown(
    device: FakeDevice, steps: list[Step], rng: random.Random, depth: int, engine: ToyEngine | None = None
) -> list[list[int]]:
    """Lands at random: as soon as it may, or when it must."""
    engine = engine or ToyEngine(device, CAPTURED if rng.random() < 0.7 else ())
    pipeline, tokens = Pipeline(device, engine, SIZES, depth), []
    landings: list[Event] = []
    for step in steps:
        while len(pipeline) >= depth or (pipeline and rng.random() < 0.3):
            tokens.append(pipeline.land().tolist())
        while pipeline and landings[-len(pipeline)].has_come() and rng.random() < 0.5:
            tokens.append(pipeline.land().tolist())
        engine.expect(len(step.rows))
        pipeline.forward(step.words())
        mask = None if step.mask is None else np.array(step.mask, WORD)
        landings.append(pipeline.sample(mask, len(step.rows)))
    while pipeline:
        tokens.append(pipeline.land().tolist())
    return tokens


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 2**63), st.integers(1, 4), st.sampled_from((0.0, 0.1, 0.5, 0.9)))
def test_fifty_schedules_each_give_the_tokens_of_one_step_after_the_other(seed: int, depth: int, eager: float) -> None:
    rng = random.Random(seed)
    for _ in range(50):
        steps = steps_of(rng, rng.randint(1, 8))
        assert flown(FakeDevice(rng, eager), steps, rng, depth) == one_after_the_other(steps)


def test_the_host_waits_for_nothing_but_landings() -> None:
    rng = random.Random(3)
    device = FakeDevice(rng, eager=0.0)
    engine = ToyEngine(device)
    pipeline = Pipeline(device, engine, SIZES, 2)
    landings = []
    for step in steps_of(rng, 2):
        pipeline.forward(step.words())
        landings.append(pipeline.sample(None, len(step.rows)))
    assert device.waits == 0
    assert not landings[0].has_come()
    pipeline.land()
    assert device.waits == 1


def test_the_next_plan_is_there_before_this_step_is_computed() -> None:
    device = FakeDevice(random.Random(3), eager=0.0)
    pipeline = Pipeline(device, ToyEngine(device), SIZES, 2)
    for step in steps_of(random.Random(3), 2):
        pipeline.forward(step.words())
        pipeline.sample(None, len(step.rows))
    second = [op for op in device.pending if op.stream == "up"][-1]
    device.do(second)
    assert not [op for op in device.pending if op.done]
    assert [op.stream for op in device.pending].count("compute") == 6, "nothing of either step had to be computed"


def test_more_steps_than_places_are_refused() -> None:
    device = FakeDevice(random.Random(1))
    pipeline = Pipeline(device, ToyEngine(device), SIZES, 1)
    (step,) = steps_of(random.Random(1), 1)
    pipeline.forward(step.words())
    with pytest.raises(StepError, match="has not been sampled"):
        pipeline.forward(step.words())
    pipeline.sample(None, len(step.rows))
    with pytest.raises(StepError, match="1 steps are in flight"):
        pipeline.forward(step.words())
    pipeline.land()
    with pytest.raises(StepError, match="100 words, and there is room for 19"):
        pipeline.forward(np.zeros(100, WORD))


# ---------------------------------------------------------------- hazards, injected


class Impatient(ToyEngine):
    """Reads the plan without waiting for it: on a stream of its own."""

    def __init__(self, device: Device) -> None:
        super().__init__(device)
        self._other = device.stream("other")

    def prepare(self, stream: Stream, plan: Buffer) -> None:
        super().prepare(self._other, plan)


class Shared(FakeDevice):
    """Both places of a pipeline have the same memory."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__(rng, 0.0)
        self._first: dict[str, FakeBuffer] = {}

    def host(self, name: str, size: int, dtype: np.dtype[Any]) -> FakeBuffer:
        return self._first.setdefault(name.rstrip("0123456789 "), super().host(name, size, dtype))


def test_use_before_ready_is_found() -> None:
    rng = random.Random(5)
    device = FakeDevice(rng, 0.9)
    with pytest.raises(Hazard, match="reads plan 0: up 1 may still be at it"):
        flown(device, steps_of(rng, 3), rng, 2, Impatient(device))


def test_overwrite_in_flight_is_found() -> None:
    rng = random.Random(5)
    device = Shared(rng)
    pipeline = Pipeline(device, ToyEngine(device), SIZES, 2)
    step, other = steps_of(rng, 2)
    pipeline.forward(step.words())
    pipeline.sample(None, len(step.rows))
    with pytest.raises(Hazard, match="the host overwrites host plan 0, and does not know that up 1 is through with it"):
        pipeline.forward(other.words())


def test_work_that_touches_more_than_it_says_is_found() -> None:
    device = FakeDevice(random.Random(1), 1.0)
    stream, secret = device.stream("compute"), device.buffer("secret", 1, WORD)
    stream.run(lambda: secret.memory.fill(1))
    with pytest.raises(Hazard, match="compute 1 touches secret, and did not say so"):
        stream.record().wait()

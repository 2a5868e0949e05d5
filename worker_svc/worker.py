"""The worker's main thread: Setup, then one plan after the other, until the link ends."""

from __future__ import annotations

import queue
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import msgspec

from protos.wire import (
    Epoch,
    Fault,
    LoadAdapter,
    Mask,
    Phase,
    Ready,
    Setup,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
    Timings,
    UnloadAdapter,
)
from worker_svc.backends.base import BackendError, Capacity, DeviceBackend, Landing
from worker_svc.link import Closed, Garbled, Landed, Link, Received

_NO_EPOCH = Epoch(0, 0)
_DOING = {Phase.LOADING: "reading weights", Phase.COMPILING: "warming up", Phase.RUNNING: "running"}


@dataclass(frozen=True)
class Flight:
    """A step that was launched."""

    plan: StepPlan
    arrived: float
    landing: Landing


class Worker:
    """Holds nothing that the Admits of a new epoch could not rebuild, but for weights, which the same Setup keeps."""

    def __init__(
        self,
        link: Link,
        create: Callable[[Setup], DeviceBackend],
        clock: Callable[[], float],
        mask_deadline: float,
    ) -> None:
        self._link, self._create, self._clock, self._mask_deadline = link, create, clock, mask_deadline
        self._set_aside: deque[Received] = deque()  # came while a mask was waited for
        self._loaded: tuple[Setup, DeviceBackend, Capacity] | None = None  # Setup without its epoch
        self._flying: deque[Flight] = deque()  # of this epoch
        self._epoch = _NO_EPOCH  # the one whose plans are taken
        self._rank = 0  # of a group that splits the model: all take the same plans and sample the same, rank 0 answers
        self._step = 0
        self._idle_since = clock()

    def run(self) -> str:
        """Serves until there is nobody to serve; returns why."""
        while True:
            message = self._set_aside.popleft() if self._set_aside else self._link.receive()
            match message:
                case Setup():
                    self._begin(message)
                case StepPlan(epoch=epoch) if epoch == self._epoch:
                    self._execute(message)
                case Landed():
                    self._land()
                case LoadAdapter(epoch=epoch) | UnloadAdapter(epoch=epoch) if epoch == self._epoch:
                    self._fault("adapters are not served")
                case Garbled(reason):
                    self._fault(reason)
                case StepPlan() | Mask() | LoadAdapter() | UnloadAdapter():
                    pass  # of an epoch that has ended
                case Shutdown(reason) | Closed(reason):
                    self._unload()
                    return reason

    def _begin(self, setup: Setup) -> None:
        """A new epoch: weights are kept where only the epoch is new."""
        self._epoch, self._step, self._rank = setup.epoch, 0, setup.tp_rank
        self._flying.clear()
        same = msgspec.structs.replace(setup, epoch=_NO_EPOCH)
        try:
            if self._loaded and self._loaded[0] == same:
                _, backend, capacity = self._loaded
                backend.reset(setup)
            else:
                self._unload()
                backend = self._create(setup)
                capacity = backend.load(setup, self._progress)
                if setup.batch_invariant and not capacity.exact:
                    raise BackendError(f"batch_invariant: the {capacity.backend} backend is not exact here")
                self._loaded = same, backend, capacity
        except Exception as error:
            self._unload()
            fatal = isinstance(error, BackendError)
            self._fault(str(error) if fatal else f"loading failed: {_one_line(error)}", fatal=fatal)
            return
        self._link.send(
            Ready(
                epoch=setup.epoch,
                rank=setup.tp_rank,
                num_blocks=capacity.num_blocks,
                num_host_blocks=capacity.num_host_blocks,
                align=capacity.align,
                exact=capacity.exact,
                graph_shapes=capacity.graph_shapes,
                device=capacity.device,
                dtype=capacity.dtype,
                backend=capacity.backend,
                max_model_len=capacity.max_model_len,
                vocab_size=capacity.vocab_size,
                fingerprint=capacity.fingerprint,
                quantization=capacity.quantization,
                kv_dtype=capacity.kv_dtype,
                step_seconds=capacity.step_seconds,
                propose_seconds=capacity.propose_seconds,
                hidden_size=capacity.hidden_size,
            )
        )
        self._idle_since = self._clock()

    def _execute(self, plan: StepPlan) -> None:
        """One step: plan → forward → (mask) → sample → result."""
        if plan.step != self._step + 1:
            self._fault(f"step {plan.step} came after step {self._step}")
            return
        assert self._loaded, "an epoch begins with a backend"
        backend = self._loaded[1]
        self._step = plan.step
        arrived = self._clock()
        try:
            backend.forward(plan)
            computed = self._clock()
            mask = self._await_mask(plan) if any(row.masked for row in plan.rows) else None
            if plan.epoch != self._epoch:
                return
            answer = backend.sample(mask)
        except Exception as error:
            self._fail(plan, error)
            return
        if not isinstance(answer, list):
            self._flying.append(Flight(plan, arrived, answer))
            self._land()
            return
        done = self._clock()
        timings = Timings(computed - arrived, done - computed, arrived - self._idle_since)
        self._answer(StepResult(plan.epoch, plan.step, answer, _copied(plan), timings))
        self._idle_since = done

    def _answer(self, result: StepResult) -> None:
        if self._rank == 0:
            self._link.answer(result)

    def _land(self) -> None:
        """Answers with the results that have come, in the order of their steps.

        A step that was launched behind another one is taken to have begun with that one's end.
        """
        while self._flying and self._flying[0].landing.has_come():
            flight = self._flying.popleft()
            try:
                rows = flight.landing.rows()
            except Exception as error:
                self._fail(flight.plan, error)
                return
            done, begun = self._clock(), max(flight.arrived, self._idle_since)
            timings = Timings(done - begun, 0.0, begun - self._idle_since)
            self._answer(StepResult(flight.plan.epoch, flight.plan.step, rows, _copied(flight.plan), timings))
            self._idle_since = done

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        self._unload()  # whatever state it is in, another epoch begins with a new one
        self._fault(f"step {plan.step} failed: {_one_line(error)}")

    def _await_mask(self, plan: StepPlan) -> Mask | None:
        """The plan's mask (R3): nothing is sampled without. None where the epoch has ended, or the wait ended it."""
        deadline = self._clock() + self._mask_deadline
        while plan.epoch == self._epoch:
            try:
                message = self._link.receive(max(0.0, deadline - self._clock()))
            except queue.Empty:
                self._fault(f"no mask for step {plan.step} within {self._mask_deadline:g} s")
                return None
            match message:
                case Mask(epoch=epoch, step=step) if (epoch, step) == (plan.epoch, plan.step):
                    return message
                case Landed():
                    self._land()  # which may end the epoch
                    continue
                case Setup() | Shutdown() | Closed():
                    self._epoch = _NO_EPOCH
            self._set_aside.append(message)
        return None

    def _progress(self, phase: Phase, share: float) -> None:
        self._link.send(Status(self._epoch, phase, rank=self._rank, progress=share, detail=_DOING[phase]))

    def _fault(self, reason: str, *, fatal: bool = False) -> None:
        """Ends the epoch from this side: its later plans are not taken."""
        self._link.send(Fault(self._epoch, self._step, reason, fatal))
        self._epoch = _NO_EPOCH
        self._flying.clear()

    def _unload(self) -> None:
        if self._loaded:
            self._loaded[1].close()
            self._loaded = None


def _copied(plan: StepPlan) -> list[int]:
    """Of a step that has been done: a backend does its copies before its rows, or raises."""
    return [host_block for _, _, host_block in plan.copies]


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"

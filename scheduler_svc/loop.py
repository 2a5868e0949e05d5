"""The thread around the engine: it hears workers and frontends, tells the engine, and does what the engine decides."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator

import zmq
from msgspec.structs import replace

from protos.curve import CurveError
from protos.engine_wire import (
    Abort,
    Adapter,
    Answer,
    Ask,
    FrontendBeat,
    FrontendHello,
    FrontendLost,
    FrontendStop,
    KvEvents,
    Observed,
    Outputs,
    Question,
    ServiceStatus,
    Shed,
    Submit,
    ToEngine,
    ToFrontend,
    WatchKv,
)
from protos.wire import StepPlan, StepResult
from scheduler_svc.config import LoopConfig
from scheduler_svc.engine.events import (
    AdapterFree,
    Drain,
    EndEpoch,
    Event,
    FlushCache,
    MaskRequest,
    Tick,
    WorkerLost,
    WorkerReady,
)
from scheduler_svc.engine.integrity import IntegrityError
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.frontend_socket import FrontendSocket
from scheduler_svc.grammars.masks import Grammars
from scheduler_svc.metrics import Frontends
from scheduler_svc.record import Recorder
from scheduler_svc.worker_groups import WorkerGroups

TICK = 0.05  # seconds at most between two Ticks while somebody runs or waits
_FINEST_TICK = 0.005
_AUDIT_AFTER = 1.0  # seconds without anybody to serve, so that the next request hardly ever waits for the recount

Deliver = Callable[[list[ToFrontend]], None]
log = logging.getLogger(__name__)


class EngineLoop:
    """Owns engine, worker socket and worker processes, in one thread of its own, which calls `deliver` (see `attach`).

    `send` and `stop` may be called from any thread. `frontends`, where those are processes, is closed with the loop,
    and here if the loop cannot be made.
    Raises OSError where the endpoint or the record file cannot be opened, CurveError where the endpoint is not safe.
    """

    def __init__(self, config: LoopConfig, clock: Callable[[], float], frontends: FrontendSocket | None = None) -> None:
        self._clock, self._processes = clock, frontends
        self._engine = Scheduler(config.engine)
        try:
            self._workers = WorkerGroups(config, clock)
            self._recorder = Recorder(config.record, self._engine, config.setup.epoch.boot, config.setup.model)
        except (OSError, CurveError):
            if frontends:
                frontends.close()
            raise
        self._mailbox: deque[ToEngine | FrontendStop] = deque()
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # rings when there is mail, or a grammar
        self._grammars = Grammars(config.setup.model, self._ring)
        self._deliver: Deliver | None = None
        self._outgoing: list[ToFrontend] = []
        self._status: ServiceStatus | None = None  # the last one delivered
        self._frontends = Frontends()
        self._drains: list[Ask] = []
        self._draining = False
        self._now = self._ticked = clock()
        self._audit_at: float | None = None  # None: nobody was served since the last audit
        self._stopping = False
        self._failure = ""
        self._begun = threading.Event()
        self._thread = threading.Thread(target=self._run, name="engine-loop")

    @property
    def endpoint(self) -> str:
        """Where workers connect."""
        return self._workers.endpoint

    def start(self) -> None:
        """Returns when the worker process is spawned (or has failed to be)."""
        self._thread.start()
        self._begun.wait()

    def attach(self, deliver: Deliver) -> None:
        """Everything for the frontend goes to `deliver`, the present status first."""
        self._deliver = deliver
        self.send(FrontendHello(""))

    def send(self, *messages: ToEngine | FrontendStop) -> None:
        self._mailbox.extend(messages)
        self._ring()

    def _ring(self) -> None:
        with contextlib.suppress(OSError):  # the loop has ended, and a grammar is compiled
            os.eventfd_write(self._bell, 1)

    def stop(self) -> None:
        """Ends workers and thread; what runs is dropped. A second call does nothing."""
        if self._stopping:
            return
        self._stopping = True
        self._ring()
        self._thread.join()
        os.close(self._bell)

    def _run(self) -> None:
        try:
            self._serve()
        except Exception as error:
            log.exception("the engine loop failed")
            self._recorder.dump("the engine loop failed", repr(error))
            self._failure = "the engine loop failed, see the traceback above"
            self._post()
        finally:
            self._begun.set()
            self._close()

    def _serve(self) -> None:
        """The main loop: wait, let the engine know the time and what was heard, send what it decided."""
        poller = zmq.Poller()
        poller.register(self._bell, zmq.POLLIN)
        self._workers.register(poller)
        if self._processes:
            self._processes.register(poller)
        for event in self._workers.adapters.begin():
            self._feed(event)
        self._keep_workers(poller, set())
        self._begun.set()
        while not self._stopping:
            ready = {source for source, _ in poller.poll(self._patience())}
            self._now = self._clock()
            if self._now - self._ticked >= _FINEST_TICK:
                self._ticked = self._now
                self._feed(Tick(self._now))
            for event in self._hear(ready):
                self._feed(event)
            self._send_masks()  # that a worker may wait for already
            for event in self._workers.send_plans(self._now):
                self._feed(event)
            self._grammars.sent()
            self._send_masks()  # that it will wait for
            self._keep_workers(poller, ready)
            self._post()
            self._audit()

    def _send_masks(self) -> None:
        for mask in self._grammars.masks(self._workers.num_words):
            self._workers.send_mask(mask)

    def _audit(self) -> None:
        """Recounts the engine's books, 0.1 ms for 1,000 blocks. Books that are wrong go with the epoch they are of."""
        if not self._engine.idle:
            self._audit_at = self._now + _AUDIT_AFTER
        elif self._audit_at is not None and self._now >= self._audit_at:
            self._audit_at = None
            try:
                self._engine.check_integrity()
            except IntegrityError as error:
                for event in self._workers.lose_all(f"the engine's books do not add up: {error}", self._now):
                    self._feed(event)
            if self._recorder.rest():
                self._feed(FlushCache())

    def _keep_workers(self, poller: zmq.Poller, ready: set[object]) -> None:
        for event in self._workers.keep(poller, ready, self._now):
            self._feed(event)
        for event in self._workers.adapters.settle():
            self._feed(event)

    def _patience(self) -> int | None:
        """Milliseconds until something is due by the clock alone."""
        now, due = self._clock(), []
        if self._mailbox:
            return 0
        if not self._engine.idle:
            due.append(self._ticked + TICK)
        elif self._audit_at is not None:
            due.append(self._audit_at)
        for deadline in (self._workers.deadline, self._processes.deadline if self._processes else None):
            if deadline is not None:
                due.append(deadline)
        return int(max(0.0, min(due) - now) * 1000) + 1 if due else None

    def _hear(self, ready: set[object]) -> Iterator[Event]:
        """Each event is fed before the next is looked for."""
        if self._bell in ready:
            os.eventfd_read(self._bell)
        yield from self._grammars.take()
        for _ in range(len(self._mailbox)):
            yield from self._from_frontend(self._mailbox.popleft())
        if self._processes:
            for message in self._processes.hear(ready, self._now):
                yield from self._from_frontend(message)
        yield from self._workers.hear(ready, self._now)

    def _from_frontend(self, message: ToEngine | FrontendStop) -> Iterator[Event]:
        match message:
            case Submit() | Shed() | Abort() | WatchKv():
                yield message
            case FrontendLost(frontend=frontend):
                self._frontends.lost(frontend)
                yield message
            case Observed():
                self._frontends.take(message)
            case FrontendHello():
                self._status = None  # so that the newcomer gets one
            case Ask(question=Question.STATS):
                self._answer(message)
            case Ask(question=Question.FLUSH_CACHE):
                cached = self._engine.stats().cached_blocks
                yield FlushCache()
                self._answer(message, freed_blocks=cached - self._engine.stats().cached_blocks)
            case Ask(question=Question.CANCEL, request_id=request_id, tenant=tenant):
                found = self._engine.has(request_id, tenant)
                if found:
                    yield Abort(request_id)
                self._answer(message, found=found)
            case Ask(question=Question.DRAIN):
                self._draining = True
                self._drains.append(message)
                yield Drain()
            case Ask(question=Question.LOAD_ADAPTER):
                yield from self._workers.adapters.load(message, self._now)
            case Ask(question=Question.UNLOAD_ADAPTER, adapter=adapter):
                if adapter and self._workers.adapters.has(adapter.name):
                    yield from self._workers.adapters.unload(message)
                else:
                    self._answer(message, found=False)
            case Ask(question=Question.LIST_ADAPTERS):
                self._answer(message)
            case FrontendStop():
                self._outgoing.append(message)  # from whoever keeps their processes, who has no link of his own
            case FrontendBeat():
                pass  # of those that are processes, whose socket takes it for itself

    def _answer(self, ask: Ask, *, found: bool = True, freed_blocks: int = 0, trouble: str = "") -> None:
        adapters = self._adapters() if ask.question is Question.LIST_ADAPTERS else []
        status = self._service_status()
        self._outgoing.append(Answer(ask.token, status, found, freed_blocks, ask.frontend, trouble, adapters))

    def _adapters(self) -> list[Adapter]:
        users = self._engine.roster.adapter_users
        return [replace(adapter, users=users.get(adapter.name, 0)) for adapter in self._workers.adapters.open]

    def _feed(self, event: Event) -> None:
        """One event into the engine, its instructions out, and whatever follows from carrying them out."""
        events = deque([event])
        while events:
            event = events.popleft()
            try:
                instructions = self._engine.handle(event)
            except Exception as error:
                self._recorder.raised(event, error)
                raise
            self._recorder.write(event, instructions)
            if isinstance(event, Submit) and event.grammar and self._engine.compiles(event.request_id, event.index):
                self._grammars.begin(event)
            for instruction in instructions:
                match instruction:
                    case StepPlan():
                        self._workers.add_plan(instruction, self._now)
                    case Outputs():
                        self._outgoing.append(instruction)
                        self._grammars.tell(instruction.items)
                    case KvEvents():
                        self._outgoing.append(instruction)
                    case MaskRequest():
                        self._grammars.request(instruction)
                    case AdapterFree(name):
                        self._workers.adapters.free(name)
                    case EndEpoch(epoch, reason):
                        is_unusable = isinstance(event, WorkerReady)
                        events.extend(self._workers.lose(epoch, reason, self._now, fatal=is_unusable))
            match event:
                case StepResult(epoch=epoch, step=step) if matched := self._grammars.matched(epoch, step):
                    events.append(matched)
                case WorkerLost(epoch=epoch):
                    self._grammars.forget(epoch)

    def _post(self) -> None:
        """All that this iteration has for the frontend, in one call."""
        if self._deliver is None:
            return
        if self._drains and self._engine.idle:
            for ask in self._drains:
                self._answer(ask)
            self._drains.clear()
        for ask, trouble in self._workers.adapters.take_answers():
            self._answer(ask, trouble=trouble)
        if (status := self._changed_status()) is not None:
            self._outgoing.append(status)
        if self._outgoing:
            self._deliver(self._outgoing)
            self._outgoing = []

    def _changed_status(self) -> ServiceStatus | None:
        """None while it says what the last one said, counts aside."""
        old, workers = self._status, self._workers
        new = (self._is_serving(), self._has_failed(), workers.ready, workers.statuses, workers.adapters.open)
        if old and (old.serving, old.failed, old.ready, old.workers, old.adapters) == new:
            return None
        workers.see(self._now)
        self._status = self._service_status()
        return self._status

    def _is_serving(self) -> bool:
        return self._workers.serving and not self._draining and not self._failure

    def _has_failed(self) -> bool:
        return bool(self._workers.fatal or self._failure)

    def _service_status(self) -> ServiceStatus:
        workers = self._workers
        reason = self._failure or workers.fatal or ("draining" if self._draining else workers.reason)
        return ServiceStatus(
            self._is_serving(),
            reason,
            workers.ready,
            workers.statuses,
            self._engine.stats(),
            self._has_failed(),
            workers.figures(self._now),
            workers.losses(self._now),
            self._frontends.sum(),
            workers.adapters.open,
            workers.max_adapters,
        )

    def _close(self) -> None:
        if self._processes:
            self._processes.close()
        self._workers.close()
        self._grammars.close()
        self._recorder.close()

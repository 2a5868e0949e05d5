"""One worker group, from Hello to loss (R5): which epoch it is in, and when it has to end."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator

import msgspec

from protos.engine_wire import WorkerFigures, WorkerStatus
from protos.wire import (
    PROTOCOL,
    AdapterReady,
    Epoch,
    Fault,
    FromWorker,
    Hello,
    Phase,
    Ready,
    Setup,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
)
from scheduler_svc.engine.events import Event, WorkerLost, WorkerReady
from scheduler_svc.spawn import WorkerProcess
from scheduler_svc.worker_history import WorkerHistory
from scheduler_svc.worker_socket import Garbled, Gone, Heard

log = logging.getLogger(__name__)

_DYING = 0.05  # seconds between the end of a process's connections and its own


class WorkerLink:
    """
    lost ──Hello / we send Setup──► loading ──Ready──► serving ──Fault, silence, death, our own doubt──► lost

    A spawned worker that is lost is killed, and another takes its place; one that came by itself gets another epoch, or
    is shut down where it cannot even load. `fatal` holds the reason why no worker can ever serve this Setup.
    """

    def __init__(
        self,
        setup: Setup,
        next_epoch: Callable[[], Epoch],
        send: Callable[..., bool],  # (peer, *messages) → whether the peer is there
        process: WorkerProcess | None,
        *,
        group: int,
        refuse: Callable[[Ready], str],  # why it cannot serve beside the others; empty if it can
        step_deadline: float,
        load_deadline: float,
    ) -> None:
        self._setup, self._next_epoch, self._send, self._process = setup, next_epoch, send, process
        self._group, self._refuse = group, refuse
        self._step_deadline, self._load_deadline = step_deadline, load_deadline
        self._peer = b""
        self._hello: Hello | None = None
        self._epoch: Epoch | None = None  # from its Setup to its end
        self._status: Status | None = None
        self._in_flight: deque[int] = deque()  # steps planned and not answered
        self._unsent: list[StepPlan] = []  # the last of them
        self._strange = 0  # messages that were none, from peers that are not the worker
        self._since = 0.0  # when the silence began that a deadline measures
        self.serving = False
        self.ready: Ready | None = None  # of the newest epoch, also while no worker lives
        self.reason = "the worker is starting" if process else "no worker has come yet"
        self.fatal = ""
        self.history = WorkerHistory()

    @property
    def epoch(self) -> Epoch | None:
        return self._epoch

    @property
    def peer(self) -> bytes:
        """Empty while nobody is there."""
        return self._peer

    @property
    def status(self) -> WorkerStatus:
        pid = self._hello.pid if self._hello else self._process.pid if self._process else 0
        if self.serving:
            return WorkerStatus("serving", pid, self.ready.device if self.ready else "")
        if self._epoch:
            status = self._status
            return WorkerStatus("loading", pid, "", status.detail if status else "", status.progress if status else 0.0)
        return WorkerStatus("starting" if pid else "lost", pid, "", self.reason)

    def figures(self, now: float) -> WorkerFigures:
        return self.history.figures(len(self._in_flight), now)

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do."""
        if self.serving:
            return self._since + self._patience if self._in_flight else None
        if self._epoch:
            return self._since + self._load_deadline
        if self._process is None or self.fatal:
            return None
        return self._process.started_at + self._load_deadline if self._process.pid else self._process.start_at

    @property
    def _patience(self) -> float:
        """For a step; a compilation extends it."""
        return self._load_deadline if self._status else self._step_deadline

    def hear(self, peer: bytes, heard: Heard, now: float) -> Iterator[Event]:
        """What a peer's message means to the engine."""
        match heard:
            case Hello():
                yield from self._welcome(peer, heard, now)
            case Gone():
                if peer == self._peer:
                    self._peer = b""
                    how = self._process.obituary(_DYING) if self._process else ""
                    yield from self.lose(f"it {how}" if how else "its connection broke", now)
            case Garbled(reason):
                if peer == self._peer and self._epoch:
                    yield from self.lose(f"it sent {reason}", now)
                else:
                    self._strange += 1
                    if self._strange.bit_count() == 1:  # the 1st, 2nd, 4th, 8th … so that nobody fills a disk
                        log.warning("a stranger sent %s (%d such messages so far)", reason, self._strange)
            case Ready() | AdapterReady() | StepResult() | Status() | Fault():
                if peer == self._peer and heard.epoch == self._epoch:
                    yield from self._believe(heard, now)

    def add_plan(self, plan: StepPlan, now: float) -> None:
        """For the next `send_plans`: one message wakes a worker once."""
        if plan.epoch != self._epoch:
            return  # made before the engine heard of the epoch's end
        if not self._in_flight:
            self._since = now
        self._in_flight.append(plan.step)
        self._unsent.append(plan)

    def send_plans(self, now: float) -> Iterator[Event]:
        plans, self._unsent = [plan for plan in self._unsent if plan.epoch == self._epoch], []
        if plans and not self._send(self._peer, *plans):
            yield from self.lose("its connection broke", now)

    def lose(self, reason: str, now: float) -> Iterator[Event]:
        """Ends the epoch, if there is one, and whatever process or connection stood behind it."""
        epoch, was_serving = self._epoch, self.serving
        self._epoch, self._status, self.serving = None, None, False
        self._in_flight.clear()
        if epoch or self._hello or self.status.pid:  # the last: of a process that has not said hello
            self.reason = f"the worker was lost: {reason}"
            self._lament(reason, now)
        hello, self._hello = self._hello, None
        if self._process:
            self._process.kill()
            self._peer = b""
        elif self._peer and was_serving and hello:
            self._begin(self._peer, hello, now)
        elif self._peer:
            self._send(self._peer, Shutdown(reason))
            self._peer = b""
        if epoch and was_serving:
            yield WorkerLost(epoch, reason)

    def exited(self, how: str, now: float) -> Iterator[Event]:
        """The spawned process has ended; `how` is empty where it was killed from here."""
        if self._epoch or self._hello:
            yield from self.lose(f"it {how}", now)
        elif how:
            self.reason = f"the worker {how} before it was ready"
            log.warning(self.reason)
            self.history.lost(0, self.reason, now)
        self._peer = b""

    def expire(self, now: float) -> Iterator[Event]:
        """Ends what is past its deadline."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return
        if self.serving:
            yield from self.lose(f"step {self._in_flight[0]} took longer than {self._patience:g} s", now)
        elif self._epoch or (self._process and self._process.pid):
            yield from self.lose(f"nothing was heard of its start for {self._load_deadline:g} s", now)

    def shut_down(self, reason: str) -> bool:
        """False where there is nobody to tell."""
        return bool(self._peer) and self._send(self._peer, Shutdown(reason))

    def _welcome(self, peer: bytes, hello: Hello, now: float) -> Iterator[Event]:
        refusal = ""
        if hello.protocol != PROTOCOL:
            refusal = f"it speaks protocol {hello.protocol}, this scheduler speaks {PROTOCOL}"
        elif self._process and hello.pid != self._process.pid:
            refusal = "this scheduler serves only the worker that it spawned"
        elif self._epoch and peer != self._peer:
            refusal = "this scheduler has a worker already, and takes no more"
        if refusal:
            log.warning("worker %d: refused: %s", hello.pid, refusal)
            self._send(peer, Shutdown(f"refused: {refusal}"))
            return
        if self._epoch:
            yield from self.lose("it said hello again", now)
            return
        self.fatal = ""  # of another worker, where others serve beside it
        self._begin(peer, hello, now)

    def _begin(self, peer: bytes, hello: Hello, now: float) -> None:
        self._peer, self._hello, self._since = peer, hello, now
        self._epoch = self._next_epoch()
        self._send(peer, msgspec.structs.replace(self._setup, epoch=self._epoch))

    def _believe(self, message: FromWorker, now: float) -> Iterator[Event]:
        """Of the worker's current epoch."""
        match message:
            case Ready() if not self.serving:
                if message.num_blocks < 2:
                    yield from self.lose(f"it has {message.num_blocks} KV blocks, one of them null", now)
                    return
                if refusal := self._refuse(message):
                    yield from self.lose(refusal, now)
                    return
                if self.ready:
                    log.info("worker %d: serves again", self.status.pid)
                self.serving, self.ready, self.reason, self._status = True, message, "", None
                if self._process:
                    self._process.was_ready()
                yield WorkerReady(
                    message.epoch,
                    message.num_blocks,
                    self._setup.max_slots,
                    message.align,
                    message.groups,
                    message.max_model_len,
                    self._group,
                )
            case StepResult() if self._in_flight:
                self._in_flight.popleft()
                self.history.answered(message.timings)
                self._since, self._status = now, None
                yield message
            case Status(phase=Phase.LOADING | Phase.COMPILING):
                self._since, self._status = now, message
            case Status(phase=Phase.RUNNING):
                self._status = None
            case Fault(fatal=True):
                self.fatal = self.reason = message.reason
                self._epoch, self.serving = None, False
            case Fault():
                yield from self.lose(message.reason, now)
            case Hello() | Ready() | StepResult() | Status() | AdapterReady():
                pass  # nothing of it was asked for

    def _lament(self, reason: str, now: float) -> None:
        pid = self.status.pid
        log.warning("worker %d: lost: %s", pid, reason)
        self.history.lost(pid, reason, now)

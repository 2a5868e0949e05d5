"""One worker group, from Hello to loss (R5): which epoch it is in, and when it has to end."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import msgspec

from protos.engine_wire import Adapter, WorkerFigures, WorkerStatus
from protos.wire import (
    PROTOCOL,
    AdapterReady,
    Epoch,
    Fault,
    FromWorker,
    Hello,
    LoadAdapter,
    Mask,
    Phase,
    Ready,
    Setup,
    Shutdown,
    Status,
    StepPlan,
    StepResult,
    UnloadAdapter,
)
from scheduler_svc.adapters import StartError
from scheduler_svc.engine.events import Event, WorkerLost, WorkerReady
from scheduler_svc.rank import Rank
from scheduler_svc.spawn import WorkerProcess
from scheduler_svc.worker_socket import Garbled, Gone, Heard

log = logging.getLogger(__name__)

_DYING = 0.05  # seconds between the end of a process's connections and its own


class WorkerLink:
    """
    lost ──Hello / we send Setup──► loading ──Ready──► serving ──Fault, silence, death, our own doubt──► lost

    Of several ranks: Hello and Ready of all of them, the end of any. A spawned worker that is lost is killed, with all
    ranks of its group, and others take their place; one that came by itself gets another epoch, or is shut down where
    it cannot even load. `fatal` holds the reason why no worker can ever serve this Setup.
    """

    def __init__(
        self,
        setup: Setup,
        next_epoch: Callable[[], Epoch],
        send: Callable[..., bool],  # (peers, *messages) → whether all peers are there
        ranks: Sequence[Rank],  # spawned by this scheduler, or one that comes by itself
        *,
        group: int,
        meeting: Callable[[int, Epoch], str],  # where the ranks of a group find each other in an epoch
        refuse: Callable[[Ready], str],  # why it cannot serve beside the others; empty if it can
        adapters: Callable[[], list[Adapter]] = list,  # that every epoch begins with
        tell_adapter: Callable[[str, str, int], Iterator[Event]] = lambda name, trouble, rank: iter(()),
        step_deadline: float,
        load_deadline: float,
    ) -> None:
        self._setup, self._next_epoch, self._send, self.ranks = setup, next_epoch, send, ranks
        self._spawned = ranks[0].process is not None
        self._group, self._meeting, self._refuse = group, meeting, refuse
        self._adapters, self._tell_adapter = adapters, tell_adapter
        self._loading: dict[str, set[int]] = {}  # adapters, and the ranks that have not answered yet
        self._trouble: dict[str, str] = {}  # that ranks had with those
        self._loaded: set[str] = set()  # adapters of this epoch; only ever asked for one
        self._greeting: WorkerReady | None = None  # of an epoch that loads its first adapters
        self._served = False  # ever
        self._step = 0  # the newest that was planned
        self._step_deadline, self._load_deadline = step_deadline, load_deadline
        self._epoch: Epoch | None = None  # from its Setup to its end
        self._in_flight: deque[int] = deque()  # steps planned and not answered
        self._unsent: list[StepPlan] = []  # the last of them
        self._strange = 0  # messages that were none, from peers that are not the worker
        self._since = 0.0  # when the silence began that a deadline measures
        self.serving = False
        self.ready: Ready | None = None  # of the newest epoch, also while no worker lives
        self.reason = "the worker is starting" if self._spawned else "no worker has come yet"
        self.fatal = ""

    @property
    def epoch(self) -> Epoch | None:
        return self._epoch

    @property
    def peers(self) -> list[bytes]:
        """Of those that are there."""
        return [rank.peer for rank in self.ranks if rank.peer]

    @property
    def statuses(self) -> list[WorkerStatus]:
        """Of each rank."""
        is_loading = self._epoch is not None
        return [
            rank.state(len(self.ranks), serving=self.serving, loading=is_loading, reason=self.reason)
            for rank in self.ranks
        ]

    def figures(self, now: float) -> list[WorkerFigures]:
        """Of each rank; steps are the first one's, who answers them."""
        flying = [len(self._in_flight), *[0] * (len(self.ranks) - 1)]
        return [rank.history.figures(count, now) for rank, count in zip(self.ranks, flying, strict=True)]

    @property
    def deadline(self) -> float | None:
        """When `expire` has something to do."""
        if self.serving and not self._loading:
            return self._since + self._patience if self._in_flight else None
        if self._epoch:
            return self._since + self._load_deadline
        if self.fatal:
            return None
        due = [self._hello_due(rank.process) for rank in self.ranks if rank.process and not rank.hello]
        return min(due, default=None)

    def _hello_due(self, process: WorkerProcess) -> float:
        """Or its next start, where none runs."""
        return process.started_at + self._load_deadline if process.pid else process.start_at

    @property
    def _patience(self) -> float:
        """For a step; a compilation extends it."""
        return self._load_deadline if any(rank.status for rank in self.ranks) else self._step_deadline

    def hear(self, peer: bytes, heard: Heard, now: float) -> Iterator[Event]:
        """What a peer's message means to the engine."""
        rank = next((rank for rank in self.ranks if rank.peer == peer), None)
        match heard:
            case Hello():
                yield from self._welcome(peer, heard, now)
            case Gone() if rank:
                rank.peer = b""
                how = rank.process.obituary(_DYING) if rank.process else ""
                yield from self.lose(f"it {how}" if how else "its connection broke", now, rank)
            case Garbled(reason) if rank and self._epoch:
                yield from self.lose(f"it sent {reason}", now, rank)
            case Garbled(reason):
                self._strange += 1
                if self._strange.bit_count() == 1:  # the 1st, 2nd, 4th, 8th … so that nobody fills a disk
                    log.warning("a stranger sent %s (%d such messages so far)", reason, self._strange)
            case Ready() | AdapterReady() | StepResult() | Status() | Fault():
                if rank and heard.epoch == self._epoch:
                    yield from self._believe(rank, heard, now)

    def add_plan(self, plan: StepPlan, now: float) -> None:
        """For the next `send_plans`: one message wakes a worker once."""
        if plan.epoch != self._epoch:
            return  # made before the engine heard of the epoch's end
        if not self._in_flight:
            self._since = now
        self._step = plan.step
        self._in_flight.append(plan.step)
        self._unsent.append(plan)

    def send_plans(self, now: float) -> Iterator[Event]:
        """The same bytes to every rank."""
        plans, self._unsent = [plan for plan in self._unsent if plan.epoch == self._epoch], []
        if plans and not self._send(self.peers, *plans):
            yield from self.lose("its connection broke", now)

    def send_mask(self, mask: Mask) -> None:
        """Behind its plan. One that cannot be sent is missed: the connection is about to be found broken."""
        self._send(self.peers, mask)

    def lose(self, reason: str, now: float, culprit: Rank | None = None) -> Iterator[Event]:
        """Ends the epoch, if there is one, and whatever processes or connection stood behind it. `culprit`: whose doing
        it is, where that is known.
        """
        epoch, was_serving = self._epoch, self.serving
        self._epoch, self.serving = None, False
        self._in_flight.clear()
        self._forget_adapters()
        if epoch or any(rank.pid for rank in self.ranks):  # those without an epoch have not said hello
            self._lament(culprit or self.ranks[0], reason, now)
        if self._spawned:
            self._end_all()
        elif (came := self.ranks[0]).peer:
            hello = came.forget()
            if was_serving and hello:
                self._begin(hello, came, now)
            else:
                self._send([came.peer], Shutdown(reason))
                came.peer = b""
        else:
            self.ranks[0].forget()
        if epoch and was_serving:
            yield WorkerLost(epoch, reason)

    def exited(self, rank: Rank, how: str, now: float) -> Iterator[Event]:
        """The spawned process has ended; `how` is empty where it was killed from here."""
        if self._epoch or rank.hello:
            yield from self.lose(f"it {how}", now, rank)
        elif how:
            self.reason = f"the worker {how} before it was ready"
            log.warning(self.reason)
            rank.history.lost(0, self.reason, now)
        rank.peer = b""

    def expire(self, now: float) -> Iterator[Event]:
        """Ends what is past its deadline."""
        deadline = self.deadline
        if deadline is None or now < deadline:
            return
        if self._loading and (self.serving or self._greeting):
            yield from self.lose(f"nothing was heard of its adapters for {self._load_deadline:g} s", now)
            return
        if self.serving:
            yield from self.lose(f"step {self._in_flight[0]} took longer than {self._patience:g} s", now)
            return
        silent = next(rank for rank in self.ranks if self._is_late(rank, now))
        if self._epoch or silent.pid:
            yield from self.lose(f"nothing was heard of its start for {self._load_deadline:g} s", now, silent)

    def _is_late(self, rank: Rank, now: float) -> bool:
        """With its start."""
        if self._epoch or rank.process is None:
            return rank.ready is None
        return rank.hello is None and now >= self._hello_due(rank.process)

    def shut_down(self, reason: str) -> bool:
        """False where there is somebody who cannot be told."""
        return len(self.peers) == len(self.ranks) and self._send(self.peers, Shutdown(reason))

    def _welcome(self, peer: bytes, hello: Hello, now: float) -> Iterator[Event]:
        rank = self.ranks[hello.rank] if 0 <= hello.rank < len(self.ranks) else None
        refusal = ""
        if hello.protocol != PROTOCOL:
            refusal = f"it speaks protocol {hello.protocol}, this scheduler speaks {PROTOCOL}"
        elif self._spawned and not (rank and rank.process and hello.pid == rank.process.pid):
            refusal = "this scheduler serves only the worker that it spawned"
        elif rank is None:
            refusal = f"it is rank {hello.rank}, and whoever comes by itself serves a whole model, as rank 0"
        elif self._epoch and peer != rank.peer:
            refusal = "this scheduler has a worker already, and takes no more"
        if refusal or rank is None:
            log.warning("worker %d: refused: %s", hello.pid, refusal)
            self._send([peer], Shutdown(f"refused: {refusal}"))
            return
        if self._epoch:
            yield from self.lose("it said hello again", now, rank)
            return
        self.fatal = ""  # of another worker, where others serve beside it
        rank.peer = peer
        self._begin(hello, rank, now)

    def _begin(self, hello: Hello, rank: Rank, now: float) -> None:
        """With the last rank that says hello."""
        rank.hello, self._since = hello, now
        if not all(rank.hello for rank in self.ranks):
            return
        epoch = self._epoch = self._next_epoch()
        address = self._meeting(self._group, epoch) if len(self.ranks) > 1 else ""
        for each in self.ranks:
            setup = msgspec.structs.replace(self._setup, epoch=epoch, tp_rank=each.number, tp_address=address)
            self._send([each.peer], setup)

    def _believe(self, rank: Rank, message: FromWorker, now: float) -> Iterator[Event]:
        """Of the group's current epoch."""
        match message:
            case Ready() if not self.serving and not self._greeting:
                yield from self._enlist(rank, message, now)
            case AdapterReady() if message.adapter in self._loading:
                yield from self._take_adapter(rank, message, now)
            case StepResult() if self._in_flight and rank.number == 0:
                self._in_flight.popleft()
                rank.history.answered(message.timings)
                self._since = now
                for each in self.ranks:
                    each.status = None
                yield message
            case Status(phase=Phase.LOADING | Phase.COMPILING):
                self._since, rank.status = now, message
            case Status(phase=Phase.RUNNING):
                rank.status = None
            case Fault(fatal=True):
                self.fatal = self.reason = message.reason
                self._epoch, self.serving = None, False
                self._forget_adapters()
                if len(self.ranks) > 1:
                    self._end_all()  # the others may wait for this one
            case Fault():
                yield from self.lose(*self._blamed(rank, message.reason, now))
            case Hello() | Ready() | StepResult() | Status() | AdapterReady():
                pass  # nothing of it was asked for

    def _enlist(self, rank: Rank, ready: Ready, now: float) -> Iterator[Event]:
        """With the last rank that is ready the group serves."""
        if ready.num_blocks < 2:
            yield from self.lose(f"it has {ready.num_blocks} KV blocks, one of them null", now, rank)
            return
        if refusal := self._refuse(ready):
            yield from self.lose(refusal, now, rank)
            return
        rank.ready, rank.status, self._since = ready, None, now
        if not all(each.ready for each in self.ranks):
            return
        first = msgspec.structs.replace(self.ranks[0].ready or ready, rank=0)
        for each in self.ranks:
            if each.ready and _comparable(each.ready) != _comparable(first):
                yield from self.lose(f"it can do {each.ready}, the first rank {first}", now, each)
                return
        self.ready, self._step = first, 0
        self._greeting = WorkerReady(
            first.epoch,
            first.num_blocks,
            self._setup.max_slots,
            first.align,
            first.groups,
            first.max_model_len,
            self._group,
            first.num_host_blocks,
            first.step_seconds,
            first.propose_seconds,
        )
        for adapter in self._adapters():
            self.load_adapter(adapter, now)
        yield from self._serve()

    def _serve(self) -> Iterator[Event]:
        """Once the epoch has all the adapters that it begins with."""
        if self._loading or not self._greeting:
            return
        greeting, self._greeting = self._greeting, None
        if self._served:
            log.info("worker %d: serves again", self.ranks[0].pid)
        self.serving, self._served, self.reason = True, True, ""
        for each in self.ranks:
            if each.process:
                each.process.was_ready()
        yield greeting

    # ------------------------------------------------------------ adapters

    def load_adapter(self, adapter: Adapter, now: float) -> None:
        """Where an epoch takes plans, or is about to; else that begins with it."""
        if self._epoch is None or not (self.serving or self._greeting):
            return
        self._since = now
        self._loading[adapter.name] = {rank.number for rank in self.ranks}
        self._send(self.peers, LoadAdapter(self._epoch, self._step, adapter.name, adapter.digest, adapter.path))

    def unload_adapter(self, name: str) -> None:
        if self._epoch and name in self._loaded:
            self._loaded.discard(name)
            self._send(self.peers, UnloadAdapter(self._epoch, self._step, name))

    def adapter_state(self, name: str) -> bool | None:
        """Whether this epoch has it; None while it loads it."""
        return None if name in self._loading else name in self._loaded

    def _take_adapter(self, rank: Rank, answer: AdapterReady, now: float) -> Iterator[Event]:
        """With the last rank's answer it is there. Where only some have it, the epoch ends: they are no group."""
        name, waiting, self._since = answer.adapter, self._loading[answer.adapter], now
        waiting.discard(rank.number)
        if answer.trouble:
            self._trouble[name] = answer.trouble
        else:
            self._loaded.add(name)
        if waiting:
            return
        del self._loading[name]
        trouble = self._trouble.pop(name, "")
        if trouble and name in self._loaded:
            yield from self.lose(f"not all ranks could load adapter {name!r}: {trouble}", now, rank)
        try:
            yield from self._tell_adapter(name, trouble, answer.lora_rank)
        except StartError as error:
            self.fatal = str(error)
            yield from self.lose(self.fatal, now, rank)
            return
        yield from self._serve()

    def _forget_adapters(self) -> None:
        self._greeting = None
        for of_epoch in (self._loading, self._trouble, self._loaded):
            of_epoch.clear()

    def _blamed(self, rank: Rank, reason: str, now: float) -> tuple[str, float, Rank]:
        """Who faults in an exchange with a rank that has just died is not who is to blame."""
        for other in self.ranks:
            patience = _DYING / len(self.ranks)
            if other is not rank and other.process and (how := other.process.obituary(patience)):
                return f"it {how}", now, other
        return reason, now, rank

    def _end_all(self) -> None:
        """One failure domain (R5): where one rank is lost, the others hang in what they wanted of it."""
        for rank in self.ranks:
            rank.forget()
            rank.peer = b""
            if rank.process:
                rank.process.kill()

    def _lament(self, rank: Rank, reason: str, now: float) -> None:
        place = f"rank {rank.number}: " if len(self.ranks) > 1 else ""
        self.reason = f"the worker was lost: {place}{reason}"
        log.warning("worker %d: lost: %s%s", rank.pid, place, reason)
        rank.history.lost(rank.pid, place + reason, now)


def _comparable(ready: Ready) -> Ready:
    """What ranks of one group have to say alike."""
    return msgspec.structs.replace(ready, rank=0, step_seconds=(), propose_seconds=())

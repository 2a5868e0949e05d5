"""All workers of one scheduler: which group a peer belongs to, and whose processes are kept alive."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import zmq

from protos.curve import from_this_host, scheduler_keys
from protos.engine_wire import Loss, WorkerFigures, WorkerStatus
from protos.wire import Epoch, Hello, Mask, Ready, StepPlan
from scheduler_svc.adapters import AdapterBook
from scheduler_svc.config import LoopConfig
from scheduler_svc.engine.events import Event
from scheduler_svc.logs import relay
from scheduler_svc.rank import Rank
from scheduler_svc.spawn import WorkerProcess
from scheduler_svc.worker_link import WorkerLink
from scheduler_svc.worker_socket import Heard, WorkerSocket

MAX_GROUPS = 64  # workers that come by themselves
_FUTILE_STARTS = 5  # of workers, before the group's first was ever ready: then it is given up
_LAST_WORDS = 2.0  # seconds that a worker gets to end by itself


class WorkerGroup:
    """A worker at a time, of one rank or several, and what stands behind it: a link, and processes if this scheduler
    spawns them.
    """

    def __init__(self, link: WorkerLink, clock: Callable[[], float]) -> None:
        self.link, self._clock = link, clock

    @property
    def processes(self) -> list[WorkerProcess]:
        return [rank.process for rank in self.link.ranks if rank.process]

    def keep(self, poller: zmq.Poller, ready: set[object], now: float) -> Iterator[Event]:
        """Notices dead processes, and starts one where none runs and none has to be waited for."""
        for rank in self.link.ranks:
            if rank.process and not self.link.fatal:
                yield from self._keep(rank, rank.process, poller, ready, now)

    def _keep(
        self, rank: Rank, process: WorkerProcess, poller: zmq.Poller, ready: set[object], now: float
    ) -> Iterator[Event]:
        link = self.link
        if process.exit_fd in ready and process.has_ended():
            poller.unregister(process.exit_fd)
            yield from link.exited(rank, process.reap(), now)
            if link.ready is None and process.futile_starts >= _FUTILE_STARTS:
                link.fatal = f"gave up after {process.futile_starts} starts: {link.reason}"
                return
        if not process.pid and self._clock() >= process.start_at:
            try:
                process.start("--rank", str(rank.number))
            except OSError as error:  # too many processes, say: another try follows, with patience
                yield from link.exited(rank, f"could not be started: {error}", now)
            else:
                poller.register(process.exit_fd, zmq.POLLIN)


class WorkerGroups:
    """Belongs to the loop's thread. Each epoch belongs to one group: counters are never used twice.

    Raises OSError where the endpoint cannot be opened, CurveError where it would be open to others.
    """

    def __init__(self, config: LoopConfig, clock: Callable[[], float]) -> None:
        self._config, self._clock = config, clock
        self._counter = config.setup.epoch.counter
        is_private = not config.listen or config.setup.tp_size > 1
        self._directory = tempfile.mkdtemp(prefix="pagewire-") if is_private else ""  # readable by its owner alone
        keys = scheduler_keys(config.curve_keys, zmq.curve_keypair, zmq.curve_public) if config.curve_keys else None
        self._socket = WorkerSocket(config.listen or f"ipc://{self._directory}/workers", keys)
        self.groups: list[WorkerGroup] = []
        self.adapters = AdapterBook(
            config.adapters, config.setup.max_adapters, lambda: [group.link for group in self.groups]
        )
        for _ in range(max(1, config.workers)):
            self._add()

    # ------------------------------------------------------------ as a whole

    @property
    def endpoint(self) -> str:
        """Where workers connect."""
        return self._socket.endpoint

    @property
    def max_adapters(self) -> int:
        return self._config.setup.max_adapters

    @property
    def serving(self) -> bool:
        return any(group.link.serving for group in self.groups)

    @property
    def fatal(self) -> str:
        """Why no worker can ever serve; empty while one may."""
        return self.groups[0].link.fatal if all(group.link.fatal for group in self.groups) else ""

    @property
    def ready(self) -> Ready | None:
        """Of a worker that serves; where none does, of one that did."""
        links = [group.link for group in self.groups if group.link.ready]
        return next((link.ready for link in links if link.serving), links[0].ready if links else None)

    @property
    def reason(self) -> str:
        """Why none serves."""
        return "" if self.serving else self.groups[0].link.reason

    @property
    def statuses(self) -> list[WorkerStatus]:
        return [status for group in self.groups for status in group.link.statuses]

    @property
    def deadline(self) -> float | None:
        """When `hear` has something to do by the clock alone."""
        deadlines = [group.link.deadline for group in self.groups]
        return min((deadline for deadline in deadlines if deadline is not None), default=None)

    def figures(self, now: float) -> list[WorkerFigures]:
        return [figures for group in self.groups for figures in group.link.figures(now)]

    def losses(self, now: float) -> list[Loss]:
        """The newest few of each, newest first."""
        return sorted((loss for rank in self._ranks() for loss in rank.history.losses(now)), key=_age)

    def see(self, now: float) -> None:
        """Since when each is in its present state."""
        for rank, status in zip(self._ranks(), self.statuses, strict=True):
            rank.history.see(status.state, now)

    # ------------------------------------------------------------ what happens

    def register(self, poller: zmq.Poller) -> None:
        for source in (self._socket.router, self._socket.monitor):
            poller.register(source, zmq.POLLIN)

    def hear(self, ready: set[object], now: float) -> Iterator[Event]:
        """Each event is fed before the next is looked for."""
        if self._socket.monitor in ready:
            for peer, gone in self._socket.gone():
                yield from self._owner(peer, gone).link.hear(peer, gone, now)
        if self._socket.router in ready:
            for peer, heard in self._socket.hear():
                yield from self._owner(peer, heard).link.hear(peer, heard, now)
        for group in self.groups:
            yield from group.link.expire(now)

    def keep(self, poller: zmq.Poller, ready: set[object], now: float) -> Iterator[Event]:
        for group in self.groups:
            yield from group.keep(poller, ready, now)

    def add_plan(self, plan: StepPlan, now: float) -> None:
        if group := self._of(plan.epoch):
            group.link.add_plan(plan, now)

    def send_plans(self, now: float) -> Iterator[Event]:
        for group in self.groups:
            yield from group.link.send_plans(now)

    @property
    def num_words(self) -> int:
        """Of 32 tokens each, in a row of a mask."""
        return -(-self.ready.vocab_size // 32) if self.ready else 0

    def send_mask(self, mask: Mask) -> None:
        if group := self._of(mask.epoch):
            group.link.send_mask(mask)

    def lose(self, epoch: Epoch, reason: str, now: float, *, fatal: bool = False) -> Iterator[Event]:
        """Ends an epoch, unless it has ended already. `fatal`: its group would not do better with another."""
        if group := self._of(epoch):
            if fatal:
                group.link.fatal = reason
            yield from group.link.lose(reason, now)

    def lose_all(self, reason: str, now: float) -> Iterator[Event]:
        for group in self.groups:
            if group.link.serving:
                yield from group.link.lose(reason, now)

    def close(self) -> None:
        told = [group.link.shut_down("the scheduler stops") for group in self.groups]
        until = self._clock() + _LAST_WORDS
        for group, heard in zip(self.groups, told, strict=True):
            for process in group.processes:
                process.stop(max(0.0, until - self._clock()) if heard else 0.0)
        self._socket.close()
        if self._directory:
            shutil.rmtree(self._directory, ignore_errors=True)

    # ------------------------------------------------------------ who is who

    def _add(self) -> WorkerGroup:
        config = self._config
        link = WorkerLink(
            config.setup,
            self._next_epoch,
            self._socket.send_all,
            [Rank(number, self._process() if config.workers else None) for number in range(config.setup.tp_size)],
            group=len(self.groups),
            meeting=self._meeting,
            refuse=self._differs,
            adapters=lambda: self.adapters.wanted,
            tell_adapter=self.adapters.answered,
            step_deadline=config.step_deadline,
            load_deadline=config.load_deadline,
        )
        self.groups.append(WorkerGroup(link, self._clock))
        return self.groups[-1]

    def _process(self) -> WorkerProcess:
        config = self._config
        keys = ("--curve-keys", str(config.curve_keys)) if config.curve_keys else ()
        arguments = ("--connect", from_this_host(self._socket.endpoint), *keys, *config.worker_arguments)
        return WorkerProcess(arguments, self._clock, relay if config.relay_workers else None)

    def _ranks(self) -> Iterator[Rank]:
        for group in self.groups:
            yield from group.link.ranks

    def _meeting(self, group: int, epoch: Epoch) -> str:
        """A file where the ranks find each other: a new one, or they would find those of the epoch before."""
        for old in Path(self._directory).glob(f"ranks-{group}-*"):
            old.unlink()
        return f"{self._directory}/ranks-{group}-{epoch.counter}"

    def _next_epoch(self) -> Epoch:
        self._counter += 1
        return Epoch(self._config.setup.epoch.boot, self._counter)

    def _of(self, epoch: Epoch) -> WorkerGroup | None:
        return next((group for group in self.groups if group.link.epoch == epoch), None)

    def _owner(self, peer: bytes, heard: Heard) -> WorkerGroup:
        """Whose worker this is; a stranger is the first group's to turn away."""
        for group in self.groups:
            if peer in group.link.peers:
                return group
        return self._host(heard) if isinstance(heard, Hello) else self.groups[0]

    def _host(self, hello: Hello) -> WorkerGroup:
        """Who takes in a newcomer: whose process it is, or, where workers come by themselves, who has none."""
        for group in self.groups:
            if hello.pid in [p.pid for p in group.processes] if group.processes else not group.link.peers:
                return group
        return self._add() if not self._config.workers and len(self.groups) < MAX_GROUPS else self.groups[0]

    def _differs(self, ready: Ready) -> str:
        """Why a worker cannot serve beside the others, or after them; empty if it can.

        Streams move from one to another and promise to be the same there (R2). So whoever comes when all have died,
        over a model file that was replaced meanwhile, say, is no heir: frontends hold the old one's tokenizer, too.
        """
        for group in self.groups:
            other = group.link.ready
            if other and other.fingerprint != ready.fingerprint:
                return (
                    f"its arithmetic is another one: fingerprint {ready.fingerprint!r}, this service began "
                    f"with {other.fingerprint!r}; start the service anew to serve it"
                )
        return ""


def _age(loss: Loss) -> float:
    return loss.ago

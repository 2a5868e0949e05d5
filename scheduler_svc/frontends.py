"""`--frontends N`: the process of the engine, without gRPC, and the N gRPC processes that it keeps alive on one port.

```
 gRPC clients ──► frontend 1 ─┐ ZeroMQ, ipc   ┌────────────────────────────────────┐
      one port    …           ├──────────────►│ engine loop (a thread)  ──► workers │
              ──► frontend N ─┘               │ this: spawns, reaps, hears signals  │
                                              └────────────────────────────────────┘
```
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import select
import signal
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from protos.curve import CurveError
from protos.engine_wire import FrontendStop, ServiceStatus
from scheduler_svc import logs
from scheduler_svc.config import ServiceConfig
from scheduler_svc.frontend_socket import FrontendSocket, Listening, Lost, Notice
from scheduler_svc.loop import EngineLoop
from scheduler_svc.ports import PortGuard
from scheduler_svc.spawn import ChildProcess

log = logging.getLogger(__name__)
_MODULE = "scheduler_svc.frontend_process"
_FUTILE_STARTS = 5  # of a frontend that somebody kills, before the service was ever ready
_DYING = 0.05  # seconds between the end of a process's connections and its own
_LAST_WORDS = 2.0  # seconds that a frontend gets to end by itself, beyond what it was granted


@dataclass(frozen=True)
class Signal:
    number: int


class Inbox:
    """What the main thread has to look at, put in by signal handlers and by the loop's thread."""

    def __init__(self) -> None:
        self._items: deque[Notice | Signal] = deque()
        self.bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def put(self, item: Notice | Signal) -> None:
        self._items.append(item)
        os.eventfd_write(self.bell, 1)

    def take(self) -> list[Notice | Signal]:
        try:
            os.eventfd_read(self.bell)
        except BlockingIOError:
            return []
        return [self._items.popleft() for _ in range(len(self._items))]


class Frontend:
    """One place of N: a process at a time, each with a name of its own, so that nobody gets what was another's."""

    def __init__(self, number: int, arguments: Sequence[str], metrics_port: int, clock: Callable[[], float]) -> None:
        self.number, self._metrics_port = number, metrics_port
        self.process = ChildProcess(_MODULE, arguments, clock)
        self.listening = False
        self.name = ""
        self._lives = 0

    def start(self) -> None:
        """Raises OSError."""
        self._lives += 1
        self.name = f"frontend-{self.number}.{self._lives}"
        metrics_port = self._metrics_port if self.number == 1 else 0  # one for all: each knows the sum
        self.process.start("--name", self.name, "--metrics-port", str(metrics_port))

    def __str__(self) -> str:
        return f"frontend {self.number} ({self.process.pid})"


class Frontends:
    """Belongs to the main thread. `run` returns the exit code of the service."""

    def __init__(
        self,
        settings: ServiceConfig,
        arguments: Sequence[str],
        port: int,
        loop: EngineLoop,
        inbox: Inbox,
        began: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._settings, self._port, self._loop, self._inbox = settings, port, loop, inbox
        self._began, self._clock = began, clock
        numbers, metrics_port = range(1, settings.frontends + 1), settings.metrics_port
        self._members = [Frontend(n, arguments, metrics_port, clock) for n in numbers]
        self._poller = select.poll()
        self._poller.register(inbox.bell, select.POLLIN)
        self._serving = self._announced = False
        self._drain_until = 0.0  # 0: nobody has asked for a drain
        self._cut = False  # a frontend has ended with calls open, while draining
        self._code: int | None = None  # of the service, once it is known

    def run(self) -> int:
        while self._code is None:
            self._keep()
            ready = {descriptor for descriptor, _ in self._poller.poll(self._patience())}
            for item in self._inbox.take():
                self._look_at(item)
            for member in self._members:
                if member.process.exit_fd in ready and member.process.has_ended():
                    self._reap(member)
            self._end_drain()
        return self._code

    def stop(self) -> None:
        """Ends whoever is left; those who were told to end have a moment for it."""
        until = self._clock() + _LAST_WORDS
        for member in self._members:
            member.process.stop(max(0.0, until - self._clock()) if member.listening else 0.0)

    # ------------------------------------------------------------ processes

    def _keep(self) -> None:
        """Starts one where none runs and none has to be waited for, and ends a start that takes too long. Nobody new
        comes into a drain.
        """
        for member in self._members:
            process = member.process
            if self._drain_until or self._clock() < self._due(member):
                continue
            if process.pid:
                process.kill()
                continue
            try:
                member.start()
            except OSError as error:
                _say(f"frontend {member.number} could not be started: {error}")
            else:
                self._poller.register(process.exit_fd, select.POLLIN)

    def _due(self, member: Frontend) -> float:
        """When `_keep` has something to do for it."""
        process = member.process
        if not process.pid:
            return process.start_at
        is_starting = not (member.listening or process.is_condemned)
        return process.started_at + self._settings.loop.load_deadline if is_starting else inf

    def _reap(self, member: Frontend) -> None:
        who, process = str(member), member.process
        self._poller.unregister(process.exit_fd)
        how = process.reap() or "was killed, since it hung"
        was_listening, member.listening = member.listening, False
        may_do_better = process.exit_code < 0 and process.futile_starts < _FUTILE_STARTS
        if self._drain_until:
            self._cut = self._cut or (was_listening and process.exit_code != 0)
        elif was_listening or self._announced or may_do_better:
            _say(f"{who} {how}: its calls have ended, another takes its place")
        else:  # it has said why
            self._fail(f"{who} {how} before it served")

    # ------------------------------------------------------------ what happens

    def _look_at(self, item: Notice | Signal) -> None:
        match item:
            case Signal(number) if not self._drain_until:
                self._drain(number)
            case Signal():
                self._fail("stopped at once: running calls were dropped")
            case Listening() if self._drain_until:
                pass  # it was killed meanwhile, since it had no calls
            case Listening(name):
                for member in self._members:
                    if member.name == name:
                        member.listening = True
                        member.process.was_ready()
                self._announce()
            case Lost(name, reason):
                for member in self._members:
                    is_meant = member.name == name and member.listening and not self._drain_until
                    if is_meant and not member.process.obituary(_DYING):
                        _say(f"{member} is lost: {reason}")
                        member.process.kill()
            case ServiceStatus(failed=True, reason=reason):
                self._fail(reason)
            case ServiceStatus(serving=serving):
                self._serving = serving
                self._announce()

    def _announce(self) -> None:
        if self._announced or not self._serving or not all(member.listening for member in self._members):
            return
        self._announced = True
        gc.freeze()  # what is here now stays: no collection between two steps need look at it
        settings, took = self._settings, self._clock() - self._began
        place = f"{settings.host}:{self._port} ({settings.frontends} frontends)"
        _say(f"ready: {settings.served_name} at {place}, {took:.1f} s after the start", headline=True)

    def _drain(self, number: int) -> None:
        _say(f"{signal.Signals(number).name}: draining; a second signal stops at once", headline=True)
        grace = self._settings.drain_timeout
        self._drain_until = self._clock() + grace + _LAST_WORDS
        self._loop.send(FrontendStop(grace))
        for member in self._members:
            if not member.listening:  # it would not hear of it, and has no calls
                member.process.kill()

    def _end_drain(self) -> None:
        if not self._drain_until or self._code is not None:
            return
        is_over = not any(member.process.pid for member in self._members)
        if is_over and not self._cut:
            _say("drained", headline=True)
            self._code = 0
        elif is_over or self._clock() >= self._drain_until:
            self._fail(f"not drained within {self._settings.drain_timeout:g} s: running calls were dropped")

    def _patience(self) -> int | None:
        """Milliseconds until something is due by the clock alone."""
        if self._drain_until:
            due = [self._drain_until]
        else:
            due = [each for each in map(self._due, self._members) if each < inf]
        return int(max(0.0, min(due) - self._clock()) * 1000) + 1 if due else None

    def _fail(self, line: str) -> None:
        if self._code is None:
            _say(line)
            self._code = 1
            self._loop.send(FrontendStop(0))


def serve(settings: ServiceConfig, arguments: Sequence[str], began: float) -> int:
    """The service, to its end; `arguments` are the command line's. Returns the exit code."""
    inbox = Inbox()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: inbox.put(Signal(received)))
    with contextlib.ExitStack() as stack:
        prefix = "pagewire-frontends-"
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix=prefix, ignore_cleanup_errors=True))
        try:
            guard = stack.enter_context(contextlib.closing(PortGuard(settings.host, settings.port)))
            link = FrontendSocket(f"ipc://{directory}/engine", inbox.put)  # private: the directory is its owner's alone
            loop = EngineLoop(settings.loop, time.monotonic, link)
        except (OSError, CurveError) as error:
            _say(str(error))
            return 1
        stack.callback(loop.stop)
        place = ("--connect", link.endpoint, "--port", str(guard.port), "--", *arguments)
        frontends = Frontends(settings, place, guard.port, loop, inbox, began)
        stack.callback(frontends.stop)
        loop.start()
        loop.attach(link.post)
        return frontends.run()


def _say(line: str, *, headline: bool = False) -> None:
    """A headline names itself: "pagewire ready: …"."""
    if headline:
        log.info(line, extra=logs.HEADLINE)
    else:
        log.warning(line)

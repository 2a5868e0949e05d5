"""One worker process of a group: its connection, what it has said, and the process if this scheduler spawns it."""

from __future__ import annotations

from protos.engine_wire import WorkerStatus
from protos.wire import Hello, Ready, Status
from scheduler_svc.spawn import WorkerProcess
from scheduler_svc.worker_history import WorkerHistory


class Rank:
    """Of a group that splits no model there is rank 0 alone."""

    def __init__(self, number: int, process: WorkerProcess | None) -> None:
        self.number, self.process = number, process
        self.peer = b""  # empty while nobody is there
        self.hello: Hello | None = None
        self.status: Status | None = None  # the newest of what it is busy with; None: it waits or steps
        self.ready: Ready | None = None  # of this epoch
        self.history = WorkerHistory()

    @property
    def pid(self) -> int:
        return self.hello.pid if self.hello else self.process.pid if self.process else 0

    def forget(self) -> Hello | None:
        """The epoch has ended; the answer is what it had said hello with."""
        hello, self.hello, self.status, self.ready = self.hello, None, None, None
        return hello

    def state(self, size: int, *, serving: bool, loading: bool, reason: str) -> WorkerStatus:
        """Of a group of `size`, which serves or loads; `reason`: why it does neither."""
        place = f"rank {self.number} of {size}" if size > 1 else ""
        if serving:
            return WorkerStatus("serving", self.pid, self.ready.device if self.ready else "", place)
        if loading:
            status = self.status
            return WorkerStatus(
                "loading", self.pid, "", status.detail if status else "", status.progress if status else 0.0
            )
        return WorkerStatus("starting" if self.pid else "lost", self.pid, "", reason)

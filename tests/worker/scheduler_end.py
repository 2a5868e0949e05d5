"""A scheduler's end of the link, played by a test, with a real worker process at the other."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import zmq

from protos.codec import decode_from_worker, encode
from protos.wire import Admit, Epoch, FromWorker, Hello, Ready, Row, Sampling, Setup, Status, StepPlan, ToWorker, Wire

PATIENCE_MS = 30_000
ROOT = Path(__file__).parents[2]
Expected = TypeVar("Expected", bound=Wire)


class SchedulerEnd:
    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="pagewire-test-")
        self.endpoint = f"ipc://{self._directory.name}/workers"
        self._context = zmq.Context()
        self.router: zmq.Socket[bytes]
        self.peer = b""
        self._frames: deque[bytes] = deque()  # of the message that is being received
        self.listen()

    def listen(self) -> None:
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.LINGER, 0)
        self.router.bind(self.endpoint)

    def hang_up(self) -> None:
        self.router.close()

    def close(self) -> None:
        self.router.close()
        self._context.term()
        self._directory.cleanup()

    def send(self, *messages: ToWorker) -> None:
        for message in messages:
            self.router.send_multipart((self.peer, encode(message)))

    def send_together(self, *messages: ToWorker) -> None:
        self.router.send_multipart((self.peer, *map(encode, messages)))

    def receive_together(self) -> list[FromWorker]:
        """What was sent together."""
        first = self.receive_any()
        together, self._frames = [decode_from_worker(frame) for frame in self._frames], deque()
        return [first, *together]

    def receive_any(self) -> FromWorker:
        if not self._frames:
            assert self.router.poll(PATIENCE_MS), f"nothing came within {PATIENCE_MS} ms"
            self.peer, *frames = self.router.recv_multipart()
            self._frames.extend(frames)
        return decode_from_worker(self._frames.popleft())

    def receive(self, kind: type[Expected]) -> Expected:
        """The next message, which must be of that kind."""
        message = self.receive_any()
        assert isinstance(message, kind), message
        return message

    def until_ready(self, setup: Setup) -> tuple[Ready, list[Status]]:
        """Sends a Setup and waits for Ready; also returns what the worker said of its loading."""
        self.send(setup)
        statuses = []
        while isinstance(message := self.receive_any(), Status):
            statuses.append(message)
        assert isinstance(message, Ready), message
        assert message.epoch == setup.epoch
        return message, statuses

    def loads(self, setup: Setup) -> bool:
        """Whether the Setup made the worker load anything."""
        return bool(self.until_ready(setup)[1])


@contextmanager
def worker(
    *extra: str, spawned: bool = True, stderr: int | None = None
) -> Iterator[tuple[SchedulerEnd, subprocess.Popen[str]]]:
    """A worker that has said Hello, and its scheduler."""
    end = SchedulerEnd()
    parent = ("--parent-pid", str(os.getpid())) if spawned else ()
    command = [sys.executable, "-m", "worker_svc", "--connect", end.endpoint, *parent, *extra]
    process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, text=True)
    try:
        hello = end.receive(Hello)
        assert hello.pid == process.pid
        yield end, process
    finally:
        process.kill()
        process.wait()
        if process.stderr:
            process.stderr.close()
        end.close()


def setup(counter: int = 1, model: str = "fake:", boot: int = 7, **fields: Any) -> Setup:
    return Setup(Epoch(boot, counter), model, block_size=4, max_slots=8, max_step_tokens=64, **fields)


def plan(
    step: int, rows: list[Row], admit: Sequence[Admit] = (), counter: int = 1, release: Sequence[int] = ()
) -> StepPlan:
    return StepPlan(Epoch(7, counter), step, list(release), list(admit), [], rows)


def first_plan(prompt: list[int], counter: int = 1, *, masked: bool = False) -> StepPlan:
    """Admits a prompt to slot 1, computes all of it and samples."""
    blocks = list(range(1, 2 + len(prompt) // 4 + 4))
    admit = Admit(1, prompt, len(prompt), [blocks], Sampling(max_tokens=100))
    return plan(1, [Row(1, 0, len(prompt), sample=True, masked=masked)], [admit], counter)


def next_plan(step: int, counter: int = 1, *, masked: bool = False) -> StepPlan:
    return plan(step, [Row(1, -1, 1, sample=True, masked=masked)], counter=counter)

"""A child process that is kept alive: respawned at once when it dies, and with patience when it dies of its start."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import IO, Any

_FIRST_DELAY, _LONGEST_DELAY = 0.25, 15.0  # seconds between starts that came to nothing
_PR_SET_PDEATHSIG = 1


class ChildProcess:
    """Belongs to one thread, which must live as long as the process: the kernel kills a child when its thread ends."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        clock: Callable[[], float],
        relay: Callable[[IO[bytes], int], None] | None = None,  # takes what the child writes, and its pid
    ) -> None:
        self._module, self._arguments, self._clock, self._relay = module, arguments, clock, relay
        self._process: subprocess.Popen[bytes] | None = None
        self._condemned = False  # killed from here
        self._futile = 0  # starts since a child was last ready
        self.started_at = 0.0
        self.start_at = 0.0  # when the next start is due, while there is no process
        self.exit_fd = -1  # readable once the process has ended
        self.exit_code = 0  # of the last that was reaped

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    def start(self, *more: str) -> None:
        """With `more` arguments before those that never change. What it writes goes to `relay`, or straight to this
        process's stderr.

        Raises OSError where no process can be made now, or made and not watched: then there is none.
        """
        parent = ("--parent-pid", str(os.getpid()))
        command = [sys.executable, "-m", self._module, *parent, *more, *self._arguments]
        self._futile += 1
        self._schedule_next()
        output: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        process: subprocess.Popen[bytes] = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, **(output if self._relay else {"stdout": sys.stderr})
        )
        if self._relay and process.stdout:
            self._relay(process.stdout, process.pid)
        try:
            self.exit_fd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        self._process = process
        self._condemned = False
        self.started_at = self._clock()

    def was_ready(self) -> None:
        self._futile = 0

    @property
    def futile_starts(self) -> int:
        """In a row, the present one included."""
        return self._futile

    @property
    def is_condemned(self) -> bool:
        """Killed from here, and not reaped yet."""
        return self._condemned

    def has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    def reap(self) -> str:
        """After its end: how it ended, in words; empty if by `kill`. Sets `start_at` for the next one."""
        assert self._process is not None
        code = self.exit_code = self._process.wait()
        os.close(self.exit_fd)
        self._process, self.exit_fd = None, -1
        self._schedule_next()
        return "" if self._condemned else _in_words(code)

    def obituary(self, patience: float) -> str:
        """How it ended, in words; empty where it has not within `patience` seconds."""
        try:
            return _in_words(self._process.wait(patience)) if self._process else ""
        except subprocess.TimeoutExpired:
            return ""

    def _schedule_next(self) -> None:
        delay = min(_FIRST_DELAY * 2.0 ** (self._futile - 2), _LONGEST_DELAY) if self._futile > 1 else 0.0
        self.start_at = self._clock() + delay

    def kill(self) -> None:
        if self._process:
            self._condemned = True
            self._process.kill()

    def stop(self, patience: float) -> None:
        """Waits for a child that was told to end; kills it after `patience` seconds."""
        if self._process is None:
            return
        try:
            self._process.wait(patience)
        except subprocess.TimeoutExpired:
            self._process.kill()
        self.reap()


class WorkerProcess(ChildProcess):
    def __init__(
        self,
        arguments: Sequence[str],
        clock: Callable[[], float],
        relay: Callable[[IO[bytes], int], None] | None = None,
    ) -> None:
        super().__init__("worker_svc", arguments, clock, relay)


def die_with(parent: int) -> bool:
    """For a child: asks the kernel for SIGKILL when the thread that spawned it ends. False where it has ended already.

    Raises OSError.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


def _in_words(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was killed by {signal.Signals(-code).name}"
    except ValueError:  # a real-time signal has no name
        return f"was killed by signal {-code}"

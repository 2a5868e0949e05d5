"""Respawning: at once, unless workers keep dying of their start."""

from __future__ import annotations

import errno
import os
import select
import subprocess
from typing import Any

import pytest

from scheduler_svc.spawn import WorkerProcess


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def _die(process: WorkerProcess, *, ready: bool = False) -> float:
    """Starts it, with arguments that it refuses; returns the delay until the next start."""
    process.start()
    assert process.pid
    if ready:
        process.was_ready()
    assert select.select([process.exit_fd], [], [], 30)[0]
    assert process.has_ended()
    assert process.reap() == "ended with exit code 2"
    assert process.pid == 0
    return process.start_at - Clock.now


def test_patience_grows_with_deaths_before_ready_and_ends_with_ready() -> None:
    process = WorkerProcess(["--no-such-flag"], Clock())
    open_files = len(os.listdir("/proc/self/fd"))
    assert [_die(process) for _ in range(4)] == [0.0, 0.25, 0.5, 1.0]
    assert _die(process, ready=True) == 0.0
    assert [_die(process) for _ in range(2)] == [0.0, 0.25]
    assert len(os.listdir("/proc/self/fd")) == open_files


def test_a_process_that_cannot_be_watched_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(pid: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    made: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    process = WorkerProcess(["--connect", "tcp://127.0.0.1:9"], Clock())
    with monkeypatch.context() as patched:
        patched.setattr(os, "pidfd_open", refuse)
        patched.setattr(subprocess, "Popen", Noted)
        for delay in (0.0, 0.25):
            with pytest.raises(OSError, match="too many open files"):
                process.start()
            assert (process.pid, process.has_ended()) == (0, False)
            assert process.start_at - Clock.now == delay
    assert [one.returncode for one in made] == [-9, -9], "killed and reaped"
    process.start()
    assert process.pid
    process.stop(0)


def test_a_kill_is_told_from_a_death() -> None:
    process = WorkerProcess(["--connect", "tcp://127.0.0.1:9"], Clock())
    process.start()
    assert not process.has_ended()
    process.kill()
    assert process.obituary(30) == "was killed by SIGKILL"
    assert process.reap() == ""


def test_stop_ends_what_does_not_end_by_itself() -> None:
    process = WorkerProcess(["--connect", "tcp://127.0.0.1:9"], Clock())
    process.stop(0)
    process.start()
    process.stop(0)
    assert process.pid == 0

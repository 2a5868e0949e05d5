"""A server's processes, fresh for each run: from launch to ready, what they take, and gone afterwards."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

import psutil

from benchmarks.contestants import Contestant
from benchmarks.peers.engine import WIDEST

POLL = 0.01  # seconds
STOP = 30.0  # seconds
CHILDREN = 3.0  # seconds longer
MEBIBYTE = 1 << 20


class StartError(Exception):
    """A server that did not come up, with the last lines that it wrote."""


@dataclass(frozen=True)
class Started:
    port: int
    pid: int
    launched: float  # on time.perf_counter()
    ready_seconds: float

    def memory(self) -> float:
        """MiB of the whole process tree: proportional set size, so that what its processes share counts once."""
        return sum(_pss(process) for process in self._tree()) / MEBIBYTE

    def cpu_seconds(self) -> float:
        """Of the whole process tree so far, to the kernel's hundredth."""
        return sum(sum(process.cpu_times()[:2]) for process in self._tree())

    def _tree(self) -> list[psutil.Process]:
        root = psutil.Process(self.pid)
        return [root, *root.children(recursive=True)]


@asynccontextmanager
async def running(contestant: Contestant, patience: float, slots: int = WIDEST) -> AsyncIterator[Started]:
    """For `slots` requests at once. Raises StartError if it ends, or is not ready within `patience` seconds."""
    port = free_port()
    environment = {**os.environ, **contestant.environment}
    with tempfile.TemporaryFile() as log:
        launched = time.perf_counter()
        process = await asyncio.create_subprocess_exec(
            *contestant.command(port, slots), stdout=log, stderr=log, env=environment
        )
        try:
            while not await contestant.speaker.ready(port):
                if process.returncode is not None:
                    raise StartError(f"{contestant.name} exited with {process.returncode}: {_last_words(log)}")
                if time.perf_counter() - launched > patience:
                    raise StartError(f"{contestant.name} not ready after {patience:g} s: {_last_words(log)}")
                await asyncio.sleep(POLL)
            yield Started(port, process.pid, launched, time.perf_counter() - launched)
        finally:
            await _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _children(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:  # it has just ended by itself
        return []


def _pss(process: psutil.Process) -> int:
    try:
        return int(process.memory_full_info().pss)
    except psutil.AccessDenied:
        return int(process.memory_info().rss)


async def _stop(process: asyncio.subprocess.Process) -> None:
    """With all that it started: nobody computes on beside the next contestant."""
    if process.returncode is not None:
        return
    children = _children(process.pid)
    process.send_signal(signal.SIGTERM)
    try:
        await asyncio.wait_for(process.wait(), STOP)
    except TimeoutError:
        process.kill()
        await process.wait()
    _, left = psutil.wait_procs(children, timeout=CHILDREN)
    for child in left:
        child.kill()
    psutil.wait_procs(left)


def _last_words(log: IO[bytes], size: int = 1000) -> str:
    written = log.seek(0, 2)
    log.seek(max(0, written - size))
    words = log.read().decode(errors="replace")
    return (words.partition("\n")[2] or words if written > size else words).strip()  # from the beginning of a line

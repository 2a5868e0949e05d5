"""A server's process, fresh for each run: from launch to ready, and gone afterwards."""

from __future__ import annotations

import asyncio
import signal
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import IO

from benchmarks.contestants import Contestant

POLL = 0.02  # seconds
STOP = 30.0  # seconds


class StartError(Exception):
    """A server that did not come up, with the last lines that it wrote."""


@dataclass(frozen=True)
class Started:
    port: int
    launched: float  # on time.perf_counter()
    ready_seconds: float


@asynccontextmanager
async def running(contestant: Contestant, patience: float) -> AsyncIterator[Started]:
    """Raises StartError if it ends, or is not ready within `patience` seconds."""
    port = free_port()
    with tempfile.TemporaryFile() as log:
        launched = time.perf_counter()
        process = await asyncio.create_subprocess_exec(*contestant.command(port), stdout=log, stderr=log)
        try:
            while not await contestant.ready(port):
                if process.returncode is not None:
                    raise StartError(f"{contestant.name} exited with {process.returncode}: {_last_words(log)}")
                if time.perf_counter() - launched > patience:
                    raise StartError(f"{contestant.name} not ready after {patience:g} s: {_last_words(log)}")
                await asyncio.sleep(POLL)
            yield Started(port, launched, time.perf_counter() - launched)
        finally:
            await _stop(process)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


async def _stop(process: asyncio.subprocess.Process) -> None:
    if process.returncode is None:
        process.send_signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(process.wait(), STOP)
        except TimeoutError:
            process.kill()
            await process.wait()


def _last_words(log: IO[bytes], size: int = 1000) -> str:
    log.seek(max(0, log.seek(0, 2) - size))
    return log.read().decode(errors="replace").strip()

"""A live service for the examples: started on a free port, and stopped whatever happens."""

from __future__ import annotations

import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from client.api import GetStatsResponse
from client.client import Client

READY = "pagewire ready: "  # MODEL at HOST:PORT, …
START_PATIENCE = 600.0  # seconds; the first start may pull a model
STOP_PATIENCE = 30.0
QUIET_PATIENCE = 20.0


class LiveError(Exception):
    """The service did not start, or holds what it should have let go; one line for a person."""


@contextmanager
def served(model: Sequence[str] = (), flags: Sequence[str] = ()) -> Iterator[str]:
    """The address of a `pagewire serve` of its own; its words go to our standard error."""
    command = [sys.executable, "-m", "client.cli", "serve", *model, "--port", "0", *flags]
    with subprocess.Popen(command, cwd=Path(__file__).parents[1], stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        ready: queue.Queue[str] = queue.Queue()
        reader = threading.Thread(target=_pass_on, args=(process.stderr, ready))
        reader.start()
        try:
            yield _address(ready)
        finally:
            process.terminate()
            try:
                process.wait(STOP_PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
            reader.join()


def _pass_on(lines: IO[str], ready: queue.Queue[str]) -> None:
    """Copies every line, and puts the one that says where it serves into `ready`; an empty one at the end."""
    for line in lines:
        sys.stderr.write(line)
        if line.startswith(READY):
            ready.put(line)
    ready.put("")


def _address(ready: queue.Queue[str]) -> str:
    try:
        line = ready.get(timeout=START_PATIENCE)
    except queue.Empty:
        raise LiveError(f"the service is not ready after {START_PATIENCE:g} s") from None
    if not line:
        raise LiveError("the service ended before it was ready")
    return line.removeprefix(READY).rpartition(" at ")[2].partition(",")[0].strip()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def nothing_left(address: str) -> None:
    """Returns once the service runs, queues and holds nothing; clients that have just left are given a moment."""
    deadline = time.monotonic() + QUIET_PATIENCE
    with Client(address) as client:
        while not _is_quiet(stats := client.stats(timeout=QUIET_PATIENCE)):
            if time.monotonic() > deadline:
                raise LiveError(f"after {QUIET_PATIENCE:g} s the service still holds: {str(stats).strip()}")
            time.sleep(0.05)


def _is_quiet(stats: GetStatsResponse) -> bool:
    held = stats.running + stats.waiting + stats.owned_blocks + stats.fenced_blocks + stats.open_calls
    return held == 0 and stats.free_slots == stats.total_slots

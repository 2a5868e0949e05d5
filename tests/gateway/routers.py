"""A real smg in front of services, as an operator would run one: a process, its port, and the official client."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

from client.api import GetStatsResponse
from client.client import Client
from examples.live import free_port

ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds: how long a test waits for what must come


@dataclass
class Router:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    @property
    def client(self) -> openai.OpenAI:
        """One that tries nothing twice: what it sees is what smg says."""
        return client(self.port)

    def workers(self) -> int:
        """That it would send something to."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        with contextlib.closing(connection), contextlib.suppress(OSError):
            connection.request("GET", "/readiness")
            answer = connection.getresponse()
            if answer.status == http.client.OK:
                return int(json.loads(answer.read())["healthy_workers"])
        return 0


def client(port: int) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0, timeout=PATIENCE)


def until(condition: Callable[[], bool], what: str, patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, f"not within {patience:g} s: {what}"
        time.sleep(0.02)


def until_stats(
    service: Client, condition: Callable[[GetStatsResponse], bool], what: str, patience: float = PATIENCE
) -> None:
    until(lambda: condition(service.stats()), what, patience)


@contextmanager
def router(directory: Path, *addresses: str, flags: tuple[str, ...] = ()) -> Iterator[Router]:
    """Waited for until it knows every service."""
    port, log = free_port(), directory / "smg.log"
    arguments = ["--worker-urls", *[f"grpc://{address}" for address in addresses], "--host", "127.0.0.1"]
    arguments += ["--port", str(port), "--prometheus-host", "127.0.0.1", "--prometheus-port", str(free_port()), *flags]
    with log.open("wb") as output:
        command = [sys.executable, "-m", "smg", "launch", *arguments]
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output)
    made = Router(process, port, log)
    try:
        until(lambda: made.workers() == len(addresses), "smg knows every service")
        yield made
    finally:
        process.kill()
        process.wait()

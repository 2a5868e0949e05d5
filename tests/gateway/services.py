"""A service in a process of its own, for tests whose clients block."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from client.api import GetStatsResponse
from client.client import Client
from examples.live import free_port
from tests.gateway.routers import ROOT, until


@dataclass
class Served:
    process: subprocess.Popen[bytes]
    port: int
    native: Client

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stats(self) -> GetStatsResponse:
        return self.native.stats()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@contextmanager
def served(model: str, *flags: str, port: int = 0) -> Iterator[Served]:
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="pagewire-gateway-") as directory:
        log = Path(directory) / "stderr"
        command = [sys.executable, "-m", "scheduler_svc", model, "--port", str(port), *flags]
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, stderr=stderr)
        try:
            until(lambda: "pagewire ready" in log.read_text(), "the ready line")
            with Client(f"127.0.0.1:{port}") as native:
                yield Served(process, port, native)
        finally:
            process.kill()
            process.wait()

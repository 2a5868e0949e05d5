"""The gateway as a child: started, watched, started again, stopped in order, never left behind. A stand-in for smg."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from examples.live import free_port
from scheduler_svc import config, gateway
from scheduler_svc.gateway import Gateway, GatewayConfig, GatewayError
from tests.gateway import stand_in

ROOT = Path(__file__).parents[2]
PATIENCE = 60


@pytest.fixture(autouse=True)
def standing_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MODULE", "tests.gateway.stand_in")
    monkeypatch.setattr(gateway, "FIRST_DELAY", 0.01)


class Made:
    """A gateway, what it said, and how many calls it is told that it has open."""

    def __init__(self, grace: float = 30.0) -> None:
        chosen = GatewayConfig("127.0.0.1", free_port(), grace)
        self.calls, self.asked = 0, 0
        self.said: list[str] = []
        self.spoken = asyncio.Event()
        self.gateway = Gateway(chosen, lambda: gateway.command(chosen, "127.0.0.1", 9), self._calls, self._say)

    def _calls(self) -> int:
        self.asked += 1
        return self.calls

    def _say(self, line: str) -> None:
        self.said.append(line)
        self.spoken.set()


def ended(fd: int, patience: float = PATIENCE) -> bool:
    return bool(select.select([fd], [], [], patience)[0])


async def test_it_is_started_again_when_it_dies() -> None:
    made = Made()
    await made.gateway.start()
    first = made.gateway.pid
    os.kill(first, signal.SIGKILL)
    await made.spoken.wait()
    assert made.said == ["the OpenAI gateway was killed by SIGKILL; it is started again in 0.01 s"]
    while not gateway._is_ready(made.gateway.config):
        await asyncio.sleep(0.01)
    assert made.gateway.pid not in (0, first)
    made.gateway.kill()
    assert made.gateway.pid == 0


async def test_one_that_never_serves_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stand_in.ENVIRONMENT, "ends")
    made = Made()
    with pytest.raises(GatewayError, match="ended with exit code 3, 5 times in a row"):
        await made.gateway.start()
    assert len(made.said) == 4
    assert made.said[1].endswith("in 0.02 s")


async def test_a_stop_waits_for_its_calls_and_then_for_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not end by itself, as smg with connections that are kept alive."""
    monkeypatch.setenv(stand_in.ENVIRONMENT, "stays")
    monkeypatch.setattr(gateway, "QUIET", 0.1)
    made = Made()
    made.calls = 1
    await made.gateway.start()
    process = os.pidfd_open(made.gateway.pid)
    stopping = asyncio.create_task(made.gateway.stop())
    while made.asked < 5:
        await asyncio.sleep(0.01)
    assert not ended(process, 0)
    made.calls = 0
    await stopping
    assert ended(process, 0)
    os.close(process)


async def test_a_stop_takes_no_longer_than_its_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(stand_in.ENVIRONMENT, "stays")
    made = Made(grace=0.2)
    made.calls = 1
    await made.gateway.start()
    await made.gateway.stop()
    assert made.gateway.pid == 0
    assert made.said == []


async def test_a_stop_before_it_serves_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "_is_ready", lambda config: False)
    made = Made()
    starting = asyncio.create_task(made.gateway.start())
    while not made.gateway.pid:
        await asyncio.sleep(0.01)
    await made.gateway.stop()
    assert made.gateway.pid == 0
    with pytest.raises(asyncio.CancelledError):
        await starting


def test_it_ends_with_its_parent() -> None:
    """Even with one that is killed."""
    script = f"""
import asyncio, sys
from scheduler_svc import gateway
gateway.MODULE = "tests.gateway.stand_in"
chosen = gateway.GatewayConfig("127.0.0.1", {free_port()})
async def main():
    made = gateway.Gateway(chosen, lambda: gateway.command(chosen, "127.0.0.1", 9), lambda: 0, print)
    await made.start()
    print(made.pid, flush=True)
    await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        child = os.pidfd_open(int(parent.stdout.readline()))
        assert not ended(child, 0)
        parent.kill()
    assert ended(child)
    os.close(child)


def test_a_child_without_its_parent_does_not_begin() -> None:
    command = [sys.executable, "-m", "scheduler_svc.tied", "1", "this"]  # a module that would end well, and say much
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (1, b"")


def test_what_cannot_work_is_said_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(GatewayError, match=rf"--openai-port {port}: cannot listen on 127\.0\.0\.1: .*in use"):
            gateway.check(GatewayConfig("127.0.0.1", port))
    gateway.check(GatewayConfig("127.0.0.1", port))
    monkeypatch.setattr(gateway, "MODULE", "no_such_gateway")
    with pytest.raises(GatewayError, match=r"pip install 'pagewire\[openai\]'"):
        gateway.check(GatewayConfig("127.0.0.1", port))


def test_it_connects_to_where_we_listen() -> None:
    chosen = GatewayConfig("::1", 8000, 2.4)
    assert chosen.url == "http://[::1]:8000/v1"
    for host, target in (("0.0.0.0", "127.0.0.1"), ("::", "[::1]"), ("10.0.0.1", "10.0.0.1")):
        words = gateway.command(chosen, host, 50051)
        assert words[words.index("--worker-urls") + 1] == f"grpc://{target}:50051"
    assert words[words.index("--shutdown-grace-period-secs") + 1] == "2"


def test_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert config.parse(["fake:"]).gateway is None
    flags = ["fake:", "--host", "127.0.0.2", "--openai-port", "8000", "--drain-timeout", "7"]
    assert config.parse(flags).gateway == GatewayConfig("127.0.0.2", 8000, 7.0)
    with pytest.raises(SystemExit):
        config.parse(["fake:", "--openai-port", "50051"])
    assert "gRPC has that port" in capsys.readouterr().err

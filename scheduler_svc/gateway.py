"""smg beside us: OpenAI's HTTP API over our gRPC port, in a process of its own that lives no longer than this one.

It is a client like any other: it knows our address and nothing else of us.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

MODULE: Final = "smg"
FIRST_DELAY, LONGEST_DELAY = 0.25, 15.0  # seconds between starts
FUTILE_STARTS: Final = 5  # before the first that served: then the service says why, and ends
GLANCE: Final = 0.05  # seconds between two looks at whether it serves, or is still busy
MAX_PAYLOAD: Final = 16 << 20  # bytes, as of a gRPC message
QUIET: Final = 1.0  # seconds without a call of it, after which it has nothing more to write


class GatewayError(Exception):
    """It cannot be had here, in one line for the person who asked."""


@dataclass(frozen=True)
class GatewayConfig:
    host: str
    port: int
    grace: float = 600.0  # seconds for what it has in hand when it is to end

    @property
    def url(self) -> str:
        return f"http://{_in_url(self.host)}:{self.port}/v1"


def check(config: GatewayConfig) -> None:
    """Raises GatewayError where no start could succeed."""
    if importlib.util.find_spec(MODULE) is None:
        raise GatewayError("--openai-port needs smg, which is not installed: pip install 'pagewire[openai]'")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except OSError as error:
            raise GatewayError(f"--openai-port {config.port}: cannot listen on {config.host}: {error}") from error


def command(config: GatewayConfig, grpc_host: str, grpc_port: int) -> list[str]:
    """All that it is told, how it reaches us included.

    Its one worker is its parent: it need not look whether that one lives, nor stop asking it after failures or silence.
    While the worker behind us is being replaced, requests wait here. Its own control plane is for nobody: nobody gets
    the key.
    """
    arguments = {
        "--worker-urls": f"grpc://{_in_url(grpc_host)}:{grpc_port}",
        "--host": config.host,
        "--port": str(config.port),
        "--shutdown-grace-period-secs": str(max(1, round(config.grace))),
        "--prometheus-host": "127.0.0.1",
        "--prometheus-port": str(_free_port()),
        "--max-payload-size": str(MAX_PAYLOAD),
        "--worker-wedge-secs": "86400",
        "--control-plane-api-keys": f"pagewire:pagewire:admin:{secrets.token_hex(16)}",
        "--log-level": "error",
    }
    flags = ["--disable-health-check", "--disable-circuit-breaker"]
    return [word for pair in arguments.items() for word in pair] + flags


class Gateway:
    """Started once the service serves; started again, with patience, whenever it ends by itself.

    Belongs to the event loop's thread, which must live as long as the process: the kernel ends the child with it.
    `arguments` is asked for at each start, `calls` says how many calls it has open here, `say` gets lines for people.
    """

    def __init__(
        self,
        config: GatewayConfig,
        arguments: Callable[[], list[str]],
        calls: Callable[[], int],
        say: Callable[[str], None],
    ) -> None:
        self.config, self._arguments, self._calls, self._say = config, arguments, calls, say
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = asyncio.Event()  # of the present process
        self._keeper: asyncio.Task[None] | None = None
        self._served = asyncio.get_running_loop().create_future()  # or why it never will
        self._futile = 0  # starts since it last served
        self._stopping = False

    @property
    def pid(self) -> int:
        return self._process.pid if self._process else 0

    async def start(self) -> None:
        """Returns when it serves. Raises GatewayError where it ends again and again before."""
        self._keeper = asyncio.create_task(self._keep())
        await self._served

    async def stop(self) -> None:
        """It takes no more requests; returns when those it has are answered, or its grace is over."""
        self._stopping = True
        if self._process is None:
            return
        self._process.terminate()
        clock = asyncio.get_running_loop().time
        end, quiet_since = clock() + self.config.grace, clock()
        while not self._ended.is_set() and clock() < end and clock() - quiet_since < QUIET:
            if self._calls():
                quiet_since = clock()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), GLANCE)
        self.kill()

    def kill(self) -> None:
        """At once. A second call does nothing."""
        self._stopping = True
        if self._keeper:
            self._keeper.cancel()
        self._served.cancel()
        if self._process:
            self._process.kill()
            self._reap()

    async def _keep(self) -> None:
        while not self._stopping:
            self._futile += 1
            words = await self._live()
            if self._stopping:
                return
            if self._futile == FUTILE_STARTS and not self._served.done():
                self._served.set_exception(GatewayError(f"the OpenAI gateway {words}, {self._futile} times in a row"))
                return
            delay = min(FIRST_DELAY * 2.0 ** max(0, self._futile - 1), LONGEST_DELAY)
            self._say(f"the OpenAI gateway {words}; it is started again in {delay:g} s")
            await asyncio.sleep(delay)

    async def _live(self) -> str:
        """From a start to its end, and how it ended, in words."""
        try:
            self._spawn()
        except OSError as error:
            return f"could not be started: {error}"
        if await self._serves():
            self._futile = 0
            if not self._served.done():
                self._served.set_result(None)
        await self._ended.wait()
        return self._reap()

    def _spawn(self) -> None:
        """In a process group of its own: a terminal's Ctrl-C is for us, who say when it is to end. Raises OSError."""
        tied = [sys.executable, "-m", "scheduler_svc.tied", str(os.getpid()), MODULE, "launch", *self._arguments()]
        process = subprocess.Popen(tied, stdin=subprocess.DEVNULL, stdout=sys.stderr, process_group=0)
        try:
            exit_fd = os.pidfd_open(process.pid)
        except OSError:
            process.kill()
            process.wait()
            raise
        self._process, self._ended = process, asyncio.Event()
        loop, ended = asyncio.get_running_loop(), self._ended

        def end() -> None:
            loop.remove_reader(exit_fd)
            os.close(exit_fd)
            ended.set()

        loop.add_reader(exit_fd, end)

    async def _serves(self) -> bool:
        """Once it does; False where it ends before."""
        while not self._ended.is_set():
            if await asyncio.to_thread(_is_ready, self.config):
                return True
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._ended.wait(), GLANCE)
        return False

    def _reap(self) -> str:
        assert self._process is not None
        code = self._process.wait()
        self._process = None
        return f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"


def _is_ready(config: GatewayConfig) -> bool:
    """Whether it answers, and has found its worker and the model's tokenizer."""
    import http.client  # not for those who start no gateway

    connection = http.client.HTTPConnection(_reachable(config.host), config.port, timeout=5)
    try:
        connection.request("GET", "/readiness")
        return connection.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _reachable(host: str) -> str:
    """Where one connects to whoever listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def _in_url(host: str) -> str:
    host = _reachable(host)
    return f"[{host}]" if ":" in host else host

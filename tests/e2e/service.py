"""A whole service in processes of its own, and a client: start it, watch its health, find its worker, kill it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health_pb2
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

ROOT = Path(__file__).parents[2]
PATIENCE = 180.0  # seconds: how long to wait for what must come; a model loads slowly on a busy machine
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass
class Service:
    """Made by `service`. `worker_pid` and `stats` ask the service itself."""

    process: subprocess.Popen[bytes]
    port: int
    log: Path
    channel: grpc.aio.Channel

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel)

    async def until_health(self, wanted: int, patience: float = PATIENCE) -> None:
        """By health's Watch, so the answer comes with the change."""
        watch = self.channel.unary_stream(
            "/grpc.health.v1.Health/Watch",
            health_pb2.HealthCheckRequest.SerializeToString,
            health_pb2.HealthCheckResponse.FromString,
        )
        call = watch(health_pb2.HealthCheckRequest(), wait_for_ready=True, timeout=patience)
        try:
            async for response in call:
                if response.status == wanted:
                    return
        except grpc.aio.AioRpcError as error:
            raise AssertionError(f"health is not {wanted} after {patience:g} s: {self.log.read_text()}") from error
        finally:
            call.cancel()

    async def stats(self) -> admin_pb2.GetStatsResponse:
        return await self.admin.GetStats(admin_pb2.GetStatsRequest(), wait_for_ready=True)

    async def until_stats(
        self, condition: Callable[[admin_pb2.GetStatsResponse], bool], what: str, patience: float = PATIENCE
    ) -> admin_pb2.GetStatsResponse:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(patience):
                while not condition(stats := await self.stats()):
                    pass
                return stats
        raise AssertionError(f"not within {patience:g} s: {what}; {stats}")

    async def until_quiet(self) -> admin_pb2.GetStatsResponse:
        """Nothing runs or waits, every block and slot is back, no call is open."""
        return await self.until_stats(_is_quiet, "nothing left behind")

    async def worker_pid(self, rank: int = 0) -> int:
        """Of a worker that serves now."""
        await self.until_health(SERVING)
        stats = await self.until_stats(lambda stats: bool(_serving(stats)), "a worker that serves")
        return _serving(stats)[rank]

    async def kill_worker(self, rank: int = 0, number: signal.Signals = signal.SIGKILL) -> int:
        """kill -9 of the worker that serves; returns its pid when the service has noticed."""
        pid = await self.worker_pid(rank)
        os.kill(pid, number)
        await self.until_stats(
            lambda stats: pid not in [worker.pid for worker in stats.workers], f"the loss of worker {pid}"
        )
        return pid

    async def wait(self, patience: float = PATIENCE) -> int:
        """For the service's own end; its exit code."""
        return await asyncio.to_thread(self.process.wait, patience)


def _serving(stats: admin_pb2.GetStatsResponse) -> list[int]:
    return [worker.pid for worker in stats.workers if worker.state == admin_pb2.WORKER_STATE_SERVING]


def _is_quiet(stats: admin_pb2.GetStatsResponse) -> bool:
    busy = stats.running + stats.waiting + stats.owned_blocks + stats.fenced_blocks + stats.open_calls
    blocks = stats.free_blocks + stats.cached_blocks
    return busy == 0 and stats.free_slots == stats.total_slots and blocks == stats.total_blocks


@contextlib.asynccontextmanager
async def service(model: str, *flags: str, until: int | None = SERVING, port: int = 0) -> AsyncIterator[Service]:
    """Started, and waited for until its health is `until`. Whatever happens, no process of it is left."""
    port = port or free_port()
    with tempfile.TemporaryDirectory(prefix="pagewire-e2e-") as directory:
        log = Path(directory) / "stderr"
        crashes = ["--crash-dir", str(Path(directory) / "crashes")]  # the tests' workers die often
        command = [sys.executable, "-m", "scheduler_svc", model, "--port", str(port), *crashes, *flags]
        environment = {**os.environ, "TMPDIR": directory}  # what a killed service leaves behind goes with it
        with log.open("wb") as stderr:
            process = subprocess.Popen(command, cwd=ROOT, stderr=stderr, env=environment)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=_OPTIONS) as channel:
            made = Service(process, port, log, channel)
            try:
                if until is not None:
                    await made.until_health(until)
                yield made
            finally:
                process.kill()  # its workers go with it
                await asyncio.to_thread(process.wait)


_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


@dataclass
class Output:
    """What one stream brought."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: int = 0
    completion_tokens: int = -1  # as the service counted

    def take(self, response: inference_pb2.GenerateResponse) -> None:
        if response.HasField("delta"):
            assert self.finish_reason == 0, "a delta after the end"
            self.token_ids += response.delta.token_ids
            self.text += response.delta.text
        else:
            assert self.finish_reason == 0, "two ends"
            self.finish_reason = response.finished.finish_reason
            self.completion_tokens = response.finished.usage.completion_tokens


async def generate(
    running: Service, request: inference_pb2.GenerateRequest, on_tokens: Callable[[int], None] = lambda count: None
) -> Output:
    """A stream to its end; `on_tokens` hears how many tokens each message brought."""
    output = Output()
    async for response in running.inference.Generate(request):
        output.take(response)
        on_tokens(len(response.delta.token_ids))
    assert output.finish_reason, "a stream without an end"
    assert output.completion_tokens == len(output.token_ids)
    return output

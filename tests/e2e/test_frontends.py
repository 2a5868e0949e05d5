"""`--frontends N`, as a client sees it: processes on one port that fail each by itself, and count together."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import grpc.aio
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status
from pagewire.v1 import inference_pb2, inference_pb2_grpc
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]

from tests.e2e.service import NOT_SERVING, PATIENCE, Service, service
from tests.e2e.test_lifecycle import _oracle, _refusal, _request

TWO = ("--frontends", "2")
OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 200)]


class Client:
    """A connection of its own, so a frontend of its own, for as long as that one lives."""

    def __init__(self, running: Service) -> None:
        self.channel = grpc.aio.insecure_channel(running.address, options=OPTIONS)
        self.inference = inference_pb2_grpc.InferenceServiceStub(self.channel)

    async def open_calls(self) -> int:
        """Of the frontend that it is connected to: GetStats has the sum of all."""
        info = self.channel.unary_unary(
            "/vllm.grpc.engine.VllmEngine/GetServerInfo",
            vllm.GetServerInfoRequest.SerializeToString,
            vllm.GetServerInfoResponse.FromString,
        )
        return int((await info(vllm.GetServerInfoRequest(), wait_for_ready=True)).active_requests)

    async def begin(self, request: inference_pb2.GenerateRequest, tenant: str = "") -> asyncio.Task[list[int]]:
        """A stream that has brought a token; the task ends with all of them, or with the call's error."""
        call = self.inference.Generate(request, metadata=(("tenant", tenant),) if tenant else None, wait_for_ready=True)
        stream = aiter(call)
        tokens = list((await anext(stream)).delta.token_ids)

        async def read() -> list[int]:
            async for response in stream:
                tokens.extend(response.delta.token_ids)
            return tokens

        return asyncio.ensure_future(read())


async def until_said(running: Service, words: str) -> None:
    async with asyncio.timeout(PATIENCE):
        while words not in running.log.read_text():
            await running.stats()


@contextlib.asynccontextmanager
async def served(model: str, *flags: str) -> AsyncIterator[Service]:
    """By all frontends: the first may serve before the last listens."""
    async with service(model, *TWO, *flags) as running:
        await until_said(running, "pagewire ready: ")
        yield running


@contextlib.asynccontextmanager
async def clients(running: Service, count: int) -> AsyncIterator[list[Client]]:
    made = [Client(running) for _ in range(count)]
    yield made
    await asyncio.gather(*(client.channel.close() for client in made))


def processes(running: Service, module: str = "") -> list[psutil.Process]:
    """Of the service, the first aside; those that run `module`."""
    found = []
    for child in psutil.Process(running.process.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if module in " ".join(child.cmdline()):
                found.append(child)
    return found


def status_details(error: grpc.aio.AioRpcError) -> set[str]:
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    return {detail.type_url.rpartition(".")[2] for detail in status.details} if status else set()


async def elsewhere(several: list[Client]) -> Client:
    """One whose frontend holds no call, while another's does."""
    for client in several:
        if await client.open_calls() == 0:
            return client
    raise AssertionError("all connections came to one frontend")


async def test_a_frontend_that_dies_loses_its_own_calls_and_no_others() -> None:
    async with served("fake:delay_ms=10") as running, clients(running, 16) as several:
        line = running.log.read_text()
        assert line.count("\n") == 1
        assert f" at 127.0.0.1:{running.port} (2 frontends), " in line
        made = [_request(100, seed=seed) for seed in range(1, 17)]
        for request in made:
            request.request_id = f"r{request.sampling.seed}"
        streams = [await client.begin(request) for client, request in zip(several, made, strict=True)]
        before = processes(running, "frontend_process")
        assert len(before) == 2
        before[0].kill()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        lost = [i for i, end in enumerate(ends) if isinstance(end, grpc.aio.AioRpcError)]
        kept = [i for i, end in enumerate(ends) if isinstance(end, list)]
        assert lost
        assert kept
        assert [ends[i] for i in kept] == [_oracle(made[i]) for i in kept]
        assert {ends[i].code() for i in lost} == {grpc.StatusCode.UNAVAILABLE}  # type: ignore[union-attr]
        again = await asyncio.gather(*(several[i].begin(made[i]) for i in lost))  # their ids are free again
        assert [await stream for stream in again] == [_oracle(made[i]) for i in lost]
        await running.until_quiet()
        await until_said(running, "was killed by SIGKILL: its calls have ended, another takes its place")
        async with asyncio.timeout(PATIENCE):
            while len(after := processes(running, "frontend_process")) < 2:
                await running.stats()
        assert before[1].pid in {process.pid for process in after}
        assert before[0].pid not in {process.pid for process in after}


async def test_ids_queue_and_quota_are_one_over_all_frontends_and_so_is_a_drain(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[tenant.limited]\ntokens_per_second = 0.001\nburst = 5\n")
    flags = ("--tenants", str(tenants), "--max-num-seqs", "2", "--max-waiting", "1")
    async with served("fake:delay_ms=5", *flags) as running, clients(running, 16) as several:
        first = several[0]
        request = _request(8000)
        request.request_id = "r"
        stream = await first.begin(request)
        other = await elsewhere(several)

        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.begin(request)
        assert caught.value.code() is grpc.StatusCode.ALREADY_EXISTS

        assert len(await (await first.begin(_request(1, seed=2), "limited"))) == 1
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.begin(_request(1, seed=3), "limited")
        assert error_details_pb2.QuotaFailure.DESCRIPTOR.name in status_details(caught.value)

        second = await other.begin(_request(8000, seed=4))
        waits = first.inference.Generate(_request(1, seed=5))
        await running.until_stats(lambda stats: stats.waiting == 1, "a request that waits")
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.begin(_request(1, seed=6))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        waits.cancel()

        await other.inference.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id="r"))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream
        assert caught.value.code() is grpc.StatusCode.CANCELLED
        second.cancel()
        await running.until_stats(lambda stats: stats.running + stats.waiting == 0, "nothing left")
        await _drained(running, first, other)


async def _drained(running: Service, *several: Client) -> None:
    """A signal to the first process: what runs anywhere is finished, and no process is left."""
    everybody = processes(running)
    made = [_request(60, seed=seed) for seed in range(10, 10 + len(several))]
    streams = [await client.begin(request) for client, request in zip(several, made, strict=True)]
    running.process.send_signal(signal.SIGTERM)
    await running.until_health(NOT_SERVING)
    assert [await stream for stream in streams] == [_oracle(request) for request in made]
    assert await running.wait() == 0
    assert "pagewire drained" in running.log.read_text().splitlines()
    assert not [process for process in everybody if process.is_running()]


async def test_a_second_signal_stops_at_once_and_nobody_stays() -> None:
    async with served("fake:delay_ms=10") as running, clients(running, 4) as several:
        streams = [await client.begin(_request(8000, seed=seed)) for seed, client in enumerate(several, 1)]
        everybody = processes(running)
        assert len(everybody) == 3
        running.process.send_signal(signal.SIGTERM)
        await running.until_health(NOT_SERVING)
        running.process.send_signal(signal.SIGINT)
        assert await running.wait(20) == 1
        ends = await asyncio.gather(*streams, return_exceptions=True)
        assert all(isinstance(end, grpc.aio.AioRpcError) for end in ends)
        assert not [process for process in everybody if process.is_running()]


async def test_frontends_and_workers_die_with_the_engines_process_and_a_port_in_use_is_one_line() -> None:
    async with served("fake:") as running:
        for flags in (TWO, ()):
            code, err = await asyncio.to_thread(_refusal, "fake:", "--port", str(running.port), *flags)
            assert code == 1
            lines = [line for line in err.splitlines() if line.startswith("pagewire: ")]
            assert len(lines) == 1
            assert str(running.port) in lines[0]
            assert "Traceback" not in err
        everybody = [os.pidfd_open(process.pid) for process in processes(running)]
        assert len(everybody) == 3
        running.process.kill()
        for descriptor in everybody:
            assert select.select([descriptor], [], [], 6.0)[0], "it outlived its parent (2 s are promised)"
            os.close(descriptor)


def test_what_no_worker_can_serve_ends_all_of_them_with_its_reason() -> None:
    code, err = _refusal("fake:load_fails=0", "--port", "0", *TWO)
    assert code == 1
    assert [line for line in err.splitlines() if "cannot be read" in line]
    assert "Traceback" not in err


def test_a_model_without_a_tokenizer_ends_it_once_a_frontend_has_said_so(tmp_path: Path) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"GGUF, or so it says")
    code, err = _refusal(str(path), "--port", "0", *TWO)
    assert code == 1
    assert "not.gguf" in err
    assert "Traceback" not in err


@pytest.mark.full
async def test_a_frontend_that_hangs_is_replaced() -> None:
    """A stopped process: ZeroMQ's own heartbeat misses it after some seconds."""
    async with served("fake:delay_ms=10") as running, clients(running, 16) as several:
        made = [_request(1500, seed=seed) for seed in range(1, 17)]
        streams = [await client.begin(request) for client, request in zip(several, made, strict=True)]
        hung = processes(running, "frontend_process")[0]
        hung.suspend()
        ends = await asyncio.gather(*streams, return_exceptions=True)
        lost = [i for i, end in enumerate(ends) if not isinstance(end, list)]
        assert 0 < len(lost) < len(made)
        again = await asyncio.gather(*(several[i].begin(made[i]) for i in lost))
        assert [await stream for stream in again] == [_oracle(made[i]) for i in lost]
        assert "is lost: its connection broke" in running.log.read_text()
        assert not hung.is_running()

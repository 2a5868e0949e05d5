"""A service from its start to its end: readiness, drains, refusals to start, and what happens without a worker."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import grpc
import grpc.aio
import pytest
from pagewire.v1 import inference_pb2

from protos.wire import Sampling
from tests.e2e.service import NOT_SERVING, ROOT, SERVING, Service, free_port, generate, service
from worker_svc.backends.fake import expected

LIMIT = 3.0  # times what is promised: the machine may be busy
PATIENCE = 60.0


def _request(max_tokens: int, *, seed: int = 1, ids: list[int] | None = None) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=ids or [300 + seed, 301, 302]),
        sampling=inference_pb2.SamplingParams(temperature=1, seed=seed, max_tokens=max_tokens),
    )


def _oracle(request: inference_pb2.GenerateRequest) -> list[int]:
    sampling = Sampling(max_tokens=request.sampling.max_tokens, seed=request.sampling.seed)
    return expected(list(request.token_ids.ids), sampling)


async def _begin(running: Service, request: inference_pb2.GenerateRequest) -> asyncio.Task[list[int]]:
    """A stream that has brought its first token, and goes on in a task that ends with all of them."""
    begun = asyncio.Event()

    async def read() -> list[int]:
        return (await generate(running, request, lambda count: begun.set())).token_ids

    task = asyncio.ensure_future(read())
    await begun.wait()
    return task


async def test_it_says_when_it_is_ready_and_where() -> None:
    async with service("fake:load_ms=100", "--served-model-name", "a-name") as running:
        line = running.log.read_text()
        assert line.count("\n") == 1
        assert f"pagewire ready: a-name at 127.0.0.1:{running.port}" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_drains(number: signal.Signals) -> None:
    async with service("fake:delay_ms=10") as running:
        request = _request(60)
        stream = await _begin(running, request)
        running.process.send_signal(number)
        await running.until_health(NOT_SERVING)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(running, _request(1))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await stream == _oracle(request), "what ran is finished"
        assert await running.wait() == 0


async def test_a_second_signal_stops_at_once() -> None:
    async with service("fake:delay_ms=10") as running:
        stream = await _begin(running, _request(8000))
        running.process.send_signal(signal.SIGTERM)
        await running.until_health(NOT_SERVING)
        running.process.send_signal(signal.SIGTERM)
        assert await running.wait(20) == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await stream


async def test_health_tells_of_a_dead_worker_within_a_second_and_of_the_next() -> None:
    async with service("fake:load_ms=300") as running:
        pid = await running.worker_pid()
        os.kill(pid, signal.SIGKILL)
        await running.until_health(NOT_SERVING, patience=1.0 * LIMIT)
        await running.until_health(SERVING)
        assert await running.worker_pid() != pid


async def test_requests_wait_for_a_worker_and_then_finish() -> None:
    async with service("fake:load_ms=500") as running:
        await running.kill_worker()
        made = [_request(20, seed=seed) for seed in range(1, 9)]
        outputs = await asyncio.gather(*(generate(running, request) for request in made))
        assert [output.token_ids for output in outputs] == [_oracle(request) for request in made]


async def test_an_external_worker_may_come_late_die_and_come_again() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "worker_svc", "--connect", endpoint]
    async with service("fake:delay_ms=5", "--workers", "0", "--listen", endpoint, until=NOT_SERVING) as running:
        request = _request(100)
        task = asyncio.ensure_future(_begin(running, request))
        await running.until_stats(lambda stats: stats.waiting == 1, "a request that waits")
        for _ in range(2):
            with subprocess.Popen(command, cwd=ROOT) as worker:
                stream = await task if not task.done() else task.result()
                await running.until_health(SERVING)
                worker.kill()
                await running.until_health(NOT_SERVING)
        assert not stream.done()
        with subprocess.Popen(command, cwd=ROOT) as worker:
            assert await stream == _oracle(request)
            worker.kill()


async def test_a_request_that_kills_workers_fails_alone() -> None:
    async with service("fake:delay_ms=1,poison=7") as running:
        made = [_request(30, seed=seed) for seed in range(1, 9)]
        streams = [await _begin(running, request) for request in made]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(running, _request(5, ids=[300, 7]))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert [await stream for stream in streams] == [_oracle(request) for request in made]
        await running.until_quiet()


async def test_a_worker_dies_with_its_scheduler() -> None:
    async with service("fake:") as running:
        pid = await running.worker_pid()
        worker = os.pidfd_open(pid)
        running.process.kill()
        assert select.select([worker], [], [], 2.0 * LIMIT)[0], "2 s are promised"
        os.close(worker)


def _refusal(*arguments: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "scheduler_svc", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=PATIENCE)
    return done.returncode, done.stderr


async def test_a_port_in_use_is_one_line() -> None:
    async with service("fake:") as running:
        code, err = await asyncio.to_thread(_refusal, "fake:", "--port", str(running.port))
    assert code == 1
    lines = [line for line in err.splitlines() if line.startswith("pagewire: ")]
    assert len(lines) == 1
    assert str(running.port) in lines[0]
    assert "Traceback" not in err


def test_a_model_that_no_worker_can_serve_ends_it_with_its_reason() -> None:
    code, err = _refusal("fake:load_fails=0", "--port", "0")
    assert code == 1
    assert [line for line in err.splitlines() if "cannot be read" in line]
    assert "Traceback" not in err


def test_a_file_that_is_no_model_ends_it_with_its_reason(tmp_path: Path) -> None:
    path = tmp_path / "not.gguf"
    path.write_bytes(b"GGUF, or so it says")
    code, err = _refusal(str(path), "--port", "0")
    assert code == 1
    assert "not.gguf" in err
    assert "Traceback" not in err


def test_what_is_not_built_is_wrong_usage() -> None:
    code, err = _refusal("fake:", "--openai-port", "18080", "--frontends", "2")
    assert code == 2
    assert err.count("\n") == 1

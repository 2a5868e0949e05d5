"""`--workers N`: replicas behind one scheduler. One that dies hands its streams to the others."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from pagewire.v1 import admin_pb2

from tests.e2e.crash import crash_round
from tests.e2e.service import ROOT, SERVING, Service, free_port, generate, service
from tests.e2e.test_frontends import clients, processes, served
from tests.e2e.test_lifecycle import _begin, _oracle, _request

STATE_SERVING = admin_pb2.WORKER_STATE_SERVING
TWO = ("--workers", "2")


async def both_serve(running: Service) -> admin_pb2.GetStatsResponse:
    return await running.until_stats(
        lambda stats: [worker.state for worker in stats.workers] == [STATE_SERVING] * 2, "two workers"
    )


async def test_64_streams_over_two_workers_outlive_three_deaths() -> None:
    async with service("fake:delay_ms=2", *TWO, "--max-num-seqs", "32") as running:
        await both_serve(running)
        done = await crash_round(running, 1, streams=64, kills=3, max_tokens=48)
        assert (done.different, done.damaged) == (0, 0)
        assert (await running.until_quiet()).recoveries == 3


async def test_the_streams_of_a_dead_worker_go_on_in_the_other_before_it_is_back() -> None:
    async with service("fake:delay_ms=5,load_ms=600", *TWO) as running:
        before = await both_serve(running)
        pids = {worker.pid for worker in before.workers}
        assert len(pids) == 2
        assert {process.pid for process in processes(running, "worker_svc")} == pids
        made = [_request(100, seed=seed) for seed in range(1, 9)]
        streams = [await _begin(running, request) for request in made]
        os.kill(before.workers[0].pid, signal.SIGKILL)
        assert [await stream for stream in streams] == [_oracle(request) for request in made]
        after = await running.stats()
        assert after.recoveries == 1
        assert after.workers[1].pid == before.workers[1].pid
        await running.until_health(SERVING, patience=1.0)  # it never said otherwise
        await both_serve(running)
        await running.until_quiet()


async def test_frontends_and_workers_together() -> None:
    async with served("fake:delay_ms=5", *TWO) as running, clients(running, 8) as several:
        await both_serve(running)
        made = [_request(60, seed=seed) for seed in range(1, 9)]
        streams = [await client.begin(request) for client, request in zip(several, made, strict=True)]
        os.kill((await running.stats()).workers[1].pid, signal.SIGKILL)
        assert [await stream for stream in streams] == [_oracle(request) for request in made]
        everybody = processes(running)
        assert len(everybody) >= 3
        running.process.send_signal(signal.SIGTERM)
        assert await running.wait() == 0
        assert not [process for process in everybody if process.is_running()]


async def test_workers_that_come_by_themselves_are_as_many_as_come() -> None:
    endpoint = f"tcp://127.0.0.1:{free_port()}"
    command = [sys.executable, "-m", "worker_svc", "--connect", endpoint]
    async with service("fake:delay_ms=5", "--workers", "0", "--listen", endpoint, until=None) as running:
        with subprocess.Popen(command, cwd=ROOT) as first, subprocess.Popen(command, cwd=ROOT) as second:
            stats = await both_serve(running)
            assert {worker.pid for worker in stats.workers} == {first.pid, second.pid}
            made = [_request(100, seed=seed) for seed in range(1, 5)]
            streams = [await _begin(running, request) for request in made]
            first.kill()
            assert [await stream for stream in streams] == [_oracle(request) for request in made]
            with subprocess.Popen(command, cwd=ROOT) as third:
                stats = await both_serve(running)
                assert {worker.pid for worker in stats.workers} == {second.pid, third.pid}, (
                    "it took the dead one's place"
                )
                third.kill()
            second.kill()


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_the_real_model_over_two_workers(model_path: Path) -> None:
    flags = ("--device", "cpu", "--max-num-seqs", "16", "--quantization", "int8", "--kv-cache-gib", "0.25")
    async with service(str(model_path), *flags, *TWO) as running:
        await both_serve(running)
        done = await crash_round(running, 3, streams=24, kills=2, max_tokens=32)
        assert (done.different, done.damaged) == (0, 0)
        outputs = await asyncio.gather(*(generate(running, _request(8, seed=seed)) for seed in range(4)))
        assert all(len(output.token_ids) == 8 for output in outputs)

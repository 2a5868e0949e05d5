"""kill -9 under load, end to end: nothing is lost, and where the arithmetic is exact the streams are the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.crash import crash_round
from tests.e2e.service import service

REAL = ("--device", "cpu", "--max-num-seqs", "64")


async def test_64_streams_outlive_three_dead_workers() -> None:
    async with service("fake:delay_ms=2", "--max-num-seqs", "64") as running:
        for seed in (1, 2):
            done = await crash_round(running, seed, streams=64, kills=3, max_tokens=48)
            assert (done.different, done.damaged) == (0, 0)
        assert (await running.until_quiet()).recoveries == 6


async def test_planning_ahead_outlives_them_too() -> None:
    """Depth 2, and so few blocks that sequences are preempted as well."""
    async with service("fake:delay_ms=2,blocks=80", "--depth", "2", "--block-size", "8") as running:
        done = await crash_round(running, 3, streams=40, kills=3, max_tokens=40)
        assert (done.different, done.damaged) == (0, 0)
        assert (await running.until_quiet()).preemptions > 0


async def test_steps_in_flight_die_with_their_worker() -> None:
    """As on a device that computes beside the worker's main thread."""
    async with service("fake:overlap=1,delay_ms=4,blocks=80", "--depth", "2", "--block-size", "8") as running:
        done = await crash_round(running, 4, streams=40, kills=3, max_tokens=40)
        assert (done.different, done.damaged) == (0, 0)


MODES = [
    *(f"--quantization {weights}{kv}" for weights in ("int8", "int4") for kv in ("", " --kv-cache-dtype int8")),
    *("--dtype bfloat16", "--dtype bfloat16 --kv-cache-dtype int8", "--dtype float32"),
]


@pytest.mark.parametrize("mode", ["--quantization int4", "--dtype float32"])
async def test_the_real_model_outlives_a_dead_worker(model_path: Path, mode: str) -> None:
    async with service(str(model_path), *REAL, *mode.split()) as running:
        done = await crash_round(running, 1, streams=8, kills=1, max_tokens=12)
        assert (done.different, done.damaged) == (0, 0)
        assert (await running.until_quiet()).recoveries == 1


@pytest.mark.full
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("mode", MODES)
async def test_64_streams_of_the_real_model_outlive_three_dead_workers(model_path: Path, mode: str) -> None:
    async with service(str(model_path), *REAL, *mode.split()) as running:
        done = await crash_round(running, 7, streams=64, kills=3, max_tokens=48)
        assert (done.different, done.damaged) == (0, 0)

"""Streams that break and go on, end to end: they are the streams that would have been."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.resume import WAYS, house, wave

REAL = ("--device", "cpu", "--quantization", "int4", "--max-num-seqs", "16")


async def test_streams_go_on_whatever_broke_them() -> None:
    async with house("fake:delay_ms=4", "--max-num-seqs", "24") as home:
        for seed, way in enumerate(WAYS):
            done = await wave(home, way, seed, streams=12, max_tokens=48)
            assert (done.different, done.damaged) == (0, 0), done
            assert done.resumed > 0, done
            await home.running.until_quiet()
        await home.replica.until_quiet()


async def test_the_real_model_goes_on(model_path: Path) -> None:
    async with house(str(model_path), *REAL) as home:
        done = await wave(home, "kill -9", 1, streams=6, max_tokens=16)
        assert (done.different, done.damaged) == (0, 0), done
        assert done.resumed > 0, done


@pytest.mark.full
@pytest.mark.timeout(1200)
async def test_a_hundred_streams_of_the_real_model_go_on(model_path: Path) -> None:
    resumed = 0
    async with house(str(model_path), *REAL) as home:
        for seed in range(40):
            done = await wave(home, WAYS[seed % len(WAYS)], seed, streams=8, max_tokens=48)
            assert (done.different, done.damaged) == (0, 0), done
            resumed += done.resumed
            if resumed >= 100:
                break
    assert resumed >= 100

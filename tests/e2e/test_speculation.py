"""Whole services with and without drafts give the same streams, over preemptions and dead workers."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.e2e.crash import crash_round
from tests.e2e.service import service
from tests.e2e.speculation import compare, requests

NGRAM = ("--speculation", "ngram", "--num-drafts", "5")


async def test_drafts_outlive_dead_workers() -> None:
    """Depth 2, and so few blocks that sequences are preempted as well."""
    small = ("--depth", "2", "--block-size", "8", *NGRAM)
    async with service("fake:delay_ms=2,blocks=80", *small) as running:
        done = await crash_round(running, 3, streams=40, kills=3, max_tokens=40)
        assert (done.different, done.damaged) == (0, 0)
        assert (await running.until_quiet()).preemptions > 0


async def test_streams_of_the_real_model(model_path: Path) -> None:
    flags = ("--device", "cpu", "--quantization", "int4")
    done = await compare(str(model_path), requests(12, 24, random.Random(3)), NGRAM, flags, kills=1)
    assert done.different == []
    assert done.recoveries == 1
    assert done.drafted > done.accepted > 0


@pytest.mark.full
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("proposer", ["ngram", "suffix", "draft"])
async def test_500_requests_of_the_real_model(model_path: Path, proposer: str) -> None:
    speculation = ["--speculation", proposer, "--num-drafts", "5"]
    if proposer == "draft":
        speculation += ["--draft-model", str(model_path)]
    flags = ("--device", "cpu", "--quantization", "int4")
    small = ("--kv-cache-gib", "0.02" if proposer == "draft" else "0.01", "--max-num-seqs", "24")
    done = await compare(str(model_path), requests(500, 64, random.Random(1)), speculation, flags, small, kills=2)
    assert done.different == []
    assert done.recoveries == 2
    assert done.preemptions > 0
    assert done.accepted > 0

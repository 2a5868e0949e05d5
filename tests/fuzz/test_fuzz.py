"""A short round of `python -m tests.fuzz` in every run, from a new seed, and all that such rounds ever found."""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
from transformers import LlamaConfig

from tests.e2e.service import service
from tests.fuzz import doors, rpcs
from tests.fuzz.links import FAKE
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.worker.scheduler_end import setup


@pytest.fixture
def seed() -> int:
    made = random.SystemRandom().getrandbits(32)
    print(f"seed {made}")  # shown where the test fails
    return made


def _nothing_bad(findings: rpcs.Findings) -> None:
    assert not findings.bad, [(status, shot.path, shot.data.hex(), shot.metadata) for shot, status in findings.bad[:5]]


async def test_every_method_answers_whatever_it_is_sent(seed: int) -> None:
    told = await doors.throw_at_rpcs(1500, seed, lambda line: None)
    _nothing_bad(told.findings)
    served = {path for path, counter in told.findings.counts.items() if set(counter) != {"UNIMPLEMENTED"}}
    assert served >= {path for path in rpcs.methods() if path.startswith("/pagewire.v1")}
    assert any("OK" in counter for counter in told.findings.counts.values())


@pytest.mark.skipif(not doors.corpus(), reason="no call was ever found that ended badly")
async def test_what_was_found_before() -> None:
    async with service(doors.FAKE, *doors.FLAGS) as running:
        _nothing_bad(await rpcs.fire(running.address, doors.corpus()))


async def test_strangers_at_the_workers_socket(seed: int, tmp_path: Path) -> None:
    await doors.throw_at_scheduler(2000, seed, tmp_path)


async def test_strangers_at_the_frontends_socket(seed: int) -> None:
    await doors.throw_at_engine(2000, seed)


def test_plans_that_lie(seed: int) -> None:
    liar = doors.throw_at_worker(100, seed, FAKE, "--backend", "fake")
    assert liar.faults == 100
    assert liar.results, "some were believed up to the lie"


@pytest.mark.parametrize("quantization", ["", "int8"])
def test_plans_that_lie_to_our_own_kernels(quantization: str, seed: int, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    real = msgspec.structs.replace(
        setup(model=str(tmp_path)), block_size=32, max_model_len=128, quantization=quantization, threads=1
    )
    liar = doors.throw_at_worker(100, seed, real, "--backend", "cpu")
    assert liar.faults == 100


@pytest.mark.nightly
async def test_fifty_thousand(seed: int, tmp_path: Path) -> None:
    told = await doors.throw_at_rpcs(25_000, seed, lambda line: None)
    _nothing_bad(told.findings)
    assert told.late_mib - told.early_mib < 60, "memory that grows with the calls"
    await doors.throw_at_scheduler(11_500, seed, tmp_path)
    await doors.throw_at_engine(11_000, seed)
    assert doors.throw_at_worker(2500, seed, FAKE, "--backend", "fake").faults == 2500

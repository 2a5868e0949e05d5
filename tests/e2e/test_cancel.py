"""Calls given up by three ways leave no block, no slot, no call and no memory behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.cancel import SMALL_KV, WAYS, Left, cancel_round
from tests.e2e.service import service

GROWTH_MIB = 12.0  # what an allocator may keep of one more round; a leak of its tokens' bookkeeping would be more


def _assert_flat(first: Left, second: Left) -> None:
    for left in (first, second):
        assert set(left.ended) == set(WAYS)
        assert all(left.ended.values())
    assert second.scheduler_mib - first.scheduler_mib < GROWTH_MIB
    assert second.worker_mib - first.worker_mib < GROWTH_MIB


async def test_sixty_cancellations() -> None:
    async with service("fake:delay_ms=1") as running:
        await cancel_round(running, 1, 60)  # caches and allocators warm up
        _assert_flat(await cancel_round(running, 2, 60), await cancel_round(running, 3, 60))


@pytest.mark.full
@pytest.mark.timeout(600)
async def test_500_cancellations() -> None:
    async with service("fake:delay_ms=1") as running:
        await cancel_round(running, 1, 500)
        _assert_flat(await cancel_round(running, 2, 500), await cancel_round(running, 3, 500))


@pytest.mark.full
@pytest.mark.timeout(1800)
async def test_500_cancellations_of_the_real_model(model_path: Path) -> None:
    async with service(str(model_path), "--device", "cpu", *SMALL_KV) as running:
        await cancel_round(running, 1, 500)
        _assert_flat(await cancel_round(running, 2, 500), await cancel_round(running, 3, 500))

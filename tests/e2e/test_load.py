"""What a service with too much to do tells its callers, over real processes: queue, quota, deadlines, tenants."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import TypeVar, cast

import grpc
import grpc.aio
import pytest
from google.protobuf.message import Message
from google.rpc.error_details_pb2 import ErrorInfo, QuotaFailure, RetryInfo
from grpc_status import rpc_status
from pagewire.v1 import admin_pb2, inference_pb2

from tests.e2e.service import Service, service

Detail = TypeVar("Detail", bound=Message)


def request(
    max_tokens: int, *, prompt: int = 3, seed: int = 1, may_stop: bool = False
) -> inference_pb2.GenerateRequest:
    return inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[300 + seed] * prompt),
        sampling=inference_pb2.SamplingParams(
            temperature=1, seed=seed, max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[1] if may_stop else []
        ),
    )


async def run(
    running: Service, message: inference_pb2.GenerateRequest, tenant: str = "", timeout: float | None = None
) -> int:
    """The number of tokens that came."""
    metadata = (("tenant", tenant),) if tenant else None
    call = running.inference.Generate(message, metadata=metadata, timeout=timeout)
    return sum([len(response.delta.token_ids) async for response in call])


async def refused(
    running: Service, message: inference_pb2.GenerateRequest, tenant: str = "", timeout: float | None = None
) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(running, message, tenant, timeout)
    return caught.value


def detail(error: grpc.aio.AioRpcError, kind: type[Detail]) -> Detail:
    status = rpc_status.from_call(cast(grpc.Call, error))
    assert status is not None, "a bare status"
    for packed in status.details:
        message = kind()
        if packed.Unpack(message):
            return message
    raise AssertionError(f"no {kind.__name__} in {status}")


def _counts(wanted: tuple[int, int], stats: admin_pb2.GetStatsResponse) -> bool:
    return (stats.running, stats.waiting) == wanted


@contextlib.asynccontextmanager
async def streams(running: Service, count: int, slots: int, *, may_stop: bool = False) -> AsyncIterator[None]:
    """So many long streams, one after the other, as many of them running as there are slots; cancelled at the end."""
    tasks = []
    for i in range(count):
        tasks.append(asyncio.ensure_future(run(running, request(8000, seed=10 + i, may_stop=may_stop), "large")))
        wanted = (min(i + 1, slots), max(0, i + 1 - slots))
        await running.until_stats(partial(_counts, wanted), f"running and waiting are {wanted}")
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await running.until_quiet()


async def test_a_full_queue_says_its_limit_and_when_to_come_back() -> None:
    async with service("fake:delay_ms=5", "--max-num-seqs", "2", "--max-waiting", "3") as running:
        async with streams(running, 5, 2):
            error = await refused(running, request(4), "large")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "the queue is full: 3 sequences wait, 1 more are over max_waiting 3"
        assert detail(error, RetryInfo).retry_delay.ToMilliseconds() > 0
        assert detail(error, ErrorInfo).reason == "QUEUE_FULL"
        assert await run(running, request(4)) == 4, "and there is room again"


async def test_a_full_queue_is_one_of_tokens_too() -> None:
    async with service("fake:delay_ms=5", "--max-num-seqs", "1", "--max-waiting-tokens", "10") as running:
        async with streams(running, 3, 1):  # two of three tokens wait
            error = await refused(running, request(4, prompt=5), "large")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert error.details() == "the queue is full: 6 tokens wait, 5 more are over max_waiting_tokens 10"
        assert detail(error, RetryInfo).retry_delay.ToMilliseconds() > 0


async def test_a_quota_is_the_tenants_own(tmp_path: Path) -> None:
    tenants = tmp_path / "tenants.toml"
    tenants.write_text("[tenant.small]\ntokens_per_second = 100\nburst = 60\n")
    async with service("fake:", "--tenants", str(tenants)) as running:
        assert await run(running, request(40, prompt=40), "small") == 40
        error = await refused(running, request(4, prompt=50), "small")
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        (violation,) = detail(error, QuotaFailure).violations
        assert violation.subject == "tenant:small"
        assert violation.description == error.details()
        assert "its quota is 100 tokens a second, 60 at once" in violation.description
        assert detail(error, ErrorInfo).reason == "QUOTA_EXCEEDED"
        delay = detail(error, RetryInfo).retry_delay.ToMilliseconds() / 1000
        assert 0 < delay < 1
        assert await run(running, request(4, prompt=50), "other") == 4
        await asyncio.sleep(delay + 0.01)  # as it was told
        assert await run(running, request(4, prompt=50), "small") == 4
        error = await refused(running, request(4, prompt=61), "small")
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "over the burst of tenant 'small', 60" in (error.details() or "")


async def test_a_deadline_that_cannot_be_met_is_refused_by_the_service() -> None:
    """The words are the service's: where the client's own clock ends a call, they are `Deadline Exceeded`."""
    async with service("fake:delay_ms=20") as running:
        assert await run(running, request(20)) == 20
        error = await refused(running, request(3000), timeout=30)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (error.details() or "").startswith(("the deadline in 29.", "the deadline in 30."))
        assert "cannot be met: estimated are 0.00 s until it runs, then at least " in (error.details() or "")
        assert "3 prompt and 3000 output tokens" in (error.details() or "")
        assert await run(running, request(20), timeout=30) == 20
        assert (await running.until_quiet()).rejected == 1


async def test_a_queued_request_is_given_up_when_it_is_hopeless() -> None:
    async with service("fake:delay_ms=10", "--max-num-seqs", "1") as running:
        assert await run(running, request(20)) == 20
        async with streams(running, 1, 1, may_stop=True):
            error = await refused(running, request(200), "large", timeout=4)
        assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert (error.details() or "").startswith("given up in the queue: its deadline is in ")


async def test_a_full_house_makes_room_for_another_tenant() -> None:
    async with service("fake:delay_ms=5", "--max-num-seqs", "4") as running, streams(running, 12, 4):
        assert await run(running, request(20), "small") == 20
        stats = await running.stats()
        assert stats.preemptions >= 1
        assert stats.running + stats.waiting == 12, "and nobody was sent away for it"

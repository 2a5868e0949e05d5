"""A client that stops reading, beside others that read on, over real processes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc
import grpc.aio
import pytest
from pagewire.v1 import inference_pb2

from client import aio
from client.api import GenerateDelta, Resume, SamplingParams, TokenIds
from protos.wire import Sampling
from tests.e2e.service import generate, service
from worker_svc.backends.fake import expected

SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]


def request(seed: int, max_tokens: int, logprobs: int | None = None) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(seed=seed, max_tokens=max_tokens, logprobs=logprobs)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=[1, 2, seed]), sampling=sampling)


def _whole(max_tokens: int) -> list[int]:
    return expected([1, 2, 7], Sampling(max_tokens, 7))


async def _read(responses: AsyncIterator[inference_pb2.GenerateResponse], into: list[int]) -> None:
    async for response in responses:
        into += response.delta.token_ids


async def test_a_reader_that_stops_is_ended_and_nobody_waits_for_it() -> None:
    """The others get all of theirs while it stands still, and it gets all of its own when it goes on."""
    async with service("fake:delay_ms=1", "--slow-reader-timeout", "1") as running:
        async with grpc.aio.insecure_channel(running.address, options=SMALL_WINDOW) as channel:
            stub = type(running.inference)(channel)
            slow = aiter(stub.Generate(request(7, 4000, logprobs=20)))
            got = list((await anext(slow)).delta.token_ids)
            others = await asyncio.gather(*(generate(running, request(20 + i, 300)) for i in range(8)))
            assert [len(other.token_ids) for other in others] == [300] * 8
            await running.until_stats(lambda stats: stats.running == 0, "the slow reader's blocks are free")
            with pytest.raises(grpc.aio.AioRpcError, match="read nothing for 1 s") as caught:
                await _read(slow, got)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert got == _whole(4000)[: len(got)]
        assert 0 < len(got) < 4000
        assert (await running.until_quiet()).aborted == 1


async def test_with_a_policy_it_reads_on_as_if_nothing_had_been(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.api.channel_options", lambda keepalive: SMALL_WINDOW)
    async with service("fake:delay_ms=1", "--slow-reader-timeout", "0.3") as running:
        async with aio.Client(running.address, retry=Resume()) as client:
            sampling = SamplingParams(seed=7, max_tokens=1500, logprobs=20)
            generation = client.generate(TokenIds(ids=[1, 2, 7]), sampling)
            chunks = [await anext(generation)]
            await running.until_stats(lambda stats: stats.aborted == 1, "it was ended")
            chunks += [chunk async for chunk in generation]
            assert generation.resumes >= 1
        token_ids = [token_id for chunk in chunks if isinstance(chunk, GenerateDelta) for token_id in chunk.token_ids]
        assert token_ids == _whole(1500)

"""A client that does not read: what it costs, how long, and what it is told when it reads again."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2

from protos.engine_wire import FinishReason, Outputs, TokenDelta
from protos.wire import TokenLogprobs
from scheduler_svc.frontend.call import MAX_GATHERED
from scheduler_svc.frontend.errors import ServiceError
from scheduler_svc.frontend.model import load_model
from scheduler_svc.frontend.server import FrontendConfig
from scheduler_svc.frontend.slow_readers import LOOKS, SlowReaders
from tests.frontend.conftest import Service, open_service
from tests.frontend.scripted import spelling
from tests.frontend.test_generate import ask, detail, run
from tests.frontend.test_streams import held, open_call

LIMIT = 0.4  # seconds
# The least that HTTP/2 lets a sender send unasked, so that it has to wait for the reader soon.
SMALL_WINDOW = [("grpc.http2.bdp_probe", 0), ("grpc.http2.lookahead_bytes", 1)]


@pytest.fixture
async def strict_service() -> AsyncIterator[Service]:
    model = load_model("fake:vocab=512,context=8192")
    opened = await open_service(model, FrontendConfig(port=0, slow_reader_timeout=LIMIT))
    await opened.channel.close()
    opened.channel = grpc.aio.insecure_channel(f"127.0.0.1:{opened.port}", options=SMALL_WINDOW)
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


async def test_a_client_that_reads_nothing_is_ended_and_told_so(strict_service: Service) -> None:
    engine = strict_service.engine
    engine.script = spelling(b"z" * 3000)
    engine.held = True
    slow = strict_service.inference.Generate(ask(max_tokens=3000, logprobs=20))
    async with asyncio.timeout(20):
        await engine.submit_seen.wait()
        for _ in range(2000):
            engine.step()
        await engine.abort_seen.wait()
    assert not engine.sequences, "the engine is free of it"
    engine.release()
    assert (await run(strict_service, ask("hello"))).text[0] == "zzzzz", "nobody else is concerned"
    got: list[int] = []

    async def read() -> None:
        async for response in slow:
            got.extend(response.delta.token_ids)

    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read()
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == f"the client has read nothing for {LIMIT:g} s, the service's slow-reader-timeout"
    info = detail(caught.value, error_details_pb2.ErrorInfo)
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert info.reason == "SLOW_READER"
    assert 0 < len(got) < 2000
    request = ask(max_tokens=3000, logprobs=20)
    request.resume_token_ids.add(token_ids=got)
    request.resume_fingerprint = "f00d"
    assert got + (await run(strict_service, request)).ids[0] == [122] * 3000, "and goes on behind what it has"


async def test_a_client_that_waits_for_tokens_is_no_slow_reader(strict_service: Service) -> None:
    engine = strict_service.engine
    engine.held = True
    reading = asyncio.ensure_future(run(strict_service, ask()))
    await engine.submit_seen.wait()
    engine.step()
    done, _ = await asyncio.wait([reading], timeout=2 * LIMIT)
    assert not done
    engine.release()
    assert (await reading).text[0] == "fghij"
    assert not engine.aborts


@dataclass(eq=False)
class Stuck:
    since: float
    told: list[str] = field(default_factory=list)

    def writing_for(self, now: float) -> float:
        return now - self.since if self.since else 0.0

    def give_up(self, error: ServiceError) -> None:
        self.told.append(error.message)


async def test_only_those_are_ended_whose_message_waits_too_long() -> None:
    now = 100.0
    readers = SlowReaders(LOOKS / 1000, lambda: now)  # looks after a millisecond
    limit = LOOKS / 1000
    late, early, idle = Stuck(now - 2 * limit), Stuck(now - limit / 2), Stuck(0.0)
    with readers.watch(late), readers.watch(early), readers.watch(idle):
        async with asyncio.timeout(20):
            while not late.told:
                await asyncio.sleep(0)
        assert not early.told
        now += limit
        early.told.clear()
        async with asyncio.timeout(20):
            while not early.told:
                await asyncio.sleep(0)
        assert not idle.told


async def test_a_limit_of_zero_is_none() -> None:
    readers, writer = SlowReaders(0.0, time.monotonic), Stuck(1e-9)
    with readers.watch(writer):
        done, _ = await asyncio.wait([asyncio.ensure_future(asyncio.sleep(0.02))])
    assert done
    assert not writer.told


def wide(count: int) -> list[TokenLogprobs]:
    return [TokenLogprobs(97, -1.0, 1, tuple(range(20)), (-1.0,) * 20) for _ in range(count)]


async def test_log_probabilities_are_bounded_by_themselves() -> None:
    """Those of one index, or of all of them together."""
    engine = held()
    call = open_call(engine.link, n=2, max_tokens=100_000, logprobs=20)
    each = MAX_GATHERED // 21 // 2
    for index in (0, 1):
        engine.link.deliver(Outputs([TokenDelta("r", index, [97] * each, logprobs=wide(each))]))
    assert not engine.aborts
    engine.link.deliver(Outputs([TokenDelta("r", 1, [97], logprobs=wide(1))]))
    assert [abort.reason for abort in engine.aborts] == [FinishReason.ABORTED]
    assert all(stream.gathered_numbers == 0 for stream in call.streams), "and nothing is kept"
    engine.link.deliver(Outputs([TokenDelta("r", 1, [97], logprobs=wide(1))]))
    assert all(stream.gathered_numbers == 0 for stream in call.streams)
    with pytest.raises(ServiceError, match=f"over {MAX_GATHERED} numbers wait") as caught:
        [output async for output in call.outputs()]
    assert caught.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    call.close()
    assert len(engine.aborts) == 1

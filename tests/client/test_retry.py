"""Calls made again: the policy by itself, and both clients against a scripted server and the real one."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from client import aio, errors
from client.api import Chunk, GenerateDelta, Retry, SamplingParams, TokenIds
from client.client import Client
from client.retry import JITTER, Attempts
from tests.client.scripted import PATIENCE, ScriptedServer
from tests.e2e.service import service

QUICK = Retry(attempts=4, backoff=0.01)


def overloaded(retry_after: float | None) -> errors.ServiceError:
    return errors.OverloadedError(grpc.StatusCode.RESOURCE_EXHAUSTED, "", errors.Details(retry_after=retry_after))


def unavailable(retry_after: float | None = None) -> errors.ServiceError:
    return errors.UnavailableError(grpc.StatusCode.UNAVAILABLE, "", errors.Details(retry_after=retry_after))


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def attempts(
    retry: Retry | None, timeout: float | None = None, clock: Clock | None = None, chance: float = 0
) -> Attempts:
    return Attempts(retry, timeout, clock or Clock(), lambda: chance)


def test_the_service_says_when_and_else_a_backoff_doubles() -> None:
    call = attempts(Retry(attempts=9, backoff=0.5, max_backoff=1.5))
    answers = [unavailable(), overloaded(7), unavailable(), unavailable(3), unavailable()]
    assert [call.pause(error) for error in answers] == [0.5, 7, 1.5, 3, 1.5]


def test_no_two_that_were_refused_together_come_back_together() -> None:
    assert attempts(Retry(), chance=1).pause(overloaded(2)) == 2 * (1 + JITTER)
    assert attempts(Retry(), chance=0.5).pause(overloaded(2)) == 2 * (1 + JITTER / 2)


@pytest.mark.parametrize(
    "error",
    [
        overloaded(None),
        errors.InvalidRequestError(grpc.StatusCode.INVALID_ARGUMENT, ""),
        errors.InternalError(grpc.StatusCode.INTERNAL, "", errors.Details(retry_after=1)),
        errors.DeadlineError(grpc.StatusCode.DEADLINE_EXCEEDED, ""),
    ],
    ids=["too-large", "invalid", "internal", "deadline"],
)
def test_what_waiting_does_not_mend_is_raised(error: errors.ServiceError) -> None:
    assert attempts(Retry()).pause(error) is None


def test_attempts_are_counted() -> None:
    call = attempts(Retry(attempts=3))
    assert [call.pause(overloaded(1)) for _ in range(3)] == [1, 1, None]
    assert attempts(None).pause(overloaded(1)) is None


def test_no_attempt_begins_behind_the_budget_or_the_timeout() -> None:
    clock = Clock()
    call = attempts(Retry(budget=10), clock=clock)
    clock.now += 8
    assert call.pause(overloaded(2)) == 2
    assert call.pause(overloaded(2.5)) is None
    limited = attempts(Retry(budget=1000), timeout=10, clock=clock)
    clock.now += 4
    assert limited.time_left() == 6
    assert limited.pause(overloaded(5.5)) == 5.5
    assert limited.pause(overloaded(6)) is None, "nothing would be left for the call itself"
    clock.now += 7
    assert limited.time_left() == 0
    assert attempts(None).time_left() is None


@pytest.mark.parametrize(("name", "value"), [("attempts", 0), ("budget", -1), ("backoff", float("nan"))])
def test_a_policy_must_make_sense(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"retry {name} is {value}: must be a finite number from"):
        Retry(**{name: value})  # type: ignore[arg-type]


async def said(
    kind: str, address: str, prompt: str, retry: Retry | None = QUICK, timeout: float | None = PATIENCE
) -> str:
    """The text of a stream, by the blocking client in a thread or by the asyncio one."""

    def text(chunk: Chunk) -> str:
        return chunk.text if isinstance(chunk, GenerateDelta) else ""

    def blocking() -> str:
        with Client(address, retry=retry) as client:
            return "".join(map(text, client.generate(prompt, timeout=timeout)))

    if kind == "blocking":
        return await asyncio.to_thread(blocking)
    async with aio.Client(address, retry=retry) as client:
        return "".join([text(chunk) async for chunk in client.generate(prompt, timeout=timeout)])


both = pytest.mark.parametrize("kind", ["blocking", "aio"])


@both
@pytest.mark.parametrize("prompt", ["busy 3 times", "gone 3 times"])
async def test_a_refused_stream_is_tried_again(kind: str, prompt: str, server: ScriptedServer) -> None:
    assert await said(kind, server.address, prompt) == f"{prompt} "
    assert len(server.requests) == 4


@both
async def test_the_last_refusal_is_raised(kind: str, server: ScriptedServer) -> None:
    with pytest.raises(errors.OverloadedError):
        await said(kind, server.address, "busy 4")
    assert len(server.requests) == 4
    with pytest.raises(errors.OverloadedError):
        await said(kind, server.address, "busy 9", None)
    assert len(server.requests) == 5, "without a policy the first refusal is the last"


@both
async def test_what_would_come_too_late_is_not_waited_for(kind: str, server: ScriptedServer) -> None:
    with pytest.raises(errors.OverloadedError) as caught:
        await said(kind, server.address, "overloaded", timeout=1)
    assert caught.value.retry_after == 2
    assert len(server.requests) == 1


@both
@pytest.mark.parametrize("prompt", ["stutter", "lost", "large", "bad", "status ABORTED"])
async def test_neither_a_broken_stream_nor_a_wrong_request_is_repeated(
    kind: str, prompt: str, server: ScriptedServer
) -> None:
    with pytest.raises(errors.ServiceError):
        await said(kind, server.address, prompt)
    assert len(server.requests) == 1


@both
async def test_an_attempt_has_the_rest_of_the_timeout(kind: str, server: ScriptedServer) -> None:
    await said(kind, server.address, "gone 2", Retry(backoff=0.3), timeout=8)
    first, second, third = (left or 0.0 for left in server.time_left)
    # gRPC rounds a timeout up on its way, one of seconds by less than 0.1 s
    assert first - second >= 0.2
    assert second - third >= 0.5
    assert third > 0


def test_id_and_seed_stay_what_the_caller_was_told(server: ScriptedServer) -> None:
    server.heard.clear()  # gRPC may hand out a refusal without the metadata that came before it
    with Client(server.address, retry=QUICK) as client:
        generation = client.generate("busy 2")
        told = generation.metadata()
        server.heard.set()
        assert list(generation)
    assert [request.request_id for request in server.requests] == ["", *[told["request-id"]] * 2]
    assert [request.sampling.seed for request in server.requests[1:]] == [int(told["seed"])] * 2


async def test_id_and_seed_stay_for_the_asyncio_client_too(server: ScriptedServer) -> None:
    server.heard.clear()
    async with aio.Client(server.address, retry=QUICK) as client:
        generation = client.generate("busy 2", SamplingParams(max_tokens=5))
        told = await generation.metadata()
        server.heard.set()
        assert [chunk async for chunk in generation]
    assert [request.request_id for request in server.requests] == ["", *[told["request-id"]] * 2]
    assert [request.sampling.seed for request in server.requests[1:]] == [int(told["seed"])] * 2
    assert [request.sampling.max_tokens for request in server.requests] == [5] * 3


class Noted(Retry):
    """Says when it has been asked, which is when the pause begins."""

    asked = threading.Event()

    def delay(self, error: errors.ServiceError, failures: int) -> float | None:
        self.asked.set()
        return super().delay(error, failures)


@pytest.fixture
def noted() -> Noted:
    Noted.asked.clear()
    return Noted(attempts=2, budget=1000)


def test_a_pause_can_be_left(server: ScriptedServer, noted: Noted) -> None:
    with Client(server.address, retry=noted) as client, ThreadPoolExecutor(1) as pool:
        generation = client.generate("overloaded")
        reader = pool.submit(next, generation)
        assert noted.asked.wait(PATIENCE)
        generation.cancel()
        with pytest.raises(errors.CancelledError, match="before another attempt"):
            reader.result(PATIENCE)
    assert len(server.requests) == 1


@pytest.mark.parametrize("leave", ["call", "task"])
async def test_a_pause_can_be_left_by_the_call_and_with_its_task(
    leave: str, server: ScriptedServer, noted: Noted
) -> None:
    async with aio.Client(server.address, retry=noted) as client:
        generation = client.generate("overloaded")
        reader = asyncio.ensure_future(anext(generation))
        assert await asyncio.to_thread(noted.asked.wait, PATIENCE)
        if leave == "call":
            generation.cancel()
        else:
            reader.cancel()
        with pytest.raises(errors.CancelledError if leave == "call" else asyncio.CancelledError):
            await asyncio.wait_for(reader, PATIENCE)
    assert len(server.requests) == 1


async def test_a_cancelled_task_is_cancelled_even_if_its_call_was_left(server: ScriptedServer) -> None:
    async with aio.Client(server.address) as client:
        generation = client.generate("forever")
        await anext(generation)
        reader = asyncio.ensure_future(anext(generation))
        await asyncio.wait([reader], timeout=0)  # it has begun to wait
        generation.cancel()
        reader.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reader


async def test_leaving_a_stream_raises_the_same_in_both(server: ScriptedServer) -> None:
    async with aio.Client(server.address) as client:
        generation = client.generate("forever")
        await anext(generation)
        generation.cancel()
        with pytest.raises(errors.CancelledError):
            await anext(generation)


async def test_small_calls_are_tried_again_and_those_about_now_are_not(server: ScriptedServer) -> None:
    with Client(server.address, retry=QUICK) as client:
        for call in (lambda: client.tokenize("a b"), lambda: client.detokenize([0]), client.model):
            server.failing = 3
            assert call()
        server.failing = 1
        with pytest.raises(errors.UnavailableError):
            client.stats()
    async with aio.Client(server.address, retry=QUICK) as client_aio:
        for call_aio in (lambda: client_aio.tokenize("a b"), lambda: client_aio.detokenize([0]), client_aio.model):
            server.failing = 3
            assert await call_aio()
        server.failing = 4
        with pytest.raises(errors.UnavailableError):
            await client_aio.model()
        server.failing = 1
        with pytest.raises(errors.UnavailableError):
            await client_aio.stats()


@both
async def test_a_server_that_comes_back_is_found(kind: str, server: ScriptedServer) -> None:
    port = int(server.address.rpartition(":")[2])
    server.close()
    retry = Retry(attempts=1000, backoff=0.05, max_backoff=0.1)
    stream = asyncio.ensure_future(said(kind, server.address, "hello again", retry))
    done, _ = await asyncio.wait([stream], timeout=0.3)  # it is being refused meanwhile
    assert not done
    again = ScriptedServer(port)
    try:
        assert await stream == "hello again "
    finally:
        again.close()


async def test_all_get_through_a_narrow_door_of_the_real_service() -> None:
    """Refused by the real door, and back at the time that it names."""
    async with service("fake:delay_ms=2", "--max-num-seqs", "2", "--max-waiting", "2") as running:
        sampling = SamplingParams(max_tokens=20, seed=1)
        prompts = [TokenIds(ids=[300 + i, 301]) for i in range(24)]

        async def tokens(client: aio.Client, prompt: TokenIds) -> int:
            chunks = [chunk async for chunk in client.generate(prompt, sampling, timeout=PATIENCE)]
            return sum(len(chunk.token_ids) for chunk in chunks if isinstance(chunk, GenerateDelta))

        async with aio.Client(running.address) as client:
            refused = await asyncio.gather(*(tokens(client, prompt) for prompt in prompts), return_exceptions=True)
        assert any(isinstance(answer, errors.OverloadedError) and answer.retry_after for answer in refused)
        async with aio.Client(running.address, retry=Retry(attempts=1000)) as client:
            assert await asyncio.gather(*(tokens(client, prompt) for prompt in prompts)) == [20] * 24
        await running.until_quiet()

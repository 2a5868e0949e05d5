"""The two client libraries against a scripted server."""

from __future__ import annotations

import grpc
import pytest

from client import aio, errors
from client.api import ChatMessage, Chunk, GenerateDelta, SamplingParams, TokenIds
from client.client import Client
from tests.client.scripted import PATIENCE, ScriptedServer


def text(chunks: list[Chunk]) -> str:
    return "".join(chunk.text for chunk in chunks if isinstance(chunk, GenerateDelta))


def test_a_stream_is_deltas_and_then_its_end(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        generation = client.generate("one two", SamplingParams(seed=5), request_id="mine")
        assert generation.metadata() == {"request-id": "mine", "seed": "5"}
        chunks = list(generation)
    assert text(chunks) == "one two "
    assert [type(chunk).__name__ for chunk in chunks] == ["GenerateDelta", "GenerateDelta", "GenerateFinished"]


def test_prompts_arrive_as_what_they_are(server: ScriptedServer) -> None:
    conversation = [ChatMessage(role="user", content="hello")]
    with Client(server.address) as client:
        for prompt in ("text", TokenIds(ids=[7, 8]), conversation):
            list(client.generate(prompt, SamplingParams(max_tokens=2), priority=-3, cache_salt="s"))
    assert [request.WhichOneof("prompt") for request in server.requests] == ["text", "token_ids", "chat"]
    assert list(server.requests[1].token_ids.ids) == [7, 8]
    assert list(server.requests[2].chat.messages) == conversation
    assert {(request.priority, request.cache_salt) for request in server.requests} == {(-3, "s")}
    assert not server.requests[0].sampling.HasField("temperature"), "what is not set stays the model's own"


def test_everything_but_streams(server: ScriptedServer) -> None:
    server.serving(False)
    with Client(server.address) as client:
        ids = client.tokenize("a b a")
        assert ids == [0, 1, 0]
        assert client.detokenize(ids) == "a b a"
        assert client.model().name == "echo"
        assert client.stats().running == 3
        assert client.flush_cache() == 7
        client.drain()
        assert not client.serving()
        server.serving(True)
        assert client.serving()
        with pytest.raises(errors.ServiceError, match=r"no running request 'x' \(NOT_FOUND\)"):
            client.cancel("x")


def test_a_refusal_names_its_fields(server: ScriptedServer) -> None:
    with Client(server.address) as client, pytest.raises(errors.InvalidRequestError) as caught:
        list(client.generate("bad"))
    assert caught.value.violations == (errors.Violation("sampling.temperature", "-1 is below 0"),)
    assert str(caught.value) == "sampling.temperature: -1 is below 0"


def test_overload_says_when_to_come_back(server: ScriptedServer) -> None:
    with Client(server.address) as client, pytest.raises(errors.OverloadedError) as caught:
        list(client.generate("overloaded"))
    assert caught.value.retry_after == 2
    assert str(caught.value) == "the queue is full (RESOURCE_EXHAUSTED); try again in 2 s"


def test_nobody_listens(server: ScriptedServer) -> None:
    server.close()
    with Client(server.address) as client, pytest.raises(errors.UnavailableError, match=server.address):
        client.model(timeout=PATIENCE)


def test_leaving_a_stream_cancels_it(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        with client.generate("forever") as generation:
            assert text([next(generation)]) == "forever "
        assert server.cancelled.wait(PATIENCE)
        with pytest.raises(errors.CancelledError):
            next(generation)


async def test_the_async_client_does_the_same(server: ScriptedServer) -> None:
    server.serving(True)
    async with aio.Client(server.address) as client:
        generation = client.generate("one two", SamplingParams(seed=5))
        assert (await generation.metadata())["seed"] == "5"
        assert text([chunk async for chunk in generation]) == "one two "
        assert await client.tokenize("a b a") == [2, 3, 2]
        assert await client.detokenize([3]) == "b"
        assert (await client.model()).max_model_len == 1000
        assert (await client.stats()).running == 3
        assert await client.flush_cache() == 7
        await client.drain()
        assert await client.serving()
        with pytest.raises(errors.ServiceError) as caught:
            await client.cancel("x")
        assert caught.value.code is grpc.StatusCode.NOT_FOUND


async def test_the_async_client_raises_the_same(server: ScriptedServer) -> None:
    async with aio.Client(server.address) as client:
        with pytest.raises(errors.InvalidRequestError, match=r"^sampling\.temperature: -1 is below 0$"):
            [chunk async for chunk in client.generate("bad")]
        with pytest.raises(errors.ServiceError, match=r"the worker is gone \(INTERNAL\)"):
            [chunk async for chunk in client.generate("lost")]
        async with client.generate("forever") as generation:
            await anext(generation)
        assert server.cancelled.wait(PATIENCE)

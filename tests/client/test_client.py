"""The two client libraries against a scripted server."""

from __future__ import annotations

import grpc
import pytest

from client import aio, errors
from client.api import ChatMessage, Chunk, GenerateDelta, Keepalive, SamplingParams, TokenIds, channel_options
from client.client import Client
from tests.client.scripted import PATIENCE, ScriptedServer
from tests.client.wire import Wire


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
        (vector,) = client.embed(["ab"], pooling="cls", dimensions=4, truncate_prompt_tokens=9).embeddings
        assert (list(vector.values), vector.prompt_tokens) == ([3, 4, 0, 9], 2)
        with pytest.raises(ValueError, match="POOLING_MAX"):
            client.embed(["ab"], pooling="max")
        assert [score.sum for score in client.score("ab", ["c", "de"]).scores] == [-3, -4]
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


def test_a_quota_names_whose_it_is(server: ScriptedServer) -> None:
    with Client(server.address) as client, pytest.raises(errors.OverloadedError) as caught:
        list(client.generate("quota"))
    assert caught.value.quota == (errors.QuotaViolation("tenant:us", "1000 tokens a minute"),)
    assert (caught.value.reason, caught.value.info) == ("QUOTA", {"tenant": "us"})
    assert str(caught.value) == "tenant:us: 1000 tokens a minute; try again in 2 s"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        ("DEADLINE_EXCEEDED", errors.DeadlineError),
        ("NOT_FOUND", errors.NotFoundError),
        ("ALREADY_EXISTS", errors.AlreadyExistsError),
        ("FAILED_PRECONDITION", errors.FailedPreconditionError),
        ("UNAUTHENTICATED", errors.UnauthenticatedError),
        ("PERMISSION_DENIED", errors.PermissionDeniedError),
        ("UNIMPLEMENTED", errors.UnimplementedError),
        ("INTERNAL", errors.InternalError),
        ("UNAVAILABLE", errors.UnavailableError),
        ("CANCELLED", errors.CancelledError),
        ("DATA_LOSS", errors.ServiceError),
    ],
)
async def test_every_status_has_its_class_in_both_clients(
    status: str, kind: type[errors.ServiceError], server: ScriptedServer
) -> None:
    with Client(server.address) as client, pytest.raises(errors.ServiceError) as caught:
        client.generate(f"status {status}").metadata()
    async with aio.Client(server.address) as client_aio:
        with pytest.raises(errors.ServiceError) as caught_aio:
            await client_aio.generate(f"status {status}").metadata()
    for error in (caught.value, caught_aio.value):
        assert type(error) is kind
        assert str(error) == f"as you wish ({status})"


def test_a_timeout_is_a_deadline(server: ScriptedServer) -> None:
    with Client(server.address) as client:
        generation = client.generate("forever", timeout=0.2)
        with pytest.raises(errors.DeadlineError):
            list(generation)


def test_pings_are_as_frequent_as_a_server_allows() -> None:
    options = dict(channel_options(Keepalive(seconds=10, timeout=0.5, idle=True)))
    assert options["grpc.keepalive_time_ms"] == 10_000
    assert options["grpc.keepalive_timeout_ms"] == options["grpc.http2.ping_timeout_ms"] == 500
    assert options["grpc.keepalive_permit_without_calls"] == 1
    without = dict(channel_options(None))
    assert not {name for name in without if "keepalive" in name or "ping" in name}
    assert without["grpc.max_reconnect_backoff_ms"] == options["grpc.max_reconnect_backoff_ms"] == 5_000
    for seconds in (9.9, 0, float("nan"), 100_000):
        with pytest.raises(ValueError, match=r"keepalive seconds is .*: must be from 10 to 86400"):
            Keepalive(seconds=seconds)
    with pytest.raises(ValueError, match="keepalive timeout is 0: must be over 0"):
        Keepalive(timeout=0)


@pytest.mark.full
def test_a_dead_host_is_told_from_a_silent_stream(server: ScriptedServer) -> None:
    """Behind a wire that swallows everything from some moment on; up to 11 s, because pings are no more frequent."""
    with (
        Wire(server.address) as wire,
        Client(wire.address, keepalive=Keepalive(seconds=10, timeout=1)) as client,
    ):
        generation = client.generate("forever", timeout=60)
        next(generation)
        wire.swallow()
        with pytest.raises(errors.UnavailableError):
            next(generation)


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
        assert len((await client.embed(["a", "b"])).embeddings) == 2
        assert len((await client.score("a", ["b", TokenIds(ids=[1])])).scores) == 2
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

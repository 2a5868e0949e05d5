"""Tokens on a real port: who gets in, as whom, and what the file may say."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_reflection.v1alpha import reflection_pb2
from pagewire.v1 import admin_pb2
from pagewire.v1 import inference_pb2 as pb
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc  # type: ignore[import-untyped]
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm

from client import aio
from client.api import SamplingParams
from client.errors import NotFoundError, PermissionDeniedError, UnauthenticatedError
from scheduler_svc.frontend.auth import TOKEN, TokenFile, new_token
from scheduler_svc.frontend.core import FrontendConfig
from scheduler_svc.frontend.reloading import FileError
from tests.frontend.conftest import Service, byte_model, open_service

SEARCH, SEARCH_LINES = new_token("search", False)
ADMIN, ADMIN_LINES = new_token("operators", True)
STRANGER, _ = new_token("search", True)
FORGED = SEARCH[:-1] + ("A" if SEARCH[-1] != "A" else "B")  # of a known id


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.toml"
    file.write_text(SEARCH_LINES + ADMIN_LINES)
    return file


@pytest.fixture
async def guarded(tokens: Path) -> AsyncIterator[Service]:
    opened = await open_service(byte_model(), FrontendConfig(port=0, tokens=tokens))
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


def client(service: Service, token: str = "", tenant: str = "") -> aio.Client:
    return aio.Client(f"127.0.0.1:{service.port}", token=token, tenant=tenant)


async def drained(stream: aio.Generation) -> int:
    return len([chunk async for chunk in stream])


async def test_a_token_names_the_tenant(guarded: Service) -> None:
    for tenant in ("", "search"):  # the second says what the token says
        async with client(guarded, SEARCH, tenant) as caller:
            await drained(caller.generate("hello", SamplingParams(max_tokens=2)))
    assert [submit.tenant for submit in guarded.engine.submits] == ["search", "search"]
    async with client(guarded, SEARCH, "operators") as caller:
        with pytest.raises(PermissionDeniedError) as caught:
            await drained(caller.generate("hello"))
    assert caught.value.reason == "TENANT_CONTRADICTED"
    assert len(guarded.engine.submits) == 2


@pytest.mark.parametrize(
    "token",
    ["", STRANGER, FORGED, SEARCH + "x", SEARCH.upper(), "pw_", "x" * 5000],
    ids=["none", "stranger", "forged", "longer", "upper", "short", "huge"],  # the tokens differ in each process
)
async def test_without_a_known_token_nothing_is_served(guarded: Service, token: str) -> None:
    async with client(guarded, token) as caller:
        for call in (caller.model, caller.stats, caller.drain, lambda: caller.tokenize("x")):
            with pytest.raises(UnauthenticatedError) as caught:
                await call()
            assert caught.value.reason == ("TOKEN_UNKNOWN" if token else "TOKEN_MISSING")
            assert not token or token not in str(caught.value)
        with pytest.raises(UnauthenticatedError):
            await drained(caller.generate("hello"))
        assert await caller.serving(), "probes need no token"
    assert not guarded.engine.submits


async def test_no_method_is_forgotten(guarded: Service) -> None:
    """Not even those that the server does not have."""
    from tests.frontend.test_server import PATHS

    for path in [*PATHS, "/pagewire.v1.InferenceService/Nothing", "/nobody/Nothing", "/x"]:
        if path.startswith("/grpc.health."):
            continue
        call: Any = guarded.channel.stream_stream(path)()
        assert await call.code() is grpc.StatusCode.UNAUTHENTICATED, path


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", f"Basic {SEARCH}")],
        [("authorization", SEARCH)],
        [("authorization", f"Bearer  {SEARCH}")],
        [("authorization", f"Bearer {SEARCH}"), ("authorization", f"Bearer {SEARCH}")],
        [("authorization-bin", b"Bearer")],
    ],
)
async def test_other_ways_to_say_it_are_none(guarded: Service, metadata: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await guarded.inference.GetModel(pb.GetModelRequest(), metadata=metadata)
    assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_the_scheme_may_be_written_small(guarded: Service) -> None:
    await guarded.inference.GetModel(pb.GetModelRequest(), metadata=[("authorization", f"bearer {SEARCH}")])


async def test_what_concerns_every_tenant_needs_an_admin(guarded: Service) -> None:
    async with client(guarded, SEARCH) as caller:
        for call in (caller.stats, caller.drain, caller.flush_cache):
            with pytest.raises(PermissionDeniedError) as caught:
                await call()
            assert caught.value.reason == "ADMIN_NEEDED"
    async with client(guarded, ADMIN) as caller:
        assert await caller.flush_cache() == 5
        await caller.stats()


async def test_routers_need_a_token_like_everybody(guarded: Service) -> None:
    stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(guarded.channel)
    mine = [("authorization", f"Bearer {SEARCH}")]
    assert (await stub.GetModelInfo(vllm.GetModelInfoRequest(), metadata=mine)).vocab_size == 512
    for call in (
        stub.FlushCache(common_pb2.FlushCacheRequest(), metadata=mine),
        stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), metadata=mine),
    ):
        assert await call.code() is grpc.StatusCode.PERMISSION_DENIED


async def test_reflection_needs_a_token(guarded: Service) -> None:
    method: Any = guarded.channel.stream_stream(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    call = method(metadata=[("authorization", f"Bearer {SEARCH}")])
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    assert (await call.read()).list_services_response.service
    await call.done_writing()


async def test_a_cancellation_says_whose_requests_it_may_end(guarded: Service) -> None:
    """The engine looks them up: several frontends share it."""
    for token in (SEARCH, ADMIN):
        async with client(guarded, token) as caller:
            with pytest.raises(NotFoundError):
                await caller.cancel("r1")
    stub: Any = vllm_engine_pb2_grpc.VllmEngineStub(guarded.channel)
    await stub.Abort(vllm.AbortRequest(request_ids=["r2"]), metadata=[("authorization", f"Bearer {SEARCH}")])
    asked = [(ask.request_id, ask.tenant) for ask in guarded.engine.cancels]
    assert asked == [("r1", "search"), ("r1", None), ("r2", "search")]
    assert not guarded.engine.aborts


async def test_the_file_is_read_again(guarded: Service, tokens: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with client(guarded, SEARCH) as caller, client(guarded, ADMIN) as admin:
        await caller.model()
        tokens.write_text(SEARCH_LINES + "[token\n")  # a slip of the hand
        for _ in range(3):
            await admin.stats()
        said = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]
        assert len(said) == 1
        assert str(tokens) in said[0]
        tokens.write_text(ADMIN_LINES)
        with pytest.raises(UnauthenticatedError):
            await caller.model()
        await admin.stats()


async def test_strangers_do_not_fill_the_log(guarded: Service, caplog: pytest.LogCaptureFixture) -> None:
    async with client(guarded) as caller:
        for _ in range(9):
            with pytest.raises(UnauthenticatedError):
                await caller.model()
    assert len([r for r in caplog.records if "was refused" in r.getMessage()]) == 4  # the 1st, 2nd, 4th, 8th


async def test_without_a_file_the_metadata_is_believed(service: Service) -> None:
    async with client(service, tenant="search") as caller:
        await drained(caller.generate("hello", SamplingParams(max_tokens=2)))
        assert [submit.tenant for submit in service.engine.submits] == ["search"]
    assert await service.admin.GetStats(admin_pb2.GetStatsRequest())


def test_tokens_are_new_and_their_file_does_not_tell_them(tmp_path: Path) -> None:
    one, lines = new_token('a "b" \\', True)
    other, _ = new_token("a", True)
    assert one != other
    assert TOKEN.fullmatch(one)
    assert one not in lines
    assert one.rpartition("_")[2] not in lines
    file = tmp_path / "tokens.toml"
    file.write_text(lines)
    found = TokenFile(file).find(one)
    assert found
    assert (found.tenant, found.admin) == ('a "b" \\', True)
    assert one not in repr(found)
    assert found.hash.hex() not in repr(found)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[token", "Expected ']'"),
        ("[tokens.abcdefgh]\n", "'tokens': known is token alone"),
        ("token = 3", "token is 3: must be a table"),
        ("[token.short]\n", "token.short: an id has 8 characters"),
        ("[token.abcdefgh]\nscope = 1\n", "token.abcdefgh has 'scope': known are tenant, hash, admin"),
        ("[token.abcdefgh]\ntenant = 'a'\n", "token.abcdefgh.hash must be 64 hexadecimal digits"),
        ("[token.abcdefgh]\ntenant = 'a'\nhash = 'AB'\n", "hash must be 64"),
        (f"[token.abcdefgh]\nhash = '{'a' * 64}'\n", "token.abcdefgh.tenant is None: must be a string of 1 to 64"),
        (f"[token.abcdefgh]\ntenant = 'é'\nhash = '{'a' * 64}'\n", "must be printable ASCII"),
        (f"[token.abcdefgh]\ntenant = 'a'\nhash = '{'a' * 64}'\nadmin = 1\n", "admin is 1: must be true or false"),
    ],
)
def test_a_file_that_says_nonsense_is_refused(text: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "tokens.toml"
    file.write_text(text)
    with pytest.raises(FileError) as caught:
        TokenFile(file)
    assert words in str(caught.value)
    assert str(file) in str(caught.value)

"""Published blocks, as an operator and as a router watch them: all there are, then what changes, whoever is slow."""

from __future__ import annotations

from array import array
from collections.abc import AsyncGenerator
from typing import Any

import grpc
import grpc.aio
import pytest
from pagewire.v1 import admin_pb2
from smg_grpc_proto.generated import common_pb2, vllm_engine_pb2_grpc  # type: ignore[import-untyped]

from protos.engine_wire import KvBlock
from scheduler_svc.engine.prefix_cache import chain, root
from scheduler_svc.frontend import kv_events
from scheduler_svc.frontend.kv_messages import name
from tests.frontend.conftest import Service

OURS, THEIRS = root("", "", ""), root("t", "", "")


def blocks(tokens: list[int], of: bytes = OURS, size: int = 4) -> list[KvBlock]:
    made, parent = [], of
    for i in range(0, len(tokens), size):
        ids = array("I", tokens[i : i + size])
        digest = chain(parent, ids)
        made.append(KvBlock(digest, parent, of, ids.tobytes()))
        parent = digest
    return made


A, B, C = blocks(list(range(12)))
X, Y = blocks(list(range(8)), THEIRS)


async def watch(service: Service, **fields: Any) -> AsyncGenerator[admin_pb2.WatchKvEventsResponse, None]:
    call = service.admin.WatchKvEvents(admin_pb2.WatchKvEventsRequest(**fields))
    async for response in call:
        yield response


def subscribe(service: Service, after: int = 0, tenant: str = "") -> Any:
    stub = vllm_engine_pb2_grpc.VllmEngineStub(service.channel)
    metadata = (("tenant", tenant),) if tenant else ()
    request = common_pb2.SubscribeKvEventsRequest(start_sequence_number=after)
    return stub.SubscribeKvEvents(request, metadata=metadata)


def told(response: admin_pb2.WatchKvEventsResponse) -> list[bytes]:
    """Digests of what is stored, negated ones of what is removed."""
    return [e.stored.block_hash if e.HasField("stored") else b"-" + e.removed for e in response.events]


async def test_an_operator_sees_all_blocks_and_then_every_change(service: Service) -> None:
    service.engine.blocks, service.engine.changes_told = [A, X], 7
    stream = watch(service)
    first = await anext(stream)
    assert (first.sequence, first.reset, first.beginning_left, told(first)) == (7, True, 0, [A.digest, X.digest])
    assert first.events[0].stored.parent_hash == first.events[0].stored.root == OURS
    assert not first.events[0].stored.token_ids, "it did not ask for them"
    service.engine.publish(B, X.digest)
    then = await anext(stream)
    assert (then.sequence, then.reset, told(then)) == (9, False, [B.digest, b"-" + X.digest])
    assert then.events[0].stored.parent_hash == A.digest
    service.engine.publish(reset=True)
    lost = await anext(stream)
    assert (lost.sequence, lost.reset, told(lost)) == (10, True, [])
    await stream.aclose()


async def test_tokens_come_where_asked_for(service: Service) -> None:
    service.engine.blocks = [A]
    stream = watch(service, token_ids=True)
    assert list((await anext(stream)).events[0].stored.token_ids) == [0, 1, 2, 3]
    await stream.aclose()


async def test_the_engine_is_asked_while_somebody_watches_and_not_longer(service: Service) -> None:
    one = service.admin.WatchKvEvents(admin_pb2.WatchKvEventsRequest())
    await one.read()
    two = service.admin.WatchKvEvents(admin_pb2.WatchKvEventsRequest())
    await two.read()
    assert service.engine.watching == [1, 2]
    for call in (one, two):
        call.cancel()
    while service.engine.watching[-1]:
        await service.admin.GetStats(admin_pb2.GetStatsRequest())
    assert service.engine.watching == [1, 2, 0]


async def test_a_large_beginning_comes_in_parts(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "IN_A_MESSAGE", 2)
    service.engine.blocks, service.engine.changes_told = [A, B, C, X, Y], 5
    stream = watch(service)
    parts = [await anext(stream) for _ in range(3)]
    assert [(p.sequence, p.reset, p.beginning_left, len(p.events)) for p in parts] == [
        (5, True, 2, 2),
        (5, False, 1, 2),
        (5, False, 0, 1),
    ]
    service.engine.publish(*[block.digest for block in (A, B, C)])
    assert [(p.sequence, len(p.events)) for p in [await anext(stream), await anext(stream)]] == [(7, 2), (8, 1)]
    await stream.aclose()
    router = subscribe(service)
    batches = [await router.read(), await router.read()]
    assert [(b.sequence_number, b.snapshot.index, b.snapshot.count, b.snapshot.blocks) for b in batches] == [
        (1, 0, 2, 3),
        (2, 1, 2, 3),
    ]
    router.cancel()


async def test_a_slow_watcher_begins_anew(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing waits for it beyond a bound, and what it knows in the end is what is there."""
    monkeypatch.setattr(kv_events, "MAX_WAITING", 3)
    watchers = kv_events.KvWatchers(service.link)
    service.engine.blocks = [A]
    with watchers.watch() as slow:
        parts = slow.parts()
        assert (await anext(parts)).reset
        service.engine.publish(B, C)
        service.engine.publish(X, Y)  # one too many
        service.engine.publish(B.digest)
        assert service.engine.watching == [1], "not before it reads"
        service.engine.blocks = [A, C, X, Y]
        again = await anext(parts)
        assert (again.reset, again.number, again.changes) == (True, 5, [A, C, X, Y])
        assert service.engine.watching == [1, 1]
        service.engine.publish(A.digest)
        assert (await anext(parts)).changes == [A.digest]
    assert service.engine.watching[-1] == 0


async def test_too_many_watchers_are_refused(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_events, "MAX_WATCHERS", 1)
    stream = watch(service)
    await anext(stream)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await anext(watch(service))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert caught.value.details() == "1 watch already, the most that may"
    await stream.aclose()


async def test_a_server_that_stops_ends_the_watches(service: Service) -> None:
    call = service.admin.WatchKvEvents(admin_pb2.WatchKvEventsRequest())
    await call.read()
    await service.frontend.stop(5.0)
    assert await call.read() is grpc.aio.EOF
    assert await call.code() is grpc.StatusCode.OK


# ---------------------------------------------------------------- as a router watches


async def test_a_router_sees_its_own_prefixes_by_their_tokens(service: Service) -> None:
    service.engine.blocks = [A, X, B]
    call = subscribe(service)
    first = await call.read()
    assert first.sequence_number == 1
    assert [event.WhichOneof("data") for event in first.events] == ["cleared", "stored"]
    stored = first.events[1].stored
    assert [list(block.token_ids) for block in stored.blocks] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert [(block.block_hash, block.block_size) for block in stored.blocks] == [
        (name(A.digest), 4),
        (name(B.digest), 4),
    ]
    assert not stored.HasField("parent_block_hash"), "the first of a prompt has none"
    assert -(2**63) <= name(A.digest) < 2**63
    service.engine.publish(Y, X.digest)  # another tenant's: not even an empty batch
    service.engine.publish(C, X.digest, A.digest, B.digest)
    then = await call.read()
    assert (then.sequence_number, then.HasField("snapshot")) == (2, False)
    assert [event.WhichOneof("data") for event in then.events] == ["stored", "removed"]
    assert then.events[0].stored.parent_block_hash == name(B.digest)
    assert list(then.events[1].removed.block_hashes) == [name(A.digest), name(B.digest)]
    service.engine.publish(reset=True)
    lost = await call.read()
    assert (lost.sequence_number, [e.WhichOneof("data") for e in lost.events]) == (3, ["cleared"])
    assert lost.snapshot.count == 1
    call.cancel()


async def test_a_router_of_a_tenant_sees_the_tenants(service: Service) -> None:
    service.engine.blocks = [A, X]
    call = subscribe(service, tenant="t")
    assert [block.block_hash for block in (await call.read()).events[1].stored.blocks] == [name(X.digest)]
    call.cancel()


async def test_a_router_that_comes_back_goes_on_with_a_snapshot(service: Service) -> None:
    """Its cursor stays gapless: it would come back again otherwise."""
    service.engine.blocks = [A]
    call = subscribe(service, after=41)
    batch = await call.read()
    assert (batch.sequence_number, batch.snapshot.count) == (42, 1)
    assert batch.events[0].HasField("cleared")
    call.cancel()


async def test_a_cursor_that_could_not_go_on_is_refused(service: Service) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await subscribe(service, after=2**64 - 1).read()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert str(caught.value.details()).startswith("start_sequence_number: is 18446744073709551615; at most ")

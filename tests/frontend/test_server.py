"""The server itself: health, reflection, raw bytes, many calls at once, ports, draining."""

from __future__ import annotations

import asyncio
import contextlib
import random
from typing import Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import EngineStats
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.server import Frontend, FrontendConfig, PortInUseError
from tests.frontend.conftest import Service, byte_model, open_service
from tests.frontend.scripted import ScriptedEngine
from tests.frontend.test_generate import ask, run
from tests.frontend.test_validation import violations

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING
SERVICES = ["", "pagewire.v1.InferenceService", "pagewire.v1.AdminService", "vllm.grpc.engine.VllmEngine"]


def health(service: Service) -> Any:  # the stub is not typed
    return health_pb2_grpc.HealthStub(service.channel)


async def check(service: Service, name: str = "") -> int:
    response: health_pb2.HealthCheckResponse = await health(service).Check(health_pb2.HealthCheckRequest(service=name))
    return response.status


async def test_health_follows_the_engine(loading_service: Service) -> None:
    service = loading_service
    for name in SERVICES:
        assert await check(service, name) == NOT_SERVING
    service.engine.say(True)
    for name in SERVICES:
        assert await check(service, name) == SERVING
    service.engine.say(False, reason="the worker died")
    assert await check(service) == NOT_SERVING
    service.engine.say(True)
    service.engine.stats = EngineStats(draining=True)
    service.engine.say(True)
    assert await check(service) == NOT_SERVING
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await check(service, "nobody")
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


@pytest.mark.parametrize("name", SERVICES)
async def test_watch_tells_every_change(service: Service, name: str) -> None:
    watch = health(service).Watch(health_pb2.HealthCheckRequest(service=name))
    assert (await watch.read()).status == SERVING
    for serving, state in ((False, NOT_SERVING), (True, SERVING), (False, NOT_SERVING)):
        service.engine.say(serving)
        assert (await watch.read()).status == state
    watch.cancel()


async def test_watch_of_an_unknown_service_waits(service: Service) -> None:
    watch = health(service).Watch(health_pb2.HealthCheckRequest(service="nobody"))
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVICE_UNKNOWN
    watch.cancel()


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection(service: Service, version: str) -> None:
    method: Any = service.channel.stream_stream(
        f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo",
        request_serializer=reflection_pb2.ServerReflectionRequest.SerializeToString,
        response_deserializer=reflection_pb2.ServerReflectionResponse.FromString,
    )
    symbols = [*SERVICES[1:], "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"]
    call = method()
    await call.write(reflection_pb2.ServerReflectionRequest(list_services=""))
    listed = {entry.name for entry in (await call.read()).list_services_response.service}
    assert listed == {*symbols, "grpc.reflection.v1alpha.ServerReflection"}
    methods = ["pagewire.v1.InferenceService.Generate", "vllm.grpc.engine.VllmEngine.Abort"]  # what ghz asks for
    for symbol in [*symbols, *methods]:
        await call.write(reflection_pb2.ServerReflectionRequest(file_containing_symbol=symbol))
        assert (await call.read()).file_descriptor_response.file_descriptor_proto
    await call.write(
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="pagewire.v1.InferenceService.Nothing")
    )
    assert (await call.read()).error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    await call.done_writing()


METHODS = {
    "pagewire.v1.InferenceService": ["Generate", "Embed", "Score", "Tokenize", "Detokenize", "CancelGeneration"],
    "vllm.grpc.engine.VllmEngine": ["Generate", "Embed", "Abort", "GetLoads", "FlushCache", "SubscribeKvEvents"],
    "grpc.health.v1.Health": ["Check", "Watch"],
    "grpc.channelz.v1.Channelz": ["GetTopChannels", "GetServers", "GetServer", "GetSocket"],
    "grpc.reflection.v1.ServerReflection": ["ServerReflectionInfo"],
}
EMPTY_REQUESTS = {
    "pagewire.v1.InferenceService": ["GetModel"],
    "pagewire.v1.AdminService": ["GetStats", "GetConfig", "Drain", "FlushCache"],
    "vllm.grpc.engine.VllmEngine": ["HealthCheck", "GetModelInfo", "GetServerInfo", "GetTokenizer"],
}
PATHS = [f"/{name}/{m}" for methods in (METHODS, EMPTY_REQUESTS) for name, ms in methods.items() for m in ms]


# Truncated, overlong and group-typed fields; and, where the first field is a string, one that is no UTF-8.
BROKEN = [(path, data) for path in PATHS for data in (b"\xff", b"\x0a\xff\xff\xff\xff\x0f", b"\x0f\x0f")]
BROKEN += [(path, b"\x0a\x02\xc3\x28") for path in PATHS if path.endswith(("CancelGeneration", "/Check", "/Watch"))]


@pytest.mark.parametrize(("path", "data"), BROKEN)
async def test_undecodable_bytes_are_the_clients_fault(service: Service, path: str, data: bytes) -> None:
    call: Any = service.channel.stream_stream(path)()
    await call.write(data)
    await call.done_writing()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call.read()
    assert list(violations(caught.value)) == ["request"]


async def test_random_bytes_never_read_unknown(service: Service) -> None:
    noise = random.Random(4)
    allowed = {grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND}
    for path in ("Generate", "Embed", "Score", "Tokenize", "Detokenize", "CancelGeneration"):
        for size in range(1, 40):
            call: Any = service.channel.stream_stream(f"/pagewire.v1.InferenceService/{path}")()
            await call.write(noise.randbytes(size))
            await call.done_writing()
            with contextlib.suppress(grpc.aio.AioRpcError):
                while await call.read() is not grpc.aio.EOF:
                    pass
            assert await call.code() in allowed


async def test_a_message_above_the_bound_is_refused() -> None:
    service = await open_service(byte_model(), FrontendConfig(port=0, max_message_bytes=10_000))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await run(service, pb.GenerateRequest(text="x" * 10_001))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    await service.channel.close()
    await service.frontend.stop()


@pytest.mark.parametrize("count", [pytest.param(300), pytest.param(3000, marks=pytest.mark.full)])
async def test_many_calls_pending_at_once(service: Service, count: int) -> None:
    """All arrive while the engine makes nothing, over several connections; none is lost or refused by gRPC itself."""
    service.engine.held = True
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(f"127.0.0.1:{service.port}", options=options) for _ in range(8)]
    stubs = [type(service.inference)(channel) for channel in channels]
    calls = [stubs[i % 8].Generate(ask(max_tokens=2)) for i in range(count)]
    await asyncio.gather(*(call.initial_metadata() for call in calls))
    assert len(service.engine.sequences) == count
    service.engine.release()

    async def drain(call: grpc.aio.UnaryStreamCall[pb.GenerateRequest, pb.GenerateResponse]) -> int:
        return len([response async for response in call])

    assert min(await asyncio.gather(*map(drain, calls))) >= 2
    assert len(service.link) == 0
    await asyncio.gather(*(channel.close() for channel in channels))


async def test_a_taken_port_is_one_clear_line(service: Service) -> None:
    link = EngineLink()
    ScriptedEngine(link)
    second = Frontend(link, FrontendConfig(port=service.port), byte_model())
    try:
        with pytest.raises(PortInUseError, match=f"127.0.0.1:{service.port}.*in use") as caught:
            await second.start()
    finally:
        await second.stop()
    assert "\n" not in str(caught.value)


async def test_drain_lets_accepted_calls_end(service: Service) -> None:
    service.engine.held = True
    watch = health(service).Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == SERVING
    running = asyncio.ensure_future(run(service, ask()))
    await service.engine.submit_seen.wait()
    draining = asyncio.ensure_future(service.frontend.drain(30.0))
    assert (await watch.read()).status == NOT_SERVING
    assert not draining.done()
    service.engine.release()
    await draining
    assert (await running).text[0] == "fghij"


async def test_drain_gives_up_after_its_grace(service: Service) -> None:
    service.engine.held = True
    call = service.inference.Generate(ask())
    await service.engine.submit_seen.wait()
    await service.frontend.drain(0.05)
    await service.engine.abort_seen.wait()
    assert await call.code() in (grpc.StatusCode.CANCELLED, grpc.StatusCode.UNAVAILABLE)

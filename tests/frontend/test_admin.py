"""What operators are told: stats, configuration, channelz."""

from __future__ import annotations

from typing import Any

import grpc
import grpc.aio
import msgspec
import pytest
from grpc_channelz.v1 import channelz_pb2, channelz_pb2_grpc
from pagewire.v1 import admin_pb2

from protos.engine_wire import EngineStats, Histogram, Loss, ServiceStatus, TenantFigures, WorkerFigures, WorkerStatus
from scheduler_svc.frontend.admin import stats_message
from scheduler_svc.frontend.server import FrontendConfig
from tests.e2e.service import free_port
from tests.frontend.conftest import Service, byte_model, open_service
from tests.frontend.scripted import READY
from tests.frontend.test_generate import ask, run


def test_stats_tell_all_that_the_loop_says() -> None:
    status = ServiceStatus(
        False,
        "the worker was lost: it was killed",
        READY,
        [WorkerStatus("loading", 9, "cpu", "weights", 0.5), WorkerStatus("serving", 10)],
        EngineStats(
            waiting_tokens=12, draft_tokens=9, accepted_at=(3, 1), tenants=[TenantFigures("a", 1, 2, 3, 4, 5, 6)]
        ),
        figures=[WorkerFigures(1.5, 20, 3.25, 2, 1)],
        losses=[Loss(2.5, 8, "killed")],
    )
    stats = msgspec.structs.replace(status.stats, step_seconds=Histogram((1.0,), (2, 1), 5.0))
    message = stats_message(msgspec.structs.replace(status, stats=stats), 77.0)
    assert (message.serving, message.reason, message.uptime_seconds) == (False, status.reason, 77.0)
    first, second = message.workers
    assert (first.state, first.pid, first.detail, first.progress) == (admin_pb2.WORKER_STATE_LOADING, 9, "weights", 0.5)
    assert (first.state_seconds, first.steps, first.busy_seconds) == (1.5, 20, 3.25)
    assert (first.steps_in_flight, first.losses) == (2, 1)
    assert (second.state, second.steps) == (admin_pb2.WORKER_STATE_SERVING, 0)
    (tenant,) = message.tenants
    assert (tenant.name, tenant.running, tenant.waiting, tenant.requests) == ("a", 1, 2, 3)
    assert (tenant.refused, tenant.prompt_tokens, tenant.output_tokens) == (4, 5, 6)
    (loss,) = message.losses
    assert (loss.seconds_ago, loss.pid, loss.reason) == (2.5, 8, "killed")
    assert (list(message.step.bounds), list(message.step.counts), message.step.sum) == ([1.0], [2, 1], 5.0)
    assert message.waiting_tokens == 12
    assert (message.draft_tokens, message.accepted_draft_tokens) == (9, 4)


async def test_stats_hold_what_clients_saw(service: Service) -> None:
    await run(service, ask("hello"))
    stats = await service.admin.GetStats(admin_pb2.GetStatsRequest())
    assert (sum(stats.first_token.counts), sum(stats.between_tokens.counts), sum(stats.stream.counts)) == (1, 4, 1)
    assert stats.serving


async def test_the_configuration_is_told_with_what_the_worker_chose() -> None:
    settings = (("port", "1"), ("loop.engine.depth", "2"))
    service = await open_service(byte_model(), FrontendConfig(port=0, settings=settings), serving=False)
    told = await service.admin.GetConfig(admin_pb2.GetConfigRequest())
    assert [(s.name, s.value) for s in told.settings] == list(settings)
    assert told.version
    service.engine.say(True)
    told = await service.admin.GetConfig(admin_pb2.GetConfigRequest())
    chosen = {s.name: s.value for s in told.settings[2:]}
    assert all(name.startswith("worker.") for name in chosen)
    assert (chosen["worker.num_blocks"], chosen["worker.exact"], chosen["worker.backend"]) == ("64", "True", "script")
    await service.channel.close()
    await service.frontend.stop()


def channelz(service: Service) -> Any:
    return channelz_pb2_grpc.ChannelzStub(service.channel)  # type: ignore[arg-type]


async def test_channelz_sees_the_server_and_its_calls() -> None:
    service = await open_service(byte_model(), FrontendConfig(port=free_port()))  # it is known by the port asked for
    await run(service, ask())
    stub = channelz(service)
    servers = (await stub.GetServers(channelz_pb2.GetServersRequest())).server
    ours = [server for server in servers if any(s.name.endswith(f":{service.port}") for s in server.listen_socket)]
    assert len(ours) == 1
    assert ours[0].data.calls_started >= 1
    sockets = await stub.GetServerSockets(channelz_pb2.GetServerSocketsRequest(server_id=ours[0].ref.server_id))
    assert len(sockets.socket_ref) == 1
    socket = await stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=sockets.socket_ref[0].socket_id))
    assert socket.socket.data.streams_started >= 2
    await service.channel.close()
    await service.frontend.stop()


async def test_channelz_says_not_found(service: Service) -> None:
    stub = channelz(service)
    for call in (
        stub.GetServer(channelz_pb2.GetServerRequest(server_id=1 << 40)),
        stub.GetSocket(channelz_pb2.GetSocketRequest(socket_id=1 << 40)),
    ):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND

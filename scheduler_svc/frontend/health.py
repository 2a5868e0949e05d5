"""Health v1, per service and with Watch, after what the engine's loop says of its workers."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

import grpc
from grpc_health.v1 import health_pb2

from protos.engine_wire import ServiceStatus
from scheduler_svc.frontend import rpc
from scheduler_svc.frontend.errors import Context, not_found

SERVICE: Final = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
Response = health_pb2.HealthCheckResponse


class HealthService:
    """All services share one state: they stand on the same workers. "" is the server as a whole."""

    def __init__(self, services: Sequence[str]) -> None:
        self._services = frozenset(["", *services])
        self._serving = False
        self._draining = False
        self._closed = False
        self._changed = asyncio.Event()  # replaced at each change, so that any number of watchers see it

    def handler(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                "Check": rpc.unary(health_pb2.HealthCheckRequest, self.check),
                "Watch": rpc.server_stream(health_pb2.HealthCheckRequest, self.watch),
            },
        )

    @property
    def serving(self) -> bool:
        return self._serving and not self._draining

    def update(self, status: ServiceStatus) -> None:
        before, self._serving = self.serving, status.serving and not status.stats.draining
        self._tell(before)

    def drain(self) -> None:
        """NOT_SERVING from now on, whatever the workers do."""
        before, self._draining = self.serving, True
        self._tell(before)

    def close(self) -> None:
        """Ends every Watch, so that a server that stops need not cancel them."""
        self._closed = True
        self._wake()

    async def check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Response:
        if request.service not in self._services:
            raise not_found(f"no service {request.service!r}")
        return self._state(request.service)

    async def watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """The state now, then every change. An unknown service reads SERVICE_UNKNOWN, as the protocol wants."""
        last: Response | None = None
        while not self._closed:
            changed = self._changed
            if (state := self._state(request.service)) != last:
                await context.write(state.SerializeToString())
                last = state
            if changed is self._changed:
                await changed.wait()

    def _state(self, service: str) -> Response:
        if service not in self._services:
            return Response(status=Response.SERVICE_UNKNOWN)
        return Response(status=Response.SERVING if self.serving else Response.NOT_SERVING)

    def _tell(self, before: bool) -> None:
        if before != self.serving:
            self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

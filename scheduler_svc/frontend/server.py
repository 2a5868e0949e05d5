"""One frontend: a grpc.aio server with every service on one port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from protos.engine_wire import Question
from scheduler_svc.frontend import health, reflection, servicer, vllm_compat
from scheduler_svc.frontend.core import Core, FrontendConfig
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.health import HealthService
from scheduler_svc.frontend.model import ServedModel

__all__ = ["Frontend", "FrontendConfig", "PortInUseError"]


class PortInUseError(OSError):
    """Somebody listens there already, or the address is not ours."""


class Frontend:
    """`link.connect` comes before `start`, on whose event loop everything here runs."""

    def __init__(
        self,
        link: EngineLink,
        config: FrontendConfig,
        model: ServedModel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = Core(link, config, model, clock)
        services = [servicer.INFERENCE, servicer.ADMIN, vllm_compat.SERVICE]
        self._health = HealthService(services)
        link.on_status(self._health.update)
        if link.status:
            self._health.update(link.status)
        self._router = vllm_compat.VllmEngine(self._core)
        self._handlers = [
            servicer.InferenceService(self._core).handler(),
            servicer.AdminService(self._core).handler(),
            self._router.handler(),
            self._health.handler(),
            *reflection.handlers([*services, health.SERVICE]),
        ]
        self._server: grpc.aio.Server | None = None

    async def start(self) -> int:
        """Binds and serves; returns the port. Raises PortInUseError, in one line."""
        config = self._core.config
        self._server = grpc.aio.server(options=_options(config))
        self._server.add_generic_rpc_handlers(self._handlers)
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{config.port}")
        except RuntimeError as error:
            raise PortInUseError(f"cannot listen on {host}:{config.port}: port in use, or no such address") from error
        await self._server.start()
        return port

    @property
    def router_calls(self) -> int:
        """Generate calls that a router has open."""
        return self._router.calls

    def leave(self) -> None:
        """NOT_SERVING from now on; what comes nevertheless is taken, until `drain`."""
        self._health.drain()

    async def drain(self, grace: float) -> bool:
        """NOT_SERVING, no new requests; at most `grace` seconds for those accepted, then stops.

        False where they had not all ended by then: the rest was cut.
        """
        self.leave()
        try:
            await asyncio.wait_for(self._core.link.ask(Question.DRAIN), grace)
        except TimeoutError:
            await self.stop()
            return False
        await self.stop(min(grace, 1.0))  # what has ended is still being written
        return True

    async def stop(self, grace: float = 0.0) -> None:
        """Takes no more calls; those open after `grace` seconds are cancelled, and so aborted in the engine."""
        self._health.drain()
        self._health.close()
        self._core.kv_watchers.close()
        if self._server:
            await self._server.stop(grace)


def _options(config: FrontendConfig) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),  # bounded by streams.MAX_ENTRIES
        # Otherwise gRPC itself refuses some of ~1,500 waiting calls with a bare CANCELLED, and no handler sees them.
        ("grpc.server.max_pending_requests", config.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", config.max_pending_calls),
        # On by default: a second server would silently take half of this one's calls.
        ("grpc.so_reuseport", 0),
        # Routers ping every 30 s, idle or not; the defaults would kill a silent call after 120 s.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    ]

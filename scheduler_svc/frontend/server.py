"""One frontend: a grpc.aio server with every service on one port."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from protos.engine_wire import Question, ServiceStatus
from scheduler_svc.frontend import admin, channelz, health, reflection, servicer, vllm_compat
from scheduler_svc.frontend.access import Access, Ended
from scheduler_svc.frontend.core import Core, FrontendConfig
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.health import HealthService
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.tracing import Tracer

_SCRAPE_PATIENCE = 5.0  # seconds for the engine's answer
_REPORT_EVERY = 1.0  # seconds

__all__ = ["Frontend", "FrontendConfig", "PortInUseError"]


class PortInUseError(OSError):
    """Somebody listens there already, or the address is not ours."""


class Metrics:
    """The page for Prometheus, of the whole service. Raises PortInUseError."""

    def __init__(self, core: Core) -> None:
        from scheduler_svc.metrics_page import Page, PageServer

        config, events = core.config, asyncio.get_running_loop()

        def status() -> ServiceStatus:
            """In the thread of a scrape."""
            asking = asyncio.run_coroutine_threadsafe(core.link.ask(Question.STATS), events)
            try:
                return asking.result(_SCRAPE_PATIENCE).status
            finally:
                asking.cancel()  # if it was given up: Prometheus gets an error 500

        cache = {
            "block_size": str(config.block_size),
            "cache_dtype": config.kv_dtype,
            "enable_prefix_caching": str(config.prefix_caching),
        }
        try:
            server = PageServer(Page(status, core.name, cache), config.host, config.metrics_port)
        except OSError as error:
            raise PortInUseError(f"cannot listen on {config.host}:{config.metrics_port}: {error.strerror}") from error
        self.close = server.close


class Frontend:
    """`link.connect` comes before `start`, on whose event loop everything here runs. Raises MissingExtraError."""

    def __init__(
        self,
        link: EngineLink,
        config: FrontendConfig,
        model: ServedModel,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._core = Core(link, config, model, clock)
        self._tracer = Tracer(config.otlp_endpoint, self._core.name) if config.otlp_endpoint else None
        self._metrics: Metrics | None = None
        services = [servicer.INFERENCE, admin.ADMIN, vllm_compat.SERVICE]
        self._health = HealthService(services)
        link.on_status(self._health.update)
        if link.status:
            self._health.update(link.status)
        self._router = vllm_compat.VllmEngine(self._core)
        self._handlers = [
            servicer.InferenceService(self._core).handler(),
            admin.AdminService(self._core).handler(),
            self._router.handler(),
            self._health.handler(),
            channelz.handler(),
            *reflection.handlers([*services, health.SERVICE, channelz.SERVICE]),
        ]
        self._server: grpc.aio.Server | None = None
        self._reporting: asyncio.Future[None] | None = None

    async def start(self) -> int:
        """Binds and serves; returns the port. Raises PortInUseError, in one line."""
        config = self._core.config
        if config.metrics_port:
            self._metrics = Metrics(self._core)
        ended: tuple[Ended, ...] = (self._tracer.ended,) if self._tracer else ()
        access = Access(self._core.observer, self._core.clock, ended)
        self._server = grpc.aio.server(interceptors=[access], options=_options(config))
        self._server.add_generic_rpc_handlers(self._handlers)
        host = f"[{config.host}]" if ":" in config.host else config.host
        try:
            port = self._server.add_insecure_port(f"{host}:{config.port}")
        except RuntimeError as error:
            raise PortInUseError(f"cannot listen on {host}:{config.port}: port in use, or no such address") from error
        await self._server.start()
        if self._core.link.frontend:  # one of several, of which another may be asked for the sum
            self._reporting = asyncio.ensure_future(self._report())
        return port

    @property
    def router_calls(self) -> int:
        """Generate calls that a router has open."""
        return self._router.calls

    def leave(self) -> None:
        """NOT_SERVING from now on; what comes nevertheless is taken, until `drain`."""
        self._health.drain()

    async def _report(self) -> None:
        while True:
            await asyncio.sleep(_REPORT_EVERY)
            self._core.link.report()

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
        if self._reporting:
            self._reporting.cancel()
        if self._metrics:
            await asyncio.to_thread(self._metrics.close)
        if self._tracer:
            await asyncio.to_thread(self._tracer.close)


def _options(config: FrontendConfig) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", -1),  # bounded by streams.MAX_ENTRIES
        # Otherwise gRPC itself refuses some of ~1,500 waiting calls with a bare CANCELLED, and no handler sees them.
        ("grpc.server.max_pending_requests", config.max_pending_calls),
        ("grpc.server.max_pending_requests_hard_limit", config.max_pending_calls),
        # On by default: a second server would silently take half of this one's calls.
        ("grpc.so_reuseport", int(config.reuse_port)),
        # Routers ping every 30 s, idle or not; the defaults would kill a silent call after 120 s.
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        channelz.OPTION,
    ]

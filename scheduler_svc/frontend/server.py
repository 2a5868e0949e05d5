"""One frontend: a grpc.aio server with every service on one port, and perhaps one for routers on another."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import grpc
import grpc.aio

from protos.engine_wire import Question, ServiceStatus
from scheduler_svc.frontend import admin, channelz, health, reflection, servicer, vllm_compat
from scheduler_svc.frontend.access import Access, Ended
from scheduler_svc.frontend.auth import Guard, TokenFile
from scheduler_svc.frontend.core import Core, FrontendConfig
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.health import HealthService
from scheduler_svc.frontend.limits import (
    HANDSHAKE_SECONDS,
    IDLE_SECONDS,
    MAX_CONNECTION_STREAMS,
    MAX_METADATA_BYTES,
)
from scheduler_svc.frontend.model import ServedModel
from scheduler_svc.frontend.tls import Certificates, is_loopback
from scheduler_svc.frontend.tracing import Tracer

_SCRAPE_PATIENCE = 5.0  # seconds for the engine's answer
_REPORT_EVERY = 1.0  # seconds

__all__ = ["Frontend", "FrontendConfig", "PortInUseError"]

log = logging.getLogger(__name__)


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
        routers = self._router.handler()
        self._handlers = [
            servicer.InferenceService(self._core).handler(),
            admin.AdminService(self._core).handler(),
            routers,
            self._health.handler(),
            channelz.handler(),
            *reflection.handlers([*services, health.SERVICE, channelz.SERVICE]),
        ]
        self._reporting: asyncio.Future[None] | None = None
        self._router_handlers = [
            routers,
            self._health.handler(),
            *reflection.handlers([vllm_compat.SERVICE, health.SERVICE]),
        ]
        self._servers: list[grpc.aio.Server] = []
        self._certificates: Certificates | None = None
        self.router_port = 0  # of the plain port for routers, once it is open

    async def start(self) -> int:
        """Binds and serves; returns the port. Raises PortInUseError and FileError, in one line."""
        config = self._core.config
        if config.metrics_port:
            self._metrics = Metrics(self._core)
        ended: tuple[Ended, ...] = (self._tracer.ended,) if self._tracer else ()
        access = Access(self._core.observer, self._core.clock, ended)
        # The guard comes first: what it refuses may be of any name, and nobody else should keep those.
        guard = [Guard(TokenFile(config.tokens))] if config.tokens else []
        self._certificates = Certificates(config.tls) if config.tls else None
        if not config.tls and not is_loopback(config.host):
            log.warning("%s is served without TLS: whoever is on the way reads prompts and tokens", config.host)
        server = grpc.aio.server(interceptors=[*guard, access], options=_options(config))
        address = f"[{config.host}]" if ":" in config.host else config.host
        port = self._bind(server, self._handlers, f"{address}:{config.port}", self._certificates)
        if config.router_listen:
            if not is_loopback(config.router_listen.rpartition(":")[0]):
                log.warning("%s is for routers: whoever reaches it is served, without a token", config.router_listen)
            server = grpc.aio.server(interceptors=[access], options=_options(config))
            self.router_port = self._bind(server, self._router_handlers, config.router_listen, None)
        for server in self._servers:
            await server.start()
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

    def _bind(
        self,
        server: grpc.aio.Server,
        handlers: list[grpc.GenericRpcHandler],
        address: str,
        certificates: Certificates | None,
    ) -> int:
        self._servers.append(server)
        server.add_generic_rpc_handlers(handlers)
        try:
            if certificates:
                return server.add_secure_port(address, certificates.credentials)
            return server.add_insecure_port(address)
        except RuntimeError as error:
            raise PortInUseError(f"cannot listen on {address}: port in use, or no such address") from error

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
        await asyncio.gather(*(server.stop(grace) for server in self._servers))
        if self._reporting:
            self._reporting.cancel()
        if self._metrics:
            await asyncio.to_thread(self._metrics.close)
        if self._tracer:
            await asyncio.to_thread(self._tracer.close)


def _options(config: FrontendConfig) -> list[tuple[str, Any]]:
    age = [("grpc.max_connection_age_ms", int(config.max_connection_age * 1000))] if config.max_connection_age else []
    return [
        *age,  # streams that are open then go on to their end
        ("grpc.max_connection_idle_ms", IDLE_SECONDS * 1000),
        ("grpc.max_concurrent_streams", MAX_CONNECTION_STREAMS),  # a client keeps what is beyond to itself
        # By default a lottery begins at 8 KiB: some calls are refused and some are not.
        ("grpc.max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.absolute_max_metadata_size", MAX_METADATA_BYTES),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_SECONDS * 1000),
        # A client whose host is gone leaves open streams behind: their blocks are somebody else's soon.
        ("grpc.keepalive_time_ms", int(config.keepalive * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_answer * 1000)),
        ("grpc.http2.ping_timeout_ms", int(config.keepalive_answer * 1000)),
        ("grpc.http2.max_pings_without_data", 0),
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

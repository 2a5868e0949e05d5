"""`python -m scheduler_svc MODEL` serves, all on this host; `python -m scheduler_svc replay LOG` runs a log again."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from protos.curve import CurveError
from scheduler_svc import config, gateway, logs, replay
from scheduler_svc.gateway import Gateway, GatewayError
from scheduler_svc.loop import EngineLoop
from scheduler_svc.settings import effective

if TYPE_CHECKING:
    from protos.engine_wire import ServiceStatus
    from scheduler_svc.config import ServiceConfig
    from scheduler_svc.frontend.model import ServedModel
    from scheduler_svc.frontend.server import Frontend, FrontendConfig

log = logging.getLogger("scheduler_svc")


def main() -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong usage."""
    logs.configure("text", "info")
    if sys.argv[1:2] == ["replay"]:
        return replay.main(sys.argv[2:])
    if sys.argv[1:2] in (["token"], ["keys"]):
        from scheduler_svc import credentials

        return credentials.main(sys.argv[1:])
    settings = config.parse()
    logs.configure(settings.log_format, settings.log_level)
    began = time.monotonic()
    if settings.frontends > 1:
        from scheduler_svc import frontends

        return frontends.serve(settings, sys.argv[1:], began)
    try:
        if settings.gateway:
            gateway.check(settings.gateway)
    except GatewayError as error:
        return _fail(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # until there is something to drain
    try:
        loop = EngineLoop(settings.loop, time.monotonic)
    except (OSError, CurveError) as error:
        return _fail(str(error))
    try:
        loop.start()  # the worker first: it loads while gRPC and tokenizer do, and nothing of gRPC lives through a fork
        return _serve(settings, loop, began)
    except KeyboardInterrupt:
        return _fail("interrupted before it served")
    finally:
        loop.stop()


def _serve(settings: ServiceConfig, loop: EngineLoop, began: float) -> int:
    import uvloop

    from scheduler_svc.frontend.model import ModelError, load_model

    try:
        model = load_model(settings.model)
    except ModelError as error:
        return _fail(str(error))
    return uvloop.run(_run_frontend(settings, loop, model, began))


async def _run_frontend(settings: ServiceConfig, loop: EngineLoop, model: ServedModel, began: float) -> int:
    from scheduler_svc.frontend.courier import Courier, Postbag
    from scheduler_svc.frontend.engine_link import EngineLink
    from scheduler_svc.frontend.reloading import FileError
    from scheduler_svc.frontend.server import Frontend, PortInUseError
    from scheduler_svc.frontend.tracing import MissingExtraError

    asyncio_loop = asyncio.get_running_loop()
    signals: asyncio.Queue[int] = asyncio.Queue()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio_loop.add_signal_handler(number, signals.put_nowait, number)
    link = EngineLink()
    link.connect(Postbag(loop.send, asyncio_loop.call_soon))
    try:
        frontend = Frontend(link, frontend_config(settings), model)
        port = await frontend.start()
    except (PortInUseError, MissingExtraError, FileError) as error:
        return _fail(str(error))
    failed: asyncio.Future[str] = asyncio_loop.create_future()
    openai = _gateway(settings, frontend, port)
    announced = False
    starting: set[asyncio.Task[None]] = set()

    def watch(status: ServiceStatus) -> None:
        nonlocal announced
        if status.failed and not failed.done():
            failed.set_result(status.reason)
        if status.serving and not announced:
            announced = True
            gc.freeze()  # what is here now stays: no collection between two steps need look at it
            line = f"ready: {settings.served_name} at {settings.host}:{port}"
            if openai:
                starting.add(asyncio_loop.create_task(_announce(line, began, openai, failed)))
            else:
                _say(f"{line}, {time.monotonic() - began:.1f} s after the start")

    def call_soon(collect: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the event loop has ended: nobody waits for this any more
            asyncio_loop.call_soon_threadsafe(collect)

    link.on_status(watch)
    loop.attach(Courier(link, settings.stream_interval, call_soon, asyncio_loop.call_later).post)
    try:
        return await _until_ended(frontend, signals, failed, settings.drain_timeout, openai)
    finally:
        if openai:
            openai.kill()


async def _announce(line: str, began: float, openai: Gateway, failed: asyncio.Future[str]) -> None:
    """Once the gateway serves as well."""
    try:
        await openai.start()
    except GatewayError as error:
        if not failed.done():
            failed.set_result(str(error))
    else:
        _say(f"{line}, {time.monotonic() - began:.1f} s after the start; OpenAI's API: {openai.config.url}")


async def _drain(frontend: Frontend, openai: Gateway | None, timeout: float) -> bool:
    """The gateway first, while its calls are still taken: then none of its clients is turned away by us."""
    end = time.monotonic() + timeout
    if openai:
        frontend.leave()
        await openai.stop()
    return await frontend.drain(max(0.0, end - time.monotonic()))


async def _until_ended(
    frontend: Frontend,
    signals: asyncio.Queue[int],
    failed: asyncio.Future[str],
    drain_timeout: float,
    openai: Gateway | None = None,
) -> int:
    """One signal drains, a second one stops at once; a failure stops at once, too. Only a whole drain exits with 0."""
    first = asyncio.ensure_future(signals.get())
    first_or_failed: set[asyncio.Future[Any]] = {first, failed}
    await asyncio.wait(first_or_failed, return_when=asyncio.FIRST_COMPLETED)
    if first.done():
        _say(f"{signal.Signals(first.result()).name}: draining; a second signal stops at once")
        drained = asyncio.ensure_future(_drain(frontend, openai, drain_timeout))
        second = asyncio.ensure_future(signals.get())
        any_end: set[asyncio.Future[Any]] = {drained, second, failed}
        await asyncio.wait(any_end, return_when=asyncio.FIRST_COMPLETED)
        second.cancel()
        if drained.done():
            if not drained.result():
                return _fail(f"not drained within {drain_timeout:g} s: running calls were dropped")
            _say("drained")
            return 0
        drained.cancel()
    first.cancel()
    await frontend.stop()
    return _fail(failed.result() if failed.done() else "stopped at once: running calls were dropped")


def _gateway(settings: ServiceConfig, frontend: Frontend, port: int) -> Gateway | None:
    if (chosen := settings.gateway) is None:
        return None

    inner = settings.access.router_listen.rpartition(":")[0].strip("[]")

    def arguments() -> list[str]:
        return gateway.command(chosen, inner or settings.host, frontend.router_port if inner else port)

    return Gateway(chosen, arguments, lambda: frontend.router_calls, _say)


def frontend_config(settings: ServiceConfig) -> FrontendConfig:
    from scheduler_svc.frontend.server import FrontendConfig
    from scheduler_svc.frontend.tls import TlsFiles

    access = settings.access
    tls = (
        TlsFiles(access.tls_cert, access.tls_key, access.tls_client_ca) if access.tls_cert and access.tls_key else None
    )
    return FrontendConfig(
        host=settings.host,
        port=settings.port,
        served_name=settings.served_name,
        max_model_len=settings.loop.engine.max_model_len,
        max_num_seqs=settings.loop.engine.max_num_seqs * max(1, settings.loop.workers),
        block_size=settings.loop.engine.block_size,
        slow_reader_timeout=settings.slow_reader_timeout,
        prefix_caching=settings.loop.engine.prefix_caching,
        kv_dtype=settings.loop.setup.kv_dtype,
        metrics_port=settings.metrics_port,
        otlp_endpoint=settings.otlp_endpoint,
        settings=effective(settings),
        tls=tls,
        tokens=access.tokens,
        router_listen=access.router_listen,
        max_connection_age=access.max_connection_age,
    )


def _say(line: str) -> None:
    log.info(line, extra=logs.HEADLINE)


def _fail(line: str) -> int:
    log.error(line)
    return 1


if __name__ == "__main__":
    sys.exit(main())

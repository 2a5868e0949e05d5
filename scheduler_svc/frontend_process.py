"""One of several gRPC processes on one port: `--frontends N` starts `python -m scheduler_svc.frontend_process …`.

    --parent-pid N --name NAME --connect ENDPOINT --port PORT --metrics-port PORT -- the arguments of the service

Its calls' tokens come from the engine over ZeroMQ, and nothing here touches the engine's interpreter.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from scheduler_svc import config, logs
from scheduler_svc.spawn import die_with

if TYPE_CHECKING:
    from protos.engine_wire import ServiceStatus
    from scheduler_svc.config import ServiceConfig
    from scheduler_svc.engine_socket import EngineSocket
    from scheduler_svc.frontend.model import ServedModel
    from scheduler_svc.frontend.server import Frontend


@dataclass(frozen=True)
class Place:
    """Where this one stands among the processes of the service."""

    name: str  # no other ever has the same
    connect: str  # the engine's endpoint
    port: int
    parent_pid: int
    metrics_port: int  # 0: another one serves them, or nobody


def main() -> int:
    """Exit codes: 0 where all calls had ended, 1 otherwise."""
    # Both reach whole terminals and control groups; this one ends when the engine's process says so, or has gone.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    place, arguments = _parse(sys.argv[1:])
    if not die_with(place.parent_pid):
        return 1
    logs.configure("text", "info")
    settings = config.parse(arguments)
    logs.configure(settings.log_format, settings.log_level)

    import uvloop

    from scheduler_svc.frontend.model import ModelError, load_model

    try:
        model = load_model(settings.model)
    except ModelError as error:
        return _fail(str(error))
    return uvloop.run(_serve(settings, place, model))


def _parse(argv: Sequence[str]) -> tuple[Place, Sequence[str]]:
    border = argv.index("--")
    parser = argparse.ArgumentParser(prog="frontend_process")
    parser.add_argument("--name", required=True)
    parser.add_argument("--connect", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--metrics-port", type=int, required=True)
    return Place(**vars(parser.parse_args(argv[:border]))), argv[border + 1 :]


async def _serve(settings: ServiceConfig, place: Place, model: ServedModel) -> int:
    from scheduler_svc.__main__ import frontend_config
    from scheduler_svc.engine_socket import EngineSocket
    from scheduler_svc.frontend.courier import Courier
    from scheduler_svc.frontend.engine_link import EngineLink
    from scheduler_svc.frontend.reloading import FileError
    from scheduler_svc.frontend.server import Frontend, PortInUseError
    from scheduler_svc.frontend.tracing import MissingExtraError

    loop = asyncio.get_running_loop()
    link = EngineLink(place.name)
    courier = Courier(link, settings.stream_interval, loop.call_soon, loop.call_later)
    engine = EngineSocket(place.connect, place.name, courier.post, loop)
    link.connect(engine)
    own = dataclasses.replace(
        frontend_config(settings), port=place.port, reuse_port=True, metrics_port=place.metrics_port
    )
    frozen = False

    def watch(status: ServiceStatus) -> None:
        nonlocal frozen
        if status.serving and not frozen:
            frozen = True
            gc.freeze()  # what is here now stays: no collection between two messages need look at it

    link.on_status(watch)
    try:
        frontend = Frontend(link, own, model)
        await frontend.start()
        engine.begin()
        return await _until_ended(frontend, engine)
    except (PortInUseError, MissingExtraError, FileError) as error:
        return _fail(str(error))
    finally:
        engine.close()


async def _until_ended(frontend: Frontend, engine: EngineSocket) -> int:
    """Serves until the engine's process says that it is enough, or says nothing more."""
    ended = await engine.ended
    if isinstance(ended, str):
        await frontend.stop()
        return _fail(f"a frontend ends: {ended}")
    if not ended.grace:
        await frontend.stop()
        return 1
    return 0 if await frontend.drain(ended.grace) else 1


def _fail(line: str) -> int:
    logging.getLogger(__name__).error(line)
    return 1


if __name__ == "__main__":
    sys.exit(main())

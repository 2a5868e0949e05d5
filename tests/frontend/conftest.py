"""A real grpc.aio server over loopback, with a scripted engine behind it."""

from __future__ import annotations

import dataclasses
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import grpc.aio
import pytest
from pagewire.v1 import admin_pb2_grpc, inference_pb2_grpc

from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.model import ServedModel, load_model
from scheduler_svc.frontend.server import Frontend, FrontendConfig
from tests.frontend.scripted import ScriptedEngine

EOS = 300


@dataclass
class Service:
    frontend: Frontend
    engine: ScriptedEngine
    link: EngineLink
    port: int
    channel: grpc.aio.Channel

    @property
    def inference(self) -> inference_pb2_grpc.InferenceServiceAsyncStub:
        return inference_pb2_grpc.InferenceServiceStub(self.channel)

    @property
    def admin(self) -> admin_pb2_grpc.AdminServiceAsyncStub:
        return admin_pb2_grpc.AdminServiceStub(self.channel)


def byte_model() -> ServedModel:
    """A token a byte, ids 256 to 511 named, 300 the end."""
    model = load_model("fake:vocab=512,context=256")
    return dataclasses.replace(model, card=dataclasses.replace(model.card, eos_token_ids=(EOS,)))


async def open_service(model: ServedModel, config: FrontendConfig | None = None, serving: bool = True) -> Service:
    link = EngineLink()
    engine = ScriptedEngine(link)
    frontend = Frontend(link, config or FrontendConfig(port=0), model)
    port = await frontend.start()
    if serving:
        engine.say(True)
    return Service(frontend, engine, link, port, grpc.aio.insecure_channel(f"127.0.0.1:{port}"))


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    opened = await open_service(byte_model())
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


@pytest.fixture
async def loading_service() -> AsyncIterator[Service]:
    """No worker has been ready yet."""
    opened = await open_service(byte_model(), serving=False)
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


@pytest.fixture(scope="session")
def real_model(model_path: Path) -> ServedModel:
    return load_model(model_path)


@pytest.fixture
async def real_service(real_model: ServedModel) -> AsyncIterator[Service]:
    opened = await open_service(real_model)
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()

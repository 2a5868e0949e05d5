"""A line a call: at which level, with what in it, and with nothing of a prompt."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from typing import Any

import grpc
import grpc.aio
import pytest
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason, TokenDelta
from scheduler_svc import logs
from tests.frontend.conftest import Service
from tests.frontend.test_generate import ask, fails, run

GENERATE = "/pagewire.v1.InferenceService/Generate"


@pytest.fixture
def lines(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    with caplog.at_level(logging.DEBUG, logger="scheduler_svc"):
        yield caplog


def calls(lines: pytest.LogCaptureFixture) -> list[tuple[int, dict[str, Any]]]:
    return [(r.levelno, r.__dict__["facts"]) for r in lines.records if r.name == "scheduler_svc.frontend.access"]


async def test_a_call_that_went_well_is_told_at_debug(service: Service, lines: pytest.LogCaptureFixture) -> None:
    await run(service, ask("a secret prompt", n=2))
    ((level, facts),) = calls(lines)
    assert level == logging.DEBUG
    assert (facts["method"], facts["code"]) == (GENERATE, "OK")
    assert (facts["prompt_tokens"], facts["output_tokens"], facts["cached_tokens"]) == (15, 10, 2)
    assert 0 < facts["seconds"] < 60
    assert "secret" not in json.dumps(facts)


@pytest.mark.parametrize(
    ("reason", "code", "level"),
    [
        (FinishReason.REJECTED, "RESOURCE_EXHAUSTED", logging.DEBUG),
        (FinishReason.DEADLINE, "DEADLINE_EXCEEDED", logging.DEBUG),
        (FinishReason.INVALID, "INVALID_ARGUMENT", logging.INFO),
        (FinishReason.ERROR, "INTERNAL", logging.ERROR),
    ],
)
async def test_an_error_is_told_at_the_level_of_who_should_care(
    reason: FinishReason, code: str, level: int, service: Service, lines: pytest.LogCaptureFixture
) -> None:
    service.engine.finish_with = TokenDelta("", 0, [], finish_reason=reason)
    await fails(service, ask("a secret prompt"))
    ((told, facts),) = calls(lines)
    assert (told, facts["code"]) == (level, code)


async def test_a_client_that_leaves_is_told_as_such(service: Service, lines: pytest.LogCaptureFixture) -> None:
    service.engine.held = True
    call = service.inference.Generate(ask())
    await call.initial_metadata()
    call.cancel()
    await service.engine.abort_seen.wait()
    while not calls(lines):
        await asyncio.sleep(0)
    ((level, facts),) = calls(lines)
    assert (level, facts["code"]) == (logging.DEBUG, "CANCELLED")


async def test_names_that_callers_make_up_are_not_counted(service: Service, lines: pytest.LogCaptureFixture) -> None:
    for path in ("/no.such.Service/Method", "/pagewire.v1.InferenceService/Nothing"):
        call: Any = service.channel.unary_unary(path)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(b"")
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert not calls(lines)
    assert not service.frontend._core.observer.snapshot(0).calls


async def test_what_is_logged_within_a_call_knows_it(service: Service, lines: pytest.LogCaptureFixture) -> None:
    """Beside its message: so that a collector finds it by request id and tenant."""
    seen: list[object] = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(dict(logs.CALL.get() or {}))  # type: ignore[method-assign]
    log = logging.getLogger("scheduler_svc.frontend.access")
    log.addHandler(handler)
    try:
        request = pb.GenerateRequest(text="x", request_id="mine", sampling=pb.SamplingParams(max_tokens=1))
        [_ async for _ in service.inference.Generate(request, metadata=(("tenant", "acme"),))]
        await service.inference.GetModel(pb.GetModelRequest())
    finally:
        log.removeHandler(handler)
    assert seen == [{"request_id": "mine", "tenant": "acme"}, {}]

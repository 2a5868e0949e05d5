"""What the engine refused a moment ago is refused without it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason, Shed, Submit, TokenDelta
from protos.wire import Sampling
from scheduler_svc.frontend.errors import ServiceError
from scheduler_svc.frontend.gate import Gate
from scheduler_svc.frontend.validation import Caller, Prepared, TextRules
from tests.frontend.conftest import Service
from tests.frontend.test_generate import ask, detail, run


def full(shed_for: float, tenant: str = "") -> TokenDelta:
    return TokenDelta(
        "r",
        0,
        [],
        finish_reason=FinishReason.REJECTED,
        retry_after=2.5,
        detail="full",
        tenant=tenant,
        shed_for=shed_for,
    )


class Porch:
    """A gate, a clock, and what is due by it."""

    def __init__(self) -> None:
        self.now = 100.0
        self.told: list[Shed] = []
        self.due: list[tuple[float, Callable[[str], None], str]] = []
        self.gate = Gate("f", self.told.append, lambda: self.now, self._later)

    def _later(self, delay: float, call: Callable[[str], None], tenant: str) -> None:
        self.due.append((self.now + delay, call, tenant))

    def wait(self, seconds: float) -> None:
        self.now += seconds
        due, self.due = self.due, []
        for at, call, tenant in due:
            if at <= self.now:
                call(tenant)
            else:
                self.due.append((at, call, tenant))

    def refused(self, tenant: str = "t", priority: int = 0, sequences: int = 1, shed_for: float = 0.1) -> None:
        submit = Submit("r", [1], 1, Sampling(1), num_siblings=sequences, priority=priority, tenant=tenant)
        self.gate.heed(Prepared("r", 1, 1, [submit], TextRules()), full(shed_for, tenant))

    def open(self, tenant: str = "t", priority: int = 0, sequences: int = 1) -> bool:
        try:
            self.gate.check(Caller(tenants=(tenant,)), priority, sequences)
        except ServiceError as error:
            return error.code is not grpc.StatusCode.RESOURCE_EXHAUSTED
        return True


def test_closed_for_as_long_as_the_engine_said() -> None:
    porch = Porch()
    assert porch.open()
    porch.refused()
    assert not porch.open()
    porch.wait(0.09)
    assert not porch.open()
    porch.wait(0.02)
    assert porch.open()
    assert porch.told == [Shed("f", "t", 2)]
    assert not porch.due, "nothing is kept of a tenant that is let in again"
    porch.refused(shed_for=0.0)
    assert porch.open(), "the engine wants to be asked"


@pytest.mark.parametrize(
    ("tenant", "priority", "sequences", "open_to"),
    [("t", 3, 2, False), ("t", 4, 9, False), ("t", 2, 2, True), ("t", 3, 1, True), ("other", 3, 2, True)],
)
def test_closed_to_those_alone_who_ask_for_no_less(tenant: str, priority: int, sequences: int, open_to: bool) -> None:
    porch = Porch()
    porch.refused(priority=3, sequences=2)
    assert porch.open(tenant, priority, sequences) is open_to
    porch.wait(0.2)
    assert porch.told == ([] if open_to else [Shed("f", "t", sequences)])


def test_the_engine_may_say_it_again() -> None:
    porch = Porch()
    porch.refused()
    porch.wait(0.08)
    porch.refused()
    porch.open()
    porch.wait(0.03)
    assert not porch.open()
    assert porch.told == [Shed("f", "t", 1)]
    porch.wait(0.1)
    assert porch.open()
    assert porch.told == [Shed("f", "t", 1)] * 2
    assert not porch.due


async def test_a_call_that_is_shed_never_reaches_the_engine(service: Service) -> None:
    """Not even where it would be refused for what it asks: that is looked at when there is room."""
    service.engine.finish_with = full(60.0)
    for number, request in enumerate((ask(), ask(), pb.GenerateRequest())):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            async for _ in service.inference.Generate(request):
                pass
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED, number
        assert caught.value.details() == "full"
        retry = detail(caught.value, error_details_pb2.RetryInfo)
        assert isinstance(retry, error_details_pb2.RetryInfo)
        assert retry.retry_delay.ToMilliseconds() == 2500
    assert len(service.engine.submits) == 1


async def test_the_engine_is_told_and_then_asked_again(service: Service) -> None:
    service.engine.finish_with = full(0.2)
    for _ in range(3):
        with pytest.raises(grpc.aio.AioRpcError):
            async for _ in service.inference.Generate(ask()):
                pass
    service.engine.finish_with = None
    await asyncio.wait_for(service.engine.shed_seen.wait(), 10)
    assert service.engine.shed == [Shed("", "", 2)]
    assert (await run(service, ask())).text

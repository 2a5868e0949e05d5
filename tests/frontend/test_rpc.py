"""Handlers over raw bytes, where loopback cannot time what happens."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
from pagewire.v1 import inference_pb2 as pb

from scheduler_svc.frontend import rpc
from scheduler_svc.frontend.errors import Context


class GoneClient:
    def done(self) -> bool:
        return True


async def test_a_unary_method_that_fails_for_a_client_that_left_ends_quietly(caplog: pytest.LogCaptureFixture) -> None:
    async def method(request: pb.GetModelRequest, context: Context) -> pb.GetModelResponse:
        raise ConnectionResetError

    handler = cast(Any, rpc.unary(pb.GetModelRequest, method))
    with caplog.at_level(logging.DEBUG):
        assert await handler.unary_unary(b"", GoneClient()) == b""
    assert not caplog.records

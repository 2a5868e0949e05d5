"""A refused or broken call as a typed exception, read from its status and google.rpc details."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Violation:
    field: str
    description: str


class ServiceError(Exception):
    """A call that failed. `str()` is one line for a person."""

    def __init__(
        self,
        code: grpc.StatusCode,
        message: str,
        *,
        violations: tuple[Violation, ...] = (),
        retry_after: float | None = None,
        reason: str = "",
    ) -> None:
        super().__init__(message)
        self.code = code
        self.violations = violations  # INVALID_ARGUMENT: what is wrong with which field
        self.retry_after = retry_after  # seconds, where the server names them
        self.reason = reason  # a stable word for programs, where the server gives one

    def __str__(self) -> str:
        message = f"{self.args[0] or 'the call failed'} ({self.code.name})"
        if self.violations:
            message = "; ".join(f"{v.field}: {v.description}" for v in self.violations)
        if self.retry_after is not None:
            message += f"; try again in {self.retry_after:g} s"
        return message


class InvalidRequestError(ServiceError):
    """INVALID_ARGUMENT: the request itself must change; see `violations`."""


class OverloadedError(ServiceError):
    """RESOURCE_EXHAUSTED: a queue or a quota is full; see `retry_after`."""


class UnavailableError(ServiceError):
    """UNAVAILABLE: nobody listens, or the service is draining."""


class CancelledError(ServiceError):
    """CANCELLED: by this client, or by somebody's CancelGeneration."""


_CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: CancelledError,
}


def decode(error: grpc.RpcError, address: str) -> ServiceError:
    """The typed exception behind what grpc raised; works for the errors of both grpc and grpc.aio."""
    code, message = error.code(), error.details() or ""
    violations: list[Violation] = []
    retry_after, reason = None, ""
    if code is grpc.StatusCode.UNAVAILABLE and message.startswith("failed to connect"):
        message = f"no server answers at {address}"
    for detail in _details(error):
        if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
            bad = error_details_pb2.BadRequest.FromString(detail.value)
            violations += [Violation(v.field, v.description) for v in bad.field_violations]
        elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
            delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
            retry_after = delay.ToTimedelta().total_seconds()
        elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
            reason = error_details_pb2.ErrorInfo.FromString(detail.value).reason
    kind = _CLASSES.get(code, ServiceError)
    return kind(code, message, violations=tuple(violations), retry_after=retry_after, reason=reason)


def _details(error: grpc.RpcError) -> list[any_pb2.Any]:
    try:
        status = rpc_status.from_call(cast(grpc.Call, error))
    except ValueError:  # the details contradict the status, which then stands alone
        return []
    return list(status.details) if status else []


@contextmanager
def typed(address: str) -> Iterator[None]:
    """Turns what grpc raises inside into the exceptions above."""
    try:
        yield
    except grpc.RpcError as error:
        raise decode(error, address) from error

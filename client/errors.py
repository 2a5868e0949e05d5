"""A refused or broken call as a typed exception, read from its status and google.rpc details.

A class for each status that the service or gRPC itself ends a call with; any other one is a plain `ServiceError`.

    try:
        model = client.model()
    except OverloadedError as error:
        print(error.retry_after, error.quota)
    except ServiceError as error:
        print(error.code, error.reason, error.info)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import cast

import grpc
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status


@dataclass(frozen=True)
class Violation:
    field: str
    description: str


@dataclass(frozen=True)
class QuotaViolation:
    subject: str  # whose quota
    description: str


@dataclass
class Details:
    """What a program can read, where the server says it."""

    violations: list[Violation] = field(default_factory=list)
    quota: list[QuotaViolation] = field(default_factory=list)
    retry_after: float | None = None
    reason: str = ""
    info: dict[str, str] = field(default_factory=dict)


class ServiceError(Exception):
    """A call that failed. `str()` is one line for a person; the attributes are for programs."""

    def __init__(self, code: grpc.StatusCode, message: str, details: Details | None = None) -> None:
        super().__init__(message)
        given = details or Details()
        self.code = code
        self.violations = tuple(given.violations)  # INVALID_ARGUMENT: what is wrong with which field
        self.quota = tuple(given.quota)  # RESOURCE_EXHAUSTED: which quotas are used up; none if it is the queue
        self.retry_after = given.retry_after  # seconds, where the server names them
        self.reason = given.reason  # a stable word, such as QUEUE_FULL
        self.info: Mapping[str, str] = given.info  # what belongs to that word

    def __str__(self) -> str:
        message = f"{self.args[0] or 'the call failed'} ({self.code.name})"
        if self.violations:
            message = "; ".join(f"{v.field}: {v.description}" for v in self.violations)
        elif self.quota:
            message = "; ".join(f"{v.subject}: {v.description}" for v in self.quota)
        if self.retry_after is not None:
            message += f"; try again in {self.retry_after:g} s"
        return message


class InvalidRequestError(ServiceError):
    """INVALID_ARGUMENT: the request itself must change; see `violations`."""


class OverloadedError(ServiceError):
    """RESOURCE_EXHAUSTED: the queue or a quota is full; see `retry_after` and `quota`. Without a time: too large."""


class UnavailableError(ServiceError):
    """UNAVAILABLE: nobody listens, the connection broke, or the service is draining."""


class CancelledError(ServiceError):
    """CANCELLED: by this client, or by somebody's CancelGeneration."""


class DeadlineError(ServiceError):
    """DEADLINE_EXCEEDED: the call's timeout has passed, or the service saw that it would."""


class NotFoundError(ServiceError):
    """NOT_FOUND: no such request is running, or no such adapter is loaded."""


class AlreadyExistsError(ServiceError):
    """ALREADY_EXISTS: a request of this id is running."""


class FailedPreconditionError(ServiceError):
    """FAILED_PRECONDITION: the service is not in the state that the call needs, and trying again changes nothing."""


class UnauthenticatedError(ServiceError):
    """UNAUTHENTICATED: no token, or a wrong one."""


class PermissionDeniedError(ServiceError):
    """PERMISSION_DENIED: known, and not allowed to."""


class UnimplementedError(ServiceError):
    """UNIMPLEMENTED: the server does not know this call."""


class InternalError(ServiceError):
    """INTERNAL: the server's fault; its log has more."""


_CLASSES = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequestError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: OverloadedError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.CANCELLED: CancelledError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.ALREADY_EXISTS: AlreadyExistsError,
    grpc.StatusCode.FAILED_PRECONDITION: FailedPreconditionError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.UNIMPLEMENTED: UnimplementedError,
    grpc.StatusCode.INTERNAL: InternalError,
}


def decode(error: grpc.RpcError, address: str) -> ServiceError:
    """The typed exception behind what grpc raised; works for the errors of both grpc and grpc.aio."""
    code, message = error.code(), error.details() or ""
    if code is grpc.StatusCode.UNAVAILABLE and "handshak" in message.lower():
        message = f"no TLS connection with {address}: {message}"
    elif code is grpc.StatusCode.UNAVAILABLE and message.startswith("failed to connect"):
        message = f"no server answers at {address}"
    details = Details()
    for detail in _packed(error):
        _read(detail, details)
    return _CLASSES.get(code, ServiceError)(code, message, details)


def _read(detail: any_pb2.Any, into: Details) -> None:
    if detail.Is(error_details_pb2.BadRequest.DESCRIPTOR):
        bad = error_details_pb2.BadRequest.FromString(detail.value)
        into.violations += [Violation(v.field, v.description) for v in bad.field_violations]
    elif detail.Is(error_details_pb2.QuotaFailure.DESCRIPTOR):
        quota = error_details_pb2.QuotaFailure.FromString(detail.value)
        into.quota += [QuotaViolation(v.subject, v.description) for v in quota.violations]
    elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
        delay = error_details_pb2.RetryInfo.FromString(detail.value).retry_delay
        into.retry_after = delay.ToTimedelta().total_seconds()
    elif detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
        info = error_details_pb2.ErrorInfo.FromString(detail.value)
        into.reason, into.info = info.reason, dict(info.metadata)


def _packed(error: grpc.RpcError) -> list[any_pb2.Any]:
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

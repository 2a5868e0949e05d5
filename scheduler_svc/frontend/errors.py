"""What a client is told when a call cannot go on: a gRPC status with google.rpc details, never a bare UNKNOWN."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any as Anything
from typing import Final, NoReturn, TypeAlias

import grpc
import grpc.aio
from google.protobuf.any_pb2 import Any
from google.protobuf.message import Message
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from protos.engine_wire import FinishReason, TokenDelta

Context: TypeAlias = "grpc.aio.ServicerContext[Anything, Anything]"

DOMAIN: Final = "pagewire.dev"
# A status travels in HTTP/2 trailers, and clients refuse more than 8 KiB of them: what could be long is cut.
MAX_VIOLATIONS: Final = 16
MAX_TEXT: Final = 200
DEFAULT_RETRY_SECONDS: Final = 1.0


@dataclass(frozen=True)
class Violation:
    field: str  # path in the request, such as `sampling.stop[3]`
    problem: str  # what is wrong with the value, and the limit


class ServiceError(Exception):
    """Ends a call with `code`, one line for a person and details for a program."""

    def __init__(self, code: grpc.StatusCode, message: str, *details: Message) -> None:
        super().__init__(message)
        self.code, self.message, self.details = code, _cut(message), details

    async def abort(self, context: Context) -> NoReturn:
        await context.abort_with_status(rpc_status.to_status(self.to_status()))
        raise AssertionError("unreachable: abort raises")

    def to_status(self) -> status_pb2.Status:
        status = status_pb2.Status(code=self.code.value[0], message=self.message)
        for detail in self.details:
            packed = Any()
            packed.Pack(detail)
            status.details.append(packed)
        return status


def invalid(violations: Sequence[Violation]) -> ServiceError:
    """INVALID_ARGUMENT that lists every violation (the first 16 of them)."""
    first = violations[0]
    more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
    bad = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field=_cut(v.field), description=_cut(v.problem))
            for v in violations[:MAX_VIOLATIONS]
        ]
    )
    return ServiceError(grpc.StatusCode.INVALID_ARGUMENT, f"{first.field}: {first.problem}{more}", bad)


def undecodable(type_name: str) -> ServiceError:
    return invalid([Violation("request", f"the bytes are not a {type_name} message")])


def not_found(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.NOT_FOUND, message)


def unknown_adapter(name: str, loaded: Sequence[str], max_adapters: int) -> ServiceError:
    names = ", ".join(loaded) or "none" if max_adapters else "none, for --max-adapters is 0"
    return not_found(f"adapter {name[:MAX_TEXT]!r} is not loaded; loaded are: {names}")


def failed_precondition(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, message)


def unimplemented(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.UNIMPLEMENTED, message)


def duplicate(request_id: str) -> ServiceError:
    info = error_details_pb2.ErrorInfo(reason="REQUEST_ID_IN_USE", domain=DOMAIN, metadata={"request_id": request_id})
    return ServiceError(grpc.StatusCode.ALREADY_EXISTS, f"request_id {request_id!r} is running already", info)


def not_ready(waiting: int) -> ServiceError:
    return ServiceError(
        grpc.StatusCode.UNAVAILABLE,
        f"no worker has been ready yet, and {waiting} calls wait to be resumed: no more may",
        _retry_info(DEFAULT_RETRY_SECONDS),
        _info("NOT_READY"),
    )


def no_pooling(message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.FAILED_PRECONDITION, message, _info("POOLING"))


def unauthenticated(reason: str, message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.UNAUTHENTICATED, message, _info(reason))


def denied(reason: str, message: str) -> ServiceError:
    return ServiceError(grpc.StatusCode.PERMISSION_DENIED, message, _info(reason))


def internal(request_id: str) -> ServiceError:
    """For what nobody foresaw: the log has the rest under this id."""
    return ServiceError(grpc.StatusCode.INTERNAL, f"internal error, logged as {request_id}")


def from_finish(delta: TokenDelta, grammar_field: str) -> ServiceError | None:
    """The status that a finish reason of the engine ends a call with; None for those that end it well."""
    match delta.finish_reason:
        case None | FinishReason.STOP | FinishReason.LENGTH:
            return None
        case FinishReason.ABORTED:
            return ServiceError(grpc.StatusCode.CANCELLED, delta.detail or "the request was cancelled")
        case FinishReason.DEADLINE:
            return ServiceError(grpc.StatusCode.DEADLINE_EXCEEDED, delta.detail or "the deadline passed")
        case FinishReason.REJECTED:
            return ServiceError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                delta.detail or "the queue is full",
                _retry_info(delta.retry_after or DEFAULT_RETRY_SECONDS),
                _info("QUEUE_FULL"),
            )
        case FinishReason.QUOTA:
            violation = error_details_pb2.QuotaFailure.Violation(
                subject=f"tenant:{delta.tenant}", description=_cut(delta.detail)
            )
            return ServiceError(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                delta.detail or "the quota is used up",
                error_details_pb2.QuotaFailure(violations=[violation]),
                _retry_info(delta.retry_after or DEFAULT_RETRY_SECONDS),
                _info("QUOTA_EXCEEDED"),
            )
        case FinishReason.DRAINING:
            return ServiceError(
                grpc.StatusCode.UNAVAILABLE, delta.detail or "the service takes no new requests", _info("DRAINING")
            )
        case FinishReason.ERROR:
            return ServiceError(
                grpc.StatusCode.INTERNAL, delta.detail or "the request failed in the worker", _info("REQUEST_FAILED")
            )
        case FinishReason.INVALID:
            return invalid([Violation("request", delta.detail or "cannot be served under the engine's limits")])
        case FinishReason.NOT_FOUND:
            return not_found(delta.detail)
        case FinishReason.GRAMMAR:
            return invalid([Violation(grammar_field, delta.detail)])
        case FinishReason.DUPLICATE:
            return duplicate(delta.request_id)


def _retry_info(seconds: float) -> error_details_pb2.RetryInfo:
    info = error_details_pb2.RetryInfo()
    info.retry_delay.FromMilliseconds(max(1, round(seconds * 1000)))
    return info


def _info(reason: str) -> error_details_pb2.ErrorInfo:
    return error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN)


def _cut(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"

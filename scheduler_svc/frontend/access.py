"""Every call of every service, seen from outside its handler: counted, logged, traced.

A line a call. INTERNAL, UNKNOWN and DATA_LOSS are at level error, what callers do wrong at info; calls that went well,
and those that were shed or given up, which come in thousands and which the metrics count, at debug.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final

import grpc
import grpc.aio

from scheduler_svc import logs
from scheduler_svc.frontend.call import Call
from scheduler_svc.frontend.errors import Context
from scheduler_svc.metrics import Observer

log = logging.getLogger(__name__)

_NAMES: Final = {code.value[0]: code.name for code in grpc.StatusCode}
_USUAL: Final = frozenset({"OK", "CANCELLED", "DEADLINE_EXCEEDED", "RESOURCE_EXHAUSTED", "UNAVAILABLE"})
_BROKEN: Final = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})


@dataclass(slots=True)
class Record:
    """One call. `facts` go with every line that is logged on its behalf; nothing of them is text that it sent."""

    method: str  # /service/method
    began: float
    began_at: int  # the same on the world's clock, in nanoseconds
    facts: dict[str, object] = field(default_factory=dict)
    call: Call | None = None  # of a request that was submitted

    def opened(self, call: Call) -> None:
        self.call = call
        self.facts["request_id"] = call.prepared.request_id
        if tenant := call.prepared.submits[0].tenant:
            self.facts["tenant"] = tenant


CURRENT: Final[ContextVar[Record | None]] = ContextVar("record", default=None)
Ended = Callable[[Record, Context, str, float], None]  # record, its context, the code's name, seconds


class Access(grpc.aio.ServerInterceptor):
    """`ended` are told of each call besides."""

    def __init__(self, observer: Observer, clock: Callable[[], float], ended: tuple[Ended, ...] = ()) -> None:
        self._observer, self._clock, self._ended = observer, clock, ended
        self._wrapped: dict[str, tuple[Any, Any]] = {}  # by method: its handler, and the same as it is served

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        handler, method = await continuation(handler_call_details), handler_call_details.method
        if handler is None:
            return None  # gRPC says UNIMPLEMENTED by itself; a name that callers make up is nothing to count by
        known = self._wrapped.get(method)
        if known is None or known[0] is not handler:
            known = self._wrapped[method] = (handler, self._wrap(method, handler))
        return known[1]

    def _wrap(self, method: str, handler: Any) -> Any:
        if handler.request_streaming:
            kind, make = handler.stream_stream, grpc.stream_stream_rpc_method_handler
        elif handler.response_streaming:
            kind, make = handler.unary_stream, grpc.unary_stream_rpc_method_handler
        else:
            kind, make = handler.unary_unary, grpc.unary_unary_rpc_method_handler

        async def observed(request: Any, context: Context) -> Any:
            return await self._run(method, kind, request, context)

        return make(observed, handler.request_deserializer, handler.response_serializer)

    async def _run(self, method: str, behaviour: Any, request: Any, context: Context) -> Any:
        record = Record(method, self._clock(), time.time_ns())
        CURRENT.set(record)  # in the task of this call alone
        logs.CALL.set(record.facts)
        code = "UNKNOWN"
        try:
            response = await behaviour(request, context)
            code = "CANCELLED" if context.cancelled() else _code(context)
            return response
        except asyncio.CancelledError:
            left = context.time_remaining()
            code = "DEADLINE_EXCEEDED" if left is not None and left <= 0 else "CANCELLED"
            raise
        except grpc.aio.AbortError:
            code = _code(context)
            raise
        finally:
            self._end(record, context, code)

    def _end(self, record: Record, context: Context, code: str) -> None:
        seconds = self._clock() - record.began
        self._observer.call_ended(record.method, code)
        for ended in self._ended:
            ended(record, context, code, seconds)
        level = logging.DEBUG if code in _USUAL else logging.ERROR if code in _BROKEN else logging.INFO
        if log.isEnabledFor(level):
            log.log(level, "call", extra=logs.about(**_facts(record, context, code, seconds)))


def _facts(record: Record, context: Context, code: str, seconds: float) -> dict[str, object]:
    facts: dict[str, object] = {
        "method": record.method,
        "code": code,
        "seconds": round(seconds, 6),
        "peer": context.peer(),
    }
    if call := record.call:
        streams = call.facts()
        facts["prompt_tokens"] = call.prepared.prompt_len
        facts["cached_tokens"] = max(stream.cached_tokens for stream in streams)
        facts["output_tokens"] = sum(stream.output_tokens for stream in streams)
    return facts


def _code(context: Context) -> str:
    """Of a handler that has ended. What its annotation does not say: a number, or None where nobody set one."""
    code: Any = context.code()
    return "OK" if code is None else code.name if isinstance(code, grpc.StatusCode) else _NAMES.get(code, "UNKNOWN")

"""gRPC handlers over raw bytes.

Left to the library, bytes that do not parse end a call as UNKNOWN with class names in it, before any code of ours runs.
So every method here takes bytes and parses them itself, and whatever a method did not foresee becomes INTERNAL, logged.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

import grpc
import grpc.aio
from google.protobuf.message import DecodeError, Message

from scheduler_svc.frontend.errors import Context, ServiceError, internal, undecodable

Request = TypeVar("Request", bound=Message)
UnaryMethod: TypeAlias = Callable[[Request, Context], Awaitable[Message]]
StreamMethod: TypeAlias = Callable[[Request, Context], Awaitable[None]]  # writes to the context itself
BidiMethod: TypeAlias = Callable[[AsyncIterator[Request], Context], AsyncIterator[Message]]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"

log = logging.getLogger(__name__)


def unary(request_type: type[Request], method: UnaryMethod[Request]) -> Handler:
    async def handle(data: bytes, context: Context) -> bytes:
        response = b""  # stays so if the client left meanwhile: nobody reads it

        async def run() -> None:
            nonlocal response
            response = (await method(parse(request_type, data), context)).SerializeToString()

        await _guard(run, context)
        return response

    return grpc.unary_unary_rpc_method_handler(handle)


def server_stream(request_type: type[Request], method: StreamMethod[Request]) -> Handler:
    """`method` writes serialized messages with `context.write`, so that it decides how many tokens make a message."""

    async def handle(data: bytes, context: Context) -> None:
        await _guard(lambda: method(parse(request_type, data), context), context)

    return grpc.unary_stream_rpc_method_handler(handle)


def bidi_stream(request_type: type[Request], method: BidiMethod[Request]) -> Handler:
    async def handle(chunks: AsyncIterator[bytes], context: Context) -> None:
        async def requests() -> AsyncIterator[Request]:
            async for data in chunks:
                yield parse(request_type, data)

        async def run() -> None:
            async for response in method(requests(), context):
                await context.write(response.SerializeToString())

        await _guard(run, context)

    return grpc.stream_stream_rpc_method_handler(handle)


def parse(request_type: type[Request], data: bytes) -> Request:
    """Raises ServiceError INVALID_ARGUMENT for bytes that are no such message."""
    try:
        return request_type.FromString(data)
    except DecodeError:
        raise undecodable(request_type.DESCRIPTOR.full_name) from None


async def _guard(run: Callable[[], Awaitable[None]], context: Context) -> None:
    try:
        await run()
    except ServiceError as error:
        await error.abort(context)
    except grpc.aio.AbortError:
        raise
    except Exception:
        if context.done():
            return  # the client left while something was being written to it
        token = uuid.uuid4().hex
        log.exception("unforeseen in a handler, told to the client as %s", token)
        await internal(token).abort(context)

"""Server reflection under both names: v1, which new tools ask for, and v1alpha, which is all that the library has.

The messages of both are the same on the wire.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any, Final

import grpc
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from google.protobuf.message import Message
from grpc_reflection.v1alpha.reflection import SERVICE_NAME as V1ALPHA
from grpc_reflection.v1alpha.reflection import aio
from grpc_reflection.v1alpha.reflection_pb2 import ServerReflectionRequest as Request

from scheduler_svc.frontend import rpc
from scheduler_svc.frontend.errors import Context

V1: Final = V1ALPHA.replace(".v1alpha.", ".v1.")


class _Pool:
    """The default pool, which also finds a method's file: by itself it knows none, and ghz asks for nothing else."""

    def __getattr__(self, name: str) -> Any:
        return getattr(descriptor_pool.Default(), name)

    def FindFileContainingSymbol(self, symbol: str) -> FileDescriptor:
        pool = descriptor_pool.Default()
        try:
            return pool.FindFileContainingSymbol(symbol)
        except KeyError:
            service, _, method = symbol.rpartition(".")
            return pool.FindServiceByName(service).methods_by_name[method].containing_service.file


def handlers(services: Sequence[str]) -> list[grpc.GenericRpcHandler]:
    servicer: Any = aio.ReflectionServicer([*services, V1ALPHA], _Pool())

    def answer(requests: AsyncIterator[Request], context: Context) -> AsyncIterator[Message]:
        responses: AsyncIterator[Message] = servicer.ServerReflectionInfo(requests, context)
        return responses

    method = rpc.bidi_stream(Request, answer)
    return [grpc.method_handlers_generic_handler(name, {"ServerReflectionInfo": method}) for name in (V1, V1ALPHA)]

"""channelz v1: gRPC's own view of its servers, sockets and calls."""

from __future__ import annotations

from typing import Final

import grpc
from google.protobuf.message import Message
from grpc_channelz.v1 import channelz_pb2
from grpc_channelz.v1._servicer import ChannelzServicer

from scheduler_svc.frontend import rpc
from scheduler_svc.frontend.errors import Context, ServiceError

SERVICE: Final = channelz_pb2.DESCRIPTOR.services_by_name["Channelz"].full_name
OPTION: Final = ("grpc.enable_channelz", 1)  # of the server that is to be seen

_METHODS: Final[dict[str, type[Message]]] = {
    "GetTopChannels": channelz_pb2.GetTopChannelsRequest,
    "GetServers": channelz_pb2.GetServersRequest,
    "GetServer": channelz_pb2.GetServerRequest,
    "GetServerSockets": channelz_pb2.GetServerSocketsRequest,
    "GetChannel": channelz_pb2.GetChannelRequest,
    "GetSubchannel": channelz_pb2.GetSubchannelRequest,
    "GetSocket": channelz_pb2.GetSocketRequest,
}


def handler() -> grpc.GenericRpcHandler:
    methods = {name: rpc.unary(request_type, _method(name)) for name, request_type in _METHODS.items()}
    return grpc.method_handlers_generic_handler(SERVICE, methods)


class _Verdict:
    """Stands for the context in the library's methods, which set a status there and then return nothing."""

    code = grpc.StatusCode.UNKNOWN
    details = ""

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code = code

    def set_details(self, details: str) -> None:
        self.details = details


def _method(name: str) -> rpc.UnaryMethod[Message]:
    """The library's: it asks gRPC's core, which answers at once."""
    answer = getattr(ChannelzServicer, name)

    async def method(request: Message, context: Context) -> Message:
        verdict = _Verdict()
        response: Message | None = answer(request, verdict)
        if response is None:
            raise ServiceError(verdict.code, verdict.details)
        return response

    return method

"""An OTLP collector over gRPC that keeps what it gets."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2 as otlp
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2_grpc
from opentelemetry.proto.trace.v1.trace_pb2 import Span

PATIENCE = 30.0  # seconds, for what must come


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    def __init__(self) -> None:
        self.spans: list[Span] = []
        self.resource: dict[str, Any] = {}
        self._arrived = threading.Condition()
        self._server = grpc.server(ThreadPoolExecutor(2))
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, self._server)  # type: ignore[no-untyped-call]
        self.endpoint = f"http://127.0.0.1:{self._server.add_insecure_port('127.0.0.1:0')}"
        self._server.start()

    def Export(
        self, request: otlp.ExportTraceServiceRequest, context: grpc.ServicerContext
    ) -> otlp.ExportTraceServiceResponse:
        with self._arrived:
            for group in request.resource_spans:
                self.resource = attributes(group.resource)
                for scope in group.scope_spans:
                    self.spans += scope.spans
            self._arrived.notify_all()
        return otlp.ExportTraceServiceResponse()

    def wait_for(self, count: int) -> list[Span]:
        with self._arrived:
            assert self._arrived.wait_for(lambda: len(self.spans) >= count, PATIENCE), f"{len(self.spans)} spans came"
        return self.spans

    def close(self) -> None:
        self._server.stop(None).wait()


def attributes(holder: Any) -> dict[str, Any]:
    def value(any_value: Any) -> Any:
        kind = any_value.WhichOneof("value")
        if kind == "array_value":
            return [value(item) for item in any_value.array_value.values]
        return getattr(any_value, kind)

    return {item.key: value(item.value) for item in holder.attributes}

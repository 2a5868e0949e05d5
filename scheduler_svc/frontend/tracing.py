"""A trace of every request, by OpenTelemetry: the request, and in it queue, prefill and decode of each of its streams.

Spans are made when a call has ended, from the times that it kept anyway, so tracing costs a stream's tokens nothing.
They are sent by the library's own thread in batches; what a collector does not take in time is dropped, never waited
for. A caller's `traceparent` is the parent, and its word on sampling holds.
"""

from __future__ import annotations

import logging
import threading
from importlib.metadata import version
from typing import TYPE_CHECKING, Final

from scheduler_svc.frontend.access import Record
from scheduler_svc.frontend.errors import Context
from scheduler_svc.metrics import StreamFacts

if TYPE_CHECKING:
    from opentelemetry.context import Context as TraceContext
    from opentelemetry.trace import Span
    from opentelemetry.util.types import AttributeValue

log = logging.getLogger(__name__)

_LAST_FLUSH: Final = 3.0  # seconds that the last spans have at the end
_FINE: Final = frozenset({"OK", "CANCELLED"})


class MissingExtraError(Exception):
    """Tracing was asked for, and its packages are not here."""


class Tracer:
    """Raises MissingExtraError."""

    def __init__(self, endpoint: str, model: str) -> None:
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingExtraError(
                f"--otlp-endpoint {endpoint}: {error.name} is missing: pip install 'pagewire[otel]'"
            ) from error
        self._model = model
        self._api, self._propagator = trace, TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "pagewire", "service.version": version("pagewire")})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        exporter = OTLPSpanExporter(endpoint=endpoint, insecure=endpoint.startswith("http:"))
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("pagewire", version("pagewire"))

    def ended(self, record: Record, context: Context, code: str, seconds: float) -> None:
        """For `Access`: of calls that submitted something."""
        call = record.call
        if call is None:
            return
        span = self._tracer.start_span(
            record.method.removeprefix("/"),
            self._parent(context),
            self._api.SpanKind.SERVER,
            self._attributes(record, code),
            start_time=record.began_at,
        )
        if span.is_recording():
            if code not in _FINE:
                span.set_status(self._api.StatusCode.ERROR, code)
            submitted = record.began_at + _nanoseconds(call.started - record.began)
            for stream in call.facts():
                self._parts(self._api.set_span_in_context(span), stream, submitted)
        span.end(record.began_at + _nanoseconds(seconds))

    def close(self) -> None:
        """Sends what is left. In a thread that nobody waits for: the library tries a dead collector for a minute."""
        sending = threading.Thread(target=self._provider.shutdown, daemon=True)
        sending.start()
        sending.join(_LAST_FLUSH)
        if sending.is_alive():
            log.warning("the last spans could not be sent within %g s", _LAST_FLUSH)

    def _parent(self, context: Context) -> TraceContext:
        carrier = {key: value for key, value in context.invocation_metadata() or () if isinstance(value, str)}
        return self._propagator.extract(carrier)

    def _attributes(self, record: Record, code: str) -> dict[str, AttributeValue]:
        assert record.call is not None
        prepared, streams = record.call.prepared, record.call.facts()
        sampling = prepared.submits[0].sampling
        service, _, method = record.method.removeprefix("/").partition("/")
        return {
            "rpc.system": "grpc",
            "rpc.service": service,
            "rpc.method": method,
            "pagewire.status": code,
            "pagewire.request_id": prepared.request_id,
            "pagewire.tenant": prepared.submits[0].tenant,
            "gen_ai.operation.name": "embeddings" if prepared.submits[0].pooling else "text_completion",
            "gen_ai.request.model": self._model,
            "gen_ai.request.max_tokens": sampling.max_tokens,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.choice.count": len(streams),
            "gen_ai.usage.input_tokens": prepared.prompt_len,
            "gen_ai.usage.output_tokens": sum(stream.output_tokens for stream in streams),
            "gen_ai.response.finish_reasons": [stream.finish for stream in streams],
            "pagewire.cached_tokens": max(stream.cached_tokens for stream in streams),
        }

    def _parts(self, parent: TraceContext, stream: StreamFacts, submitted: int) -> None:
        """Of a stream that never had a token only the queue is known, if it was that."""
        ends = [("queue", stream.queued), ("prefill", stream.first_token), ("decode", stream.total)]
        if not stream.output_tokens:
            ends = [("queue", stream.total)]
        since = 0.0
        for name, until in ends:
            span: Span = self._tracer.start_span(
                name,
                parent,
                attributes={"pagewire.index": stream.index, **_sizes(name, stream)},
                start_time=submitted + _nanoseconds(since),
            )
            since = max(since, until)
            span.end(submitted + _nanoseconds(since))


def _sizes(part: str, stream: StreamFacts) -> dict[str, AttributeValue]:
    match part:
        case "prefill":
            return {"pagewire.cached_tokens": stream.cached_tokens}
        case "decode":
            return {"gen_ai.usage.output_tokens": stream.output_tokens, "pagewire.finish": stream.finish}
        case _:
            return {}


def _nanoseconds(seconds: float) -> int:
    return round(seconds * 1e9)

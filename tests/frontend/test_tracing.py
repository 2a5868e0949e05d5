"""Traces, as a collector gets them."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import grpc.aio
import msgspec
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status
from pagewire.v1 import inference_pb2 as pb

from protos.engine_wire import FinishReason, TokenDelta
from scheduler_svc.frontend.server import FrontendConfig
from tests.e2e.service import service as e2e_service
from tests.frontend.collector import Collector, attributes
from tests.frontend.conftest import Service, byte_model, open_service
from tests.frontend.test_generate import ask

ROOT = Path(__file__).parents[2]
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SAMPLED, UNSAMPLED = f"00-{TRACE}-{PARENT}-01", f"00-{TRACE}-{PARENT}-00"
REQUEST = "pagewire.v1.InferenceService/Generate"


@pytest.fixture
def collector() -> Iterator[Collector]:
    made = Collector()
    yield made
    made.close()


@pytest.fixture
async def traced(collector: Collector) -> AsyncIterator[Service]:
    opened = await open_service(byte_model(), FrontendConfig(port=0, otlp_endpoint=collector.endpoint))
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


async def generate(service: Service, request: pb.GenerateRequest, *metadata: tuple[str, str]) -> None:
    [_ async for _ in service.inference.Generate(request, metadata=metadata)]


async def flushed(service: Service) -> None:
    """Stopping sends what is left."""
    await service.channel.close()
    await service.frontend.stop()


def by_name(spans: list[Span]) -> dict[str, Span]:
    assert len({span.name for span in spans}) == len(spans)
    return {span.name: span for span in spans}


async def test_a_request_is_a_span_with_its_parts_in_the_callers_trace(traced: Service, collector: Collector) -> None:
    request = ask("a secret prompt")
    request.request_id = "mine"
    await generate(traced, request, ("traceparent", SAMPLED), ("tenant", "acme"))
    await flushed(traced)
    spans = by_name(collector.wait_for(4))
    assert set(spans) == {REQUEST, "queue", "prefill", "decode"}
    whole = spans[REQUEST]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert (whole.parent_span_id.hex(), whole.kind) == (PARENT, Span.SPAN_KIND_SERVER)
    parts = [spans[name] for name in ("queue", "prefill", "decode")]
    assert all(part.parent_span_id == whole.span_id for part in parts)
    times = [t for part in parts for t in (part.start_time_unix_nano, part.end_time_unix_nano)]
    assert times == sorted(times)
    assert whole.start_time_unix_nano <= times[0]
    assert times[-1] <= whole.end_time_unix_nano
    told = attributes(whole)
    assert (told["pagewire.request_id"], told["pagewire.tenant"], told["pagewire.status"]) == ("mine", "acme", "OK")
    assert (told["gen_ai.usage.input_tokens"], told["gen_ai.usage.output_tokens"]) == (15, 5)
    assert (told["gen_ai.request.model"], told["gen_ai.response.finish_reasons"]) == ("fake", ["length"])
    assert collector.resource["service.name"] == "pagewire"
    assert not any("secret" in str(span) for span in spans.values())


async def test_the_parts_take_the_times_that_the_engine_says(traced: Service, collector: Collector) -> None:
    engine = traced.engine
    advance = engine._advance

    def late(*args: object) -> TokenDelta:
        delta = advance(*args)  # type: ignore[arg-type]
        return msgspec.structs.replace(delta, queued=1e-6)

    engine._advance = late  # type: ignore[method-assign, assignment]
    await generate(traced, ask())
    await flushed(traced)
    queue = by_name(collector.wait_for(4))["queue"]
    assert queue.end_time_unix_nano - queue.start_time_unix_nano == 1000


async def test_each_stream_has_its_own_parts(traced: Service, collector: Collector) -> None:
    await generate(traced, ask(n=3))
    await flushed(traced)
    spans = collector.wait_for(10)
    indices = [attributes(span)["pagewire.index"] for span in spans if span.name == "decode"]
    assert sorted(indices) == [0, 1, 2]
    (whole,) = [span for span in spans if span.name == REQUEST]
    assert not whole.parent_span_id, "nobody above: a trace of its own"


async def test_a_refused_request_only_queued_and_is_an_error(traced: Service, collector: Collector) -> None:
    traced.engine.finish_with = TokenDelta("", 0, [], finish_reason=FinishReason.REJECTED)
    with pytest.raises(grpc.aio.AioRpcError):
        await generate(traced, ask(), ("traceparent", SAMPLED))
    await flushed(traced)
    spans = by_name(collector.wait_for(2))
    assert set(spans) == {REQUEST, "queue"}
    assert spans[REQUEST].status.code == Status.STATUS_CODE_ERROR
    assert attributes(spans[REQUEST])["pagewire.status"] == "RESOURCE_EXHAUSTED"


async def test_a_caller_that_samples_nothing_gets_nothing(traced: Service, collector: Collector) -> None:
    await generate(traced, ask(), ("traceparent", UNSAMPLED))
    await generate(traced, ask(), ("traceparent", "no trace at all"))
    await flushed(traced)
    assert TRACE not in {span.trace_id.hex() for span in collector.wait_for(4)}
    assert len(collector.spans) == 4


async def test_a_collector_that_is_away_costs_no_answer() -> None:
    config = FrontendConfig(port=0, otlp_endpoint="http://127.0.0.1:9")
    service = await open_service(byte_model(), config)
    await generate(service, ask())
    await flushed(service)


async def test_a_real_service_sends_them(collector: Collector) -> None:
    async with e2e_service("fake:", "--otlp-endpoint", collector.endpoint) as running:
        call = running.inference.Generate(ask("hello"), metadata=(("traceparent", SAMPLED),))
        [_ async for _ in call]
        running.process.send_signal(signal.SIGTERM)
        assert await running.wait() == 0, "a drain sends what is left"
    spans = by_name(collector.wait_for(4))
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert set(spans) == {REQUEST, "queue", "prefill", "decode"}


def test_without_the_extra_it_says_what_is_missing() -> None:
    script = (
        "import sys; sys.modules['opentelemetry.sdk'] = None; sys.argv[1:] = "
        "['fake:', '--port', '0', '--otlp-endpoint', 'http://127.0.0.1:9']\n"
        "from scheduler_svc.__main__ import main\nsys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("pagewire: ")]
    assert "pip install 'pagewire[otel]'" in line
    assert "Traceback" not in done.stderr


def test_nothing_of_it_is_loaded_unless_it_is_asked_for() -> None:
    script = "import sys, scheduler_svc.__main__, scheduler_svc.frontend.server; print('opentelemetry' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    assert done.stdout == "False\n"

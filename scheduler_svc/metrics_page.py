"""Metrics for Prometheus: vLLM's names, so that its dashboards and llm-d read them, and `pagewire_…` beside them.

Nothing is counted here. A scrape asks the engine's loop for its stats, which hold the sum of all frontends, and writes
them down; so any one process that has a link can serve the page for all of them, and nothing is paid between scrapes.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Final
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, ProcessCollector, make_wsgi_app
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from protos.engine_wire import EngineStats, FinishReason, Histogram, ServiceStatus

NO_NAME: Final = "(none)"  # the tenant of callers that name none
STATES: Final = ("starting", "loading", "serving", "lost")
REFUSALS: Final = {
    FinishReason.REJECTED: "queue_full",
    FinishReason.QUOTA: "quota",
    FinishReason.DEADLINE: "deadline",
    FinishReason.DRAINING: "draining",
    FinishReason.INVALID: "invalid",
    FinishReason.GRAMMAR: "grammar",
    FinishReason.DUPLICATE: "duplicate",
}
FINISHES: Final = ("stop", "length", "abort", "error")


class Page(Collector):
    """`status` is asked in the scraping thread. `cache` are the labels of vLLM's cache_config_info."""

    def __init__(self, status: Callable[[], ServiceStatus], model: str, cache: Mapping[str, str]) -> None:
        self._status, self._cache = status, cache
        self._labels = {"model_name": model, "engine": "0"}

    def describe(self) -> list[Metric]:
        """Nothing, so that registering it asks nobody."""
        return []

    def collect(self) -> Iterator[Metric]:
        status = self._status()
        yield from self._as_vllm(status)
        yield from self._streams(status)
        yield from _engine(status)
        yield from _workers(status)
        yield from _tenants(status)
        yield from _calls(status)

    def _as_vllm(self, status: ServiceStatus) -> Iterator[Metric]:
        stats, frontends = status.stats, status.frontends
        used = stats.owned_blocks + stats.fenced_blocks
        usage = used / stats.num_blocks if stats.num_blocks else 0.0
        yield self._gauge("num_requests_running", "Streams that run.", stats.running)
        yield self._gauge("num_requests_waiting", "Streams that wait.", stats.waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of the KV blocks that streams use, 0 to 1.", usage)
        for name, text, value in (
            ("prompt_tokens", "Prompt tokens of the streams that began.", stats.prompt_tokens),
            ("generation_tokens", "Tokens that were generated.", stats.generated_tokens),
            ("prefix_cache_queries", "Prompt tokens that were looked for in the prefix cache.", stats.prompt_tokens),
            ("prefix_cache_hits", "… and found there.", stats.cached_tokens),
            ("num_preemptions", "Streams that gave their blocks to others for a while.", stats.preemptions),
            ("spec_decode_num_drafts", "Rows of steps in which proposed tokens were verified.", stats.draft_rows),
            ("spec_decode_num_draft_tokens", "Tokens that were proposed, and verified.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "… and were right.", sum(stats.accepted_at)),
        ):
            yield _counter(f"vllm:{name}", text, {(): value}, (), self._labels)
        places: dict[tuple[str, ...], float] = {(str(i),): count for i, count in enumerate(stats.accepted_at)}
        text, name = "Accepted tokens by their place among those proposed.", "spec_decode_num_accepted_tokens_per_pos"
        yield _counter(f"vllm:{name}", text, places, ("position",), self._labels)
        finished = dict.fromkeys(FINISHES, 0) | dict(frontends.finished)
        by_reason: dict[tuple[str, ...], float] = {(reason,): count for reason, count in finished.items()}
        labels = ("finished_reason",)
        yield _counter("vllm:request_success", "Streams by how they ended.", by_reason, labels, self._labels)
        cache = {**self._cache, "num_gpu_blocks": str(stats.num_blocks), "engine": "0"}
        info = GaugeMetricFamily("vllm:cache_config_info", "The KV cache; always 1.", labels=list(cache))
        info.add_metric(list(cache.values()), 1.0)
        yield info

    def _streams(self, status: ServiceStatus) -> Iterator[Metric]:
        stats, seen = status.stats, status.frontends
        for name, text, histogram in (
            ("time_to_first_token_seconds", "From a call's begin to a stream's first token.", seen.first_token),
            ("inter_token_latency_seconds", "Between two tokens; those of one message share.", seen.between_tokens),
            ("e2e_request_latency_seconds", "From a call's begin to a stream's end.", seen.whole),
            ("request_queue_time_seconds", "Of finished streams: before they ran.", seen.queue),
            ("request_prefill_time_seconds", "… until their first token.", seen.prefill),
            ("request_decode_time_seconds", "… from there to the end.", seen.decode),
            ("request_prompt_tokens", "Prompt tokens of a finished stream.", seen.prompt_tokens),
            ("request_generation_tokens", "Output tokens of a finished stream.", seen.output_tokens),
            ("iteration_tokens_total", "Positions that a step computes at most.", stats.step_tokens),
        ):
            yield _histogram(f"vllm:{name}", text, histogram, self._labels)

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(f"vllm:{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family


def _engine(status: ServiceStatus) -> Iterator[Metric]:
    stats, ready = status.stats, status.ready
    yield GaugeMetricFamily("pagewire_serving", "1 while health says SERVING.", float(status.serving))
    yield GaugeMetricFamily("pagewire_draining", "1 while no new requests are taken.", float(stats.draining))
    yield GaugeMetricFamily("pagewire_waiting_tokens", "Tokens of the streams that wait.", stats.waiting_tokens)
    yield CounterMetricFamily("pagewire_steps", "Steps that were planned.", stats.steps)
    yield CounterMetricFamily("pagewire_preemptions", "See vllm:num_preemptions_total.", stats.preemptions)
    yield CounterMetricFamily("pagewire_recoveries", "Worker deaths that were survived.", stats.recoveries)
    yield _histogram("pagewire_queue_wait_seconds", "Of the streams that began: before they ran.", stats.queue_wait)
    yield _histogram("pagewire_step_seconds", "Of a step, as the worker measured.", stats.step_seconds)
    yield _histogram("pagewire_step_rows", "Streams in a step.", stats.step_rows)
    refused: dict[tuple[str, ...], float] = {(reason,): 0.0 for reason in REFUSALS.values()}
    refused |= {(REFUSALS[reason],): count for reason, count in stats.refused if reason in REFUSALS}
    yield _counter("pagewire_refused", "Streams that never ran, by why not.", refused, ("reason",))
    blocks = GaugeMetricFamily("pagewire_kv_blocks", "KV blocks by what they are.", labels=["state"])
    for state in ("free", "cached", "owned", "fenced"):
        blocks.add_metric([state], getattr(stats, f"{state}_blocks"))
    yield blocks
    yield from _host_tier(stats)
    build = {"version": version("pagewire")}
    if ready:
        build |= {"backend": ready.backend, "dtype": ready.dtype, "quantization": ready.quantization}
        build |= {"fingerprint": ready.fingerprint, "exact": str(ready.exact).lower()}
    yield InfoMetricFamily("pagewire_build", "What serves.", build)


def _host_tier(stats: EngineStats) -> Iterator[Metric]:
    """All zeros where there is none."""
    tiers: dict[tuple[str, ...], float] = {
        ("device",): stats.cached_tokens - stats.host_cached_tokens,
        ("host",): stats.host_cached_tokens,
    }
    text = "Prompt tokens that were found in the prefix cache, by where: vllm:prefix_cache_hits_total are both."
    yield _counter("pagewire_prefix_cache_hits", text, tiers, ("tier",))
    blocks = GaugeMetricFamily("pagewire_kv_host_blocks", "Blocks of the second tier.", labels=["state"])
    blocks.add_metric(["free"], stats.num_host_blocks - stats.cached_host_blocks)
    blocks.add_metric(["cached"], stats.cached_host_blocks)
    yield blocks
    copies: dict[tuple[str, ...], float] = {
        ("to_host",): stats.copied_to_host,
        ("to_device",): stats.copied_to_device,
    }
    yield _counter("pagewire_kv_copied_blocks", "Blocks copied between the tiers.", copies, ("direction",))


def _workers(status: ServiceStatus) -> Iterator[Metric]:
    states = GaugeMetricFamily("pagewire_worker_state", "1 for the state that it is in.", labels=["worker", "state"])
    steps = CounterMetricFamily("pagewire_worker_steps", "Steps that it answered.", labels=["worker"])
    busy = CounterMetricFamily("pagewire_worker_busy_seconds", "Seconds that those took.", labels=["worker"])
    losses = CounterMetricFamily("pagewire_worker_losses", "Processes lost in its place.", labels=["worker"])
    for place, worker in enumerate(status.workers):
        for state in STATES:
            states.add_metric([str(place), state], float(state == worker.state))
    for place, figures in enumerate(status.figures):
        steps.add_metric([str(place)], figures.steps)
        busy.add_metric([str(place)], figures.busy_seconds)
        losses.add_metric([str(place)], figures.losses)
    yield from (states, steps, busy, losses)


def _tenants(status: ServiceStatus) -> Iterator[Metric]:
    """The engine bounds how many there are."""
    tokens = CounterMetricFamily("pagewire_tenant_tokens", "Tokens, by kind.", labels=["tenant", "kind"])
    requests = CounterMetricFamily("pagewire_tenant_requests", "Streams let into the queue.", labels=["tenant"])
    refused = CounterMetricFamily("pagewire_tenant_refused", "Streams that never ran.", labels=["tenant"])
    running = GaugeMetricFamily("pagewire_tenant_running", "Streams that run.", labels=["tenant"])
    waiting = GaugeMetricFamily("pagewire_tenant_waiting", "Streams that wait.", labels=["tenant"])
    for tenant in status.stats.tenants:
        name = tenant.name or NO_NAME
        tokens.add_metric([name, "prompt"], tenant.prompt_tokens)
        tokens.add_metric([name, "output"], tenant.output_tokens)
        requests.add_metric([name], tenant.requests)
        refused.add_metric([name], tenant.refused)
        running.add_metric([name], tenant.running)
        waiting.add_metric([name], tenant.waiting)
    yield from (tokens, requests, refused, running, waiting)


def _calls(status: ServiceStatus) -> Iterator[Metric]:
    calls: dict[tuple[str, ...], float] = {}
    for key, count in status.frontends.calls:
        path, _, code = key.rpartition(" ")
        service, _, method = path.removeprefix("/").partition("/")
        calls[service, method, code] = count
    labels = ("grpc_service", "grpc_method", "grpc_code")
    yield _counter("grpc_server_handled", "Calls that ended, by method and status.", calls, labels)
    yield GaugeMetricFamily("pagewire_open_calls", "Generate calls that are open.", status.frontends.open_calls)


def _counter(
    name: str,
    text: str,
    values: Mapping[tuple[str, ...], float],
    labels: tuple[str, ...],
    constant: Mapping[str, str] | None = None,
) -> Metric:
    constant = constant or {}
    family = CounterMetricFamily(name, text, labels=[*constant, *labels])
    for own, value in values.items():
        family.add_metric([*constant.values(), *own], value)
    return family


def _histogram(name: str, text: str, histogram: Histogram, labels: Mapping[str, str] | None = None) -> Metric:
    labels = labels or {}
    family = HistogramMetricFamily(name, text, labels=list(labels))
    buckets: list[tuple[str, float]] = []
    count = 0
    for bound, own in zip((*map(str, histogram.bounds), "+Inf"), histogram.counts or (0,), strict=True):
        count += own
        buckets.append((bound, count))
    family.add_metric(list(labels.values()), buckets, histogram.total)
    return family


class _Handler(WSGIRequestHandler):
    timeout = 10.0  # seconds for a request to come

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: a scrape is no event."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True

    def server_bind(self) -> None:
        """Without the look-up of this host's name, which may take seconds."""
        TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _ServerV6(_Server):
    address_family = socket.AF_INET6


class PageServer:
    """A page at http://host:port/metrics, answered by threads of its own. Raises OSError where it cannot listen."""

    def __init__(self, page: Page, host: str, port: int) -> None:
        registry = CollectorRegistry(auto_describe=False)
        registry.register(page)
        ProcessCollector(registry=registry)
        answer = make_wsgi_app(registry)

        def as_text(environ: dict[str, Any], start_response: Any) -> Any:
            """Never OpenMetrics: there the library writes `vllm_` for `vllm:`, and no dashboard finds it."""
            environ.pop("HTTP_ACCEPT", None)
            return answer(environ, start_response)

        kind = _ServerV6 if ":" in host else _Server
        self._server = make_server(host, port, as_text, kind, _Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, name="metrics-page", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

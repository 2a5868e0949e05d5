"""The page for Prometheus, scraped over HTTP: names, labels and numbers."""

from __future__ import annotations

import asyncio
import urllib.request
from collections.abc import AsyncIterator

import pytest
from prometheus_client.parser import text_string_to_metric_families

from protos.engine_wire import EngineStats, FinishReason, Histogram, TenantFigures
from scheduler_svc.frontend.server import Frontend, FrontendConfig, PortInUseError
from tests.e2e.service import free_port
from tests.frontend.conftest import Service, byte_model, open_service
from tests.frontend.scripted import ScriptedEngine
from tests.frontend.test_generate import ask, fails, run

LABELS = (("engine", "0"), ("model_name", "fake"))
# As Prometheus 2.42 asks. What the library answers to that in OpenMetrics has no colon in any name.
ACCEPT = "application/openmetrics-text;version=1.0.0,application/openmetrics-text;version=0.0.1;q=0.75,text/plain;q=0.5"
Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]

# What dashboards for vLLM and llm-d ask for.
VLLM = {
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:iteration_tokens_total_bucket",
    "vllm:request_success_total",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:spec_decode_num_drafts_total",
    "vllm:spec_decode_num_draft_tokens_total",
    "vllm:spec_decode_num_accepted_tokens_total",
}


@pytest.fixture
async def seen() -> AsyncIterator[Service]:
    opened = await open_service(byte_model(), FrontendConfig(port=0, metrics_port=free_port()))
    yield opened
    await opened.channel.close()
    await opened.frontend.stop()


async def scrape(service: Service) -> Samples:
    port = service.frontend._core.config.metrics_port

    def read() -> str:
        request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers={"Accept": ACCEPT})
        with urllib.request.urlopen(request, timeout=30) as response:
            text: str = response.read().decode()
            return text

    text = await asyncio.to_thread(read)
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


async def test_vllms_names_are_there_with_its_labels(seen: Service) -> None:
    samples = await scrape(seen)
    assert {name for name, _ in samples} >= VLLM
    for name, labels in samples:
        if name.startswith("vllm:") and name != "vllm:cache_config_info":
            assert dict(labels).items() >= dict(LABELS).items(), name
    (cache,) = [dict(labels) for name, labels in samples if name == "vllm:cache_config_info"]
    assert (cache["block_size"], cache["num_gpu_blocks"], cache["enable_prefix_caching"]) == ("32", "63", "True")


async def test_the_engines_numbers_are_those_of_its_stats(seen: Service) -> None:
    seen.engine.stats = EngineStats(
        running=3,
        waiting=2,
        num_blocks=100,
        owned_blocks=20,
        fenced_blocks=5,
        free_blocks=75,
        steps=7,
        preemptions=4,
        recoveries=1,
        prompt_tokens=50,
        cached_tokens=10,
        generated_tokens=60,
        queue_wait=Histogram((1.0, 2.0), (3, 0, 1), 9.5),
        refused=((FinishReason.QUOTA, 2), (FinishReason.REJECTED, 5)),
        tenants=[TenantFigures("", 1, 0, 1, 0, 10, 20), TenantFigures('a"b\\', 2, 2, 5, 3, 40, 40)],
        host_cached_tokens=4,
        num_host_blocks=30,
        cached_host_blocks=12,
        copied_to_host=15,
        copied_to_device=3,
        draft_rows=9,
        draft_tokens=30,
        accepted_at=(8, 5, 1),
    )
    samples = await scrape(seen)
    for name, value in {
        "vllm:num_requests_running": 3,
        "vllm:num_requests_waiting": 2,
        "vllm:kv_cache_usage_perc": 0.25,
        "vllm:prompt_tokens_total": 50,
        "vllm:generation_tokens_total": 60,
        "vllm:prefix_cache_queries_total": 50,
        "vllm:prefix_cache_hits_total": 10,
        "vllm:num_preemptions_total": 4,
        "vllm:spec_decode_num_drafts_total": 9,
        "vllm:spec_decode_num_draft_tokens_total": 30,
        "vllm:spec_decode_num_accepted_tokens_total": 14,
    }.items():
        assert samples[name, LABELS] == value, name
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    by_place = {dict(labels)["position"]: value for (n, labels), value in samples.items() if n == name}
    assert by_place == {"0": 8, "1": 5, "2": 1}
    assert samples["pagewire_recoveries_total", ()] == 1
    wait = "pagewire_queue_wait_seconds"
    buckets = [samples[f"{wait}_bucket", (("le", le),)] for le in ("1.0", "2.0", "+Inf")]
    assert (buckets, samples[f"{wait}_sum", ()], samples[f"{wait}_count", ()]) == ([3, 3, 4], 9.5, 4)
    refused = {
        dict(labels)["reason"]: value for (name, labels), value in samples.items() if name == "pagewire_refused_total"
    }
    assert refused == {
        "queue_full": 5,
        "quota": 2,
        "deadline": 0,
        "draining": 0,
        "invalid": 0,
        "duplicate": 0,
        "grammar": 0,
    }
    assert samples["pagewire_tenant_tokens_total", (("kind", "output"), ("tenant", 'a"b\\'))] == 40
    assert samples["pagewire_tenant_tokens_total", (("kind", "prompt"), ("tenant", "(none)"))] == 10
    assert samples["pagewire_kv_blocks", (("state", "owned"),)] == 20
    assert [samples["pagewire_prefix_cache_hits_total", (("tier", tier),)] for tier in ("device", "host")] == [6, 4]
    assert [samples["pagewire_kv_host_blocks", (("state", state),)] for state in ("free", "cached")] == [18, 12]
    copied = "pagewire_kv_copied_blocks_total"
    assert [samples[copied, (("direction", way),)] for way in ("to_host", "to_device")] == [15, 3]


async def test_the_clients_numbers_are_those_of_the_calls(seen: Service) -> None:
    await run(seen, ask("hello", n=2))
    await fails(seen, ask(""))
    samples = await scrape(seen)
    assert samples["vllm:time_to_first_token_seconds_count", LABELS] == 2
    assert samples["vllm:inter_token_latency_seconds_count", LABELS] == 8
    assert samples["vllm:request_generation_tokens_sum", LABELS] == 10
    finished = {dict(labels)["finished_reason"]: v for (name, labels), v in samples.items() if "success" in name}
    assert finished == {"stop": 0, "length": 2, "abort": 0, "error": 0}
    for code, count in (("OK", 1), ("INVALID_ARGUMENT", 1)):
        labels = {"grpc_service": "pagewire.v1.InferenceService", "grpc_method": "Generate", "grpc_code": code}
        assert samples["grpc_server_handled_total", tuple(sorted(labels.items()))] == count


async def test_a_worker_is_in_one_state(seen: Service) -> None:
    for serving, state in ((True, "serving"), (False, "lost")):
        seen.engine.status = lambda *_, s=serving: ScriptedEngine.status(seen.engine, s)  # type: ignore[method-assign]
        samples = await scrape(seen)
        states = {dict(labels)["state"]: v for (name, labels), v in samples.items() if name == "pagewire_worker_state"}
        assert states == {**dict.fromkeys(("starting", "loading", "serving", "lost"), 0), state: 1}
        assert samples["pagewire_serving", ()] == serving


async def test_a_scrape_asks_and_nothing_is_asked_between_scrapes(seen: Service) -> None:
    asked = 0
    answer = seen.engine._answer

    def count(*args: object, **kwargs: object) -> None:
        nonlocal asked
        asked += 1
        answer(*args, **kwargs)  # type: ignore[arg-type]

    seen.engine._answer = count  # type: ignore[method-assign]
    await run(seen, ask())
    assert asked == 0
    await asyncio.gather(*(scrape(seen) for _ in range(3)))
    assert asked == 3


async def test_a_taken_metrics_port_is_one_clear_line(seen: Service) -> None:
    config = seen.frontend._core.config
    second = Frontend(seen.link, FrontendConfig(port=0, metrics_port=config.metrics_port), byte_model())
    with pytest.raises(PortInUseError, match=f"127.0.0.1:{config.metrics_port}.*in use") as caught:
        await second.start()
    assert "\n" not in str(caught.value)
    await second.stop()

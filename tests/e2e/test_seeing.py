"""What a real service tells of itself, under load and while its worker dies."""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

from pagewire.v1 import admin_pb2, inference_pb2
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.service import Service, free_port, generate, service


def _request(tokens: int, seed: int = 1) -> inference_pb2.GenerateRequest:
    sampling = inference_pb2.SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=True)
    return inference_pb2.GenerateRequest(text=f"prompt {seed}", sampling=sampling)


async def _scrape(port: int) -> dict[str, float]:
    """By name, summed over labels."""

    def read() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=60) as response:
            text: str = response.read().decode()
            return text

    sums: dict[str, float] = {}
    for family in text_string_to_metric_families(await asyncio.to_thread(read)):
        for sample in family.samples:
            sums[sample.name] = sums.get(sample.name, 0.0) + sample.value
    return sums


async def test_metrics_follow_the_load_and_a_dead_worker() -> None:
    port = free_port()
    async with service("fake:delay_ms=2", "--metrics-port", str(port)) as running:
        outputs = asyncio.gather(*(generate(running, _request(200, seed)) for seed in range(8)))
        await running.until_stats(lambda stats: stats.generated_tokens > 50, "tokens")
        await running.kill_worker()
        tokens = sum(len(output.token_ids) for output in await outputs)
        await running.until_quiet()
        found = await _scrape(port)
    assert found["vllm:generation_tokens_total"] == tokens == 8 * 200
    assert found["vllm:request_success_total"] == 8
    assert found["pagewire_recoveries_total"] == found["pagewire_worker_losses_total"] == 1
    assert found["vllm:time_to_first_token_seconds_count"] == found["pagewire_queue_wait_seconds_count"] == 8
    assert found["vllm:inter_token_latency_seconds_count"] == tokens - 8
    assert found["pagewire_tenant_tokens_total"] == tokens + found["vllm:prompt_tokens_total"]
    assert found["pagewire_worker_steps_total"] == found["pagewire_step_seconds_count"]
    assert found["process_resident_memory_bytes"] > 0
    assert found["pagewire_open_calls"] == 0


async def test_stats_tell_of_workers_losses_and_tenants() -> None:
    async with service("fake:delay_ms=2,load_ms=50") as running:
        call = running.inference.Generate(_request(100), metadata=(("tenant", "acme"),))
        [_ async for _ in call]
        pid = await running.kill_worker()
        await running.worker_pid()
        stats = await running.stats()
    (worker,) = stats.workers
    assert (worker.losses, stats.recoveries) == (1, 1)
    assert worker.steps >= 100
    assert 0 <= worker.state_seconds < stats.uptime_seconds
    (loss,) = stats.losses
    assert (loss.pid, loss.reason) == (pid, "it was killed by SIGKILL")
    (tenant,) = stats.tenants
    assert (tenant.name, tenant.requests, tenant.output_tokens) == ("acme", 1, 100)


async def test_the_configuration_of_a_real_service() -> None:
    async with service("fake:", "--max-num-seqs", "7") as running:
        told = await running.admin.GetConfig(admin_pb2.GetConfigRequest())
    settings = {setting.name: setting.value for setting in told.settings}
    assert settings["loop.engine.max_num_seqs"] == "7"
    assert settings["port"] == str(running.port)
    assert settings["worker.backend"] == "fake"


async def test_access_lines_at_debug_hold_the_request_and_no_prompt() -> None:
    async with service("fake:", "--log-format", "json", "--log-level", "debug") as running:
        request = _request(5)
        request.request_id = "mine"
        call = running.inference.Generate(request, metadata=(("tenant", "acme"),))
        [_ async for _ in call]
        entries = await _lines(running)
    (line,) = [entry for entry in entries if entry.get("method", "").endswith("/Generate")]
    assert (line["request_id"], line["tenant"], line["code"], line["level"]) == ("mine", "acme", "OK", "debug")
    assert line["output_tokens"] == 5
    assert not any("prompt 1" in json.dumps(entry) for entry in entries)


async def _lines(running: Service) -> list[dict[str, Any]]:
    await running.until_quiet()
    return [json.loads(line) for line in running.log.read_text().splitlines()]

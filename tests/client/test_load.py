"""Workloads: what is sent, and that the figures are those of what came back."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from client import load
from client.aio import Client
from client.commands.bench import _plot
from tests.client.scripted import ScriptedServer

SMALL = load.Workload("b", "small", concurrency=3, requests=7, prompt_tokens=5, output_tokens=4, shared_tokens=2)


class Recorder:
    """A target that answers in messages of two tokens."""

    def __init__(self, short: bool = False) -> None:
        self.prompts: list[list[int]] = []
        self.running = self.most = 0
        self.short = short

    async def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        self.prompts.append(prompt)
        self.running += 1
        self.most = max(self.most, self.running)
        for _ in range(0, output_tokens - 2 * self.short, 2):
            await asyncio.sleep(0)
            yield 2
        self.running -= 1


@pytest.mark.parametrize("workload", load.WORKLOADS.values(), ids=list(load.WORKLOADS))
async def test_prompts_have_the_right_length_and_are_new(server: ScriptedServer, workload: load.Workload) -> None:
    async with Client(server.address) as client:
        first = await load.prompts(client, workload, seed=1)
        again = await load.prompts(client, workload, seed=1)
        other = await load.prompts(client, workload, seed=2)
    assert first == again
    assert len(first) == workload.requests
    assert {len(prompt) for prompt in first} == {workload.shared_tokens + workload.prompt_tokens}
    assert len({tuple(prompt[workload.shared_tokens :]) for prompt in first}) == workload.requests
    assert len({tuple(prompt[: workload.shared_tokens]) for prompt in first}) == 1
    assert not {tuple(prompt) for prompt in first} & {tuple(prompt) for prompt in other}


async def test_every_prompt_is_sent_once_and_no_more_than_asked_run_at_once() -> None:
    recorder = Recorder()
    prompts = [[i] * 7 for i in range(7)]
    heard: list[int] = []
    result, samples = await load.run(recorder, SMALL, prompts, heard.append)
    assert sorted(recorder.prompts) == prompts
    assert recorder.most == 3
    assert sum(heard) == result.output_tokens == 28
    assert result.prompt_tokens == 49
    assert result.output_tokens_per_second == pytest.approx(28 / result.seconds)
    assert result.total_tokens_per_second == pytest.approx(77 / result.seconds)
    assert all(len(list(sample.gaps())) == 1 for sample in samples), "two messages, one gap"
    assert all(0 < sample.ttft <= result.seconds for sample in samples)


async def test_a_stream_that_ends_early_is_no_result() -> None:
    with pytest.raises(load.ShortStreamError, match="2 tokens came of the 4 asked for"):
        await load.run(Recorder(short=True), SMALL, [[1]])


def test_percentiles_are_by_nearest_rank() -> None:
    assert load.percentiles([i / 1000 for i in range(100, 0, -1)]) == load.Percentiles(50.0, 99.0)
    assert load.percentiles([0.5]) == load.Percentiles(500.0, 500.0)
    assert load.percentiles([]) == load.Percentiles(0.0, 0.0)


def test_the_histogram_counts_everything() -> None:
    lines = _plot("title", [1.0, 1.0, 2.0, 11.0], rows=10, width=4).splitlines()
    assert lines[0] == "title"
    assert lines[1] == "      1.0 ████ 2"
    assert lines[2] == "      2.0 ██ 1"
    assert lines[10] == "     10.0 ██ 1"
    assert _plot("flat", [3.0, 3.0]).splitlines()[1].endswith("2")


def test_pagewire_bench_writes_its_figures(server: ScriptedServer, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    command = [sys.executable, "-m", "client.cli", "bench", "--workload", "a", "--json", str(file), "--seed", "3"]
    done = subprocess.run(
        [*command, "--address", server.address], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(file.read_text())
    assert (figures["workload"], figures["requests"], figures["output_tokens"], figures["seed"]) == ("a", 4, 512, 3)
    assert figures["prompt_tokens"] == 512
    assert all(request.sampling.temperature == 0 and request.sampling.ignore_eos for request in server.requests)
    assert "output tok/s" in done.stdout
    assert "first token, ms" in done.stdout

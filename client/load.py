"""Load: workloads, exact-length prompts of real English, and what a run of one measures.

A target is anything that streams tokens for a prompt of token ids: the service itself, or a peer behind an adapter.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Protocol

from client import api, english, repeating
from client.aio import Client


@dataclass(frozen=True)
class Workload:
    name: str
    title: str
    concurrency: int
    requests: int
    prompt_tokens: int  # own tokens, behind the shared ones
    output_tokens: int
    shared_tokens: int = 0  # at the beginning of every prompt
    repeats: bool = False  # its prompts say what is to be written again


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("a", "latency", concurrency=1, requests=4, prompt_tokens=128, output_tokens=128),
        Workload("b", "throughput", concurrency=16, requests=32, prompt_tokens=128, output_tokens=128),
        Workload("c", "wide", concurrency=32, requests=64, prompt_tokens=256, output_tokens=64),
        Workload("d", "long prefill", concurrency=4, requests=8, prompt_tokens=1500, output_tokens=32),
        Workload("e", "shared prefix", 16, requests=32, prompt_tokens=32, output_tokens=32, shared_tokens=1000),
        Workload("r", "repeating", 1, requests=6, prompt_tokens=320, output_tokens=128, repeats=True),
    )
}


class Target(Protocol):
    """Streams `output_tokens` greedy tokens, past any end token; yields how many tokens each message brought."""

    def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]: ...


class Service:
    """A Pagewire server as a target."""

    def __init__(self, client: Client) -> None:
        self.client = client

    async def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        sampling = api.SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        async with self.client.generate(api.TokenIds(ids=prompt), sampling) as generation:
            async for chunk in generation:
                if isinstance(chunk, api.GenerateDelta) and chunk.token_ids:
                    yield len(chunk.token_ids)


@dataclass
class Sample:
    """One request, by the client's clock, in seconds."""

    prompt_tokens: int
    sent: float = 0.0
    output_tokens: int = 0
    arrivals: list[float] = field(default_factory=list)  # of the messages that brought tokens

    @property
    def ttft(self) -> float:
        return self.arrivals[0] - self.sent

    def gaps(self) -> Iterator[float]:
        """Between one message and the next: what a reader of the stream waits for."""
        return (later - earlier for earlier, later in zip(self.arrivals, self.arrivals[1:], strict=False))


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p99: float


@dataclass(frozen=True)
class Result:
    workload: str
    requests: int
    concurrency: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    output_tokens_per_second: float
    total_tokens_per_second: float  # prompt and output
    ttft_ms: Percentiles
    itl_ms: Percentiles


class ShortStreamError(Exception):
    """A target that did not answer with as many tokens as were asked for: its figures would mean nothing."""


async def prompts(client: Client, workload: Workload, seed: int) -> list[list[int]]:
    """Distinct prompts of exactly the right length, other ones for another seed."""
    if workload.repeats:
        return [await _repeating(client, workload, seed, number) for number in range(workload.requests)]
    ids = await client.tokenize(english.text(seed), add_special_tokens=False)
    needed = workload.shared_tokens + workload.requests * workload.prompt_tokens
    if len(ids) < needed:
        raise ValueError(f"workload {workload.name} needs {needed} tokens of text, there are {len(ids)}")
    shared, own = ids[: workload.shared_tokens], ids[workload.shared_tokens :]
    size = workload.prompt_tokens
    return [shared + own[i * size : (i + 1) * size] for i in range(workload.requests)]


async def _repeating(client: Client, workload: Workload, seed: int, number: int) -> list[int]:
    """A passage, and the beginning of the same passage: what is left of it is as long as the output."""
    kind = repeating.KINDS[number % len(repeating.KINDS)]
    before, between = [await client.tokenize(text, add_special_tokens=False) for text in repeating.FRAMES[kind]]
    size = (workload.prompt_tokens - len(before) - len(between) + workload.output_tokens) // 2
    text = repeating.passages(kind, seed + number)
    passage = (await client.tokenize(text, add_special_tokens=False))[:size]
    return [*before, *passage, *between, *passage][: workload.prompt_tokens]


async def run(
    target: Target, workload: Workload, prompts: list[list[int]], on_token: Callable[[int], None] = lambda tokens: None
) -> tuple[Result, list[Sample]]:
    """Sends the prompts, `concurrency` at once, each as soon as another has ended.

    `on_token` hears how many tokens each message brought. Raises the first request's failure.
    """
    samples: list[Sample] = []
    waiting = iter(prompts)

    async def worker() -> None:
        for prompt in waiting:  # shared by all workers
            sample = Sample(len(prompt), time.perf_counter())
            async for tokens in target.stream(prompt, workload.output_tokens):
                sample.arrivals.append(time.perf_counter())
                sample.output_tokens += tokens
                on_token(tokens)
            if sample.output_tokens != workload.output_tokens:
                raise ShortStreamError(f"{sample.output_tokens} tokens came of the {workload.output_tokens} asked for")
            samples.append(sample)

    started = time.perf_counter()
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(workload.concurrency):
                group.create_task(worker())
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    return _summary(workload, samples, time.perf_counter() - started), samples


def _summary(workload: Workload, samples: list[Sample], seconds: float) -> Result:
    prompt_tokens = sum(sample.prompt_tokens for sample in samples)
    output_tokens = sum(sample.output_tokens for sample in samples)
    return Result(
        workload=workload.name,
        requests=len(samples),
        concurrency=workload.concurrency,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seconds=seconds,
        output_tokens_per_second=output_tokens / seconds,
        total_tokens_per_second=(prompt_tokens + output_tokens) / seconds,
        ttft_ms=percentiles([sample.ttft for sample in samples]),
        itl_ms=percentiles([gap for sample in samples for gap in sample.gaps()]),
    )


def percentiles(seconds: list[float]) -> Percentiles:
    """By nearest rank; of nothing, zero."""
    ordered = sorted(seconds)
    if not ordered:
        return Percentiles(0.0, 0.0)
    return Percentiles(*(1000 * ordered[max(0, -(-len(ordered) * p // 100) - 1)] for p in (50, 99)))

"""Runs as a measurement would have written them."""

from __future__ import annotations

from benchmarks.measure import Measured, Run
from client.load import WORKLOADS, Percentiles, Result


def result(workload: str, rate: float, itl_p99: float = 20.0) -> Result:
    """At `rate` tokens per second, of the kind that the workload counts."""
    about = WORKLOADS[workload]
    prompt_tokens = about.requests * (about.prompt_tokens + about.shared_tokens)
    output_tokens = about.requests * about.output_tokens
    return Result(
        workload=workload,
        requests=about.requests,
        concurrency=about.concurrency,
        prompt_tokens=prompt_tokens,
        output_tokens=output_tokens,
        seconds=1.0,
        output_tokens_per_second=rate if workload in "abc" else rate / 10,
        total_tokens_per_second=rate if workload in "de" else rate * 10,
        ttft_ms=Percentiles(50.0, 90.0),
        itl_ms=Percentiles(10.0, itl_p99),
    )


def run(contestant: str, number: int, *results: Result, start: float | None = 1.0, checkpoint: bool = False) -> Run:
    measured = [Measured(each, 0.02) for each in results]
    return Run(contestant, number, start, start, 300.0, 400.0, 0.004, measured, checkpoint=checkpoint)

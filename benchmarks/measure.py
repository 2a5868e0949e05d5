"""One contestant's round: start, workloads, memory, idleness; and rounds of several in turns."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks import machine
from benchmarks.contestants import Contestant
from benchmarks.process import Started, StartError, running
from benchmarks.targets import TargetError
from client import load

SETTLE = 1.0  # seconds before the idle CPU is looked at
IDLE = 3.0  # seconds
CORES = len(os.sched_getaffinity(0))

PromptBook = dict[tuple[int, str], list[list[int]]]  # by round and workload


@dataclass(frozen=True)
class Measured:
    """A workload's figures, and what our own load client took beside them: CPU seconds per second and core."""

    result: load.Result
    client_share: float


@dataclass(frozen=True)
class Run:
    """One contestant's figures of one round; what is not known of a service that we did not start is None."""

    contestant: str
    round: int
    ready_seconds: float | None  # from launch to SERVING, or /health
    first_token_seconds: float | None  # from launch to the first token of one short request
    started_mib: float | None  # memory of the process tree after the first token
    loaded_mib: float | None  # and after the workloads
    idle_cores: float | None  # CPU seconds a second without any work, after the workloads
    measured: list[Measured]
    failure: str | None = None  # why there are no figures, in one line
    checkpoint: bool = False  # ours, with a model of its own

    def result(self, workload: str) -> load.Result | None:
        return next((each.result for each in self.measured if each.result.workload == workload), None)


def order(contestants: Sequence[Contestant], number: int) -> list[Contestant]:
    """Of one round: nobody is always first, or always behind the same one."""
    turn = number * -(-len(contestants) // 3) % len(contestants)
    turned = [*contestants[turn:], *contestants[:turn]]
    return turned[::-1] if number % 2 else turned


async def one_run(
    contestant: Contestant, workloads: Sequence[load.Workload], book: PromptBook, number: int, patience: float
) -> Run:
    """One start for all workloads, or one for each: then its memory is that of the largest.

    Who does not start, refuses, or needs more than `patience` seconds for a workload has a failure in place of figures.
    """
    parts = [[workload] for workload in workloads] if contestant.tailored else [workloads]
    try:
        runs = [await _session(contestant, part, book, number, patience) for part in parts]
    except (StartError, TargetError, load.ShortStreamError, TimeoutError) as error:
        reason = str(error) or f"a workload took more than {patience:g} s"
        print(f"round {number + 1} {contestant.name} failed: {reason}", file=sys.stderr, flush=True)
        reason = machine.anywhere(reason)
        return Run(contestant.name, number, None, None, None, None, None, [], reason, contestant.checkpoint)
    return replace(
        runs[0],
        started_mib=max(run.started_mib or 0 for run in runs),
        loaded_mib=max(run.loaded_mib or 0 for run in runs),
        idle_cores=max(run.idle_cores or 0 for run in runs),
        measured=[each for run in runs for each in run.measured],
        checkpoint=contestant.checkpoint,
    )


async def _session(
    contestant: Contestant, workloads: Sequence[load.Workload], book: PromptBook, number: int, patience: float
) -> Run:
    slots = max(workload.concurrency for workload in workloads)
    async with (
        running(contestant, patience, slots) as started,
        contestant.speaker.target(started.port) as target,
    ):
        async for _ in target.stream([1, 2, 3, 4], 1):
            pass
        first_token = time.perf_counter() - started.launched
        started_mib = started.memory()
        who = f"round {number + 1} {contestant.name}"
        measured = []
        for each in workloads:
            async with asyncio.timeout(patience):
                measured.append(await one_workload(target, each, book[number, each.name], who))
        loaded_mib = started.memory()
        idle = await _idle(started)
    return Run(contestant.name, number, started.ready_seconds, first_token, started_mib, loaded_mib, idle, measured)


async def one_workload(target: load.Target, workload: load.Workload, prompts: list[list[int]], who: str) -> Measured:
    before = time.process_time()
    result, _ = await load.run(target, workload, prompts)
    share = (time.process_time() - before) / result.seconds / CORES
    print(
        f"{who}, {workload.name}: {result.output_tokens_per_second:.0f} output tok/s,"
        f" {result.total_tokens_per_second:.0f} in all, {result.seconds:.1f} s",
        file=sys.stderr,
        flush=True,
    )
    return Measured(result, share)


async def _idle(started: Started) -> float:
    await asyncio.sleep(SETTLE)
    before, since = started.cpu_seconds(), time.perf_counter()
    await asyncio.sleep(IDLE)
    return (started.cpu_seconds() - before) / (time.perf_counter() - since)

"""A long mixed day in half an hour: `python -m benchmarks.soak --minutes 30` says what it did to the service.

Greedy and seeded streams, conversations, several outputs at once, calls given up, deadlines too short and wrong
requests, all at once; and kill -9 of a worker every minute. The same prompt must bring the same tokens, whatever
happened meanwhile. Memory of every process is sampled, and drawn into NAME.png beside NAME.json.

What the scheduler keeps for crash logs (`--crash-mib`, 16) takes longer than this to fill at a CPU's pace, and would
pass for a leak until then: it gets 2 MiB here, which are full within the first minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import psutil
import uvloop
from matplotlib.figure import Figure
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from benchmarks import contestants, machine
from benchmarks.plot import INK, OURS, bare
from benchmarks.process import MEBIBYTE, Started, running
from client import store

CALLERS = 24
PROMPTS = 64  # distinct ones, over and over
SAMPLE = 2.0  # seconds
WARM = 0.2  # of the time, before memory is expected to be flat
KINDS = ("greedy", "sampled", "chat", "four at once", "given up", "too late", "wrong")
WEIGHTS = (5, 5, 2, 1, 3, 1, 1)
# What each kind may end with, other than well.
EXPECTED = {"too late": {"DEADLINE_EXCEEDED"}, "wrong": {"INVALID_ARGUMENT"}}


@dataclass(frozen=True)
class Moment:
    at: float  # seconds
    scheduler_mib: float
    workers_mib: float
    tokens: int  # generated so far
    recoveries: int


@dataclass
class Day:
    counts: dict[str, Counter[str]] = field(default_factory=lambda: {kind: Counter() for kind in KINDS})
    different: int = 0  # streams that were not what the same request had brought before
    unexpected: list[str] = field(default_factory=list)
    kills: list[float] = field(default_factory=list)
    moments: list[Moment] = field(default_factory=list)
    seen: dict[int, list[int]] = field(default_factory=dict)  # prompt → its greedy or seeded tokens


class Soak:
    def __init__(self, started: Started, seed: int, seconds: float, every: float) -> None:
        self._started, self._rng, self._every = started, random.Random(seed), every
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{started.port}")
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self._began = time.perf_counter()
        self._seconds = seconds
        self.day = Day()

    async def run(self) -> str:
        """All day; then what is left behind, empty for nothing."""
        beside = [asyncio.ensure_future(each) for each in (self._kill(), self._watch())]
        await asyncio.gather(*(self._call_on() for _ in range(CALLERS)))
        for task in beside:
            task.cancel()
        left = await self._left()
        await self._channel.close()
        return left

    def _now(self) -> float:
        return time.perf_counter() - self._began

    async def _stats(self) -> admin_pb2.GetStatsResponse:
        return await self._admin.GetStats(admin_pb2.GetStatsRequest())

    async def _call_on(self) -> None:
        while self._now() < self._seconds:
            kind = self._rng.choices(KINDS, WEIGHTS)[0]
            number = self._rng.randrange(PROMPTS)
            try:
                tokens = await self._call(kind, number)
            except grpc.aio.AioRpcError as error:
                status = error.code().name
                if status not in EXPECTED.get(kind, ()):
                    self.day.unexpected.append(f"{kind}: {status}: {error.details()}")
            else:
                status = "OK"
                if kind in ("greedy", "sampled"):
                    key = 2 * number + (kind == "sampled")
                    self.day.different += self.day.seen.setdefault(key, tokens) != tokens
            self.day.counts[kind][status] += 1

    async def _call(self, kind: str, number: int) -> list[int]:
        leave_after = self._rng.randrange(1, 6) if kind == "given up" else 0
        call = self._inference.Generate(_request(kind, number), timeout=0.05 if kind == "too late" else None)
        tokens: list[int] = []
        messages = 0
        async for response in call:
            tokens += response.delta.token_ids
            messages += 1
            if messages == leave_after:
                call.cancel()
                break
        return tokens

    async def _kill(self) -> None:
        """Until nothing new is asked for: on a slow machine the last streams would never end otherwise."""
        while self._now() + self._every < self._seconds:
            await asyncio.sleep(self._every)
            workers = (await self._stats()).workers
            victim = self._rng.choice(workers)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim.pid, signal.SIGKILL)
                self.day.kills.append(self._now())

    async def _watch(self) -> None:
        scheduler = psutil.Process(self._started.pid)
        while True:
            stats = await self._stats()
            self.day.moments.append(
                Moment(
                    self._now(),
                    scheduler.memory_info().rss / MEBIBYTE,
                    sum(_rss(worker.pid) for worker in stats.workers),
                    stats.generated_tokens,
                    stats.recoveries,
                )
            )
            await asyncio.sleep(SAMPLE)

    async def _left(self) -> str:
        held = ("running", "waiting", "owned_blocks", "fenced_blocks", "open_calls")
        until = time.perf_counter() + 30
        while True:
            stats = await self._stats()
            counts = {name: getattr(stats, name) for name in held if getattr(stats, name)}
            if not counts or time.perf_counter() > until:
                return ", ".join(f"{name} {count}" for name, count in counts.items())
            await asyncio.sleep(0.1)


def _request(kind: str, number: int) -> inference_pb2.GenerateRequest:
    """The same for the same number."""
    rng = random.Random(number)
    sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=rng.randrange(8, 120), ignore_eos=True)
    ids = [rng.randrange(1000, 40_000) for _ in range(rng.choice((4, 40, 150, 600)))]
    request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), sampling=sampling)
    match kind:
        case "sampled":
            sampled = inference_pb2.SamplingParams(temperature=0.9, top_p=0.95, seed=number, presence_penalty=0.5)
            request.sampling.MergeFrom(sampled)
        case "chat":
            message = inference_pb2.ChatMessage(role="user", content=f"Tell me about the number {number}.")
            request.chat.CopyFrom(inference_pb2.ChatMessages(messages=[message]))
        case "four at once":
            request.sampling.n, request.sampling.temperature = 4, 1
        case "too late" | "given up":
            request.sampling.max_tokens = 1000
        case "wrong":
            request.sampling.top_p = 2
    return request


def _rss(pid: int) -> float:
    with contextlib.suppress(psutil.NoSuchProcess, ValueError):
        return float(psutil.Process(pid).memory_info().rss) / MEBIBYTE
    return 0.0


def slope(moments: Sequence[Moment]) -> float:
    """MiB an hour that the scheduler grows, behind the warm-up."""
    flat = [moment for moment in moments if moment.at >= WARM * moments[-1].at]
    if len(flat) < 2:
        return 0.0
    times, sizes = [moment.at for moment in flat], [moment.scheduler_mib for moment in flat]
    return float(np.polyfit(times, sizes, 1)[0] * 3600)


def draw(path: Path, day: Day) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    panels = figure.subplots(3, 1, sharex=True)
    minutes = [moment.at / 60 for moment in day.moments]
    panels[0].plot(minutes, [moment.scheduler_mib for moment in day.moments], color=OURS[0])
    panels[1].plot(minutes, [moment.workers_mib for moment in day.moments], color=OURS[1])
    pairs = list(zip(day.moments, day.moments[1:], strict=False))
    rates = [(b.tokens - a.tokens) / (b.at - a.at) for a, b in pairs]
    panels[2].plot([b.at / 60 for _, b in pairs], rates, color=OURS[2])
    labels = ("scheduler, MiB", "workers, MiB", "output tokens/s")
    for panel, label in zip(panels, labels, strict=True):
        bare(panel)
        panel.set_ylabel(label, fontsize=9, color=INK)
        panel.set_ylim(bottom=0)
        for kill in day.kills:
            panel.axvline(kill / 60, color="#c2452d", linewidth=0.8, linestyle=":")
    panels[2].set_xlabel("minutes; dotted: kill -9 of a worker", fontsize=9, color=INK)
    figure.savefig(path, dpi=130)


def record_of(day: Day) -> dict[str, object]:
    """For a JSON file; without the tokens of each prompt."""
    counts = {kind: dict(counter) for kind, counter in day.counts.items()}  # `asdict` makes nonsense of a Counter
    whole = asdict(replace(day, counts={}, seen={}))
    del whole["seen"]
    return {**whole, "counts": counts, "slope_mib_an_hour": slope(day.moments)}


def _report(day: Day, left: str) -> None:
    for kind, counter in day.counts.items():
        print(f"{kind:13} " + ", ".join(f"{count} {status}" for status, count in counter.most_common()))
    for line in day.unexpected[:10]:
        print(f"UNEXPECTED {line}")
    last = day.moments[-1]
    print(
        f"{len(day.kills)} kills, {last.recoveries} recoveries, {day.different} streams differ, {last.tokens} tokens; "
        f"scheduler {last.scheduler_mib:.0f} MiB, {slope(day.moments):+.1f} MiB an hour; "
        f"{len(day.unexpected)} unexpected; left behind: {left or 'nothing'}"
    )


async def _main(arguments: argparse.Namespace) -> int:
    seed = time.time_ns() % (1 << 40) if arguments.seed is None else arguments.seed
    service = contestants.ours(arguments.mode, str(store.resolve(arguments.model)), arguments.flags.split())
    async with running(service, 120) as started:
        soak = Soak(started, seed, 60 * arguments.minutes, arguments.every)
        left = await soak.run()
    day = soak.day
    _report(day, left)
    if arguments.out:
        record = {
            **machine.describe(),
            "minutes": arguments.minutes,
            "flags": arguments.flags,
            "seed": seed,
            "left": left,
            **record_of(day),
        }
        arguments.out.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
        draw(arguments.out.with_suffix(".png"), day)
    return int(bool(left or day.different or day.unexpected))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--every", type=float, default=60, metavar="SECONDS", help="between two kills")
    parser.add_argument("--mode", choices=contestants.MODES, default="bf16")
    parser.add_argument(
        "--flags", default="--crash-mib 2", help="more flags of `pagewire serve` (default: %(default)s)"
    )
    parser.add_argument("--model", default=store.DEFAULT)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--out", type=Path, metavar="NAME", help="writes NAME.json and NAME.png")
    return uvloop.run(_main(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())

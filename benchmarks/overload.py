"""What far too much at once costs those who can be served: `python -m benchmarks.overload`.

First, for `--seconds`, only what the service can take: as many streams at once as it has slots, each followed by
another. Then, on a fresh service, `--requests` calls in one moment, of the same lengths, with deadlines from 5 s to
90 s and none. Every call must end with all its tokens or with a status that says why. Goodput counts the tokens,
within those seconds, of calls that ended well within their deadline. The client is niced, and its own CPU time is
reported.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import random
import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import grpc
import grpc.aio
import uvloop
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from benchmarks import contestants, machine
from benchmarks.process import running
from client import store

CHANNELS = 16
DEADLINES = (5.0, 15.0, 30.0, 60.0, 90.0, None)  # seconds
NICENESS = 10
WARM_UP = 3.0  # seconds
# A call's end is clear if it is one of these, and says more than its name.
CLEAR = {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.DEADLINE_EXCEEDED}
LATEST = 1200.0  # seconds behind the burst, by when every call has ended


@dataclass
class Ended:
    """One call. Times in seconds behind the beginning; `status` empty: all its tokens came."""

    at: float
    status: str
    clear: bool
    messages: list[tuple[float, int]] = field(default_factory=list)  # when, and how many tokens it brought


@dataclass(frozen=True)
class Outcome:
    """Of one phase, as its client saw it."""

    goodput: int
    tokens: int  # all that came, within the seconds counted or not
    per_second: list[int]  # of those, from the beginning to the last end
    statuses: dict[str, int]
    unclear: int
    last_end: float
    client_cpu_seconds: float
    left: str  # empty: nothing is left behind


@dataclass(frozen=True)
class Memory:
    """MiB of the service's processes."""

    before: float
    most: float
    after: float


def call_of(rng: random.Random) -> inference_pb2.GenerateRequest:
    """Prompts of 16 to 256 tokens, outputs of 32 to 128."""
    ids = [rng.randrange(1000, 40_000) for _ in range(rng.choice((16, 64, 128, 256)))]
    sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=rng.randrange(32, 129), ignore_eos=True)
    return inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), sampling=sampling)


class Caller:
    """All calls of a phase, over several connections."""

    def __init__(self, port: int) -> None:
        options = [("grpc.use_local_subchannel_pool", 1)]
        self._channels = [grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) for _ in range(CHANNELS)]
        self._stubs = [inference_pb2_grpc.InferenceServiceStub(channel) for channel in self._channels]
        self.admin = admin_pb2_grpc.AdminServiceStub(self._channels[0])
        self.began = 0.0

    async def ready(self) -> None:
        await asyncio.gather(*(channel.channel_ready() for channel in self._channels))

    async def call(self, number: int, request: inference_pb2.GenerateRequest, deadline: float | None) -> Ended:
        ended = Ended(0.0, "", True)
        came = 0
        try:
            async for response in self._stubs[number % CHANNELS].Generate(request, timeout=deadline):
                if count := len(response.delta.token_ids):
                    came += count
                    ended.messages.append((self._now(), count))
        except grpc.aio.AioRpcError as error:
            ended.status = error.code().name
            ended.clear = error.code() in CLEAR and bool(error.details())
        else:
            ended.clear = came == request.sampling.max_tokens
        ended.at = self._now()
        return ended

    def _now(self) -> float:
        return time.perf_counter() - self.began

    async def left(self) -> str:
        """Of those calls, when all have ended: empty, or the counts that are not zero after ten seconds."""
        until = time.perf_counter() + 10
        while True:
            stats = await self.admin.GetStats(admin_pb2.GetStatsRequest())
            held = ("running", "waiting", "owned_blocks", "fenced_blocks", "open_calls")
            counts = {name: getattr(stats, name) for name in held if getattr(stats, name)}
            if not counts or time.perf_counter() > until:
                return ", ".join(f"{name} {count}" for name, count in counts.items())
            await asyncio.sleep(0.05)

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels))


async def admissible(caller: Caller, seed: int, slots: int, seconds: float) -> list[Ended]:
    """`slots` calls at a time for so many seconds, and then to their end."""
    rng, ended = random.Random(seed), []
    caller.began = time.perf_counter()

    async def one_after_the_other(number: int) -> None:
        while time.perf_counter() - caller.began < seconds:
            ended.append(await caller.call(number, call_of(rng), None))

    await asyncio.gather(*(one_after_the_other(number) for number in range(slots)))
    return ended


async def burst(caller: Caller, seed: int, count: int) -> list[Ended]:
    rng = random.Random(seed)
    made = [(call_of(rng), rng.choice(DEADLINES)) for _ in range(count)]
    caller.began = time.perf_counter()
    async with asyncio.timeout(LATEST):
        return list(await asyncio.gather(*(caller.call(i, *each) for i, each in enumerate(made))))


async def drive(arguments: argparse.Namespace) -> Outcome:
    """A phase's client, in a process of its own that gives way to the service."""
    os.nice(NICENESS)
    gc.disable()  # ten thousand calls alive are a third of this client's time to a collector that finds nothing
    caller = Caller(arguments.drive)
    try:
        await caller.ready()
        await admissible(caller, arguments.seed + 1, arguments.slots, WARM_UP)  # the service learns its own pace
        if arguments.requests:
            ended = await burst(caller, arguments.seed, arguments.requests)
        else:
            ended = await admissible(caller, arguments.seed, arguments.slots, arguments.seconds)
        return summary(ended, arguments.seconds, await caller.left())
    finally:
        await caller.close()


def summary(ended: Sequence[Ended], seconds: float, left: str) -> Outcome:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return Outcome(
        goodput=sum(tokens for call in ended if not call.status for tokens in _within(call, seconds)),
        tokens=sum(tokens for call in ended for _, tokens in call.messages),
        per_second=_per_second(ended),
        statuses=dict(Counter(call.status or "OK" for call in ended)),
        unclear=sum(not call.clear for call in ended),
        last_end=max(call.at for call in ended),
        client_cpu_seconds=usage.ru_utime + usage.ru_stime,
        left=left,
    )


def _per_second(ended: Sequence[Ended]) -> list[int]:
    seconds = Counter[int]()
    for call in ended:
        for at, tokens in call.messages:
            seconds[int(at)] += tokens
    return [seconds[second] for second in range(max(seconds, default=-1) + 1)]


def _within(call: Ended, seconds: float) -> Iterator[int]:
    return (tokens for at, tokens in call.messages if at <= seconds)


async def phase(arguments: argparse.Namespace, requests: int, seed: int) -> tuple[Outcome, Memory]:
    """On a service of its own: so many at once, or admissible load for 0."""
    flags = ["--max-num-seqs", str(arguments.slots), *arguments.flags.split()]
    async with running(contestants.ours(arguments.mode, arguments.model, flags), 120) as started:
        numbers = {"drive": started.port, "requests": requests, "seed": seed, "slots": arguments.slots}
        command = [sys.executable, "-m", "benchmarks.overload", "--seconds", str(arguments.seconds)]
        for name, value in numbers.items():
            command += [f"--{name}", str(value)]
        before = most = started.memory()
        client = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
        said = asyncio.ensure_future(client.communicate())
        while not said.done():
            most = max(most, started.memory())
            await asyncio.wait({said}, timeout=1)
        if client.returncode:
            raise RuntimeError(f"the client ended with {client.returncode}")
        outcome = Outcome(**json.loads((await said)[0]))
        return outcome, Memory(before, most, started.memory())


def _print(name: str, outcome: Outcome, memory: Memory, seconds: float) -> None:
    statuses = ", ".join(f"{count} {status}" for status, count in sorted(outcome.statuses.items()))
    print(f"{name}: {outcome.goodput} tokens of calls that ended well, in {seconds:g} s; {statuses}")
    print(
        f"    {outcome.unclear} unclear ends, the last end after {outcome.last_end:.1f} s, "
        f"client {outcome.client_cpu_seconds:.1f} s of CPU, "
        f"service {memory.before:.0f} → {memory.most:.0f} → {memory.after:.0f} MiB, "
        f"left behind: {outcome.left or 'nothing'}",
        flush=True,
    )


async def _main(arguments: argparse.Namespace) -> int:
    seed = time.time_ns() % (1 << 40) if arguments.seed is None else arguments.seed
    made: dict[str, list[tuple[Outcome, Memory]]] = {"admissible": [], "burst": []}
    for number in range(arguments.rounds):
        for name, requests in (("admissible", 0), ("burst", arguments.requests)):
            made[name].append(await phase(arguments, requests, seed + 10 * number))
            _print(name, *made[name][-1], arguments.seconds)
    shares = [b.goodput / a.goodput for (a, _), (b, _) in zip(made["admissible"], made["burst"], strict=True)]
    print("goodput of the burst beside admissible load: " + ", ".join(f"{share:.3f}" for share in shares))
    if arguments.json:
        record = {
            "arguments": {name: value for name, value in vars(arguments).items() if name not in ("json", "model")},
            "seed": seed,
            **machine.describe(),
            "phases": {name: [{**asdict(o), "memory_mib": asdict(m)} for o, m in each] for name, each in made.items()},
            "shares": shares,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(any(outcome.unclear or outcome.left for each in made.values() for outcome, _ in each))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--slots", type=int, default=64, help="the service's --max-num-seqs")
    parser.add_argument("--mode", choices=contestants.MODES, default="bf16")
    parser.add_argument("--flags", default="", help="more flags of `pagewire serve`")
    parser.add_argument("--model", default=store.DEFAULT)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--drive", type=int, metavar="PORT", help="be the client of one phase, of a service there")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.drive:
        print(json.dumps(asdict(uvloop.run(drive(arguments)))))
        return 0
    arguments.model = str(store.resolve(arguments.model))
    return uvloop.run(_main(arguments))


if __name__ == "__main__":
    sys.exit(main())

"""How two tenants share one service, with the real model: `python -m benchmarks.fairness`.

Shares: 100 streams of one tenant beside 40 of another, short ones beside long ones, each followed by the next at once;
then the same with weights 3:1. Of every window of 10 s, what each got, counted as the service counts it (a prompt
token 1, an output token 2). Newcomers: how soon 2 streams at a time get their first token beside 100 of another tenant,
and beside 2; the bound is twice the latter's p99, and two full steps.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import grpc.aio
import numpy as np
import uvloop
from pagewire.v1 import inference_pb2, inference_pb2_grpc

from benchmarks import contestants, machine
from benchmarks.process import running
from client import store

WINDOW = 10.0  # seconds
SETTLING = 5.0  # seconds: before it not all streams of both have come
DUE = 0.10  # how far from its due share a tenant may be in a window
PROMPT_COST, OUTPUT_COST = 1, 2  # as without --tenants
FULL_STEP = 512  # positions: --max-step-tokens, where nobody says otherwise
WARM_UP = 3.0  # seconds
TENANTS = ("one", "other")


@dataclass(frozen=True)
class Kind:
    """Streams of a tenant: so many at a time, of these lengths."""

    streams: int
    prompt: tuple[int, int]
    output: tuple[int, int]


SHARING = (Kind(100, (20, 60), (10, 60)), Kind(40, (50, 300), (50, 150)))
NEWCOMER = Kind(2, (20, 60), (10, 30))
CROWDS = (100, 2)
WEIGHTS = ((1, 1), (3, 1))  # with 3, 40 streams would want for streams, not for their share


@dataclass(frozen=True)
class Shares:
    weights: tuple[int, int]
    windows: list[tuple[float, float]]  # tokens of either, as they count
    due: float  # the first's share

    def parts(self) -> list[float]:
        return [one / (one + other) for one, other in self.windows]


@dataclass(frozen=True)
class Newcomers:
    """Seconds to first tokens."""

    beside: dict[int, list[float]]  # by the other tenant's streams
    full_step: float

    def bound(self) -> float:
        return 2 * p99(self.beside[min(CROWDS)]) + 2 * self.full_step


class Client:
    """Streams of both tenants; `got`: when tokens came, whose, and how much they count."""

    def __init__(self, port: int, seed: int) -> None:
        self._rng = random.Random(seed)
        self._channels = {name: grpc.aio.insecure_channel(f"127.0.0.1:{port}") for name in TENANTS}
        self._stubs = {name: inference_pb2_grpc.InferenceServiceStub(each) for name, each in self._channels.items()}
        self.got: list[tuple[float, str, float]] = []

    async def crowd(self, tenant: str, kind: Kind, seconds: float) -> list[float]:
        """Each stream followed by the next, for so long. Seconds to each one's first token."""
        until, first = time.perf_counter() + seconds, list[float]()

        async def one_after_the_other() -> None:
            while time.perf_counter() < until:
                first.append(await self.stream(tenant, self._length(kind.prompt), self._length(kind.output)))

        await asyncio.gather(*(one_after_the_other() for _ in range(kind.streams)))
        return first

    async def stream(self, tenant: str, prompt: int, output: int) -> float:
        ids = [self._rng.randrange(1000, 40_000) for _ in range(prompt)]
        sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), sampling=sampling)
        began, first = time.perf_counter(), 0.0
        async for response in self._stubs[tenant].Generate(request, metadata=(("tenant", tenant),)):
            if count := len(response.delta.token_ids):
                now = time.perf_counter()
                cost = OUTPUT_COST * count + (0 if first else PROMPT_COST * prompt)
                self.got.append((now, tenant, cost))
                first = first or now - began
        return first

    async def close(self) -> None:
        await asyncio.gather(*(channel.close() for channel in self._channels.values()))

    def _length(self, between: tuple[int, int]) -> int:
        return self._rng.randint(*between)


def p99(values: Sequence[float]) -> float:
    return float(np.percentile(values, 99))


async def shares(arguments: argparse.Namespace, weights: tuple[int, int], seed: int) -> Shares:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.writelines(f"[tenant.{name}]\nweight = {w}\n" for name, w in zip(TENANTS, weights, strict=True))
        file.flush()
        async with running(service(arguments, "--tenants", file.name), 120) as started:
            client = Client(started.port, seed)
            began, seconds = time.perf_counter(), SETTLING + arguments.seconds
            crowds = [client.crowd(name, kind, seconds) for name, kind in zip(TENANTS, SHARING, strict=True)]
            await asyncio.gather(*crowds)
            await client.close()
    windows = []
    for number in range(int(arguments.seconds // WINDOW)):
        start = began + SETTLING + number * WINDOW
        inside = [(name, cost) for at, name, cost in client.got if start <= at < start + WINDOW]
        one, other = (float(sum(cost for who, cost in inside if who == name)) for name in TENANTS)
        windows.append((one, other))
    return Shares(weights, windows, weights[0] / sum(weights))


async def newcomers(arguments: argparse.Namespace, seed: int) -> Newcomers:
    """Both crowds in one service, in turns: the machine's bad minutes are then everybody's."""
    beside: dict[int, list[float]] = {count: [] for count in CROWDS}
    async with running(service(arguments), 120) as started:
        client = Client(started.port, seed)
        await client.crowd(TENANTS[0], NEWCOMER, WARM_UP)
        full = [await client.stream(TENANTS[0], FULL_STEP, 1) for _ in range(5)]
        for count in CROWDS * 2:
            kind = Kind(count, *(SHARING[0].prompt, SHARING[0].output))
            crowd = asyncio.ensure_future(client.crowd(TENANTS[0], kind, SETTLING + arguments.seconds / 2))
            await asyncio.sleep(SETTLING)
            beside[count] += await client.crowd(TENANTS[1], NEWCOMER, arguments.seconds / 2)
            await crowd
        await client.close()
    return Newcomers(beside, median(full))


def service(arguments: argparse.Namespace, *flags: str) -> contestants.Contestant:
    return contestants.ours(arguments.mode, arguments.model, [*flags, *arguments.flags.split()])


def lines(all_shares: Sequence[Shares], newcomers: Newcomers) -> Iterator[str]:
    for each in all_shares:
        parts = ", ".join(f"{part:.3f}" for part in each.parts())
        yield f"weights {each.weights[0]}:{each.weights[1]}: the first is due {each.due:.2f}, and got {parts}"
    for count, seconds in newcomers.beside.items():
        yield (
            f"2 streams beside {count}: first token after {median(seconds):.3f} s (median), {p99(seconds):.3f} s (p99) "
            f"of {len(seconds)}"
        )
    yield f"a full step takes {newcomers.full_step:.3f} s; the bound is {newcomers.bound():.3f} s"


def is_fair(all_shares: Sequence[Shares], newcomers: Newcomers) -> bool:
    near = all(abs(part / each.due - 1) <= DUE for each in all_shares for part in each.parts())
    return near and p99(newcomers.beside[max(CROWDS)]) <= newcomers.bound()


async def _main(arguments: argparse.Namespace) -> int:
    seed = time.time_ns() % (1 << 40) if arguments.seed is None else arguments.seed
    found = [await shares(arguments, weights, seed + i) for i, weights in enumerate(WEIGHTS)]
    soon = await newcomers(arguments, seed + len(WEIGHTS))
    print("\n".join(lines(found, soon)))
    if arguments.json:
        record = {**machine.describe(), "seed": seed, "mode": arguments.mode, "seconds": arguments.seconds}
        record |= {"shares": [asdict(each) for each in found], "newcomers": asdict(soon)}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(not is_fair(found, soon))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of each part, beside its beginning")
    parser.add_argument("--mode", choices=contestants.MODES, default="bf16")
    parser.add_argument("--flags", default="", help="more flags of `pagewire serve`")
    parser.add_argument("--model", default=store.DEFAULT)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.model = str(store.resolve(arguments.model))
    return uvloop.run(_main(arguments))


if __name__ == "__main__":
    sys.exit(main())

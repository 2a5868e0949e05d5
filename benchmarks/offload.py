"""What a second tier of KV is worth, with the real model: `python -m benchmarks.offload`.

Users talk in turn, and each sends all that was said before. What all of them have said does not fit the first tier, so
of who speaks again little or nothing is there. Two services, one with a second tier in the host's memory and one that
computes it all again, hear every message one after the other, either of them first every second time: the machine's
bad minutes are then both's. Measured is the time to an answer's first token, from each user's second message on; the
answers are the same, or the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import grpc.aio
import uvloop
from pagewire.v1 import admin_pb2, admin_pb2_grpc, inference_pb2, inference_pb2_grpc

from benchmarks import contestants, machine
from benchmarks.process import running
from client import store

TIERS = ("with", "without")


@dataclass
class Heard:
    """What one service did."""

    first_token: list[float] = field(default_factory=list)  # seconds, of every message but each user's first
    prompt_tokens: int = 0
    cached_tokens: int = 0
    host_cached_tokens: int = 0
    copied_to_host: int = 0  # blocks
    copied_to_device: int = 0

    def hit_rate(self) -> float:
        return self.cached_tokens / self.prompt_tokens


class Client:
    def __init__(self, port: int) -> None:
        self._channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._admin = admin_pb2_grpc.AdminServiceStub(self._channel)
        self.heard = Heard()

    async def ask(self, ids: Sequence[int], answer: int) -> tuple[float, list[int]]:
        """Seconds to the first token, and all tokens."""
        sampling = inference_pb2.SamplingParams(temperature=0, max_tokens=answer, ignore_eos=True)
        request = inference_pb2.GenerateRequest(token_ids=inference_pb2.TokenIds(ids=ids), sampling=sampling)
        began, first, tokens = time.perf_counter(), 0.0, list[int]()
        async for response in self._inference.Generate(request):
            if response.delta.token_ids:
                first = first or time.perf_counter() - began
                tokens += response.delta.token_ids
        return first, tokens

    async def close(self) -> None:
        stats = await self._admin.GetStats(admin_pb2.GetStatsRequest())
        self.heard.prompt_tokens, self.heard.cached_tokens = stats.prompt_tokens, stats.cached_tokens
        self.heard.host_cached_tokens = stats.host_cached_tokens
        self.heard.copied_to_host = stats.blocks_copied_to_host
        self.heard.copied_to_device = stats.blocks_copied_to_device
        await self._channel.close()


async def converse(arguments: argparse.Namespace, clients: dict[str, Client], seed: int) -> bool:
    """All users, turn by turn. Whether both services said the same."""
    rng = random.Random(seed)
    said: list[list[int]] = [[] for _ in range(arguments.users)]
    asked, same = 0, True
    for turn in range(arguments.turns):
        for history in said:
            history += [rng.randrange(1000, 40_000) for _ in range(arguments.said)]
            answers = {}
            for name in TIERS if asked % 2 else reversed(TIERS):
                seconds, answers[name] = await clients[name].ask(history, arguments.answer)
                if turn:
                    clients[name].heard.first_token.append(seconds)
            asked += 1
            same &= answers[TIERS[0]] == answers[TIERS[1]]
            history += answers[TIERS[0]]
    return same


def service(arguments: argparse.Namespace, host_gib: float) -> contestants.Contestant:
    memory = ["--kv-cache-gib", f"{arguments.kv_gib:g}", "--kv-host-gib", f"{host_gib:g}"]
    return contestants.ours(arguments.mode, arguments.model, [*memory, *arguments.flags.split()])


async def measure(arguments: argparse.Namespace, seed: int) -> tuple[dict[str, Heard], bool]:
    async with (
        running(service(arguments, arguments.host_gib), 120) as one,
        running(service(arguments, 0.0), 120) as other,
    ):
        clients = {name: Client(started.port) for name, started in zip(TIERS, (one, other), strict=True)}
        for client in clients.values():
            await client.ask([1, 2, 3], 2)
        same = await converse(arguments, clients, seed)
        for client in clients.values():
            await client.close()
    return {name: client.heard for name, client in clients.items()}, same


def ratio(heard: dict[str, Heard]) -> float:
    """How many times as long the first token takes without a second tier."""
    return median(heard["without"].first_token) / median(heard["with"].first_token)


def lines(heard: dict[str, Heard], same: bool) -> Iterator[str]:
    for name, each in heard.items():
        yield (
            f"{name} a second tier: first token after {median(each.first_token):.3f} s (median of "
            f"{len(each.first_token)}), {each.hit_rate():.0%} of prompt tokens cached, "
            f"{each.host_cached_tokens / each.prompt_tokens:.0%} in the host; "
            f"{each.copied_to_host} blocks to the host, {each.copied_to_device} back"
        )
    answers = "the same" if same else "NOT the same"
    yield f"without takes {ratio(heard):.2f} times as long as with; the answers are {answers}"


async def _main(arguments: argparse.Namespace) -> int:
    seed = time.time_ns() % (1 << 40) if arguments.seed is None else arguments.seed
    heard, same = await measure(arguments, seed)
    print("\n".join(lines(heard, same)))
    if arguments.json:
        record = {**machine.describe(), "seed": seed, "ratio": ratio(heard), "same_tokens": same}
        told = {name: value for name, value in vars(arguments).items() if name not in ("json", "model")}
        record |= {"model": Path(arguments.model).name, "arguments": told}
        record |= {"heard": {name: asdict(each) for name, each in heard.items()}}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return int(not same)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=6)
    parser.add_argument("--turns", type=int, default=4, help="messages of each; at least 2")
    parser.add_argument("--said", type=int, default=200, help="tokens of a message")
    parser.add_argument("--answer", type=int, default=16, help="tokens of an answer")
    parser.add_argument("--kv-gib", type=float, default=0.03, help="first tier; it must hold one conversation")
    parser.add_argument("--host-gib", type=float, default=1.0, help="second tier")
    parser.add_argument("--mode", choices=contestants.MODES, default="bf16")
    parser.add_argument("--flags", default="", help="more flags of `pagewire serve`")
    parser.add_argument("--model", default=store.DEFAULT)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    if arguments.turns < 2 or arguments.users < 1:
        parser.error("--turns must be at least 2, and --users 1: first messages are in no cache")
    arguments.model = str(store.resolve(arguments.model))
    return uvloop.run(_main(arguments))


if __name__ == "__main__":
    sys.exit(main())

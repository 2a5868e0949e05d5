"""Calls given up at random moments, by three ways: `python -m tests.e2e.cancel --count 500` prints what is left.

The ways: `CancelGeneration`, vLLM's `Abort`, and dropping the call. Two rounds, so that memory can be seen to be flat.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import random
import sys
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from typing import Any

import grpc
import grpc.aio
import psutil
import pytest
from pagewire.v1 import admin_pb2, inference_pb2
from smg_grpc_proto.generated import vllm_engine_pb2 as vllm  # type: ignore[import-untyped]

from tests.e2e.crash import requests
from tests.e2e.service import Service, service

WAYS = ("CancelGeneration", "vllm Abort", "dropped call")
AT_ONCE = 40
SMALL_KV = ("--kv-cache-gib", "0.25")  # pages become resident when first written: all of these soon are


@dataclass(frozen=True)
class Left:
    """After a round, when the service says that nothing is left."""

    stats: admin_pb2.GetStatsResponse
    ended: dict[str, int]  # how many streams each way has ended
    scheduler_mib: float
    worker_mib: float


async def cancel_round(running: Service, seed: int, count: int) -> Left:
    """Gives up `count` streams, and waits until every block, slot and call is back."""
    rng = random.Random(seed)
    made = requests(count, 64, rng)
    for request in made:
        request.sampling.max_tokens = 2000  # none may end by itself
    names = iter(f"cancel-{seed}-{i}" for i in itertools.count())
    work = iter(zip(made, itertools.cycle(WAYS), strict=False))
    ended = dict.fromkeys(WAYS, 0)
    await asyncio.gather(*(_give_up_in_turn(running, work, names, rng, ended) for _ in range(AT_ONCE)))
    stats = await running.until_quiet()
    worker = psutil.Process(stats.workers[0].pid)
    scheduler = psutil.Process(running.process.pid)
    return Left(stats, ended, scheduler.memory_info().rss / 2**20, worker.memory_info().rss / 2**20)


async def _give_up_in_turn(
    running: Service,
    work: Iterator[tuple[inference_pb2.GenerateRequest, str]],
    names: Iterator[str],
    rng: random.Random,
    ended: dict[str, int],
) -> None:
    for request, way in work:
        request.request_id = next(names)
        after = rng.choice((0, 0, 1, 2, 3, 5, 8))  # messages received before it is given up
        if way == "vllm Abort":
            await _abort(running, request, after)
        else:
            await _cancel(running, request, after, drop=way == "dropped call")
        ended[way] += 1


async def _cancel(running: Service, request: inference_pb2.GenerateRequest, after: int, *, drop: bool) -> None:
    call = running.inference.Generate(request)
    await call.initial_metadata()  # it is accepted: both ways find it from here on
    stream = aiter(call)
    for _ in range(after):
        await anext(stream)
    if drop:
        call.cancel()
        return
    await running.inference.CancelGeneration(inference_pb2.CancelGenerationRequest(request_id=request.request_id))
    with pytest.raises(grpc.aio.AioRpcError):
        await _only_deltas(stream)
    assert await call.code() is grpc.StatusCode.CANCELLED


async def _only_deltas(stream: AsyncIterator[inference_pb2.GenerateResponse]) -> None:
    async for response in stream:
        assert response.HasField("delta"), "a cancelled stream does not finish"


async def _abort(running: Service, request: inference_pb2.GenerateRequest, after: int) -> None:
    method: Any = running.channel.unary_stream(
        "/vllm.grpc.engine.VllmEngine/Generate",
        vllm.GenerateRequest.SerializeToString,
        vllm.GenerateResponse.FromString,
    )
    abort: Any = running.channel.unary_unary(
        "/vllm.grpc.engine.VllmEngine/Abort", vllm.AbortRequest.SerializeToString, vllm.AbortResponse.FromString
    )
    sampling = vllm.SamplingParams(temperature=0.0, max_tokens=request.sampling.max_tokens, ignore_eos=True)
    call = method(
        vllm.GenerateRequest(request_id=request.request_id, text=request.text, sampling_params=sampling, stream=True)
    )
    stream = aiter(call)
    for _ in range(max(1, after)):  # its first chunk says that it is accepted
        assert (await anext(stream)).HasField("chunk")
    await abort(vllm.AbortRequest(request_ids=[request.request_id]))
    ends = [response.complete async for response in stream if response.HasField("complete")]
    assert [end.finish_reason for end in ends] == ["abort"]


async def _main(args: argparse.Namespace) -> int:
    print(f"{'round':>5} {'cancelled':>10} {'running':>8} {'waiting':>8} {'blocks':>7} {'slots':>6} {'calls':>6} "
          f"{'scheduler MiB':>14} {'worker MiB':>11}")  # fmt: skip
    flags = ("--device", "cpu", "--threads", str(args.threads), *SMALL_KV)
    async with service(args.model, *flags) as running:
        rounds = []
        for seed in range(1, args.rounds + 1):
            left = await cancel_round(running, seed, args.count)
            rounds.append(left)
            s = left.stats
            print(f"{seed:5} {sum(left.ended.values()):10} {s.running:8} {s.waiting:8} "
                  f"{s.owned_blocks + s.fenced_blocks:7} {s.total_slots - s.free_slots:6} {s.open_calls:6} "
                  f"{left.scheduler_mib:14.1f} {left.worker_mib:11.1f}", flush=True)  # fmt: skip
    print("by way:", ", ".join(f"{way} {sum(left.ended[way] for left in rounds)}" for way in WAYS))
    return 0


def main() -> int:
    from client import store

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=500, help="cancellations a round")
    parser.add_argument("--rounds", type=int, default=3, help="the first one warms caches up")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--model", default="", help="default: the real one; or fake:…")
    args = parser.parse_args()
    args.model = args.model or str(store.pull(store.DEFAULT))
    return asyncio.run(_main(args))


if __name__ == "__main__":
    sys.exit(main())

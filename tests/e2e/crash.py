"""Streams over a worker that is killed: `python -m tests.e2e.crash --quantization int4 --rounds 5` says what came out.

A round runs its requests undisturbed, then again with kill -9 at random moments, and compares stream with stream.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from pagewire.v1 import admin_pb2, inference_pb2

from tests.e2e.service import Output, Service, generate, service

# Flags of the service that say how it computes.
MODE = {
    "dtype": "auto",
    "quantization": "",
    "kv-cache-dtype": "auto",
    "backend": "auto",
    "cpu-isa": "auto",
    "threads": "0",
    "tensor-parallel-size": "1",
}
_WORDS = "the,a,cat,sea,old,river,wrote,sings,blue,seven,stones,over,under,light,and,never,because,Paris,1984"


@dataclass(frozen=True)
class Round:
    seed: int
    streams: int
    tokens: int
    kills: int
    different: int  # streams whose tokens are not those of the undisturbed run
    damaged: int  # streams that lost or repeated a token: wrong count, or a text that is not that of the ids


def requests(count: int, max_tokens: int, rng: random.Random) -> list[inference_pb2.GenerateRequest]:
    """Half greedy, half seeded sampling; prompts of very different lengths, some with a common beginning."""
    shared = " ".join(rng.choices(_WORDS.split(","), k=40))
    made = []
    for i in range(count):
        text = (shared if i % 3 == 0 else "") + " ".join(rng.choices(_WORDS.split(","), k=rng.choice((1, 5, 20, 60))))
        tokens = rng.randrange(max_tokens // 2, max_tokens + 1)
        if i % 2:
            sampling = inference_pb2.SamplingParams(temperature=0)
        else:
            sampling = inference_pb2.SamplingParams(temperature=0.9, top_p=0.95, top_k=50, seed=rng.getrandbits(64))
        sampling.max_tokens, sampling.ignore_eos = tokens, True
        made.append(inference_pb2.GenerateRequest(text=text, sampling=sampling))
    return made


async def crash_round(
    running: Service, seed: int, *, streams: int, kills: int, max_tokens: int, ranks: int = 1
) -> Round:
    """Of a worker of several ranks the last one is killed first, then the one before it."""
    rng = random.Random(seed)
    made = requests(streams, max_tokens, rng)
    total = sum(request.sampling.max_tokens for request in made)
    undisturbed = await _run(running, made, [])
    await running.admin.FlushCache(admin_pb2.FlushCacheRequest())
    moments = sorted(rng.randrange(1, total * 9 // 10) for _ in range(kills))
    disturbed = await _run(running, made, moments, ranks)
    different = sum(a.token_ids != b.token_ids or a.text != b.text for a, b in zip(undisturbed, disturbed, strict=True))
    damaged = sum([await _is_damaged(running, r, o) for r, o in zip(made, disturbed, strict=True)])
    return Round(seed, streams, total, kills, different, damaged)


async def _run(
    running: Service, made: Sequence[inference_pb2.GenerateRequest], moments: Sequence[int], ranks: int = 1
) -> list[Output]:
    """All at once. Each moment is a count of tokens received in all, at which the worker is killed."""
    tokens = 0
    reached = [asyncio.Event() for _ in moments]

    def count(more: int) -> None:
        nonlocal tokens
        tokens += more
        for moment, event in zip(moments, reached, strict=True):
            if tokens >= moment:
                event.set()

    async def killer() -> None:
        for i, event in enumerate(reached):
            await event.wait()
            await running.kill_worker((-1 - i) % ranks)

    killing = asyncio.ensure_future(killer())
    outputs = await asyncio.gather(*(generate(running, request, count) for request in made))
    await killing
    return list(outputs)


async def _is_damaged(running: Service, request: inference_pb2.GenerateRequest, output: Output) -> bool:
    text = await running.inference.Detokenize(inference_pb2.DetokenizeRequest(token_ids=output.token_ids))
    return len(output.token_ids) != request.sampling.max_tokens or output.text != text.text


async def _main(args: argparse.Namespace) -> int:
    flags = ["--device", "cpu", "--max-num-seqs", str(args.streams)]
    for flag in MODE:
        flags += [f"--{flag}", str(getattr(args, flag.replace("-", "_")))]
    print(f"{'seed':>5} {'streams':>8} {'tokens':>7} {'kills':>6} {'different':>10} {'lost or repeated':>17}")
    bad = 0
    async with service(args.model, *flags) as running:
        model = await running.inference.GetModel(inference_pb2.GetModelRequest())
        for seed in range(args.seed, args.seed + args.rounds):
            done = await crash_round(
                running,
                seed,
                streams=args.streams,
                kills=args.kills,
                max_tokens=args.max_tokens,
                ranks=int(args.tensor_parallel_size),
            )
            print(
                f"{done.seed:5} {done.streams:8} {done.tokens:7} {done.kills:6} {done.different:10} {done.damaged:17}",
                flush=True,
            )
            bad += done.damaged + (done.different if model.exact else 0)
        recoveries = (await running.until_quiet()).recoveries
    mode = f"{model.backend}, {model.dtype}, weights {model.quantization or 'as they are'}, KV {model.kv_cache_dtype}"
    print(f"{recoveries} worker deaths survived; {mode}; {'exact' if model.exact else 'not exact'}")
    return 1 if bad else 0


def main() -> int:
    from client import store

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--max-tokens", type=int, default=48)
    for flag, default in MODE.items():
        parser.add_argument(f"--{flag}", default=default, help="the service's flag")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="", help="default: the real one; or fake:…")
    args = parser.parse_args()
    args.model = args.model or str(store.pull(store.DEFAULT))
    return asyncio.run(_main(args))


if __name__ == "__main__":
    sys.exit(main())

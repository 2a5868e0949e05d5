"""Streams with and without drafts: `python -m tests.e2e.speculation --requests 500 --proposer ngram` says what differs.

Requests of every kind (greedy and sampled, penalties, bad words, stops, min_tokens, n, log probabilities) are sent to a
service that does not speculate, then to one that does, over a pool so small that sequences are preempted, while its
worker is killed. Each stream's tokens, text, log probabilities and end have to be the same.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from pagewire.v1 import inference_pb2

from tests.e2e.service import Service, service

_WORDS = "the cat sea old river wrote sings blue seven stones over under light never because Paris 1984"
_TASKS = (
    "Repeat the following line three times: {}\n",
    "Write a list of ten numbered items, each of which begins with: {}\n1. {}\n2.",
    "{}. {}. {}.",
    "def f(x):\n    # {}\n    return x\n\ndef g(x):\n    # {}\n    return x\n\ndef h(x):\n",
)
AT_ONCE = 64  # requests


@dataclass
class Stream:
    """Of one index."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[bytes] = field(default_factory=list)
    end: bytes = b""


@dataclass
class Answer:
    streams: dict[int, Stream] = field(default_factory=dict)
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True)
class Comparison:
    streams: int
    tokens: int
    different: list[int]  # requests
    drafted: int
    accepted: int
    preemptions: int
    recoveries: int


def requests(count: int, max_tokens: int, rng: random.Random) -> list[inference_pb2.GenerateRequest]:
    return [_request(i, max_tokens, rng) for i in range(count)]


def _request(number: int, max_tokens: int, rng: random.Random) -> inference_pb2.GenerateRequest:
    line = " ".join(rng.choices(_WORDS.split(), k=rng.choice((3, 6, 12))))
    text = rng.choice(_TASKS).replace("{}", line)
    sampling = inference_pb2.SamplingParams(max_tokens=rng.randint(1, max_tokens))
    if number % 2:
        sampling.temperature = 0
    else:
        sampling.temperature, sampling.seed = rng.choice((0.3, 0.7, 1.1)), rng.getrandbits(64)
        sampling.top_p, sampling.top_k, sampling.min_p = (
            rng.choice((1, 0.9)),
            rng.choice((0, 20)),
            rng.choice((0, 0.05)),
        )
    sampling.ignore_eos = rng.random() < 0.7
    if rng.random() < 0.25:
        sampling.repetition_penalty = rng.choice((1.1, 0.9))
        sampling.presence_penalty, sampling.frequency_penalty = rng.choice(((0.5, 0), (0, 0.3), (-0.2, 0.1)))
    if rng.random() < 0.25:
        sampling.bad_words.extend(["the cat", " and", rng.choice(_WORDS.split()) + " " + rng.choice(_WORDS.split())])
    if rng.random() < 0.25:
        sampling.min_tokens = rng.randint(0, sampling.max_tokens)
        sampling.stop_token_ids.extend(rng.choices(range(3, 400), k=20))
    if rng.random() < 0.2:
        sampling.stop.extend([rng.choice(_WORDS.split()), "\n\n\n"])
    if rng.random() < 0.2:
        sampling.logprobs = rng.choice((0, 3))
    if rng.random() < 0.1:
        sampling.prompt_logprobs = 1
    if rng.random() < 0.1:
        sampling.logit_bias[rng.randrange(3, 400)] = rng.choice((5.0, -5.0))
    sampling.n = rng.choice((1, 1, 1, 1, 2, 3))
    return inference_pb2.GenerateRequest(text=text, sampling=sampling)


async def answer(running: Service, request: inference_pb2.GenerateRequest) -> Answer:
    got = Answer()
    async for response in running.inference.Generate(request):
        if response.HasField("delta"):
            delta = response.delta
            stream = got.streams.setdefault(delta.index, Stream())
            stream.token_ids += delta.token_ids
            stream.text += delta.text
            for entry in (*delta.prompt_logprobs, *delta.logprobs):
                stream.logprobs.append(entry.SerializeToString(deterministic=True))
        else:
            finished, stream = response.finished, got.streams.setdefault(response.finished.index, Stream())
            got.drafted += finished.usage.draft_tokens
            got.accepted += finished.usage.accepted_tokens
            stream.end = b"%d %d %s" % (finished.finish_reason, finished.stop_token_id, finished.stop.encode())
    return got


async def answers(running: Service, made: Sequence[inference_pb2.GenerateRequest], kills: int = 0) -> list[Answer]:
    """AT_ONCE at a time. `kills`: so often is the worker killed, as often as so many more have been answered."""
    door, done = asyncio.Semaphore(AT_ONCE), asyncio.Queue[None]()

    async def one(request: inference_pb2.GenerateRequest) -> Answer:
        async with door:
            got = await answer(running, request)
        done.put_nowait(None)
        return got

    async def killer() -> None:
        for _ in range(kills):
            for _ in range(len(made) // (kills + 1)):
                await done.get()
            await running.kill_worker()

    killing = asyncio.ensure_future(killer())
    got = await asyncio.gather(*map(one, made))
    await killing
    return list(got)


async def compare(
    model: str,
    made: Sequence[inference_pb2.GenerateRequest],
    speculation: Sequence[str],
    flags: Sequence[str] = (),
    small: Sequence[str] = (),
    kills: int = 0,
) -> Comparison:
    """`flags` of both services; `speculation` and `small` (what makes its pool so) of the one that speculates."""
    async with service(model, *flags) as plain:
        expected = await answers(plain, made)
    async with service(model, *flags, *small, *speculation) as running:
        got = await answers(running, made, kills)
        stats = await running.until_quiet()
    different = [i for i, (a, b) in enumerate(zip(expected, got, strict=True)) if a.streams != b.streams]
    streams = [stream for one in expected for stream in one.streams.values()]
    return Comparison(
        streams=len(streams),
        tokens=sum(len(stream.token_ids) for stream in streams),
        different=different,
        drafted=sum(one.drafted for one in got),
        accepted=sum(one.accepted for one in got),
        preemptions=stats.preemptions,
        recoveries=stats.recoveries,
    )


async def _main(args: argparse.Namespace) -> int:
    speculation = ["--speculation", args.proposer, "--num-drafts", str(args.num_drafts)]
    if args.draft_model:
        speculation += ["--draft-model", args.draft_model]
    flags = ["--device", "cpu", "--dtype", args.dtype, "--quantization", args.quantization]
    small = ["--kv-cache-gib", str(args.kv_cache_gib), "--max-num-seqs", str(args.max_num_seqs)]
    made = requests(args.requests, args.max_tokens, random.Random(args.seed))
    done = await compare(args.model, made, speculation, flags, small, args.kills)
    rate = done.accepted / max(1, done.drafted)
    print(
        f"{args.proposer}, {args.num_drafts} drafts: {len(made)} requests, {done.streams} streams, {done.tokens} "
        f"tokens; {done.drafted} drafted, {done.accepted} accepted ({rate:.0%}); {done.preemptions} preemptions, "
        f"{done.recoveries} worker deaths; {len(done.different)} different {done.different[:20]}"
    )
    return 1 if done.different else 0


def main() -> int:
    from client import store

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--proposer", default="ngram", choices=("ngram", "suffix", "draft", "eagle3"))
    parser.add_argument("--num-drafts", type=int, default=5)
    parser.add_argument("--draft-model", default="")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--kv-cache-gib", type=float, default=0.05, help="of the service that speculates")
    parser.add_argument("--max-num-seqs", type=int, default=24, help="of the service that speculates")
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--quantization", default="")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="", help="default: the real one")
    args = parser.parse_args()
    args.model = args.model or str(store.pull(store.DEFAULT))
    if args.proposer == "draft":
        args.draft_model = args.draft_model or args.model
    return asyncio.run(_main(args))


if __name__ == "__main__":
    sys.exit(main())

"""Streams that break and go on: `python -m tests.e2e.resume --rounds 100` says what came out.

A wave of streams runs undisturbed, and again while its connections are cut, its scheduler is killed, the whole service
is stopped and started, or killed while a replica stands by. The client goes on by itself, and stream is compared with
stream.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace

from client import aio
from client.api import ChatMessage, Chunk, GenerateDelta, Prompt, Resume, SamplingParams, TokenIds
from tests.client.wire import Wire
from tests.e2e.service import PATIENCE, Service, free_port, service

WAYS = ("connection cut", "kill -9", "restart", "replica")
POLICY = Resume(attempts=1000, budget=PATIENCE, backoff=0.05, max_backoff=0.5)
_WORDS = "the,a,cat,sea,old,river,wrote,sings,blue,seven,stones,over,under,light,and,never,because,Paris,1984"


@dataclass(frozen=True)
class Ask:
    prompt: Prompt
    sampling: SamplingParams


@dataclass
class Stream:
    """What came of one index."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[tuple[int, float]] = field(default_factory=list)
    end: tuple[int, str, int, int, int] | None = None  # reason, stop string and id, prompt and output tokens

    def take(self, chunk: Chunk) -> None:
        assert self.end is None, "nothing comes behind the end"
        if isinstance(chunk, GenerateDelta):
            self.token_ids += chunk.token_ids
            self.text += chunk.text
            self.logprobs += [(entry.token_id, entry.logprob) for entry in chunk.logprobs]
        else:
            counts = (chunk.usage.prompt_tokens, chunk.usage.completion_tokens)
            self.end = (chunk.finish_reason, chunk.stop, chunk.stop_token_id, *counts)


Streams = dict[int, Stream]


@dataclass(frozen=True)
class Wave:
    way: str
    streams: int
    tokens: int
    resumed: int  # requests that went on behind tokens which they had brought
    different: int  # streams that are not those of the undisturbed run
    damaged: (
        int  # streams that lost or repeated something: their text is not that of their ids, or their count is wrong
    )


class House:
    """A service that can be taken down and comes back at its port, behind a wire, and its replica elsewhere."""

    def __init__(self, model: str, flags: tuple[str, ...], replica: Service, port: int) -> None:
        self._model, self._flags, self._port = model, flags, port
        self._stack = contextlib.AsyncExitStack()
        self.replica, self.running = replica, replica

    async def start(self) -> None:
        self.running = await self._stack.enter_async_context(service(self._model, *self._flags, port=self._port))

    async def stop(self, *signals: int) -> None:
        process = self.running.process
        for number in signals:
            process.send_signal(number)
        await asyncio.to_thread(process.wait, PATIENCE)
        await self._stack.aclose()

    async def disturb(self, way: str, wire: Wire) -> None:
        match way:
            case "connection cut":
                await asyncio.to_thread(wire.cut)
            case "kill -9":
                await self.stop(signal.SIGKILL)
                await self.start()
            case "restart":  # the second signal ends it without a drain; two of a kind could become one
                await self.stop(signal.SIGTERM, signal.SIGINT)
                await self.start()
            case "replica":
                await self.stop(signal.SIGKILL)


@contextlib.asynccontextmanager
async def house(model: str, *flags: str) -> AsyncIterator[House]:
    async with service(model, *flags) as replica:
        made = House(model, flags, replica, free_port())
        await made.start()
        try:
            yield made
        finally:
            await made.stop(signal.SIGKILL)


def asks(count: int, max_tokens: int, rng: random.Random) -> list[Ask]:
    """Greedy and sampled in turn; some with penalties, least lengths, logprobs or two streams; all kinds of prompts."""
    made = []
    for i in range(count):
        text = " ".join(rng.choices(_WORDS.split(","), k=rng.choice((1, 5, 20, 60))))
        prompts: list[Prompt] = [text, TokenIds(ids=text.encode()), [ChatMessage(role="user", content=text)]]
        sampling = SamplingParams(seed=rng.getrandbits(64), max_tokens=rng.randrange(max_tokens // 2, max_tokens + 1))
        sampling.temperature = 0.9 if i % 2 else 0
        if i % 2:
            sampling.top_p, sampling.top_k = 0.95, 50
        if i % 3 == 0:
            sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty = 1.1, 0.5, 0.3
        if i % 4 == 1:
            sampling.min_tokens = sampling.max_tokens // 2
        if i % 4 == 3:
            sampling.logprobs = 2
        if i % 5 == 2:
            sampling.n = 2
        sampling.ignore_eos = i % 3 != 2
        made.append(Ask(prompts[i % 3], sampling))
    return made


async def _stream(client: aio.Client, ask: Ask, on_tokens: Callable[[int], None]) -> tuple[Streams, int]:
    """One request's streams, and how often they had to be resumed."""
    streams: Streams = {index: Stream() for index in range(ask.sampling.n or 1)}
    generation = client.generate(ask.prompt, ask.sampling, timeout=PATIENCE)
    async for chunk in generation:
        streams[chunk.index].take(chunk)
        if isinstance(chunk, GenerateDelta):
            on_tokens(len(chunk.token_ids))
    return streams, generation.resumes


async def _undisturbed(client: aio.Client, made: list[Ask], rng: random.Random) -> tuple[list[Ask], list[Streams]]:
    """Every third request gets a stop string: one that its text has. Its stream is run again, to end there."""

    async def run(ask: Ask) -> Streams:
        return (await _stream(client, ask, lambda count: None))[0]

    streams = await asyncio.gather(*map(run, made))
    asked = []
    for i, (ask, whole) in enumerate(zip(made, streams, strict=True)):
        text = whole[0].text
        if i % 3 == 1 and len(text) > 8:
            begin = rng.randrange(len(text) // 2, len(text) - 3)
            sampling = SamplingParams()
            sampling.CopyFrom(ask.sampling)
            sampling.stop.append(text[begin : begin + rng.randrange(1, 4)])
            ask = replace(ask, sampling=sampling)
        asked.append(ask)
    return asked, list(await asyncio.gather(*map(run, asked)))


async def wave(home: House, way: str, seed: int, *, streams: int, max_tokens: int) -> Wave:
    rng = random.Random(seed)
    async with aio.Client(home.replica.address) as client:
        made, whole = await _undisturbed(client, asks(streams, max_tokens, rng), rng)
        total = sum(len(stream.token_ids) for several in whole for stream in several.values())
        with Wire(home.running.address) as wire:
            found = await _disturbed(home, way, wire, made, rng.randrange(1, max(2, total * 9 // 10)))
        pairs = [
            (one, other[i]) for several, (other, _) in zip(whole, found, strict=True) for i, one in several.items()
        ]
        damaged = [await _is_damaged(client, other) for _, other in pairs]
    if way == "replica":
        await home.start()
    resumed = sum(resumes > 0 for _, resumes in found)
    return Wave(way, len(pairs), total, resumed, sum(one != other for one, other in pairs), sum(damaged))


async def _disturbed(home: House, way: str, wire: Wire, made: list[Ask], moment: int) -> list[tuple[Streams, int]]:
    """All at once; the disturbance comes when `moment` tokens have come in all."""
    tokens, reached = 0, asyncio.Event()

    def count(more: int) -> None:
        nonlocal tokens
        tokens += more
        if tokens >= moment:
            reached.set()

    async def disturber() -> None:
        await reached.wait()
        await home.disturb(way, wire)

    addresses = {"connection cut": [wire.address], "replica": [home.running.address, home.replica.address]}
    async with aio.Client(addresses.get(way, home.running.address), retry=POLICY) as client:
        disturbing = asyncio.ensure_future(disturber())
        found = await asyncio.gather(*(_stream(client, ask, count) for ask in made))
        await disturbing
    return list(found)


async def _is_damaged(client: aio.Client, stream: Stream) -> bool:
    assert stream.end, "a stream without an end"
    _, stop, _, _, count = stream.end
    text = await client.detokenize(stream.token_ids)
    is_its = text.startswith(stream.text) if stop else text == stream.text
    return count != len(stream.token_ids) or not is_its


async def _main(args: argparse.Namespace) -> int:
    flags = ["--device", "cpu", "--quantization", args.quantization, "--max-num-seqs", str(2 * args.streams)]
    resumed = bad = 0
    print(f"{'':15} {'streams':>8} {'tokens':>7} {'resumed':>8} {'different':>10} {'lost or repeated':>17}")
    async with house(args.model, *flags) as home:
        for seed in itertools.count(args.seed):
            if resumed >= args.rounds:
                break
            way = WAYS[seed % len(WAYS)]
            done = await wave(home, way, seed, streams=args.streams, max_tokens=args.max_tokens)
            counts = f"{done.streams:8} {done.tokens:7} {done.resumed:8} {done.different:10} {done.damaged:17}"
            print(f"{way:15} {counts}", flush=True)
            resumed += done.resumed
            bad += done.different + done.damaged
        await home.running.until_quiet()
        await home.replica.until_quiet()
    print(f"{resumed} requests went on behind what they had brought; {bad} streams differ or are damaged")
    return 1 if bad else 0


def main() -> int:
    from client import store

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=20, help="resumed requests, at least")
    parser.add_argument("--streams", type=int, default=12, help="requests of a wave")
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--quantization", default="int4")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--model", default="", help="default: the real one; or fake:…")
    args = parser.parse_args()
    if args.model.startswith("fake:"):
        args.quantization = ""
    args.model = args.model or str(store.pull(store.DEFAULT))
    return asyncio.run(_main(args))


if __name__ == "__main__":
    sys.exit(main())

"""What structured output costs, and whether it is one, with the real model: `python -m benchmarks.structured`.

- How many schemas of many kinds compile, and how long that takes, in the checker's way but in this process.
- The model writes something for each of them, greedily and sampled: does what it finishes validate?
- Grammars made to cost a server dearly: how soon each is refused, and what streams beside them notice.
- A service decodes a batch of streams with a grammar and without one, in turn, either of them first every second time.
  Measured are tokens a second of a whole wave; "text" is a grammar that forces nothing, "records" one that forces much.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

import grpc.aio
import uvloop
from jsonschema import Draft202012Validator, ValidationError
from pagewire.v1 import inference_pb2 as pb
from pagewire.v1 import inference_pb2_grpc

from benchmarks import contestants, machine
from benchmarks.process import running
from benchmarks.schemas import HOSTILE, Schema, all_schemas
from client import store
from protos.engine_wire import Grammar
from scheduler_svc.grammars import vocabulary
from scheduler_svc.grammars.checker import check

RECORD = {
    "type": "object",
    "properties": {"first name": {"type": "string", "maxLength": 12}, "date of birth": {"type": "integer"}},
    "required": ["first name", "date of birth"],
    "additionalProperties": False,
}
if TYPE_CHECKING:
    Stub = inference_pb2_grpc.InferenceServiceAsyncStub

COMPACT = {"whitespace_flexible": False}
GRAMMARS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "text": {"type": "string", "minLength": 4000},
    "records": {"type": "array", "minItems": 100, "items": RECORD, "x-guidance": COMPACT},
}


def compile_all(model: str) -> dict[str, Any]:
    tokenizer = vocabulary.load(model)
    seconds, refused = [], {}
    for schema in all_schemas():
        text = json.dumps(schema)
        began = time.perf_counter()
        if trouble := check(Grammar("json_schema", text), tokenizer).trouble:
            refused[text] = trouble
        seconds.append(time.perf_counter() - began)
    cuts = quantiles(seconds, n=100)
    return {"schemas": len(seconds), "compiled": len(seconds) - len(refused), "p50": cuts[49], "p99": cuts[98]} | {
        "refused": refused
    }


async def wave(stub: Stub, name: str, streams: int, tokens: int) -> float:
    """Tokens a second."""

    async def one(seed: int) -> int:
        sampling = pb.SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=name == "none")
        wanted = pb.StructuredOutput(json_schema=json.dumps(GRAMMARS[name])) if GRAMMARS[name] else None
        request = pb.GenerateRequest(text="[", sampling=sampling, structured_output=wanted)
        return sum([len(response.delta.token_ids) async for response in stub.Generate(request)])

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(seed) for seed in range(streams)))
    return sum(counts) / (time.perf_counter() - began)


async def write(stub: Stub, wanted: pb.StructuredOutput, tokens: int, **sampling: Any) -> tuple[str, bool]:
    """What the model says, and whether it finished."""
    params = pb.SamplingParams(max_tokens=tokens, **sampling)
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Make up an example, as JSON.")])
    text, finished = "", False
    async for response in stub.Generate(pb.GenerateRequest(chat=chat, sampling=params, structured_output=wanted)):
        text += response.delta.text
        finished |= response.finished.finish_reason == pb.FINISH_REASON_STOP
    return text, finished


async def validate(stub: Stub, streams: int, tokens: int) -> dict[str, Any]:
    """Of each schema that compiles: one greedy and one sampled answer."""
    told: dict[str, Any] = {"answers": 0, "finished": 0, "valid": 0, "invalid": []}
    limit = asyncio.Semaphore(streams)

    async def one(schema: Schema, **sampling: Any) -> None:
        async with limit:
            try:
                text, finished = await write(
                    stub, pb.StructuredOutput(json_schema=json.dumps(schema)), tokens, **sampling
                )
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                return
        told["answers"] += 1
        if finished:
            told["finished"] += 1
            try:
                Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER).validate(
                    json.loads(text)
                )
                told["valid"] += 1
            except (ValidationError, ValueError) as error:
                told["invalid"].append({"schema": schema, "text": text, "why": str(error).splitlines()[0]})

    kinds: list[dict[str, Any]] = [{"temperature": 0}, {"temperature": 0.9, "seed": 1}]
    await asyncio.gather(*(one(schema, **kind) for schema in all_schemas() for kind in kinds))
    return told


async def attack(stub: Stub, streams: int, tokens: int) -> dict[str, Any]:
    """Seconds to each refusal, and the longest waits for a token of streams beside, without and with them."""
    record = pb.StructuredOutput(json_schema=json.dumps({"type": "array", "minItems": 100, "items": RECORD}))

    async def pace(seed: int) -> list[float]:
        sampling = pb.SamplingParams(max_tokens=tokens, seed=seed)
        came = [
            time.perf_counter()
            async for _ in stub.Generate(pb.GenerateRequest(text="[", sampling=sampling, structured_output=record))
        ]
        return [later - earlier for earlier, later in itertools.pairwise(came)]

    async def refusals() -> dict[str, float]:
        seconds = {}
        for name, hostile in HOSTILE.items():
            began = time.perf_counter()
            try:
                await write(stub, hostile, 4)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT:
                    raise
                seconds[name] = time.perf_counter() - began
        return seconds

    async def beside() -> list[float]:
        return sorted(itertools.chain(*await asyncio.gather(*(pace(seed) for seed in range(streams)))))

    await beside()
    without = await beside()
    waits, seconds = await asyncio.gather(beside(), refusals())
    return {
        "refused": seconds,
        "itl_p99": {"without": quantiles(without, n=100)[98], "with": quantiles(waits, n=100)[98]},
    }


async def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    rates: dict[str, list[float]] = {name: [] for name in GRAMMARS}
    flags = ["--max-num-seqs", str(arguments.streams), *arguments.flags.split()]
    async with (
        running(contestants.ours(arguments.mode, arguments.model, flags), 120) as started,
        grpc.aio.insecure_channel(f"127.0.0.1:{started.port}") as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        attacked = await attack(stub, arguments.streams // 2, 200)
        for name in GRAMMARS:
            await wave(stub, name, 2, 8)
        for number in range(arguments.rounds):
            for name in list(GRAMMARS)[:: 1 if number % 2 else -1]:
                rates[name].append(await wave(stub, name, arguments.streams, arguments.tokens))
        validated = await validate(stub, arguments.streams, 200)
    return {"tokens_per_second": rates, "validated": validated, "hostile": attacked}


def tell(compiled: dict[str, Any], measured: dict[str, Any]) -> None:
    print(f"{compiled['compiled']} of {compiled['schemas']} schemas compile", end="")
    print(f", in {1e3 * compiled['p50']:.1f} ms (p50), {1e3 * compiled['p99']:.1f} ms (p99)")
    validated, hostile = measured["validated"], measured["hostile"]
    print(f"{validated['answers']} answers, {validated['finished']} finished, {validated['valid']} of them valid")
    for one in validated["invalid"]:
        print(f"  invalid: {one}")
    for name, seconds in hostile["refused"].items():
        print(f"{name}: refused in {seconds:.3f} s")
    print("ITL p99 beside them " + ", ".join(f"{name} {1e3 * s:.0f} ms" for name, s in hostile["itl_p99"].items()))
    rates = measured["tokens_per_second"]
    for name, values in rates.items():
        ratios = [value / none for value, none in zip(values, rates["none"], strict=True)]
        print(f"{name}: {median(values):.0f} tokens/s, {median(ratios):.3f} of what is without a grammar")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64, help="of a stream")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--mode", choices=contestants.MODES, default="int4")
    parser.add_argument("--flags", default="", help="more flags of `pagewire serve`")
    parser.add_argument("--model", default=store.DEFAULT)
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    arguments.model = str(store.resolve(arguments.model))
    compiled, measured = compile_all(arguments.model), uvloop.run(measure(arguments))
    tell(compiled, measured)
    if arguments.json:
        record = {**machine.describe(), "compile": compiled, **measured}
        record |= {"model": Path(arguments.model).name, "streams": arguments.streams, "tokens": arguments.tokens}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

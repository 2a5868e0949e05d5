"""What structured output costs, with the real model: `python -m benchmarks.structured`.

A service decodes a batch of streams with a grammar and without one, in turn, either of them first every second time.
Measured are tokens a second of a whole wave; "text" is a grammar that forces nothing, "records" one that forces much.
And how long schemas of many kinds take to compile, in the checker's way but in this process.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import grpc.aio
import uvloop
from pagewire.v1 import inference_pb2 as pb
from pagewire.v1 import inference_pb2_grpc

from benchmarks import contestants, machine
from benchmarks.process import running
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
COMPACT = {"whitespace_flexible": False}
GRAMMARS: dict[str, dict[str, Any] | None] = {
    "none": None,
    "text": {"type": "string", "minLength": 4000},
    "records": {"type": "array", "minItems": 100, "items": RECORD, "x-guidance": COMPACT},
}


def schemas() -> Iterator[dict[str, Any]]:
    """Some hundreds, of varied features: each leaf in each frame."""
    leaves: list[dict[str, Any]] = [
        *({"type": kind} for kind in ("string", "integer", "number", "boolean", "null")),
        {"type": "string", "maxLength": 40},
        {"type": "string", "minLength": 3, "maxLength": 3},
        {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3,6}$"},
        *({"type": "string", "format": name} for name in ("date", "date-time", "time", "uuid", "email", "ipv4", "uri")),
        {"type": "integer", "minimum": -7, "maximum": 1200},
        {"type": "integer", "exclusiveMinimum": 0, "multipleOf": 5},
        {"type": "number", "minimum": 0.5, "maximum": 99.25},
        {"enum": ["red", "green", 3, None]},
        {"const": {"a": [1, 2]}},
        {"type": ["string", "null"]},
        {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 5}]},
        {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
        {"oneOf": [{"type": "boolean"}, {"type": "integer"}]},
    ]
    frames = [
        lambda leaf: leaf,
        lambda leaf: {"type": "array", "items": leaf, "minItems": 1, "maxItems": 4},
        lambda leaf: {"type": "array", "prefixItems": [leaf, {"type": "integer"}], "items": False, "minItems": 2},
        lambda leaf: {"type": "object", "properties": {"a": leaf, "b": leaf}, "required": ["a"]},
        lambda leaf: {"type": "object", "properties": {"a": leaf}, "required": ["a"], "additionalProperties": False},
        lambda leaf: {"type": "object", "additionalProperties": leaf},
        lambda leaf: {"type": "object", "patternProperties": {"^x_": leaf}, "additionalProperties": False},
        lambda leaf: {"$defs": {"l": leaf}, "type": "array", "items": {"$ref": "#/$defs/l"}},
        lambda leaf: {"type": "object", "properties": {"v": leaf, "next": {"$ref": "#"}}, "required": ["v"]},
        lambda leaf: {"type": "object", "properties": {"in": {"type": "object", "properties": {"v": leaf}}}},
    ]
    yield from (frame(leaf) for frame, leaf in itertools.product(frames, leaves))


def compile_all(model: str) -> dict[str, Any]:
    tokenizer = vocabulary.load(model)
    seconds, refused = [], {}
    for schema in schemas():
        text = json.dumps(schema)
        began = time.perf_counter()
        if trouble := check(Grammar("json_schema", text), tokenizer).trouble:
            refused[text] = trouble
        seconds.append(time.perf_counter() - began)
    cuts = quantiles(seconds, n=100)
    return {"schemas": len(seconds), "compiled": len(seconds) - len(refused), "p50": cuts[49], "p99": cuts[98]} | {
        "refused": refused
    }


async def wave(stub: inference_pb2_grpc.InferenceServiceAsyncStub, name: str, streams: int, tokens: int) -> float:
    """Tokens a second."""

    async def one(seed: int) -> int:
        sampling = pb.SamplingParams(max_tokens=tokens, seed=seed, ignore_eos=name == "none")
        wanted = pb.StructuredOutput(json_schema=json.dumps(GRAMMARS[name])) if GRAMMARS[name] else None
        request = pb.GenerateRequest(text="[", sampling=sampling, structured_output=wanted)
        return sum([len(response.delta.token_ids) async for response in stub.Generate(request)])

    began = time.perf_counter()
    counts = await asyncio.gather(*(one(seed) for seed in range(streams)))
    return sum(counts) / (time.perf_counter() - began)


async def measure(arguments: argparse.Namespace) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in GRAMMARS}
    flags = ["--max-num-seqs", str(arguments.streams), *arguments.flags.split()]
    async with (
        running(contestants.ours(arguments.mode, arguments.model, flags), 120) as started,
        grpc.aio.insecure_channel(f"127.0.0.1:{started.port}") as channel,
    ):
        stub = inference_pb2_grpc.InferenceServiceStub(channel)
        for name in GRAMMARS:
            await wave(stub, name, 2, 8)
        for number in range(arguments.rounds):
            for name in list(GRAMMARS)[:: 1 if number % 2 else -1]:
                rates[name].append(await wave(stub, name, arguments.streams, arguments.tokens))
    return rates


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
    compiled = compile_all(arguments.model)
    print(f"{compiled['compiled']} of {compiled['schemas']} schemas compile", end="")
    print(f", in {1e3 * compiled['p50']:.1f} ms (p50), {1e3 * compiled['p99']:.1f} ms (p99)")
    rates = uvloop.run(measure(arguments))
    for name, values in rates.items():
        ratios = [value / none for value, none in zip(values, rates["none"], strict=True)]
        print(f"{name}: {median(values):.0f} tokens/s, {median(ratios):.3f} of what is without a grammar")
    if arguments.json:
        record = {**machine.describe(), "compile": compiled, "tokens_per_second": rates}
        record |= {"model": Path(arguments.model).name, "streams": arguments.streams, "tokens": arguments.tokens}
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

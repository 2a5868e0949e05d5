"""Structured output of the real model: valid, and the same whatever happens to the worker and the batch."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import jsonschema
import pytest
from pagewire.v1 import inference_pb2 as pb

from benchmarks.schemas import HOSTILE
from tests.e2e.service import Service, service

pytestmark = pytest.mark.timeout(300)

REAL = ("--device", "cpu", "--quantization", "int4", "--max-num-seqs", "8", "--kv-cache-gib", "0.012")
SCHEMA = {
    "type": "object",
    "properties": {
        "full name": {"type": "string", "maxLength": 24},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "status": {"enum": ["married", "single", "it is complicated"]},
    },
    "required": ["full name", "age", "status"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@dataclass
class Told:
    fingerprint: str = ""
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    text: dict[int, str] = field(default_factory=dict)
    ends: dict[int, pb.GenerateFinished] = field(default_factory=dict)


async def generate(
    running: Service, wanted: pb.StructuredOutput, seed: int, had: Told | None = None, **sampling: Any
) -> Told:
    """`had`: what came before the connection broke."""
    params = pb.SamplingParams(**{"seed": seed, "max_tokens": 40, **sampling})
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Describe a person as JSON.")])
    request = pb.GenerateRequest(chat=chat, sampling=params, structured_output=wanted)
    if had:
        request.resume_fingerprint = had.fingerprint
        for index, token_ids in had.token_ids.items():
            request.resume_token_ids.append(pb.ResumeState(index=index, token_ids=token_ids))
    call = running.inference.Generate(request)
    told = Told(str(dict(await call.initial_metadata() or ()).get("fingerprint", "")))
    async for message in call:
        if message.HasField("delta"):
            delta = message.delta
            told.token_ids.setdefault(delta.index, []).extend(delta.token_ids)
            told.text[delta.index] = told.text.get(delta.index, "") + delta.text
        else:
            told.ends[message.finished.index] = message.finished
    return told


def check(told: Told) -> None:
    for index, end in told.ends.items():
        if end.finish_reason == pb.FINISH_REASON_STOP:
            jsonschema.validate(json.loads(told.text[index]), SCHEMA)


@pytest.fixture(params=[1, 2], ids=["one frontend", "two"])
async def running(model_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Service]:
    """Grammars are compiled in the engine's process, whichever frontend hears of them."""
    more = ("--frontends", "2") if request.param == 2 else ()
    async with service(str(model_path), *REAL, *more) as running:
        yield running


one_frontend = pytest.mark.parametrize("running", [1], indirect=True)


async def test_the_stream_depends_on_its_seed_alone(running: Service) -> None:
    """Not on the batch, on preemption (the pool holds a few of them), on logprobs, on a dead worker."""
    wanted = pb.StructuredOutput(json_schema=json.dumps(SCHEMA))
    alone = [await generate(running, wanted, seed) for seed in range(2)]
    assert any(end.finish_reason == pb.FINISH_REASON_STOP for told in alone for end in told.ends.values())
    assert all(" " not in told.text[0].split('"age"')[1][:3] for told in alone if '"age"' in told.text[0])
    several = [generate(running, wanted, seed) for seed in range(2)]
    several += [generate(running, wanted, seed, logprobs=1) for seed in range(2)]
    several.append(generate(running, wanted, 0, n=3, temperature=1.3))
    told = await asyncio.gather(*several)
    assert [one.token_ids for one in told[:4]] == 2 * [one.token_ids for one in alone]
    again = asyncio.gather(*[generate(running, wanted, seed) for seed in range(2)])
    await running.until_stats(lambda stats: stats.running > 0, "somebody runs")
    await running.kill_worker()
    assert [one.token_ids for one in await again] == [one.token_ids for one in alone]
    for one in (*alone, *told):
        check(one)
    await running.until_quiet()


@one_frontend
async def test_a_stream_that_broke_goes_on_within_its_grammar(running: Service) -> None:
    """Wherever it broke: within a word, before or behind what the grammar forces."""
    wanted = pb.StructuredOutput(json_schema=json.dumps(SCHEMA))
    whole = await generate(running, wanted, 1)
    tokens = whole.token_ids[0]
    assert len(tokens) > 12
    breaks = range(1, len(tokens), 3)
    had = [Told(whole.fingerprint, {0: tokens[:count]}) for count in breaks]
    rests = await asyncio.gather(*[generate(running, wanted, 1, one) for one in had])
    assert [one.token_ids[0] + rest.token_ids[0] for one, rest in zip(had, rests, strict=True)] == [tokens] * len(had)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await generate(running, pb.StructuredOutput(choice=pb.Choice(values=["yes"])), 1, had[2])
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "resume_token_ids: token 0 of index 0 is not allowed by the grammar" in (caught.value.details() or "")
    await running.until_quiet()


@one_frontend
async def test_other_constraints(running: Service) -> None:
    async def say(**constraint: Any) -> str:
        told = await generate(running, pb.StructuredOutput(**constraint), 1)
        assert told.ends[0].finish_reason == pb.FINISH_REASON_STOP
        return told.text[0]

    assert await say(choice=pb.Choice(values=["no way", "yes"])) in ("no way", "yes")
    assert (await say(regex="[0-9]{4}-[0-9]{2}"))[4] == "-"
    assert await say(grammar='root ::= "1" ("+" "1")? "=" [0-9]') in {
        f"{a}={d}" for a in ("1", "1+1") for d in range(10)
    }
    tag = {"type": "tag", "begin": "<n>", "content": {"type": "regex", "pattern": "[0-9]{2}"}, "end": "</n>"}
    assert (await say(structural_tag=json.dumps({"type": "structural_tag", "format": tag})))[:3] == "<n>"


@one_frontend
async def test_hostile_grammars_end_alone(running: Service) -> None:
    """Each is refused; a stream that runs meanwhile, and whoever comes behind them, notice nothing but the time."""
    wanted = pb.StructuredOutput(json_schema=json.dumps(SCHEMA))
    before = await generate(running, wanted, 7)
    beside = asyncio.create_task(generate(running, wanted, 7))
    for hostile in HOSTILE.values():
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await generate(running, hostile, 1)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert f"structured_output.{hostile.WhichOneof('constraint')}" in (caught.value.details() or "")
    assert (await beside).token_ids == before.token_ids
    await running.until_quiet()

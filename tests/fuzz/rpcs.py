"""Every method of every service on the gRPC port, called with bytes that are nearly right, or not at all."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import grpc
import grpc.aio
from google.protobuf.descriptor import MethodDescriptor
from google.protobuf.message import DecodeError, Message
from grpc_channelz.v1 import channelz_pb2
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2
from pagewire.v1 import admin_pb2, inference_pb2
from smg_grpc_proto.generated import vllm_engine_pb2  # type: ignore[import-untyped]

from tests.fuzz.messages import any_message, change_field, message_class, mutate

PATIENCE = 60.0  # seconds for one call: whoever takes longer hangs
AT_ONCE = 32
FILES = (inference_pb2, admin_pb2, vllm_engine_pb2, health_pb2, reflection_pb2, channelz_pb2)
# Whatever is sent, it is the sender's mistake, and said to be.
FORBIDDEN = {
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
    grpc.StatusCode.DATA_LOSS,
    grpc.StatusCode.UNAVAILABLE,
}
DRAINS = "/pagewire.v1.AdminService/Drain"  # only what is no message, or it would do what it says

SEEDS: Sequence[Message] = (
    inference_pb2.GenerateRequest(
        text="Once upon a time",
        sampling=inference_pb2.SamplingParams(temperature=0.7, seed=1, max_tokens=8, stop=["x"], n=2, logprobs=1),
    ),
    inference_pb2.GenerateRequest(
        token_ids=inference_pb2.TokenIds(ids=[300, 301, 302]),
        sampling=inference_pb2.SamplingParams(max_tokens=4, logit_bias={5: 1.0}, bad_words=["a"], prompt_logprobs=1),
        request_id="r",
        cache_salt="s",
    ),
    inference_pb2.GenerateRequest(
        chat=inference_pb2.ChatMessages(messages=[inference_pb2.ChatMessage(role="user", content="hi")])
    ),
    inference_pb2.EmbedRequest(
        inputs=[inference_pb2.EmbedInput(text="hello"), inference_pb2.EmbedInput(text="you")],
        pooling=inference_pb2.POOLING_MEAN,
        dimensions=4,
    ),
    inference_pb2.ScoreRequest(
        text="one, two,",
        candidates=[inference_pb2.ScoreCandidate(text=" three"), inference_pb2.ScoreCandidate(text=" four")],
    ),
    inference_pb2.TokenizeRequest(text="hello"),
    inference_pb2.DetokenizeRequest(token_ids=[300, 301]),
    inference_pb2.CancelGenerationRequest(request_id="r"),
    vllm_engine_pb2.GenerateRequest(
        request_id="v",
        tokenized=vllm_engine_pb2.TokenizedInput(original_text="hi", input_ids=[300, 301]),
        sampling_params=vllm_engine_pb2.SamplingParams(temperature=0.5, max_tokens=4),
        stream=True,
    ),
    vllm_engine_pb2.EmbedRequest(request_id="e", tokenized=vllm_engine_pb2.TokenizedInput(input_ids=[300, 301])),
    vllm_engine_pb2.AbortRequest(request_ids=["v"]),
)


@dataclass(frozen=True)
class Shot:
    """One call."""

    path: str
    data: bytes
    metadata: tuple[tuple[str, str], ...] = ()


@dataclass
class Findings:
    """How many calls of a method ended in which status, and each that should not have ended so."""

    counts: dict[str, Counter[str]] = field(default_factory=dict)
    bad: list[tuple[Shot, str]] = field(default_factory=list)

    @property
    def total(self) -> int:
        return sum(sum(counter.values()) for counter in self.counts.values())


def methods() -> dict[str, MethodDescriptor]:
    return {
        f"/{service.full_name}/{method.name}": method
        for file in FILES
        for service in file.DESCRIPTOR.services_by_name.values()
        for method in service.methods
    }


class Gunner:
    """Makes shots: three of four are bytes of a message, mutated or not; the rest is noise."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self._methods = methods()
        self._paths = list(self._methods)
        self._heavy = [path for path in self._paths if path.endswith("/Generate")]

    def shot(self) -> Shot:
        rng = self.rng
        while True:
            path = rng.choice(self._heavy if rng.random() < 0.3 else self._paths)
            shot = Shot(path, self._data(self._methods[path]), self._metadata())
            if path != DRAINS or not _parses(self._methods[path], shot.data):
                return shot

    def _data(self, method: MethodDescriptor) -> bytes:
        rng, kind = self.rng, method.input_type
        if rng.random() < 0.1:
            return rng.randbytes(rng.randrange(64))
        seeds = [seed for seed in SEEDS if seed.DESCRIPTOR is kind]
        if seeds and rng.random() < 0.7:
            made = message_class(kind)()
            made.CopyFrom(rng.choice(seeds))
            for _ in range(rng.randrange(3)):
                change_field(made, rng)
        else:
            made = any_message(kind, rng)
        data = made.SerializeToString()
        return mutate(data, rng) if rng.random() < 0.5 else data

    def _metadata(self) -> tuple[tuple[str, str], ...]:
        rng = self.rng
        if rng.random() < 0.8:
            return ()
        key = rng.choice(("tenant", "traceparent", "authorization", "request-id", "x-anything"))
        value = "".join(chr(rng.randrange(32, 127)) for _ in range(rng.choice((0, 1, 8, 60, 70, 300))))
        return ((key, value),)


def _parses(method: MethodDescriptor, data: bytes) -> bool:
    try:
        message_class(method.input_type).FromString(data)
    except DecodeError:
        return False
    return True


async def fire(address: str, shots: Sequence[Shot]) -> Findings:
    """All of them, some at a time. A stream is left when it has said something."""
    findings = Findings()
    waiting = iter(shots)
    known = methods()
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.max_metadata_size", 1 << 16)]
    async with grpc.aio.insecure_channel(address, options=options) as channel:

        async def one_after_the_other() -> None:
            for shot in waiting:  # shared by all
                status = await _status(channel, known[shot.path], shot)
                findings.counts.setdefault(shot.path, Counter())[status] += 1
                if status == "HANGS" or status in {code.name for code in FORBIDDEN}:
                    findings.bad.append((shot, status))

        await asyncio.gather(*(one_after_the_other() for _ in range(AT_ONCE)))
    return findings


async def _status(channel: grpc.aio.Channel, method: MethodDescriptor, shot: Shot) -> str:
    try:
        async with asyncio.timeout(PATIENCE):
            await _call(channel, method, shot)
    except grpc.aio.AioRpcError as error:
        return error.code().name
    except TimeoutError:
        return "HANGS"
    return "OK"


async def _call(channel: grpc.aio.Channel, method: MethodDescriptor, shot: Shot) -> None:
    call: Any
    if not method.server_streaming:
        call = channel.unary_unary(shot.path)
        await call(shot.data, metadata=shot.metadata)
        return
    if method.client_streaming:
        call = channel.stream_stream(shot.path)
        call = call(iter([shot.data]), metadata=shot.metadata)
    else:
        call = channel.unary_stream(shot.path)
        call = call(shot.data, metadata=shot.metadata)
    try:
        async for _ in call:
            break
    finally:
        call.cancel()

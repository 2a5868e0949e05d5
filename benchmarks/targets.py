"""How each kind of server is spoken to, with as little work on our side as its protocol allows.

The load client shares the cores with whom it measures: what it costs is in every figure. So answers are looked at only
as far as counting tokens needs.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import grpc
from grpc_health.v1 import health_pb2
from pagewire.v1 import inference_pb2

from client import api
from client.load import Target

GENERATE = "/pagewire.v1.InferenceService/Generate"
LINE = 1 << 22  # bytes, of one line of an answer

Dialect = Literal["grpc", "openai", "llama", "lines"]


class TargetError(Exception):
    """An answer that is none."""


class Speaker(Protocol):
    """Speaks to a server on this port of the loopback address."""

    async def ready(self, port: int) -> bool:
        """Whether it takes requests by now; asked again and again."""

    def target(self, port: int) -> AbstractAsyncContextManager[Target]: ...


class Grpc:
    """Pagewire's own API."""

    async def ready(self, port: int) -> bool:
        if not await listening(port):
            return False
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            check = channel.unary_unary(
                "/grpc.health.v1.Health/Check",
                health_pb2.HealthCheckRequest.SerializeToString,
                health_pb2.HealthCheckResponse.FromString,
            )
            try:
                answer = await check(health_pb2.HealthCheckRequest(), timeout=5)
            except grpc.RpcError:
                return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    @asynccontextmanager
    async def target(self, port: int) -> AsyncIterator[Target]:
        async with service(f"127.0.0.1:{port}") as target:
            yield target


@asynccontextmanager
async def service(address: str) -> AsyncIterator[Target]:
    """A Pagewire server that runs already."""
    async with grpc.aio.insecure_channel(address, api.channel_options(api.Keepalive())) as channel:
        yield GrpcTarget(channel)


class GrpcTarget:
    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.generate = channel.unary_stream(
            GENERATE,
            request_serializer=inference_pb2.GenerateRequest.SerializeToString,
            response_deserializer=inference_pb2.GenerateResponse.FromString,
        )

    async def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        sampling = api.SamplingParams(temperature=0, max_tokens=output_tokens, ignore_eos=True)
        request = inference_pb2.GenerateRequest(token_ids=api.TokenIds(ids=prompt), sampling=sampling)
        try:
            async for response in self.generate(request):
                if tokens := len(response.delta.token_ids):
                    yield tokens
        except grpc.RpcError as error:
            raise TargetError(f"{error.code().name}: {error.details()}") from error


@dataclass(frozen=True)
class Http:
    """Servers with server-sent events, by token ids.

    An event with `middle` in it is one token; servers sometimes send several at once, so the last event's count,
    behind `count`, corrects the sum.
    """

    path: str
    length: str  # the field for how many tokens
    fields: Mapping[str, Any]
    middle: bytes
    count: bytes

    async def ready(self, port: int) -> bool:
        if not await listening(port):
            return False
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(_head("GET", "/health", port))
            return b" 200 " in await reader.readline()
        except OSError:
            return False
        finally:
            writer.close()

    @asynccontextmanager
    async def target(self, port: int) -> AsyncIterator[Target]:
        yield HttpTarget(self, port)


class HttpTarget:
    def __init__(self, http: Http, port: int) -> None:
        self.http, self.port = http, port

    async def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        http = self.http
        body = json.dumps({"prompt": prompt, http.length: output_tokens, **http.fields}).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=LINE)
        seen, last = 0, b""
        try:
            writer.write(_head("POST", http.path, self.port, len(body)) + body)
            status = await reader.readline()
            if b" 200 " not in status:
                raise TargetError((status + await reader.read(2000)).decode(errors="replace").strip())
            async for line in reader:
                if not line.startswith(b"data: {"):
                    continue  # headers, sizes of chunks, blank lines, [DONE]
                if http.middle in line:
                    seen += 1
                    yield 1
                last = line if http.count in line else last
        finally:
            writer.close()
        if not last:
            raise TargetError(f"the stream ended without {http.count.decode()}")
        number = re.match(rb"\d+", last.partition(http.count)[2])
        used = int(number[0]) if number else 0
        if used != seen:
            yield used - seen


class Lines:
    """The line protocol of benchmarks/peers/inside/openvino_server.py: one connection for all requests."""

    async def ready(self, port: int) -> bool:
        return await listening(port)

    @asynccontextmanager
    async def target(self, port: int) -> AsyncIterator[Target]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        target = LinesTarget(writer)
        receiving = asyncio.create_task(target.receive(reader))
        try:
            yield target
        finally:
            receiving.cancel()
            writer.close()


class LinesTarget:
    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self.numbers = itertools.count()
        self.queues: dict[int, asyncio.Queue[int]] = {}

    async def receive(self, reader: asyncio.StreamReader) -> None:
        async for line in reader:
            number, tokens = map(int, line.split())
            self.queues[number].put_nowait(tokens)
        for queue in self.queues.values():
            queue.put_nowait(0)

    async def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        number = next(self.numbers)
        queue = self.queues[number] = asyncio.Queue()
        self.writer.write(json.dumps({"id": number, "prompt": prompt, "tokens": output_tokens}).encode() + b"\n")
        missing = output_tokens
        while missing > 0:
            tokens = await queue.get()
            if tokens == 0:
                raise TargetError("the connection ended")
            missing -= tokens
            yield tokens
        del self.queues[number]


GREEDY = {"temperature": 0, "ignore_eos": True, "stream": True}
SPEAKERS: dict[Dialect, Speaker] = {
    "grpc": Grpc(),
    "openai": Http(
        "/v1/completions",
        "max_tokens",
        {**GREEDY, "stream_options": {"include_usage": True}},
        middle=b'"finish_reason":null',
        count=b'"completion_tokens":',
    ),
    # its own way in: smaller events, and a say in the samplers, of which greedy needs one
    "llama": Http(
        "/completion",
        "n_predict",
        {**GREEDY, "cache_prompt": True, "samplers": ["top_k"], "top_k": 1},
        middle=b'"stop":false',
        count=b'"tokens_predicted":',
    ),
    "lines": Lines(),
}


async def listening(port: int) -> bool:
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
    except OSError:
        return False
    writer.close()
    return True


def _head(method: str, path: str, port: int, length: int = 0) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", f"Host: 127.0.0.1:{port}", "Connection: close"]
    lines += ["Content-Type: application/json", f"Content-Length: {length}"] if length else []
    return "\r\n".join([*lines, "", ""]).encode()

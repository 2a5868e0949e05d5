"""Whom a benchmark runs: how each is started, how it says that it is ready, how it streams."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from client.aio import Client
from client.errors import ServiceError
from client.load import Service, Target


class Contestant(Protocol):
    @property
    def name(self) -> str: ...

    def command(self, port: int) -> list[str]:
        """Starts it on this port of the loopback address."""

    async def ready(self, port: int) -> bool:
        """Whether it takes requests by now."""

    def target(self, port: int) -> AbstractAsyncContextManager[Target]: ...


@dataclass(frozen=True)
class Pagewire:
    """This project, over its own gRPC."""

    model: str
    flags: tuple[str, ...] = ()
    name: str = "pagewire"

    def command(self, port: int) -> list[str]:
        return [sys.executable, "-m", "client.cli", "serve", self.model, "--port", str(port), *self.flags]

    async def ready(self, port: int) -> bool:
        async with Client(f"127.0.0.1:{port}") as client:
            try:
                return await client.serving(timeout=5)
            except ServiceError:
                return False

    @asynccontextmanager
    async def target(self, port: int) -> AsyncIterator[Target]:
        async with Client(f"127.0.0.1:{port}") as client:
            yield Service(client)


@dataclass(frozen=True)
class OpenAIPeer:
    """A server with OpenAI's /v1/completions, such as llama-server or vLLM. `template` holds {port}."""

    name: str
    template: str

    def command(self, port: int) -> list[str]:
        return [part.replace("{port}", str(port)) for part in shlex.split(self.template)]

    async def ready(self, port: int) -> bool:
        try:
            async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/health") as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False

    @asynccontextmanager
    async def target(self, port: int) -> AsyncIterator[Target]:
        unlimited = aiohttp.ClientTimeout(total=None)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}", timeout=unlimited, connector=connector) as session:
            yield _Completions(session)


class _Completions:
    """One event a token, as those servers send them; the usage of the last event corrects servers that send several."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def stream(self, prompt: list[int], output_tokens: int) -> AsyncIterator[int]:
        request = {
            "prompt": prompt,  # token ids: the same for everybody
            "max_tokens": output_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        seen, used = 0, None
        async with self.session.post("/v1/completions", json=request) as answer:
            answer.raise_for_status()
            async for line in answer.content:
                if not line.startswith(b"data: {"):
                    continue  # blank lines between events, and the [DONE] at the end
                event = json.loads(line[6:])
                used = (event.get("usage") or {}).get("completion_tokens", used)
                if event.get("choices") and event["choices"][0].get("finish_reason") is None:
                    seen += 1
                    yield 1
        if used is not None and used != seen:
            yield used - seen

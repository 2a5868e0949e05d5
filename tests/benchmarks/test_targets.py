"""Each protocol: how many tokens are counted, and what a refusal says."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from benchmarks import contestants
from benchmarks.process import running
from benchmarks.targets import SPEAKERS, Dialect, TargetError, service
from client.load import Target
from tests.client.scripted import ScriptedServer

FAKE = Path(__file__).parent / "fake_peer.py"


@asynccontextmanager
async def _fake(dialect: Dialect, directory: Path) -> AsyncIterator[Target]:
    command = (sys.executable, str(FAKE), "{port}", str(directory))
    peer = contestants.Contestant("fake", command, dialect)
    async with running(peer, patience=30) as started, peer.speaker.target(started.port) as target:
        yield target


@pytest.mark.parametrize("dialect", ["openai", "llama"])
async def test_tokens_of_events_and_of_the_last_count(dialect: Dialect, tmp_path: Path) -> None:
    async with _fake(dialect, tmp_path) as target:
        assert [tokens async for tokens in target.stream([1, 2], 5)] == [1, 1, 1, 1, 1]
        assert [tokens async for tokens in target.stream([1, 2], 1)] == [1]
        with pytest.raises(TargetError, match=r"400 no such token"):
            await anext(aiter(target.stream([404], 5)))
    asked = json.loads((tmp_path / "requests").read_text().splitlines()[0])
    assert asked["prompt"] == [1, 2]
    assert (asked["temperature"], asked["ignore_eos"], asked["stream"]) == (0, True, True)


async def test_our_own_service(server: ScriptedServer) -> None:
    async with service(server.address) as target:
        assert sum([tokens async for tokens in target.stream([1, 2, 3], 5)]) == 5
    assert server.requests[0].sampling.ignore_eos
    assert server.requests[0].sampling.temperature == 0


async def test_our_own_service_is_ready_when_it_is_serving(server: ScriptedServer) -> None:
    port = int(server.address.rpartition(":")[2])
    server.serving(False)
    assert not await SPEAKERS["grpc"].ready(port)
    server.serving(True)
    assert await SPEAKERS["grpc"].ready(port)


async def test_streams_share_a_line_connection() -> None:
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, second = [json.loads(await reader.readline())["id"] for _ in range(2)]
        writer.write(f"{first} 1\n{second} 2\n{first} 1\n".encode())
        await reader.readline()  # the third goes unanswered
        writer.close()

    listener = await asyncio.start_server(answer, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with listener, SPEAKERS["lines"].target(port) as target:
        got = await asyncio.gather(*(_all(target, prompt) for prompt in ([1], [2])))
        assert got == [[1, 1], [2]]
        with pytest.raises(TargetError, match="the connection ended"):
            await _all(target, [3])


async def _all(target: Target, prompt: list[int]) -> list[int]:
    return [tokens async for tokens in target.stream(prompt, 2)]

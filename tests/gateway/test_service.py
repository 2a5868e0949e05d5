"""A service with its gateway, over real processes: one goes with the other, and a drain loses no client of either."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket

import openai
import psutil
import pytest

from examples.live import free_port
from tests.e2e.service import NOT_SERVING, PATIENCE, Service, service
from tests.gateway.routers import client, until

NAMED = ("--served-model-name", "fake")
LIMIT = 10.0  # seconds, for what the kernel does by itself


def smg_of(running: Service) -> int:
    """The pid of its gateway."""
    [found] = [
        child.pid for child in psutil.Process(running.process.pid).children() if "worker_svc" not in child.cmdline()
    ]
    return found


async def until_ready(running: Service) -> None:
    await asyncio.to_thread(until, lambda: "pagewire ready" in running.log.read_text(), "the ready line", PATIENCE)


def complete(api: openai.OpenAI, tokens: int = 5) -> str:
    answer = api.completions.create(model="fake", prompt="hello", max_tokens=tokens, temperature=0.0)
    return answer.choices[0].text


@pytest.fixture
def port() -> int:
    return free_port()


async def test_the_ready_line_names_the_url_and_it_serves(port: int) -> None:
    async with service("fake:", "--openai-port", str(port), *NAMED) as running:
        await until_ready(running)
        ready = next(line for line in running.log.read_text().splitlines() if "pagewire ready" in line)
        assert ready.endswith(f"; OpenAI's API: http://127.0.0.1:{port}/v1")
        assert await asyncio.to_thread(complete, client(port))
        smg = os.pidfd_open(smg_of(running))
        running.process.kill()
        assert select.select([smg], [], [], LIMIT)[0], "it outlived its parent"
        os.close(smg)


async def test_a_gateway_that_dies_is_replaced_and_streams_of_others_go_on(port: int) -> None:
    async with service("fake:delay_ms=1", "--openai-port", str(port), *NAMED) as running:
        await until_ready(running)
        os.kill(smg_of(running), signal.SIGKILL)
        until_text = "the OpenAI gateway was killed by SIGKILL; it is started again in 0.25 s"
        await asyncio.to_thread(until, lambda: until_text in running.log.read_text(), "a word about it")
        patient = client(port).with_options(max_retries=100)

        def answers() -> bool:
            try:
                return bool(complete(patient))
            except openai.NotFoundError:  # it listens a moment before it knows its workers
                return False

        await asyncio.to_thread(until, answers, "an answer", PATIENCE)


async def test_a_drain_finishes_what_the_gateway_has_in_hand(port: int) -> None:
    async with service("fake:delay_ms=20", "--openai-port", str(port), *NAMED) as running:
        await until_ready(running)
        api = client(port)
        stream = api.completions.create(
            model="fake", prompt="hello", max_tokens=100, temperature=0.0, stream=True, extra_body={"ignore_eos": True}
        )
        chunks = iter(stream)
        await asyncio.to_thread(next, chunks)
        running.process.send_signal(signal.SIGTERM)
        await running.until_health(NOT_SERVING)
        assert await asyncio.to_thread(complete, api), "what it still takes is served: we drain after it"
        rest = await asyncio.to_thread(list, chunks)
        assert [c.finish_reason for chunk in rest for c in chunk.choices if c.finish_reason] == ["length"]
        assert await running.wait() == 0
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port))


async def test_a_second_signal_ends_both(port: int) -> None:
    async with service("fake:delay_ms=20", "--openai-port", str(port), *NAMED) as running:
        await until_ready(running)
        smg = os.pidfd_open(smg_of(running))
        stream = client(port).completions.create(model="fake", prompt="hello", max_tokens=8000, stream=True)
        await asyncio.to_thread(next, iter(stream))
        running.process.send_signal(signal.SIGTERM)
        await running.until_health(NOT_SERVING)
        running.process.send_signal(signal.SIGTERM)
        assert await running.wait(LIMIT * 2) == 1
        assert select.select([smg], [], [], LIMIT)[0]
        os.close(smg)

"""Streams that go on by themselves: both clients against servers whose streams break."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

import grpc
import pytest

from client import aio, errors
from client.api import Chunk, GenerateDelta, Keepalive, Resume, Retry, SamplingParams
from client.client import Client
from client.retry import Attempts, Places
from tests.client.breaking import BreakingServer
from tests.client.scripted import PATIENCE
from tests.client.test_retry import Clock, overloaded, unavailable
from tests.client.wire import Wire

QUICK = Resume(attempts=4, backoff=0.01)
WORDS = "one two three four five"
both = pytest.mark.parametrize("kind", ["blocking", "aio"])


@pytest.fixture
def servers() -> Iterator[tuple[BreakingServer, BreakingServer]]:
    pair = BreakingServer(), BreakingServer()
    yield pair
    for server in pair:
        server.close()


@pytest.fixture
def breaking(servers: tuple[BreakingServer, BreakingServer]) -> BreakingServer:
    return servers[0]


@dataclass
class Got:
    text: dict[int, str] = field(default_factory=dict)
    token_ids: dict[int, list[int]] = field(default_factory=dict)
    scored: dict[int, list[int]] = field(default_factory=dict)
    finished: list[int] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    def take(self, chunk: Chunk) -> None:
        assert chunk.index not in self.finished, "nothing comes behind an end"
        if isinstance(chunk, GenerateDelta):
            assert chunk.text or chunk.prompt_logprobs, "a message that says nothing"
            self.text[chunk.index] = self.text.get(chunk.index, "") + chunk.text
            self.token_ids.setdefault(chunk.index, []).extend(chunk.token_ids)
            self.scored.setdefault(chunk.index, []).extend(entry.token_id for entry in chunk.prompt_logprobs)
        else:
            self.finished.append(chunk.index)


async def said(
    kind: str,
    address: str | list[str],
    retry: Retry | None = QUICK,
    sampling: SamplingParams | None = None,
    prompt: str = WORDS,
    request_id: str = "",
) -> Got:
    got = Got()

    def blocking() -> None:
        with Client(address, retry=retry) as client:
            generation = client.generate(prompt, sampling, request_id=request_id, timeout=PATIENCE)
            for chunk in generation:
                got.take(chunk)
            got.metadata = generation.metadata()

    if kind == "blocking":
        await asyncio.to_thread(blocking)
        return got
    async with aio.Client(address, retry=retry) as client:
        generation = client.generate(prompt, sampling, request_id=request_id, timeout=PATIENCE)
        async for chunk in generation:
            got.take(chunk)
        got.metadata = await generation.metadata()
    return got


@both
async def test_a_broken_stream_goes_on_under_what_it_was_told(kind: str, breaking: BreakingServer) -> None:
    breaking.ends = [(2, "UNAVAILABLE", ""), (1, "UNAVAILABLE", ""), (0, "UNAVAILABLE", "")]
    got = await said(kind, breaking.address, sampling=SamplingParams(temperature=0.5))
    assert (got.text, got.token_ids, got.finished) == ({0: f"{WORDS} "}, {0: [0, 1, 2, 3, 4]}, [0])
    first, *later = breaking.requests
    assert (first.request_id, first.sampling.HasField("seed"), first.resume_fingerprint) == ("", False, "")
    assert [list(r.resume_token_ids[0].token_ids) for r in later] == [[0, 1], [0, 1, 2], [0, 1, 2]]
    for request in later:
        assert (request.request_id, request.sampling.seed, request.resume_fingerprint) == ("made", 77, "f00d")
        assert (request.sampling.temperature, request.text) == (0.5, WORDS), "and is else the same"
        assert not request.allow_inexact_resume
    assert (got.metadata["request-id"], got.metadata["seed"]) == ("made", "77")


@both
@pytest.mark.parametrize("cut", range(1, 17))
async def test_nothing_is_lost_or_repeated_wherever_it_breaks(kind: str, cut: int, breaking: BreakingServer) -> None:
    """Three streams of different lengths, with prompt logprobs, broken behind any of their messages."""
    sampling = SamplingParams(n=3, prompt_logprobs=0)
    whole = await said(kind, breaking.address, sampling=sampling, prompt="a b c d")
    assert whole.text == {0: "a b c d ", 1: "a b c ", 2: "a b "}
    assert whole.scored == {index: [1, 2, 3] for index in range(3)}
    breaking.ends = [(cut, "UNAVAILABLE", ""), (2, "UNAVAILABLE", "")]
    got = await said(kind, breaking.address, sampling=sampling, prompt="a b c d")
    assert (got.text, got.token_ids, got.scored) == (whole.text, whole.token_ids, whole.scored)
    assert sorted(got.finished) == [0, 1, 2]


@both
async def test_a_stream_that_has_all_of_it_needs_no_more(kind: str, breaking: BreakingServer) -> None:
    breaking.ends = [(6, "UNAVAILABLE", "")]  # behind its end, before its status
    got = await said(kind, breaking.address)
    assert (got.text[0], got.finished, len(breaking.requests)) == (f"{WORDS} ", [0], 1)


@both
async def test_without_the_policy_it_is_raised(kind: str, breaking: BreakingServer) -> None:
    breaking.ends = [(2, "UNAVAILABLE", "")]
    with pytest.raises(errors.UnavailableError):
        await said(kind, breaking.address, Retry(attempts=4, backoff=0.01))
    assert len(breaking.requests) == 1


@both
async def test_attempts_are_those_of_one_trouble(kind: str, breaking: BreakingServer) -> None:
    trouble = [(0, "UNAVAILABLE", "")] * 3
    breaking.ends = [*trouble, (1, "UNAVAILABLE", ""), *trouble[1:], (1, "UNAVAILABLE", ""), *trouble]
    with pytest.raises(errors.UnavailableError):
        await said(kind, breaking.address)
    assert len(breaking.requests) == 10, "three futile ones behind each word that came, then the last"


@both
@pytest.mark.parametrize("status", ["INTERNAL", "CANCELLED", "DEADLINE_EXCEEDED", "INVALID_ARGUMENT"])
async def test_what_going_on_would_not_mend_is_raised(kind: str, status: str, breaking: BreakingServer) -> None:
    breaking.ends = [(1, status, "")]
    with pytest.raises(errors.ServiceError) as caught:
        await said(kind, breaking.address)
    assert caught.value.code.name == status
    assert len(breaking.requests) == 1


@both
async def test_a_reader_that_was_too_slow_reads_on(kind: str, breaking: BreakingServer) -> None:
    breaking.ends = [(2, "RESOURCE_EXHAUSTED", "SLOW_READER")]
    assert (await said(kind, breaking.address)).text[0] == f"{WORDS} "


@both
async def test_it_goes_on_at_the_next_address(kind: str, servers: tuple[BreakingServer, BreakingServer]) -> None:
    first, second = servers
    first.ends = [(2, "UNAVAILABLE", "")] * 2
    got = await said(kind, [first.address, second.address], Resume(attempts=2, backoff=1000))
    assert got.text[0] == f"{WORDS} "
    assert (len(first.requests), len(second.requests)) == (1, 1), "at once: another address needs no pause"


@both
async def test_where_another_model_is_it_cannot_go_on(
    kind: str, servers: tuple[BreakingServer, BreakingServer]
) -> None:
    first, second = servers
    second.fingerprint = "beef"
    first.ends = [(2, "UNAVAILABLE", ""), (1, "UNAVAILABLE", "")]
    assert (await said(kind, [first.address, second.address])).text[0] == f"{WORDS} "
    assert (len(first.requests), len(second.requests)) == (3, 1), "and it is not asked again"
    first.ends = [(2, "UNAVAILABLE", "")]
    with pytest.raises(errors.FailedPreconditionError) as caught:
        await said(kind, [first.address, second.address], Resume(attempts=2, backoff=0.01))
    assert caught.value.reason == "RESUME_FINGERPRINT"


@both
async def test_an_id_that_its_service_still_takes_for_running_is_freed(kind: str, breaking: BreakingServer) -> None:
    breaking.deaf = True
    breaking.ends = [(2, "UNAVAILABLE", "")]
    assert (await said(kind, breaking.address)).text[0] == f"{WORDS} "
    assert breaking.cancels == ["made"]


@both
async def test_an_id_of_somebody_else_is_left_alone(kind: str, breaking: BreakingServer) -> None:
    breaking.running.add("theirs")
    with pytest.raises(errors.AlreadyExistsError):
        await said(kind, breaking.address, request_id="theirs")
    assert (len(breaking.requests), breaking.cancels) == (1, [])


async def test_a_pause_can_be_left(breaking: BreakingServer) -> None:
    breaking.ends = [(2, "UNAVAILABLE", "")]
    async with aio.Client(breaking.address, retry=Resume(backoff=50, max_backoff=50)) as client:
        generation = client.generate(WORDS)
        assert [(await anext(generation)).index for _ in range(2)] == [0, 0]
        reading = asyncio.ensure_future(anext(generation))
        done, _ = await asyncio.wait([reading], timeout=0.2)
        assert not done
        generation.cancel()
        with pytest.raises(errors.CancelledError):
            await asyncio.wait_for(reading, PATIENCE)


@both
async def test_small_calls_go_to_the_next_address_and_stay_there(
    kind: str, servers: tuple[BreakingServer, BreakingServer]
) -> None:
    first, second = servers
    addresses = [first.address, second.address]
    first.failing = 1
    if kind == "blocking":
        with Client(addresses, retry=Retry(backoff=1000)) as client:
            assert client.address == first.address
            assert client.model().name == "echo"
            assert client.address == second.address
            second.running.add("r")
            client.cancel("r")
    else:
        async with aio.Client(addresses, retry=Retry(backoff=1000)) as client_aio:
            assert client_aio.address == first.address
            assert (await client_aio.model()).name == "echo"
            assert client_aio.address == second.address
            second.running.add("r")
            await client_aio.cancel("r")
    assert (first.cancels, second.cancels) == (["r"], ["r"])


def test_an_address_must_be_given() -> None:
    for nothing in ("", [], ["a:1", ""]):
        with pytest.raises(ValueError, match="must be HOST:PORT, or several of them"):
            Client(nothing)


# ---------------------------------------------------------------- the policy by itself


def attempts(retry: Retry, count: int = 1, clock: Clock | None = None, timeout: float | None = None) -> Attempts:
    return Attempts(retry, timeout, clock or Clock(), lambda: 0.0, Places(count))


def not_here() -> errors.ServiceError:
    details = errors.Details(reason="RESUME_FINGERPRINT")
    return errors.FailedPreconditionError(grpc.StatusCode.FAILED_PRECONDITION, "", details)


def test_the_budget_is_that_of_one_trouble() -> None:
    clock = Clock()
    call = attempts(Resume(budget=10, backoff=4, max_backoff=4), clock=clock)
    clock.now += 1000  # it was queued, or brought tokens
    assert call.pause(unavailable()) == 4
    clock.now += 6
    assert call.pause(unavailable()) == 4
    clock.now += 1
    assert call.pause(unavailable()) is None
    call.progressed()
    assert call.pause(unavailable()) == 4


def test_every_address_is_tried_before_a_pause() -> None:
    call = attempts(Resume(backoff=1, max_backoff=100), count=3)
    places, pauses = [call.place], []
    for _ in range(5):
        pauses.append(call.again(unavailable()))
        places.append(call.place)
    assert places == [0, 1, 2, 0, 1, 2]
    assert pauses == [0, 0, 4, 8, 16]


def test_an_address_that_cannot_serve_it_is_left_out() -> None:
    call = attempts(Resume(backoff=1), count=3)
    assert (call.again(unavailable()), call.place) == (0, 1)
    assert (call.again(not_here()), call.place) == (0, 2)
    assert (call.again(unavailable()), call.place) == (4, 0)
    assert (call.again(not_here()), call.place) == (0, 2)
    with pytest.raises(errors.FailedPreconditionError):
        call.again(not_here())


def test_new_calls_begin_where_the_last_one_was_served() -> None:
    places = Places(2)
    first = Attempts(Retry(), None, Clock(), lambda: 0.0, places)
    assert first.again(unavailable()) == 0
    assert Attempts(None, None, Clock(), lambda: 0.0, places).place == 1
    late = Attempts(None, None, Clock(), lambda: 0.0, places)
    with pytest.raises(errors.UnavailableError):
        late.again(unavailable())
    assert places.current == 0, "also where it was the last word"
    with pytest.raises(errors.OverloadedError):
        Attempts(None, None, Clock(), lambda: 0.0, places).again(overloaded(1))
    assert places.current == 0, "a full queue is there, and it is not unavailable"


# ---------------------------------------------------------------- the command line, and a wire


def test_the_command_line_goes_on(breaking: BreakingServer) -> None:
    breaking.ends = [(2, "UNAVAILABLE", "")]
    command = [sys.executable, "-m", "client.cli", "generate", WORDS, "--resume", "--address", breaking.address]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{WORDS} \n", "")
    breaking.ends = [(1, "UNAVAILABLE", "")]
    command = [sys.executable, "-m", "client.cli", "chat", "--resume", "--address", breaking.address]
    done = subprocess.run(command, input="hello\n", capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_cut_connection_is_made_again(breaking: BreakingServer) -> None:
    breaking.ends = [(2, "WAIT", "")]
    with Wire(breaking.address) as wire, Client(wire.address, retry=QUICK) as client:
        generation = client.generate(WORDS, timeout=PATIENCE)
        brought = [next(generation), next(generation)]
        wire.cut()
        brought += generation
        breaking.go.set()
    assert "".join(chunk.text for chunk in brought if isinstance(chunk, GenerateDelta)) == f"{WORDS} "


@pytest.mark.full
def test_a_silent_connection_is_left_for_a_new_one(breaking: BreakingServer) -> None:
    """Its service has not noticed, and has the id in use. Up to 11 s, because pings are no more frequent."""
    breaking.deaf = True
    breaking.ends = [(2, "WAIT", "")]
    keepalive = Keepalive(seconds=10, timeout=1)
    with Wire(breaking.address) as wire, Client(wire.address, retry=QUICK, keepalive=keepalive) as client:
        generation = client.generate(WORDS, timeout=60)
        brought = [next(generation), next(generation)]
        wire.swallow()
        brought += generation
        breaking.go.set()
    assert "".join(chunk.text for chunk in brought if isinstance(chunk, GenerateDelta)) == f"{WORDS} "
    assert breaking.cancels == ["made"]

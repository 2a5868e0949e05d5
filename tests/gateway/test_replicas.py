"""Two services behind one smg: it sends prompts to where their beginning is, and its clients outlive a service."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai
import pytest

from client.api import SamplingParams
from client.client import Client
from tests.gateway.routers import Router, router, until
from tests.gateway.services import Served, served

MODEL = "fake:delay_ms=10"
FLAGS = ("--max-num-seqs", "4", "--served-model-name", "fake")
# Otherwise smg sends a prompt now and then to whoever has little in its cache.
BY_CACHE_ALONE = ("--worker-warmup-secs", "0", "--worker-warmup-divert-every", "0")


@dataclass
class Pair:
    services: list[Served]
    router: Router

    def __iter__(self) -> Iterator[Served]:
        return iter(self.services)


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    with two_behind_one(tmp_path, *BY_CACHE_ALONE) as made:
        yield made


@pytest.fixture
def even_pair(tmp_path: Path) -> Iterator[Pair]:
    """In turns, so that both have something to do, and to lose."""
    with two_behind_one(tmp_path, "--policy", "round_robin") as made:
        yield made


@contextmanager
def two_behind_one(directory: Path, *flags: str) -> Iterator[Pair]:
    with ExitStack() as stack:
        services = [stack.enter_context(served(MODEL, *FLAGS)) for _ in range(2)]
        addresses = [one.address for one in services]
        yield Pair(services, stack.enter_context(router(directory, *addresses, flags=flags)))


def prompt(letter: str) -> str:
    return letter * 200


def warm(service: Served, text: str) -> None:
    """Makes it compute a prompt of which smg hears by KV events alone."""
    with Client(service.address) as native:
        for _ in native.generate(text, SamplingParams(max_tokens=1, temperature=0)):
            pass


def ask(api: openai.OpenAI, text: str, tokens: int = 1) -> openai.types.Completion:
    return api.completions.create(model="fake", prompt=text, max_tokens=tokens, temperature=0.0)


def test_a_prompt_goes_to_where_its_beginning_is(pair: Pair) -> None:
    """smg has seen none of these prompts: it can only know by the events."""
    one, other = pair
    letters = {"a": one, "b": other, "c": one, "d": other, "e": other, "f": one}
    for letter, where in letters.items():
        warm(where, prompt(letter))
    api = pair.router.client
    ask(api, "warm-up")
    before = {id(where): where.stats().cached_tokens for where in pair}
    for letter in letters:
        ask(api, prompt(letter) + " and more")
    hits = {id(where): where.stats().cached_tokens - before[id(where)] for where in pair}
    assert hits == {id(one): 3 * 192, id(other): 3 * 192}


def test_a_service_that_is_started_again_is_listened_to_again(pair: Pair, tmp_path: Path) -> None:
    one = pair.services[0]
    warm(one, prompt("a"))
    api = pair.router.client
    ask(api, prompt("a"))
    one.kill()
    with served(MODEL, *FLAGS, port=one.port) as again:
        warm(again, prompt("z"))

        def hits() -> bool:
            ask(api, prompt("z"))
            return again.stats().cached_tokens > 0

        until(hits, "the prompt goes where it is", 90)


def test_whoever_waits_for_a_whole_answer_gets_it_though_a_service_dies(even_pair: Pair) -> None:
    """Streams that have begun on it are lost; those that only wait there, and whole answers, begin anew elsewhere."""
    one, other = even_pair
    api = even_pair.router.client

    def whole(number: int) -> str:
        answer = ask(api, f"question {number} " * 8, tokens=200)
        return answer.choices[0].finish_reason

    ask(api, "warm-up")  # what the official client loads with its first call takes a while
    with ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(whole, number) for number in range(24)]
        until(lambda: all(service.stats().running >= 4 for service in even_pair), "both are busy")
        one.kill()
        assert [answer.result() for answer in asked] == ["length"] * 24
    assert other.stats().finished >= 24 - 4
    assert whole(100) == "length", "and nobody is sent to the dead one"


def test_a_stream_that_waits_in_a_queue_goes_elsewhere(even_pair: Pair) -> None:
    one = even_pair.services[0]
    api = even_pair.router.client

    def stream(number: int) -> str:
        """How it ended."""
        try:
            chunks = api.completions.create(
                model="fake", prompt=f"question {number} " * 8, max_tokens=200, temperature=0.0, stream=True
            )
            for chunk in chunks:
                if chunk.choices and chunk.choices[0].finish_reason:
                    return chunk.choices[0].finish_reason
        except openai.APIError as error:
            return type(error).__name__
        return "cut"

    ask(api, "warm-up")  # what the official client loads with its first call takes a while
    with ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(stream, number) for number in range(24)]
        until(lambda: all(s.stats().running >= 4 and s.stats().waiting >= 2 for s in even_pair), "both have a queue")
        one.process.send_signal(signal.SIGKILL)
        ends = [answer.result() for answer in asked]
    assert 20 <= ends.count("length") < 24, f"only the four that had begun are lost: {ends}"

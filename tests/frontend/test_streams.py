"""A call between the engine's deltas and a writer that is slower than they come."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from protos.engine_wire import FinishReason, Outputs, Submit, TokenDelta
from protos.wire import Sampling
from scheduler_svc.frontend.call import Call, open_streams
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.errors import ServiceError
from scheduler_svc.frontend.streams import Ending, Gain
from scheduler_svc.frontend.tokenizer import byte_tokenizer
from scheduler_svc.frontend.validation import Prepared, TextRules
from tests.frontend.scripted import ScriptedEngine, spelling

TOKENIZER = byte_tokenizer(256)


def open_call(
    link: EngineLink, n: int = 1, max_tokens: int = 4, stop: tuple[str, ...] = (), logprobs: int = -1
) -> Call:
    sampling = Sampling(max_tokens=max_tokens, logprobs=logprobs)
    submits = [Submit("r", [1, 2], 2, sampling, index=i, num_siblings=n) for i in range(n)]
    prepared = Prepared("r", 0, 2, submits, TextRules(stop=stop))
    streams = open_streams(prepared, TOKENIZER, time.monotonic(), with_text=True)
    return Call.open(prepared, link, streams, time.monotonic)


def held() -> ScriptedEngine:
    """It makes a token when a test says `step`."""
    engine = ScriptedEngine(EngineLink())
    engine.held = True
    return engine


async def texts(outputs: AsyncIterator[Gain | Ending]) -> str:
    return "".join([output.text async for output in outputs if isinstance(output, Gain)])


async def test_a_slow_call_leaves_the_next_one_of_its_id_alone() -> None:
    engine = held()
    first = open_call(engine.link)
    for _ in range(4):
        engine.step()  # the engine is done with it, its writer has not begun: the id is free
    assert "r" not in engine.link
    second = open_call(engine.link)
    assert await texts(first.outputs()) == "cdef"
    first.close()
    assert not engine.aborts
    for _ in range(4):
        engine.step()
    assert await texts(second.outputs()) == "cdef"


async def test_a_failed_call_leaves_the_next_one_of_its_id_alone() -> None:
    engine = held()
    first = open_call(engine.link)
    engine.sequences.clear()
    engine.link.deliver(Outputs([TokenDelta("r", 0, [], finish_reason=FinishReason.ERROR)]))
    second = open_call(engine.link)
    with pytest.raises(ServiceError):
        await texts(first.outputs())
    first.close()
    assert not engine.aborts
    second.close()
    assert [abort.request_id for abort in engine.aborts] == ["r"], "but its own close ends it"


async def test_an_index_that_gains_faster_than_the_client_reads_lets_the_others_have_their_turn() -> None:
    engine = held()
    call = open_call(engine.link, n=3, max_tokens=40)
    engine.step()
    indices = []
    async for output in call.outputs():
        indices.append(output.index)
        if engine.sequences:
            engine.step()  # everybody gains while one message is written
    assert indices[:39] == [0, 1, 2] * 13
    assert sorted(indices[-3:]) == [0, 1, 2], "and the ends of all"


@pytest.mark.parametrize("reason", [FinishReason.ABORTED, FinishReason.DEADLINE, FinishReason.ERROR])
@pytest.mark.parametrize(
    ("made", "sent"), [(b"ab ST", "ab "), ("ab 🎉".encode()[:-1], "ab ")], ids=["stop", "character"]
)
async def test_a_call_that_fails_keeps_back_what_it_held(reason: FinishReason, made: bytes, sent: str) -> None:
    engine = held()
    engine.script = spelling(made)
    call = open_call(engine.link, max_tokens=40, stop=("STOP",))
    for _ in made:
        engine.step()
    engine.link.deliver(Outputs([TokenDelta("r", 0, [], finish_reason=reason)]))
    got: list[str] = []

    async def read() -> None:
        async for output in call.outputs():
            assert isinstance(output, Gain)
            got.append(output.text)

    with pytest.raises(ServiceError):
        await asyncio.wait_for(read(), 20)
    assert "".join(got) == sent

"""EngineLink: who gets what, and when an id is free again."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from protos.engine_wire import FinishReason, Outputs, Question, ServiceStatus, Submit, TokenDelta
from protos.wire import Sampling
from scheduler_svc.frontend.engine_link import EngineLink
from tests.frontend.scripted import ScriptedEngine


def submits(request_id: str, n: int = 1) -> list[Submit]:
    return [Submit(request_id, [1, 2], 2, Sampling(max_tokens=4), index=i, num_siblings=n) for i in range(n)]


class Receiver:
    def __init__(self) -> None:
        self.deltas: list[TokenDelta] = []
        self.woken = 0

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        self.deltas += deltas

    def wake(self) -> None:
        self.woken += 1

    @property
    def token_ids(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]


def tokens(request_id: str, *token_ids: int, index: int = 0, finish: FinishReason | None = None) -> Outputs:
    return Outputs([TokenDelta(request_id, index, list(token_ids), finish_reason=finish)])


async def test_an_id_stays_taken_until_the_engine_ended_every_index() -> None:
    """What the engine had sent for the old request must not reach a new one of the same id."""
    link, old, new = EngineLink(), Receiver(), Receiver()
    ScriptedEngine(link).held = True
    route = link.submit(submits("r", 2), old)
    link.abort("r")
    route.forget()
    assert "r" in link
    link.deliver(Outputs([TokenDelta("r", 0, [5]), TokenDelta("r", 0, [], finish_reason=FinishReason.ABORTED)]))
    assert "r" in link
    link.deliver(Outputs([TokenDelta("r", 1, [], finish_reason=FinishReason.ABORTED)]))
    assert "r" not in link
    link.submit(submits("r"), new)
    link.deliver(Outputs([TokenDelta("r", 0, [6]), TokenDelta("unknown", 0, [7])]))
    assert (old.deltas, new.token_ids) == ([], [6])


async def test_a_first_token_and_an_end_wait_for_no_flush_and_bring_along_what_does() -> None:
    link, one, other = EngineLink(), Receiver(), Receiver()
    ScriptedEngine(link).held = True
    link.submit(submits("r", 2), one)
    link.submit(submits("s"), other)
    for message, hurries, taken, woken in [
        (tokens("r", 1), True, [1], 1),
        (tokens("r", 2), False, [1], 1),
        (tokens("r", 3, index=1), True, [1, 2, 3], 2),
        (tokens("r", 4, index=1), False, [1, 2, 3], 2),
        (tokens("r", 5, finish=FinishReason.LENGTH), True, [1, 2, 3, 4, 5], 3),
        (tokens("r", 6, index=1), False, [1, 2, 3, 4, 5], 3),
    ]:
        assert link.hurries(message) is hurries
        link.take(message)
        assert (one.token_ids, one.woken) == (taken, woken)
    assert link.flush()
    assert (one.token_ids, one.woken, other.woken) == ([1, 2, 3, 4, 5, 6], 4, 0)
    assert not link.flush(), "nothing has come since"


async def test_who_looks_for_stop_strings_sees_each_delta_and_writes_no_sooner() -> None:
    link, receiver = EngineLink(), Receiver()
    ScriptedEngine(link).held = True
    link.submit(submits("r"), receiver, looks=True)
    link.deliver(tokens("r", 1))
    assert link.hurries(tokens("r", 2))
    link.take(tokens("r", 2))
    assert (receiver.token_ids, receiver.woken) == ([1, 2], 1)
    link.flush()
    assert receiver.woken == 2


async def test_answers_find_their_questions_and_carry_the_status() -> None:
    link = EngineLink()
    engine = ScriptedEngine(link)
    seen: list[ServiceStatus] = []
    link.on_status(seen.append)
    answers = await asyncio.gather(link.ask(Question.CANCEL, "nobody"), link.ask(Question.FLUSH_CACHE))
    assert [(answer.found, answer.freed_blocks) for answer in answers] == [(False, 0), (True, 5)]
    assert seen[-1] == link.status == engine.status(True)

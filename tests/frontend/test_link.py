"""EngineLink: who gets what, and when an id is free again."""

from __future__ import annotations

import asyncio

from protos.wire import FinishReason, Outputs, Question, Sampling, ServiceStatus, Submit, TokenDelta
from scheduler_svc.frontend.engine_link import EngineLink
from tests.frontend.scripted import ScriptedEngine


def submits(request_id: str, n: int = 1) -> list[Submit]:
    return [Submit(request_id, [1, 2], 2, Sampling(max_tokens=4), index=i, num_siblings=n) for i in range(n)]


async def test_an_id_stays_taken_until_the_engine_ended_every_index() -> None:
    """What the engine had sent for the old request must not reach a new one of the same id."""
    link, old, new = EngineLink(), [], []  # type: ignore[var-annotated]
    ScriptedEngine(link).held = True
    route = link.submit(submits("r", 2), old.append)
    link.abort("r")
    route.forget()
    assert "r" in link
    link.deliver(Outputs([TokenDelta("r", 0, [5]), TokenDelta("r", 0, [], finish_reason=FinishReason.ABORTED)]))
    assert "r" in link
    link.deliver(Outputs([TokenDelta("r", 1, [], finish_reason=FinishReason.ABORTED)]))
    assert "r" not in link
    link.submit(submits("r"), new.append)
    link.deliver(Outputs([TokenDelta("r", 0, [6]), TokenDelta("unknown", 0, [7])]))
    assert (old, [delta.token_ids for delta in new]) == ([], [[6]])


async def test_answers_find_their_questions_and_carry_the_status() -> None:
    link = EngineLink()
    engine = ScriptedEngine(link)
    seen: list[ServiceStatus] = []
    link.on_status(seen.append)
    answers = await asyncio.gather(link.ask(Question.CANCEL, "nobody"), link.ask(Question.FLUSH_CACHE))
    assert [(answer.found, answer.freed_blocks) for answer in answers] == [(False, 0), (True, 5)]
    assert seen[-1] == link.status == engine.status(True)

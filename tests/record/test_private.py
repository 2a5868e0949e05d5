"""A private log: the engine decides the same, and what people wrote is not in it."""

from __future__ import annotations

import msgspec
import pytest
from msgspec.structs import replace

from protos.engine_wire import FinishReason, Outputs, Submit
from protos.wire import Epoch, RowResult, Sampling, StepPlan, StepResult, TokenLogprobs
from scheduler_svc.engine.events import AdapterClosed, AdapterLoaded, Event, WorkerLost, WorkerReady
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.record_private import HIDDEN, Pseudonyms, comparable
from tests.engine.world import request
from tests.record import busy

KEY = bytes(range(32))
EPOCH = Epoch(1, 1)


@pytest.mark.parametrize("seed", [1, 3])
def test_an_engine_that_hears_pseudonyms_plans_the_same(seed: int) -> None:
    world = busy.run(seed)
    stats = world.scheduler.stats()
    assert min(stats.preemptions, stats.recoveries, stats.cached_tokens, stats.rejected, stats.aborted) > 0
    pseudonyms, engine = Pseudonyms(KEY), Scheduler(busy.CONFIG)
    for event, answer in zip(world.log, world.answers, strict=True):
        hidden = pseudonyms.event(event)
        assert comparable(engine.handle(hidden)) == pseudonyms.answer(answer)
    assert engine.stats() == stats


def test_a_token_is_named_by_all_that_stands_before_it() -> None:
    def hidden(tokens: list[int], salt: str = "", tenant: str = "") -> list[int]:
        event = Pseudonyms(KEY).event(Submit("r", tokens, len(tokens), Sampling(5), cache_salt=salt, tenant=tenant))
        assert isinstance(event, Submit)
        return event.token_ids

    assert hidden([5, 6, 7])[:2] == hidden([5, 6, 8])[:2]
    assert hidden([5, 6, 7])[2] != hidden([5, 6, 8])[2]
    assert len(set(hidden([5] * 50))) == 50, "a word that comes again is no word that can be counted"
    for others in (hidden([5, 6], salt="s"), hidden([5, 6], tenant="t")):
        assert not set(others) & set(hidden([5, 6]))
    assert all(HIDDEN <= token < 2 * HIDDEN for token in hidden([5, 6, 7]))


def test_another_key_gives_other_names() -> None:
    submit = request("r", 20)
    one, other = (Pseudonyms(key).event(submit) for key in (KEY, KEY[::-1]))
    assert isinstance(one, Submit)
    assert isinstance(other, Submit)
    assert one.request_id != other.request_id
    assert not set(one.token_ids) & set(other.token_ids)


def engine_with_worker() -> Scheduler:
    engine = Scheduler(busy.CONFIG)
    engine.handle(WorkerReady(EPOCH, 64, busy.CONFIG.max_slots))
    return engine


def test_nothing_that_somebody_wrote_is_in_it() -> None:
    """Prompts and outputs of ids that nothing else has."""
    fields = {"bad_words": ((77001,),), "logit_bias": ((77002, 1.5),), "logprobs": 0, "prompt_logprobs": 0}
    names = {"cache_salt": "their-salt", "adapter": "their-adapter", "adapter_digest": "their-digest"}
    loaded, closed = AdapterLoaded("their-adapter", "their-digest"), AdapterClosed("their-adapter", "their files")
    submit = request("their-own-id", [77003] * 9, 6, seed=77004, **names, **fields)
    pseudonyms, engine = Pseudonyms(KEY), engine_with_worker()
    engine.handle(loaded)
    hidden: list[Event] = [pseudonyms.event(event) for event in (loaded, submit, closed)]
    answer = pseudonyms.answer(engine.handle(submit))
    plan = next(instruction for instruction in answer if isinstance(instruction, StepPlan))
    logprobs = TokenLogprobs(77005, -1.0, 1, (77006,), (-1.0,))
    row = RowResult(plan.rows[0].slot, 9, [77005], [logprobs], 0, [logprobs] * 8, b"77007")
    hidden.append(pseudonyms.event(StepResult(EPOCH, 1, [row])))
    hidden.append(pseudonyms.event(WorkerLost(EPOCH, "token 77008 is too large")))
    frames = [msgspec.msgpack.encode(part) for part in (*hidden, *answer)]
    for secret in (*map(msgspec.msgpack.encode, range(77001, 77007)), b"their", b"77007", b"77008"):
        assert not any(secret in frame for frame in frames), secret


def test_the_token_that_ends_a_stream_keeps_its_id_and_no_other_does() -> None:
    submit = request("r", [2, 2, 5], 6, eos_token_ids=(2,))
    pseudonyms, engine = Pseudonyms(KEY), engine_with_worker()
    event = pseudonyms.event(submit)
    assert isinstance(event, Submit)
    assert all(token >= HIDDEN for token in event.token_ids), "an end token of a prompt ends nothing"
    answer = pseudonyms.answer(engine.handle(submit))
    plan = next(instruction for instruction in answer if isinstance(instruction, StepPlan))
    results = [StepResult(EPOCH, 1, [RowResult(plan.rows[0].slot, 3, [token])]) for token in (7, 2)]
    hidden = map(pseudonyms.event, results)
    first, last = (result.rows[0].token_ids[0] for result in hidden if isinstance(result, StepResult))
    assert first >= HIDDEN
    assert last == 2


def test_a_stream_that_is_resumed_where_it_had_ended_ends_at_once() -> None:
    submit = replace(request("r", [5, 6, 2], 6, eos_token_ids=(2,)), prompt_len=2)
    for event in (submit, Pseudonyms(KEY).event(submit)):
        (outputs,) = engine_with_worker().handle(event)
        assert isinstance(outputs, Outputs)
        assert outputs.items[0].finish_reason is FinishReason.STOP

"""Courier: what goes to the event loop at once, what waits for the end of a pause, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.engine_wire import Answer, EngineStats, FinishReason, Outputs, ServiceStatus, Submit
from protos.wire import Sampling
from scheduler_svc.frontend.call import Call, open_streams
from scheduler_svc.frontend.courier import Courier, Postbag
from scheduler_svc.frontend.engine_link import EngineLink
from scheduler_svc.frontend.streams import Ending, Gain
from scheduler_svc.frontend.tokenizer import byte_tokenizer
from scheduler_svc.frontend.validation import Prepared, TextRules
from tests.frontend.scripted import ScriptedEngine
from tests.frontend.test_link import Receiver, submits, tokens

STATUS = ServiceStatus(True, "", None, [], EngineStats())


class Desk:
    """A courier whose event loop does what a test says, when it says so."""

    def __init__(self, interval: float = 0.02) -> None:
        self.link = EngineLink()
        ScriptedEngine(self.link).held = True
        self.soon: list[Callable[[], None]] = []
        self.pauses: list[tuple[float, Callable[[], None]]] = []
        self.courier = Courier(self.link, interval, self.soon.append, lambda *pause: self.pauses.append(pause))

    def post(self, *messages: Outputs | Answer | ServiceStatus) -> None:
        self.courier.post(list(messages))

    def run(self) -> int:
        """What was called soon; how many calls that were."""
        calls, self.soon[:] = list(self.soon), []
        for call in calls:
            call()
        return len(calls)

    def end_pause(self) -> None:
        assert len(self.pauses) == 1, "one timer at most"
        self.pauses.pop()[1]()


def opened(interval: float = 0.02) -> tuple[Desk, Receiver]:
    """With one stream, whose first token has gone out."""
    desk, receiver = Desk(interval), Receiver()
    desk.link.submit(submits("r"), receiver)
    desk.post(tokens("r", 1))
    assert desk.run() == 1
    assert (receiver.token_ids, receiver.woken) == ([1], 1)
    return desk, receiver


def test_what_one_turn_of_the_event_loop_sends_goes_to_the_engine_at_once_and_in_order() -> None:
    sent: list[tuple[str, ...]] = []
    soon: list[Callable[[], None]] = []
    bag = Postbag(lambda *messages: sent.append(tuple(message.request_id for message in messages)), soon.append)
    for name in ("r", "s"):
        bag.send(submits(name)[0])
    assert (sent, len(soon)) == ([], 1)
    soon.pop()()
    bag.send(submits("t")[0])
    assert (sent, len(soon)) == ([("r", "s")], 1)
    soon.pop()()
    assert sent == [("r", "s"), ("t",)]


def test_a_turn_that_has_much_to_send_does_not_keep_it_to_its_end() -> None:
    sent: list[int] = []
    soon: list[Callable[[], None]] = []
    bag = Postbag(lambda *messages: sent.append(len(messages)), soon.append)
    for _ in range(2 * Postbag.FULL + 5):
        bag.send(submits("r")[0])
    assert sent == [Postbag.FULL] * 2
    for call in soon:
        call()
    assert sent == [Postbag.FULL, Postbag.FULL, 5]


async def test_the_tokens_of_a_pause_go_out_together_at_its_end() -> None:
    desk, receiver = opened()
    assert [seconds for seconds, _ in desk.pauses] == [0.02]
    for token_id in (2, 3, 4):
        desk.post(tokens("r", token_id))
    assert desk.run() == 0, "nobody is woken for them"
    desk.end_pause()
    assert (receiver.token_ids, receiver.woken) == ([1, 2, 3, 4], 2)
    desk.post(tokens("r", 5))
    desk.end_pause()
    assert (receiver.token_ids, receiver.woken) == ([1, 2, 3, 4, 5], 3)


async def test_a_pause_in_which_nothing_came_is_the_last_and_the_next_token_waits_for_none() -> None:
    desk, receiver = opened()
    desk.end_pause()
    assert not desk.pauses
    desk.post(tokens("r", 2))
    assert desk.run() == 1
    assert (receiver.token_ids, receiver.woken) == ([1, 2], 2)
    assert desk.pauses, "but the one behind it waits again"


async def test_an_end_waits_for_no_pause_and_brings_what_waited() -> None:
    desk, receiver = opened()
    desk.post(tokens("r", 2))
    desk.post(tokens("r", 3, finish=FinishReason.LENGTH))
    assert desk.run() == 1
    assert (receiver.token_ids, receiver.woken) == ([1, 2, 3], 2)
    desk.end_pause()
    assert (receiver.woken, desk.pauses) == (2, [])


async def test_a_newcomers_first_token_leaves_the_others_asleep() -> None:
    desk, receiver = opened()
    newcomer = Receiver()
    desk.link.submit(submits("s"), newcomer)
    desk.post(Outputs([*tokens("r", 2).items, *tokens("s", 7).items]))
    assert desk.run() == 1
    assert (newcomer.token_ids, newcomer.woken, receiver.woken) == ([7], 1, 1)
    desk.end_pause()
    assert (receiver.token_ids, receiver.woken, newcomer.woken) == ([1, 2], 2, 1)


async def test_answers_and_statuses_wait_for_no_pause() -> None:
    desk, receiver = opened()
    seen: list[ServiceStatus] = []
    desk.link.on_status(seen.append)
    for message in (STATUS, Answer(5, STATUS)):
        desk.post(tokens("r", 2))
        desk.post(message)
        assert desk.run() == 1
    assert (seen, receiver.woken) == ([STATUS, STATUS], 1)


async def test_many_posts_before_the_loop_comes_to_it_are_one_call() -> None:
    desk, receiver = opened(interval=0)
    for token_id in (2, 3, 4):
        desk.post(tokens("r", token_id))
    assert desk.run() == 1
    assert (receiver.token_ids, receiver.woken) == ([1, 2, 3, 4], 2)


async def test_without_an_interval_each_step_is_a_message() -> None:
    desk, receiver = opened(interval=0)
    for token_id in (2, 3):
        desk.post(tokens("r", token_id))
        assert desk.run() == 1
    assert (receiver.woken, desk.pauses) == (3, [])


async def test_what_is_posted_while_a_pause_ends_is_not_forgotten() -> None:
    """The engine's thread may come between any two steps of the other: here, while a call is being woken."""
    desk, receiver = opened()
    desk.post(tokens("r", 2))
    receiver.wake = lambda: desk.post(tokens("r", 3))  # type: ignore[method-assign]
    desk.end_pause()
    receiver.wake = lambda: None  # type: ignore[method-assign]
    desk.run()
    if desk.pauses:
        desk.end_pause()
    assert receiver.token_ids == [1, 2, 3]


EVENTS = st.lists(st.sampled_from(["token", "token", "token", "loop", "pause", "read"]), max_size=60)


@pytest.mark.parametrize("stop", [(), ("ghi",)])
@given(EVENTS, st.sampled_from([0.0, 0.02]))
async def test_text_ids_and_usage_are_the_same_however_they_are_gathered(
    stop: tuple[str, ...], events: list[str], interval: float
) -> None:
    """A whole call behind the courier, under any order of tokens, loop iterations, pauses and reads."""
    desk = Desk(interval)
    sampling = Sampling(max_tokens=30)
    submit = Submit("r", [1, 2], 2, sampling)
    prepared = Prepared("r", 0, 2, [submit], TextRules(stop=stop))
    streams = open_streams(prepared, byte_tokenizer(256), time.monotonic(), with_text=True)
    call = Call.open(prepared, desk.link, streams, time.monotonic)
    made, got = list(range(97, 122)), list[Gain | Ending]()

    async def read() -> None:
        async for output in call.outputs():
            got.append(output)

    reader = asyncio.ensure_future(read())
    for event in [*events, *["token"] * len(made)]:
        if event == "token" and made:
            token = made.pop(0)
            desk.post(tokens("r", token, finish=None if made else FinishReason.LENGTH))
        elif event == "pause" and desk.pauses:
            desk.end_pause()
        elif event == "read":
            await asyncio.sleep(0)
        else:
            desk.run()
    desk.run()
    await asyncio.wait_for(reader, 20)
    shown = "abcdef" if stop else "abcdefghijklmnopqrstuvwxy"
    counted = "abcdefghi" if stop else shown
    deltas, ends = [o for o in got if isinstance(o, Gain)], [o for o in got if isinstance(o, Ending)]
    assert "".join(gain.text for gain in deltas) == shown
    assert bytes(token_id for gain in deltas for token_id in gain.token_ids).decode() == counted
    assert deltas[-1].completion_tokens == len(counted)
    assert [(end.completion_tokens, end.stop) for end in ends] == [(len(counted), "ghi" if stop else "")]

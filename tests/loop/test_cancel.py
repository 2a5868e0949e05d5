"""A cancellation that says whose requests it may end ends no others."""

from __future__ import annotations

from protos.engine_wire import FinishReason, Question, Submit
from protos.wire import Sampling
from tests.loop.harness import loop_config, running


def test_only_the_tenants_own_request_is_found() -> None:
    submit = Submit("r", [300, 301], 2, Sampling(max_tokens=4000), tenant="search")
    with running(loop_config("fake:delay_ms=1")) as observer:
        observer.loop.send(submit)
        observer.until_tokens(1)
        assert not observer.ask(Question.CANCEL, "r", tenant="other").found
        assert not observer.ask(Question.CANCEL, "r", tenant="").found
        assert observer.streams["r", 0].finish is None
        assert observer.ask(Question.CANCEL, "r", tenant="search").found
        observer.until_finished([submit])
        assert observer.streams["r", 0].finish is FinishReason.ABORTED
        assert not observer.ask(Question.CANCEL, "r", tenant="search").found


def test_who_asks_for_none_may_end_any() -> None:
    submit = Submit("r", [300, 301], 2, Sampling(max_tokens=4000), tenant="search")
    with running(loop_config("fake:delay_ms=1")) as observer:
        observer.loop.send(submit)
        observer.until_tokens(1)
        assert observer.ask(Question.CANCEL, "r").found
        observer.until_finished([submit])

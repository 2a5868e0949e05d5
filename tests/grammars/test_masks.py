"""The loop's side, with a compiler and a checker that are real, and an engine that is not there."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest

from protos.engine_wire import FinishReason, Grammar, Submit, TokenDelta
from protos.wire import Epoch, Sampling
from scheduler_svc.engine.events import MaskRequest, Verdict
from scheduler_svc.grammars.masks import Grammars

EPOCH = Epoch(1, 1)
WORDS = 10


class Loop:
    def __init__(self) -> None:
        self.rung = threading.Event()
        self.grammars = Grammars("fake:vocab=300", self.rung.set)

    def first(self, regex: str, resumed: bytes = b"", logprobs: int = -1) -> Verdict:
        prompt = [1, 2, *resumed]
        self.grammars.begin(Submit("r", prompt, 2, Sampling(99, logprobs=logprobs), grammar=Grammar("regex", regex)))
        assert self.rung.wait(60)
        (verdict,) = self.grammars.take()
        return verdict

    def mask(self, step: int) -> list[int] | None:
        """Of the stream's row in this step; None where it is not known yet."""
        self.grammars.request(MaskRequest(EPOCH, step, [(3, "r", 0)]))
        assert not self.grammars.masks(WORDS), "its plan has not been sent"
        self.grammars.sent()
        return self.due(step)

    def due(self, step: int) -> list[int] | None:
        masks = self.grammars.masks(WORDS)
        if not masks:
            return None
        assert [(mask.step, mask.rows, len(mask.bitmask)) for mask in masks] == [(step, [3], 4 * WORDS)]
        return [int(i) for i in np.flatnonzero(np.unpackbits(np.frombuffer(masks[0].bitmask, "u1"), bitorder="little"))]

    def tell(self, step: int, token_ids: bytes, ends: FinishReason | None = None) -> list[Verdict]:
        self.grammars.tell([TokenDelta("r", 0, list(token_ids), finish_reason=ends)])
        matched = self.grammars.matched(EPOCH, step)
        assert matched
        return matched.verdicts


@pytest.fixture
def loop() -> Iterator[Loop]:
    loop = Loop()
    yield loop
    loop.grammars.close()


def test_what_it_begins_with_is_known_before_it_is_told(loop: Loop) -> None:
    assert loop.first("ab[cd]e{3}") == Verdict("r", 0, list(b"ab"))
    assert loop.mask(1) == list(b"cd")
    assert loop.mask(2) is None, "its token is not there"
    assert loop.tell(1, b"abc") == [Verdict("r", 0, list(b"eee"), FinishReason.STOP)]
    assert loop.due(2) == list(b"e")
    assert loop.grammars.matched(EPOCH, 9) is None
    assert loop.tell(2, b"e") == [Verdict("r", 0, list(b"ee"), FinishReason.STOP)]


def test_with_logprobs_nothing_is_known_unsampled(loop: Loop) -> None:
    assert loop.first("ab", logprobs=0) == Verdict("r", 0)
    for step, byte in enumerate(b"ab", 1):
        assert loop.mask(step) == [byte]
        verdicts = loop.tell(step, bytes([byte]))
    assert verdicts == [Verdict("r", 0, [], FinishReason.STOP)]


def test_a_resumed_stream_goes_on_where_it_was(loop: Loop) -> None:
    assert loop.first("ab[cd]e{3}", resumed=b"abce") == Verdict("r", 0, list(b"ee"), FinishReason.STOP)


def test_one_that_is_not_the_grammars_is_refused(loop: Loop) -> None:
    verdict = loop.first("ab[cd]", resumed=b"ax")
    assert verdict.ends is FinishReason.GRAMMAR
    assert "token 1 of index 0" in verdict.detail


def test_a_stream_that_has_ended_allows_anything(loop: Loop) -> None:
    loop.first("[ab]{4}")
    loop.mask(1)
    assert loop.mask(2) is None
    assert loop.tell(1, b"a", FinishReason.LENGTH) == []
    assert loop.due(2) == list(range(32 * WORDS))

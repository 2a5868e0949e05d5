"""A matcher is a function of the tokens alone: of no moment, and of no mask that was or was not asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from protos.engine_wire import FinishReason, Grammar
from scheduler_svc.grammars import lower, vocabulary
from scheduler_svc.grammars.matcher import MAX_FORCED, Matcher

TOKENIZER = vocabulary.load("fake:vocab=300")
SCHEMA = {
    "type": "object",
    "properties": {"key": {"enum": ["one", "only", 12]}, "other": {"type": "boolean"}},
    "required": ["key", "other"],
    "additionalProperties": False,
}


def compiled(grammar: Grammar, tokenizer: LLTokenizer = TOKENIZER) -> LLMatcher:
    return LLMatcher(tokenizer, lower.lower(grammar), limits=vocabulary.LIMITS)


def allowed(matcher: Matcher) -> list[int]:
    """[] where it has no mask."""
    row = np.zeros((300 + 32) // 32, np.uint32)
    if not matcher.fill(row, row.ctypes.data):
        return []
    return [int(i) for i in np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little"))]


@settings(max_examples=30, deadline=None)
@given(choices=st.lists(st.integers(0, 1000), min_size=60, max_size=60), logprobs=st.booleans())
def test_forced_tokens_are_those_that_masks_leave(choices: list[int], logprobs: bool) -> None:
    base = compiled(Grammar("json_schema", json.dumps(SCHEMA)))
    sampled, told = Matcher(base, is_told=False), Matcher(base, is_told=True)
    token_ids: list[int] = []
    for choice in choices:
        if sampled.ends:
            break
        assert not sampled.forced
        run = told.forced
        tokens = allowed(sampled)
        assert not run or tokens == run[:1]
        token_ids.append(tokens[choice % len(tokens)])
        assert sampled.consume(token_ids[-1:]) == told.consume(token_ids[-1:]) == 1
        replayed = Matcher(base, is_told=True)
        assert replayed.consume(token_ids) == len(token_ids)
        assert (replayed.forced, replayed.ends) == (told.forced, told.ends)
    if sampled.ends:
        assert sampled.ends is FinishReason.STOP
        assert json.loads(bytes(token_ids)).keys() == {"key", "other"}


def test_what_is_not_allowed_ends_it() -> None:
    matcher = Matcher(compiled(Grammar("regex", "ab?c")), is_told=True)
    assert matcher.forced == [ord("a")]
    assert matcher.consume([ord("a"), ord("x"), ord("c")]) == 1
    assert matcher.ends is FinishReason.GRAMMAR
    assert "behind output token 1" in matcher.detail
    assert allowed(matcher) == []


def test_it_ends_behind_what_is_forced() -> None:
    matcher = Matcher(compiled(Grammar("choice", '["only"]')), is_told=True)
    assert (bytes(matcher.forced), matcher.ends) == (b"only", FinishReason.STOP)
    assert matcher.consume(matcher.forced) == 4
    assert (matcher.forced, matcher.ends) == ([], FinishReason.STOP)


@pytest.mark.parametrize("count", [MAX_FORCED, MAX_FORCED + 1])
def test_so_many_are_forced_at_once(count: int) -> None:
    matcher = Matcher(compiled(Grammar("regex", f"[xy]a{{{count}}}[xy]")), is_told=True)
    matcher.consume(b"x")
    assert matcher.ends is (None if count == MAX_FORCED else FinishReason.GRAMMAR)


def test_ids_beyond_the_tokenizers_are_never_allowed() -> None:
    assert allowed(Matcher(compiled(Grammar("regex", "(?s:.)*")), is_told=True))[-1] in (255, 300)

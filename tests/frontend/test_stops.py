"""Stop strings across token borders, against a plain search."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler_svc.frontend.stops import StopMatcher

text = st.text(alphabet="ab", max_size=60)
stops = st.lists(st.text(alphabet="ab", min_size=1, max_size=5), min_size=1, max_size=4, unique=True).map(tuple)


def cut(data: st.DataObject, whole: str) -> list[str]:
    """The text in pieces, empty ones among them."""
    borders = sorted(data.draw(st.lists(st.integers(0, len(whole)), max_size=12)))
    return [whole[a:b] for a, b in zip([0, *borders], [*borders, len(whole)], strict=True)]


def search(whole: str, stops: tuple[str, ...]) -> tuple[int, str] | None:
    """Where the first complete stop string begins, and which one it is: of those that end together, the longest."""
    for end in range(1, len(whole) + 1):
        if ending := [stop for stop in stops if whole[:end].endswith(stop)]:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


@given(text, stops, st.booleans(), st.data())
def test_what_is_shown_equals_a_search_of_the_whole(
    whole: str, stops: tuple[str, ...], include: bool, data: st.DataObject
) -> None:
    matcher, shown, found = StopMatcher(stops, include), "", None
    for piece in cut(data, whole):
        more, found = matcher.feed(piece)
        shown += more
        if found:
            break
    if not found:
        shown += matcher.flush()
    expected = search(whole, stops)
    if expected is None:
        assert (shown, found) == (whole, None)
    else:
        at, stop = expected
        assert (shown, found) == (whole[: at + len(stop) * include], stop)


@given(text, stops, st.data())
def test_only_what_may_become_a_stop_string_is_held(whole: str, stops: tuple[str, ...], data: st.DataObject) -> None:
    matcher, shown, seen = StopMatcher(stops), "", ""
    for piece in cut(data, whole):
        more, found = matcher.feed(piece)
        if found:
            return
        shown, seen = shown + more, seen + piece
        held = seen[len(shown) :]
        beginnings = [stop[:k] for stop in stops for k in range(len(stop)) if seen.endswith(stop[:k])]
        assert held == max(beginnings, key=len)


def test_a_stop_inside_the_beginning_of_a_longer_one() -> None:
    matcher = StopMatcher(("abcd", "bc"))
    assert matcher.feed("xab") == ("x", None)
    assert matcher.feed("c") == ("a", "bc")


@pytest.mark.parametrize("include", [False, True])
def test_several_characters_a_token(include: bool) -> None:
    matcher = StopMatcher(("</s>",), include)
    assert matcher.feed("one </") == ("one ", None)
    assert matcher.feed("s> two") == ("</s>" if include else "", "</s>")

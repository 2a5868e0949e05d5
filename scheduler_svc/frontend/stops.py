"""Stop strings, found in a stream across the borders of its tokens.

An Aho-Corasick automaton over characters: its state is the longest end of the text so far that begins a stop string,
which is exactly the text that must be held back. A character costs O(1) amortized, whatever the number of strings.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache


class _Automaton:
    def __init__(self, stops: tuple[str, ...]) -> None:
        self.next: list[dict[str, int]] = [{}]
        self.fail = [0]
        self.depth = [0]
        self.match: list[str | None] = [None]  # the longest stop string that ends in this state
        for stop in stops:
            self._add(stop)
        self._link()

    def _add(self, stop: str) -> None:
        state = 0
        for character in stop:
            if character not in self.next[state]:
                self.next[state][character] = len(self.next)
                self.next.append({})
                self.fail.append(0)
                self.depth.append(self.depth[state] + 1)
                self.match.append(None)
            state = self.next[state][character]
        self.match[state] = stop

    def _link(self) -> None:
        queue = deque(self.next[0].values())
        while queue:
            state = queue.popleft()
            self.match[state] = self.match[state] or self.match[self.fail[state]]
            for character, child in self.next[state].items():
                self.fail[child] = self.step(self.fail[state], character)
                queue.append(child)

    def step(self, state: int, character: str) -> int:
        while state and character not in self.next[state]:
            state = self.fail[state]
        return self.next[state].get(character, 0)


_automaton = lru_cache(maxsize=64)(_Automaton)  # clients send the same few stop strings again and again


class StopMatcher:
    """One stream's search. The first stop string to be complete wins; of two that end together, the longer."""

    def __init__(self, stops: tuple[str, ...], include_stop: bool = False) -> None:
        self._automaton = _automaton(stops)
        self._include = include_stop
        self._state = 0
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """The text that may be shown now, and the stop string that ended the stream, if one did."""
        automaton, state = self._automaton, self._state
        for i, character in enumerate(text):
            state = automaton.step(state, character)
            if stop := automaton.match[state]:
                shown = self._held + text[: i + 1]
                return shown if self._include else shown[: len(shown) - len(stop)], stop
        self._state = state
        text = self._held + text
        border = len(text) - automaton.depth[state]
        self._held = text[border:]
        return text[:border], None

    def flush(self) -> str:
        """What was held, now that the stream has ended otherwise."""
        held, self._held, self._state = self._held, "", 0
        return held

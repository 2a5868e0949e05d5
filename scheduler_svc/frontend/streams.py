"""From the engine's deltas to what one index may send: text, stop strings, usage, and one ending.

Text is made when a message is, unless stop strings have to be looked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, TypeVar

from protos.engine_wire import FinishReason, TokenDelta
from protos.wire import TokenLogprobs
from scheduler_svc.frontend.detokenizer import Detokenizer
from scheduler_svc.frontend.errors import Violation, invalid
from scheduler_svc.frontend.resume import Resumed
from scheduler_svc.frontend.stops import StopMatcher
from scheduler_svc.frontend.validation import TextRules
from scheduler_svc.metrics import Observer, StreamFacts

# Clients refuse messages above 4 MiB unless told otherwise: so many numbers, tokens or alternatives, go in one.
MAX_ENTRIES: Final = 32_768

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Gain:
    """What one index gained since its last message."""

    index: int
    token_ids: list[int]
    text: str
    logprobs: list[TokenLogprobs]
    prompt_logprobs: list[TokenLogprobs]
    completion_tokens: int  # up to and with this
    cached_tokens: int


@dataclass(frozen=True, slots=True)
class Ending:
    """The last of an index. `first_token` and `total` are seconds since the call began."""

    index: int
    reason: FinishReason  # STOP or LENGTH
    stop_token_id: int  # −1: none
    stop: str  # the stop string, or ""
    cached_tokens: int
    completion_tokens: int
    draft_tokens: int
    accepted_tokens: int
    first_token: float
    total: float
    pooled: bytes = b""  # where it was asked for


class IndexStream:
    """One of a call's `n` streams. Nothing behind a stop string counts: not its text, ids, logprobs or usage."""

    def __init__(self, index: int, rules: TextRules, detokenizer: Detokenizer | None, started: float) -> None:
        self.index, self._rules, self._detokenizer, self._started = index, rules, detokenizer, started
        self._matcher = StopMatcher(rules.stop, rules.include_stop) if rules.stop else None
        self._token_ids: list[int] = []  # not taken yet, perhaps one logprobs each, and with stop strings one text each
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._hides_last = False  # of all tokens: it has no text
        self._tail = ""  # text that only the end set free
        self._taken = self._completion = self._cached = self._drafted = self._accepted = 0
        self._resumed = 0  # tokens that the client had before this call
        self._first_token = self._queued = 0.0
        self._observed, self._observed_at = 0, 0.0  # output tokens, and when
        self._pooled = b""
        self._told = False  # the observer, of the end
        self.ending: Ending | None = None

    def resume(self, had: Resumed) -> None:
        """Takes in what the client has, and sends nothing of it; it may be all, and then the stream has ended.

        Raises ServiceError INVALID_ARGUMENT for ids behind a stop string.
        """
        delta = TokenDelta("", self.index, had.token_ids, finish_reason=had.reason, stop_token_id=had.stop_token_id)
        self.push(delta, self._started)
        if self.ending and self._completion < len(had.token_ids):
            problem = f"comes behind {self.ending.stop!r}, a stop string that ends the stream"
            raise invalid([Violation(f"{had.field}[{self._completion}]", problem)])
        while self.take():
            pass
        self._resumed = self._observed = self._completion

    def push(self, delta: TokenDelta, now: float) -> bool:
        """Whether a stop string ended the stream while the engine still runs it."""
        self._cached = max(self._cached, delta.cached_tokens)
        self._drafted += delta.num_drafted
        self._accepted += delta.num_accepted
        self._prompt_logprobs += delta.prompt_logprobs
        self._pooled = delta.pooled
        if delta.token_ids and self._completion == self._resumed:
            self._first_token, self._queued = now - self._started, delta.queued
        if stop := self._extend(delta):
            self._end(FinishReason.STOP, now, stop=stop)
            return delta.finish_reason is None
        if delta.finish_reason in (FinishReason.STOP, FinishReason.LENGTH):  # a call that fails sends nothing it held
            stop = self._flush()
            if stop or delta.finish_reason is FinishReason.STOP:
                self._end(FinishReason.STOP, now, stop=stop, stop_token_id=-1 if stop else delta.stop_token_id)
            else:
                self._end(FinishReason.LENGTH, now)
        return False

    def _extend(self, delta: TokenDelta) -> str:
        """Takes tokens up to the one that completes a stop string, and returns that string."""
        self._hides_last = delta.stop_token_id >= 0 and not self._rules.include_stop
        if self._matcher is None:
            self._completion += len(delta.token_ids)
            self._token_ids += delta.token_ids
            self._logprobs += delta.logprobs
            return ""
        assert self._detokenizer, "stop strings are looked for in text"
        last = len(delta.token_ids) - 1
        for i, token_id in enumerate(delta.token_ids):
            self._completion += 1
            text, stop = "", None
            if not (self._hides_last and i == last):
                text, stop = self._match(self._detokenizer.feed((token_id,)))
            self._token_ids.append(token_id)
            self._texts.append(text)
            if delta.logprobs:
                self._logprobs.append(delta.logprobs[i])
            if stop:
                return stop
        return ""

    def _match(self, text: str) -> tuple[str, str | None]:
        if self._matcher is None or self._completion <= self._rules.min_tokens:
            return text, None
        return self._matcher.feed(text)

    def _flush(self) -> str:
        """No more tokens come: sets free what was held. A stop string may show only now, in half a character."""
        if 0 < self._resumed == self._completion:
            return ""  # the ids that end a stream bring all of its text, and the client has them
        if self._detokenizer is None or (self._token_ids and self._matcher is None):
            return ""  # the text of the last tokens will have it
        self._tail, stop = self._match(self._detokenizer.finish())
        if self._matcher and not stop:
            self._tail += self._matcher.flush()
        return stop or ""

    def _end(self, reason: FinishReason, now: float, stop: str = "", stop_token_id: int = -1) -> None:
        self.ending = Ending(
            index=self.index,
            reason=reason,
            stop_token_id=stop_token_id,
            stop=stop,
            cached_tokens=self._cached,
            completion_tokens=self._completion,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
            first_token=self._first_token,
            total=now - self._started,
            pooled=self._pooled,
        )

    @property
    def gathered_numbers(self) -> int:
        """Of log probabilities, not taken yet: ids and text are bounded by the context, these are twenty times that."""
        return _numbers(self._logprobs) + _numbers(self._prompt_logprobs)

    def forget(self) -> None:
        """Lets go of what has not been taken; nothing may be taken afterwards."""
        self._token_ids, self._texts, self._tail = [], [], ""
        self._logprobs, self._prompt_logprobs = [], []

    @property
    def started(self) -> float:
        return self._started

    def observe(self, observer: Observer, prompt_tokens: int, now: float) -> None:
        """After all that one message brought."""
        if fresh := self._completion - self._observed:
            if self._observed > self._resumed:
                observer.more_tokens(now - self._observed_at, fresh)
            else:
                observer.first_token(self._first_token)
            self._observed, self._observed_at = self._completion, now
        if self.ending and not self._told:
            self._told = True
            observer.stream_ended(self.facts("", now), prompt_tokens)

    def facts(self, broken: str, now: float) -> StreamFacts:
        """`broken` says how it ended where it has no ending."""
        ending = self.ending
        return StreamFacts(
            self.index,
            ending.reason.name.lower() if ending else broken,
            self._queued,
            self._first_token,
            ending.total if ending else now - self._started,
            self._cached,
            self._completion - self._resumed,
        )

    def take(self) -> Gain | None:
        """What has gathered, as much of it as one message should hold; None where there is nothing."""
        if not (self._token_ids or self._tail or self._prompt_logprobs):
            return None
        prompt_count = _that_fit(self._prompt_logprobs)
        prompt_logprobs, self._prompt_logprobs = _split(self._prompt_logprobs, prompt_count)
        count = 0 if self._prompt_logprobs else _that_fit(self._logprobs) if self._logprobs else MAX_ENTRIES
        token_ids, self._token_ids = _split(self._token_ids, count)
        text = self._text(token_ids)
        logprobs, self._logprobs = _split(self._logprobs, count)
        if not self._token_ids and not self._prompt_logprobs:
            text, self._tail = text + self._tail, ""
        self._taken += len(token_ids)
        return Gain(self.index, token_ids, text, logprobs, prompt_logprobs, self._taken, self._cached)

    def _text(self, token_ids: list[int]) -> str:
        """Of tokens that are being taken."""
        if self._matcher:
            texts, self._texts = _split(self._texts, len(token_ids))
            return "".join(texts)
        if self._detokenizer is None or not token_ids:
            return ""
        if self._token_ids or not self.ending:
            return self._detokenizer.feed(token_ids)
        shown = token_ids[:-1] if self._hides_last else token_ids
        return self._detokenizer.feed(shown) + self._detokenizer.finish()


def _numbers(logprobs: list[TokenLogprobs]) -> int:
    return len(logprobs) * (1 + len(logprobs[0].top_ids)) if logprobs else 0


def _that_fit(logprobs: list[TokenLogprobs]) -> int:
    return max(1, MAX_ENTRIES // (1 + len(logprobs[0].top_ids))) if logprobs else MAX_ENTRIES


def _split(items: list[T], count: int) -> tuple[list[T], list[T]]:
    return items[:count], items[count:]

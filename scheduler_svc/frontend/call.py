"""One client's call: deltas come as the engine makes them, messages go as the client reads.

A call takes deltas as they come; its writer takes, whenever it is woken and the call is writable, all that has gathered
since. So a slow reader gets few large messages; what waits for it is bounded by the context and MAX_GATHERED, and how
long by `SlowReaders`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import grpc
import msgspec

from protos.engine_wire import FinishReason, TokenDelta
from scheduler_svc.frontend.engine_link import EngineLink, Route
from scheduler_svc.frontend.errors import ServiceError, from_finish, internal
from scheduler_svc.frontend.slow_readers import too_much_gathered
from scheduler_svc.frontend.streams import Ending, Gain, IndexStream
from scheduler_svc.frontend.tokenizer import Tokenizer
from scheduler_svc.frontend.validation import Prepared
from scheduler_svc.metrics import Observer, StreamFacts

MAX_GATHERED: Final = 2**19  # numbers of log probabilities that wait for a client to read: some 35 MB

log = logging.getLogger(__name__)


def open_streams(prepared: Prepared, tokenizer: Tokenizer, started: float, with_text: bool) -> list[IndexStream]:
    """One an index. Without `with_text` no text is made, unless stop strings need it.

    Raises ServiceError INVALID_ARGUMENT, see `IndexStream.resume`. A resumed token costs some 2 µs.
    """
    rules = prepared.rules
    needs_text = with_text or bool(rules.stop)
    streams = [
        IndexStream(i, rules, tokenizer.detokenizer(rules.skip_special_tokens) if needs_text else None, started)
        for i in range(len(prepared.submits))
    ]
    for index, had in prepared.resumed.items():
        streams[index].resume(had)
    return streams


@dataclass(eq=False)
class Call:
    """One client's call: a receiver for the engine, an iterator for the writer."""

    prepared: Prepared
    link: EngineLink
    clock: Callable[[], float]
    streams: list[IndexStream]
    observer: Observer
    _route: Route | None = None  # None: every index had ended before
    _changed: dict[int, None] = field(default_factory=dict)  # indices with something to send, in order
    _due: dict[int, None] = field(default_factory=dict)  # those that had it when the writer was woken last
    refusal: TokenDelta | None = None  # how the engine ended it, where it did so without a reason of ours
    _failure: ServiceError | None = None
    _wake: asyncio.Event = field(default_factory=asyncio.Event)
    _over: bool = False
    _given_up: bool = False
    _writing_since: float = 0.0  # when the message that is being written was handed to the writer; 0: none is
    _wants_logprobs: bool = field(init=False)

    def __post_init__(self) -> None:
        wanted = (submit.sampling for submit in self.prepared.submits)
        self._wants_logprobs = any(sampling.logprobs >= 0 or sampling.prompt_logprobs >= 0 for sampling in wanted)

    @classmethod
    def open(
        cls,
        prepared: Prepared,
        link: EngineLink,
        streams: list[IndexStream],
        clock: Callable[[], float],
        observer: Observer | None = None,
    ) -> Call:
        """Submits, but for the indices that had ended before: of those the end is all that is left to send."""
        call = cls(prepared, link, clock, streams, observer or Observer())
        call._due = {stream.index: None for stream in streams if stream.ending}
        if call._due:
            call._wake.set()
        running = [submit for submit in prepared.submits if submit.index not in call._due]
        if call._due:
            running = [msgspec.structs.replace(submit, num_siblings=len(running)) for submit in running]
        if running:
            call._route = link.submit(running, call, looks=bool(prepared.rules.stop))
        return call

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        """Called by the link, which serves every other call too: so nothing may escape."""
        now = self.clock()
        try:
            for delta in deltas:
                self._take_in(delta, now)
            self._observe(now)
            if self._wants_logprobs and sum(stream.gathered_numbers for stream in self.streams) > MAX_GATHERED:
                self.give_up(too_much_gathered(MAX_GATHERED))
        except Exception:
            log.exception("request %s: a delta could not be taken in", self.prepared.request_id)
            self._failure = internal(self.prepared.request_id)
            self.wake()

    def give_up(self, error: ServiceError) -> None:
        """Ends the request here and in the engine, and lets go of what has gathered.

        The writer may be stuck in a write: the client gets `error` behind what was written, when it reads again.
        """
        if self._given_up:
            return
        self._failure = self._failure or error
        self._given_up = True
        self._abort()
        for stream in self.streams:
            stream.forget()
        self.wake()

    def writing_for(self, now: float) -> float:
        """Seconds for which a message has waited for its client to read; 0 while the client waits for us."""
        return now - self._writing_since if self._writing_since else 0.0

    def wake(self) -> None:
        self._due |= self._changed
        self._changed.clear()
        self._wake.set()

    def _take_in(self, delta: TokenDelta, now: float) -> None:
        stream = self.streams[delta.index]
        if stream.ending or self._given_up:
            return  # a stop string ended it here first, or nobody reads
        if not self._failure and (failure := from_finish(delta, self.prepared.grammar_field)):
            self._failure, self.refusal = failure, delta
        if stream.push(delta, now):
            self.link.abort(self.prepared.request_id, FinishReason.STOP, delta.index)
        self._changed[delta.index] = None
        if stream.ending:
            self.wake()

    async def within(self, seconds: float) -> bool:
        """Waits so long for the first news. False if that is how the engine ended it, other than well."""
        timer = asyncio.get_running_loop().call_later(seconds, self._wake.set)
        await self._wake.wait()
        timer.cancel()
        return self._failure is None

    async def outputs(self) -> AsyncIterator[Gain | Ending]:
        """Ends with the last index. Raises ServiceError where the engine ended the request otherwise."""
        unfinished = len(self.streams)
        while unfinished:
            await self._wake.wait()
            self._wake.clear()
            while self._due:
                stream = self.streams[next(iter(self._due))]
                del self._due[stream.index]
                if gain := stream.take():
                    self._due[stream.index] = None  # behind the others: it may gain faster than the client reads
                    self._writing_since = self.clock()
                    yield gain
                    self._writing_since = 0.0
                    continue
                if self._failure:
                    raise self._failure
                if stream.ending:
                    unfinished -= 1
                    self._writing_since = self.clock()
                    yield stream.ending
                    self._writing_since = 0.0
            if self._failure:
                raise self._failure
        self._over = True

    def close(self) -> None:
        """The client has gone, or has all: whatever still runs ends now, and nothing of another call with this id."""
        if not self._given_up:
            self._abort()
        if self._route:
            self._route.forget()
        now = self.clock()
        self._observe(now)  # streams that had ended before they came here
        if (broken := self._how_it_broke()) in ("abort", "error"):
            for stream in self.streams:
                if not stream.ending:
                    self.observer.stream_ended(stream.facts(broken, now), self._prompt_len(stream))

    @property
    def started(self) -> float:
        return self.streams[0].started

    def facts(self) -> list[StreamFacts]:
        """Of a call that is closed."""
        broken, now = self._how_it_broke(), self.clock()
        return [stream.facts(broken, now) for stream in self.streams]

    def _observe(self, now: float) -> None:
        for stream in self.streams:
            stream.observe(self.observer, self._prompt_len(stream), now)

    def _prompt_len(self, stream: IndexStream) -> int:
        return self.prepared.submits[stream.index].prompt_len

    def _how_it_broke(self) -> str:
        """As vLLM calls it. Refused streams are counted by the engine, by reason."""
        if self._given_up or self._failure is None or self._failure.code is grpc.StatusCode.CANCELLED:
            return "abort"
        return "error" if self._failure.code is grpc.StatusCode.INTERNAL else "refused"

    def _abort(self) -> None:
        is_duplicate = self._failure is not None and self._failure.code is grpc.StatusCode.ALREADY_EXISTS
        if self._route and self._route.unfinished and not self._over and not is_duplicate:
            self.link.abort(self.prepared.request_id)

"""The loop's side of structured output: a matcher for each stream, the masks that its rows wait for, what the engine
has to be told.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from protos.engine_wire import FinishReason, Submit, TokenDelta
from protos.wire import Epoch, Mask
from scheduler_svc.engine.events import MaskRequest, Matched, Verdict
from scheduler_svc.grammars.compiler import Compiled, Compiler
from scheduler_svc.grammars.errors import GrammarError
from scheduler_svc.grammars.matcher import Matcher

Key = tuple[str, int]  # request id, index
_EVERYTHING = np.uint32(0xFFFFFFFF)


@dataclass
class _Steps:
    """Of one epoch."""

    masked: int = 0  # the step that has its mask, and whose tokens have not come yet; 0: none
    waiting: deque[MaskRequest] = field(default_factory=deque)  # for the tokens of that one
    unsent: list[MaskRequest] = field(default_factory=list)  # whose plans are not with the workers yet


class Grammars:
    """Belongs to the loop's thread. `ring`, from any thread: there is something to `take`."""

    def __init__(self, model: str, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._compiler = Compiler(model)
        self._compiled: deque[tuple[Submit, Future[Compiled]]] = deque()
        self._matchers: dict[Key, Matcher | None] = {}  # None while it is being compiled
        self._unsaid: dict[Key, int] = {}  # tokens that a stream began with: its first delta brings them
        self._changed: dict[Key, None] = {}  # those that consumed something since the last `matched`
        self._steps: dict[Epoch, _Steps] = {}
        self._broken: list[Verdict] = []

    # ------------------------------------------------------------ streams

    def begin(self, submit: Submit) -> None:
        """`take` brings its first verdict."""
        assert submit.grammar is not None
        key = (submit.request_id, submit.index)
        if key in self._matchers:
            return
        self._matchers[key] = None

        def then(future: Future[Compiled]) -> None:
            if not future.cancelled():
                self._compiled.append((submit, future))
                self._ring()

        self._compiler.compile(submit.grammar, then)

    def take(self) -> list[Verdict]:
        """Of streams whose grammar was compiled, or could not be, and of those whose next token cannot be found."""
        verdicts, self._broken = self._broken, []
        while self._compiled:
            submit, future = self._compiled.popleft()
            key = (submit.request_id, submit.index)
            if self._matchers.get(key, self) is None:  # it still waits
                verdicts.append(self._first(key, submit, future))
        return verdicts

    def _first(self, key: Key, submit: Submit, future: Future[Compiled]) -> Verdict:
        if error := future.exception():
            reason = FinishReason.GRAMMAR if isinstance(error, GrammarError) else FinishReason.ERROR
            return Verdict(*key, [], reason, str(error))
        sampling = submit.sampling
        is_told = sampling.logprobs < 0 and sampling.prompt_logprobs < 0  # what is not computed has no logprobs
        matcher = self._matchers[key] = Matcher(future.result().matcher, is_told=is_told)
        resumed = submit.token_ids[submit.prompt_len :]
        if (taken := matcher.consume(resumed)) < len(resumed):
            detail = f"resume_token_ids: token {taken} of index {submit.index} is not allowed by the grammar"
            return Verdict(*key, [], FinishReason.GRAMMAR, detail)
        verdict = _verdict(key, matcher)
        self._unsaid[key] = matcher.consume(verdict.token_ids)  # nothing is being sampled: the engine knows them now
        return verdict

    def tell(self, deltas: Iterable[TokenDelta]) -> None:
        """What the engine has settled, and who has ended."""
        for delta in deltas:
            key = (delta.request_id, delta.index)
            if key not in self._matchers or delta.finish_reason is FinishReason.DUPLICATE:
                continue
            if delta.finish_reason is not None:
                del self._matchers[key]
                self._unsaid.pop(key, None)
                self._changed.pop(key, None)
            elif (matcher := self._matchers[key]) and delta.token_ids:
                matcher.consume(delta.token_ids[self._unsaid.pop(key, 0) :])
                self._changed[key] = None

    def matched(self, epoch: Epoch, step: int) -> Matched | None:
        """Behind the result of a step with masked rows, once all of it was told; None behind any other."""
        steps = self._steps.get(epoch)
        if steps is None or steps.masked != step:
            return None
        steps.masked = 0
        verdicts = []
        for key in self._changed:
            matcher = self._matchers[key]
            assert matcher, "it has consumed tokens"
            verdict = _verdict(key, matcher)
            if verdict.token_ids or verdict.ends:
                verdicts.append(verdict)
        self._changed.clear()
        return Matched(epoch, step, verdicts)

    # ------------------------------------------------------------ masks

    def request(self, request: MaskRequest) -> None:
        self._steps.setdefault(request.epoch, _Steps()).unsent.append(request)

    def sent(self) -> None:
        """All plans that masks were requested for."""
        for steps in self._steps.values():
            steps.waiting += steps.unsent
            steps.unsent.clear()

    def masks(self, num_words: int) -> list[Mask]:
        """Of plans that were sent, those that can be known: all tokens ahead of them have come. `num_words` of 32
        tokens a row.
        """
        made = []
        for steps in self._steps.values():
            if steps.waiting and not steps.masked:
                request = steps.waiting.popleft()
                steps.masked = request.step
                made.append(self._mask(request, num_words))
        return made

    def _mask(self, request: MaskRequest, num_words: int) -> Mask:
        """A row whose stream has ended, or is about to, may bring anything: nobody looks at it."""
        width = max(num_words, self._compiler.num_words)
        bitmask = np.zeros((len(request.rows), width), np.uint32)
        address = bitmask.ctypes.data
        for i, (_, request_id, index) in enumerate(request.rows):
            key = (request_id, index)
            matcher = self._matchers.get(key)
            if matcher is None or not matcher.fill(bitmask[i], address + i * bitmask.strides[0]):
                bitmask[i] = _EVERYTHING
                if matcher and matcher.ends is FinishReason.GRAMMAR:
                    self._broken.append(_verdict(key, matcher))
                    self._ring()
        return Mask(request.epoch, request.step, [row for row, _, _ in request.rows], bitmask[:, :num_words].tobytes())

    def forget(self, epoch: Epoch) -> None:
        """It has ended."""
        self._steps.pop(epoch, None)

    def close(self) -> None:
        self._compiler.close()


def _verdict(key: Key, matcher: Matcher) -> Verdict:
    return Verdict(*key, matcher.forced, matcher.ends, matcher.detail)

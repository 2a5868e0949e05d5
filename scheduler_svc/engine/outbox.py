"""What the frontends are told: gathered over one event, one Outputs a frontend."""

from __future__ import annotations

from protos.engine_wire import FinishReason, Outputs, Submit, TokenDelta
from protos.wire import Row, RowResult
from scheduler_svc.engine.sequence import Sequence


class Outbox:
    """Deltas by frontend, in the order in which they came about."""

    def __init__(self) -> None:
        self._items: dict[str, list[TokenDelta]] = {}

    def take(self) -> list[Outputs]:
        items, self._items = self._items, {}
        return [Outputs(deltas, frontend) for frontend, deltas in items.items()]

    def refuse(
        self, submit: Submit, reason: FinishReason, detail: str, retry_after: float, shed_for: float = 0.0
    ) -> None:
        """A stream that never begins."""
        delta = TokenDelta(
            submit.request_id,
            submit.index,
            [],
            finish_reason=reason,
            retry_after=retry_after,
            detail=detail,
            tenant=submit.tenant,
            shed_for=shed_for,
        )
        self._add(submit.frontend, delta)

    def end(self, sequence: Sequence, reason: FinishReason, detail: str) -> None:
        """A stream ends without a further token."""
        unsaid, sequence.unsaid = sequence.unsaid, []
        delta = TokenDelta(
            sequence.request_id,
            sequence.index,
            unsaid,
            finish_reason=reason,
            cached_tokens=max(0, sequence.cached_tokens),
            detail=detail,
        )
        self._add(sequence.frontend, delta)

    def prompt(self, sequence: Sequence, row: Row, answer: RowResult) -> None:
        """A row in the middle of a prompt: logprobs, if they were asked for and are news."""
        if prompt_logprobs := sequence.new_prompt_logprobs(row.start, answer.prompt_logprobs):
            delta = TokenDelta(
                sequence.request_id,
                sequence.index,
                [],
                prompt_logprobs=prompt_logprobs,
                cached_tokens=sequence.cached_tokens,
            )
            self._add(sequence.frontend, delta)

    def computed(self, sequence: Sequence, row: Row, answer: RowResult) -> None:
        """The end of a stream that ends with its prompt."""
        delta = TokenDelta(
            sequence.request_id,
            sequence.index,
            [],
            finish_reason=FinishReason.STOP,
            prompt_logprobs=sequence.new_prompt_logprobs(row.start, answer.prompt_logprobs),
            cached_tokens=sequence.cached_tokens,
            queued=sequence.waited,
            pooled=answer.pooled,
        )
        self._add(sequence.frontend, delta)

    def forced(self, sequence: Sequence, token_ids: list[int], reason: FinishReason | None) -> None:
        """Tokens that nobody sampled. Those of a stream that never ran wait for its first, or for its end."""
        sequence.unsaid += token_ids
        if reason is None and sequence.cached_tokens < 0:
            return
        unsaid, sequence.unsaid = sequence.unsaid, []
        delta = TokenDelta(
            sequence.request_id,
            sequence.index,
            unsaid,
            finish_reason=reason,
            stop_token_id=unsaid[-1] if reason is FinishReason.STOP and unsaid[-1] in sequence.ends else -1,
            cached_tokens=max(0, sequence.cached_tokens),
            queued=sequence.waited,
        )
        self._add(sequence.frontend, delta)

    def tokens(
        self, sequence: Sequence, token_ids: list[int], row: Row, answer: RowResult, reason: FinishReason | None
    ) -> None:
        """New tokens: the answer's, cut where the stream ends."""
        if sequence.unsaid:
            token_ids, sequence.unsaid = sequence.unsaid + token_ids, []
        prompt_logprobs = answer.prompt_logprobs
        if prompt_logprobs:
            prompt_logprobs = sequence.new_prompt_logprobs(row.start, prompt_logprobs)
        logprobs = answer.logprobs
        delta = TokenDelta(  # by position: this is the one message that every token costs
            sequence.request_id,
            sequence.index,
            token_ids,
            logprobs[: len(token_ids)] if logprobs else logprobs,  # who asks for them is never told what is forced
            reason,
            token_ids[-1] if reason is FinishReason.STOP else -1,
            prompt_logprobs,
            sequence.cached_tokens,
            0.0,
            "",
            answer.num_drafted,
            len(answer.token_ids) - 1,
            "",
            sequence.waited,
        )
        self._add(sequence.frontend, delta)

    def _add(self, frontend: str, delta: TokenDelta) -> None:
        items = self._items.get(frontend)
        if items is None:
            self._items[frontend] = [delta]
        else:
            items.append(delta)

"""Pseudonyms for what people wrote: a log that replays to the same plans, and holds no prompt and no output.

The engine looks at tokens for two things: whether prefixes are equal, and whether a new token ends a stream. So a
token is recorded as a keyed hash of everything from the beginning up to it, with 2³¹ added. Equal prefixes stay equal;
the same word elsewhere is another number, so that counting gives nothing away. Only a token that ended a stream keeps
its id, which is below 2³¹. Request ids, salts and adapters become keyed hashes; seeds, bad words, biases and
probabilities are left out. The key is never written, so parts of two boots cannot be compared either.

What stays: tenants, priorities, deadlines, sampling numbers and end ids, and every length, time and decision; and so
whose prompts begin alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from typing import assert_never

from msgspec.structs import replace

from protos.engine_wire import Abort, FrontendLost, KvEvents, Outputs, Shed, Submit, WatchKv
from protos.wire import Admit, Epoch, Row, RowResult, Sampling, StepPlan, StepResult, TokenLogprobs
from scheduler_svc.engine.events import (
    AdapterClosed,
    AdapterFree,
    AdapterLoaded,
    Drain,
    EndEpoch,
    Event,
    FlushCache,
    Instruction,
    MaskRequest,
    Matched,
    Tick,
    Verdict,
    WorkerLost,
    WorkerReady,
)
from scheduler_svc.engine.prefix_cache import domain

HIDDEN = 1 << 31  # ids from here on are pseudonyms: no vocabulary is so large
_NO_ID = -1  # for whatever was no token id either
_BLANK = TokenLogprobs(0, 0.0, 1)


def comparable(instructions: list[Instruction]) -> list[Instruction]:
    """What a private log has digests of: plans, without what depends on names, and the ends of epochs."""
    kept: list[Instruction] = []
    for instruction in instructions:
        match instruction:
            case StepPlan():
                admit = [replace(admit, domain=b"") for admit in instruction.admit]
                kept.append(replace(instruction, admit=admit, rows=[*map(_without_tokens, instruction.rows)]))
            case EndEpoch():
                kept.append(EndEpoch(instruction.epoch, ""))  # the reason may quote tokens
            case AdapterFree():
                kept.append(instruction)
            case Outputs() | KvEvents() | MaskRequest():
                pass
            case _:
                assert_never(instruction)
    return kept


class _Stream:
    """One slot's tokens so far, as a hash that grows."""

    def __init__(self, key: bytes, root: bytes, sampling: Sampling) -> None:
        self._hasher = blake2b(len(root).to_bytes(4, "little") + root, digest_size=4, key=key)
        self._ends = frozenset(sampling.eos_token_ids + sampling.stop_token_ids)
        self.forced: list[int] = []  # what its grammar said last: the engine may know it, or may not

    def preview(self, token_ids: list[int]) -> list[int]:
        """Their pseudonyms, should they follow."""
        before, self._hasher = self._hasher, self._hasher.copy()
        made = self.extend(token_ids)
        self._hasher = before
        return made

    def follow(self, count: int) -> None:
        """So many of what was forced the engine knows now."""
        self.extend(self.forced[:count])

    def extend(self, token_ids: Iterable[int], keep_ends: bool = True) -> list[int]:
        """Pseudonyms; `keep_ends` for tokens that the engine compares with the stream's ends."""
        hasher, made = self._hasher, []
        for token in token_ids:
            if not 0 <= token < 1 << 32:
                made.append(_NO_ID)
                continue
            hasher.update(token.to_bytes(4, "little"))
            hidden = int.from_bytes(hasher.digest(), "little") | HIDDEN
            made.append(token if keep_ends and token in self._ends else hidden)
        return made


class Pseudonyms:
    """One for all of a boot's logs. Has to see every event and every answer, in order."""

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._streams: dict[Epoch, dict[int, _Stream]] = {}  # by epoch and slot
        self._grammars: dict[tuple[str, int], _Stream] = {}  # those with a grammar, by request id and index

    def event(self, event: Event) -> Event:
        match event:
            case StepResult():
                return self._result(event)
            case Submit():
                return self._submit(event)
            case Abort():
                return replace(event, request_id=self._name(event.request_id))
            case WorkerLost():
                self._streams.pop(event.epoch, None)
                return replace(event, reason="")  # a worker's fault may quote what it was given
            case AdapterLoaded():
                return AdapterLoaded(self._name(event.name), self._name(event.digest))
            case AdapterClosed():
                return AdapterClosed(self._name(event.name), "gone" if event.reason else "")
            case Verdict():
                return self._verdict(event)
            case Matched():
                return replace(event, verdicts=[self._verdict(verdict) for verdict in event.verdicts])
            case Shed() | FrontendLost() | WorkerReady() | Tick() | FlushCache() | Drain() | WatchKv():
                return event
            case _:
                assert_never(event)

    def answer(self, instructions: list[Instruction]) -> list[Instruction]:
        """Comparable, and of pseudonyms."""
        hidden: list[Instruction] = []
        for instruction in instructions:
            match instruction:
                case StepPlan():
                    hidden.append(self._plan(instruction))
                    plan = instruction
                case MaskRequest():
                    for row, request_id, index in instruction.rows:
                        self._grammars[request_id, index] = self._streams[plan.epoch][plan.rows[row].slot]
                case AdapterFree():
                    hidden.append(AdapterFree(self._name(instruction.name)))
                case Outputs():
                    for delta in instruction.items:
                        if delta.finish_reason:
                            self._grammars.pop((delta.request_id, delta.index), None)
                case _:
                    hidden.append(instruction)
        return comparable(hidden)

    def _verdict(self, verdict: Verdict) -> Verdict:
        """Of a stream that has ended: nobody looks at it."""
        stream = self._grammars.get((verdict.request_id, verdict.index))
        token_ids = stream.preview(verdict.token_ids) if stream else []
        if stream:
            stream.forced = verdict.token_ids
        return replace(verdict, request_id=self._name(verdict.request_id), token_ids=token_ids, detail="")

    def _name(self, name: str) -> str:
        return blake2b(name.encode(), digest_size=8, key=self._key).hexdigest() if name else ""

    def _stream(self, tenant_and_salt: bytes, adapter: str, sampling: Sampling) -> _Stream:
        return _Stream(self._key, tenant_and_salt + adapter.encode(), sampling)

    def _submit(self, submit: Submit) -> Submit:
        stream = self._stream(domain(submit.tenant, submit.cache_salt), submit.adapter, submit.sampling)
        token_ids = stream.extend(submit.token_ids[:-1], keep_ends=False)
        is_resumed = len(submit.token_ids) > submit.prompt_len  # then its last token may have ended it
        token_ids += stream.extend(submit.token_ids[-1:], keep_ends=is_resumed)
        if submit.grammar:
            self._grammars[submit.request_id, submit.index] = stream
        return replace(
            submit,
            request_id=self._name(submit.request_id),
            token_ids=token_ids,
            sampling=_without_words(submit.sampling),
            cache_salt=self._name(submit.cache_salt),
            adapter=self._name(submit.adapter),
            adapter_digest=self._name(submit.adapter_digest),
            grammar=replace(submit.grammar, text="") if submit.grammar else None,
        )

    def _plan(self, plan: StepPlan) -> StepPlan:
        streams = self._streams.setdefault(plan.epoch, {})
        for slot in plan.release:
            streams.pop(slot, None)
        admit = [self._admit(streams, admit) for admit in plan.admit]
        for row in plan.rows:
            if row.append_token_ids:
                streams[row.slot].follow(len(row.append_token_ids))
        return replace(plan, admit=admit)

    def _admit(self, streams: dict[int, _Stream], admit: Admit) -> Admit:
        stream = streams[admit.slot] = self._stream(admit.domain, admit.adapter, admit.sampling)
        return replace(
            admit,
            token_ids=stream.extend(admit.token_ids, keep_ends=False),
            sampling=_without_words(admit.sampling),
            adapter=self._name(admit.adapter),
        )

    def _result(self, result: StepResult) -> StepResult:
        """Of an epoch that has ended: nobody looks at it."""
        streams = self._streams.get(result.epoch, {})
        return replace(result, rows=[_row(streams.get(row.slot), row) for row in result.rows])


def _without_tokens(row: Row) -> Row:
    return replace(row, append_token_ids=[0] * len(row.append_token_ids)) if row.append_token_ids else row


def _row(stream: _Stream | None, row: RowResult) -> RowResult:
    token_ids = stream.extend(row.token_ids) if stream else [_NO_ID] * len(row.token_ids)
    return RowResult(
        row.slot,
        row.start,
        token_ids,
        [_BLANK] * len(row.logprobs),
        row.num_drafted,
        [_BLANK] * len(row.prompt_logprobs),
    )


def _without_words(sampling: Sampling) -> Sampling:
    return replace(sampling, seed=0, bad_words=(), logit_bias=())

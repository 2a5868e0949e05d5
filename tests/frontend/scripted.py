"""A scripted engine behind an EngineLink: it answers Submits with tokens of a script, on the test's own event loop."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from dataclasses import dataclass

from protos.engine_wire import (
    Abort,
    Answer,
    Ask,
    EngineStats,
    FinishReason,
    FrontendHello,
    FrontendLost,
    FrontendStats,
    KvBlock,
    KvEvents,
    Observed,
    Outputs,
    Question,
    ServiceStatus,
    Shed,
    Submit,
    ToEngine,
    TokenDelta,
    WatchKv,
    WorkerStatus,
)
from protos.wire import Epoch, Ready, TokenLogprobs
from scheduler_svc.frontend.engine_link import EngineLink

Script = Callable[[Submit, int], int]  # (request, how many output tokens it has) → the next one
READY = Ready(
    *(Epoch(1, 1), 0, 64),
    exact=True,
    device="cpu",
    dtype="float32",
    backend="script",
    fingerprint="f00d",
    hidden_size=4,
)


def letters(submit: Submit, count: int) -> int:
    """a, b, c … from where the seed says, by absolute position."""
    return 97 + (submit.sampling.seed + submit.prompt_len + count) % 26


def spelling(text: str | bytes) -> Script:
    """The bytes of `text`, then spaces."""
    data = text.encode() if isinstance(text, str) else text
    return lambda submit, count: data[count] if count < len(data) else 32


@dataclass
class Sequence:
    submit: Submit
    output: list[int]  # also what a resumed stream came with
    begun: bool = False


class ScriptedEngine:
    """`held`: takes messages and makes no token until `release`. `tokens_per_delta`: as if drafts were accepted."""

    def __init__(self, link: EngineLink, script: Script = letters) -> None:
        self.link, self.script = link, script
        self.sequences: dict[tuple[str, int], Sequence] = {}
        self.submits: list[Submit] = []
        self.aborts: list[Abort] = []
        self.blocks: list[KvBlock] = []  # what a watcher begins with
        self.watching: list[int] = []  # what WatchKv asked for
        self.changes_told = 0
        self.cancels: list[Ask] = []
        self.tokens_per_delta = 1
        self.held = False
        self.steps = 0
        self.finish_with: TokenDelta | None = None  # what every new request is refused with
        self.stats = EngineStats(num_blocks=63, free_blocks=60, owned_blocks=3, num_slots=8, generated_tokens=10)
        self.observed = FrontendStats()
        self.shed: list[Shed] = []
        self.shed_seen = asyncio.Event()
        self.abort_seen = asyncio.Event()
        self.submit_seen = asyncio.Event()
        self._stepping: asyncio.TimerHandle | asyncio.Handle | None = None
        self._drains: list[Ask] = []
        link.connect(self)

    # ------------------------------------------------------------ what the frontend sends

    def send(self, message: ToEngine) -> None:
        match message:
            case Submit():
                self._submit(message)
            case Abort():
                self.aborts.append(message)
                self._abort(message)
                self.abort_seen.set()
            case Ask():
                self._ask(message)
            case WatchKv(watcher=watcher):
                self.watching.append(watcher)
                if watcher:
                    beginning = KvEvents(self.changes_told, list(self.blocks), True, watcher)
                    asyncio.get_running_loop().call_soon(self.link.deliver, beginning)
            case Observed():
                self.observed = message.stats
            case Shed():
                self.shed.append(message)
                self.shed_seen.set()
            case FrontendHello() | FrontendLost():
                pass
        self._schedule()

    def _submit(self, submit: Submit) -> None:
        self.submits.append(submit)
        self.submit_seen.set()
        if self.finish_with:
            refusal = TokenDelta(
                submit.request_id,
                submit.index,
                [],
                finish_reason=self.finish_with.finish_reason,
                retry_after=self.finish_with.retry_after,
                detail=self.finish_with.detail,
                tenant=submit.tenant,
                shed_for=self.finish_with.shed_for,
            )
            asyncio.get_running_loop().call_soon(self.link.deliver, Outputs([refusal]))
            return
        self.sequences[submit.request_id, submit.index] = Sequence(submit, submit.token_ids[submit.prompt_len :])

    def _abort(self, abort: Abort) -> None:
        keys = [key for key in self.sequences if key[0] == abort.request_id and abort.index in (-1, key[1])]
        items = [TokenDelta(*key, [], finish_reason=abort.reason) for key in keys]
        for key in keys:
            del self.sequences[key]
        if items:
            asyncio.get_running_loop().call_soon(self.link.deliver, Outputs(items))
        self._answer_drains()

    def _ask(self, ask: Ask) -> None:
        match ask.question:
            case Question.DRAIN:
                self._drains.append(ask)
                self._answer_drains()
            case Question.CANCEL:
                self.cancels.append(ask)
                found = any(key[0] == ask.request_id for key in self.sequences)
                self._abort(Abort(ask.request_id))
                self._answer(ask, found=found)
            case Question.FLUSH_CACHE:
                self._answer(ask, freed_blocks=5)
            case Question.STATS:
                self._answer(ask)

    def _answer(self, ask: Ask, found: bool = True, freed_blocks: int = 0) -> None:
        answer = Answer(ask.token, self.status(True), found, freed_blocks)
        asyncio.get_running_loop().call_soon(self.link.deliver, answer)

    def _answer_drains(self) -> None:
        while self._drains and not self.sequences:
            self._answer(self._drains.pop())

    # ------------------------------------------------------------ what it does

    def status(self, serving: bool, ready: Ready | None = READY, reason: str = "") -> ServiceStatus:
        state = "serving" if serving else "lost"
        workers = [WorkerStatus(state, pid=7, device="cpu")]
        return ServiceStatus(serving, reason, ready, workers, self.stats, frontends=self.observed)

    def say(self, serving: bool, ready: Ready | None = READY, reason: str = "") -> None:
        self.link.deliver(self.status(serving, ready, reason))

    def publish(self, *changes: KvBlock | bytes, reset: bool = False) -> None:
        """To all who watch; what one begins with is not changed by it."""
        self.changes_told += len(changes) + reset
        self.link.deliver(KvEvents(self.changes_told, list(changes), reset))

    def release(self) -> None:
        self.held = False
        self._schedule()

    def _schedule(self) -> None:
        if self._stepping is None and self.sequences and not self.held:
            self._stepping = asyncio.get_running_loop().call_soon(self._step)

    def _step(self) -> None:
        self._stepping = None
        if not self.held:
            self.step()
        self._schedule()

    def step(self) -> None:
        """One token (or `tokens_per_delta`) for everybody."""
        self.steps += 1
        items = [self._advance(key, sequence) for key, sequence in list(self.sequences.items())]
        self.link.deliver(Outputs(items))
        self._answer_drains()

    def _advance(self, key: tuple[str, int], sequence: Sequence) -> TokenDelta:
        submit, sampling, first = sequence.submit, sequence.submit.sampling, not sequence.begun
        sequence.begun = True
        new: list[int] = []
        reason, stop_token_id = None, -1
        if not sampling.max_tokens:
            reason = FinishReason.STOP
        while len(new) < self.tokens_per_delta and reason is None:
            token = self.script(submit, len(sequence.output))
            new.append(token)
            sequence.output.append(token)
            if token in (*sampling.eos_token_ids, *sampling.stop_token_ids):
                reason, stop_token_id = FinishReason.STOP, token
            elif len(sequence.output) == sampling.max_tokens:
                reason = FinishReason.LENGTH
        if reason:
            del self.sequences[key]
        start = len(sequence.output) - len(new)
        return TokenDelta(
            submit.request_id,
            submit.index,
            new,
            logprobs=[logprob(t, start + i, sampling.logprobs) for i, t in enumerate(new)]
            if sampling.logprobs >= 0
            else [],
            finish_reason=reason,
            stop_token_id=stop_token_id,
            prompt_logprobs=[
                logprob(t, -i, sampling.prompt_logprobs)
                for i, t in enumerate(submit.token_ids[: submit.prompt_len])
                if i >= sampling.prompt_logprobs_from and first
            ]
            if sampling.prompt_logprobs >= 0
            else [],
            cached_tokens=2 if first else 0,
            num_drafted=3,
            num_accepted=max(0, len(new) - 1),
            pooled=state(submit) if submit.pooling else b"",
        )


def state(submit: Submit) -> bytes:
    """Told apart by pooling and prompt."""
    first = {"last": 3.0, "mean": -3.0, "cls": 6.0}[submit.pooling]
    return struct.pack("<4f", first, 4.0, submit.token_ids[0], submit.prompt_len)


def logprob(token_id: int, place: int, count: int) -> TokenLogprobs:
    """Told apart by their place."""
    return TokenLogprobs(token_id, -0.5 - place, 1 + place % 7, tuple(range(count)), (-1.0,) * count)

"""An engine loop with real worker processes and no gRPC: what it delivers is collected here."""

from __future__ import annotations

import queue
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from protos.engine_wire import Adapter, Answer, Ask, FinishReason, Outputs, Question, ServiceStatus, Submit, ToFrontend
from protos.wire import Epoch, Sampling, Setup
from scheduler_svc.config import LoopConfig
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.loop import EngineLoop
from worker_svc.backends.fake import expected

PATIENCE = 30.0  # seconds: how long a test waits for what must come; never how long it sleeps


@dataclass
class Stream:
    token_ids: list[int] = field(default_factory=list)
    finish: FinishReason | None = None


class Observer:
    """Everything that a loop delivered, in order, seen from the test's thread."""

    def __init__(self, loop: EngineLoop) -> None:
        self.loop = loop
        self.streams: dict[tuple[str, int], Stream] = defaultdict(Stream)
        self.statuses: list[tuple[float, ServiceStatus]] = []
        self.answers: dict[int, Answer] = {}
        self.tokens = 0
        self._arrived: queue.SimpleQueue[tuple[float, list[ToFrontend]]] = queue.SimpleQueue()
        loop.attach(lambda batch: self._arrived.put((time.monotonic(), batch)))

    @property
    def status(self) -> ServiceStatus:
        return self.statuses[-1][1]

    def until(self, condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> None:
        deadline = time.monotonic() + patience
        while not condition():
            try:
                at, batch = self._arrived.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"not within {patience:g} s: {what}; status {self.statuses[-1:]}") from None
            for message in batch:
                self._take(at, message)

    def until_serving(self) -> None:
        self.until(lambda: self.statuses and self.status.serving, "serving")

    def until_tokens(self, count: int) -> None:
        self.until(lambda: self.tokens >= count, f"{count} tokens")

    def until_finished(self, submits: list[Submit]) -> None:
        self.until(lambda: all(self.streams[s.request_id, s.index].finish for s in submits), "all streams finished")

    def ask(
        self, question: Question, request_id: str = "", tenant: str | None = None, adapter: Adapter | None = None
    ) -> Answer:
        return self.answer_to(self.begin(question, request_id, tenant, adapter), question)

    def begin(
        self, question: Question, request_id: str = "", tenant: str | None = None, adapter: Adapter | None = None
    ) -> int:
        """Asks, and does not wait."""
        token = len(self.answers) + 1000 + random.getrandbits(40)
        self.loop.send(Ask(token, question, request_id, tenant=tenant, adapter=adapter))
        return token

    def answer_to(self, token: int, question: Question) -> Answer:
        self.until(lambda: token in self.answers, f"the answer to {question.name}")
        return self.answers[token]

    def _take(self, at: float, message: ToFrontend) -> None:
        match message:
            case Outputs(items=items):
                for delta in items:
                    stream = self.streams[delta.request_id, delta.index]
                    assert stream.finish is None, f"{delta} after the stream's end"
                    stream.token_ids += delta.token_ids
                    stream.finish = delta.finish_reason
                    self.tokens += len(delta.token_ids)
            case ServiceStatus():
                self.statuses.append((at, message))
            case Answer():
                self.answers[message.token] = message


def loop_config(model: str = "fake:", **changes: Any) -> LoopConfig:
    engine = EngineConfig(block_size=8, max_num_seqs=16, max_step_tokens=64, depth=1)
    setup = Setup(
        epoch=Epoch(random.getrandbits(62), 0),
        model=model,
        block_size=engine.block_size,
        max_slots=engine.max_slots,
        max_step_tokens=engine.max_step_tokens,
    )
    return replace(LoopConfig(engine, setup), **changes)


@contextmanager
def running(config: LoopConfig) -> Iterator[Observer]:
    loop = EngineLoop(config, time.monotonic)
    loop.start()
    try:
        yield Observer(loop)
    finally:
        loop.stop()


def submits(count: int, rng: random.Random, max_tokens: int = 40, vocab: int = 512) -> list[Submit]:
    """Half greedy, half seeded; prompts that share a beginning, of ids that no fake option names (256 and up)."""
    shared = [rng.randrange(256, vocab) for _ in range(20)]
    made = []
    for i in range(count):
        prompt = shared[: rng.randrange(20)] + [rng.randrange(256, vocab) for _ in range(rng.randrange(1, 40))]
        sampling = Sampling(
            max_tokens=rng.randrange(1, max_tokens + 1), seed=rng.getrandbits(64), temperature=float(i % 2)
        )
        made.append(Submit(f"r{i}", prompt, len(prompt), sampling))
    return made


def assert_undisturbed(observer: Observer, made: list[Submit]) -> None:
    for submit in made:
        stream = observer.streams[submit.request_id, submit.index]
        assert stream.finish == FinishReason.LENGTH, (submit.request_id, stream.finish)
        tokens = expected(submit.token_ids, submit.sampling, adapter_digest=submit.adapter_digest)
        assert stream.token_ids == tokens, submit.request_id

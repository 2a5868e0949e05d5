"""The engine and a backend in one process: what a service does with requests, without its sockets and processes."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protos.adapter_files import digest
from protos.engine_wire import FinishReason, Outputs, Submit
from protos.wire import Epoch, LoadAdapter, RowResult, Sampling, Setup, StepPlan, StepResult, TokenLogprobs
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import AdapterLoaded, EndEpoch, Event, WorkerLost, WorkerReady
from scheduler_svc.engine.scheduler import Scheduler
from tests.models.session import load
from worker_svc.backends.base import DeviceBackend, Landing


@dataclass
class Stream:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    reason: FinishReason | None = None


class House:
    """`create` makes a backend, which a crash replaces by another; it has the `adapters`, by name, from the start."""

    def __init__(
        self,
        setup: Setup,
        create: Callable[[Setup], DeviceBackend],
        depth: int = 1,
        adapters: Mapping[str, Path] | None = None,
    ) -> None:
        self.setup, self._create, self._adapters = setup, create, dict(adapters or {})
        self.config = EngineConfig(
            block_size=setup.block_size,
            max_num_seqs=setup.max_slots // 2,
            max_step_tokens=64,
            depth=depth,
            num_drafts=setup.num_drafts,
        )
        self.scheduler = Scheduler(self.config)
        self.streams: dict[str, Stream] = {}
        self.plans: list[StepPlan] = []
        self.drafted = self.accepted = 0
        self._results: deque[tuple[StepPlan, list[RowResult] | Landing]] = deque()
        self._epoch = Epoch(1, 0)
        self._backend: DeviceBackend | None = None

    def ready(self) -> None:
        self._epoch = Epoch(1, self._epoch.counter + 1)
        self._backend = self._create(self.setup)
        capacity = load(self._backend, self.setup)
        for name, path in self._adapters.items():
            self._backend.load_adapter(LoadAdapter(self._epoch, 0, name, digest(path), str(path)))
        slots, longest = self.config.max_slots, capacity.max_model_len
        assert slots <= self.setup.max_slots
        self._send(WorkerReady(self._epoch, capacity.num_blocks, slots, capacity.align, 1, longest, 0, 0))
        if self._epoch.counter == 1:
            for name, path in self._adapters.items():
                self._send(AdapterLoaded(name, digest(path)))

    def crash(self) -> None:
        assert self._backend
        self._backend.close()
        self._results.clear()
        self._send(WorkerLost(self._epoch, "killed", True))
        self.ready()

    def run(self, submits: Sequence[Submit], crashes: Sequence[int] = ()) -> dict[str, Stream]:
        """All of them to their ends; the worker dies behind so many plans each."""
        for submit in submits:
            self.streams[submit.request_id] = Stream()
            self._send(submit)
        moments = deque(crashes)
        while self._results:
            if moments and len(self.plans) >= moments[0]:
                moments.popleft()
                self.crash()
                continue
            self._send(self._landed(*self._results.popleft()))
        assert self.scheduler.idle
        assert all(stream.reason is not None for stream in self.streams.values())
        return self.streams

    def _send(self, event: Event) -> None:
        for instruction in self.scheduler.handle(event):
            match instruction:
                case StepPlan():
                    self._step(instruction)
                case Outputs():
                    for delta in instruction.items:
                        stream = self.streams[delta.request_id]
                        stream.token_ids += delta.token_ids
                        stream.logprobs += delta.logprobs
                        stream.prompt_logprobs += delta.prompt_logprobs
                        if delta.finish_reason is not None:
                            stream.reason = delta.finish_reason
                case EndEpoch():
                    raise AssertionError(f"the engine believes no result: {instruction}")

    def _step(self, plan: StepPlan) -> None:
        assert self._backend
        self.plans.append(plan)
        self._backend.forward(plan)
        self._results.append((plan, self._backend.sample(None)))

    def _landed(self, plan: StepPlan, answer: list[RowResult] | Landing) -> StepResult:
        rows = answer if isinstance(answer, list) else answer.rows()
        self.drafted += sum(row.num_drafted for row in rows)
        self.accepted += sum(len(row.token_ids) - 1 for row in rows if row.num_drafted)
        return StepResult(plan.epoch, plan.step, rows, [])


def submits(count: int, vocab: int, rng: random.Random, **fields: Any) -> list[Submit]:
    """Requests of every kind that changes how tokens are sampled, in two domains."""
    return [_submit(f"r{i}", i, vocab, rng, fields) for i in range(count)]


def _submit(name: str, number: int, vocab: int, rng: random.Random, fields: dict[str, Any]) -> Submit:
    phrase = rng.choices(range(3, vocab), k=rng.randint(1, 9))
    prompt = (phrase * 40)[: rng.randint(1, 60)]
    asked: dict[str, Any] = {"max_tokens": rng.randint(1, 60), "seed": rng.getrandbits(64)}
    asked["temperature"] = 0.0 if number % 2 else rng.choice((0.2, 0.6, 1.0))
    if rng.random() < 0.3:
        asked |= {"top_k": 5, "top_p": 0.9, "min_p": 0.01}
    if rng.random() < 0.3:
        asked |= {"repetition_penalty": 1.3, "presence_penalty": 0.4, "frequency_penalty": -0.2}
    if rng.random() < 0.3:
        words = [tuple(rng.choices(phrase, k=rng.randint(1, 3))) for _ in range(6)]
        asked["bad_words"] = (*words, *((rng.randrange(vocab), rng.randrange(vocab)) for _ in range(200)))
    if rng.random() < 0.4:
        asked["stop_token_ids"] = tuple(rng.sample(range(vocab), 8))
        asked["min_tokens"] = rng.choice((0, 5, asked["max_tokens"]))
    if rng.random() < 0.3:
        asked["logprobs"] = rng.choice((0, 3))
    if rng.random() < 0.15:
        asked["prompt_logprobs"] = 1
    if rng.random() < 0.2:
        asked["logit_bias"] = tuple((rng.randrange(vocab), rng.choice((2.0, -4.0))) for _ in range(3))
    return Submit(name, prompt, len(prompt), Sampling(**asked | fields), cache_salt=rng.choice(("", "x")))

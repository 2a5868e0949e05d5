"""Conversations whose KV does not fit the first tier: the same tokens with a second one, and less of them computed.

An engine and a backend in one process, one plan after the other; the cpu and torch backends are exact, so every stream
is compared with the one of a service that has room for everything and caches nothing.
"""

from __future__ import annotations

import os
import random
import signal
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from protos.engine_wire import EngineStats, Outputs, Question, Submit
from protos.wire import Direction, Epoch, Sampling, StepPlan, StepResult
from scheduler_svc.config import LoopConfig
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.engine.scheduler import Scheduler
from tests.gpu_worker.place import FakePlace
from tests.loop.harness import Observer, running
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import EPOCH, load
from tests.models.session import setup as plain_setup
from tests.models.stepping import tokens
from tests.models.test_cpu_backend import create
from worker_svc.backends.torch import TorchBackend
from worker_svc.gpu.backend import GpuBackend

USERS, SAID, ANSWER = 4, 45, 15
FIRST = 13  # blocks of the first tier, null block included: one long conversation, and the beginning of another

# Of one block: 3 layers, K and V, 2 heads of 16.
KINDS: dict[str, dict[str, Any]] = {
    "cpu-bf16": {"backend": "cpu", "block_size": 32, "block_bytes": 3 * 2 * 2 * 16 * 32 * 2},
    "cpu-int8": {"backend": "cpu", "block_size": 32, "block_bytes": 3 * 2 * (2 * 16 + 8) * 32, "kv_dtype": "int8"},
    "torch-float32": {"backend": "torch", "block_size": 16, "block_bytes": 3 * 2 * 2 * 16 * 16 * 4},
}
DEVICE = {**KINDS["torch-float32"], "backend": "device", "dtype": "float32", "max_step_tokens": 64}


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**SMALL))
    return path


@dataclass
class Service:
    """An engine and its one worker."""

    path: Path
    kind: str
    first: int  # blocks
    second: int
    caching: bool = True
    depth: int = 1
    plans: list[StepPlan] = field(default_factory=list)
    answers: dict[str, list[int]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fields = dict(DEVICE if self.kind == "device" else KINDS[self.kind])
        name, block_bytes = fields.pop("backend"), fields.pop("block_bytes")
        memory = {"kv_bytes": self.first * block_bytes, "kv_host_bytes": self.second * block_bytes}
        message = plain_setup(self.path, **fields, **memory, threads=1, max_slots=8)
        if name == "torch":
            self.backend: Any = TorchBackend(threads=1)
        elif name == "device":
            place = FakePlace(random.Random(self.second), total=1 << 26)
            self.backend = GpuBackend(place, lambda: None, 0.9, (1,), "torch")
        else:
            self.backend = create(message, name, "cpu")
        can = load(self.backend, message)
        assert (can.num_blocks, can.num_host_blocks) == (self.first, self.second)
        size = message.block_size
        config = EngineConfig(size, max_num_seqs=4, max_step_tokens=64, depth=self.depth, prefix_caching=self.caching)
        self.engine = Scheduler(config)
        self.waiting: deque[StepPlan] = deque()
        ready = WorkerReady(EPOCH, can.num_blocks, 8, can.align, num_host_blocks=can.num_host_blocks)
        self._take(self.engine.handle(ready))

    @property
    def stats(self) -> EngineStats:
        return self.engine.stats()

    def ask(self, *submits: Submit) -> None:
        for submit in submits:
            self.answers[submit.request_id] = []
            self._take(self.engine.handle(submit))
        while self.waiting:
            plan = self.waiting.popleft()
            self.backend.forward(plan)
            copied = [host_block for _, _, host_block in plan.copies]
            rows = self.backend.sample(None)
            answered = rows if isinstance(rows, list) else rows.rows()
            self._take(self.engine.handle(StepResult(plan.epoch, plan.step, answered, copied)))
            self.engine.check_integrity()

    def _take(self, instructions: Any) -> None:
        for instruction in instructions:
            if isinstance(instruction, StepPlan):
                self.plans.append(instruction)
                self.waiting.append(instruction)
            else:
                assert isinstance(instruction, Outputs), instruction
                for delta in instruction.items:
                    self.answers[delta.request_id] += delta.token_ids


class Killed:
    """A service of processes, whose worker is killed in the middle of some answers."""

    def __init__(self, observer: Observer, *moments: str) -> None:
        self.observer, self.moments = observer, moments
        self.answers: dict[str, list[int]] = {}
        self.hits: list[int] = []  # tokens from the host, before each of the moments

    def ask(self, *submits: Submit) -> None:
        seen = self.observer
        for submit in submits:
            seen.loop.send(submit)
            if submit.request_id in self.moments:
                seen.until_tokens(seen.tokens + 3)
                self.hits.append(seen.ask(Question.STATS).status.stats.host_cached_tokens)
                os.kill(seen.status.workers[0].pid, signal.SIGKILL)
                seen.until(lambda: not seen.status.serving, "the loss")
        seen.until_finished(list(submits))
        for submit in submits:
            self.answers[submit.request_id] = seen.streams[submit.request_id, 0].token_ids


def converse(service: Service | Killed, together: int = 1, turns: int = 3) -> dict[str, list[int]]:
    """Every user says something in turn, so many of them at once; each sends all that was said before, too. Half of
    them sample.
    """
    said = [tokens(SAID + 3 * user, 151, seed=user) for user in range(USERS)]
    for turn in range(turns):
        for first in range(0, USERS, together):
            users = range(first, min(first + together, USERS))
            service.ask(*(_submit(f"{turn}.{user}", said[user], user) for user in users))
            for user in users:
                more = tokens(SAID, 151, seed=100 * turn + user)
                said[user] = said[user] + service.answers[f"{turn}.{user}"] + more
    return service.answers


def _submit(name: str, prompt: list[int], user: int) -> Submit:
    sampling = Sampling(ANSWER, seed=user, temperature=float(user % 2), top_p=0.9)
    return Submit(name, prompt, len(prompt), sampling)


@pytest.mark.parametrize(("together", "depth"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_same_tokens_and_more_of_them_from_the_cache(llama: Path, kind: str, together: int, depth: int) -> None:
    first = FIRST * 32 // KINDS[kind]["block_size"]
    roomy = converse(Service(llama, kind, 96, 0, caching=False))
    without, with_tier = Service(llama, kind, first, 0), Service(llama, kind, first, 64, depth=depth)
    assert converse(without) == roomy
    assert converse(with_tier, together) == roomy
    few, many = without.stats, with_tier.stats
    assert many.host_cached_tokens > 0
    assert many.cached_tokens > 1.5 * few.cached_tokens
    print(f"\n{kind}: {few.cached_tokens} of {few.prompt_tokens} tokens cached, with a tier {many.cached_tokens}")
    assert {direction for plan in with_tier.plans for direction, _, _ in plan.copies} == set(Direction)


def test_a_device_copies_within_its_steps(llama: Path) -> None:
    """The device of the tests, with steps of one token replayed; copies both ways, in the order of the plans."""

    def talk(service: Service) -> dict[str, list[int]]:
        for turn, user in enumerate((0, 1, 0, 1)):
            prompt = tokens(50 + turn, 151, seed=user)
            service.ask(Submit(f"{turn}", prompt, len(prompt), Sampling(3, seed=user, temperature=float(user))))
        return service.answers

    service = Service(llama, "device", 6, 16, depth=2)
    assert talk(service) == talk(Service(llama, "torch-float32", 64, 0, caching=False))
    assert service.stats.host_cached_tokens > 0
    assert {direction for plan in service.plans for direction, _, _ in plan.copies} == set(Direction)
    service.backend.close()


@pytest.mark.parametrize("kind", ["cpu-bf16", "torch-float32", pytest.param("device", marks=pytest.mark.full)])
def test_a_new_epoch_of_the_same_worker_knows_nothing_of_the_tier(llama: Path, kind: str) -> None:
    service = Service(llama, kind, FIRST, 8)
    service.ask(_submit("a", tokens(90, 151, seed=1), 0), _submit("b", tokens(90, 151, seed=2), 0))
    service.ask(*(_submit(f"c{i}", tokens(90, 151, seed=3 + i), 0) for i in range(3)))
    assert service.stats.copied_to_host
    service.backend.reset(plain_setup(llama, block_size=32 if kind == "cpu-bf16" else 16, max_slots=8))
    with pytest.raises(ValueError, match="nothing was copied there"):
        service.backend.forward(StepPlan(EPOCH, 1, [], [], [(Direction.TO_DEVICE, 1, 0)], []))


def test_kill_9_between_copies_changes_no_token(llama: Path) -> None:
    """A worker process of the cpu backend with an int8 KV cache: its heir begins with both tiers empty."""
    kind = KINDS["cpu-int8"]
    engine = EngineConfig(block_size=32, max_num_seqs=4, max_step_tokens=64, depth=2)
    setup = plain_setup(
        llama,
        epoch=Epoch(1, 0),
        block_size=32,
        kv_dtype="int8",
        kv_bytes=FIRST * kind["block_bytes"],
        kv_host_bytes=64 * kind["block_bytes"],
        threads=1,
    )
    with running(LoopConfig(engine, setup)) as observer:
        observer.until_serving()
        service = Killed(observer, "2.3", "3.1")
        answers = converse(service, turns=5)
        assert answers == converse(Service(llama, "cpu-int8", 96, 0, caching=False), turns=5)
        stats = observer.ask(Question.STATS).status.stats
    assert stats.recoveries == 2
    assert service.hits[0] > 0
    assert service.hits[-1] < stats.host_cached_tokens

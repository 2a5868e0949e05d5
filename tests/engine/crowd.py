"""Tenants with streams in a loop, each asking again as soon as it has its answer; counts who gets what in each step.

The worker knows lengths alone, and each step takes `step_seconds(positions)` of a clock of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from protos.engine_wire import FinishReason, Outputs, Submit
from protos.wire import Epoch, RowResult, Sampling, StepPlan, StepResult, Timings
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import Tick, WorkerReady
from scheduler_svc.engine.scheduler import Scheduler

Range = tuple[int, int]


@dataclass
class Party:
    """A tenant's streams. `begin` is the step at which they come."""

    name: str
    streams: int
    prompt: Range
    output: Range
    begin: int = 0
    priority: int = 0
    lifetime: tuple[float, float] | None = None  # seconds from a request to its deadline
    again: bool = True  # another request for each that ended
    frontends: int = 1  # over which its requests come, in turns
    waits: list[float] = field(default_factory=list)  # seconds to each first token


@dataclass
class Asked:
    party: Party
    prompt_len: int
    at: float
    deadline: float
    tokens: int = 0
    computed: int = 0  # of the prompt, the furthest yet
    end: FinishReason | None = None
    ended_at: float = 0.0
    detail: str = ""


def step_seconds(positions: int) -> float:
    return 0.004 + 0.0004 * positions


class Crowd:
    """`served[i][name]`: cost of the tokens that `name` got in step i, as its counter is charged before weights."""

    def __init__(
        self,
        config: EngineConfig,
        parties: list[Party],
        *,
        seed: int = 0,
        groups: int = 1,
        num_blocks: int = 4000,
        seconds: Callable[[int], float] = step_seconds,
    ) -> None:
        self.config, self.parties, self.seconds = config, parties, seconds
        self.scheduler = Scheduler(config)
        self.random = Random(seed)
        self.now = 100.0
        self.served: list[dict[str, float]] = []
        self.steps = 0
        self._made = 0
        self._plans: list[StepPlan] = []
        self.asked: dict[str, Asked] = {}
        self._slots: dict[tuple[Epoch, int], str] = {}
        self._lengths: dict[tuple[Epoch, int], int] = {}
        self.groups = groups
        self._tell(Tick(self.now))
        for group in range(groups):
            self._tell(WorkerReady(Epoch(1, 1 + group), num_blocks, config.max_slots, group=group))

    def run(self, steps: int) -> None:
        for _ in range(steps):
            for party in self.parties:
                if party.begin == self.steps:
                    for _ in range(party.streams):
                        self._ask(party)
            self.steps += 1
            self.served.append({party.name: 0.0 for party in self.parties})
            if self._plans:
                self._step(self._plans.pop(0))

    def share(self, name: str, first: int, count: int) -> float:
        """Of the tokens of steps first … first+count−1."""
        window = self.served[first : first + count]
        return sum(step[name] for step in window) / sum(sum(step.values()) for step in window)

    def _ask(self, party: Party) -> None:
        self._made += 1
        request_id = f"{party.name}-{self._made}"
        prompt = [self._made % 50_000 + 1, *range(self.random.randint(*party.prompt) - 1)]
        deadline = self.now + self.random.uniform(*party.lifetime) if party.lifetime else 0.0
        self.asked[request_id] = Asked(party, len(prompt), self.now, deadline)
        sampling = Sampling(self.random.randint(*party.output), seed=self._made)
        self._tell(
            Submit(
                request_id,
                prompt,
                len(prompt),
                sampling,
                tenant=party.name,
                priority=party.priority,
                deadline=deadline,
                frontend=f"f{self._made % party.frontends}",
            )
        )

    def _step(self, plan: StepPlan) -> None:
        positions = sum(row.num_tokens for row in plan.rows)
        seconds = self.seconds(positions)
        self.now += seconds
        for admit in plan.admit:
            self._lengths[plan.epoch, admit.slot] = len(admit.token_ids)
        rows = []
        for row in plan.rows:
            asked = self.asked[self._slots[plan.epoch, row.slot]]
            if row.start >= 0:
                new = min(row.start + row.num_tokens, asked.prompt_len) - max(row.start, asked.computed)
                if new > 0:
                    asked.computed = min(row.start + row.num_tokens, asked.prompt_len)
                    self.served[-1][asked.party.name] += new * self.config.prompt_cost
            token_ids = [7] if row.sample else []
            rows.append(RowResult(row.slot, self._lengths[plan.epoch, row.slot], token_ids))
            self._lengths[plan.epoch, row.slot] += len(token_ids)
        self._tell(Tick(self.now))
        self._tell(StepResult(plan.epoch, plan.step, rows, timings=Timings(forward=seconds)))

    def _tell(self, event: Tick | WorkerReady | Submit | StepResult) -> None:
        finished = []
        for instruction in self.scheduler.handle(event):
            match instruction:
                case StepPlan():
                    self._take(instruction)
                case Outputs(items=items):
                    for delta in items:
                        asked = self.asked[delta.request_id]
                        if delta.token_ids:
                            self.served[-1][asked.party.name] += len(delta.token_ids) * self.config.output_cost
                            if not asked.tokens:
                                asked.party.waits.append(self.now - asked.at)
                            asked.tokens += len(delta.token_ids)
                        if delta.finish_reason is not None:
                            asked.end, asked.ended_at, asked.detail = delta.finish_reason, self.now, delta.detail
                            finished += [asked.party] if asked.party.again else []
                case _:
                    raise AssertionError(instruction)
        for party in finished:
            self._ask(party)

    def _take(self, plan: StepPlan) -> None:
        self._plans.append(plan)
        for device in self.scheduler.devices.values():
            for sequence in device.running:
                self._slots[device.epoch, sequence.slot] = sequence.request_id

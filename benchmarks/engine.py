"""The engine alone: planning and result handling per step, with a trivial worker whose time is not counted.

    python -m benchmarks.engine [--json FILE]

Goal: at most 150 µs a step at 32 running sequences and 1 ms at 256, whatever waits behind them. Measured in CPU time of
the thread, the garbage collector's included, so that a busy machine does not show.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import thread_time

from protos import codec
from protos.engine_wire import Outputs, Submit
from protos.wire import Epoch, RowResult, Sampling, StepPlan, StepResult
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.engine.scheduler import Scheduler

VOCAB_SIZE = 49152
GOAL = {32: 150.0, 256: 1000.0}  # µs


@dataclass(frozen=True)
class Case:
    name: str
    running: int
    waiting: int
    depth: int = 1
    num_drafts: int = 0
    prompt_len: int = 128
    max_tokens: int = 100_000  # far away: nobody finishes
    steps: int = 1000


@dataclass(frozen=True)
class Figures:
    """Microseconds a step."""

    median: float
    p99: float
    mean: float
    encode_plan: float  # msgspec, both directions, on top of it
    decode_result: float
    encode_outputs: float


def cases(steps: int) -> Iterator[Case]:
    for running in (32, 256):
        for waiting in (0, 1_000, 100_000):
            yield Case("decode", running, waiting, steps=steps)
        yield Case("decode, depth 2", running, 0, depth=2, steps=steps)
        yield Case("decode, 3 drafts", running, 0, num_drafts=3, steps=steps)
        yield Case("decode, context 8k", running, 0, prompt_len=8000, steps=steps)
        for waiting in (1_000, 100_000):
            yield Case("churn: 32 tokens each", running, waiting, max_tokens=32, steps=steps)


class TrivialWorker:
    """Answers with as many tokens as the plan allows. Knows only the lengths of its slots."""

    def __init__(self) -> None:
        self.lengths: dict[int, int] = {}

    def run(self, plan: StepPlan) -> StepResult:
        for admit in plan.admit:
            self.lengths[admit.slot] = len(admit.token_ids)
        rows = []
        for row in plan.rows:
            start = self.lengths[row.slot]
            token_ids = [(start + i) % VOCAB_SIZE for i in range(1 + row.num_drafts)] if row.sample else []
            self.lengths[row.slot] += len(token_ids)
            rows.append(RowResult(row.slot, start, token_ids, num_drafted=row.num_drafts))
        return StepResult(plan.epoch, plan.step, rows)


class Run:
    """One case: a full house, and a queue behind it that never empties."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = EngineConfig(
            block_size=32,
            max_num_seqs=case.running,
            max_step_tokens=max(8192, case.running * (1 + case.num_drafts)),
            depth=case.depth,
            num_drafts=case.num_drafts,
            max_waiting=200_000,
            max_waiting_tokens=1 << 40,
        )
        self.scheduler = Scheduler(self.config)
        self.worker = TrivialWorker()
        self.submitted = 0
        self.plans: list[StepPlan] = []  # in flight

    def submit(self) -> None:
        self.submitted += 1
        n, case = self.submitted, self.case
        prompt = [(n * 7919 + i) % VOCAB_SIZE for i in range(case.prompt_len)]
        self.scheduler.handle(Submit(f"r{n}", prompt, case.prompt_len, Sampling(case.max_tokens, seed=n)))

    def measure(self) -> Figures:
        case = self.case
        for _ in range(case.running + case.waiting):
            self.submit()
        blocks_each = -(-(case.prompt_len + (1 + case.num_drafts) * (case.steps + 600)) // 32) + 2
        ready = WorkerReady(Epoch(1, 1), case.running * blocks_each + 1, self.config.max_slots)
        self.plans += [m for m in self.scheduler.handle(ready) if isinstance(m, StepPlan)]
        for _ in range(case.running * case.prompt_len // 8192 + 100):  # until all decode, and a little longer
            self.step()
        times, encode_plan, decode_result, encode_outputs = [], 0.0, 0.0, 0.0
        for _ in range(case.steps):
            seconds, plan, result, outputs = self.step()
            times.append(seconds)
            data = codec.encode(result)
            encode_plan += _seconds(lambda plan=plan: codec.encode(plan))
            decode_result += _seconds(lambda data=data: codec.decode_from_worker(data))
            encode_outputs += _seconds(lambda outputs=outputs: [codec.encode(o) for o in outputs])
        assert len(self.scheduler.roster.running) == case.running, "the house was not full"
        assert self.scheduler.stats().waiting == case.waiting, "the queue was not kept"
        times.sort()
        return Figures(
            median=round(times[len(times) // 2] * 1e6, 1),
            p99=round(times[len(times) * 99 // 100] * 1e6, 1),
            mean=round(sum(times) / len(times) * 1e6, 1),
            encode_plan=round(encode_plan / case.steps * 1e6, 1),
            decode_result=round(decode_result / case.steps * 1e6, 1),
            encode_outputs=round(encode_outputs / case.steps * 1e6, 1),
        )

    def step(self) -> tuple[float, StepPlan, StepResult, list[Outputs]]:
        """One result in, one plan and its outputs out; the time of `handle` alone, new arrivals included."""
        result = self.worker.run(self.plans.pop(0))
        begin = thread_time()
        instructions = self.scheduler.handle(result)
        seconds = thread_time() - begin
        outputs = [m for m in instructions if isinstance(m, Outputs)]
        finished = sum(delta.finish_reason is not None for o in outputs for delta in o.items)
        for _ in range(finished):
            self.submit()
        self.plans += [m for m in instructions if isinstance(m, StepPlan)]
        return seconds, self.plans[-1], result, outputs


def _seconds(call: object) -> float:
    begin = thread_time()
    call()  # type: ignore[operator]
    return thread_time() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description="The engine alone: µs a step for planning and result handling.")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there")
    parser.add_argument("--steps", type=int, default=1000, help="measured steps a case")
    args = parser.parse_args()
    gc.freeze()
    rows = []
    print(f"{'µs a step':24}{'running':>8}{'waiting':>9}{'median':>9}{'p99':>9}{'mean':>9}", end="   ")
    print("+ encode plan, decode result, encode outputs")
    for case in cases(args.steps):
        figures = Run(case).measure()
        gc.collect()
        goal = GOAL[case.running]
        print(
            f"{case.name:24}{case.running:8}{case.waiting:9}{figures.median:9.1f}{figures.p99:9.1f}{figures.mean:9.1f}"
            f"   {figures.encode_plan:.1f}, {figures.decode_result:.1f}, {figures.encode_outputs:.1f}"
            f"{'' if figures.mean <= goal else f'   over the goal of {goal:.0f}'}"
        )
        rows.append({"case": asdict(case), "microseconds": asdict(figures), "goal": goal})
    if args.json:
        about = {"python": platform.python_version(), "machine": platform.machine()}
        args.json.write_text(json.dumps({"about": about, "engine": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()

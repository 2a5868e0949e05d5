"""What recording costs the engine's thread: µs a step, and ms for a state.

    python -m benchmarks.recording

Every recorder writes the same steps, one after the other, in an order that turns. CPU time of the thread.
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from pathlib import Path
from time import thread_time

from benchmarks.engine import Case, Run
from protos.wire import Epoch, StepPlan, StepResult
from scheduler_svc.engine.events import WorkerReady
from scheduler_svc.record import RecordConfig, Recorder
from scheduler_svc.record_state import restore, snapshot


def main() -> None:
    parser = argparse.ArgumentParser(description="What recording costs the engine's thread.")
    parser.add_argument("--steps", type=int, default=1000, help="measured steps a case")
    steps: int = parser.parse_args().steps
    gc.freeze()
    print(f"µs a step, mean of {steps}")
    print(f"{'running':>8}{'waiting':>9}{'engine':>9}{'memory':>9}{'+ file':>9}{'private':>9}")
    for running in (1, 32, 256):
        for waiting in (0, 1_000, 4_000):
            with tempfile.TemporaryDirectory() as directory:
                print(f"{running:8}{waiting:9}{Measured(Case('', running, waiting, steps=steps), Path(directory))}")


class Measured:
    """A full house, and a queue behind it; as text, its figures."""

    def __init__(self, case: Case, directory: Path) -> None:
        self._run = Run(case)
        for _ in range(case.running + case.waiting):
            self._run.submit()
        configs = (
            RecordConfig(crash_dir=directory),
            RecordConfig(directory / "log", crash_dir=directory),
            RecordConfig(crash_dir=directory, key=bytes(32)),
        )
        self._recorders = [Recorder(config, self._run.scheduler, 1, "m") for config in configs]
        self._times = [0.0] * (1 + len(configs))
        self._turn = 0
        blocks = case.running * (-(-(case.prompt_len + case.steps + 600) // 32) + 2)
        self._tell(WorkerReady(Epoch(1, 1), blocks + 1, self._run.config.max_slots))
        for _ in range(case.running * case.prompt_len // 8192 + 100):  # until all decode, and a little longer
            self._tell(self._run.worker.run(self._run.plans.pop(0)))
        self._times = [0.0] * len(self._times)
        for _ in range(case.steps):
            self._tell(self._run.worker.run(self._run.plans.pop(0)))
        self._steps = case.steps

    def _tell(self, event: WorkerReady | StepResult) -> None:
        begin = thread_time()
        instructions = self._run.scheduler.handle(event)
        self._times[0] += thread_time() - begin
        self._run.plans += [instruction for instruction in instructions if isinstance(instruction, StepPlan)]
        self._turn += 1
        for place in range(len(self._recorders)):
            which = (self._turn + place) % len(self._recorders)
            begin = thread_time()
            self._recorders[which].write(event, instructions)
            self._times[1 + which] += thread_time() - begin

    def __str__(self) -> str:
        means = "".join(f"{seconds / self._steps * 1e6:9.1f}" for seconds in self._times)
        begin = thread_time()
        state = snapshot(self._run.scheduler)
        taken = thread_time() - begin
        assert snapshot(restore(state)) == state
        return f"{means}   a state: {taken * 1e3:.1f} ms, {len(state) / 1e6:.2f} MB"


if __name__ == "__main__":
    main()

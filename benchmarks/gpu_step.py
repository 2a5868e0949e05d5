"""A GPU worker by itself, plans in and results out: `python -m benchmarks.gpu_step MODEL --json FILE`.

For each batch: prompts of --input tokens, computed in chunks of --chunk positions; then --output tokens from each row,
two steps in flight, as a scheduler would plan them. Prints tokens a second of both, the milliseconds of a step, and
what the host needs to launch one: below a step's time it does not matter, above it the GPU waits.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from benchmarks import machine
from protos.wire import Admit, Epoch, Phase, Row, RowResult, Sampling, Setup, StepPlan
from worker_svc.backends import ATTENTION
from worker_svc.backends.base import DeviceBackend, Landing
from worker_svc.backends.cuda import CAPTURED, cuda_backend

EPOCH = Epoch(1, 1)
BLOCK_SIZE = 16


@dataclass(frozen=True)
class Figures:
    batch: int
    prompt_tokens_a_second: float
    output_tokens_a_second: float
    step_ms: float  # median, from one landing to the next
    launch_ms: float  # median, of the host


class Driver:
    """Numbers its plans from epoch to epoch, and keeps two of them in flight."""

    def __init__(self, backend: DeviceBackend, vocab_size: int) -> None:
        self._backend, self._vocab, self._steps = backend, vocab_size, 0
        self.launches: list[float] = []
        self.landings: list[float] = []

    def run(self, plans: Iterator[StepPlan]) -> list[list[RowResult]]:
        flying: list[Landing] = []
        answers: list[list[RowResult]] = []
        self.launches, self.landings = [], []
        for plan in plans:
            began = time.perf_counter()
            self._backend.forward(plan)
            landing = self._backend.sample(None)
            self.launches.append(time.perf_counter() - began)
            assert not isinstance(landing, list), "a GPU answers later"
            flying.append(landing)
            while len(flying) > 1:
                answers.append(self._land(flying.pop(0)))
        return answers + [self._land(landing) for landing in flying]

    def _land(self, landing: Landing) -> list[RowResult]:
        rows = landing.rows()
        self.landings.append(time.perf_counter())
        return rows

    def _plan(self, rows: list[Row], admit: Sequence[Admit] = (), release: Sequence[int] = ()) -> StepPlan:
        self._steps += 1
        return StepPlan(EPOCH, self._steps, list(release), list(admit), [], rows)

    def prompts(self, batch: int, length: int, output: int, chunk: int) -> Iterator[StepPlan]:
        """One after the other into chunks, as many in a step as fit."""
        rng = random.Random(batch)
        blocks_each = -(-(length + output) // BLOCK_SIZE)
        rows: list[Row] = []
        admit: list[Admit] = []
        left = chunk
        for slot in range(1, batch + 1):
            tokens = [rng.randrange(self._vocab) for _ in range(length)]
            blocks = list(range(1 + (slot - 1) * blocks_each, 1 + slot * blocks_each))
            admit.append(Admit(slot, tokens, length, [blocks], Sampling(max_tokens=output + 1, seed=slot)))
            done = 0
            while done < length:
                count = min(left, length - done)
                rows.append(Row(slot, done, count, sample=done + count == length))
                done, left = done + count, left - count
                if not left:
                    yield self._plan(rows, admit)
                    rows, admit, left = [], [], chunk
        if rows:
            yield self._plan(rows, admit)

    def decodes(self, batch: int, count: int) -> Iterator[StepPlan]:
        for _ in range(count):
            yield self._plan([Row(slot, -1, 1, sample=True) for slot in range(1, batch + 1)])

    def releases(self, batch: int) -> Iterator[StepPlan]:
        yield self._plan([], release=range(1, batch + 1))


def measure(driver: Driver, batch: int, arguments: argparse.Namespace) -> Figures:
    began = time.perf_counter()
    driver.run(driver.prompts(batch, arguments.input, arguments.output, arguments.chunk))
    prompts = time.perf_counter() - began
    driver.run(driver.decodes(batch, arguments.output))
    steps = [after - before for before, after in zip(driver.landings[4:], driver.landings[5:], strict=False)]
    took, launch = median(steps), median(driver.launches)
    driver.run(driver.releases(batch))
    return Figures(batch, batch * arguments.input / prompts, batch / took, 1000 * took, 1000 * launch)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 128, 256])
    parser.add_argument("--input", type=int, default=1024, help="tokens of a prompt")
    parser.add_argument("--output", type=int, default=128)
    parser.add_argument("--chunk", type=int, default=8192, help="positions of a step")
    parser.add_argument("--enforce-eager", action="store_true")
    parser.add_argument("--batch-invariant", action="store_true")
    parser.add_argument("--attention-backend", choices=ATTENTION, default="auto")
    parser.add_argument("--kv-cache-dtype", choices=("auto", "fp8"), default="auto")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args()
    captured = () if arguments.enforce_eager else CAPTURED
    backend = cuda_backend("cuda", lambda: None, 0.9, captured, arguments.attention_backend)
    setup = Setup(
        EPOCH, str(arguments.model), block_size=BLOCK_SIZE, max_slots=max(arguments.batches),
        max_model_len=arguments.input + arguments.output + 1, max_step_tokens=arguments.chunk,
        kv_dtype=arguments.kv_cache_dtype, batch_invariant=arguments.batch_invariant,
    )  # fmt: skip
    phases: dict[str, float] = {}
    began = time.perf_counter()

    def progress(phase: Phase, share: float) -> None:
        phases[phase.name.lower()] = time.perf_counter() - began

    capacity = backend.load(setup, progress)
    print(f"{capacity.device}, {capacity.num_blocks} blocks, ready after {time.perf_counter() - began:.1f} s: {phases}")
    driver = Driver(backend, capacity.vocab_size)
    measure(driver, min(arguments.batches), arguments)  # compiles what is not captured
    figures = [measure(driver, batch, arguments) for batch in arguments.batches]
    for each in figures:
        print(
            f"batch {each.batch:4}: {each.output_tokens_a_second:9.0f} output tok/s, step {each.step_ms:.2f} ms, "
            f"launch {each.launch_ms:.2f} ms; prompts {each.prompt_tokens_a_second:9.0f} tok/s",
            flush=True,
        )
    if arguments.json:
        told = {name: value for name, value in vars(arguments).items() if name not in ("json", "model")}
        record = {**machine.describe(), "device": capacity.device, "arguments": told, "phases": phases}
        arguments.json.write_text(json.dumps({**record, "figures": [asdict(f) for f in figures]}, indent=1) + "\n")
    backend.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())

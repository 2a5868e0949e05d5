"""What adapters cost a step of the cpu backend, with the real model: `python -m benchmarks.adapters`.

Sixteen sequences decode, those of one half of the slots without adapters, those of the other with eight of rank 16,
two rows each: of all projections, or of attention's alone. One thread's CPU time, which others on the machine disturb
least; both halves take turns of some steps, so that what disturbs it is both's, and the first steps of a turn do not
count.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Final

from benchmarks import machine, random_adapter
from client import store
from protos.adapter_files import digest
from protos.wire import Admit, Epoch, LoadAdapter, Row, Sampling, Setup, StepPlan
from worker_svc.backends.cpu import CpuBackend
from worker_svc.models.loader import open_model

ROWS, CONTEXT, ADAPTERS, RANK, BLOCK = 16, 128, 8, 16, 32
WARM: Final = 3  # steps of a turn that do not count
EPOCH = Epoch(1, 1)
MODULES = {"all": random_adapter.ALL, "attention": random_adapter.ATTENTION}


@dataclass(frozen=True)
class Figures:
    weights: str
    modules: str
    plain_ms: float
    adapted_ms: float

    @property
    def cost(self) -> float:
        return self.adapted_ms / self.plain_ms - 1


class Bench:
    def __init__(self, model: Path, mode: str, modules: str, home: Path, steps: int) -> None:
        setup = Setup(
            EPOCH, str(model), block_size=BLOCK, max_slots=2 * ROWS, kv_bytes=1 << 29, max_adapters=ADAPTERS,
            max_adapter_rank=RANK, dtype="bfloat16" if mode == "bf16" else "auto",
            quantization="" if mode == "bf16" else mode, threads=1,
        )  # fmt: skip
        self._backend = CpuBackend(setup, "cpu", "auto", home)
        self._backend.load(setup, lambda phase, share: None)
        source = open_model(model)
        assert source is not None
        for i in range(ADAPTERS):
            path = random_adapter.write(home / f"{modules}-{i}", source.spec, RANK, i, MODULES[modules])
            self._backend.load_adapter(LoadAdapter(EPOCH, 0, f"a{i}", digest(path), str(path)))
        self._steps = 0
        blocks = -(-(CONTEXT + steps) // BLOCK)
        for first in (1, 1 + ROWS):
            admits, rows = [], []
            for i in range(ROWS):
                slot, tokens = first + i, [(7 * i + 3 * j) % 1000 + 100 for j in range(CONTEXT)]
                name = f"a{i % ADAPTERS}" if first > 1 else ""
                ids = list(range(1 + (slot - 1) * blocks, 1 + slot * blocks))
                admits.append(Admit(slot, tokens, CONTEXT, [ids], Sampling(steps, temperature=0.0), name))
                rows.append(Row(slot, 0, CONTEXT, sample=True))
            self._step(admits, rows)

    def turn(self, first: int, steps: int) -> list[float]:
        """Seconds of the steps that count."""
        rows = [Row(first + i, -1, 1, sample=True) for i in range(ROWS)]
        return [self._step([], rows) for _ in range(steps)][WARM:]

    def close(self) -> None:
        self._backend.close()

    def _step(self, admit: list[Admit], rows: list[Row]) -> float:
        self._steps += 1
        began = time.process_time()
        self._backend.forward(StepPlan(EPOCH, self._steps, [], admit, [], rows))
        self._backend.sample(None)
        return time.process_time() - began


def measure(model: Path, mode: str, modules: str, turns: int, steps: int) -> Figures:
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(model, mode, modules, Path(home), turns * steps + 1)
        plain: list[float] = []
        adapted: list[float] = []
        for turn in range(turns):
            for which in (plain, adapted) if turn % 2 else (adapted, plain):
                which += bench.turn(1 if which is plain else 1 + ROWS, steps)
        bench.close()
    return Figures(mode, modules, 1000 * median(plain), 1000 * median(adapted))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.adapters")
    parser.add_argument("--model", type=Path, help="default: the real model, from the store")
    parser.add_argument("--modes", nargs="+", default=["bf16", "int8", "int4"], choices=("bf16", "int8", "int4"))
    parser.add_argument("--turns", type=int, default=20)
    parser.add_argument("--steps", type=int, default=20, help="of a turn")
    parser.add_argument("--out", type=Path, help="JSON")
    args = parser.parse_args()
    model = args.model or store.pull(store.DEFAULT)
    figures = [measure(model, mode, which, args.turns, args.steps) for mode in args.modes for which in MODULES]
    for each in figures:
        print(
            f"{each.weights:5} {each.modules:10} {each.plain_ms:6.2f} ms → {each.adapted_ms:6.2f} ms  {each.cost:+.1%}"
        )
    if args.out:
        setting = {"rows": ROWS, "context": CONTEXT, "adapters": ADAPTERS, "rank": RANK, "model": model.name}
        results = [asdict(each) | {"cost": each.cost} for each in figures]
        args.out.write_text(json.dumps({**machine.describe(), "setting": setting, "results": results}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())

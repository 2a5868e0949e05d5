"""Times whole steps of the CPU library in this process, with random weights at the shapes of SmolLM2-135M.

    python -m benchmarks.cpu_step [--modes bf16 int8 …] [--threads N] [--isa NAME] [--quick] [--rows 1 2 4 8]

Beside the milliseconds: where they went, and what this machine's memory and dot products give at the same moment.
"""

from __future__ import annotations

import argparse
import ctypes
import time
from collections.abc import Callable
from statistics import median

import numpy as np

from benchmarks.random_model import RandomModel, Shape
from kernels.cpu import build
from kernels.cpu.library import PARAMS, Batch, Library, Model, Samples, usable_threads

MODES = {"bf16": ("bf16", "bf16"), "int8": ("int8", "bf16"), "int8+kv": ("int8", "int8"), "int4": ("int4", "bf16")}
MODES |= {kind: (kind, "bf16") for kind in ("w4a16", "w8a16", "w8a8")}  # of quantized checkpoints
DECODES = [(1, 256), (16, 256), (32, 256), (16, 1024), (32, 1024)]
PROMPT, CHUNK, BLOCK = 1500, 256, 32


class Bench:
    def __init__(self, mode: str, threads: int, isa: str, sequences: int, longest: int) -> None:
        kind, kv = MODES[mode]
        self.library = Library(build.library(testing=True))
        self.blocks_each = -(-longest // BLOCK)
        model = RandomModel(self.library, Shape(), kind, kv, copies=True)
        self.spec = model.spec(1 + sequences * self.blocks_each, BLOCK)
        self.model: Model = self.library.open(self.spec, threads, isa)
        self.library.c.pw_test_fill_kv(ctypes.c_void_p(self.model.handle))
        rng = np.random.default_rng(2)
        shuffled = 1 + rng.permutation(sequences * self.blocks_each)
        self.tables = shuffled.reshape(sequences, self.blocks_each).astype(np.int64)
        self.token_ids = rng.integers(0, self.spec.vocab_size, 1 << 14).astype(np.int64)

    def batch(self, rows: list[tuple[int, int, int]]) -> Batch:
        """Rows of (sequence, start, count)."""
        counts = np.array([count for _, _, count in rows])
        cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        positions = np.concatenate([np.arange(start, start + count) for _, start, count in rows]).astype(np.int64)
        tables = np.ascontiguousarray(self.tables[[row[0] for row in rows]])
        owners = np.repeat(np.arange(len(rows)), counts)
        slots = tables[owners, positions // BLOCK] * BLOCK + positions % BLOCK
        return Batch(num_rows=len(rows), num_tokens=int(cu[-1]), table_stride=tables.shape[1]).point(
            cu=cu,
            context_lens=np.array([start + count for _, start, count in rows], np.int64),
            token_ids=self.token_ids[: cu[-1]].copy(),
            positions=positions,
            slot_mapping=slots,
            block_tables=tables,
        )

    def samples(self, tokens: list[int], temperature: float = 0.0) -> Samples:
        params = np.zeros(len(tokens), PARAMS)
        params["temperature"], params["top_p"], params["repetition"], params["logprobs"] = temperature, 1, 1, -1
        return Samples(num=len(tokens)).point(
            tokens=np.array(tokens, np.int64), params=params, token_ids=np.zeros(len(tokens), np.int64)
        )

    def decode(self, size: int, context: int, rows: int = 1) -> Callable[[], None]:
        """`rows`: of each sequence, all of them sampled from, as where drafts are verified."""
        batch = self.batch([(i, context - rows, rows) for i in range(size)])
        samples = self.samples(list(range(size * rows)))
        return lambda: self.model.step(batch, samples)

    def prefill(self) -> Callable[[], None]:
        starts = range(0, PROMPT, CHUNK)
        batches = [self.batch([(0, start, min(CHUNK, PROMPT - start))]) for start in starts]
        last = self.samples([(PROMPT - 1) % CHUNK])
        for batch in batches:
            batch.point(wanted=np.zeros(0, np.int64))
        batches[-1].point(wanted=np.array([(PROMPT - 1) % CHUNK], np.int64)).num_wanted = 1

        def run() -> None:
            for batch in batches[:-1]:
                self.model.forward(batch)
            self.model.step(batches[-1], last)

        return run

    def machine(self, threads: int) -> str:
        c = self.library.c
        c.pw_test_read_speed.restype = c.pw_test_peak.restype = ctypes.c_double
        c.pw_test_read_speed.argtypes = [ctypes.c_int, ctypes.c_int64]
        memory = max(c.pw_test_read_speed(threads, 1 << 29) for _ in range(3))
        isa = self.model.isa.encode()
        bf16, int8 = (max(c.pw_test_peak(isa, threads, name) for _ in range(3)) for name in (b"bf16", b"int8"))
        return f"memory {memory / 1e9:.1f} GB/s, peak bf16 {bf16 / 1e9:.0f} GFLOP/s, int8 {int8 / 1e9:.0f} GOP/s"


def timed(run: Callable[[], None], model: Model, seconds: float) -> tuple[list[float], dict[str, float]]:
    """Seconds of each of some runs, and of the phases of the last step of the quickest."""
    run()
    times: list[float] = []
    phases: dict[str, float] = {}
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        if times[-1] == min(times):
            phases = model.timings()
    return times, phases


def report(name: str, times: list[float], phases: dict[str, float]) -> None:
    total = sum(phases.values()) or 1.0
    shares = " ".join(f"{phase} {100 * spent / total:.1f}%" for phase, spent in phases.items())
    print(f"  {name:22} {1e3 * min(times):8.2f} / {1e3 * median(times):8.2f} ms   {shares}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cpu_step", description=__doc__.splitlines()[0])
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--threads", type=int, default=usable_threads())
    parser.add_argument("--isa", default="auto")
    parser.add_argument("--quick", action="store_true", help="batch 1 and 16 at context 256 alone")
    parser.add_argument("--rows", type=int, nargs="+", default=[1], help="… of each sequence: one and its drafts")
    parser.add_argument("--seconds", type=float, default=1.0, help="spent on each figure")
    arguments = parser.parse_args()
    decodes = DECODES[:2] if arguments.quick else DECODES
    for mode in arguments.modes:
        sequences, longest = max(size for size, _ in decodes), max(PROMPT, *(context for _, context in decodes))
        bench = Bench(mode, arguments.threads, arguments.isa, sequences, longest)
        print(f"{mode}, {bench.model.isa}, {arguments.threads} threads; {bench.machine(arguments.threads)}")
        for size, context, rows in ((*decode, rows) for decode in decodes for rows in arguments.rows):
            times, phases = timed(bench.decode(size, context, rows), bench.model, arguments.seconds)
            report(f"batch {size}, context {context}" + f", {rows} rows" * (rows > 1), times, phases)
        if not arguments.quick:
            report(f"prefill {PROMPT} by {CHUNK}", *timed(bench.prefill(), bench.model, arguments.seconds))
        bench.model.close()


if __name__ == "__main__":
    main()

"""How the CPU step scales with batch, context and threads, and what a token of context costs in memory.

    python -m benchmarks.scaling [--modes bf16 int8 …] [--quick]

Steps run in this process (`benchmarks.cpu_step`): random weights at the shapes of SmolLM2-135M, KV in scattered blocks.
Memory is that of a service over gRPC while its KV blocks fill. Writes NAME.json, NAME.png and NAME.svg into --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks import contestants, machine
from benchmarks.cpu_step import MODES, Bench, timed
from benchmarks.plot import INK, bare
from benchmarks.process import running
from benchmarks.targets import service
from client import store
from kernels.cpu.library import usable_threads

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (128, 256, 512, 1024, 2048, 4096, 8192)
MANY = 16  # sequences, where the context grows
SHORT = 256  # tokens of context, where the batch grows
HELD = (1024, 1024, 2048, 4096, 7680)  # tokens of the requests that fill the KV blocks one after the other
NAMES = dict(zip(MODES, contestants.MODES, strict=True))  # of modes in process → served
COLOURS = dict(zip(MODES, ("#0b6e4f", "#2563a8", "#7a4bb0", "#c2702d"), strict=True))


@dataclass(frozen=True)
class Step:
    """One decode step."""

    mode: str
    threads: int
    batch: int
    context: int
    milliseconds: float  # median
    best_milliseconds: float


@dataclass(frozen=True)
class Held:
    """A service's memory with so many tokens in its KV blocks."""

    mode: str
    tokens: int
    mib: float


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--quick", action="store_true", help="every second batch and context")
    parser.add_argument("--seconds", type=float, default=0.4, help="spent on each step; default: %(default)s")
    parser.add_argument("--model", default=store.DEFAULT, help="for memory; a name or a path; default: %(default)s")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--name", default=time.strftime("%Y-%m-%d-%H%M%S-scaling"), help="default: date and time")
    arguments = parser.parse_args()
    every = 2 if arguments.quick else 1
    steps = [step for mode in arguments.modes for step in measure(mode, every, arguments.seconds)]
    model = str(store.resolve(arguments.model))
    memory = [held for mode in arguments.modes for held in asyncio.run(fill(mode, model))]
    stem = arguments.out / arguments.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **machine.describe(),
        "command": ["python", "-m", "benchmarks.scaling", *sys.argv[1:]],
        "steps": [asdict(step) for step in steps],
        "memory": [asdict(held) for held in memory],
    }
    Path(f"{stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    draw(stem, steps, memory)
    print(f"{stem}.json, .png and .svg")


def measure(mode: str, every: int, seconds: float) -> Iterator[Step]:
    """Batches at a short context, contexts alone and in company, with one thread and with all."""
    batches, contexts = BATCHES[::every], CONTEXTS[::every]
    wide = [(batch, SHORT) for batch in batches]
    long = [(batch, context) for batch in (1, MANY) for context in contexts]
    for threads in sorted({1, usable_threads()}):
        for points in (wide, long):
            sizes, lengths = zip(*points, strict=True)
            bench = Bench(mode, threads, "auto", max(sizes), max(lengths))
            for batch, context in points:
                times, _ = timed(bench.decode(batch, context), bench.model, seconds)
                step = Step(mode, threads, batch, context, 1e3 * median(times), 1e3 * min(times))
                print(f"{mode}, {threads} threads, {batch} × {context}: {step.milliseconds:.2f} ms", file=sys.stderr)
                yield step
            bench.model.close()


async def fill(mode: str, model: str) -> list[Held]:
    """A fresh service, and its memory behind each of some requests that share nothing."""
    contestant = contestants.ours(NAMES[mode], model)
    held, tokens = [], 0
    async with running(contestant, patience=300) as started, service(f"127.0.0.1:{started.port}") as target:
        async for _ in target.stream([1, 2, 3, 4], 1):
            pass
        held.append(Held(mode, 0, started.memory()))
        for number, length in enumerate(HELD):
            async for _ in target.stream([100 + number] + [200 + i % 1000 for i in range(length - 2)], 1):
                pass
            tokens += length
            held.append(Held(mode, tokens, started.memory()))
            print(f"{mode}: {tokens} tokens held, {held[-1].mib:.0f} MiB", file=sys.stderr)
    return held


def draw(stem: Path, steps: Sequence[Step], memory: Sequence[Held]) -> None:
    """Writes STEM.png and STEM.svg."""
    figure = Figure(figsize=(15, 8.4), layout="constrained")
    (per_step, rate, threads), (context, cost, footprint) = figure.subplots(2, 3)
    most = max(step.threads for step in steps)
    for mode in dict.fromkeys(step.mode for step in steps):
        mine = [step for step in steps if step.mode == mode]
        wide = [step for step in mine if step.context == SHORT and step.threads == most]
        wide = sorted({step.batch: step for step in wide}.values(), key=lambda step: step.batch)
        batches = [step.batch for step in wide]
        _line(per_step, mode, batches, [step.milliseconds for step in wide])
        _line(rate, mode, batches, [1e3 * step.batch / step.milliseconds for step in wide])
        _line(threads, mode, batches, [_other(mine, step) / step.milliseconds for step in wide])
        for size, style in ((1, "-"), (MANY, "--")):
            long = sorted(
                {step.context: step for step in mine if step.batch == size and step.threads == most}.values(),
                key=lambda step: step.context,
            )
            contexts = [step.context for step in long]
            _line(context, f"{mode}, batch {size}", contexts, [step.milliseconds for step in long], style)
            _line(cost, f"{mode}, batch {size}", contexts, [step.milliseconds / size for step in long], style)
        held = [each for each in memory if each.mode == mode]
        _line(footprint, mode, [each.tokens for each in held], [each.mib for each in held])
    _axes(per_step, f"ms a step, context {SHORT}", "batch", log=True)
    _axes(rate, f"tokens/s, context {SHORT}", "batch", log=True)
    _axes(threads, f"{most} threads, times as fast as one, context {SHORT}", "batch", log=False)
    threads.set_xscale("log", base=2)
    threads.xaxis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    _axes(context, "ms a step", "tokens of context", log=True)
    _axes(cost, "ms a token: a straight line in the context", "tokens of context", log=False)
    _axes(footprint, "memory of the service, MiB", "tokens in its KV blocks", log=False)
    for suffix in ("png", "svg"):
        figure.savefig(f"{stem}.{suffix}", dpi=130)


def _other(steps: Sequence[Step], step: Step) -> float:
    """The same step's milliseconds on one thread."""
    return next(
        other.milliseconds for other in steps if (other.threads, other.batch, other.context) == (1, step.batch, SHORT)
    )


def _line(axes: Axes, label: str, x: Sequence[float], y: Sequence[float], style: str = "-") -> None:
    colour = COLOURS[label.partition(",")[0]]
    axes.plot(x, y, style, marker="o", markersize=3.5, linewidth=1.6, color=colour, label=label)
    axes.annotate(f"{y[-1]:,.4g}", (x[-1], y[-1]), (4, 0), textcoords="offset points", fontsize=7.5, va="center")


def _axes(axes: Axes, title: str, what: str, log: bool) -> None:
    bare(axes)
    axes.tick_params(axis="y", labelsize=7.5, colors=INK)
    axes.grid(axis="y", color="#e6e8ec", linewidth=0.6)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(StrMethodFormatter("{x:,.10g}"))
    axes.set_title(title, fontsize=10, color=INK)
    axes.set_xlabel(what, fontsize=9, color=INK)
    axes.legend(fontsize=7.5, frameon=False)
    axes.margins(x=0.12)


if __name__ == "__main__":
    main()

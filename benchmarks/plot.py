"""Bars of a run: throughput, time to first token and inter-token latency, by workload and contestant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, StrMethodFormatter

from client.load import WORKLOADS, Percentiles, Result

Labelled = tuple[str, Result]  # who, what
PREFILL = {"d", "e"}  # workloads that are about the prompt: their throughput counts it


def draw(stem: Path, results: Sequence[Labelled]) -> None:
    """Writes STEM.png and STEM.svg, of medians over the rounds."""
    figure = Figure(figsize=(13, 4.4), layout="constrained")
    throughput, ttft, itl = figure.subplots(1, 3)
    _bars(throughput, results, _throughput)
    throughput.set_title("tokens per second\n(a–c output, d–e prompt and output)", fontsize=10)
    _spreads(ttft, results, lambda result: result.ttft_ms)
    ttft.set_title("time to first token, ms\n(p50 ● to p99 –)", fontsize=10)
    _spreads(itl, results, lambda result: result.itl_ms)
    itl.set_title("between messages, ms\n(p50 ● to p99 –)", fontsize=10)
    handles, labels = throughput.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(f"{stem}.{suffix}", dpi=150)


def _throughput(result: Result) -> float:
    return result.total_tokens_per_second if result.workload in PREFILL else result.output_tokens_per_second


def _bars(axes: Axes, results: Sequence[Labelled], value: Callable[[Result], float]) -> None:
    for series in _grouped(axes, results):
        heights = [median(map(value, rounds)) for rounds in series.rounds]
        bars = axes.bar(series.positions, heights, series.width * 0.92, color=series.colour, label=series.name)
        axes.bar_label(bars, [_short(height) for height in heights], fontsize=8, padding=2)
    axes.margins(y=0.12)


def _spreads(axes: Axes, results: Sequence[Labelled], value: Callable[[Result], Percentiles]) -> None:
    axes.set_yscale("log")  # before the labels, or its minor ticks come back
    for series in _grouped(axes, results):
        p50 = [median(value(result).p50 for result in rounds) for rounds in series.rounds]
        p99 = [median(value(result).p99 for result in rounds) for rounds in series.rounds]
        axes.vlines(series.positions, p50, p99, color=series.colour, linewidth=1.5)
        axes.scatter(series.positions, p50, color=series.colour, s=22)
        axes.scatter(series.positions, p99, color=series.colour, s=60, marker="_")
        for x, low, high in zip(series.positions, p50, p99, strict=True):
            axes.annotate(_short(low), (x, low), (0, -11), textcoords="offset points", fontsize=7, ha="center")
            axes.annotate(_short(high), (x, high), (0, 4), textcoords="offset points", fontsize=7, ha="center")
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.margins(y=0.15)


@dataclass(frozen=True)
class _Series:
    """One contestant: where its marks stand, and all rounds of each workload."""

    name: str
    colour: str
    width: float
    positions: list[float]
    rounds: list[list[Result]]


def _grouped(axes: Axes, results: Sequence[Labelled]) -> Iterator[_Series]:
    """One group a workload, in it one place a contestant; labels the groups."""
    names = list(dict.fromkeys(name for name, _ in results))
    workloads = [name for name in WORKLOADS if any(result.workload == name for _, result in results)]
    axes.set_xticks(
        range(len(workloads)),
        [f"{name}\n" + WORKLOADS[name].title.replace(" ", "\n") for name in workloads],
        fontsize=8,
    )
    axes.spines[["top", "right"]].set_visible(False)
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        positions = [group + (place + 0.5) * width - 0.4 for group in range(len(workloads))]
        rounds = [[r for who, r in results if (who, r.workload) == (name, workload)] for workload in workloads]
        yield _Series(name, f"C{place}", width, positions, rounds)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"

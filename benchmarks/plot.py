"""Bars of a run: throughput, time to first token and inter-token latency, by workload and contestant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from client.load import WORKLOADS, Result

Labelled = tuple[str, Result]  # who, what
PREFILL = {"d", "e"}  # workloads that are about the prompt: their throughput counts it


def draw(stem: Path, results: Sequence[Labelled]) -> None:
    """Writes STEM.png and STEM.svg: medians over the rounds; latencies as p50 in full colour up to p99 in pale."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    throughput, ttft, itl = figure.subplots(1, 3)
    _bars(throughput, results, "tokens per second\n(a–c output, d–e prompt and output)", _throughput)
    _bars(ttft, results, "time to first token, ms\n(p50, pale: p99)", lambda r: r.ttft_ms.p50, lambda r: r.ttft_ms.p99)
    _bars(itl, results, "between messages, ms\n(p50, pale: p99)", lambda r: r.itl_ms.p50, lambda r: r.itl_ms.p99)
    handles, labels = throughput.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    for suffix in ("png", "svg"):
        figure.savefig(f"{stem}.{suffix}", dpi=150)


def _throughput(result: Result) -> float:
    return result.total_tokens_per_second if result.workload in PREFILL else result.output_tokens_per_second


def _bars(
    axes: Axes,
    results: Sequence[Labelled],
    title: str,
    value: Callable[[Result], float],
    tail: Callable[[Result], float] | None = None,
) -> None:
    """One group a workload, one bar a contestant; `tail` is a pale bar behind it."""
    names = list(dict.fromkeys(name for name, _ in results))
    workloads = [name for name in WORKLOADS if any(result.workload == name for _, result in results)]
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        mine = [[r for who, r in results if who == name and r.workload == workload] for workload in workloads]
        positions = [group + (place + 0.5) * width - 0.4 for group in range(len(workloads))]
        heights = [median(map(value, rounds)) for rounds in mine]
        if tail:
            axes.bar(
                positions, [median(map(tail, rounds)) for rounds in mine], width * 0.92, color=f"C{place}", alpha=0.3
            )
        bars = axes.bar(positions, heights, width * 0.92, color=f"C{place}", label=name)
        axes.bar_label(bars, fmt="{:,.0f}" if max(heights) >= 10 else "{:.1f}", fontsize=8, padding=2)
    axes.set_xticks(range(len(workloads)), [f"{name}\n{WORKLOADS[name].title}" for name in workloads], fontsize=8)
    axes.set_title(title, fontsize=10)
    if tail:
        axes.set_yscale("log")
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)

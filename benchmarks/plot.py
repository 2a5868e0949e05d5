"""A run as a picture: throughput, time to first token and gaps between messages, a panel for each workload."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

from benchmarks import compare
from benchmarks.contestants import MODES
from benchmarks.measure import Run
from client.load import WORKLOADS, Percentiles, Result

OURS = ("#0b6e4f", "#1f9d6b", "#53c08d", "#8ad9b4")
CHECKPOINTS = "#3f7fbf"
THEIRS = "#b3b8c2"
INK = "#333a45"


def draw(stem: Path, runs: Sequence[Run]) -> None:
    """Writes STEM.png and STEM.svg, of medians over the rounds."""
    names, workloads = compare.names(runs), compare.workloads(runs)
    height = 1.6 + 3 * (0.5 + 0.22 * len(names))
    figure = Figure(figsize=(3.2 + 2.5 * len(workloads), height), layout="constrained")
    panels = figure.subplots(3, len(workloads), squeeze=False, sharey=True)
    for column, workload in enumerate(workloads):
        _rates(panels[0][column], runs, names, workload)
        _spread(panels[1][column], runs, names, workload, lambda result: result.ttft_ms)
        _spread(panels[2][column], runs, names, workload, lambda result: result.itl_ms)
        if workload in compare.ITL_MS and MODES.keys() & set(names):
            panels[2][column].axvline(compare.ITL_MS[workload], color="#c2452d", linewidth=1, linestyle=":")
        about = "prompt and output" if workload in compare.PREFILL else "output"
        title = f"{workload}  {WORKLOADS[workload].title}\n{about} tokens/s"
        panels[0][column].set_title(title, fontsize=10, color=INK)
    marks = "\n● p50  | p99"
    for row, label in enumerate(("throughput", f"to first token, ms{marks}", f"between messages, ms{marks}")):
        panels[row][0].set_ylabel(label, fontsize=10, color=INK)
        panels[row][0].set_yticks(range(len(names)), names, fontsize=8)
        panels[row][0].set_ylim(len(names) - 0.4, -0.6)
    blue = "blue: Pagewire with other checkpoints;\n" if compare.checkpoints(runs) else ""  # a line more
    about = f"green: Pagewire's modes; {blue}red: the targets, from the peers' figures in this run"
    figure.suptitle(about, fontsize=9)
    for suffix in ("png", "svg"):
        figure.savefig(f"{stem}.{suffix}", dpi=130)


def _rates(axes: Axes, runs: Sequence[Run], names: Sequence[str], workload: str) -> None:
    bare(axes)
    targets = {each.mode: each.aim for each in compare.ratios(runs) if each.workload == workload and each.aim}
    for place, name in enumerate(names):
        rate = compare.over_rounds(runs, name, workload, compare.throughput)
        if rate is None:
            continue
        axes.barh(place, rate, 0.78, color=_colour(name, runs))
        axes.annotate(f"{rate:,.0f}", (rate, place), (3, 0), textcoords="offset points", fontsize=7.5, va="center")
        if name in targets:
            axes.vlines(targets[name], place - 0.39, place + 0.39, color="#c2452d", linewidth=1.6)
    axes.set_xlim(0, 1.18 * axes.get_xlim()[1])
    axes.xaxis.set_major_locator(MaxNLocator(4))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _spread(
    axes: Axes, runs: Sequence[Run], names: Sequence[str], workload: str, value: Callable[[Result], Percentiles]
) -> None:
    bare(axes)
    axes.set_xscale("log")
    for place, name in enumerate(names):
        low = compare.over_rounds(runs, name, workload, lambda result: value(result).p50)
        high = compare.over_rounds(runs, name, workload, lambda result: value(result).p99)
        if low is None or high is None:
            continue
        colour = _colour(name, runs)
        axes.hlines(place, low, high, color=colour, linewidth=2)
        axes.plot(low, place, "o", color=colour, markersize=4.5)
        axes.plot(high, place, "|", color=colour, markersize=8, markeredgewidth=2)
        axes.annotate(
            f"{_short(low)}–{_short(high)}", (high, place), (5, 0), textcoords="offset points", fontsize=7, va="center"
        )
    low, high = axes.get_xlim()
    axes.set_xlim(low, high * (high / low) ** 0.35)  # room for the figures
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def bare(axes: Axes) -> None:
    """No frame, faint lines."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=7.5, colors=INK)
    axes.grid(axis="x", color="#e6e8ec", linewidth=0.6)
    axes.set_axisbelow(True)


def _colour(name: str, runs: Sequence[Run]) -> str:
    if name in MODES:
        return OURS[list(MODES).index(name)]
    return CHECKPOINTS if name in compare.checkpoints(runs) else THEIRS


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"

"""Ours beside the peers of the same run: medians over the rounds, and how they stand to what we aim for.

Ours are our modes, which have targets, and then checkpoints, which have none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

from benchmarks.contestants import MODES
from benchmarks.measure import Run
from client import load

BEST = "best peer"  # of the workload, at any precision
PLAIN = "bf16"  # of ours, whose weights are not quantized
PREFILL = {"d", "e"}  # workloads that are about the prompt: their throughput counts it
START_SECONDS = 3.0  # a target for every mode
ITL_MS = {"c": 250.0, "d": 250.0}  # p99 under prefill, a target for every mode

# mode → workload → at least so many times whom
TARGETS: dict[str, dict[str, tuple[float, str]]] = {
    "bf16": {"a": (1.4, "llama-bf16"), "b": (1.45, BEST), "c": (1.3, BEST), "d": (1.15, BEST), "e": (1.3, BEST)},
    "int8": {"a": (1.8, "llama-q8_0"), "b": (2.1, BEST), "c": (1.9, BEST), "d": (1.7, BEST), "e": (1.7, BEST)},
    "int8+kv8": {"b": (2.3, BEST), "c": (2.0, BEST), "d": (1.9, BEST), "e": (2.0, BEST)},
    "int4": {"a": (2.4, "llama-q4_0")},
}


@dataclass(frozen=True)
class Ratio:
    """One of ours at one workload: tokens per second, ours over theirs."""

    mode: str  # or a checkpoint's name
    workload: str
    ours: float
    whom: str  # the peer of the target, or the best one where there is no target
    theirs: float | None  # None: not measured
    target: float | None

    @property
    def ratio(self) -> float | None:
        return self.ours / self.theirs if self.theirs else None

    @property
    def aim(self) -> float | None:
        """Tokens per second."""
        return None if self.target is None or self.theirs is None else self.target * self.theirs

    @property
    def met(self) -> bool | None:
        return None if self.target is None or self.ratio is None else self.ratio >= self.target


def throughput(result: load.Result) -> float:
    """Tokens per second: output for a to c, prompt and output for d and e."""
    return result.total_tokens_per_second if result.workload in PREFILL else result.output_tokens_per_second


def over_rounds(runs: Sequence[Run], who: str, workload: str, value: Callable[[load.Result], float]) -> float | None:
    """The median; None where it was not measured."""
    found = [run.result(workload) for run in runs if run.contestant == who]
    values = [value(result) for result in found if result is not None]
    return median(values) if values else None


def names(runs: Sequence[Run]) -> list[str]:
    """Ours in their usual order, then the peers in theirs."""
    mine = ours(runs)
    return [*mine, *sorted({run.contestant for run in runs}.difference(mine))]


def ours(runs: Sequence[Run]) -> list[str]:
    """Our modes in their usual order, then our checkpoints by name."""
    seen = {run.contestant for run in runs}
    return [*(mode for mode in MODES if mode in seen), *checkpoints(runs)]


def checkpoints(runs: Sequence[Run]) -> list[str]:
    return sorted({run.contestant for run in runs if run.checkpoint})


def workloads(runs: Sequence[Run]) -> list[str]:
    return [name for name in load.WORKLOADS if any(run.result(name) for run in runs)]


def ratios(runs: Sequence[Run]) -> list[Ratio]:
    present, mine = names(runs), ours(runs)
    found = []
    for workload in workloads(runs):
        rates = {who: over_rounds(runs, who, workload, throughput) for who in present}
        peers = {who: rate for who, rate in rates.items() if who not in mine and rate is not None}
        best = max(peers, key=lambda who: peers[who], default=BEST)
        for mode in mine:
            if (rate := rates[mode]) is None:
                continue
            target, whom = TARGETS.get(mode, {}).get(workload, (None, BEST))
            whom = best if whom == BEST else whom
            found.append(Ratio(mode, workload, rate, whom, peers.get(whom), target))
            if whom != best:
                found.append(Ratio(mode, workload, rate, best, peers.get(best), None))
    return found


def markdown(runs: Sequence[Run], absent: Sequence[str]) -> str:
    """The whole comparison, for a person to read."""
    parts = [_rates(runs), _comparison(runs), _gains(runs), _latencies(runs), _footprints(runs)]
    for run in runs:
        if run.failure is not None:
            parts.append(f"{run.contestant} failed in round {run.round + 1}: {run.failure}")
    if absent:
        parts.append(f"Not installed, so not measured: {', '.join(absent)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _rates(runs: Sequence[Run]) -> str:
    columns, mine = workloads(runs), ours(runs)
    rows = []
    for who in names(runs):
        rates = [over_rounds(runs, who, workload, throughput) for workload in columns]
        rows.append([_marked(who, mine), *(_number(rate) for rate in rates)])
    about = "Tokens per second (a–c output, d–e prompt and output), medians over the rounds"
    return f"{about}:\n\n{_table(['', *(_title(name) for name in columns)], rows)}"


def _comparison(runs: Sequence[Run]) -> str:
    mine = ours(runs)
    rows = [
        [each.workload, each.mode, f"{each.ours:,.0f}", each.whom, *_judged(each)]
        for each in sorted(ratios(runs), key=lambda each: (mine.index(each.mode), each.workload))
    ]
    if not rows:
        return ""
    return f"Ours over theirs:\n\n{_table(['load', 'ours', 'tok/s', 'beside', 'tok/s', 'ratio', 'target', ''], rows)}"


def _gains(runs: Sequence[Run]) -> str:
    """What quantized weights bring: only where there are checkpoints, and bf16 beside them."""
    if not checkpoints(runs) or PLAIN not in ours(runs):
        return ""
    columns = workloads(runs)
    plain = [over_rounds(runs, PLAIN, workload, throughput) for workload in columns]
    rows = []
    for who in ours(runs):
        rates = [over_rounds(runs, who, workload, throughput) for workload in columns]
        pairs = zip(rates, plain, strict=True)
        rows.append([f"**{who}**", *("–" if rate is None or not base else _times(rate / base) for rate, base in pairs)])
    return f"Ours over our {PLAIN}, tokens per second:\n\n{_table(['', *columns], rows)}"


def _latencies(runs: Sequence[Run]) -> str:
    columns, mine = workloads(runs), ours(runs)
    rows = []
    for who in names(runs):
        cells = []
        for workload in columns:
            first = over_rounds(runs, who, workload, lambda result: result.ttft_ms.p50)
            between = over_rounds(runs, who, workload, lambda result: result.itl_ms.p99)
            missed = between is not None and who in MODES and between > ITL_MS.get(workload, between)
            cells.append(f"{_number(first)} / {_number(between)}{' **missed**' if missed else ''}")
        rows.append([_marked(who, mine), *cells])
    limits = " and ".join(f"{limit:.0f} ms in {workload}" for workload, limit in ITL_MS.items())
    about = f"Time to first token p50 / between messages p99, ms (target for p99, our modes: {limits})"
    return f"{about}:\n\n{_table(['', *columns], rows)}"


def _footprints(runs: Sequence[Run]) -> str:
    own = ours(runs)
    rows = []
    for who in names(runs):
        mine = [run for run in runs if run.contestant == who]
        figures = [
            _median([run.first_token_seconds for run in mine]),
            _median([run.started_mib for run in mine]),
            _median([run.loaded_mib for run in mine]),
            _median([run.idle_cores for run in mine]),
        ]
        late = figures[0] is not None and who in MODES and figures[0] > START_SECONDS
        share = _median([100 * each.client_share for run in mine for each in run.measured])
        texts = [_number(figure, digits) for figure, digits in zip(figures, (2, 0, 0, 3), strict=True)]
        texts[0] += " **missed**" if late else ""
        rows.append([_marked(who, own), *texts, f"{_number(share, 1)} %"])
    head = ["", "start to first token, s", "memory then, MiB", "after load, MiB", "idle, cores", "load client's CPU"]
    about = f"Start (target: {START_SECONDS:g} s), memory of the process tree (PSS), idle CPU, the load client's share"
    return f"{about}:\n\n{_table(head, rows)}"


def _judged(each: Ratio) -> list[str]:
    verdict = "" if each.met is None else "met" if each.met else "**missed**"
    return [_number(each.theirs), _times(each.ratio), _times(each.target, "≥ "), verdict]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _title(workload: str) -> str:
    return f"{workload} {load.WORKLOADS[workload].title}"


def _marked(who: str, mine: Sequence[str]) -> str:
    return f"**{who}**" if who in mine else who


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known else None


def _number(value: float | None, digits: int = 0) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def _times(value: float | None, before: str = "") -> str:
    return "" if value is None else f"{before}{value:.2f}×"

"""`pagewire bench`: a workload against a running service, with its figures and how they spread."""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from client import load
from client.aio import Client
from client.commands import flags


def _parser(prog: str) -> argparse.ArgumentParser:
    names = ", ".join(f"{w.name} {w.title}" for w in load.WORKLOADS.values())
    parser = argparse.ArgumentParser(prog=prog, description="Sends a workload to a running service and measures it.")
    parser.add_argument("--workload", choices=load.WORKLOADS, default="a", help=f"{names}; default: %(default)s")
    flags.add_address(parser)
    parser.add_argument(
        "--seed", type=flags.unsigned(64), default=None, metavar="N", help="of the prompts; default: new"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there as well")
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    workload = load.WORKLOADS[arguments.workload]
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    if arguments.json:
        arguments.json.touch()  # a path that cannot be written fails now, not after the load
    result, samples = asyncio.run(_measure(arguments, workload, seed))
    console = Console()
    console.print(_table(result))
    console.print(_plot("first token, ms", [1000 * sample.ttft for sample in samples]))
    console.print(_plot("between messages, ms", [1000 * gap for sample in samples for gap in sample.gaps()]))
    if arguments.json:
        arguments.json.write_text(json.dumps({"seed": seed, **asdict(result)}, indent=2) + "\n")
    return 0


async def _measure(
    arguments: argparse.Namespace, workload: load.Workload, seed: int
) -> tuple[load.Result, list[load.Sample]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn())
    async with Client(arguments.address, **flags.access(arguments)) as client:
        prompts = await load.prompts(client, workload, seed)
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task(f"{workload.name} {workload.title}", total=workload.requests * workload.output_tokens)
            return await load.run(load.Service(client), workload, prompts, lambda tokens: bars.advance(task, tokens))


def _table(result: load.Result) -> Table:
    table = Table(
        "", "p50", "p99", title=f"workload {result.workload}: {result.requests} requests, {result.concurrency} at once"
    )
    for name, spread in (("first token, ms", result.ttft_ms), ("between messages, ms", result.itl_ms)):
        table.add_row(name, f"{spread.p50:.1f}", f"{spread.p99:.1f}")
    table.add_section()
    table.add_row("output tok/s", f"{result.output_tokens_per_second:.1f}", "")
    table.add_row("total tok/s", f"{result.total_tokens_per_second:.1f}", "")
    table.add_row("seconds", f"{result.seconds:.1f}", "")
    return table


def _plot(title: str, values: list[float], rows: int = 10, width: int = 40) -> str:
    """A histogram in text, of equal ranges from the least to the greatest value."""
    if not values:
        return ""
    least, most = min(values), max(values)
    step = (most - least) / rows or 1.0
    counts = [0] * rows
    for value in values:
        counts[min(rows - 1, int((value - least) / step))] += 1
    lines = [title]
    for row, count in enumerate(counts):
        bar = "█" * -(-count * width // max(counts))
        lines.append(f"{least + row * step:9.1f} {bar} {count or ''}".rstrip())
    return "\n".join(lines)

"""Workloads a to e over gRPC, ours alone or beside peers in the same run.

    python benchmarks/run.py --workloads abc --rounds 3 --flags "--dtype bfloat16"
    python benchmarks/run.py --peer 'llama-server bf16=llama-server -m model.gguf --port {port} -np 32 -c 65536'

Each round starts each contestant afresh, in turns, and sends it the round's prompts: real English, new in every round,
the same token ids for everybody. Writes NAME.json, NAME.png and NAME.svg into --out.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks import machine, plot
from benchmarks.contestants import Contestant, OpenAIPeer, Pagewire
from benchmarks.process import StartError, running
from client import load, store
from client.aio import Client
from client.errors import ServiceError

PromptBook = dict[tuple[int, str], list[list[int]]]  # by round and workload


@dataclass(frozen=True)
class Run:
    """One contestant's figures of one round; the start figures are None for a service that we did not start."""

    contestant: str
    round: int
    ready_seconds: float | None  # from launch to SERVING, or /health
    first_token_seconds: float | None  # from launch to the first token of one short request
    results: list[load.Result]


def main() -> int:
    arguments = _parser().parse_args()
    workloads = [load.WORKLOADS[name] for name in arguments.workloads]
    seed = time.time_ns() if arguments.seed is None else arguments.seed
    try:
        ours = Pagewire(str(store.resolve(arguments.model)), tuple(arguments.flags.split()))
        if arguments.address:
            runs = asyncio.run(_measure_running(arguments.address, workloads, seed))
        else:
            contestants: list[Contestant] = [ours, *(OpenAIPeer(*peer) for peer in arguments.peer)]
            runs = asyncio.run(_measure(contestants, workloads, arguments.rounds, seed, arguments.patience))
    except (StartError, ServiceError, load.ShortStreamError, store.StoreError, aiohttp.ClientError) as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 1
    Console(width=max(Console().width, 120)).print(_table(runs))
    stem = arguments.out / (arguments.name or time.strftime("%Y-%m-%d-%H%M%S"))
    _write(stem, runs, seed)
    print(f"{stem}.json, .png and .svg")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=_workloads, default="abcde", metavar="abcde", help="which; default: all")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), default=1, metavar="N", help="default: 1")
    parser.add_argument("--model", default=store.DEFAULT, help="a name or a path; default: %(default)s")
    parser.add_argument("--flags", default="", help="for `pagewire serve`")
    service = parser.add_mutually_exclusive_group()
    service.add_argument("--address", metavar="HOST:PORT", help="measure a service that runs already, for one round")
    service.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=COMMAND", help="beside us")
    parser.add_argument("--patience", type=float, default=300, metavar="S", help="for a start; default: %(default)s")
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the prompts; default: new")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--name", default="", help="of the files; default: date and time")
    return parser


def _workloads(text: str) -> str:
    if not text or not set(text) <= set(load.WORKLOADS):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of {''.join(load.WORKLOADS)}")
    return text


def _peer(text: str) -> tuple[str, str]:
    name, separator, command = text.partition("=")
    if not separator or not name or "{port}" not in command:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND with {{port}} in the command")
    return name, command


async def _measure(
    contestants: Sequence[Contestant], workloads: Sequence[load.Workload], rounds: int, seed: int, patience: float
) -> list[Run]:
    async with running(contestants[0], patience) as started, Client(f"127.0.0.1:{started.port}") as client:
        book = {
            (number, workload.name): await load.prompts(client, workload, _seed(seed, number, workload))
            for number in range(rounds)
            for workload in workloads
        }
    runs = []
    with _progress() as bars:
        for number in range(rounds):
            turn = number % len(contestants)  # nobody is always first on a machine that warms up
            for contestant in (*contestants[turn:], *contestants[:turn]):
                runs.append(await _one_run(contestant, workloads, book, number, patience, bars))
    return runs


async def _one_run(
    contestant: Contestant,
    workloads: Sequence[load.Workload],
    book: PromptBook,
    number: int,
    patience: float,
    bars: Progress,
) -> Run:
    async with running(contestant, patience) as started, contestant.target(started.port) as target:
        async for _ in target.stream([1, 2, 3, 4], 1):
            pass
        first_token = time.perf_counter() - started.launched
        results = [
            await _workload(
                target, workload, book[number, workload.name], f"round {number + 1} {contestant.name}", bars
            )
            for workload in workloads
        ]
    return Run(contestant.name, number, started.ready_seconds, first_token, results)


async def _measure_running(address: str, workloads: Sequence[load.Workload], seed: int) -> list[Run]:
    async with Client(address) as client:
        results = []
        with _progress() as bars:
            for workload in workloads:
                prompts = await load.prompts(client, workload, _seed(seed, 0, workload))
                results.append(await _workload(load.Service(client), workload, prompts, address, bars))
    return [Run(f"pagewire at {address}", 0, None, None, results)]


async def _workload(
    target: load.Target, workload: load.Workload, prompts: list[list[int]], who: str, bars: Progress
) -> load.Result:
    task = bars.add_task(f"{who}: {workload.name} {workload.title}", total=workload.requests * workload.output_tokens)
    result, _ = await load.run(target, workload, prompts, lambda tokens: bars.advance(task, tokens))
    return result


def _seed(seed: int, number: int, workload: load.Workload) -> int:
    return seed + 1000 * number + ord(workload.name)


def _progress() -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f} tokens"),
        TimeElapsedColumn(),
    )
    return Progress(*columns, console=Console(stderr=True))


def _table(runs: Sequence[Run]) -> Table:
    table = Table(
        "who", "round", "ready s", "load", "output tok/s", "total tok/s", "TTFT p50 / p99", "ITL p50 / p99, ms"
    )
    for column in table.columns:
        column.no_wrap = True
    for run in runs:
        for result in run.results:
            table.add_row(
                run.contestant,
                str(run.round + 1),
                "" if run.ready_seconds is None else f"{run.ready_seconds:.2f}",
                result.workload,
                f"{result.output_tokens_per_second:.1f}",
                f"{result.total_tokens_per_second:.1f}",
                f"{result.ttft_ms.p50:.0f} / {result.ttft_ms.p99:.0f}",
                f"{result.itl_ms.p50:.1f} / {result.itl_ms.p99:.1f}",
            )
    return table


def _write(stem: Path, runs: Sequence[Run], seed: int) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    record = {
        **machine.describe(),
        "command": ["benchmarks/run.py", *sys.argv[1:]],
        "seed": seed,
        "runs": [asdict(run) for run in runs],
    }
    Path(f"{stem}.json").write_text(json.dumps(record, indent=2) + "\n")
    plot.draw(stem, [(run.contestant, result) for run in runs for result in run.results])


if __name__ == "__main__":
    sys.exit(main())

"""Workloads a to e, and r where asked for, over gRPC: all our modes and all installed peers, in one run.

    python -m benchmarks.run                                  # everybody, three rounds
    python -m benchmarks.run --contestants bf16,llama-bf16 --workloads ab --rounds 1
    python -m benchmarks.run --contestants bf16 --ours gptq-w4=path/to/checkpoint --ours awq-w4=path/to/another
    python -m benchmarks.run --workloads rbc --rounds 5 --contestants bf16,bf16+ngram,bf16+suffix,llama-bf16
    python -m benchmarks.run --peer 'mine=my-server --port {port}'
    python -m benchmarks.run --report results/one.json results/two.json

Each round starts each contestant afresh, in turns, and sends it the round's prompts: real English, new in every round,
the same token ids for everybody. Writes NAME.json, NAME.md, NAME.png and NAME.svg into --out.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import uvloop

from benchmarks import contestants, record
from benchmarks.contestants import Contestant, UnknownContestantError
from benchmarks.measure import PromptBook, Run, one_run, one_workload, order
from benchmarks.peers import catalogue
from benchmarks.process import StartError, running
from benchmarks.targets import TargetError, service
from client import load, store
from client.aio import Client
from client.errors import ServiceError


def main() -> int:
    arguments = _parser().parse_args()
    stem = arguments.out / (arguments.name or time.strftime("%Y-%m-%d-%H%M%S"))
    try:
        if arguments.report:
            runs = [run for file in arguments.report for run in record.read(file)]
        else:
            runs = uvloop.run(_runs(arguments, stem))
    except (
        *(StartError, ServiceError, TargetError, UnknownContestantError),
        *(load.ShortStreamError, store.StoreError, record.RecordError, OSError),
    ) as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 1
    failures = [run for run in runs if run.failure is not None]
    if len(failures) == len(runs):
        return 1  # each has said why
    print(record.summary(stem, runs))
    print(f"{stem}.json, .md, .png and .svg")
    return 1 if failures else 0


async def _runs(arguments: argparse.Namespace, stem: Path) -> list[Run]:
    workloads = [load.WORKLOADS[name] for name in arguments.workloads]
    seed = time.time_ns() if arguments.seed is None else arguments.seed

    def keep(runs: Sequence[Run]) -> None:
        record.write(stem, runs, seed)

    if arguments.address:
        return await _measure_running(arguments.address, workloads, seed, keep)
    model = str(store.resolve(arguments.model))
    names = arguments.contestants or contestants.everybody()
    chosen = contestants.choose(names, model, arguments.flags.split())
    chosen += contestants.checkpoints(arguments.ours, arguments.flags.split())
    chosen += [contestants.openai(*peer) for peer in arguments.peer]
    book = await _prompts(contestants.ours("bf16", model), workloads, arguments.rounds, seed, arguments.patience)
    runs: list[Run] = []
    for number in range(arguments.rounds):
        for contestant in order(chosen, number):
            runs.append(await one_run(contestant, workloads, book, number, arguments.patience))
            keep(runs)  # as far as it came
    return runs


async def _prompts(
    tokenizing: Contestant, workloads: Sequence[load.Workload], rounds: int, seed: int, patience: float
) -> PromptBook:
    async with running(tokenizing, patience) as started, Client(f"127.0.0.1:{started.port}") as client:
        return {
            (number, workload.name): await load.prompts(client, workload, _seed(seed, number, workload))
            for number in range(rounds)
            for workload in workloads
        }


async def _measure_running(
    address: str, workloads: Sequence[load.Workload], seed: int, keep: Callable[[Sequence[Run]], None]
) -> list[Run]:
    async with Client(address) as client, service(address) as target:
        measured = []
        for workload in workloads:
            prompts = await load.prompts(client, workload, _seed(seed, 0, workload))
            measured.append(await one_workload(target, workload, prompts, address))
    runs = [Run(f"pagewire at {address}", 0, None, None, None, None, None, measured)]
    keep(runs)
    return runs


def _seed(seed: int, number: int, workload: load.Workload) -> int:
    return seed + 1000 * number + ord(workload.name)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", type=_workloads, default="abcde", metavar="abcde", help="which; default: all")
    parser.add_argument("--rounds", type=int, choices=range(1, 100), default=3, metavar="N", help="default: 3")
    parser.add_argument(
        "--contestants",
        type=lambda text: text.split(","),
        metavar="NAME,…",
        help=f"of {', '.join([*contestants.ALL_MODES, *catalogue.peers()])}; default: all that are installed",
    )
    parser.add_argument("--model", default=store.DEFAULT, help="of ours, a name or a path; default: %(default)s")
    parser.add_argument("--flags", default="", help="more flags of `pagewire serve`, for each of ours")
    parser.add_argument(
        "--ours", type=_checkpoint, action="append", default=[], metavar="NAME=PATH", help="ours with this checkpoint"
    )
    parser.add_argument("--peer", type=_peer, action="append", default=[], metavar="NAME=COMMAND", help="one more")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--address", metavar="HOST:PORT", help="measure a service that runs already, for one round")
    source.add_argument("--report", type=Path, nargs="+", metavar="FILE", help="measure nothing: of earlier JSON files")
    parser.add_argument(
        "--patience", type=float, default=300, metavar="S", help="for a start or a workload; default: %(default)s"
    )
    parser.add_argument("--seed", type=int, default=None, metavar="N", help="of the prompts; default: new")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", metavar="DIR")
    parser.add_argument("--name", default="", help="of the files; default: date and time")
    return parser


def _workloads(text: str) -> str:
    if not text or not set(text) <= set(load.WORKLOADS):
        raise argparse.ArgumentTypeError(f"{text!r} is not made of {''.join(load.WORKLOADS)}")
    return text


def _checkpoint(text: str) -> tuple[str, str]:
    name, _, path = text.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH")
    return name, path


def _peer(text: str) -> tuple[str, str]:
    name, separator, command = text.partition("=")
    if not separator or not name or "{port}" not in command:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=COMMAND with {{port}} in the command")
    return name, command


if __name__ == "__main__":
    sys.exit(main())

"""`pagewire model pull NAME`, `pagewire model list` and `pagewire model inspect MODEL`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from client import store


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=prog, description="Models that have a name: what there is, and bringing it here."
    )
    commands = parser.add_subparsers(dest="action", metavar="pull|list|inspect", required=True)
    pull = commands.add_parser("pull", help="bring a model here, checked", description="Brings a model here, checked.")
    pull.add_argument("name", metavar="NAME", help=f"one of: {', '.join(store.MODELS)}")
    commands.add_parser("list", help="known models, and where those that are here lie")
    commands.add_parser("inspect", add_help=False, help="what a checkpoint is, and how its layers would be run")
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    if argv[:1] == ["inspect"]:
        become_inspector(list(argv[1:]))
    arguments = _parser(prog).parse_args(argv)
    if arguments.action == "pull":
        print(pull(store.known(arguments.name).name))
        return 0
    for model in store.MODELS.values():
        path = store.location(model)
        print(f"{model.name}\t{model.about}\t{model.size / 1e6:.0f} MB\t{path if path.exists() else '(not pulled)'}")
    return 0


def become_inspector(arguments: list[str]) -> NoReturn:
    """Every flag is the worker's, which explains it or refuses it. A name that is known stands for its path."""
    arguments = [str(pull(argument)) if argument in store.MODELS else argument for argument in arguments]
    os.execv(sys.executable, [sys.executable, "-m", "worker_svc.inspect", *arguments])


def pull(model: str) -> Path:
    """The path of a model by path or name, pulled with a progress bar on standard error where it is missing."""
    if model not in store.MODELS or store.location(store.MODELS[model]).exists():
        return store.resolve(model)
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, TaskID] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what, total=None)
            bars.update(tasks[what], completed=done, total=total or None)

        return store.resolve(model, report)

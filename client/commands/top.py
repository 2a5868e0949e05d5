"""`pagewire top`: a running service in a terminal, once a second, also while its workers die or nobody answers."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from rich.console import Console
from rich.live import Live

from client.client import Client
from client.commands import flags
from client.errors import ServiceError
from client.figures import History, Reading
from client.top_frame import Head, frame

PATIENCE = 5.0  # seconds for an answer
PIPE_WIDTH = 110  # columns, where no terminal says how many there are


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Shows what a running service does. Ctrl-C ends it.")
    flags.add_address(parser)
    parser.add_argument("--interval", type=_interval, default=1.0, metavar="SECONDS", help="default: %(default)g")
    parser.add_argument("--once", action="store_true", help="print one frame, of one interval, and end")
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    parser = _parser(prog)
    arguments = parser.parse_args(argv)
    console = Console()
    if not arguments.once and not console.is_terminal:
        parser.error("standard output is no terminal; --once prints one frame")
    with Client(arguments.address, **flags.access(arguments)) as client:
        if arguments.once:
            _print_once(client, arguments.interval)
        else:
            _watch(client, arguments.interval, console)
    return 0


def _print_once(client: Client, interval: float) -> None:
    """Raises ServiceError where nobody answers."""
    history = History()
    history.add(_read(client))
    time.sleep(interval)  # a rate is of some time
    history.add(_read(client))
    width = None if sys.stdout.isatty() else PIPE_WIDTH
    Console(width=width).print(frame(Head(client.address, _model(client)), history.change))


def _watch(client: Client, interval: float, console: Console) -> None:
    history, model, trouble = History(), "", ""
    with Live(console=console, screen=True, auto_refresh=False) as live:
        try:
            while True:
                try:
                    history.add(_read(client))
                    model, trouble = model or _model(client), ""
                except ServiceError as error:
                    model, trouble = "", str(error)  # whoever answers next may serve another one
                live.update(frame(Head(client.address, model, trouble), history.change), refresh=True)
                time.sleep(interval)
        except KeyboardInterrupt:
            return


def _read(client: Client) -> Reading:
    stats = client.stats(timeout=PATIENCE)
    return Reading(time.monotonic(), stats)


def _model(client: Client) -> str:
    model = client.model(timeout=PATIENCE)
    cache = model.kv_cache_dtype and f"KV {model.kv_cache_dtype}"
    return ", ".join(filter(None, [model.name, model.backend, model.quantization or model.dtype, cache]))


def _interval(text: str) -> float:
    value = float(text)
    if not 0.1 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not in 0.1..3600")
    return value

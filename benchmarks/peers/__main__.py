"""See `benchmarks.peers`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

import benchmarks.peers
from benchmarks.peers.catalogue import engines, installed, peers
from benchmarks.peers.engine import InstallError
from client import store


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peers",
        description=benchmarks.peers.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("list", help="what there is (default)")
    install = commands.add_parser("install", help="engines, with our model in their formats")
    install.add_argument("engines", nargs="+", choices=list(engines()), metavar="ENGINE", help=", ".join(engines()))
    install.add_argument("--model", default=store.DEFAULT, help="a name or a GGUF file; default: %(default)s")
    run = commands.add_parser("run", help="one peer, in the foreground")
    run.add_argument("peer", choices=list(peers()), metavar="PEER", help=", ".join(peers()))
    run.add_argument("--port", type=int, required=True)
    arguments = parser.parse_args()
    if arguments.command == "install":
        return _install(arguments.engines, arguments.model)
    if arguments.command == "run":
        peer = peers()[arguments.peer]
        command = peer.command(arguments.port)
        os.execvpe(command[0], command, {**os.environ, **peer.environment})
    for peer in peers().values():
        words = [f"{key}={value}" for key, value in peer.environment.items()]
        state = "installed" if peer.name in installed() else f"not installed (install {peer.engine})"
        print(f"{peer.name:14} {state}: {peer.about}\n  {shlex.join([*words, *peer.template])}")
    return 0


def _install(names: list[str], model: str) -> int:
    try:
        file = store.resolve(model)
        for name in names:
            engines()[name].install(file)
    except (InstallError, store.StoreError) as error:
        print(f"benchmarks.peers: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

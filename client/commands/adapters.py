"""`pagewire adapters`: load, unload and list the LoRA adapters of a running service."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from client.client import Client
from client.commands import flags


def _parser(prog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=prog, description="Adapters of a running service, while it serves.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    load = actions.add_parser("load", help="read one into every worker; requests may name it then")
    load.add_argument("name", metavar="NAME")
    load.add_argument("path", metavar="PATH", type=Path, help="a directory of the service's host, as PEFT writes it")
    unload = actions.add_parser("unload", help="requests may name it no more; returns when it is gone")
    unload.add_argument("name", metavar="NAME")
    for action in (load, unload, actions.add_parser("list", help="those that are loaded")):
        flags.add_address(action)
    return parser


def main(prog: str, argv: Sequence[str]) -> int:
    arguments = _parser(prog).parse_args(argv)
    with Client(arguments.address, **flags.access(arguments)) as client:
        match arguments.action:
            case "load":
                loaded = client.load_adapter(arguments.name, str(arguments.path.absolute()))
                print(f"{loaded.name}: rank {loaded.rank}, {loaded.digest}")
            case "unload":
                client.unload_adapter(arguments.name)
            case "list":
                for one in client.adapters():
                    print(f"{one.name:24} rank {one.rank:3}  users {one.users:4}  {one.digest}  {one.path}")
    return 0

"""`pagewire token new TENANT` and `pagewire keys new DIR`: what lets clients and workers in."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from protos import curve


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 done, 1 failed, 2 wrong usage."""
    args = _parser(argv[0]).parse_args(argv[1:])
    try:
        return _new_token(args) if argv[0] == "token" else _new_keys(args.directory)
    except (OSError, ValueError) as error:
        print(f"pagewire: {error}", file=sys.stderr)
        return 1


def _parser(command: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"pagewire {command}")
    actions = parser.add_subparsers(metavar="new", required=True)
    if command == "token":
        new = actions.add_parser("new", description="Makes a token; its lines for `serve --tokens` go to stdout.")
        new.add_argument("tenant", metavar="TENANT", help="whose calls carry it")
        new.add_argument("--admin", action="store_true", help="may call AdminService")
        new.add_argument("--token-file", type=Path, metavar="FILE", help="a new file for the token; default: stderr")
    else:
        new = actions.add_parser("new", description="Makes a pair of keys for a worker that shall have its own.")
        new.add_argument("directory", type=Path, metavar="DIR", help="of `worker_svc --curve-keys DIR`")
    return parser


def _new_token(args: argparse.Namespace) -> int:
    from scheduler_svc.frontend.auth import new_token

    token, lines = new_token(args.tenant, args.admin)
    if args.token_file:
        descriptor = os.open(args.token_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(descriptor, "w") as file:
            file.write(f"{token}\n")
    else:
        print(f"pagewire: the token, which nobody can tell again: {token}", file=sys.stderr)
    print(lines)
    return 0


def _new_keys(directory: Path) -> int:
    import zmq

    public = curve.new_worker_pair(directory, zmq.curve_keypair, zmq.curve_public)
    print(f"copy {public} to the scheduler's keys as workers/NAME.pub, and its {curve.SCHEDULER}.pub to {directory}")
    return 0

"""`pagewire replay LOG`: becomes the scheduler, which replays the log and compares every plan."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from client.commands.serve import become_scheduler


def main(prog: str, argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description="Replays a log of `serve --record` and compares every plan."
    )
    parser.add_argument("log", metavar="LOG")
    become_scheduler("replay", parser.parse_args(argv).log)

"""`pagewire replay LOG`: becomes the scheduler, which replays the log, compares every plan, and explains the flags."""

from __future__ import annotations

from collections.abc import Sequence

from client.commands.serve import become_scheduler


def main(prog: str, argv: Sequence[str]) -> int:
    become_scheduler("replay", *argv)

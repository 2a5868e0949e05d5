"""`pagewire token`: becomes the scheduler's, which knows what it lets in."""

from __future__ import annotations

from collections.abc import Sequence

from client.commands.serve import become_scheduler


def main(prog: str, argv: Sequence[str]) -> int:
    become_scheduler("token", *argv)

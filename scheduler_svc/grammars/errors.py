"""What is wrong with a grammar."""

from __future__ import annotations

from typing import Final

LONGEST: Final = 400  # characters of what is told: a library quotes whole grammars


class GrammarError(Exception):
    """No grammar, or too much of one: in one line that names the place, for whoever wrote it."""


def one_line(text: str) -> str:
    """What a library says, without its notes to its own authors."""
    words = " ".join(text.partition("<non-verbose")[0].split())
    return words if len(words) <= LONGEST else f"{words[:LONGEST]} …"

"""What is wrong with a grammar."""

from __future__ import annotations


class GrammarError(Exception):
    """No grammar, or too much of one: in one line that names the place, for whoever wrote it."""

"""Real English for load: the prose of Python's own reference manual, in an order that a seed decides."""

from __future__ import annotations

import random
import re
from functools import cache
from pydoc_data.topics import topics


def text(seed: int) -> str:
    """About 120,000 characters, or 30,000 tokens of a usual vocabulary."""
    paragraphs = list(_paragraphs())
    random.Random(seed).shuffle(paragraphs)
    return "\n\n".join(paragraphs)


def in_order() -> str:
    """The same, in the manual's own order."""
    return "\n\n".join(_paragraphs())


@cache
def _paragraphs() -> tuple[str, ...]:
    """Whole sentences only: no code, tables, headings or lists."""
    found: dict[str, None] = {}
    for name in sorted(topics):
        for block in re.split(r"\n\s*\n", topics[name]):
            paragraph = " ".join(block.split())
            if re.match(r"[A-Z]", block) and paragraph.endswith(".") and paragraph.count(" ") >= 12:
                found[paragraph] = None
    return tuple(found)

"""Prompts whose answers say again what the prompt says, as edited code and quoting summaries do."""

from __future__ import annotations

import inspect
import random
from functools import cache
from json import decoder, encoder
from types import ModuleType
from typing import Final

from client import english

KINDS: Final = ("quotes", "code")
FRAMES: Final = {
    "quotes": (
        "A passage from a reference manual:\n\n",
        "\n\nThe passage again, quoted word by word, with its mistakes corrected:\n\n",
    ),
    "code": (
        "```python\n",
        "\n```\n\nThe same code, with its mistakes corrected and nothing else changed:\n\n```python\n",
    ),
}
_MODULES: Final[tuple[ModuleType, ...]] = (inspect, decoder, encoder, random)


def passages(kind: str, seed: int) -> str:
    """Much text of the kind, from another place for another seed."""
    if kind == "quotes":
        return english.text(seed)
    pieces = list(_functions())
    random.Random(seed).shuffle(pieces)
    return "\n\n\n".join(pieces)


@cache
def _functions() -> tuple[str, ...]:
    """Of the standard library."""
    found = [
        inspect.getsource(value)
        for module in _MODULES
        for _, value in inspect.getmembers(module, inspect.isfunction)
        if value.__module__ == module.__name__
    ]
    return tuple(source for source in found if source.count("\n") > 8)

"""Fields of a model's own files, which may hold anything: each error is one line that names file, key and value."""

from __future__ import annotations

import json
import reprlib
from collections.abc import Mapping
from typing import Any, Final, TypeVar

T = TypeVar("T", int, str, list[Any], dict[str, Any])

METADATA: Final = "the GGUF file's metadata"
KINDS: Final[dict[type, str]] = {int: "a whole number", str: "a string", list: "a list", dict: "an object"}


def parse_object(file: str, data: bytes) -> dict[str, Any]:
    """The JSON object that a file is. Raises ValueError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{file} is {reprlib.repr(value)}; must be an object")
    return value


def optional(values: Mapping[str, Any], file: str, key: str, kind: type[T]) -> T | None:
    """None where the key is missing or null. Raises ValueError for a value of another kind."""
    value = values.get(key)
    if value is None:
        return None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{file}: {key} is {reprlib.repr(value)}; must be {KINDS[getattr(kind, '__origin__', kind)]}")
    return value


def positive(values: Mapping[str, Any], file: str, key: str) -> int:
    """Raises ValueError, also where the key is missing or null."""
    value = optional(values, file, key, int)
    if value is None:
        raise ValueError(f"{file} has no {key!r}")
    if value < 1:
        raise ValueError(f"{file}: {key} is {value}; must be at least 1")
    return value


def token_ids(values: Mapping[str, Any], file: str, key: str, vocab_size: int) -> tuple[int, ...]:
    """None, one or a list of them, each once. Raises ValueError for one beyond the vocabulary."""
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        if isinstance(i, bool) or not isinstance(i, int) or not 0 <= i < vocab_size:
            raise ValueError(f"{file}: {key} is {reprlib.repr(value)}; must be in [0, {vocab_size - 1}], whole")
    return tuple(dict.fromkeys(ids))

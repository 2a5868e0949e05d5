"""A model's description as its file has it, read field by field: whatever is wrong is a SpecError that names the field.

Every number of a config.json and of a GGUF header comes through here. A field that is null counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from worker_svc.models.raw_tensor import CheckpointError
from worker_svc.models.spec import SpecError

MOST = 1 << 30
MAX_LAYERS, MAX_HEAD_DIM = 10_000, 1 << 16  # what is made of these before the weights are looked at stays small


@dataclass(frozen=True)
class Fields:
    """`source` is what messages call the file: "config.json", say. A default of None makes a field one that must be."""

    source: str
    values: Mapping[str, Any]

    def whole(self, key: str, default: int | None = None, least: int = 1, most: int = MOST) -> int:
        """An integer from `least` to `most`. Not a float, nor a bool."""
        value = self._given(key, default)
        if type(value) is not int or value < least:
            kind = "a positive integer" if least == 1 else f"an integer of at least {least}"
            raise self.trouble(key, kind, value)
        if value > most:
            raise self.trouble(key, f"at most {most}", value)
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number above 0."""
        value = self._given(key, default)
        if type(value) not in (int, float) or not (math.isfinite(value) and value > 0):
            raise self.trouble(key, "a number above 0", value)
        return float(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0."""
        values = self._given(key, None)
        if not isinstance(values, list):
            raise self.trouble(key, "a list of numbers", values)
        return tuple(Fields(self.source, {f"{key}[{i}]": x}).number(f"{key}[{i}]") for i, x in enumerate(values))

    def wholes(self, key: str, most: int = MOST) -> tuple[int, ...]:
        """A list of integers from 0 to `most`; empty where the field is missing."""
        values = self._given(key, [])
        if not isinstance(values, list):
            raise self.trouble(key, "a list of integers", values)
        each = enumerate(values)
        return tuple(Fields(self.source, {f"{key}[{i}]": x}).whole(f"{key}[{i}]", least=0, most=most) for i, x in each)

    def flag(self, key: str, default: bool) -> bool:
        value = self._given(key, default)
        if type(value) is not bool:
            raise self.trouble(key, "true or false", value)
        return value

    def text(self, key: str, default: str) -> str:
        value = self._given(key, default)
        if type(value) is not str:
            raise self.trouble(key, "a string", value)
        return value

    def texts(self, key: str) -> list[str]:
        """A list of strings; empty where the field is missing."""
        values = self._given(key, [])
        if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
            raise self.trouble(key, "a list of strings", values)
        return values

    def group(self, key: str) -> Mapping[str, Any]:
        """An object; empty where the field is missing."""
        value = self._given(key, {})
        if not isinstance(value, dict):
            raise self.trouble(key, "an object", value)
        return value

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def trouble(self, key: str, kind: str, value: object) -> SpecError:
        return SpecError(f"{self.source}: {key} must be {kind}, not {_short(value)}")

    def _given(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value


@contextmanager
def described_by(source: str) -> Iterator[None]:
    """What numbers that are sound one by one lead to together (a division by 0, say) is a SpecError as well."""
    try:
        yield
    except (ArithmeticError, LookupError, TypeError, ValueError, AttributeError, NotImplementedError) as error:
        if isinstance(error, SpecError | CheckpointError):
            raise
        reason = " ".join(str(error).split())
        raise SpecError(f"{source} cannot be followed: {type(error).__name__}: {reason}") from error


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."

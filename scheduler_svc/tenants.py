"""The tenants file: who shares the service, and how much of it is whose.

output_cost = 2.0          # of an output token, beside prompt_cost = 1.0 for one of a prompt

[default]                  # each who is not named below, and callers without a name
weight = 1.0

[tenant.search]
weight = 3.0
tokens_per_second = 500    # quota of prompt and output tokens together; without one, none
burst = 20000
best_priority = 0          # a smaller one is refused; without it any is taken
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

from scheduler_svc.engine.config import Tenant

_COSTS = ("prompt_cost", "output_cost")
_FIELDS = tuple(each.name for each in fields(Tenant) if each.name != "name")


class TenantsError(Exception):
    """A file that cannot be used, in one line."""


@dataclass(frozen=True)
class Tenants:
    named: tuple[Tenant, ...] = ()
    default: Tenant = field(default_factory=Tenant)
    prompt_cost: float = 1.0
    output_cost: float = 2.0


def load(path: Path) -> Tenants:
    """Raises TenantsError."""
    try:
        tree = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise TenantsError(f"{path}: {error}") from error
    try:
        _known("the file", tree, (*_COSTS, "default", "tenant"))
        named = _table("tenant", tree.get("tenant", {}))
        return Tenants(
            tuple(_tenant(name, f"tenant.{name}", table) for name, table in named.items()),
            _tenant("", "default", tree.get("default", {})),
            **{name: _number(name, tree[name]) for name in _COSTS if name in tree},
        )
    except ValueError as error:
        raise TenantsError(f"{path}: {error}") from error


def _tenant(name: str, where: str, value: object) -> Tenant:
    table = _table(where, value)
    _known(f"[{where}]", table, _FIELDS)
    return Tenant(name, **{key: _number(f"{where}.{key}", number) for key, number in table.items()})


def _table(where: str, value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} is {value!r}: must be a table")
    return value


def _known(where: str, table: Mapping[str, object], names: tuple[str, ...]) -> None:
    if unknown := next((key for key in table if key not in names), None):
        raise ValueError(f"{where} has {unknown!r}: known are {', '.join(names)}")


def _number(where: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{where} is {value!r}: must be a number")
    return float(value)

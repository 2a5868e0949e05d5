"""Every effective setting as name and value, for an operator: what flags, files and defaults came to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from scheduler_svc.config import ServiceConfig

SECRET: Final = {"secret": True}  # metadata of a dataclass field whose value nobody is told
HIDDEN: Final = "(not shown)"


def effective(settings: ServiceConfig) -> tuple[tuple[str, str], ...]:
    """Names are paths through the configuration. Bytes and fields marked SECRET are named, and their values hidden."""
    return tuple(_flatten("", settings))


def _flatten(name: str, value: object) -> Iterator[tuple[str, str]]:
    match value:
        case bytes():
            yield name, HIDDEN if value else ""
        case tuple() | list() if any(map(_is_tree, value)):
            for place, item in enumerate(value):
                yield from _flatten(f"{name}[{place}]", item)
        case tuple() | list():
            yield name, " ".join(map(str, value))
        case msgspec.Struct():
            for field in value.__struct_fields__:
                yield from _flatten(_path(name, field), getattr(value, field))
        case _ if is_dataclass(value):
            for each in fields(value):
                if each.metadata.get("secret"):
                    yield _path(name, each.name), HIDDEN
                else:
                    yield from _flatten(_path(name, each.name), getattr(value, each.name))
        case None:
            yield name, ""
        case bool():
            yield name, str(value).lower()
        case float():
            yield name, f"{value:g}"
        case _:
            yield name, str(value)


def _is_tree(value: object) -> bool:
    return is_dataclass(value) or isinstance(value, msgspec.Struct | bytes)


def _path(name: str, field: str) -> str:
    return f"{name}.{field}" if name else field

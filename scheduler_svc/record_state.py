"""The engine's whole state as bytes, and an engine made from them: so a log may begin in the middle of a life.

It follows the objects themselves, so that a new field of the engine is part of it without a word here. What was one
list before is one list afterwards. A kind of value that is not known here is an error, never left out.

This is no pickle: what is made is plain values, and instances of classes that engine and wire define. Nothing is
imported by a name that stands in the bytes, and of the engine's classes nothing is called.
"""

from __future__ import annotations

import gc
import pkgutil
from array import array
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from enum import Enum
from functools import cache
from importlib import import_module
from operator import attrgetter
from typing import Any

import msgspec

from protos import engine_wire, wire
from scheduler_svc import engine
from scheduler_svc.engine.scheduler import Scheduler

_PLAIN = frozenset({type(None), bool, int, float, str, bytes})


class Tag:
    """Before what is no plain value."""

    LIST = "l"
    DICT = "d"
    PLAIN_LIST = "L"  # of plain values alone, which is most of a large state
    PLAIN_DICT = "D"
    ORDERED_DICT = "o"
    DEQUE = "q"
    ARRAY = "a"
    OBJECT = "i"
    AGAIN = "r"  # one of those above, by its number
    TUPLE = "t"
    FROZENSET = "f"
    MEMBER = "e"
    MESSAGE = "m"
    ITEMS = "v"  # a list in a message: nobody changes it any more
    PLAIN_ITEMS = "V"


class StateError(Exception):
    """A state that cannot be written, or bytes that are none; in one line."""


def snapshot(scheduler: Scheduler, without: type | None = None) -> bytes:
    """Raises StateError for what cannot be written, and where there is an instance of `without`."""
    writer = _Writer(without)
    collects = gc.isenabled()
    gc.disable()  # what is made here is all alive until it is written: a collection would walk it for nothing
    try:
        tree = writer.value(scheduler)
        return msgspec.msgpack.encode([list(writer.shapes), tree])
    except (OverflowError, TypeError, AttributeError, RecursionError) as error:
        raise StateError(f"the engine's state cannot be written: {error}") from error
    finally:
        if collects:
            gc.enable()


def restore(data: bytes) -> Scheduler:
    """Raises StateError."""
    try:
        shapes, tree = msgspec.msgpack.decode(data)
        made = _Reader([(_known()[name], attributes) for name, attributes in shapes]).value(tree)
    except (msgspec.DecodeError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        raise StateError(f"no state of this engine: {error!r}") from error
    if not isinstance(made, Scheduler):
        raise StateError(f"no state of an engine, but a {type(made).__name__}")
    return made


@cache
def _known() -> dict[str, type]:
    """Every class that may be made, by its name."""
    names = [module.name for module in pkgutil.iter_modules(engine.__path__, engine.__name__ + ".")]
    return {
        _name(found): found
        for module in (wire, engine_wire, *map(import_module, names))
        for found in vars(module).values()
        if isinstance(found, type) and found.__module__ == module.__name__
    }


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


@cache
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for base in kind.__mro__ for name in vars(base).get("__slots__", ()))


@cache
def _fields(kind: type) -> tuple[str, ...] | None:
    """Of a message; None for what is none."""
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    return kind._fields if issubclass(kind, tuple) else None  # type: ignore[attr-defined]


def _attributes(owner: Any, kind: type) -> tuple[str, ...]:
    slots = _slots(kind)
    return (*slots, *vars(owner)) if hasattr(owner, "__dict__") else slots


@cache
def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    """All of an object's attributes in one call: of a long queue there are millions."""
    if len(names) > 1:
        return attrgetter(*names)
    return lambda owner: tuple(getattr(owner, name) for name in names)


class _Writer:
    """What can change, and may therefore be shared, is numbered at first sight; what cannot goes by its value."""

    def __init__(self, without: type | None) -> None:
        self._without = without
        # By address: all of it lives as long as the engine that is written.
        self._seen: dict[int, int] = {}  # number
        self._messages: dict[int, list[Any]] = {}  # as written
        self.shapes: dict[tuple[str, tuple[str, ...]], int] = {}  # number by class and attributes

    def value(self, owner: Any) -> Any:
        kind: type = type(owner)
        if kind in _PLAIN:
            return owner
        if (number := self._seen.get(id(owner))) is not None:
            return [Tag.AGAIN, number]
        if kind is tuple:
            return [Tag.TUPLE, *(owner if _all_plain(owner) else map(self.value, owner))]
        if kind is frozenset:
            return [Tag.FROZENSET, *sorted(map(self.value, owner))]  # their order is nobody's business
        if (fields := _fields(kind)) is not None:
            return self._message(owner, fields)
        if isinstance(owner, Enum):
            return [Tag.MEMBER, self._shape(kind, ()), owner.name]
        self._seen[id(owner)] = len(self._seen)
        return self._first(owner, kind)

    def _first(self, owner: Any, kind: type) -> list[Any]:
        if kind is list:
            return [Tag.PLAIN_LIST, owner] if _all_plain(owner) else [Tag.LIST, *map(self.value, owner)]
        if kind is dict:
            if _all_plain(owner) and _all_plain(owner.values()):
                return [Tag.PLAIN_DICT, list(owner), list(owner.values())]
            return [Tag.DICT, *self._pairs(owner)]
        if kind is OrderedDict:
            return [Tag.ORDERED_DICT, *self._pairs(owner)]
        if kind is deque:
            return [Tag.DEQUE, owner.maxlen, *map(self.value, owner)]
        if kind is array:
            return [Tag.ARRAY, owner.typecode, owner.tobytes()]
        if self._without and isinstance(owner, self._without):
            raise StateError(f"the engine's state holds a {kind.__name__}, and must not")
        names = _attributes(owner, kind)
        written = [Tag.OBJECT, self._shape(kind, names), *_getter(names)(owner)]
        for place, part in enumerate(written):
            if type(part) not in _PLAIN:
                written[place] = self.value(part)
        return written

    def _message(self, owner: Any, names: tuple[str, ...]) -> list[Any]:
        if (written := self._messages.get(id(owner))) is None:
            written = [Tag.MESSAGE, self._shape(type(owner), names), *_getter(names)(owner)]
            for place, part in enumerate(written):
                if type(part) not in _PLAIN:
                    written[place] = self._part(part)
            self._messages[id(owner)] = written
        return written

    def _part(self, part: Any) -> Any:
        """Of a message."""
        if type(part) is not list:
            return self.value(part)
        return [Tag.PLAIN_ITEMS, part] if _all_plain(part) else [Tag.ITEMS, *map(self._part, part)]

    def _pairs(self, owner: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
        return list(map(self.value, owner)), list(map(self.value, owner.values()))

    def _shape(self, kind: type, names: tuple[str, ...]) -> int:
        name = _name(kind)
        if name not in _known():
            raise StateError(f"the engine's state holds a {name}, which only its defining process knows")
        return self.shapes.setdefault((name, names), len(self.shapes))


def _all_plain(values: Iterable[Any]) -> bool:
    return _PLAIN.issuperset(map(type, values))


class _Reader:
    """The writer's way again: what can be shared is numbered in the order in which it comes."""

    def __init__(self, shapes: list[tuple[type, list[str]]]) -> None:
        self._shapes = shapes
        self._made: list[Any] = []

    def value(self, data: Any) -> Any:
        if type(data) is not list:
            return data
        tag, *rest = data
        match tag:
            case Tag.TUPLE:
                return tuple(map(self.value, rest))
            case Tag.FROZENSET:
                return frozenset(map(self.value, rest))
            case Tag.MEMBER:
                return self._shapes[rest[0]][0][rest[1]]  # type: ignore[index]  # an Enum's member, by its name
            case Tag.MESSAGE:
                kind, _ = self._shapes[rest[0]]
                return kind(*map(self.value, rest[1:]))
            case Tag.PLAIN_ITEMS:
                return rest[0]
            case Tag.ITEMS:
                return list(map(self.value, rest))
            case Tag.AGAIN:
                return self._made[rest[0]]
        return self._first(tag, rest)

    def _first(self, tag: str, rest: list[Any]) -> Any:
        match tag:
            case Tag.PLAIN_LIST:
                return self._number(rest[0])
            case Tag.LIST:
                made_list: list[Any] = self._number([])
                made_list.extend(map(self.value, rest))
                return made_list
            case Tag.PLAIN_DICT:
                return self._number(dict(zip(*rest, strict=True)))
            case Tag.DICT | Tag.ORDERED_DICT:
                made_dict: dict[Any, Any] = self._number({} if tag == Tag.DICT else OrderedDict())
                keys = list(map(self.value, rest[0]))
                made_dict.update(zip(keys, map(self.value, rest[1]), strict=True))
                return made_dict
            case Tag.DEQUE:
                made_deque: deque[Any] = self._number(deque(maxlen=rest[0]))
                made_deque.extend(map(self.value, rest[1:]))
                return made_deque
            case Tag.ARRAY:
                return self._number(array(rest[0], rest[1]))
            case Tag.OBJECT:
                return self._object(*rest)
        raise ValueError(f"tag {tag!r}")

    def _object(self, shape: int, *values: Any) -> Any:
        kind, names = self._shapes[shape]
        made = self._number(object.__new__(kind))
        for name, data in zip(names, values, strict=True):
            object.__setattr__(made, name, self.value(data))  # a frozen dataclass lets nobody else
        return made

    def _number(self, made: Any) -> Any:
        self._made.append(made)
        return made

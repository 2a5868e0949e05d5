"""Adapters from asking to answer: what every worker group has to have, and who waits for it.

    load ──LoadAdapter──► each group ──AdapterReady──► AdapterLoaded: the engine lets requests name it
    unload ── AdapterClosed ──► the engine ── AdapterFree ──► UnloadAdapter to each group

A group that begins an epoch loads all that are here before it serves: so whatever the engine knows, it has.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from msgspec.structs import replace

from protos.engine_wire import Adapter, Ask
from scheduler_svc.engine.events import AdapterClosed, AdapterLoaded, Event

log = logging.getLogger(__name__)


class Group(Protocol):
    """A worker group, as far as adapters go."""

    def load_adapter(self, adapter: Adapter, now: float) -> None:
        """Where it has an epoch; else that begins with it."""

    def unload_adapter(self, name: str) -> None:
        """Where it has it."""

    def adapter_state(self, name: str) -> bool | None:
        """Whether it has it; None while it loads it."""


@dataclass
class _Entry:
    adapter: Adapter
    is_loaded: bool = False  # the engine knows it
    is_closed: bool = False
    proven: bool = False  # a group had it once
    asks: list[Ask] = field(default_factory=list)  # who waits for it to be loaded, or to be gone


class AdapterBook:
    """`initial` were named at the start: whoever cannot load one of those serves nothing."""

    def __init__(self, initial: Sequence[Adapter], max_adapters: int, groups: Callable[[], Sequence[Group]]) -> None:
        self._max_adapters, self._groups = max_adapters, groups
        self._entries = {adapter.name: _Entry(adapter, is_loaded=True) for adapter in initial}
        self._answers: list[tuple[Ask, str]] = []  # and what the trouble was

    def take_answers(self) -> list[tuple[Ask, str]]:
        """To whom the asked is done, or could not be: the trouble in one line."""
        answers, self._answers = self._answers, []
        return answers

    @property
    def wanted(self) -> list[Adapter]:
        """What an epoch begins with."""
        return [entry.adapter for entry in self._entries.values()]

    @property
    def open(self) -> list[Adapter]:
        """Those that requests may name."""
        return [entry.adapter for entry in self._entries.values() if entry.is_loaded and not entry.is_closed]

    def begin(self) -> Iterator[Event]:
        """The engine may let requests wait for what the first epoch will bring."""
        for adapter in self.open:
            yield AdapterLoaded(adapter.name, adapter.digest)

    def load(self, ask: Ask, now: float) -> Iterator[Event]:
        adapter = ask.adapter
        assert adapter is not None, "a frontend names what it asks for"
        entry = self._entries.get(adapter.name)
        if entry is None:
            if trouble := self._no_room(adapter.name):
                self._answers.append((ask, trouble))
                return
            self._entries[adapter.name] = _Entry(replace(adapter, users=0), asks=[ask])
            for group in self._groups():
                group.load_adapter(adapter, now)
        elif entry.is_closed:
            self._answers.append((ask, f"adapter {adapter.name!r} is being unloaded: requests still use it"))
        elif entry.adapter.digest != adapter.digest:
            path = entry.adapter.path
            said = f"adapter {adapter.name!r} is loaded from {path}, which had other files: unload it first"
            self._answers.append((ask, said))
        elif entry.is_loaded:
            self._answers.append((ask, ""))
        else:
            entry.asks.append(ask)
        yield from self.settle()

    def unload(self, ask: Ask) -> Iterator[Event]:
        """Of one that is not there the answer says so: see `has`."""
        assert ask.adapter is not None, "a frontend names what it asks for"
        entry = self._entries[ask.adapter.name]
        if not entry.is_loaded:
            self._answers.append((ask, f"adapter {ask.adapter.name!r} is still being loaded"))
            return
        entry.asks.append(ask)
        if not entry.is_closed:
            entry.is_closed = True
            yield AdapterClosed(ask.adapter.name)

    def has(self, name: str) -> bool:
        return name in self._entries

    def answered(self, name: str, trouble: str, rank: int) -> Iterator[Event]:
        """All ranks of a group have said what became of it. Raises StartError for one of the initial ones."""
        entry = self._entries.get(name)
        if entry is None:  # another group had trouble with it meanwhile
            self._unload(name)
            return
        if not trouble:
            entry.proven, entry.adapter = True, replace(entry.adapter, rank=rank)
            yield from self.settle()
            return
        log.warning("adapter %s: %s", name, trouble)
        if not entry.is_loaded:
            del self._entries[name]
            self._unload(name)
            self._answers += [(ask, trouble) for ask in entry.asks]
        elif not entry.proven:
            raise StartError(f"adapter {name!r}: {trouble}")
        elif not entry.is_closed:
            entry.is_closed = True
            yield AdapterClosed(name, f"adapter {name!r} is lost: a new worker could not load it: {trouble}")

    def settle(self) -> Iterator[Event]:
        """An adapter is loaded once a group has it, and none is still at it."""
        for name, entry in self._entries.items():
            if entry.is_loaded:
                continue
            states = [group.adapter_state(name) for group in self._groups()]
            if True in states and None not in states:
                entry.is_loaded = True
                yield AdapterLoaded(name, entry.adapter.digest)
                self._answers += [(ask, "") for ask in entry.asks]
                entry.asks.clear()

    def free(self, name: str) -> None:
        """The engine has no use for it any more."""
        self._unload(name)
        entry = self._entries.pop(name)
        self._answers += [(ask, "") for ask in entry.asks]

    def _unload(self, name: str) -> None:
        for group in self._groups():
            group.unload_adapter(name)

    def _no_room(self, name: str) -> str:
        if not self._max_adapters:
            return "adapters are not served: max_adapters is 0, start with --max-adapters N"
        if len(self._entries) >= self._max_adapters:
            return f"max_adapters is {self._max_adapters}, and so many are loaded: {', '.join(self._entries)}"
        if any(group.adapter_state(name) is None for group in self._groups()):
            return f"a worker still tries to load adapter {name!r}, which another could not"
        return ""


class StartError(Exception):
    """An adapter that the service was started with, and cannot load."""

"""Whom a benchmark runs, by name: our own modes, ours with other checkpoints, and the peers of `benchmarks.peers`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from benchmarks.peers import catalogue
from benchmarks.peers.engine import WIDEST, filled
from benchmarks.targets import SPEAKERS, Dialect, Speaker
from client import store

# flags of `pagewire serve`; the first is what a plain `pagewire serve` does on a CPU
MODES: dict[str, tuple[str, ...]] = {
    "bf16": (),
    "int8": ("--quantization", "int8"),
    "int8+kv8": ("--quantization", "int8", "--kv-cache-dtype", "int8"),
    "int4": ("--quantization", "int4"),
}
# … and with drafts; these run only where they are named
SPECULATING: dict[str, tuple[str, ...]] = {
    f"{mode}+{proposer}": (*flags, "--speculation", proposer)
    for proposer in ("ngram", "suffix")
    for mode, flags in MODES.items()
}
ALL_MODES = MODES | SPECULATING


class UnknownContestantError(Exception):
    """A name that is nobody's, or that of two, or of a peer that is not installed, in one line."""


@dataclass(frozen=True)
class Contestant:
    """How one is started, and what it speaks."""

    name: str
    template: tuple[
        str, ...
    ]  # {port} is replaced, and {slots} and {context}, where there are such, by what a workload needs
    dialect: Dialect
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of ours
    checkpoint: bool = False  # ours, with a model of its own in place of everybody's

    def command(self, port: int, slots: int = WIDEST) -> list[str]:
        return filled(self.template, port, slots)

    @property
    def tailored(self) -> bool:
        """Whether it is started for each workload anew, since it is at its best with as many slots as are used."""
        return "{slots}" in self.template

    @property
    def speaker(self) -> Speaker:
        return SPEAKERS[self.dialect]


def ours(mode: str, model: str, flags: Sequence[str] = ()) -> Contestant:
    command = (sys.executable, "-m", "client.cli", "serve", model, "--port", "{port}", *ALL_MODES[mode], *flags)
    return Contestant(mode, command, "grpc")


def checkpoints(named: Sequence[tuple[str, str]], flags: Sequence[str]) -> list[Contestant]:
    """Ours with the checkpoint behind each name, in whatever format that is: a directory, or a GGUF file.

    Raises UnknownContestantError for a name that a mode, a peer or another checkpoint has, and store.StoreError.
    """
    taken = {*ALL_MODES, *catalogue.peers()}
    found = []
    for name, path in named:
        if name in taken:
            raise UnknownContestantError(f"{name} is the name of another contestant")
        taken.add(name)
        found.append(replace(ours("bf16", str(store.resolve(path)), flags), name=name, checkpoint=True))
    return found


def peer(name: str) -> Contestant:
    found = catalogue.peers()[name]
    return Contestant(name, found.template, found.dialect, found.environment)


def openai(name: str, command: str) -> Contestant:
    """Any server with OpenAI's /v1/completions and /health; `command` holds {port}."""
    return Contestant(name, tuple(shlex.split(command)), "openai")


def choose(names: Sequence[str], model: str, flags: Sequence[str]) -> list[Contestant]:
    """By name. Raises UnknownContestantError."""
    installed = catalogue.installed()
    chosen = []
    for name in names:
        if name in ALL_MODES:
            chosen.append(ours(name, model, flags))
        elif name in installed:
            chosen.append(peer(name))
        elif name in catalogue.peers():
            engine = catalogue.peers()[name].engine
            raise UnknownContestantError(f"{name} is not installed: python -m benchmarks.peers install {engine}")
        else:
            known = ", ".join([*ALL_MODES, *catalogue.peers()])
            raise UnknownContestantError(f"{name!r} is no contestant; there are {known}")
    return chosen


def everybody() -> list[str]:
    """All our modes and all installed peers."""
    return [*MODES, *(name for name in catalogue.peers() if name in catalogue.installed())]


def absent() -> list[str]:
    """Peers that a complete comparison would have."""
    return [name for name in catalogue.peers() if name not in catalogue.installed()]

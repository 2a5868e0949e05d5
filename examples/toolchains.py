"""What the examples are built with, and whether this host has it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Protocol

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # which some print even into a pipe


class Needed(Protocol):
    def missing(self) -> str | None:
        """Why it cannot be used; None if it can."""


@dataclass(frozen=True)
class Tool:
    name: str  # of the command
    least: tuple[int, ...]  # the oldest version that will do
    version: tuple[str, ...]  # arguments that make it print its version
    about: str

    def missing(self) -> str | None:
        wanted = ".".join(map(str, self.least))
        path = shutil.which(self.name)
        if path is None:
            return f"no `{self.name}` on the PATH ({self.about}, {wanted} or newer)"
        done = subprocess.run([path, *self.version], capture_output=True, text=True, timeout=60, check=False)
        found = re.search(r"\d+(\.\d+)*", COLOURS.sub("", done.stdout + done.stderr))
        if done.returncode != 0 or found is None:
            return f"`{self.name} {' '.join(self.version)}` says no version ({self.about}, {wanted} or newer is needed)"
        if tuple(map(int, found[0].split("."))) < self.least:
            return f"`{self.name}` is {found[0]} ({self.about}, {wanted} or newer is needed)"
        return None


@dataclass(frozen=True)
class Package:
    """Of this Python."""

    name: str
    about: str

    def missing(self) -> str | None:
        try:
            metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return f"no package `{self.name}` in this Python ({self.about})"
        return None


GO = Tool("go", (1, 24), ("version",), "the Go toolchain")
JAVAC = Tool("javac", (17,), ("-version",), "a JDK")
MAVEN = Tool("mvn", (3, 8), ("--version",), "Maven")
SMG = Package("smg", "OpenAI's API over our gRPC port: pip install 'pagewire[openai]', where it has wheels")
OPENAI = Package("openai", "the official client")


def missing(tools: Sequence[Needed]) -> list[str]:
    return [why for tool in tools if (why := tool.missing())]

"""What the examples in other languages are built with, and whether this host has it."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # which some print even into a pipe


@dataclass(frozen=True)
class Tool:
    name: str  # of the command
    least: tuple[int, ...]  # the oldest version that will do
    version: tuple[str, ...]  # arguments that make it print its version
    about: str

    def missing(self) -> str | None:
        """Why it cannot be used; None if it can."""
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


GO = Tool("go", (1, 24), ("version",), "the Go toolchain")
JAVAC = Tool("javac", (17,), ("-version",), "a JDK")
MAVEN = Tool("mvn", (3, 8), ("--version",), "Maven")


def missing(tools: Sequence[Tool]) -> list[str]:
    return [why for tool in tools if (why := tool.missing())]

"""Each client: what it needs, how it is built, how it is run, and whether what it printed is good."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from examples.toolchains import GO, JAVAC, MAVEN, OPENAI, SMG, Needed

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "build"
BUILD_LIMIT = 900.0  # seconds; the first build downloads what it needs
RUN_LIMIT = 300.0
GHZ = "0.121.0"


class ClientError(Exception):
    """A client that could not be built, or that saw what it should not have; one line for a person."""


@dataclass(frozen=True)
class Load:
    """What is asked of a service."""

    overload: int = 0  # streams offered at once, more than it runs and queues; 0: none
    ghz: tuple[str, ...] = ()  # arguments for ghz that replace those of its file
    openai: str = ""  # URL of OpenAI's API


class Example(Protocol):
    tools: ClassVar[Sequence[Needed]]

    def build(self) -> None: ...

    def run(self, address: str, load: Load) -> None: ...


class Go:
    tools: ClassVar[Sequence[Needed]] = (GO,)
    program: ClassVar[Path] = BUILD / "go/pagewire-example"

    def build(self) -> None:
        call(["go", "build", "-o", str(self.program), "."], ROOT / "examples/go", BUILD_LIMIT)

    def run(self, address: str, load: Load) -> None:
        call([str(self.program), "-address", address, "-overload", str(load.overload)], ROOT, RUN_LIMIT)


class Java:
    tools: ClassVar[Sequence[Needed]] = (JAVAC, MAVEN)
    program: ClassVar[Path] = ROOT / "examples/java/target/pagewire-example.jar"

    def build(self) -> None:
        call(["mvn", "--quiet", "--batch-mode", "package"], ROOT / "examples/java", BUILD_LIMIT)

    def run(self, address: str, load: Load) -> None:
        flags = ["--address", address, "--overload", str(load.overload)]
        call(["java", "-jar", str(self.program), *flags], ROOT, RUN_LIMIT)


@dataclass(frozen=True)
class Ghz:
    """ghz itself exits with 0 whatever the calls came to, so its summary is read."""

    tools: ClassVar[Sequence[Needed]] = (GO,)
    program: ClassVar[Path] = BUILD / f"ghz-{GHZ}/ghz"
    file: str
    expected: str  # the status of every call

    def build(self) -> None:
        if not self.program.exists():
            install = ["go", "install", f"github.com/bojand/ghz/cmd/ghz@v{GHZ}"]
            call(install, ROOT, BUILD_LIMIT, GOBIN=str(self.program.parent))

    def run(self, address: str, load: Load) -> None:
        config = f"examples/ghz/{self.file}"
        command = [str(self.program), "--config", config, "--count-errors", *load.ghz, address]
        summary = call(command, ROOT, RUN_LIMIT)
        statuses = dict(re.findall(r"^ *\[(\w+)\] +(\d+) responses", summary, re.MULTILINE))
        count = re.search(r"^ *Count:\s+(\d+)$", summary, re.MULTILINE)
        if count is None or statuses != {self.expected: count[1]}:
            raise ClientError(f"not every call ended with {self.expected}: {statuses}")


class OpenAI:
    """Python: nothing is built."""

    tools: ClassVar[Sequence[Needed]] = (SMG, OPENAI)

    def build(self) -> None:
        pass

    def run(self, address: str, load: Load) -> None:
        if not load.openai:
            raise ClientError("--address needs --openai-url, too: where that service has OpenAI's API")
        call([sys.executable, "-m", "examples.openai_client", "--url", load.openai], ROOT, RUN_LIMIT)


EXAMPLES: dict[str, Example] = {
    "go": Go(),
    "java": Java(),
    "openai": OpenAI(),
    "ghz": Ghz("generate.json", "OK"),
    "ghz-cancel": Ghz("cancel.json", "Canceled"),
}


def call(command: Sequence[str], cwd: Path, limit: float, **environment: str) -> str:
    """Says what it runs, passes its output on, and returns it. Raises ClientError where it fails or takes too long."""
    shown = " ".join(word.removeprefix(f"{ROOT}/") for word in command)
    print(f"$ {shown}", flush=True)
    pipe = subprocess.PIPE
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, **environment}, stdout=pipe, stderr=subprocess.STDOUT, text=True
    )
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        raise ClientError(f"`{shown}` has not ended after {limit:g} s") from None
    finally:
        process.kill()
    sys.stdout.write(output)
    if process.returncode != 0:
        raise ClientError(f"`{shown}` ended with {process.returncode}")
    return output

"""All that a GPU host can tell, the most telling first: `make gpu GPU_MODEL=llama8b`, `python -m benchmarks.gpu MODEL`.

Tests of the worker on the GPU; a worker by itself, then with other attention and fp8 KV; tests of the kernels; then
whatever `--peer NAME=COMMAND` says, in its own words. Everything goes into a folder of benchmarks/results: what each
stage printed, its figures, and summary.json. A stage that no longer fits into --minutes is named there as not run:
`--only` runs it the next time. The exit code is 1 where a stage failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import machine

LEAST = 20.0  # seconds, for which a stage is not begun


@dataclass(frozen=True)
class Stage:
    name: str
    command: Sequence[str]


@dataclass(frozen=True)
class Outcome:
    name: str
    command: str
    code: int | None  # None: it was not run, or did not end in time
    seconds: float
    said: str  # its last line


def stages(model: str, folder: Path, peers: Sequence[str]) -> list[Stage]:
    python = sys.executable

    def step(name: str, *extra: str) -> Stage:
        figures = str(folder / f"{name}.json")
        return Stage(name, [python, "-m", "benchmarks.gpu_step", model, "--json", figures, *extra])

    def tests(name: str, *paths: str) -> Stage:
        return Stage(name, [python, "-m", "pytest", "-q", "-m", "gpu", *paths])

    ours = [
        tests("worker-tests", "tests/gpu_worker"),
        step("step"),
        step("step-flash-attn", "--attention-backend", "flash_attn", "--batches", "1", "128"),
        step("step-flashinfer", "--attention-backend", "flashinfer", "--batches", "1", "128"),
        step("step-fp8-kv", "--kv-cache-dtype", "fp8", "--batches", "1", "128"),
        tests("kernel-tests", "tests/kernels_triton"),
        step("step-batch-invariant", "--batch-invariant", "--batches", "1", "32"),
    ]
    named = [peer.partition("=") for peer in peers]
    return ours + [Stage(name, shlex.split(command)) for name, _, command in named]


def run(stage: Stage, folder: Path, limit: float) -> Outcome:
    """What it prints goes to the folder, and to the terminal as its last line."""
    command, began = shlex.join(stage.command), time.monotonic()
    if limit < LEAST:
        return Outcome(stage.name, command, None, 0.0, "not run: no time was left")
    log = folder / f"{stage.name}.txt"
    with log.open("w") as out:
        try:
            environment = {**os.environ, "TRITON_INTERPRET": "0"}
            code = subprocess.run(
                stage.command, stdout=out, stderr=subprocess.STDOUT, env=environment, timeout=limit, check=False
            ).returncode
        except subprocess.TimeoutExpired:
            return Outcome(stage.name, command, None, time.monotonic() - began, f"ended after {limit:.0f} s")
        except OSError as error:
            return Outcome(stage.name, command, 127, 0.0, str(error))
    lines = log.read_text(errors="replace").split("\n")
    return Outcome(stage.name, command, code, time.monotonic() - began, next((x for x in lines[::-1] if x), ""))


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="a checkpoint")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND", help="may be given repeatedly")
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="these stages, by name")
    parser.add_argument("--minutes", type=float, default=9.5, help="of all stages together (default: %(default)s)")
    parser.add_argument("--into", type=Path, metavar="DIR", help="default: benchmarks/results/DATE-gpu")
    arguments = parser.parse_args(argv)
    if wrong := [peer for peer in arguments.peer if not all(peer.partition("="))]:
        parser.error(f"--peer {wrong[0]!r} is not NAME=COMMAND")
    folder = arguments.into or Path(__file__).parent / "results" / f"{datetime.now(UTC):%Y-%m-%d}-gpu"
    wanted = stages(arguments.model, folder, arguments.peer)
    if unknown := set(arguments.only or ()) - {stage.name for stage in wanted}:
        parser.error(f"--only {sorted(unknown)[0]!r} is none of {', '.join(stage.name for stage in wanted)}")
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    outcomes: list[Outcome] = []
    for stage in wanted:
        if arguments.only and stage.name not in arguments.only:
            continue
        outcome = run(stage, folder, end - time.monotonic())
        outcomes.append(outcome)
        print(f"{outcome.name:22} {outcome.seconds:6.1f} s  {_verdict(outcome)}  {outcome.said[:120]}", flush=True)
        summary = {**machine.describe(), "stages": [asdict(each) for each in outcomes]}
        (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")  # whatever becomes of the next one
    return int(any(outcome.code != 0 for outcome in outcomes))


def _verdict(outcome: Outcome) -> str:
    return "no end" if outcome.code is None else "ok" if outcome.code == 0 else f"failed ({outcome.code})"


if __name__ == "__main__":
    sys.exit(main())

"""A run's files: raw figures as JSON, the comparison as Markdown, the picture as PNG and SVG."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import msgspec

from benchmarks import compare, contestants, machine, plot
from benchmarks.measure import Run
from benchmarks.peers import catalogue


class RecordError(Exception):
    """A file that holds no run, in one line."""


def write(stem: Path, runs: Sequence[Run], seed: int) -> None:
    """STEM.json: the figures so far, with what they depend on."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    engines = {engine.name: engine.version for engine in catalogue.engines().values()}
    _write(stem, {"engines": engines, "seed": seed, "runs": [asdict(run) for run in runs]})


def summary(stem: Path, runs: Sequence[Run]) -> str:
    """Writes STEM.md, STEM.png and STEM.svg; what the first of them says."""
    text = compare.markdown(runs, contestants.absent())
    stem.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{stem}.md").write_text(text)
    plot.draw(stem, runs)
    return text


def read(file: Path) -> list[Run]:
    """Raises RecordError."""
    try:
        return msgspec.convert(json.loads(file.read_bytes())["runs"], list[Run])
    except (ValueError, KeyError) as error:
        raise RecordError(f"{file} is no record of a run: {error}") from error


def _write(stem: Path, content: dict[str, object]) -> None:
    command = ["python", "-m", "benchmarks.run", *map(machine.anywhere, sys.argv[1:])]
    record = {**machine.describe(), "command": command, **content}
    Path(f"{stem}.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")

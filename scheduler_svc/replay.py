"""`pagewire replay LOG …`: feeds a recorded log to a new engine, and proves that every answer is the recorded one."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from protos.wire import StepPlan
from scheduler_svc.engine.events import Instruction
from scheduler_svc.engine.integrity import IntegrityError
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.record_format import Entry, Header, LogError, digest, read_log, source_digest
from scheduler_svc.record_private import comparable
from scheduler_svc.record_state import StateError, restore, snapshot


@dataclass(frozen=True)
class Moment:
    """An event of the log, what the engine answers now, and the engine after it."""

    number: int  # of the event, from 1
    entry: Entry
    answer: list[Instruction]
    engine: Scheduler
    difference: str  # from what was recorded; empty where there is none

    @property
    def plans(self) -> list[StepPlan]:
        return [instruction for instruction in self.answer if isinstance(instruction, StepPlan)]


@dataclass(frozen=True)
class Result:
    events: int
    plans: int
    instructions: int
    difference: str = ""  # the first one
    error: str = ""  # that the last event brings about, as it did


class Log:
    """One log, played from its beginning. Raises LogError, OSError."""

    def __init__(self, path: Path, *, check: bool = False) -> None:
        self.path, self._check = path, check
        self.header, self._entries = read_log(path)
        try:
            self.engine = restore(self.header.state) if self.header.state else Scheduler(self.header.config)
        except StateError as error:
            raise LogError(f"{path}: {error}") from error

    def __iter__(self) -> Iterator[Moment]:
        """Once. After a difference the engine's answers mean little."""
        for number, entry in enumerate(self._entries, 1):
            answer, error = _handle(self.engine, entry)
            difference = self._difference(entry, answer, error)
            if difference:
                difference = f"event {number} ({type(entry.event).__name__}): {difference}"
            yield Moment(number, entry, answer, self.engine, difference)

    def _difference(self, entry: Entry, answer: list[Instruction], error: str) -> str:
        if entry.error or error:
            known = error.partition(":")[0] if self.header.private else error
            return "" if known == entry.error else f"raises {error or 'nothing'}; it was {entry.error or 'no error'}"
        if digest(comparable(answer) if self.header.private else answer) != entry.digest:
            return f"is now answered by {answer!r:.2000}"
        if self._check:
            try:
                self.engine.check_integrity()
            except IntegrityError as found:
                return f"after it the engine's books do not add up: {found}"
        return ""


def _handle(engine: Scheduler, entry: Entry) -> tuple[list[Instruction], str]:
    try:
        return engine.handle(entry.event), ""
    except Exception as error:  # whatever it is: that a log leads to it is the news
        return [], f"{type(error).__name__}: {error}"


def replay(log: Log) -> Result:
    """Up to the first difference. Raises LogError, OSError."""
    events = plans = instructions = 0
    error = ""
    for moment in log:
        events += 1
        plans += len(moment.plans)
        instructions += len(moment.answer)
        error = moment.entry.error
        if moment.difference:
            return Result(events, plans, instructions, moment.difference)
    return Result(events, plans, instructions, error=error)


def main(argv: Sequence[str]) -> int:
    """Exit codes: 0 all as recorded, 1 a difference or no log, 2 wrong usage."""
    arguments = _parse(argv)
    try:
        if arguments.timeline or arguments.lanes or arguments.step:
            return _show(Log(arguments.log[0]), arguments.timeline, arguments.lanes, arguments.step)
        return _prove(arguments.log, arguments.check)
    except (OSError, LogError) as error:
        return _fail(str(error))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="pagewire replay",
        description="Replays logs of `serve --record`, and those left by crashes, and compares every plan.",
    )
    parser.add_argument("log", metavar="LOG", type=Path, nargs="+", help="several: parts of one log, oldest first")
    parser.add_argument("--check", action="store_true", help="recount the engine's books after every event")
    parser.add_argument(
        "--timeline",
        choices=("seconds", "steps"),
        nargs="?",
        const="seconds",
        help="what happened, a line a second or a step",
    )
    parser.add_argument("--lanes", type=int, nargs="?", const=40, metavar="N", help="the first N requests over time")
    parser.add_argument("--step", metavar="N", help="the N-th plan of the log, or EPOCH:STEP, and the engine behind it")
    arguments = parser.parse_args(argv)
    if arguments.timeline or arguments.lanes is not None or arguments.step:
        if len(arguments.log) > 1:
            parser.error("--timeline, --lanes and --step take one LOG")
        if arguments.check:
            parser.error("--check goes with neither --timeline, --lanes nor --step")
    if arguments.lanes is not None and arguments.lanes < 1:
        parser.error(f"--lanes {arguments.lanes}: must be at least 1")
    if arguments.step and not all(part.isdecimal() for part in arguments.step.split(":", 1)):
        parser.error(f"--step {arguments.step!r} is neither N nor EPOCH:STEP")
    return arguments


def _show(log: Log, timeline: str | None, lanes: int | None, step: str | None) -> int:
    from rich.console import Console

    from scheduler_svc import replay_view

    _warn_of_another_engine(log.header)
    width = None if sys.stdout.isatty() else 160  # a file or a pipe has none
    console = Console(markup=False, highlight=False, emoji=False, width=width)
    difference = replay_view.show(console, log, timeline, lanes, step)
    return _fail(f"{log.path}: {difference}") if difference else 0


def _prove(paths: Iterable[Path], check: bool) -> int:
    before: Log | None = None
    for path in paths:
        log = Log(path, check=check)
        _warn_of_another_engine(log.header)
        if before and _follows(before.header, log.header) and snapshot(before.engine) != log.header.state:
            return _fail(f"{path}: begins with another state than {before.path} ends with")
        result = replay(log)
        if result.difference:
            return _fail(f"{path}: {result.difference}")
        counts = f"{result.events} events, {result.plans} plans, {result.instructions} instructions"
        end = f"; the last event raises {result.error}, as it did" if result.error else ""
        why = f" ({log.header.reason})" if log.header.reason else ""
        print(f"{path}{why}: {counts}: all as recorded{end}")
        before = log
    return 0


def _follows(one: Header, other: Header) -> bool:
    return one.boot == other.boot and other.part == one.part + 1


def _warn_of_another_engine(header: Header) -> None:
    if header.engine != source_digest():
        print(
            f"pagewire: the log is of engine {header.engine}, this is {source_digest()}: plans may differ",
            file=sys.stderr,
            flush=True,
        )


def _fail(line: str) -> int:
    print(f"pagewire: {line}", file=sys.stderr, flush=True)
    return 1

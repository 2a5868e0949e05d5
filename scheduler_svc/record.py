"""What the engine hears and answers: into a file, and into memory for when something goes wrong.

Each part begins with the engine's whole state, so it replays by itself, and old parts can be dropped. Of a very long
queue no state is written, since nobody would be served meanwhile; and a private log (record_private) can begin only
where no token is in it: with nobody served, and the prefix cache empty. Where a part would have to wait for such a
moment for too long, the recording pauses.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from msgspec.structs import replace

from scheduler_svc.engine.events import Event, FlushCache, Instruction, Tick, WorkerLost
from scheduler_svc.engine.scheduler import Scheduler
from scheduler_svc.engine.sequence import Sequence
from scheduler_svc.record_format import Entry, Header, digest, frame, source_digest
from scheduler_svc.record_private import Pseudonyms
from scheduler_svc.record_sinks import PARTS, FileParts, Recent, Sink
from scheduler_svc.record_state import StateError, snapshot

log = logging.getLogger(__name__)

MOST_LIVE = 2048  # sequences of a state: to write one of so many takes some 40 ms
CRASH_LOGS = 8  # in a directory, of all boots; the oldest goes when another one is written
_BEHIND = 1.0  # seconds that a log in a file may be
_APART = 60.0  # seconds between the crash logs of two lost workers


@dataclass(frozen=True)
class RecordConfig:
    file: Path | None = None
    mib: int = 256  # of all its parts, states aside
    crash_dir: Path | None = None  # for the last seconds before a worker was lost, or the engine
    crash_mib: int = 16  # of memory for them; 0: none are kept
    key: bytes = b""  # of a private log's pseudonyms; empty: logs hold what the engine was told
    clock: float = 0.0  # see Header


class Recorder:
    """Belongs to the loop's thread. Whatever fails here ends the recording, and not the service.

    Raises OSError where the file cannot be opened at all.
    """

    def __init__(self, config: RecordConfig, engine: Scheduler, boot: int, model: str) -> None:
        self._config, self._engine = config, engine
        self._pseudonyms = Pseudonyms(config.key) if config.key else None
        self._header = Header(engine.config, boot, model, source_digest(), private=bool(config.key), clock=config.clock)
        self._now = self._flushed = 0.0
        self._lost_at = -_APART
        self._dumps = 0
        self._recent = Recent((config.crash_mib << 20) // 2) if config.crash_dir and config.crash_mib else None
        self._sinks: list[Sink] = [self._recent] if self._recent else []
        if config.file:
            self._sinks.append(FileParts(config.file, (config.mib << 20) // PARTS))
        for sink in self._sinks:
            sink.begin(self._header)

    def write(self, event: Event, instructions: list[Instruction]) -> None:
        """After the engine has answered, before anything follows from it."""
        if not self._sinks:
            return
        if self._pseudonyms:
            entry = Entry(self._pseudonyms.event(event), digest(self._pseudonyms.answer(instructions)))
        else:
            entry = Entry(event, digest(instructions))
        self._append(entry)
        if type(event) is Tick:
            self._now = event.now
            if self._now - self._flushed >= _BEHIND:
                self._flushed = self._now
                self._each(lambda sink: sink.flush())
        elif type(event) is WorkerLost and not event.blameless and self._now - self._lost_at >= _APART:
            self._lost_at = self._now
            self.dump("a worker was lost", event.reason)
        if any(map(_is_due, self._sinks)):
            self._turn(has_flushed=type(event) is FlushCache)

    def raised(self, event: Event, error: Exception) -> None:
        """In place of `write`, where the engine has no answer."""
        if self._sinks:
            name = type(error).__name__
            if self._pseudonyms:
                self._append(Entry(self._pseudonyms.event(event), b"", name))
            else:
                self._append(Entry(event, b"", f"{name}: {error}"))

    def rest(self) -> bool:
        """Nobody is served: a good moment to begin another part. True where a FlushCache would make it one."""
        self._each(lambda sink: sink.flush())
        if self._pseudonyms:
            return any(_is_due(sink) for sink in self._sinks)
        self._each(lambda sink: self._begin(sink) if _is_due(sink) or sink.size >= sink.limit // 2 else None)
        return False

    def dump(self, reason: str, detail: str = "") -> None:
        """The last seconds into a file of their own, and a line that names it."""
        directory = self._config.crash_dir
        if self._recent is None or directory is None:
            return
        if detail and not self._pseudonyms:
            reason = f"{reason}: {detail}"
        if not (log := self._recent.log(reason)):
            return
        self._dumps += 1
        path = directory / f"engine-{self._header.boot:016x}-{self._dumps}.log"
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600), "wb") as file:
                file.write(log)
            _prune(directory)
        except OSError as error:
            _say(f"the last seconds before it cannot be written: {error}")
        else:
            _say(f"the last seconds before it are in {path}: `pagewire replay` runs them again")

    def close(self) -> None:
        self._each(lambda sink: sink.pause())
        self._sinks.clear()

    def _append(self, entry: Entry) -> None:
        data = frame(entry)
        self._each(lambda sink: sink.append(data))

    def _turn(self, has_flushed: bool) -> None:
        """Begins another part where that is due, if it can be now."""
        if self._pseudonyms:
            now, when = has_flushed and self._engine.idle, "nobody is served"
        else:
            now, when = self._engine.roster.num_live <= MOST_LIVE, f"no more than {MOST_LIVE} sequences are live"
        for sink in filter(_is_due, tuple(self._sinks)):
            if now:
                self._each(self._begin, sink)
            elif sink.is_open and sink.size >= 2 * sink.limit:
                _say(f"recording pauses until {when}: the log's part is twice as long as it should be")
                self._each(lambda sink: sink.pause(), sink)

    def _begin(self, sink: Sink) -> None:
        state = snapshot(self._engine, without=Sequence if self._pseudonyms else None)
        sink.begin(replace(self._header, state=state))

    def _each(self, act: Callable[[Sink], None], *some: Sink) -> None:
        for sink in some or tuple(self._sinks):
            try:
                act(sink)
            except (OSError, StateError) as error:
                _say(f"recording stops: {error}")
                self._sinks.remove(sink)
                with contextlib.suppress(OSError):  # what is buffered cannot be written, either
                    sink.pause()


def _is_due(sink: Sink) -> bool:
    return sink.size >= sink.limit or not sink.is_open


def _prune(directory: Path) -> None:
    logs = sorted(directory.glob("engine-*.log"), key=lambda path: (path.stat().st_mtime_ns, len(path.name), path.name))
    for path in logs[:-CRASH_LOGS]:
        path.unlink(missing_ok=True)


def _say(line: str) -> None:
    log.warning(line)

"""The engine's whole input as a file, and the proof that the same input gives the same plans.

header, then one frame an event: (event, digests of the instructions that answered it). A frame is msgpack behind its
length in 4 bytes, little-endian, so that a log cut short by a crash is read up to its last whole frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import msgspec

from protos.codec import DecodeError
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import Event, Instruction
from scheduler_svc.engine.scheduler import Scheduler

MAGIC = "pagewire engine log"
VERSION = 1
_encoder = msgspec.msgpack.Encoder()


class Header(msgspec.Struct, frozen=True):
    config: EngineConfig
    boot: int
    model: str
    magic: str = MAGIC
    version: int = VERSION


class Entry(msgspec.Struct, frozen=True, array_like=True):
    event: Event
    digests: list[bytes]


class LogError(Exception):
    """A file that is no engine log, in one line."""


def digest(instruction: Instruction) -> bytes:
    return blake2b(_encoder.encode(instruction), digest_size=8).digest()


class Recorder:
    """Raises OSError where the file cannot be written."""

    def __init__(self, path: Path, header: Header) -> None:
        self._file = path.open("wb")
        self._write(header)

    def write(self, event: Event, instructions: list[Instruction]) -> None:
        self._write(Entry(event, [digest(i) for i in instructions]))

    def close(self) -> None:
        self._file.close()

    def _write(self, frame: Header | Entry) -> None:
        data = _encoder.encode(frame)
        self._file.write(len(data).to_bytes(4, "little") + data)


class Replay(msgspec.Struct, frozen=True):
    """`difference` names the first event whose answer was not the recorded one; empty where there is none."""

    events: int
    instructions: int
    difference: str = ""


def read_log(path: Path) -> tuple[Header, Iterator[Entry]]:
    """Raises LogError, OSError; the iterator raises LogError at an entry that cannot be read."""
    frames = _frames(path)
    try:
        header = msgspec.msgpack.decode(next(frames, b""), type=Header)
    except DecodeError as error:
        raise LogError(f"{path}: not an engine log: {error}") from error
    if (header.magic, header.version) != (MAGIC, VERSION):
        raise LogError(f"{path}: not an engine log of version {VERSION}")
    return header, _entries(path, frames)


def replay(path: Path) -> Replay:
    """Feeds a log to a new engine and compares every instruction. Raises LogError, OSError."""
    header, entries = read_log(path)
    engine = Scheduler(header.config)
    events = instructions = 0
    for entry in entries:
        answer = engine.handle(entry.event)
        events += 1
        instructions += len(answer)
        if [digest(i) for i in answer] != entry.digests:
            what = f"event {events} ({type(entry.event).__name__}) is now answered by {answer!r:.2000}"
            return Replay(events, instructions, what)
    return Replay(events, instructions)


def _entries(path: Path, frames: Iterator[bytes]) -> Iterator[Entry]:
    decoder = msgspec.msgpack.Decoder(Entry)
    for number, frame in enumerate(frames, 1):
        try:
            yield decoder.decode(frame)
        except DecodeError as error:
            raise LogError(f"{path}: event {number} cannot be read: {error}") from error


def _frames(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while len(size := file.read(4)) == 4:
            data = file.read(int.from_bytes(size, "little"))
            if len(data) == int.from_bytes(size, "little"):
                yield data

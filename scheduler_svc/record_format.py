"""An engine log as bytes: what the engine was told, and by digests what it answered.

header, then one frame an event: (event, digest of the instructions that answered it, error). A frame is msgpack behind
its length in 4 bytes, little-endian, so that a log cut short by a crash is read up to its last whole frame.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from hashlib import blake2b
from pathlib import Path

import msgspec

from protos.codec import DecodeError
from protos.wire import Wire
from scheduler_svc.engine.config import EngineConfig
from scheduler_svc.engine.events import Event, Instruction

MAGIC = "pagewire engine log"
VERSION = 2
_encoder = msgspec.msgpack.Encoder()


class Header(msgspec.Struct, frozen=True):
    config: EngineConfig
    boot: int
    model: str
    engine: str = ""  # digest of its source: another engine may answer otherwise
    state: bytes = b""  # of the engine before the first event; empty: it was new
    part: int = 1  # of the log of this boot
    private: bool = False  # see record_private
    clock: float = 0.0  # a Tick's `now` plus this is the time of day, in seconds
    reason: str = ""  # why it was written, where it is the last seconds before something
    magic: str = MAGIC
    version: int = VERSION


class Entry(Wire, frozen=True, tag=False):
    event: Event
    digest: bytes  # of the instructions, as they would be sent; empty where there was none
    error: str = ""  # that the event brought about: it is the last one


class LogError(Exception):
    """A file that is no engine log, in one line."""


def digest(instructions: list[Instruction]) -> bytes:
    return blake2b(_encoder.encode(instructions), digest_size=8).digest() if instructions else b""


@cache
def source_digest() -> str:
    """Of the engine that runs here. Raises OSError where its source is not there to be read."""
    hasher = blake2b(digest_size=8)
    for file in sorted((Path(__file__).parent / "engine").glob("*.py")):
        hasher.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return hasher.hexdigest()


def frame(content: Header | Entry) -> bytes:
    data = _encoder.encode(content)
    return len(data).to_bytes(4, "little") + data


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


def _entries(path: Path, frames: Iterator[bytes]) -> Iterator[Entry]:
    decoder = msgspec.msgpack.Decoder(Entry)
    for number, data in enumerate(frames, 1):
        try:
            yield decoder.decode(data)
        except DecodeError as error:
            raise LogError(f"{path}: event {number} cannot be read: {error}") from error


def _frames(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while len(size := file.read(4)) == 4:
            data = file.read(int.from_bytes(size, "little"))
            if len(data) == int.from_bytes(size, "little"):
                yield data

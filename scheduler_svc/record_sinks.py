"""Where a log goes: files, part by part, or memory. A part begins with a header and can be read by itself."""

from __future__ import annotations

import os
import stat
import sys
from collections import deque
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, Protocol

from msgspec.structs import replace

from scheduler_svc.record_format import Header, frame

PARTS = 4  # of a log in files; the oldest goes when another one begins


class Sink(Protocol):
    """Between `pause` and `begin` nothing is kept of what is appended."""

    size: int  # bytes appended to the present part
    limit: int  # from which on it should end

    @property
    def is_open(self) -> bool: ...
    def begin(self, header: Header) -> None: ...
    def append(self, data: bytes) -> None: ...
    def pause(self) -> None: ...
    def flush(self) -> None: ...


class FileParts:
    """FILE is the part being written, FILE.1 the one before, and so on: also those of earlier boots.

    What is no regular file (a pipe, a device) gets one part without an end. Everything raises OSError.
    """

    def __init__(self, path: Path, limit: int) -> None:
        self._path = path
        self._rotates = not path.exists() or stat.S_ISREG(path.stat().st_mode)
        self.limit = limit if self._rotates else sys.maxsize
        self.size = 0
        self._part = 0
        self._file: BinaryIO | None = None

    @property
    def is_open(self) -> bool:
        return self._file is not None

    def begin(self, header: Header) -> None:
        self.pause()
        if self._rotates:
            self._shift()
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        self._file = os.fdopen(os.open(self._path, flags, 0o600), "wb", buffering=1 << 16)
        self._part += 1
        self._file.write(frame(replace(header, part=self._part)))
        self.size = 0

    def append(self, data: bytes) -> None:
        if self._file:
            self.size += len(data)
            self._file.write(data)

    def pause(self) -> None:
        file, self._file = self._file, None
        if file:
            file.close()

    def flush(self) -> None:
        if self._file:
            self._file.flush()

    def _shift(self) -> None:
        names = [self._path, *(self._path.with_name(f"{self._path.name}.{number}") for number in range(1, PARTS))]
        for newer, older in reversed(list(pairwise(names))):
            if newer.exists():
                newer.replace(older)


class Recent:
    """The newest part and the one before it, in memory."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._parts: deque[tuple[Header, bytearray]] = deque(maxlen=2)

    @property
    def is_open(self) -> bool:
        return bool(self._parts)

    def begin(self, header: Header) -> None:
        self._parts.append((header, bytearray()))
        self.size = 0

    def append(self, data: bytes) -> None:
        if self._parts:
            self.size += len(data)
            self._parts[-1][1].extend(data)

    def pause(self) -> None:
        self._parts.clear()

    def flush(self) -> None:
        pass

    def log(self, reason: str) -> bytes:
        """One log of both parts, since the second goes on where the first ends; empty where there is none."""
        if not self._parts:
            return b""
        return frame(replace(self._parts[0][0], reason=reason)) + b"".join(data for _, data in self._parts)

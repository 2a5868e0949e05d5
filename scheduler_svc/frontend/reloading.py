"""Files that an operator changes under a running service: certificates, tokens."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

T = TypeVar("T")
Stamp = tuple[tuple[int, int, int] | None, ...]

log = logging.getLogger(__name__)


class FileError(ValueError):
    """Files that cannot be used, in one line that names them."""


class Reloaded(Generic[T]):
    """What `load` makes of some files, made again when one of them has changed.

    A change that cannot be used is said once, and what was there stays: a slip of the hand ends no service. Any thread
    may ask. Raises what `load` raises, FileError, where there is nothing to keep yet.
    """

    def __init__(self, what: str, files: Sequence[Path], load: Callable[[], T]) -> None:
        self._what, self._files, self._load = what, files, load
        self._lock = threading.Lock()
        self._stamp = _stamp(files)  # before they are read: what changes meanwhile is read again
        self._value = load()

    def get(self) -> T:
        self.refresh()
        return self._value

    def refresh(self) -> T | None:
        """The new value, where there is one. Costs a stat a file."""
        with self._lock:
            stamp = _stamp(self._files)
            if stamp == self._stamp:
                return None
            self._stamp = stamp
            try:
                self._value = self._load()
            except FileError as error:
                log.warning("%s: the old ones stay in use: %s", self._what, error)
                return None
            log.info("%s: the new ones are in use", self._what)
            return self._value


def _stamp(files: Sequence[Path]) -> Stamp:
    """Changes with every file's content, also where a link is turned to another file, as Kubernetes does."""
    return tuple(_stamp_of(file) for file in files)


def _stamp_of(file: Path) -> tuple[int, int, int] | None:
    try:
        status = file.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

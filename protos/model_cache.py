"""Where what was made of a model is kept, for the next start: beside the model, or under the user's cache where nobody
may write there. Standard library only: the worker keeps packed weights here and the frontend its tokenizer.

    model.gguf  →  model.gguf.pagewire/NAME        directory/  →  directory/.pagewire/NAME
    otherwise   →  HOME/derived/<digest of the model's path>/NAME

A file appears whole or not at all, and whoever reads one compares the stamp that it holds with `stamp` of its sources.
Nothing is lost with any of it: it is made again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Final

HOME: Final = "~/.cache/pagewire"  # unless PAGEWIRE_HOME says otherwise

Stamp = list[list[str | int]]


def directories(model: Path, home: Path) -> tuple[Path, Path]:
    """Where files of the model at `model` may lie, the better place first. Neither need be there."""
    beside = model / ".pagewire" if model.is_dir() else model.with_name(model.name + ".pagewire")
    digest = hashlib.blake2b(os.fsencode(model.resolve()), digest_size=16).hexdigest()
    return beside, home.expanduser() / "derived" / digest


def stamp(sources: Iterable[Path]) -> Stamp:
    """Name, bytes and nanoseconds of change of every source file: of another content, one of them is another.

    Raises OSError where one is missing.
    """
    found = [(path.name, path.stat()) for path in sources]
    return [[name, status.st_size, status.st_mtime_ns] for name, status in found]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor, read and write, of an empty file that becomes `path` when the body ends without an exception.

    Several processes may do so at once: each writes a file of its own, and the last one stays. What a killed process
    left is removed. Not synced to the disk: a power cut may leave a damaged file, which its checksum tells. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*"):
        _remove_if_left(left)
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # says that its writer lives
        yield descriptor
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is locked, or somebody else removes it
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)

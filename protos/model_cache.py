"""Where what was made of a model is kept, for the next start: beside the model, or under the user's cache where nobody
may write there. Standard library only: the worker keeps packed weights here.

    model.gguf  →  model.gguf.pagewire/NAME        directory/  →  directory/.pagewire/NAME
    otherwise   →  HOME/derived/<digest of the model's path>/NAME

A file appears whole or not at all. Whoever reads one compares the stamp that it holds with `stamp` of its sources, and
where they are but `alike`, a digest of the content.
Nothing is lost with any of it: it is made again.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
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
    """Name, bytes, nanoseconds of change, and the kernel's own marks of every source file.

    Equal stamps are of the same content: who wrote to a file, or put another in its place, changed its inode or ctime,
    which nobody sets. Bytes and mtime alone tell nothing where tools set them: image layers, Nix, rsync -t.

    Raises OSError where one is missing.
    """
    found = [(path.name, path.stat()) for path in sources]
    return [[name, at.st_size, at.st_mtime_ns, at.st_ino, at.st_ctime_ns] for name, at in found]


def alike(one: Stamp, other: Stamp) -> bool:
    """Whether these may be of the same content though they are not equal: names, bytes and times are a copy's, as an
    image has one.
    """
    return [entry[:3] for entry in one] == [entry[:3] for entry in other]


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[int]:
    """A descriptor, read and write, of an empty file that becomes `path` when the body ends without an exception.

    Several processes may do so at once: each writes a file of its own, and the last one stays. What a killed process
    left is removed. Not synced to the disk: a power cut may leave a damaged file, which its checksum tells. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))  # now, and not when all is written
    for left in path.parent.glob(f".{path.name}.*"):
        _remove_if_left(left)
    unfinished, descriptor = _unfinished(path)
    try:
        yield descriptor
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    finally:
        os.close(descriptor)


def _unfinished(path: Path) -> tuple[Path, int]:
    """A new file beside `path`, locked: that says that its writer lives. Its name is nobody else's in any container:
    process ids are not.
    """
    while True:
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        descriptor = os.open(unfinished, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            if os.fstat(descriptor).st_nlink:  # before it was locked, another may have taken it for one that was left
                return unfinished, descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _remove_if_left(path: Path) -> None:
    with contextlib.suppress(OSError):  # it is locked, or somebody else removes it
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)

"""What links between scheduler and workers stand on: which endpoints need keys, and the keys, as files.

Standard library only: ZeroMQ's own functions make the pairs (`pair` is zmq.curve_keypair, `public` zmq.curve_public).

    DIR/scheduler.key      the scheduler's secret          DIR/scheduler.pub       by which workers know it
    DIR/worker.key         the secret that workers share   DIR/worker.pub          by which they are let in
    DIR/workers/NAME.pub   more keys that are let in, looked at with every connection

The scheduler makes what is missing when it starts. Workers need scheduler.pub and worker.key: in the same directory on
one host or volume, as copies on another. Whoever is not let in gets no further than the handshake.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

Pair = Callable[[], tuple[bytes, bytes]]  # → public, secret
Public = Callable[[bytes], bytes]  # of a secret

SCHEDULER: Final = "scheduler"
WORKER: Final = "worker"
DOMAIN: Final = b"pagewire"  # of ZeroMQ's authentication
_KEY: Final = re.compile(rb"[0-9a-zA-Z.\-:+=^!/*?&<>()\[\]{}@%$#]{40}")  # Z85


class CurveError(ValueError):
    """Keys or an endpoint that cannot be used, in one line."""


@dataclass(frozen=True)
class SchedulerKeys:
    directory: Path
    secret: bytes = field(repr=False)


@dataclass(frozen=True)
class WorkerKeys:
    public: bytes
    secret: bytes = field(repr=False)
    scheduler: bytes


# ---------------------------------------------------------------- endpoints


def check_endpoint(text: str) -> str:
    """Raises CurveError for what is neither ipc://PATH nor tcp://HOST:PORT."""
    host, _, port = text.removeprefix("tcp://").rpartition(":")
    is_tcp = text.startswith("tcp://") and host and (port == "*" or (port.isdecimal() and int(port) < 1 << 16))
    if not is_tcp and not text.startswith("ipc:///"):
        raise CurveError(f"{text!r} is neither ipc:///PATH nor tcp://HOST:PORT")
    return text


def needs_keys(endpoint: str) -> bool:
    """Whether others than this host can be at the other end."""
    if not endpoint.startswith("tcp://"):
        return False
    host = endpoint.removeprefix("tcp://").rpartition(":")[0]
    try:
        return not ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host != "localhost"


def from_this_host(endpoint: str) -> str:
    """Where a process of this host connects to a socket that is bound there."""
    return endpoint.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")


def check_ipc(endpoint: str) -> None:
    """Nobody else may put another socket in the place of this one. Raises CurveError."""
    directory = Path(endpoint.removeprefix("ipc://")).parent
    try:
        status = directory.stat()
    except OSError as error:
        raise CurveError(f"{endpoint}: {directory}: {error.strerror}") from error
    if status.st_mode & 0o022 or status.st_uid not in (0, os.geteuid()):
        raise CurveError(f"{endpoint}: others may write to {directory}; take a directory of mode 0700")


@contextlib.contextmanager
def private_files() -> Iterator[None]:
    """What is made inside, sockets too, is for this user alone."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


# ---------------------------------------------------------------- keys


def scheduler_keys(directory: Path, pair: Pair, public: Public) -> SchedulerKeys:
    """Made where they are missing, and the workers' with them. Raises CurveError."""
    try:
        with private_files():
            (directory / "workers").mkdir(parents=True, exist_ok=True)
            secret = _own_pair(directory, SCHEDULER, pair, public)
            _own_pair(directory, WORKER, pair, public)
    except OSError as error:
        raise CurveError(f"keys in {directory}: {error}") from error
    return SchedulerKeys(directory, secret)


def new_worker_pair(directory: Path, pair: Pair, public: Public) -> Path:
    """For a host that shall have a pair of its own: the file whose content the scheduler must know.

    Raises CurveError.
    """
    try:
        with private_files():
            directory.mkdir(parents=True, exist_ok=True)
            _own_pair(directory, WORKER, pair, public)
    except OSError as error:
        raise CurveError(f"keys in {directory}: {error}") from error
    return directory / f"{WORKER}.pub"


def worker_keys(directory: Path, public: Public) -> WorkerKeys | None:
    """None where they are not there yet: the scheduler makes them. Raises CurveError."""
    scheduler, own = directory / f"{SCHEDULER}.pub", directory / f"{WORKER}.key"
    try:
        if not (scheduler.exists() and own.exists()):
            return None
        secret = _secret(own)
        return WorkerKeys(public(secret), secret, _read(scheduler))
    except OSError as error:
        raise CurveError(f"keys in {directory}: {error}") from error


def is_let_in(directory: Path, key: bytes) -> bool:
    """Raises CurveError where the directory, or a file in it, cannot be read."""
    try:
        return any(_read(path) == key for path in [directory / f"{WORKER}.pub", *(directory / "workers").glob("*.pub")])
    except OSError as error:
        raise CurveError(f"keys in {directory}: {error}") from error


def _own_pair(directory: Path, name: str, pair: Pair, public: Public) -> bytes:
    """The secret; several processes may be at it at once, and all take the pair of the first."""
    if directory.stat().st_mode & 0o022:
        raise CurveError(f"others may write to {directory}; keys want a directory of mode 0700")
    path, beside = directory / f"{name}.key", directory / f"{name}.pub"
    if not path.exists():
        _create(path, pair()[1])
    secret = _secret(path)
    if not beside.exists():
        _create(beside, public(secret))
    if _read(beside) != public(secret):
        raise CurveError(f"{beside} does not belong to {path}: remove it, and it is made again")
    return secret


def _create(path: Path, content: bytes) -> None:
    """Whole or not at all, and only where nothing is yet."""
    descriptor, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with open(descriptor, "wb") as file:
            file.write(content + b"\n")
        with contextlib.suppress(FileExistsError):  # another process was first
            os.link(unfinished, path)
    finally:
        os.unlink(unfinished)


def _secret(path: Path) -> bytes:
    if (mode := path.stat().st_mode) & 0o037:
        raise CurveError(f"{path} is open to others (mode {mode & 0o777:04o}); it wants 0600, or 0640 at most")
    return _read(path)


def _read(path: Path) -> bytes:
    content = path.read_bytes().strip()
    if not _KEY.fullmatch(content):
        raise CurveError(f"{path} holds no key: 40 characters of Z85")
    return content

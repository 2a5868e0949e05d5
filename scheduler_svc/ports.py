"""A port that several processes of ours share, and nobody else."""

from __future__ import annotations

import errno
import socket
from typing import Any

_NOT_HERE = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)


class PortGuard:
    """Holds `port` (0: any free one) at every address of `host`, bound and never listening: no connection comes here.

    Bound alone, so that a port that anybody has is found in use, also by one who would share it; shared with this
    user's other processes from then on. Raises OSError, in one line.
    """

    def __init__(self, host: str, port: int) -> None:
        self.port = port
        self._sockets: list[socket.socket] = []
        try:
            self._hold_all(host)
        except OSError as error:
            self.close()
            raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error

    def close(self) -> None:
        for each in self._sockets:
            each.close()

    def _hold_all(self, host: str) -> None:
        """Of several addresses those that this machine has: a name may mean one of IPv6 where there is none."""
        missing: OSError | None = None
        for family, _, _, _, address in socket.getaddrinfo(host, self.port, type=socket.SOCK_STREAM):
            try:
                self._hold(family, (address[0], self.port, *address[2:]))
            except OSError as error:
                if error.errno not in _NOT_HERE:
                    raise
                missing = error
        if missing and not self._sockets:
            raise missing

    def _hold(self, family: int, address: Any) -> None:
        guard = socket.socket(family, socket.SOCK_STREAM)
        try:
            _bind(guard, address)
        except OSError:
            guard.close()
            raise
        guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        self.port = guard.getsockname()[1]
        self._sockets.append(guard)


def _bind(guard: socket.socket, address: Any) -> None:
    try:
        guard.bind(address)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        # Perhaps only old connections that have ended: those let it be used again, a listener does not.
        guard.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        guard.bind(address)

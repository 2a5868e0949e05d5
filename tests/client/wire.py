"""A network between a client and a server: connections that break, or die without a word."""

from __future__ import annotations

import contextlib
import socket
import threading
from types import TracebackType
from typing import Self

CHUNK = 1 << 16


class Wire:
    """Passes connections on to `address`. Those made after a `cut` or a `swallow` are as good as new."""

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._target = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self._open: list[_Connection] = []
        self._threads = [threading.Thread(target=self._accept)]

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self) -> None:
        """Both ends hear that it is over."""
        for connection in self._take():
            connection.close()

    def swallow(self) -> None:
        """As when a host loses its power: nothing arrives any more, in either direction, and nobody is told."""
        for connection in self._take(forget=False):
            connection.swallows.set()

    def _take(self, forget: bool = True) -> list[_Connection]:
        with self._lock:
            taken = list(self._open)
            if forget:
                self._open.clear()
        return taken

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener was closed
            while True:
                client, _ = self._listener.accept()
                try:
                    server = socket.create_connection(self._target)
                except OSError:  # nobody listens there, and so nobody does here
                    client.close()
                    continue
                connection = _Connection(client, server)
                with self._lock:
                    self._open.append(connection)
                    for ends in ((client, server), (server, client)):
                        self._threads.append(threading.Thread(target=connection.pass_on, args=ends))
                        self._threads[-1].start()

    def __enter__(self) -> Self:
        self._threads[0].start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._threads[0].join()
        self._listener.close()
        self.cut()
        for thread in self._threads[1:]:
            thread.join()


class _Connection:
    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self._ends = (client, server)
        self.swallows = threading.Event()

    def pass_on(self, source: socket.socket, target: socket.socket) -> None:
        """Until one end closes its own."""
        with contextlib.suppress(OSError):
            while data := source.recv(CHUNK):
                if not self.swallows.is_set():
                    target.sendall(data)
        if not self.swallows.is_set():
            with contextlib.suppress(OSError):
                target.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for end in self._ends:
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

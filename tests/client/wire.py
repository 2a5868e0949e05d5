"""A connection that dies without a word, as when a host loses its power."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator

CHUNK = 1 << 16


@contextlib.contextmanager
def swallowing_wire(address: str) -> Iterator[tuple[str, threading.Event]]:
    """Passes one connection on to `address`; what comes behind the event is swallowed, in both directions."""
    swallow = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener, contextlib.ExitStack() as ends:
        threads: list[threading.Thread] = []

        def accept() -> None:
            client = ends.enter_context(listener.accept()[0])
            host, _, port = address.rpartition(":")
            server = ends.enter_context(socket.create_connection((host, int(port))))
            for source, target in ((client, server), (server, client)):
                threads.append(threading.Thread(target=_pass_on, args=(source, target, swallow)))
                threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield f"127.0.0.1:{listener.getsockname()[1]}", swallow
        finally:
            accepting.join()
            swallow.set()
            for thread in threads:
                thread.join()


def _pass_on(source: socket.socket, target: socket.socket, swallow: threading.Event) -> None:
    """Until one end closes its own."""
    with contextlib.suppress(OSError):
        while data := source.recv(CHUNK):
            if not swallow.is_set():
                target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)

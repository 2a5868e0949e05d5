"""The worker's end of the link: a thread that owns the socket, so that it answers while the main thread computes."""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from protos.codec import DecodeError, decode_to_worker, encode
from protos.wire import FromWorker, Hello, ToWorker

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000
GRACE = 1.0  # seconds that the main thread gets to end by itself when a spawned worker's link is closed
_END = b""  # no message encodes to nothing


@dataclass(frozen=True)
class Closed:
    """Nobody is at the other end, and nobody will be."""

    reason: str


@dataclass(frozen=True)
class Garbled:
    """Something arrived that is no message."""

    reason: str


Received = ToWorker | Closed | Garbled


class Link:
    """`send` and `receive` belong to the main thread. A Hello goes out at every connection, the first and later ones.

    `reconnect`: a scheduler that goes away is waited for. Otherwise its going ends this process, also when the main
    thread hangs in a step.
    """

    def __init__(self, endpoint: str, hello: Hello, *, reconnect: bool) -> None:
        self._hello, self._reconnect = hello, reconnect
        self._inbox: queue.SimpleQueue[Received] = queue.SimpleQueue()
        self._ended = threading.Event()
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        self._dealer.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self._dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a scheduler that is away
        self._dealer.setsockopt(zmq.LINGER, 500)
        self._monitor = self._dealer.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)
        self._outbox, self._wake = self._context.socket(zmq.PAIR), self._context.socket(zmq.PAIR)
        self._wake.bind("inproc://outbox")
        self._outbox.connect("inproc://outbox")
        self._dealer.connect(endpoint)
        self._thread = threading.Thread(target=self._run, name="link", daemon=True)
        self._thread.start()

    def send(self, message: FromWorker) -> None:
        self._outbox.send(encode(message))

    def receive(self, timeout: float | None = None) -> Received:
        """Raises queue.Empty after `timeout` seconds."""
        return self._inbox.get(timeout=timeout)

    def close(self) -> None:
        """Sends what is left, and ends the thread."""
        self._ended.set()
        with contextlib.suppress(zmq.Again):  # the thread has ended before
            self._outbox.send(_END, zmq.DONTWAIT)
        self._thread.join()
        self._outbox.close()
        self._context.term()

    def _run(self) -> None:
        poller = zmq.Poller()
        for socket in (self._dealer, self._monitor, self._wake):
            poller.register(socket, zmq.POLLIN)
        open_ = True
        while open_:
            ready = dict(poller.poll())
            if self._monitor in ready:
                open_ = self._connection_changed()
            if self._dealer in ready:
                self._inbox.put(self._decode(self._dealer.recv_multipart()))
            if self._wake in ready:
                open_ = self._forward(self._wake.recv()) and open_
        if not self._ended.wait(GRACE):
            try:
                print(
                    "pagewire worker: the scheduler is gone, and a step does not end: exiting",
                    file=sys.stderr,
                    flush=True,
                )
            finally:
                os._exit(1)  # also where stderr has gone with the scheduler
        self._dealer.disable_monitor()
        for socket in (self._monitor, self._wake, self._dealer):
            socket.close()

    def _connection_changed(self) -> bool:
        if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED:
            self._dealer.poll(1000, zmq.POLLOUT)  # the new pipe is on its way to this thread
            return self._forward(encode(self._hello))
        if self._reconnect:
            return True
        self._inbox.put(Closed("the scheduler is gone"))
        return False

    def _forward(self, data: bytes) -> bool:
        if data == _END:
            return False
        with contextlib.suppress(zmq.Again):  # no scheduler: what it asked has ended with it
            self._dealer.send(data, zmq.DONTWAIT)
        return True

    @staticmethod
    def _decode(frames: list[bytes]) -> Received:
        try:
            return decode_to_worker(b"".join(frames))
        except DecodeError as error:
            return Garbled(f"the scheduler sent {sum(map(len, frames))} bytes that are no message: {error}")

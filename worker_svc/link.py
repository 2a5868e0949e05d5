"""The worker's end of the link. The main thread owns the socket, so that a step costs no hand-over between threads;
another one watches the connection, so that a scheduler that goes away is noticed while the main thread computes.
"""

from __future__ import annotations

import contextlib
import os
import queue
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass

import zmq
from zmq.utils.monitor import recv_monitor_message

from protos import curve
from protos.codec import DecodeError, decode_to_worker, encode
from protos.wire import FromWorker, Hello, StepPlan, StepResult, ToWorker

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000  # answered by ZeroMQ's own thread
_READABLE = int(zmq.POLLIN)  # the enumeration's own `&` is slow
_REFUSED = zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL  # ZeroMQ then tries no more
_BROKEN = zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
RETRY = 1.0  # seconds from a refusal to the next attempt: the key may be let in meanwhile
GRACE = 1.0  # seconds that the main thread gets to end by itself when a spawned worker's link is closed


@dataclass(frozen=True)
class Closed:
    """Nobody is at the other end, and nobody will be."""

    reason: str


@dataclass(frozen=True)
class Garbled:
    """Something arrived that is no message."""

    reason: str


@dataclass(frozen=True)
class Landed:
    """Of a step in flight there may be results now."""


Received = ToWorker | Closed | Garbled | Landed


class Link:
    """All but `land` belongs to the main thread. A Hello goes out at every connection, the first and
    later ones, as soon as the main thread receives. A frame is a message, and what was sent together comes together.

    `reconnect`: a scheduler that goes away is waited for. Otherwise its going ends this process, also when the main
    thread hangs in a step. With `keys`, the scheduler must be the one that they name.
    """

    def __init__(self, endpoint: str, hello: Hello, *, reconnect: bool, keys: curve.WorkerKeys | None = None) -> None:
        self._endpoint, self._hello, self._reconnect = endpoint, hello, reconnect
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        if keys:
            self._dealer.setsockopt(zmq.CURVE_SERVERKEY, keys.scheduler)
            self._dealer.setsockopt(zmq.CURVE_PUBLICKEY, keys.public)
            self._dealer.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        self._dealer.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._dealer.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self._dealer.setsockopt(zmq.RECONNECT_IVL, 50)
        self._dealer.setsockopt(zmq.RECONNECT_IVL_MAX, 1000)
        self._dealer.setsockopt(zmq.IMMEDIATE, 1)  # nothing queues up for a scheduler that is away
        self._dealer.setsockopt(zmq.LINGER, 500)
        events = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED | zmq.EVENT_MONITOR_STOPPED | _REFUSED | _BROKEN
        self._monitor = self._dealer.get_monitor_socket(events)
        self._inbox: deque[Received] = deque()  # has come, and was not received yet
        self._held: list[bytes] = []  # results on their way, see `answer`
        self._bell = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)  # rung by other threads: look at the four below
        self._connected = threading.Event()  # and not greeted yet
        self._gone = threading.Event()
        self._refused = threading.Event()  # and long enough ago
        self._landed = threading.Event()
        self._ended = threading.Event()
        self._poller = zmq.Poller()
        self._poller.register(self._dealer, zmq.POLLIN)
        self._poller.register(self._bell, zmq.POLLIN)
        self._dealer.connect(endpoint)
        self._watch = threading.Thread(target=self._watch_connection, name="link-watch", daemon=True)
        self._watch.start()

    def send(self, message: FromWorker) -> None:
        """And every result before it."""
        frames, self._held = [*self._held, encode(message)], []
        self._send(frames)

    def answer(self, result: StepResult) -> None:
        """Sends a result; perhaps with the next one, while more plans wait here than results would: whoever plans has
        to be woken, and that costs both sides more than what it is told.
        """
        self._held.append(encode(result))
        self._collect()
        if len(self._held) >= len(self._inbox) or not _needs_no_answer(self._inbox[0]):
            self._send_held()

    def receive(self, timeout: float | None = None) -> Received:
        """Raises queue.Empty after `timeout` seconds."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._connected.is_set():
                self._greet()
            if self._refused.is_set():
                self._connect_again()
            if self._landed.is_set():
                self._landed.clear()
                return Landed()
            if not self._inbox:
                self._collect()
            if self._inbox:
                return self._inbox.popleft()
            self._send_held()
            if self._gone.is_set():
                return Closed("the scheduler is gone")
            patience = None if deadline is None else max(0, 1 + int(1000 * (deadline - time.monotonic())))
            if not self._poller.poll(patience) and deadline is not None:
                raise queue.Empty
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(self._bell)

    def land(self) -> None:
        """From any thread: the main one receives Landed, before what else has come."""
        self._landed.set()
        os.eventfd_write(self._bell, 1)

    def close(self) -> None:
        """Sends what is left, and ends the watch."""
        self._ended.set()
        self._dealer.disable_monitor()
        self._watch.join()
        self._monitor.close()
        self._dealer.close()
        self._context.term()
        os.close(self._bell)

    def _connect_again(self) -> None:
        self._refused.clear()
        with contextlib.suppress(zmq.ZMQError):  # nothing is left of the old one
            self._dealer.disconnect(self._endpoint)
        self._dealer.connect(self._endpoint)

    def _greet(self) -> None:
        self._connected.clear()
        self._dealer.poll(1000, zmq.POLLOUT)  # the new pipe is on its way to this thread
        self.send(self._hello)

    def _watch_connection(self) -> None:
        said = False
        while (event := recv_monitor_message(self._monitor)["event"]) != zmq.EVENT_MONITOR_STOPPED:
            if event & (_REFUSED | _BROKEN) and not said:
                said = True
                line = "pagewire worker: the handshake fails, as when one side does not know the other's key; goes on"
                print(line, file=sys.stderr, flush=True)
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self._connected.set()
            elif not self._reconnect:
                self._gone.set()
            elif event & _REFUSED and not self._ended.wait(RETRY):
                self._refused.set()
            os.eventfd_write(self._bell, 1)
            if self._gone.is_set() and not self._ended.wait(GRACE):
                self._exit()

    @staticmethod
    def _exit() -> None:
        try:
            print(
                "pagewire worker: the scheduler is gone, and a step does not end: exiting", file=sys.stderr, flush=True
            )
        finally:
            os._exit(1)  # also where stderr has gone with the scheduler

    def _collect(self) -> None:
        """What has come, into the inbox."""
        while int(self._dealer.getsockopt(zmq.EVENTS)) & _READABLE:  # an exception where nothing has come costs more
            more = True
            while more:
                frame = self._dealer.recv(zmq.DONTWAIT, copy=False)  # it knows of `more`: no option to be asked
                self._inbox.append(_decode(frame.bytes))
                more = frame.more

    def _send_held(self) -> None:
        if self._held:
            frames, self._held = self._held, []
            self._send(frames)

    def _send(self, frames: list[bytes]) -> None:
        with contextlib.suppress(zmq.Again):  # no scheduler: what it asked has ended with it
            self._dealer.send_multipart(frames, zmq.DONTWAIT)


def _decode(frame: bytes) -> Received:
    try:
        return decode_to_worker(frame)
    except DecodeError as error:
        return Garbled(f"the scheduler sent {len(frame)} bytes that are no message: {error}")


def _needs_no_answer(message: Received) -> bool:
    """A plan that can be followed before the scheduler knows the result of the one before. A mask needs that (R3)."""
    return isinstance(message, StepPlan) and not any(row.masked for row in message.rows)

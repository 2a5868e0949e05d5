"""A frontend process's end of its link to the engine, on the event loop of its calls."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq
from zmq.utils.monitor import recv_monitor_message

from protos.codec import DecodeError, decode_to_frontend, encode
from protos.engine_wire import FrontendBeat, FrontendHello, FrontendStop, ToEngine, ToFrontend
from scheduler_svc.worker_socket import HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS

BEAT = 1.0  # seconds
_READABLE = int(zmq.POLLIN)
_AT_ONCE = 64  # messages between two looks at the calls


class EngineSocket:
    """Belongs to the event loop's thread, and blocks nowhere: what cannot go out yet, waits in ZeroMQ.

    `take` gets what has come together. `ended` is why this frontend shall end: a FrontendStop, or that the engine is
    gone, in words.
    """

    def __init__(
        self, endpoint: str, frontend: str, take: Callable[[list[ToFrontend]], None], loop: asyncio.AbstractEventLoop
    ) -> None:
        self._frontend, self._take, self._loop = frontend, take, loop
        self.ended: asyncio.Future[FrontendStop | str] = loop.create_future()
        self._context = zmq.Context()
        self._dealer = self._context.socket(zmq.DEALER)
        for option, value in (
            (zmq.SNDHWM, 0),  # bounded by the calls that are open
            (zmq.RCVHWM, 0),
            (zmq.LINGER, 200),
            (zmq.HEARTBEAT_IVL, HEARTBEAT_MS),
            (zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS),
        ):
            self._dealer.setsockopt(option, value)
        self._monitor = self._dealer.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._dealer.connect(endpoint)
        self._reading = False  # `_read` is on its way
        self._beating: asyncio.TimerHandle | None = None
        for socket, read in ((self._dealer, self._read), (self._monitor, self._look)):
            loop.add_reader(_descriptor(socket), read)  # tells of changes, each only once: see `_read_soon`
        self._read_soon()  # and nothing is told to whoever has not found it empty once
        self._look()
        self.send(FrontendHello(frontend))  # before any call: of one that it does not know the engine hears nothing

    def begin(self) -> None:
        """This frontend takes calls, and from now on gives signs of life."""
        self._beat()

    def send(self, message: ToEngine) -> None:
        self._dealer.send(encode(message), zmq.DONTWAIT)
        self._read_soon()  # sending may have taken the descriptor's word that there is something to read

    def close(self) -> None:
        if self._beating:
            self._beating.cancel()
        for socket in (self._dealer, self._monitor):
            self._loop.remove_reader(_descriptor(socket))
        self._dealer.disable_monitor()
        self._monitor.close()
        self._dealer.close()
        self._context.term()

    def _beat(self) -> None:
        self.send(FrontendBeat(self._frontend))
        self._beating = self._loop.call_later(BEAT, self._beat)

    def _read_soon(self) -> None:
        if not self._reading and self._is_readable():
            self._reading = True
            self._loop.call_soon(self._read)

    def _is_readable(self) -> bool:
        return not self._dealer.closed and bool(int(self._dealer.getsockopt(zmq.EVENTS)) & _READABLE)

    def _read(self) -> None:
        self._reading = False
        for _ in range(_AT_ONCE):
            if not self._is_readable():
                return
            self._deliver(self._dealer.recv_multipart())
        self._read_soon()

    def _deliver(self, frames: list[bytes]) -> None:
        batch: list[ToFrontend] = []
        for frame in frames:
            try:
                message = decode_to_frontend(frame)
            except DecodeError as error:
                self._end(f"the engine sent {len(frame)} bytes that are no message: {error}")
                return
            if isinstance(message, FrontendStop):
                self._end(message)
            else:
                batch.append(message)
        if batch:
            self._take(batch)

    def _look(self) -> None:
        while not self._monitor.closed and int(self._monitor.getsockopt(zmq.EVENTS)) & _READABLE:
            if recv_monitor_message(self._monitor)["event"] == zmq.EVENT_DISCONNECTED:
                self._end("the engine is gone")

    def _end(self, why: FrontendStop | str) -> None:
        if not self.ended.done():
            self.ended.set_result(why)


def _descriptor(socket: zmq.Socket[bytes]) -> int:
    return int(socket.getsockopt(zmq.FD))

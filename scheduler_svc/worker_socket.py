"""The scheduler's end of the links to workers (and to frontends): a ROUTER socket, and word of who has gone."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import zmq
from zmq.utils.monitor import recv_monitor_message

from protos import curve
from protos.codec import DecodeError, decode_from_worker, encode
from protos.wire import FromWorker, Wire

HEARTBEAT_MS, HEARTBEAT_TIMEOUT_MS = 1000, 5000
_LARGEST = 64 << 20  # bytes of a message that is read at all; 100,000 tokens with prompt logprobs are half of it
_HANDSHAKE_MS = 10_000  # for strangers who connect and say nothing


@dataclass(frozen=True)
class Gone:
    """The peer's connection has ended."""


@dataclass(frozen=True)
class Garbled:
    """The peer sent something that is no message."""

    reason: str


Heard = FromWorker | Gone | Garbled
Message = TypeVar("Message")


class RouterSocket(Generic[Message]):
    """A frame is a message; what is sent together comes together. With `keys`, only peers that are let in get through
    the handshake, and what crosses the wire is encrypted.

    Raises OSError where the endpoint cannot be bound, CurveError where it would be open to others.
    """

    def __init__(
        self, endpoint: str, decode: Callable[[bytes], Message], whom: str, keys: curve.SchedulerKeys | None = None
    ) -> None:
        if endpoint.startswith("ipc://"):
            curve.check_ipc(endpoint)
        elif keys is None and curve.needs_keys(endpoint):
            raise curve.CurveError(f"{endpoint}: others than this host can connect, which needs keys")
        self._decode_message = decode
        self._context = zmq.Context()
        self.router = self._context.socket(zmq.ROUTER)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.setsockopt(zmq.SNDHWM, 0)  # what is in flight is bounded by the engine's depth
        self.router.setsockopt(zmq.LINGER, 200)
        self.router.setsockopt(zmq.MAXMSGSIZE, _LARGEST)
        self.router.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        # With a domain, ZMTP 1 and 2 are refused: random bytes pass for them, their messages know no connection, and
        # libzmq 4.3.5 aborts the process if such a handshake comes while the socket is closed.
        self.router.setsockopt(zmq.ZAP_DOMAIN, curve.DOMAIN)
        self.router.setsockopt(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self.router.setsockopt(zmq.HEARTBEAT_TIMEOUT, HEARTBEAT_TIMEOUT_MS)
        self.monitor = self.router.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        self._peers: dict[int, bytes] = {}  # by the connection's file descriptor, which is all that the monitor tells
        self._door = _Door(self._context, self.router, keys) if keys else None
        try:
            with curve.private_files():
                self.router.bind(endpoint)
        except zmq.ZMQError as error:
            self.close()
            raise OSError(error.errno, f"cannot listen for {whom} at {endpoint}: {error.strerror}") from error
        self.endpoint: str = self.router.getsockopt_string(zmq.LAST_ENDPOINT)

    def hear(self) -> Iterator[tuple[bytes, Message | Gone | Garbled]]:
        """What one peer has sent together, if anything; another's end before any newcomer's words."""
        try:
            frames = self._receive()
        except zmq.Again:
            return
        peer, connection = frames[0].bytes, frames[-1].get(zmq.SRCFD)
        if self._peers.get(connection) != peer:
            yield from self.gone()  # perhaps whoever had this descriptor before
            self._peers[connection] = peer
        for frame in frames[1:]:
            yield peer, self._decode(frame)

    def gone(self) -> Iterator[tuple[bytes, Gone]]:
        """Whose connections have ended."""
        with contextlib.suppress(zmq.Again):
            while True:
                connection = recv_monitor_message(self.monitor, zmq.DONTWAIT)["value"]
                if peer := self._peers.pop(connection, None):
                    yield peer, Gone()

    def _receive(self) -> list[zmq.Frame]:
        """As recv_multipart, which asks the socket for what each frame knows."""
        frames = [self.router.recv(zmq.DONTWAIT, copy=False)]
        while frames[-1].more:
            frames.append(self.router.recv(zmq.DONTWAIT, copy=False))
        return frames

    def send(self, peer: bytes, *messages: Wire) -> bool:
        """False where the peer is not connected any more."""
        return self.send_all((peer,), *messages)

    def send_all(self, peers: Sequence[bytes], *messages: Wire) -> bool:
        """The same bytes to each. False where one of them is not connected any more."""
        frames = [*map(encode, messages)]
        return all(self._send(peer, frames) for peer in peers)

    def _send(self, peer: bytes, frames: list[bytes]) -> bool:
        try:
            self.router.send_multipart((peer, *frames), zmq.DONTWAIT)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EHOSTUNREACH, zmq.EAGAIN):
                raise
            return False
        return True

    def close(self) -> None:
        self.router.disable_monitor()
        self.monitor.close()
        self.router.close()
        if self._door:
            self._door.close()
        self._context.term()

    def _decode(self, frame: zmq.Frame) -> Message | Garbled:
        try:
            return self._decode_message(frame.bytes)
        except DecodeError as error:
            return Garbled(f"{len(frame)} bytes that are no message: {error}")


class WorkerSocket(RouterSocket[FromWorker]):
    """Where workers connect."""

    def __init__(self, endpoint: str, keys: curve.SchedulerKeys | None = None) -> None:
        super().__init__(endpoint, decode_from_worker, "workers", keys)


class _Door:
    """Lets workers in by their public keys. A thread of pyzmq's asks, so that strangers do not keep the loop busy."""

    def __init__(
        self, context: zmq.Context[zmq.Socket[bytes]], router: zmq.Socket[bytes], keys: curve.SchedulerKeys
    ) -> None:
        from zmq.auth.thread import ThreadAuthenticator

        self._directory, self._refused = keys.directory, 0
        router.setsockopt(zmq.CURVE_SERVER, 1)
        router.setsockopt(zmq.CURVE_SECRETKEY, keys.secret)
        router.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # nobody is let in while nobody asks
        self._authenticator = ThreadAuthenticator(context)
        self._authenticator.configure_curve_callback(curve.DOMAIN.decode(), self)
        self._authenticator.start()

    def callback(self, domain: str, key: bytes) -> bool:
        """pyzmq's, in its thread, for every handshake that a key was shown in."""
        try:
            reason = "" if curve.is_let_in(self._directory, key) else "its key is not known here"
        except curve.CurveError as error:
            reason = str(error)
        if reason:
            self._refused += 1
            if self._refused.bit_count() == 1:  # the 1st, 2nd, 4th, 8th … so that nobody fills a disk
                line = f"pagewire: worker {key.decode()} was refused: {reason} ({self._refused} so far)"
                print(line, file=sys.stderr, flush=True)
        return not reason

    def close(self) -> None:
        self._authenticator.stop()

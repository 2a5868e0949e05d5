"""The engine's end of the links to frontends that are processes: who is there, what they say, who has gone silent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import zmq

from protos.codec import decode_to_engine
from protos.engine_wire import (
    Answer,
    FrontendBeat,
    FrontendHello,
    FrontendLost,
    FrontendStop,
    KvEvents,
    Observed,
    Outputs,
    ServiceStatus,
    ToEngine,
    ToFrontend,
)
from scheduler_svc import metrics
from scheduler_svc.worker_socket import Garbled, Gone, RouterSocket

SILENCE = 30.0  # seconds without a word, of which one is due each second: then a frontend is taken to hang
_AT_ONCE = 256  # messages that are heard between two looks at the workers


@dataclass(frozen=True)
class Listening:
    """A frontend takes calls: its first beat says so."""

    frontend: str


@dataclass(frozen=True)
class Lost:
    """Its requests have ended. Its process may live."""

    frontend: str
    reason: str


Notice = Listening | Lost | ServiceStatus


class FrontendSocket:
    """Belongs to the loop's thread, where `notify` hears what whoever keeps the processes has to know.

    Raises OSError where the endpoint cannot be opened.
    """

    def __init__(self, endpoint: str, notify: Callable[[Notice], None], silence: float = SILENCE) -> None:
        self._socket = RouterSocket(endpoint, _decode, "frontends")
        self._notify, self._silence = notify, silence
        self._names: dict[bytes, str] = {}  # by peer
        self._peers: dict[str, bytes] = {}  # by name
        self._heard: dict[bytes, float] = {}  # when, by peer; the longest silent first
        self._beating: set[bytes] = set()

    @property
    def endpoint(self) -> str:
        return self._socket.endpoint

    @property
    def deadline(self) -> float | None:
        """When `hear` has something to do by the clock alone."""
        return next(iter(self._heard.values())) + self._silence if self._heard else None

    def register(self, poller: zmq.Poller) -> None:
        for source in (self._socket.router, self._socket.monitor):
            poller.register(source, zmq.POLLIN)

    def hear(self, ready: set[object], now: float) -> Iterator[ToEngine]:
        if self._socket.monitor in ready:
            for peer, gone in self._socket.gone():
                yield from self._take(peer, gone, now)
        if self._socket.router in ready:
            for _ in range(_AT_ONCE):
                heard = list(self._socket.hear())
                if not heard:
                    break
                for peer, message in heard:
                    yield from self._take(peer, message, now)
        while (deadline := self.deadline) is not None and deadline <= now:
            yield from self._lose(next(iter(self._heard)), f"nothing was heard of it for {self._silence:g} s")

    def post(self, batch: list[ToFrontend]) -> None:
        """To each what is its own, in one message, and to all what names nobody."""
        letters: dict[str, list[ToFrontend]] = {name: [] for name in self._peers}
        for message in batch:
            match message:
                case Outputs(frontend=name) | Answer(frontend=name) | KvEvents(frontend=name):
                    if name in letters:
                        letters[name].append(message)
                case ServiceStatus() | FrontendStop():
                    for letter in letters.values():
                        letter.append(message)
                    if isinstance(message, ServiceStatus):
                        self._notify(message)
        for name, letter in letters.items():
            if letter:
                self._socket.send(self._peers[name], *letter)  # one that has gone is heard of by its connection's end

    def close(self) -> None:
        self._socket.close()

    def _take(self, peer: bytes, message: ToEngine | Gone | Garbled, now: float) -> Iterator[ToEngine]:
        match message:
            case Gone():
                yield from self._lose(peer, "its connection broke")
                return
            case Garbled(reason):
                yield from self._lose(peer, f"it sent {reason}")
                return
            case FrontendHello(name) if peer not in self._names and name not in self._peers:
                self._names[peer], self._peers[name] = name, peer
            case FrontendBeat() if peer in self._names and peer not in self._beating:
                self._beating.add(peer)
                self._notify(Listening(self._names[peer]))
        if peer in self._names:
            self._heard.pop(peer, None)
            self._heard[peer] = now
            if not isinstance(message, FrontendBeat):
                yield message

    def _lose(self, peer: bytes, reason: str) -> Iterator[ToEngine]:
        if name := self._names.pop(peer, ""):
            del self._peers[name], self._heard[peer]
            self._beating.discard(peer)
            self._notify(Lost(name, reason))
            yield FrontendLost(name)


def _decode(data: bytes) -> ToEngine:
    message = decode_to_engine(data)
    if isinstance(message, Observed):
        metrics.check(message.stats)
    return message

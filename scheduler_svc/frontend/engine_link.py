"""The frontend's end of the link to the engine. In one process its transport is a queue; the messages are the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Protocol

from protos.wire import (
    Abort,
    Answer,
    Ask,
    FinishReason,
    Outputs,
    Question,
    ServiceStatus,
    Submit,
    ToEngine,
    ToFrontend,
    TokenDelta,
)


class Transport(Protocol):
    """Carries messages to the engine. `send` may be called from the event loop's thread only, and never blocks."""

    def send(self, message: ToEngine) -> None: ...


Sink = Callable[[TokenDelta], None]


class EngineLink:
    """Routes a frontend's messages: one sink a running request, one future a question.

    Lives in the event loop's thread; whoever receives from the engine calls `deliver` there.
    """

    def __init__(self, frontend: str = "") -> None:
        self.frontend = frontend
        self.status: ServiceStatus | None = None  # the newest seen
        self._transport: Transport | None = None
        self._sinks: dict[str, Sink] = {}
        self._futures: dict[int, asyncio.Future[Answer]] = {}
        self._tokens = itertools.count(1)
        self._watchers: list[Callable[[ServiceStatus], None]] = []

    def connect(self, transport: Transport) -> None:
        self._transport = transport

    def on_status(self, watcher: Callable[[ServiceStatus], None]) -> None:
        """`watcher` is called with every new status, in the event loop's thread."""
        self._watchers.append(watcher)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._sinks

    def __len__(self) -> int:
        return len(self._sinks)

    def submit(self, submits: Iterable[Submit], sink: Sink) -> None:
        """`sink` gets every TokenDelta of the request until `forget`. The caller has checked that the id is new here."""
        for message in submits:
            self._sinks[message.request_id] = sink
            self._send(message)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORTED, index: int = -1) -> None:
        self._send(Abort(request_id, reason, index))

    def forget(self, request_id: str) -> None:
        self._sinks.pop(request_id, None)

    async def ask(self, question: Question, request_id: str = "") -> Answer:
        token = next(self._tokens)
        future = self._futures[token] = asyncio.get_running_loop().create_future()
        self._send(Ask(token, question, request_id, self.frontend))
        try:
            return await future
        finally:
            del self._futures[token]

    def deliver(self, message: ToFrontend) -> None:
        match message:
            case Outputs(items=items):
                for delta in items:
                    if sink := self._sinks.get(delta.request_id):
                        sink(delta)
            case Answer(token=token):
                if (future := self._futures.get(token)) and not future.done():
                    future.set_result(message)
            case ServiceStatus():
                self.status = message
                for watcher in self._watchers:
                    watcher(message)

    def _send(self, message: ToEngine) -> None:
        assert self._transport is not None, "connect comes first"
        self._transport.send(message)

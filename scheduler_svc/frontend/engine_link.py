"""The frontend's end of the link to the engine. In one process its transport is a queue; the messages are the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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


@dataclass(slots=True)
class Route:
    """One call's way. Its id may belong to a newer call once `unfinished` is 0, so what ends a call goes by this."""

    sink: Sink | None  # None: nobody listens any more
    unfinished: int  # indices that the engine has not finished

    def forget(self) -> None:
        self.sink = None


class EngineLink:
    """Routes a frontend's messages: one sink a running request, one future a question.

    Lives in the event loop's thread; whoever receives from the engine calls `deliver` there.
    """

    def __init__(self, frontend: str = "") -> None:
        self.frontend = frontend
        self.status: ServiceStatus | None = None  # the newest seen
        self._transport: Transport | None = None
        self._routes: dict[str, Route] = {}
        self._futures: dict[int, asyncio.Future[Answer]] = {}
        self._tokens = itertools.count(1)
        self._watchers: list[Callable[[ServiceStatus], None]] = []

    def connect(self, transport: Transport) -> None:
        self._transport = transport

    def on_status(self, watcher: Callable[[ServiceStatus], None]) -> None:
        """`watcher` is called with every new status, in the event loop's thread."""
        self._watchers.append(watcher)

    def __contains__(self, request_id: str) -> bool:
        """Whether the id is taken: a request that was aborted keeps it until the engine has ended every index.

        Otherwise what the engine had already sent for the old request would reach a new one of the same id.
        """
        return request_id in self._routes

    def __len__(self) -> int:
        return len(self._routes)

    def submit(self, submits: Sequence[Submit], sink: Sink) -> Route:
        """`sink` gets every TokenDelta of the request until `forget`. The caller checks that the id is new here."""
        route = self._routes[submits[0].request_id] = Route(sink, len(submits))
        for message in submits:
            self._send(message)
        return route

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORTED, index: int = -1) -> None:
        self._send(Abort(request_id, reason, index))

    async def ask(self, question: Question, request_id: str = "") -> Answer:
        token = next(self._tokens)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._futures[token] = future
        self._send(Ask(token, question, request_id, self.frontend))
        try:
            return await future
        finally:
            del self._futures[token]

    def deliver(self, message: ToFrontend) -> None:
        match message:
            case Outputs(items=items):
                for delta in items:
                    self._route(delta)
            case Answer(token=token, status=status):
                self._see(status)
                if (future := self._futures.get(token)) and not future.done():
                    future.set_result(message)
            case ServiceStatus():
                self._see(message)

    def _route(self, delta: TokenDelta) -> None:
        route = self._routes.get(delta.request_id)
        if route is None:
            return
        if route.sink:
            route.sink(delta)
        if delta.finish_reason is not None:
            route.unfinished -= 1
            if route.unfinished == 0:
                del self._routes[delta.request_id]

    def _see(self, status: ServiceStatus) -> None:
        self.status = status
        for watcher in self._watchers:
            watcher(status)

    def _send(self, message: ToEngine) -> None:
        assert self._transport is not None, "connect comes first"
        self._transport.send(message)

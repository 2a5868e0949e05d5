"""The frontend's end of the link to the engine. In one process its transport is a queue; the messages are the same."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from protos.engine_wire import (
    Abort,
    Adapter,
    Answer,
    Ask,
    FinishReason,
    FrontendStats,
    KvEvents,
    Observed,
    Outputs,
    Question,
    ServiceStatus,
    Shed,
    Submit,
    ToEngine,
    ToFrontend,
    TokenDelta,
    WatchKv,
)


class Transport(Protocol):
    """Carries messages to the engine. `send` may be called from the event loop's thread only, and never blocks."""

    def send(self, message: ToEngine) -> None: ...


class Receiver(Protocol):
    """A call, as the link sees it. It serves every other call too: so nothing may escape from either."""

    def take(self, deltas: Sequence[TokenDelta]) -> None:
        """What has come. It need not go on to the client before `wake`."""

    def wake(self) -> None: ...


@dataclass(slots=True, eq=False)
class Route:
    """One call's way. Its id may belong to a newer call once `unfinished` is 0, so what ends a call goes by this."""

    receiver: Receiver | None  # None: nobody listens any more
    unfinished: int  # indices that the engine has not finished
    looks: bool  # the receiver looks at each delta as it comes, and may end the stream by it
    gathered: list[TokenDelta] = field(default_factory=list)
    begun: set[int] = field(default_factory=set)  # indices that have brought a token

    def forget(self) -> None:
        self.receiver = None

    def hurries(self, delta: TokenDelta) -> bool:
        """An index's first tokens, and its end, wait for nobody."""
        return delta.finish_reason is not None or delta.index not in self.begun

    def hand_over(self) -> None:
        gathered, self.gathered = self.gathered, []
        if self.receiver and gathered:
            self.receiver.take(gathered)


class EngineLink:
    """Routes a frontend's messages: one receiver a running request, one future a question.

    Lives in the event loop's thread; whoever receives from the engine calls `take` there for every message, and `flush`
    as often as calls shall write what hurries nobody (see Courier). `deliver` is both.
    """

    def __init__(self, frontend: str = "") -> None:
        self.frontend = frontend
        self.status: ServiceStatus | None = None  # the newest seen
        self._transport: Transport | None = None
        self._routes: dict[str, Route] = {}
        self._waiting: dict[Route, None] = {}  # for `flush`, in the order of their first deltas
        self._futures: dict[int, asyncio.Future[Answer]] = {}
        self._tokens = itertools.count(1)
        self._watchers: list[Callable[[ServiceStatus], None]] = []
        self._kv_watcher: Callable[[KvEvents], None] | None = None
        self._reported: FrontendStats | None = None
        self.observe: Callable[[], FrontendStats] | None = None  # what this frontend has seen of its clients

    def connect(self, transport: Transport) -> None:
        self._transport = transport

    def on_status(self, watcher: Callable[[ServiceStatus], None]) -> None:
        """`watcher` is called with every new status, in the event loop's thread."""
        self._watchers.append(watcher)

    def on_kv_events(self, watcher: Callable[[KvEvents], None]) -> None:
        """`watcher` is called with whatever follows from `watch_kv`, in the event loop's thread."""
        self._kv_watcher = watcher

    def watch_kv(self, watcher: int) -> None:
        """See WatchKv."""
        self._send(WatchKv(watcher, self.frontend))

    def __contains__(self, request_id: str) -> bool:
        """Whether the id is taken: a request that was aborted keeps it until the engine has ended every index.

        Otherwise what the engine had already sent for the old request would reach a new one of the same id.
        """
        return request_id in self._routes

    def __len__(self) -> int:
        return len(self._routes)

    def submit(self, submits: Sequence[Submit], receiver: Receiver, looks: bool = False) -> Route:
        """`receiver` gets every TokenDelta of the request until `forget`. The caller checks that the id is new here."""
        route = self._routes[submits[0].request_id] = Route(receiver, len(submits), looks)
        for message in submits:
            self._send(message)
        return route

    def tell_shed(self, shed: Shed) -> None:
        self._send(shed)

    def abort(
        self, request_id: str, reason: FinishReason = FinishReason.ABORTED, index: int = -1, everywhere: bool = False
    ) -> None:
        """Of this frontend's own request: another may have one of the same id. `everywhere`: whosever it is."""
        self._send(Abort(request_id, reason, index, "" if everywhere else self.frontend))

    async def ask(
        self, question: Question, request_id: str = "", tenant: str | None = None, adapter: Adapter | None = None
    ) -> Answer:
        token = next(self._tokens)
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._futures[token] = future
        if question is Question.STATS:
            self.report()  # so that the answer has it
        self._send(Ask(token, question, request_id, self.frontend, tenant, adapter))
        try:
            return await future
        finally:
            del self._futures[token]

    def report(self) -> None:
        """Tells the engine's loop what this frontend has seen, if it is news: the sum of all is asked for there."""
        if self.observe and (seen := self.observe()) != self._reported:
            self._reported = seen
            self._send(Observed(self.frontend, seen))

    def deliver(self, message: ToFrontend) -> None:
        self.take(message)
        self.flush()

    def hurries(self, message: ToFrontend) -> bool:
        """Whether it should be taken at once. May be asked from another thread: it only looks, and an answer that is
        late by a message costs that message some milliseconds, or saves it some.
        """
        if isinstance(message, KvEvents):
            return message.watcher != 0
        if not isinstance(message, Outputs):
            return True
        routes = self._routes
        for delta in message.items:
            route = routes.get(delta.request_id)
            if route and (route.looks or route.hurries(delta)):
                return True
        return False

    def flush(self) -> bool:
        """All calls may write what has come for them. False where nothing has."""
        waiting, self._waiting = self._waiting, {}
        for route in waiting:
            route.hand_over()
            if route.receiver:
                route.receiver.wake()
        return bool(waiting)

    def take(self, message: ToFrontend) -> None:
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
            case KvEvents():
                if self._kv_watcher:
                    self._kv_watcher(message)

    def _route(self, delta: TokenDelta) -> None:
        route = self._routes.get(delta.request_id)
        if route is None:
            return
        route.gathered.append(delta)
        hurries = route.hurries(delta)
        if hurries or route.looks:
            route.hand_over()
        if hurries:
            self._waiting.pop(route, None)
            if delta.token_ids:
                route.begun.add(delta.index)
            if route.receiver:
                route.receiver.wake()
        else:
            self._waiting[route] = None
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

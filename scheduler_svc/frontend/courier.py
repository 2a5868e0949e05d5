"""Between the event loop's thread and the engine's.

To the engine: what one turn of the event loop has for it at once, or a few of them at a time. Of a thousand calls that
come together it would otherwise hear a thousand times, and the two threads take the interpreter from each other at
each; and if it heard of all together, a turn that takes seconds would leave the workers idle for as long.

To the event loop: at once what somebody waits for, the rest a few times a second. A stream that is read by a person is
as good with forty messages a second as with five hundred, and each message costs a writer, a system call and the
client's own work. So the tokens of all calls go out together, at most once an interval.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from protos.engine_wire import Outputs, ToEngine, ToFrontend
from scheduler_svc.frontend.engine_link import EngineLink


class Postbag:
    """An EngineLink's transport, in the event loop's thread. `call_soon` is the event loop's."""

    FULL = 32  # messages: as many calls as that are taken in within some 20 ms

    def __init__(self, send: Callable[..., None], call_soon: Callable[[Callable[[], None]], object]) -> None:
        self._send, self._call_soon = send, call_soon
        self._messages: list[ToEngine] = []

    def send(self, message: ToEngine) -> None:
        if not self._messages:
            self._call_soon(self._empty)
        self._messages.append(message)
        if len(self._messages) == self.FULL:
            self._empty()

    def _empty(self) -> None:
        messages, self._messages = self._messages, []
        if messages:
            self._send(*messages)


class Courier:
    """`post` belongs to the engine's thread, the rest to the event loop's.

    While a pause lasts, posts wait for its end, unless one hurries. `call_soon` is the event loop's thread-safe one.
    `interval` in seconds; 0 takes everything at once.
    """

    def __init__(
        self,
        link: EngineLink,
        interval: float,
        call_soon: Callable[[Callable[[], None]], object],
        call_later: Callable[[float, Callable[[], None]], object],
    ) -> None:
        self._link, self._interval, self._call_soon, self._call_later = link, interval, call_soon, call_later
        self._posted: deque[list[ToFrontend]] = deque()
        self._called = False  # `_collect` is on its way
        self._pausing = False  # … or `_end_pause`

    def post(self, batch: list[ToFrontend]) -> None:
        self._posted.append(batch)  # before the looks at what the other thread resets before it collects
        if self._called or (self._pausing and not any(map(self._link.hurries, batch))):
            return
        self._called = True
        self._call_soon(self._collect)

    def _collect(self) -> None:
        self._called = False
        brought_tokens = self._take()
        if self._pausing:
            return
        self._link.flush()
        if brought_tokens and self._interval and len(self._link):
            self._pause()

    def _end_pause(self) -> None:
        self._pausing = False
        self._take()
        if self._link.flush():
            self._pause()

    def _pause(self) -> None:
        self._pausing = True
        self._call_later(self._interval, self._end_pause)

    def _take(self) -> bool:
        """Whether tokens were among it."""
        brought = False
        for _ in range(len(self._posted)):
            for message in self._posted.popleft():
                brought = brought or isinstance(message, Outputs)
                self._link.take(message)
        return brought

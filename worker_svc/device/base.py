"""The few calls of an accelerator that a step is made of, so that what overlaps with what can be tested without one.

Work goes to a stream and is done later: in order within the stream, in any order beside other streams, unless one has
been told to wait for an event of the other. The host sees what a stream has done when it has waited for an event behind
it, and not before. Each piece of work names what it reads and writes: an accelerator needs no such list, and runs the
same without; the device of the tests checks every access by it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Work = Callable[[], None]


class Buffer(Protocol):
    """Memory that lives as long as its device: of the host, pinned, or of the device. `name` is for messages.

    `memory`: what `Work` computes with, a numpy array or a torch tensor.
    """

    name: str

    @property
    def memory(self) -> Any: ...


class HostBuffer(Buffer, Protocol):
    """What the host touches itself, between streams that may still be at it: only through these."""

    def fill(self, values: Array) -> None:
        """Writes `values` from the buffer's begin. The host must know that nobody reads it any more."""

    def read(self, count: int) -> Array:
        """A copy of the first `count` elements. The host must know that they have been written."""


class Event(Protocol):
    """A moment of a stream."""

    def wait(self) -> None:
        """The host waits until it has come."""

    def has_come(self) -> bool: ...


class Graph(Protocol):
    """Work that was captured, and is launched again as one."""

    def replay(self) -> None:
        """Into the stream that it was captured on."""


class Stream(Protocol):
    def run(self, work: Work, *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()) -> None: ...

    def copy(self, to: Buffer, of: Buffer, count: int) -> None:
        """The first `count` elements. One of the two is the host's, or none."""

    def record(self) -> Event: ...

    def wait(self, event: Event) -> None:
        """What is launched here from now on begins after `event`. The host goes on."""

    def capture(self, work: Work, *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()) -> Graph:
        """Nothing is computed yet. `work` may name no memory that moves, and nothing in it may wait for the host."""


class Device(Protocol):
    def stream(self, name: str) -> Stream: ...

    def host(self, name: str, size: int, dtype: np.dtype[Any]) -> HostBuffer: ...

    def buffer(self, name: str, size: int, dtype: np.dtype[Any]) -> Buffer: ...

"""`python -m scheduler_svc.tied PID scheduler_svc.grammars.checker FD MODEL`: compiles strangers' grammars, to see
whether that ends well. FD is a listening socket. Each grammar gets a process, forked with the vocabulary in it, which
the kernel ends when its time or memory is used up: nothing that a grammar does to it reaches the service.

A connection: Grammar ──► the checker; ◄── _BEGUN, ◄── Report. None comes of a process that was ended.
"""

from __future__ import annotations

import os
import resource
import signal
import socket
import sys
from typing import Final

import msgspec
from llguidance import LLMatcher, LLTokenizer

from protos.engine_wire import Grammar
from protos.wire import Wire
from scheduler_svc.grammars import lower, vocabulary
from scheduler_svc.grammars.errors import GrammarError, one_line
from scheduler_svc.grammars.matcher import Matcher

CPU_SECONDS: Final = 0.25  # a usual grammar takes 5 ms; on a machine that is full it is a second of the wall's clock
MEMORY: Final = 256 << 20  # bytes beyond what the vocabulary takes
NICENESS: Final = 5
BEGUN: Final = b"!"
_HEADER: Final = 4  # bytes: a message's length, little-endian


class Report(Wire, frozen=True):
    """`lowered`: the grammar in llguidance's words. `trouble`: why there is none."""

    lowered: str = ""
    size: int = 0  # bytes that it takes when it is compiled, about
    trouble: str = ""


def send(connection: socket.socket, message: Wire) -> None:
    data = msgspec.msgpack.encode(message)
    connection.sendall(len(data).to_bytes(_HEADER, "little") + data)


def receive(connection: socket.socket) -> bytes:
    """A message's bytes. Raises EOFError where the other end has gone."""
    return _read(connection, int.from_bytes(_read(connection, _HEADER), "little"))


def _read(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        if not (more := connection.recv(count - len(data))):
            raise EOFError
        data += more
    return bytes(data)


def check(grammar: Grammar, tokenizer: LLTokenizer) -> Report:
    """Compiles, and computes the first mask: what nothing can satisfy shows only there."""
    before = _resident()
    try:
        lowered = lower.lower(grammar)
        if trouble := lower.trouble(grammar, lowered, tokenizer):
            return Report(trouble=trouble)
        compiled = LLMatcher(tokenizer, lowered, log_level=0, limits=vocabulary.LIMITS)
        matcher = Matcher(compiled, is_told=False)
        compiled.compute_bitmask()
    except (GrammarError, RecursionError) as error:
        return Report(trouble=str(error))
    if compiled.is_error():
        return Report(trouble=f"nothing satisfies it, or too much work is needed: {one_line(compiled.get_error())}")
    return Report(lowered, max(0, _resident() - before), matcher.detail)


def _resident() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _serve(connection: socket.socket, tokenizer: LLTokenizer) -> None:
    """In a process of its own, to its end."""
    most = _address_space() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    os.nice(NICENESS)
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, which nobody catches
    connection.sendall(BEGUN)
    send(connection, check(msgspec.msgpack.decode(receive(connection), type=Grammar), tokenizer))


def main() -> int:
    listener = socket.socket(fileno=int(sys.argv[1]))
    tokenizer = vocabulary.load(sys.argv[2])
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel reaps
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            code = 1
            try:
                listener.close()
                _serve(connection, tokenizer)
                code = 0
            finally:
                os._exit(code)
        connection.close()


if __name__ == "__main__":
    sys.exit(main())

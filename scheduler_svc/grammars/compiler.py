"""Compiles grammars off the loop: first in the checker, a process that may be ended, and here only what passed."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import blake2b
from typing import Final, NamedTuple

import msgspec
from llguidance import LLMatcher

from protos.engine_wire import Grammar
from scheduler_svc.grammars import vocabulary
from scheduler_svc.grammars.checker import BEGUN, Report, receive, send
from scheduler_svc.grammars.errors import GrammarError, one_line

AT_ONCE: Final = 4
MAX_CACHED: Final = 256  # grammars, those that were refused included
MAX_CACHED_BYTES: Final = 256 << 20
START_SECONDS: Final = 60.0  # until the checker has the vocabulary
CHECK_SECONDS: Final = 5.0  # of a clock on the wall, on a machine that has much to do; see CPU_SECONDS
_OVERHEAD: Final = 16 << 10  # bytes of a cached grammar beside what was measured

log = logging.getLogger(__name__)


class Compiled(NamedTuple):
    matcher: LLMatcher  # never advanced: each stream has a copy
    size: int  # bytes, about


class CheckerGoneError(Exception):
    """The checker could not be started, or has ended."""


class Compiler:
    """`compile` from one thread; `close` when nobody waits any more."""

    def __init__(self, model: str) -> None:
        self._threads = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="grammar")
        self._checker = Checker(model)
        self._cache: OrderedDict[bytes, Future[Compiled]] = OrderedDict()
        # At once, while the worker loads: it holds the GIL for half a second.
        self._tokenizer = self._threads.submit(vocabulary.load, model)

    def compile(self, grammar: Grammar, then: Callable[[Future[Compiled]], None]) -> None:
        """`then`, in any thread, gets the result; or GrammarError, or CheckerGoneError."""
        digest = blake2b(msgspec.msgpack.encode(grammar), digest_size=16).digest()
        future = self._cache.get(digest)
        if future is None or (future.done() and isinstance(future.exception(), CheckerGoneError)):
            future = self._cache[digest] = self._threads.submit(self._compile, grammar)
        self._cache.move_to_end(digest)
        self._trim()
        future.add_done_callback(then)

    def _trim(self) -> None:
        """The least recently used go first; what is being compiled is not known yet, and stays."""
        done = [digest for digest, future in self._cache.items() if future.done()]
        size = sum(_size(self._cache[digest]) for digest in done)
        for digest in done:
            if len(self._cache) <= MAX_CACHED and size <= MAX_CACHED_BYTES:
                return
            size -= _size(self._cache.pop(digest))

    def _compile(self, grammar: Grammar) -> Compiled:
        report = self._checker.check(grammar)
        if report.trouble:
            raise GrammarError(report.trouble)
        tokenizer = self._tokenizer.result()
        matcher = LLMatcher(tokenizer, report.lowered, log_level=0, limits=vocabulary.LIMITS)  # without the GIL
        if matcher.is_error():
            raise GrammarError(one_line(matcher.get_error()))
        return Compiled(matcher, report.size)

    @property
    def num_words(self) -> int:
        """Of 32 tokens in a mask that a compiled grammar writes."""
        return -(-self._tokenizer.result().vocab_size // 32)

    def close(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._checker.close()


def _size(future: Future[Compiled]) -> int:
    return _OVERHEAD + (0 if future.exception() else future.result().size)


class Checker:
    """The process that compiles first, from the first grammar on. Any thread may ask."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._lock = threading.Lock()
        self._directory: tempfile.TemporaryDirectory[str] | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def check(self, grammar: Grammar) -> Report:
        """Raises CheckerGoneError."""
        for is_last in (False, True):
            try:
                with self._connect() as connection:
                    return _ask(connection, grammar)
            except OSError as error:
                if is_last:
                    raise CheckerGoneError(f"the process that checks grammars does not answer: {error}") from error
        raise AssertionError("unreachable")

    def _connect(self) -> socket.socket:
        """Raises OSError."""
        with self._lock:
            if self._closed:
                raise OSError("it is closed")
            if self._process is None or self._process.poll() is not None:
                self._start()
            assert self._directory
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.connect(f"{self._directory.name}/checker")
            except OSError:
                connection.close()
                raise
            return connection

    def _start(self) -> None:
        if self._directory:
            self._directory.cleanup()
        self._directory = tempfile.TemporaryDirectory(prefix="pagewire-grammars-")  # its owner's alone
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self._directory.name}/checker")
            listener.listen()
            number = listener.fileno()
            module = "scheduler_svc.grammars.checker"
            command = [sys.executable, "-m", "scheduler_svc.tied", str(os.getpid()), module, str(number), self._model]
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=sys.stderr, pass_fds=[number], process_group=0
            )

    def close(self) -> None:
        with self._lock:
            self._closed = True
            if self._process:
                self._process.kill()
                self._process.wait()
            if self._directory:
                self._directory.cleanup()


def _ask(connection: socket.socket, grammar: Grammar) -> Report:
    """Raises OSError where the checker is not there."""
    connection.settimeout(START_SECONDS)
    send(connection, grammar)
    if connection.recv(len(BEGUN)) != BEGUN:
        raise OSError("it has ended")
    connection.settimeout(CHECK_SECONDS)
    try:
        return msgspec.msgpack.decode(receive(connection), type=Report)
    except (EOFError, TimeoutError, ConnectionError):
        return Report(trouble="takes more time or memory to compile than a grammar may")

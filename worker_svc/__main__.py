"""`python -m worker_svc --connect ENDPOINT`: a worker process."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import time
from importlib.metadata import version
from pathlib import Path

import zmq

from protos import curve
from protos.wire import PROTOCOL, Hello
from worker_svc import backends, config
from worker_svc.backends.base import Options
from worker_svc.link import Link
from worker_svc.worker import Worker

_PR_SET_PDEATHSIG = 1
_KEYS_INTERVAL = 0.2  # seconds between two looks


def main() -> int:
    settings = config.parse()
    if settings.parent_pid:
        for number in (signal.SIGINT, signal.SIGTERM):  # they reach whole terminals and control groups, and the parent
            signal.signal(number, signal.SIG_IGN)  # needs its worker while it drains; SIGKILL is how it ends one
        if not _die_with(settings.parent_pid):
            return 1
    else:
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as the first process of a container it has no other
    hello = Hello(settings.rank, version("pagewire"), PROTOCOL, (), settings.device, os.getpid())
    try:
        keys = _await_keys(settings.curve_keys) if settings.curve_keys else None
    except curve.CurveError as error:
        print(f"pagewire worker: {error}", file=sys.stderr, flush=True)
        return 1
    link = Link(settings.connect, hello, reconnect=not settings.parent_pid, keys=keys)
    options = Options(
        home=settings.home,
        device=settings.device,
        isa=settings.cpu_isa,
        patience=settings.rank_deadline,
        memory_share=settings.gpu_memory_utilization,
        eager=settings.enforce_eager,
        attention=settings.attention_backend,
    )
    create = functools.partial(backends.create, settings.backend, options=options, land=link.land)
    try:
        reason = Worker(link, create, time.monotonic, settings.mask_deadline).run()
    except KeyboardInterrupt:
        reason = "interrupted"
    print(f"pagewire worker {os.getpid()}: ends: {reason}", file=sys.stderr, flush=True)
    link.close()
    return 0


def _await_keys(directory: Path) -> curve.WorkerKeys:
    """They may come later than this process, as the scheduler itself may. Raises CurveError."""
    keys = curve.worker_keys(directory, zmq.curve_public)
    if keys is None:
        print(f"pagewire worker: waits for keys in {directory}, which the scheduler makes", file=sys.stderr, flush=True)
    while keys is None:
        time.sleep(_KEYS_INTERVAL)
        keys = curve.worker_keys(directory, zmq.curve_public)
    return keys


def _die_with(parent: int) -> bool:
    """Asks the kernel for SIGKILL when the thread that spawned this process ends. False where it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main())

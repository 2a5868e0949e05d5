"""`python -m worker_svc --connect ENDPOINT`: a worker process."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import time

from protos.wire import PROTOCOL, Hello
from worker_svc import backends, config
from worker_svc.link import Link
from worker_svc.worker import Worker

_PR_SET_PDEATHSIG = 1


def main() -> int:
    settings = config.parse()
    if settings.parent_pid:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal: the parent decides
        if not _die_with(settings.parent_pid):
            return 1
    hello = Hello(0, "0.1.0", PROTOCOL, (), settings.device, os.getpid())
    link = Link(settings.connect, hello, reconnect=not settings.parent_pid)
    create = functools.partial(backends.create, settings.backend, settings.device)
    try:
        reason = Worker(link, create, time.monotonic, settings.mask_deadline).run()
    except KeyboardInterrupt:
        reason = "interrupted"
    print(f"pagewire worker {os.getpid()}: ends: {reason}", file=sys.stderr, flush=True)
    link.close()
    return 0


def _die_with(parent: int) -> bool:
    """Asks the kernel for SIGKILL when the thread that spawned this process ends. False where it has ended already."""
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
    return os.getppid() == parent


if __name__ == "__main__":
    sys.exit(main())

"""Devices behind one seam, imported only when asked for."""

from __future__ import annotations

import os

from protos.wire import Setup
from worker_svc.backends.base import DeviceBackend
from worker_svc.backends.fake import PREFIX, FakeBackend

NAMES = ("auto", "torch", "fake")


def create(name: str, device: str, setup: Setup) -> DeviceBackend:
    """`auto` takes the fake backend for a model named `fake:…`, else torch. Raises BackendError where it cannot run."""
    if name == "fake" or (name == "auto" and setup.model.startswith(PREFIX)):
        return FakeBackend()
    # libgomp reads this as torch loads it. Its idle threads must sleep: they spin otherwise, and where another process
    # (the scheduler, say) wants a core, a step waits for the member that has none and takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from worker_svc.backends.torch import TorchBackend

    return TorchBackend(device, setup.threads)

"""Devices behind one seam, imported only when asked for."""

from __future__ import annotations

from protos.wire import Setup
from worker_svc.backends.base import DeviceBackend
from worker_svc.backends.fake import PREFIX, FakeBackend

NAMES = ("auto", "torch", "fake")


def create(name: str, device: str, setup: Setup) -> DeviceBackend:
    """`auto` takes the fake backend for a model named `fake:…`, else torch. Raises BackendError where it cannot run."""
    if name == "fake" or (name == "auto" and setup.model.startswith(PREFIX)):
        return FakeBackend()
    from worker_svc.backends.torch import TorchBackend

    return TorchBackend(device, setup.threads)

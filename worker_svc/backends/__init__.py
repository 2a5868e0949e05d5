"""Devices behind one seam, imported only when asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

from protos.wire import Setup
from worker_svc.backends.base import BackendError, DeviceBackend, Unsuited
from worker_svc.backends.fake import PREFIX, FakeBackend

NAMES = ("auto", "cpu", "torch", "fake")
ISAS = ("auto", "avx512_bf16", "avx512_vnni", "avx2", "generic")


def create(
    name: str,
    setup: Setup,
    *,
    device: str,
    isa: str,
    home: Path,
    land: Callable[[], None] = lambda: None,
    patience: float = 600.0,
) -> DeviceBackend:
    """`auto` takes the fake backend for a model named `fake:…`, torch for float32, and else the cpu backend, unless
    that cannot serve this model or cannot be built here: then torch, and says so.

    `isa` and `home` (for packed weights) are the cpu backend's; `land`: see DeviceBackend; `patience`: seconds that a
    rank waits for the others. Raises BackendError where none can run, or where an instruction set was asked for and
    another backend would have to serve.
    """
    if name == "fake" or (name == "auto" and setup.model.startswith(PREFIX)):
        return FakeBackend(land)
    why = ""
    if name == "cpu" or (name == "auto" and setup.dtype != "float32"):
        from worker_svc.backends.cpu import CpuBackend

        try:
            return CpuBackend(setup, device, isa, home)
        except Unsuited as error:
            if name == "cpu":
                raise
            why = str(error)
    if isa != "auto":
        reason = why or (f"dtype {setup.dtype!r} is torch's" if name == "auto" else f"backend {name!r} has none")
        raise BackendError(f"cpu_isa {isa!r} is the cpu backend's alone: {reason}")
    backend = _torch(device, setup, why, patience)
    if why:
        print(f"pagewire worker: {why}; torch is asked instead", file=sys.stderr, flush=True)
    return backend


def _torch(device: str, setup: Setup, why: str, patience: float) -> DeviceBackend:
    # libgomp reads this as torch loads it. Its idle threads must sleep: they spin otherwise, and where another process
    # (the scheduler, say) wants a core, a step waits for the member that has none and takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from worker_svc.backends.torch import TorchBackend
    except ModuleNotFoundError as error:
        if error.name not in ("torch", "triton", "transformers"):
            raise
        needs = "the torch backend needs torch, which is not installed: pip install 'pagewire[torch]'"
        raise BackendError(f"{why}; {needs}" if why else needs) from error
    threads = setup.threads or max(1, len(os.sched_getaffinity(0)) // setup.sharing)
    return TorchBackend(device, threads, patience)

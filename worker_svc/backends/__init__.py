"""Devices behind one seam, imported only when asked for."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from protos.wire import Setup
from worker_svc.backends.base import BackendError, DeviceBackend, Options, Unsuited
from worker_svc.backends.fake import PREFIX, FakeBackend

NAMES = ("auto", "cpu", "cuda", "torch", "fake")
ISAS = ("auto", "avx512_bf16", "avx512_vnni", "avx2", "generic")
ATTENTION = ("auto", "flash_attn", "flashinfer", "triton", "torch")
_GPUS = ("/dev/nvidiactl", "/dev/kfd")  # what drivers of NVIDIA and AMD make


def create(name: str, setup: Setup, options: Options, land: Callable[[], None] = lambda: None) -> DeviceBackend:
    """`auto` takes the fake backend for a model named `fake:…`; cuda where there is a GPU, or was asked for; torch for
    float32; and else the cpu backend. Where one of them cannot serve this model or run here, it takes the next, and
    says so.

    `land`: see DeviceBackend. Raises BackendError where none can run, or where a device or an instruction set was asked
    for and another backend would have to serve.
    """
    if name == "fake" or (name == "auto" and setup.model.startswith(PREFIX)):
        return FakeBackend(land)
    reasons: list[str] = []
    for candidate in _candidates(name, setup, options):
        if options.isa != "auto" and candidate != "cpu":
            reason = "; ".join(reasons) or (
                f"dtype {setup.dtype!r} is torch's" if name == "auto" else f"backend {name!r} has none"
            )
            raise BackendError(f"cpu_isa {options.isa!r} is the cpu backend's alone: {reason}")
        if options.attention != "auto" and candidate != "cuda":
            why = "; ".join(reasons) or f"the {candidate} backend has its own"
            raise BackendError(f"attention_backend {options.attention!r} is the cuda backend's alone: {why}")
        try:
            backend = _made(candidate, setup, options, land)
        except Unsuited as error:
            if name == candidate:
                raise
            reasons.append(str(error))
        else:
            if reasons:
                why = "; ".join(reasons)
                print(f"pagewire worker: {why}; {candidate} is asked instead", file=sys.stderr, flush=True)
            return backend
    raise BackendError("; ".join(reasons))


def _candidates(name: str, setup: Setup, options: Options) -> list[str]:
    if name != "auto":
        return [name]
    if options.device not in ("auto", "cpu"):
        return ["cuda"]
    on_cpu = ["torch"] if setup.dtype == "float32" else ["cpu", "torch"]
    sees_gpu = options.device == options.isa == "auto" and any(map(os.path.exists, _GPUS))
    return ["cuda", *on_cpu] if sees_gpu else on_cpu


def _made(name: str, setup: Setup, options: Options, land: Callable[[], None]) -> DeviceBackend:
    """Raises Unsuited where another may serve, BackendError where none may."""
    if name == "cpu":
        from worker_svc.backends.cpu import CpuBackend

        return CpuBackend(setup, options.device, options.isa, options.home)
    if name == "cuda":
        try:
            from worker_svc.backends.cuda import CAPTURED, cuda_backend
        except ModuleNotFoundError as error:
            raise Unsuited(_needs_torch("cuda", error)) from error
        captured = () if options.eager else CAPTURED
        return cuda_backend(
            options.device, land, options.memory_share, captured, options.attention, setup.tp_rank, options.patience
        )
    return _torch(setup, options)


def _torch(setup: Setup, options: Options) -> DeviceBackend:
    # libgomp reads this as torch loads it. Its idle threads must sleep: they spin otherwise, and where another process
    # (the scheduler, say) wants a core, a step waits for the member that has none and takes ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from worker_svc.backends.torch import TorchBackend
    except ModuleNotFoundError as error:
        raise Unsuited(_needs_torch("torch", error)) from error
    threads = setup.threads or max(1, len(os.sched_getaffinity(0)) // setup.sharing)
    return TorchBackend(options.device, threads, options.patience)


def _needs_torch(backend: str, error: ModuleNotFoundError) -> str:
    """Raises what is missing, where that is none of the extra's."""
    if error.name not in ("torch", "triton", "transformers"):
        raise error
    return f"the {backend} backend needs torch, which is not installed: pip install 'pagewire[torch]'"

"""The cuda backend: one GPU of NVIDIA or AMD, by torch's one API for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from kernels.gpu.attention_tuning import Device as Kind
from kernels.gpu.scaled_linear import native_float8
from worker_svc.backends.base import BackendError, Unsuited
from worker_svc.device.base import Device
from worker_svc.device.cuda import CudaDevice
from worker_svc.gpu.backend import GpuBackend
from worker_svc.gpu.memory import DeviceMemory
from worker_svc.gpu.stepping import WatchThread

CAPTURED = (1, 2, 4, *range(8, 257, 8))  # rows


class CudaPlace:
    """Raises BackendError for a device that is not there, Unsuited for one that the kernels do not know."""

    def __init__(self, device: str, rank: int = 0) -> None:
        if not torch.cuda.is_available():
            raise Unsuited("torch sees no GPU")
        name, _, index = device.partition(":")
        count = torch.cuda.device_count()
        if name not in ("auto", "cuda") or (index and not index.isdigit()) or int(index or 0) >= count:
            raise BackendError(f"device {device!r} is none of this host's: it has cuda:0 to cuda:{count - 1}")
        mine = int(index or 0) + rank
        if mine >= count:
            raise BackendError(f"rank {rank} would have cuda:{mine}, and this host has cuda:0 to cuda:{count - 1}")
        self.where = torch.device("cuda", mine)
        torch.cuda.set_device(self.where)  # Triton launches on the current one
        self.name = torch.cuda.get_device_name(self.where)
        try:
            self.kind = Kind.of(self.where)
        except ValueError as error:
            raise Unsuited(str(error)) from error
        self.device: Device = CudaDevice(self.where.index)
        self.float8 = native_float8(self.where)
        self.capability = (0, 0) if torch.version.hip else torch.cuda.get_device_capability(self.where)

    def memory(self) -> DeviceMemory:
        torch.cuda.synchronize(self.where)
        free, total = torch.cuda.mem_get_info(self.where)
        reserved = torch.cuda.memory_reserved(self.where)
        peak = torch.cuda.max_memory_allocated(self.where)
        torch.cuda.empty_cache()
        return DeviceMemory(total, peak, max(0, total - free - reserved))

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.where)

    def watch(self, land: Callable[[], None]) -> WatchThread:
        return WatchThread(land)


def cuda_backend(
    device: str,
    land: Callable[[], None],
    memory_share: float,
    captured: Sequence[int] = CAPTURED,
    attention: str = "auto",
    rank: int = 0,
    patience: float = 600.0,
) -> GpuBackend:
    """`rank`: each of a group has the device after that of the one before. Raises BackendError, or Unsuited where
    another backend may serve.
    """
    return GpuBackend(CudaPlace(device, rank), land, memory_share, captured, attention, patience)

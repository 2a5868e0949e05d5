"""The device of the tests as a Place: a whole backend on it, steps in flight, with memory as large as a test says."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from kernels.gpu.attention_tuning import Device as Kind
from tests.device.fake import FakeDevice
from tests.gpu_worker.runner import KIND, WHERE
from worker_svc.device.base import Device, Event
from worker_svc.gpu.memory import DeviceMemory


class NoWatch:
    """Nobody is told: whoever tests looks for itself."""

    def follow(self, event: Event) -> None: ...

    def close(self) -> None: ...


@dataclass
class FakePlace:
    rng: random.Random
    total: int = 1 << 22
    peak: int = 1 << 20
    name: str = "a device of the tests"
    where: torch.device = WHERE
    kind: Kind = KIND
    float8: torch.dtype | None = torch.float8_e4m3fn
    capability: tuple[int, int] = (0, 0)
    eager: float = 0.4
    device: Device = field(init=False)

    def __post_init__(self) -> None:
        self.device = FakeDevice(self.rng, self.eager)

    def memory(self) -> DeviceMemory:
        return DeviceMemory(self.total, self.peak, 0)

    def forget_peak(self) -> None: ...

    def watch(self, land: Callable[[], None]) -> NoWatch:
        return NoWatch()

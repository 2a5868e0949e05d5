"""CUDA and HIP, by torch's one API for both."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worker_svc.device.base import Array, Buffer, Event, Work


@dataclass(eq=False)
class CudaBuffer:
    name: str
    memory: Tensor  # of the device, or pinned

    def fill(self, values: Array) -> None:
        self.memory.numpy()[: len(values)] = values

    def read(self, count: int) -> Array:
        return self.memory[:count].numpy().copy()


class CudaEvent:
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()

    def has_come(self) -> bool:
        return bool(self.event.query())


class CudaGraph:
    def __init__(self, graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> None:
        self._graph, self._stream = graph, stream

    def replay(self) -> None:
        with torch.cuda.stream(self._stream):
            self._graph.replay()


class CudaStream:
    def __init__(self, device: CudaDevice) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device.device)

    def run(self, work: Work, *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()) -> None:
        with torch.cuda.stream(self._stream):
            work()

    def copy(self, to: Buffer, of: Buffer, count: int) -> None:
        with torch.cuda.stream(self._stream):
            to.memory[:count].copy_(of.memory[:count], non_blocking=True)

    def record(self) -> CudaEvent:
        event = torch.cuda.Event()
        event.record(self._stream)
        return CudaEvent(event)

    def wait(self, event: Event) -> None:
        assert isinstance(event, CudaEvent)
        self._stream.wait_event(event.event)

    def capture(self, work: Work, *, reads: Sequence[Buffer] = (), writes: Sequence[Buffer] = ()) -> CudaGraph:
        """In the memory pool of all the device's graphs: capture the largest first, and the others fit into it."""
        graph = torch.cuda.CUDAGraph()
        # What other threads ask of the device meanwhile (NCCL's watchdog does) is no part of it, and no error.
        with torch.cuda.graph(graph, pool=self._device.pool, stream=self._stream, capture_error_mode="thread_local"):
            work()
        return CudaGraph(graph, self._stream)


class CudaDevice:
    """One GPU. Pinned memory and streams are given back with the process."""

    def __init__(self, index: int = 0) -> None:
        self.device = torch.device("cuda", index)
        self.pool = torch.cuda.graph_pool_handle()

    def stream(self, name: str) -> CudaStream:
        return CudaStream(self)

    def host(self, name: str, size: int, dtype: np.dtype[Any]) -> CudaBuffer:
        return CudaBuffer(name, torch.from_numpy(np.zeros(size, dtype)).pin_memory())

    def buffer(self, name: str, size: int, dtype: np.dtype[Any]) -> CudaBuffer:
        return CudaBuffer(name, torch.from_numpy(np.zeros(size, dtype)).to(self.device))

"""A backend by its seam, and the plans that a scheduler could send it. No transformers: ranks start with this."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protos.wire import Admit, Epoch, Mask, Row, RowResult, Sampling, Setup, StepPlan
from worker_svc.backends.base import Capacity, DeviceBackend
from worker_svc.backends.torch import TorchBackend

EPOCH = Epoch(1, 1)


def setup(path: Path, **fields: Any) -> Setup:
    return Setup(**{"epoch": EPOCH, "model": str(path), "block_size": 8, "max_slots": 8, "kv_bytes": 1 << 20, **fields})


def load(backend: DeviceBackend, message: Setup) -> Capacity:
    return backend.load(message, lambda what, share: None)


class Session:
    """One backend and the plans sent to it."""

    def __init__(self, message: Setup, backend: DeviceBackend | None = None, **options: Any) -> None:
        self.backend, self.setup, self.steps = backend or TorchBackend(threads=1, **options), message, 0
        self.capacity = load(self.backend, message)

    def step(
        self,
        rows: list[Row],
        admit: list[Admit] | None = None,
        release: list[int] | None = None,
        mask: Mask | None = None,
    ) -> list[RowResult]:
        self.steps += 1
        self.backend.forward(StepPlan(EPOCH, self.steps, release or [], admit or [], [], rows))
        results = self.backend.sample(mask)
        assert isinstance(results, list)
        return results

    def greedy(
        self, prompt: list[int], count: int, slot: int = 1, chunk: int = 10_000, **fields: Any
    ) -> list[RowResult]:
        """A stream alone: its prompt in chunks, then token by token."""
        blocks = list(range(1, 2 + (len(prompt) + count) // self.setup.block_size))
        sampling = Sampling(max_tokens=count, **{"temperature": 0.0, **fields})
        admit, results = [Admit(slot, prompt, len(prompt), [blocks], sampling)], []
        for start in range(0, len(prompt), chunk):
            end = min(start + chunk, len(prompt))
            results += self.step([Row(slot, start, end - start, sample=end == len(prompt))], admit)
            admit = []
        for _ in range(count - 1):
            results += self.step([Row(slot, -1, 1, sample=True)])
        self.step([], release=[slot])
        return results


def ids(results: list[RowResult]) -> list[int]:
    return [token for result in results for token in result.token_ids]

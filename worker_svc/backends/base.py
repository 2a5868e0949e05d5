"""The seam between a worker and a device: a backend executes whole steps. Nothing above it imports torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from protos.wire import Mask, Phase, RowResult, Setup, StepPlan

# (LOADING or COMPILING, share of it done 0..1); called from the worker's main thread.
Progress = Callable[[Phase, float], None]


@dataclass(frozen=True)
class Capacity:
    """What a loaded backend can do: the worker's `Ready`, without the epoch."""

    num_blocks: int  # null block included
    align: int  # tokens
    exact: bool
    device: str
    dtype: str
    backend: str
    max_model_len: int
    vocab_size: int
    fingerprint: str
    graph_shapes: tuple[int, ...] = ()


class BackendError(Exception):
    """A model or a setting that this backend cannot serve, in one line for the person who started it."""


class DeviceBackend(Protocol):
    """Owns weights, KV pages, slots, token tables and sampler. One call of `forward` and one of `sample` are a step.

    Neither may keep anything that the Admits of a new epoch could not rebuild.
    """

    def load(self, setup: Setup, progress: Progress) -> Capacity:
        """Reads weights, sizes and warms KV. Raises BackendError where `setup` cannot be served."""

    def reset(self, setup: Setup) -> None:
        """A new epoch with the same Setup: forget every slot; weights stay."""

    def forward(self, plan: StepPlan) -> None:
        """Applies release, admit, copies and rows, in this order, and computes up to the logits that sampling needs."""

    def sample(self, mask: Mask | None) -> list[RowResult]:
        """Samples the rows of the last `forward`, appends to the slots' tables, answers in the plan's row order."""

    def close(self) -> None: ...

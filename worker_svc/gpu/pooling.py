"""Pooled outputs on a device: sums of states stay there by slot, in float64, and a prompt's vector comes back when it
ends.

The words go up with those of sampling (sample_words.py):

    tokens [P] | slots of the rows that have some [G], their borders in P [G + 1] | slots that begin [F] | slots of the
    prompts that end [E], how many states each is of [E]

Each prompt that ends takes back float32 [hidden]. How many states a slot has, the host counts: of `worker_svc.pooling`
it has the refusals, and the device the arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu.pooling import add_states
from worker_svc.inputs import StepInputs
from worker_svc.pooling import states_due
from worker_svc.slots import SlotTable

STATES_AT_ONCE: Final = 1024  # tokens of which states are held

States = Callable[[Tensor, Tensor], None]  # positions [q] of the step's tokens, and where their states go [q, hidden]


@dataclass(frozen=True)
class PoolShape:
    """How many there are of each."""

    tokens: int = 0
    groups: int = 0
    begins: int = 0
    ends: int = 0

    @property
    def sizes(self) -> list[int]:
        """Of the parts, in their order."""
        borders = self.groups + 1 if self.groups else 0
        return [self.tokens, self.groups, borders, self.begins, self.ends, self.ends]


@dataclass(frozen=True)
class PackedPools:
    words: NDArray[np.int32]
    shape: PoolShape
    rows: list[int]  # [E] of the plan


_NONE: Final = PackedPools(np.zeros(0, np.int32), PoolShape(), [])


class PoolPacker:
    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._had: dict[int, tuple[int, int]] = {}  # by slot: of which admission, and how many states

    def pack(self, inputs: StepInputs) -> PackedPools:
        """Raises SlotError where a prompt did not begin at its first position."""
        table = self._slots
        pooled = np.flatnonzero(table.pooling[inputs.slots])
        if not len(pooled):
            return _NONE
        counts = np.bincount(inputs.pooled_rows, minlength=len(inputs.slots))
        begins, ends = list[int](), list[tuple[int, int, int]]()
        for row in pooled.tolist():
            slot = int(inputs.slots[row])
            admission = int(table.admissions[slot])
            before, count = self._had.get(slot, (0, 0))
            if before != admission:
                count = 0
                begins.append(slot)
            count += int(counts[row])
            self._had[slot] = admission, count
            if inputs.context_lens[row] >= table.prompt_lens[slot]:
                ends.append((row, slot, states_due(table, slot, count)))
        groups = np.flatnonzero(counts)
        shape = PoolShape(len(inputs.pooled_tokens), len(groups), len(begins), len(ends))
        borders = np.cumsum([0, *counts[groups]])[: shape.sizes[2]]
        rows, slots, due = zip(*ends, strict=True) if ends else ((), (), ())
        parts = [inputs.pooled_tokens, inputs.slots[groups], borders, begins, slots, due]
        words = np.concatenate([np.asarray(part, np.int32) for part in parts])
        return PackedPools(words, shape, list(rows))


class Pools:
    """Belongs to one stream. `totals` [slots + 1, hidden]: what a slot's holder left is dropped as the next begins."""

    def __init__(self, slots: int, hidden: int, where: torch.device) -> None:
        self._totals = torch.zeros(slots + 1, hidden, dtype=torch.float64, device=where)
        self.hidden = hidden

    def take(self, shape: PoolShape, words: Tensor, states: States, results: Tensor) -> None:
        """Adds the step's states, and writes the vectors of the prompts that end to the begin of `results`."""
        tokens, slots, borders, begins, ended, due = words.split(shape.sizes)
        totals = self._totals
        totals.index_fill_(0, begins.long(), 0.0)
        for first in range(0, shape.tokens, STATES_AT_ONCE):
            part = tokens[first : first + STATES_AT_ONCE]
            of_part = torch.empty(len(part), self.hidden, dtype=torch.float32, device=totals.device)
            states(part, of_part)
            add_states(of_part, slots, borders, first, totals)
        vectors = totals.index_select(0, ended) / due.double()[:, None]
        results[: shape.ends * self.hidden].view(torch.float32).copy_(vectors.float().flatten())


def vectors_by_row(words: NDArray[np.int32], rows: list[int]) -> dict[int, bytes]:
    """Little-endian float32, of the words that `Pools.take` wrote."""
    each = words.reshape(len(rows), -1) if rows else words[:0]
    return {row: vector.astype("<i4").tobytes() for row, vector in zip(rows, each, strict=True)}

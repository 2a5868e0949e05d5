"""One vector a prompt, from the states after the final norm: of its last position, of its first, or their mean. numpy
only.

    last  the state at position prompt_len − 1
    cls   the state at position 0
    mean  Σ states / prompt_len, added up in float64 in the order of positions: no chunking and no batch changes a bit

What a prompt in chunks has so far is kept by slot, and follows from its Admit and rows as all else does: so `mean` and
`cls` begin at position 0, and a cached prefix is none of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from worker_svc.inputs import Ints, StepInputs
from worker_svc.slots import POOLINGS, SlotError, SlotTable

Floats = NDArray[np.float32]
_MEAN: Final = POOLINGS.index("mean")


@dataclass
class _Partial:
    """Of one slot's holder."""

    admission: int
    total: NDArray[np.float64] = field(default_factory=lambda: np.zeros(1))  # [hidden], once there is a state
    count: int = 0  # of states


class Pooler:
    def __init__(self, slots: SlotTable) -> None:
        self._slots = slots
        self._partials: dict[int, _Partial] = {}  # by slot

    def pool(self, inputs: StepInputs, states: Callable[[Ints], Floats]) -> dict[int, bytes]:
        """By row: little-endian float32 [hidden] of the prompts that end with this step. `states` are those of the
        step's tokens: indices [P] → [P, hidden]. Raises SlotError where a prompt did not begin at its first position.
        """
        slots, pooled = self._slots, dict[int, bytes]()
        kinds = slots.pooling[inputs.slots]
        if not kinds.any():
            return pooled
        found = states(inputs.pooled_tokens) if len(inputs.pooled_tokens) else np.zeros((0, 0), np.float32)
        for row in np.flatnonzero(kinds).tolist():
            slot = int(inputs.slots[row])
            partial = self._gather(slot, found[inputs.pooled_rows == row])
            if inputs.context_lens[row] < slots.prompt_lens[slot]:
                continue
            due = states_due(slots, slot, partial.count)
            pooled[row] = (partial.total / due).astype("<f4").tobytes()
        return pooled

    def _gather(self, slot: int, states: Floats) -> _Partial:
        """One after the other: a sum of many at once has an order of its own."""
        admission = int(self._slots.admissions[slot])
        partial = self._partials.get(slot)
        if partial is None or partial.admission != admission:
            partial = self._partials[slot] = _Partial(admission)
        for state in states:
            partial.total = partial.total + state.astype(np.float64)
        partial.count += len(states)
        return partial


def states_due(slots: SlotTable, slot: int, count: int) -> int:
    """How many states the output of a slot is the mean of, now that its prompt has ended. Raises SlotError where it has
    another `count`: its prompt did not begin at its first position.
    """
    kind = int(slots.pooling[slot])
    due = int(slots.prompt_lens[slot]) if kind == _MEAN else 1
    if count != due:
        raise SlotError(f"slot {slot} pools by {POOLINGS[kind]}, and has {count} of the {due} states for it")
    return due

"""What every sampler of the house agrees on, whatever it computes with. numpy only.

The order in which a row is edited, cut and drawn is told in sampler.py, and why in docs/decisions/0011-noise.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from protos.wire import Mask, StepPlan
from worker_svc.inputs import StepInputs

GREEDY_BELOW: Final = 1e-5  # a lower temperature is greedy, as in vLLM
LIMIT: Final = 3e33  # over the least temperature that divides, it is a float32 still
NOT_NUMBERS: Final = "the model's logits are not numbers"
NONE_ALLOWED: Final = "no token is allowed"


class SamplerError(ValueError):
    """A row that cannot be sampled: its logits are not numbers, its mask leaves none of them, or is missing."""


@dataclass(frozen=True)
class StepMask:
    """What grammars allow of a step's outputs, [S] in the order of inputs.sample_rows."""

    vocab_size: int
    rows: NDArray[np.int32]  # [S] row of `words`, −1 where none is masked
    words: NDArray[np.uint32]  # [masked, ceil(vocab / 32)] bit i of word w is token 32 w + i

    def allowed(self, output: int) -> NDArray[np.bool_] | None:
        """[vocab], or None for an output without a mask."""
        row = self.rows[output]
        if row < 0:
            return None
        bits = np.unpackbits(self.words[row].view(np.uint8), bitorder="little")
        return bits[: self.vocab_size].view(np.bool_)


def step_mask(plan: StepPlan, inputs: StepInputs, mask: Mask | None, vocab_size: int) -> StepMask | None:
    """None where nobody is masked. Raises SamplerError where the plan's masked rows are not those of `mask` (R3)."""
    masked = [i for i, row in enumerate(plan.rows) if row.masked and row.sample]
    given = [] if mask is None else list(mask.rows)
    if sorted(given) != masked:
        raise SamplerError(f"step {plan.step} masks the rows {masked}, and the mask that came is for {given}")
    if mask is None:
        return None
    width = -(-vocab_size // 32)
    if len(mask.bitmask) != 4 * width * len(given):
        raise SamplerError(f"step {plan.step} has a mask of {len(mask.bitmask)} bytes, not {len(given)} · {4 * width}")
    rows = np.full(len(plan.rows), -1, np.int32)
    rows[given] = np.arange(len(given))
    words = np.frombuffer(mask.bitmask, "<u4").astype(np.uint32, copy=False).reshape(len(given), width)
    return StepMask(vocab_size, rows[inputs.sample_rows], words)

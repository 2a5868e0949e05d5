"""A step as flat arrays: what a plan and the slots say, in the form that a forward pass reads. numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class StepInputs:
    """R rows, T tokens in all, in the plan's row order; a row's tokens are consecutive positions of one slot.

    row i is tokens cu[i]:cu[i+1], at positions context_lens[i] − (cu[i+1] − cu[i]) … context_lens[i] − 1
    """

    slots: Ints  # [R]
    cu: Ints  # [R+1] borders of the rows in the flat token arrays
    context_lens: Ints  # [R] tokens whose KV the row sees, its own included
    token_ids: Ints  # [T]
    positions: Ints  # [T]
    slot_mapping: Ints  # [T] block * block_size + offset: where each token's K and V are written
    block_tables: Ints  # [R, B] padded with the null block; B covers the longest row
    sample_rows: Ints  # [S] rows that sample, in row order
    sample_tokens: Ints  # [S] index into T of the token whose logits they sample from (the row's last)
    prompt_logprob_rows: Ints  # [Q] for each logit wanted for prompt logprobs: its row …
    prompt_logprob_tokens: Ints  # [Q] … and its index into T (the logits there score the next prompt token)

"""Step inputs without a plan or slots: for warming up, for trying a model out at load, and for tests."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from worker_svc.inputs import Ints, StepInputs


@dataclass(frozen=True)
class TrialRow:
    """A row that computes tokens[start:], with the positions before `start` already in its blocks."""

    tokens: Ints
    start: int
    blocks: Ints


def trial_step(rows: list[TrialRow], block_size: int) -> StepInputs:
    """Every row samples, from its last token."""
    positions = [np.arange(row.start, len(row.tokens)) for row in rows]
    cu = np.cumsum([0, *map(len, positions)])
    tables = np.zeros((len(rows), max(len(row.blocks) for row in rows)), np.int64)
    for table, row in zip(tables, rows, strict=True):
        table[: len(row.blocks)] = row.blocks
    mapped = zip(rows, positions, strict=True)
    return StepInputs(
        slots=np.arange(1, len(rows) + 1),
        cu=cu,
        context_lens=np.array([len(row.tokens) for row in rows]),
        token_ids=np.concatenate([row.tokens[row.start :] for row in rows]).astype(np.int64),
        positions=np.concatenate(positions),
        slot_mapping=np.concatenate([row.blocks[p // block_size] * block_size + p % block_size for row, p in mapped]),
        block_tables=tables,
        num_drafts=np.zeros(len(rows), np.int64),
        sample_rows=np.arange(len(rows)),
        sample_tokens=cu[1:] - 1,
        prompt_logprob_rows=np.empty(0, np.int64),
        prompt_logprob_tokens=np.empty(0, np.int64),
        pooled_rows=np.empty(0, np.int64),
        pooled_tokens=np.empty(0, np.int64),
    )

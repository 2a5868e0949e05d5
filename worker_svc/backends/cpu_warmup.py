"""How long a decode step takes by its positions, so that the scheduler knows what a draft costs."""

from __future__ import annotations

import time
from statistics import median
from typing import Final

import numpy as np

from kernels.cpu.library import PARAMS, Ints, Model, Samples
from worker_svc.backends.cpu_model import batch
from worker_svc.trial_step import TrialRow, trial_step

SIZES: Final = (1, 2, 4, 8, 16, 32, 64, 128)  # positions
SEQUENCES: Final = 16  # of a step at most: larger ones have several positions of each
CONTEXT: Final = 128  # tokens
TIMES: Final = 3
PATIENCE: Final = 0.03  # seconds: a size that has taken as long is not tried again


def step_seconds(
    model: Model, *, num_blocks: int, block_size: int, max_model_len: int, max_step_tokens: int
) -> tuple[tuple[int, float], ...]:
    """(positions, median seconds) of greedy steps of SIZES up to `max_step_tokens` (0: all). Leaves KV as it began."""
    context = min(CONTEXT, max_model_len)
    blocks = -(-context // block_size)
    sequences = min(SEQUENCES, (num_blocks - 1) // blocks)
    tables = 1 + np.arange(sequences * blocks).reshape(sequences, blocks)
    most = min(max_step_tokens or SIZES[-1], sequences * context)
    _seconds(model, tables, context, most, block_size)  # memory is taken from the system
    measured = [(size, _seconds(model, tables, context, size, block_size)) for size in SIZES if size <= most]
    model.kv()[:, 1 : 1 + sequences * blocks] = 0
    return tuple(measured)


def _seconds(model: Model, tables: Ints, context: int, size: int, block_size: int) -> float:
    counts = np.diff(np.linspace(0, size, min(size, len(tables)) + 1).astype(int)).tolist()
    tokens = np.zeros(context, np.int64)
    rows = [TrialRow(tokens, context - count, table) for count, table in zip(counts, tables, strict=False)]
    every = np.arange(size)
    params = np.zeros(size, PARAMS)
    params["top_p"], params["logprobs"] = 1.0, -1
    samples = Samples(size).point(tokens=every, params=params, token_ids=np.empty(size, np.int64))
    step = model.repeated(batch(trial_step(rows, block_size), every), samples)
    taken: list[float] = []
    while len(taken) < TIMES and sum(taken) < PATIENCE:
        begun = time.perf_counter()
        step()
        taken.append(time.perf_counter() - begun)
    return median(taken)

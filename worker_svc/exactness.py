"""Warms the shapes of a step, and looks whether float32 arithmetic here is exact (R2): the same bits however rows are
cut, batched and cached. A library on another CPU may choose kernels of which that is not true; then Ready says so.
"""

from __future__ import annotations

import numpy as np
import torch

from worker_svc.attention.cpu import kv_tile
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner
from worker_svc.trial_step import TrialRow, trial_step

# Part of the fingerprint: raised when our own arithmetic gives other bits than before for the same weights (noise,
# order of sampling, tiles of attention or of a product, rope tables).
ARITHMETIC = 2


def exact_steps(runner: ModelRunner, cache: KVCache) -> bool:
    """Each product by itself in every tile size, then a prompt whole and in pieces. Uses the cache's blocks as scratch:
    nothing may be in them yet. Of several ranks each has its own products, and all answer the same.
    """
    products = [linear.probe() for linear in runner.linears()]  # all of them, for they are warmed on the way
    return runner.ranks.all(all(products)) and _steps_agree(runner, cache)


def _steps_agree(runner: ModelRunner, cache: KVCache) -> bool:
    """A prompt that ends past the first border of key tiles, in one chunk; then its last third again, over the cached
    rest, in a chunk and then token by token, beside another row.
    """
    size = cache.block_size
    length = min(kv_tile(size) + 9, runner.max_model_len, (cache.num_blocks - 1) // 2 * size)
    blocks = -(-length // size)
    tokens = np.random.default_rng(0).integers(0, runner.vocab_size, max(length, 1))
    here, there = np.arange(1, blocks + 1), np.arange(2 * blocks, blocks, -1)
    if length < 8:
        return False  # too little room to tell
    whole = runner.forward(trial_step([TrialRow(tokens, 0, here)], size), cache)
    start = length * 2 // 3
    for count, end in enumerate(range(length - 3, length + 1)):
        rows = [TrialRow(tokens[: count + 1], count, there), TrialRow(tokens[:end], start, here)]
        hidden = runner.forward(trial_step(rows, size), cache)[1:]
        if not runner.ranks.all(torch.equal(hidden[: end - start], whole[start:end])):
            return False
        start = end
    last, logits = runner.logits(hidden, np.array([0])), runner.logits(whole, np.arange(length))
    return runner.ranks.all(torch.equal(last, logits[-1:]))

"""Warms the shapes of a step, and looks whether float32 arithmetic here is exact (R2): the same bits however rows are
cut, batched and cached. A library on another CPU may choose kernels of which that is not true; then Ready says so.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from worker_svc.attention.cpu import kv_tile
from worker_svc.inputs import StepInputs
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner


def exact_steps(runner: ModelRunner, cache: KVCache) -> bool:
    """Each product by itself in every tile size, then a prompt whole against the same prompt in pieces and together
    with others. Uses the cache's blocks as scratch: nothing may be in them yet.
    """
    return all([linear.probe() for linear in runner.linears()]) and _steps_agree(runner, cache)


def _steps_agree(runner: ModelRunner, cache: KVCache) -> bool:
    """A prompt over one tile border of the keys: in one chunk; then in chunks of which the last tokens come singly,
    beside another row, in other blocks.
    """
    length = min(kv_tile(cache.block_size) + 9, runner.max_model_len, (cache.num_blocks - 1) // 2 * cache.block_size)
    if length < 4:
        return False
    blocks = -(-length // cache.block_size)
    tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, length)
    here, there = np.arange(1, blocks + 1), np.arange(2 * blocks, blocks, -1)
    whole = _step(runner, cache, [(tokens, 0, here)])
    cut = length - 3
    if not torch.equal(_step(runner, cache, [(tokens[:cut], 0, there)])[:cut], whole[:cut]):
        return False
    for end in range(cut + 1, length + 1):
        hidden = _step(runner, cache, [(tokens[:end], 0, here), (tokens[:end], end - 1, there)])
        if not (torch.equal(hidden[end], whole[end - 1]) and torch.equal(hidden[:end], whole[:end])):
            return False
    return torch.equal(runner.logits(hidden, np.array([length])), runner.logits(whole, np.arange(length))[-1:])


def _step(runner: ModelRunner, cache: KVCache, rows: list[tuple[np.ndarray, int, np.ndarray]]) -> Tensor:
    """One forward pass of rows (known tokens, first to compute, blocks)."""
    positions = [np.arange(start, len(tokens)) for tokens, start, _ in rows]
    size = cache.block_size
    return runner.forward(
        StepInputs(
            slots=np.arange(1, len(rows) + 1),
            cu=np.cumsum([0, *map(len, positions)]),
            context_lens=np.array([len(tokens) for tokens, _, _ in rows]),
            token_ids=np.concatenate([tokens[start:] for tokens, start, _ in rows]),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate([t[p // size] * size + p % size for (_, _, t), p in zip(rows, positions)]),
            block_tables=np.stack([blocks for _, _, blocks in rows]),
            sample_rows=np.empty(0, np.int64),
            sample_tokens=np.empty(0, np.int64),
            prompt_logprob_rows=np.empty(0, np.int64),
            prompt_logprob_tokens=np.empty(0, np.int64),
        ),
        cache,
    )

"""Warms the shapes of a step, and looks whether float32 arithmetic here is exact (R2): the same bits however rows are
cut, batched and cached. A library on another CPU may choose kernels of which that is not true; then Ready says so.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from worker_svc.attention.cpu import kv_tile
from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner


@dataclass(frozen=True)
class Share:
    """A row: its known tokens, the first of them to compute, its blocks."""

    tokens: Ints
    start: int
    blocks: Ints


def exact_steps(runner: ModelRunner, cache: KVCache) -> bool:
    """Each product by itself in every tile size, then a prompt whole against the same prompt in pieces and together
    with others. Uses the cache's blocks as scratch: nothing may be in them yet.
    """
    return all(linear.probe() for linear in runner.linears()) and _steps_agree(runner, cache)


def _steps_agree(runner: ModelRunner, cache: KVCache) -> bool:
    """A prompt that ends past the first border of key tiles, in one chunk; then its last third again, from the cache,
    in a chunk and then token by token, beside another row.
    """
    size = cache.block_size
    length = min(kv_tile(size) + 9, runner.max_model_len, (cache.num_blocks - 1) // 2 * size)
    blocks = -(-length // size)
    tokens = np.random.default_rng(0).integers(0, runner.spec.vocab_size, length)
    here, there = np.arange(1, blocks + 1), np.arange(2 * blocks, blocks, -1)
    whole = _step(runner, cache, [Share(tokens, 0, here)])
    start = length * 2 // 3
    for count, end in enumerate([*range(max(start + 1, length - 3), length), length]):
        other = Share(tokens[: count + 1], count, there)
        hidden = _step(runner, cache, [other, Share(tokens[:end], start, here)])[1:]
        if not torch.equal(hidden[: end - start], whole[start:end]):
            return False
        start = end
    return torch.equal(runner.logits(hidden, np.array([0])), runner.logits(whole, np.arange(length))[-1:])


def _step(runner: ModelRunner, cache: KVCache, rows: list[Share]) -> Tensor:
    """One forward pass over the rows."""
    positions = [np.arange(row.start, len(row.tokens)) for row in rows]
    offsets = zip(rows, positions, strict=True)
    size = cache.block_size
    return runner.forward(
        StepInputs(
            slots=np.arange(1, len(rows) + 1),
            cu=np.cumsum([0, *map(len, positions)]),
            context_lens=np.array([len(row.tokens) for row in rows]),
            token_ids=np.concatenate([row.tokens[row.start :] for row in rows]),
            positions=np.concatenate(positions),
            slot_mapping=np.concatenate([row.blocks[p // size] * size + p % size for row, p in offsets]),
            block_tables=np.stack([row.blocks for row in rows]),
            sample_rows=np.empty(0, np.int64),
            sample_tokens=np.empty(0, np.int64),
            prompt_logprob_rows=np.empty(0, np.int64),
            prompt_logprob_tokens=np.empty(0, np.int64),
        ),
        cache,
    )

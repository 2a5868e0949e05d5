"""Drives a runner through the steps that a scheduler could plan for it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.trial_step import TrialRow, trial_step

Logits = Callable[[Ints], Tensor]  # indices of a step's tokens [S] → [S, vocab] float32


@dataclass
class Sequence:
    tokens: list[int]
    cuts: list[int]  # where its chunks end; the last is len(tokens)
    cached: int = 0  # positions that are in its blocks from before
    blocks: list[int] = field(default_factory=list)


class Runner(Protocol):
    """As much of a backend's runner as steps need."""

    kv_shape: KVShape

    def step(self, inputs: StepInputs, cache: KVCache) -> Logits: ...


def run(runner: Runner, sequences: list[Sequence], block_size: int = 8, seed: int = 0) -> list[Tensor]:
    """Each sequence's logits [len(tokens) − cached, vocab]. A step takes the next chunk of each, rows in any order."""
    rng = random.Random(seed)
    need = [-(-len(s.tokens) // block_size) for s in sequences]
    cache = KVCache(runner.kv_shape, 1 + sum(need), block_size)
    cache.pages[:, :, 1:] = torch.randn(cache.pages[:, :, 1:].shape)  # what a block held before must not matter
    free = list(range(1, 1 + sum(need)))
    rng.shuffle(free)
    for sequence, count in zip(sequences, need, strict=True):
        sequence.blocks = [free.pop() for _ in range(count)]
    return continue_in(runner, cache, sequences, rng)


def continue_in(runner: Runner, cache: KVCache, sequences: list[Sequence], rng: random.Random) -> list[Tensor]:
    out: list[list[Tensor]] = [[] for _ in sequences]
    done = [s.cached for s in sequences]
    cuts = [list(s.cuts) for s in sequences]
    while any(cuts):
        order = [i for i, left in enumerate(cuts) if left]
        rng.shuffle(order)
        ends = [cuts[i].pop(0) for i in order]
        rows = [
            TrialRow(np.array(sequences[i].tokens[:end]), done[i], np.array(sequences[i].blocks))
            for i, end in zip(order, ends, strict=True)
        ]
        inputs = _score_all(trial_step(rows, cache.block_size))
        logits = runner.step(inputs, cache)(np.arange(len(inputs.token_ids)))
        for row, (i, end) in enumerate(zip(order, ends, strict=True)):
            out[i].append(logits[inputs.cu[row] : inputs.cu[row + 1]])
            done[i] = end
    return [torch.cat(parts) for parts in out]


def _score_all(inputs: StepInputs) -> StepInputs:
    """Every token's logits are wanted, as for prompt logprobs."""
    tokens = np.arange(len(inputs.token_ids))
    rows = np.repeat(np.arange(len(inputs.slots)), np.diff(inputs.cu))
    return StepInputs(**{**vars(inputs), "prompt_logprob_rows": rows, "prompt_logprob_tokens": tokens})


def tokens(length: int, vocab: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(3, vocab) for _ in range(length)]


def cuts(length: int, seed: int, longest: int = 40, start: int = 0) -> list[int]:
    """Random chunk ends after `start`, odd ones among them, single tokens at the end."""
    rng, at, ends = random.Random(seed), start, []
    while at < length:
        at = min(length, at + (1 if length - at <= 4 else rng.randint(1, longest)))
        ends.append(at)
    return ends

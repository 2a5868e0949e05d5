"""Drives the C library through steps that a scheduler could plan, on a model packed from a checkpoint."""

from __future__ import annotations

import random
from collections.abc import Sequence as Many
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from kernels.cpu import library
from tests.models.stepping import Sequence
from worker_svc.backends.cpu_model import KVForm, batch, tables, whole
from worker_svc.inputs import StepInputs
from worker_svc.models.loader import open_model
from worker_svc.quant.packed import PackedModel, PackedStore
from worker_svc.trial_step import TrialRow, trial_step

Logits = NDArray[np.float32]  # [tokens, vocab]


def packed(path: Path, mode: str, home: Path) -> PackedModel:
    """From an earlier test's file, if there is one."""
    store = PackedStore(path, mode, home, library.load())
    if found := store.read():
        return found
    model = open_model(path)
    assert model is not None
    return store.pack(model, 2, lambda share: None)


class Runner:
    """A packed model, opened; its blocks hold what earlier runs left there, which must not matter."""

    def __init__(
        self,
        model: PackedModel,
        *,
        kv: str = "bf16",
        isa: str = "auto",
        threads: int = 1,
        block_size: int = 32,
        num_blocks: int = 96,
        max_model_len: int = 512,
    ) -> None:
        self.block_size, self.num_blocks = block_size, num_blocks
        spec = whole(model, KVForm(kv, block_size, num_blocks), tables(model.spec, max_model_len))
        self.model = library.load().open(spec, threads, isa)

    def run(self, sequences: Many[Sequence], seed: int = 0) -> list[Logits]:
        """Each sequence's logits [len(tokens) − cached, vocab]. A step takes the next chunk of each, rows in any order.

        Blocks are any that are free; a sequence that brings its own (`blocks`) finds `cached` positions in them.
        """
        rng = random.Random(seed)
        taken = {block for sequence in sequences for block in sequence.blocks}
        free = [block for block in range(1, self.num_blocks) if block not in taken]
        rng.shuffle(free)
        for sequence in sequences:
            while len(sequence.blocks) * self.block_size < len(sequence.tokens):
                sequence.blocks.append(free.pop())
        out: list[list[Logits]] = [[] for _ in sequences]
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
            inputs = trial_step(rows, self.block_size)
            logits = self.step(inputs)
            for row, (i, end) in enumerate(zip(order, ends, strict=True)):
                out[i].append(logits[inputs.cu[row] : inputs.cu[row + 1]])
                done[i] = end
        return [np.concatenate(parts) for parts in out]

    def step(self, inputs: StepInputs) -> Logits:
        self.model.forward(batch(inputs))
        return self.model.logits(np.arange(len(inputs.token_ids)))

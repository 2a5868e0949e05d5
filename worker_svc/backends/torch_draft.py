"""A draft model of the torch backend."""

from __future__ import annotations

import torch

from worker_svc.inputs import Ints, StepInputs
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner


class TorchDraft:
    shift = 0

    def __init__(self, runner: ModelRunner, num_blocks: int, block_size: int) -> None:
        self._runner, self.max_model_len = runner, runner.max_model_len
        self._cache = KVCache(runner.kv_shape, num_blocks, block_size)

    def greedy(self, inputs: StepInputs, before: Ints | None) -> Ints:
        logits = self._runner.step(inputs, self._cache)(inputs.sample_tokens)
        return torch.argmax(logits, dim=-1).numpy()

    def close(self) -> None:
        pass

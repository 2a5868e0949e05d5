"""R2 on a device: with --batch-invariant the same bits however a sequence is cut, batched and placed."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch

from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.runner import GpuRunner
from tests.gpu_worker.test_backend import setup
from tests.models import checkpoints
from tests.models.stepping import Sequence, cuts, run, tokens
from tests.models.test_families import CONFIGS
from worker_svc.backends.base import BackendError
from worker_svc.gpu.backend import GpuBackend
from worker_svc.models.loader import DType


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("qwen3-windows-biases", "float32"),
        ("mixtral", "float32"),
        *(pytest.param(name, "bfloat16", marks=pytest.mark.full) for name in CONFIGS if name != "llama-odd"),
    ],
)
def test_the_same_bits(name: str, dtype: DType, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, CONFIGS[name])
    runner = GpuRunner(tmp_path, dtype, batch_invariant=True)
    prompts = [tokens(n, runner.vocab_size, seed=n) for n in (44, 13, 1)]
    alone = [run(runner, [Sequence(prompt, [len(prompt)])], seed=i)[0] for i, prompt in enumerate(prompts)]
    sequences = [Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(prompts)]
    for ours, expected in zip(run(runner, sequences, seed=1), alone, strict=True):
        assert torch.equal(ours, expected), f"the sequence of {len(expected)} tokens"


def test_a_backend_says_so(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, CONFIGS["llama-tied-biases"])
    prints = set()
    for invariant in (False, True):
        backend = GpuBackend(FakePlace(random.Random(0), total=1 << 23), lambda: None, 0.5, ())
        capacity = backend.load(setup(tmp_path, batch_invariant=invariant), lambda phase, share: None)
        assert capacity.exact is invariant
        prints.add(capacity.fingerprint)
        backend.close()
    assert len(prints) == 2
    backend = GpuBackend(FakePlace(random.Random(0), total=1 << 23), lambda: None, 0.5, (), "torch")
    with pytest.raises(BackendError, match="attention_backend 'torch': torch has its library's products"):
        backend.load(setup(tmp_path, batch_invariant=True), lambda phase, share: None)

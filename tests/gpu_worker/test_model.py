"""The device's model, by Triton kernels, against transformers: whole, in odd chunks, and batched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.gpu_worker.runner import GpuRunner
from tests.models import checkpoints
from tests.models.stepping import Sequence, cuts, run, tokens
from tests.models.test_families import CONFIGS

OURS = [name for name in CONFIGS if name != "llama-odd"]
IN_EVERY_RUN = {"llama-tied-biases", "qwen3-windows-biases", "gemma2-capped-biases", "gemma3", "phi3-partial-longrope"}
IN_EVERY_RUN |= {"qwen3moe"}


@pytest.mark.parametrize(
    "name", [name if name in IN_EVERY_RUN else pytest.param(name, marks=pytest.mark.full) for name in OURS]
)
def test_logits_equal_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, CONFIGS[name])
    runner = GpuRunner(tmp_path)
    prompts = [tokens(n, runner.vocab_size, seed=n) for n in (37, 11, 1)]
    batched = run(runner, [Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(prompts)])
    for ours, prompt in zip(batched, prompts, strict=True):
        torch.testing.assert_close(ours, checkpoints.logits(theirs, prompt), atol=2e-4, rtol=1e-4)


def test_bfloat16_stays_near(tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, CONFIGS["qwen3"])
    prompt = tokens(40, 151)
    (ours,) = run(GpuRunner(tmp_path, "bfloat16"), [Sequence(prompt, cuts(len(prompt), seed=3))])
    expected = checkpoints.logits(theirs, prompt)
    assert (ours - expected).abs().mean() < 0.05 * expected.std()

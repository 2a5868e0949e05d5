"""A model split among processes: each family gives the tokens of one process and the logits of transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.models import checkpoints
from tests.models.rank_process import PROMPTS, computed
from tests.models.stepping import tokens
from tests.models.test_backend import load, setup
from tests.models.test_families import CONFIGS
from worker_svc.backends.base import BackendError
from worker_svc.backends.torch import TorchBackend

ROOT = Path(__file__).parents[2]
FAMILIES = ["llama-tied-biases", "qwen3-windows-biases", "gemma2-capped-biases", "phi3", "qwen3moe-some-layers"]
OTHERS = ["llama", "llama-mha-96", "mistral-window", "qwen2", "gemma3", "phi3-partial-longrope", "mixtral", "qwen3moe"]
Results = dict[str, Tensor]


def split(paths: list[Path], size: int, directory: Path) -> list[Results]:
    """What each rank computed of each checkpoint, in processes of their own."""
    outs = [directory / f"{rank}.safetensors" for rank in range(size)]
    command = [sys.executable, "-m", "tests.models.rank_process"]
    arguments = [str(directory / "meeting"), *[str(path) for path in paths]]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(size), arguments[0], str(out), *arguments[1:]],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, out in enumerate(outs)
    ]
    try:
        for process in processes:
            _, err = process.communicate(timeout=100)
            assert process.returncode == 0, err
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [load_file(out) for out in outs]


def of(results: Results, family: str) -> Results:
    return {name.removeprefix(f"{family}/"): value for name, value in results.items() if name.startswith(f"{family}/")}


@pytest.mark.parametrize("families", [FAMILIES, pytest.param(OTHERS, marks=pytest.mark.full)], ids=["some", "others"])
def test_two_ranks_give_the_tokens_of_one(families: list[str], tmp_path: Path) -> None:
    models = {family: checkpoints.save(tmp_path / family, CONFIGS[family]) for family in families}
    two = split([tmp_path / family for family in families], 2, tmp_path)
    for family, model in models.items():
        alone, (first, second) = computed(tmp_path / family), (of(results, family) for results in two)
        assert torch.equal(first["held"] + second["held"], alone["held"]), f"{family}: what is not held once"
        for name in set(first) - {"held"}:
            assert torch.equal(first[name], second[name]), f"{family}: {name} differs between the ranks"
        assert first["tokens"].tolist() == alone["tokens"].tolist(), family
        torch.testing.assert_close(first["scores"], alone["scores"], atol=1e-4, rtol=1e-4)
        theirs = torch.cat([checkpoints.logits(model, tokens(n, 151, seed=n)) for n in PROMPTS])
        torch.testing.assert_close(first["whole"], theirs, atol=2e-4, rtol=1e-4)
        assert bool(first["exact"]), family
        assert torch.equal(first["cut"], first["whole"]), f"{family}: chunks or neighbours show"


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama-mha-96"])
def test_four_ranks_are_exact_as_well(family: str, tmp_path: Path) -> None:
    """Of more than two parts a sum depends on their order."""
    checkpoints.save(tmp_path / family, CONFIGS[family])
    alone, results = computed(tmp_path / family), split([tmp_path / family], 4, tmp_path)
    first = of(results[0], family)
    assert first["tokens"].tolist() == alone["tokens"].tolist()
    assert bool(first["exact"])
    assert torch.equal(first["cut"], first["whole"])
    assert all(torch.equal(of(other, family)["whole"], first["whole"]) for other in results[1:])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tp_size": 2, "tp_rank": 2}, "tp_rank 2 is not in 0..1"),
        ({"tp_size": 2, "tp_rank": -1}, "tp_rank -1 is not in 0..1"),
    ],
)
def test_a_rank_that_cannot_be_is_refused(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BackendError, match=message):
        load(TorchBackend(threads=1), setup(tmp_path, **fields))

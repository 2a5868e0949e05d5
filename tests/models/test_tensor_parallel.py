"""A model split among processes: each family gives the tokens of one process and the logits of transformers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PretrainedConfig, Qwen3MoeConfig

from tests.models import checkpoints
from tests.models.rank_process import PROMPTS, computed
from tests.models.stepping import tokens
from tests.models.test_families import CONFIGS, MOE
from worker_svc.models import registry
from worker_svc.models.raw_tensor import Cut, RawTensor
from worker_svc.models.spec import ModelSpec, SpecError
from worker_svc.parallel.shard import Shard

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


@pytest.mark.full
def test_the_real_model_split_by_its_three_kv_heads(model_path: Path, tmp_path: Path) -> None:
    """A GGUF: rows of q and k in another order, weights in blocks."""
    alone, results = computed(model_path), split([model_path], 3, tmp_path)
    first = of(results[0], model_path.name)
    assert torch.equal(sum((of(each, model_path.name)["held"] for each in results), torch.zeros(3)), alone["held"])
    assert first["tokens"].tolist() == alone["tokens"].tolist()
    torch.testing.assert_close(first["whole"], alone["whole"], atol=2e-3, rtol=1e-3)
    assert bool(first["exact"])
    assert torch.equal(first["cut"], first["whole"])


@pytest.mark.parametrize(
    ("family", "size", "message"),
    [
        ("llama", 3, "tp_size 3 does not divide the model's 4 attention heads"),
        ("llama", 4, "tp_size 4 does not divide the model's 2 KV heads"),
        ("llama-odd", 3, "tp_size 3 does not divide the model's 77 rows of an MLP"),
        ("qwen3moe-few", 2, "tp_size 2 does not divide the model's 47 rows of an expert"),
    ],
)
def test_what_cannot_be_split_is_refused_with_the_numbers(family: str, size: int, message: str) -> None:
    spec = spec_of(family)
    with pytest.raises(SpecError, match=message):
        Shard(spec, 0, size)
    assert Shard(spec, 0, 1).spec == spec


def spec_of(family: str) -> ModelSpec:
    config = {**CONFIGS, "qwen3moe-few": Qwen3MoeConfig(**{**MOE, "moe_intermediate_size": 47})}[family]
    spec = registry.spec_of({**config.to_dict(), "architectures": [_architecture(config)]})
    assert spec
    return spec


def _architecture(config: PretrainedConfig) -> str:
    return type(config).__name__.removesuffix("Config").removesuffix("Text") + "ForCausalLM"


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3moe"])
@pytest.mark.parametrize("size", [1, 2])
def test_the_pieces_of_all_ranks_are_the_whole_and_nothing_twice(family: str, size: int) -> None:
    spec = spec_of(family)
    products = ["qkv", "o", *(["expert_gate_up", "expert_down"] if spec.experts else ["gate_up", "down"])]
    for product in products:
        held: dict[str, np.ndarray[Any, Any]] = {}
        for rank in range(size):
            for piece in Shard(spec, rank, size).pieces(product):
                count = held.setdefault(piece.role, np.zeros(piece.shape, np.int64))
                count[piece.cut.top : piece.cut.bottom, piece.cut.left : piece.cut.right] += 1
        assert held, product
        assert all((count == 1).all() for count in held.values()), product
    vocab = np.zeros(spec.vocab_size, np.int64)
    for rank in range(size):
        cut = Shard(spec, rank, size).vocab.cut
        vocab[cut.top : cut.bottom] += 1
    assert (vocab == 1).all()


def test_a_vocabulary_leaves_no_rank_without_a_row() -> None:
    spec = replace(spec_of("llama-mha-96"), vocab_size=5)
    with pytest.raises(SpecError, match="tp_size 4 leaves a rank nothing of a vocabulary of 5"):
        Shard(spec, 0, 4)


def test_a_cut_is_a_view_of_the_file() -> None:
    """So that a rank's other rows are never read."""
    whole = np.arange(6 * 8, dtype=np.float32).reshape(6, 8)
    cut, columns = RawTensor("w", "F32", whole.shape, whole).cut(Cut(2, 5, 4, 8))
    assert np.shares_memory(cut.data, whole)
    assert (cut.shape, columns) == ((3, 4), slice(None))
    assert np.array_equal(cut.float32(), whole[2:5, 4:8])
    bias, _ = RawTensor("b", "F32", (6,), whole[:, 0]).cut(Cut(2, 5, 4, 8))
    assert np.array_equal(bias.float32(), whole[2:5, 0])


@pytest.mark.parametrize(("left", "right"), [(0, 64), (64, 128), (0, 48), (48, 96), (96, 128), (33, 34)])
def test_a_cut_through_blocks_reads_those_that_it_touches(left: int, right: int) -> None:
    """GGUF's 32 weights of a row share a scale: columns may begin and end within them."""
    rows, columns = 6, 128
    blocks = np.random.default_rng(0).integers(0, 256, (rows * columns // 32, 34), np.uint8)
    blocks[:, :2] = np.frombuffer(np.float16(0.5).tobytes(), np.uint8)
    tensor = RawTensor("w", "Q8_0", (rows, columns), blocks)
    cut, inside = tensor.cut(Cut(1, 4, left, right))
    assert cut.shape[1] <= (right - left) + 2 * 31
    assert np.array_equal(cut.float32()[:, inside], tensor.float32()[1:4, left:right])

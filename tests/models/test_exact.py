"""R2 in float32: the same bits however a sequence is cut, cached, batched, placed, and on however many threads."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Qwen3Config, Qwen3MoeConfig

from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.stepping import Sequence, cuts, run, tokens
from tests.models.test_families import CONFIGS, MOE, open_runner
from worker_svc.exactness import exact_steps
from worker_svc.kv_cache import KVCache
from worker_svc.layers.activation import ACTIVATIONS
from worker_svc.layers.linear import TILES, Linear, padded_rows
from worker_svc.model_runner import ModelRunner
from worker_svc.models.loader import open_model

SHAPED = {
    # The real model's head layout (9 over 3) and products wide enough for every kernel that MKL and oneDNN choose from.
    "llama-9-3": LlamaConfig(
        **{**SMALL, "hidden_size": 288, "intermediate_size": 768, "num_attention_heads": 9, "num_key_value_heads": 3},
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    ),
    "llama-odd": CONFIGS["llama-odd"],
    "mistral-window": CONFIGS["mistral-window"],
    "qwen3-wide-heads": Qwen3Config(**{**SMALL, "num_key_value_heads": 1}, head_dim=128),
}
# These have the whole grid in `full` alone, and by default one test each.
SPECIAL = {
    **{name: CONFIGS[name] for name in ("gemma2-capped-biases", "gemma3", "phi3", "mixtral")},
    "qwen3moe": CONFIGS["qwen3moe"],
    # As many experts as the real one has, and wide enough that those of a prompt take tiles of every size.
    "qwen3moe-128": Qwen3MoeConfig(
        **{**MOE, "hidden_size": 192, "num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 80},
        norm_topk_prob=True,
    ),
}


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=[*SHAPED, *(pytest.param(name, marks=pytest.mark.full) for name in SPECIAL)])
def runner(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ModelRunner:
    path = tmp_path_factory.mktemp("exact")
    checkpoints.save(path, {**SHAPED, **SPECIAL}[request.param])
    return open_runner(path)


@pytest.fixture(scope="module")
def alone(runner: ModelRunner) -> list[tuple[list[int], torch.Tensor]]:
    """Prompts, and the bits of their logits: each alone, whole, on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    prompts = [tokens(n, runner.vocab_size, seed=n) for n in (300, 129, 128, 67, 5, 1)]
    expected = [run(runner, [Sequence(prompt, [len(prompt)])], seed=n)[0] for n, prompt in enumerate(prompts)]
    torch.set_num_threads(before)
    return list(zip(prompts, expected, strict=True))


@pytest.mark.parametrize("chunk", [1, 2, 3, 5, 16, 63, 128, 1000])
def test_chunks_of_any_size(
    runner: ModelRunner, alone: list[tuple[list[int], torch.Tensor]], threads: int, chunk: int
) -> None:
    prompt, expected = alone[1] if chunk < 3 else alone[0]
    ends = [*range(chunk, len(prompt), chunk), len(prompt)]
    assert torch.equal(run(runner, [Sequence(prompt, ends)], seed=chunk)[0], expected)


@pytest.mark.parametrize("seed", range(4))
def test_batched_in_random_chunks_and_blocks(
    runner: ModelRunner, alone: list[tuple[list[int], torch.Tensor]], threads: int, seed: int
) -> None:
    sequences = [
        Sequence(prompt, cuts(len(prompt), seed=10 * seed + i, longest=90)) for i, (prompt, _) in enumerate(alone)
    ]
    got = run(runner, sequences, block_size=(8, 16, 32, 8)[seed], seed=seed)
    for ours, (prompt, expected) in zip(got, alone, strict=True):
        assert torch.equal(ours, expected), f"the sequence of {len(prompt)} tokens"


@pytest.mark.parametrize("rows", [*range(1, 18), 33, 65])
def test_a_token_among_any_number_of_rows(
    runner: ModelRunner, alone: list[tuple[list[int], torch.Tensor]], threads: int, rows: int
) -> None:
    """M = 1 … k: the last token of a sequence, decoded beside `rows` − 1 others of other lengths."""
    prompt, expected = alone[3]
    rng = random.Random(rows)
    others = [tokens(rng.randint(1, 40), runner.vocab_size, seed=i) for i in range(rows - 1)]
    sequences = [Sequence(p, [len(p) - 1, len(p)] if len(p) > 1 else [1]) for p in [prompt, *others]]
    assert torch.equal(run(runner, sequences, seed=rows)[0], expected)


@pytest.mark.parametrize("name", [name for name in SPECIAL if name != "qwen3moe-128"])
def test_a_cross_section(name: str, tmp_path: Path) -> None:
    """Each prompt alone, whole, on one thread; then all in random chunks, on two."""
    checkpoints.save(tmp_path, SPECIAL[name])
    runner, before = open_runner(tmp_path), torch.get_num_threads()
    prompts = [tokens(n, runner.vocab_size, seed=n) for n in (140, 67, 5, 1)]
    try:
        torch.set_num_threads(1)
        expected = [run(runner, [Sequence(prompt, [len(prompt)])], seed=n)[0] for n, prompt in enumerate(prompts)]
        torch.set_num_threads(2)
        got = run(runner, [Sequence(prompt, cuts(len(prompt), seed=i)) for i, prompt in enumerate(prompts)], seed=7)
    finally:
        torch.set_num_threads(before)
    for ours, alone in zip(got, expected, strict=True):
        assert torch.equal(ours, alone), f"the sequence of {len(alone)} tokens"


def test_the_load_time_check_agrees(runner: ModelRunner, threads: int) -> None:
    assert exact_steps(runner, KVCache(runner.kv_shape, 64, 8))


def test_the_load_time_check_sees_rows_that_depend_on_their_tile(
    runner: ModelRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library whose small products round otherwise: the check must say that this machine is not exact."""

    def rounded(self: Linear, x: torch.Tensor) -> torch.Tensor:
        y = plain(self, x)
        return y * (1 + 1e-7) if x.shape[0] == TILES[0] else y

    plain = Linear._tile
    monkeypatch.setattr(Linear, "_tile", rounded)
    assert not exact_steps(runner, KVCache(runner.kv_shape, 64, 8))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_knows_no_place(name: str, threads: int) -> None:
    x = torch.randn(70_001) * 4
    whole = ACTIVATIONS[name](x)
    for start, count in [(0, 1), (1, 3), (5, 17), (13, 100), (31, 5000), (7, 66_666)]:
        assert torch.equal(ACTIVATIONS[name](x[start : start + count].clone()), whole[start : start + count])


def test_padding_takes_the_fewest_rows() -> None:
    assert [padded_rows(n) for n in (1, 4, 5, 17, 128, 129, 140, 300)] == [4, 4, 8, 32, 128, 132, 144, 320]


def test_the_real_model_is_exact(model_path: Path) -> None:
    model = open_model(model_path)
    assert model is not None
    runner = ModelRunner(model, "float32", 512, lambda share: None)
    prompt = np.random.default_rng(3).integers(3, 49152, 150).tolist()
    whole = run(runner, [Sequence(prompt, [150])], block_size=32)[0]
    sequences = [Sequence(prompt, [31, 32, 100, 147, 148, 149, 150]), Sequence(prompt[:70], [69, 70])]
    cut, shorter = run(runner, sequences, block_size=32, seed=5)
    assert torch.equal(cut, whole)
    assert torch.equal(shorter, whole[:70])

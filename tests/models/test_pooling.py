"""Pooled outputs: transformers' within 1e-5 in float32, and the same bits however a prompt is cut and batched."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import GPTNeoXConfig, LlamaConfig

from protos.wire import Admit, Row, Sampling
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.compare_transformers import oracle
from tests.models.session import Session, setup
from tests.models.stepping import cuts, tokens
from tests.models.test_cpu_backend import MODES
from tests.models.test_cpu_backend import session as cpu_session
from tests.models.test_families import CONFIGS
from worker_svc.slots import SlotError

POOLINGS = ["last", "mean", "cls"]
FAMILIES = [
    "llama",
    "mistral-window",
    "qwen2",
    "qwen3",
    "gemma2-capped-biases",
    "gemma3",
    "phi3",
    "mixtral",
    "qwen3moe",
]

Vector = NDArray[np.float32]


@torch.no_grad()
def states(model: Any, prompt: list[int]) -> Vector:
    """[len(prompt), hidden] after the final norm, as transformers has them."""
    out = model(torch.tensor([prompt]), use_cache=False, output_hidden_states=True)
    array: Vector = out.hidden_states[-1][0].float().numpy()
    return array


def by(pooling: str, states: Vector) -> NDArray[np.float64]:
    exact: NDArray[np.float64] = states.astype(np.float64)
    one: NDArray[np.float64] = {"mean": exact.mean(0), "last": exact[-1], "cls": exact[0]}[pooling]
    return one


def embed(one: Session, prompts: list[list[int]], poolings: list[str], seed: int | None) -> list[bytes]:
    """All in one batch, beside a stream that samples: each whole, or with a seed in chunks of any size."""
    size = one.setup.block_size
    blocks = iter(range(1, 1000))

    def admit(slot: int, prompt: list[int], max_tokens: int, pooling: str) -> Admit:
        own = [next(blocks) for _ in range(-(-(len(prompt) + max_tokens) // size))]
        return Admit(slot, prompt, len(prompt), [own], Sampling(max_tokens, temperature=0.0), pooling=pooling)

    pairs = list(zip(prompts, poolings, strict=True))
    admits = [admit(1, [3, 5], 60, ""), *(admit(i, p, 0, pooling) for i, (p, pooling) in enumerate(pairs, 2))]
    ends = [[len(p)] if seed is None else cuts(len(p), seed=seed + i) for i, p in enumerate(prompts)]
    done, found, start = [0] * len(prompts), [b""] * len(prompts), 0
    rng = random.Random(seed)
    while any(ends):
        rows = [Row(1, start if start == 0 else -1, 1 if start else 2, sample=True)]
        for i in (i for i, left in enumerate(ends) if left):
            end = ends[i].pop(0)
            rows.append(Row(i + 2, done[i], end - done[i]))
            done[i] = end
        rng.shuffle(rows)
        for result in one.step(rows, admits):
            assert bool(result.token_ids) == (result.slot == 1)
            if result.slot > 1 and done[result.slot - 2] == len(prompts[result.slot - 2]):
                found[result.slot - 2] = result.pooled
            else:
                assert result.pooled == b""
        admits, start = [], 2
    one.step([], release=list(range(1, len(prompts) + 2)))
    return found


def normalized(vector: NDArray[Any]) -> NDArray[Any]:
    unit: NDArray[Any] = vector / np.linalg.norm(vector)
    return unit


@pytest.mark.parametrize("name", FAMILIES)
def test_embeddings_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, CONFIGS[name])
    one = Session(setup(tmp_path, max_slots=16, kv_bytes=1 << 23))
    assert one.capacity.hidden_size == 64
    prompts = [tokens(n, 151, seed=n) for n in (150, 33, 1) for _ in POOLINGS]
    expected = [by(pooling, states(theirs, prompt)) for prompt, pooling in zip(prompts, POOLINGS * 3, strict=True)]
    whole = embed(one, prompts, POOLINGS * 3, None)
    for got, right in zip(whole, expected, strict=True):
        vector = np.frombuffer(got, "<f4")
        np.testing.assert_allclose(normalized(vector), normalized(right), rtol=0, atol=1e-5)
        np.testing.assert_allclose(vector, right, rtol=0, atol=1e-5 * float(np.linalg.norm(right)))
    if one.capacity.exact:
        assert embed(one, prompts, POOLINGS * 3, 7) == whole
        one.backend.reset(one.setup)
        assert embed(one, prompts[::-1], (POOLINGS * 3)[::-1], 8)[::-1] == whole


@pytest.mark.parametrize("mode", MODES, ids=lambda mode: "-".join(mode.values()).strip("-"))
def test_the_cpu_backend_pools_to_the_same_bits(mode: dict[str, str], tmp_path: Path) -> None:
    theirs = checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    prompts = [tokens(n, 151, seed=n) for n in (150, 33, 1) for _ in POOLINGS]
    one = cpu_session(tmp_path, max_slots=16, kv_bytes=1 << 23, **mode)
    assert one.capacity.hidden_size == 64
    whole = embed(one, prompts, POOLINGS * 3, None)
    for seed in (1, 2):
        assert embed(one, prompts, POOLINGS * 3, seed) == whole
    alone = cpu_session(tmp_path, max_slots=16, kv_bytes=1 << 23, threads=1, **mode)
    assert [embed(alone, [p], [by], None)[0] for p, by in zip(prompts, POOLINGS * 3, strict=True)] == whole
    for got, prompt, pooling in zip(whole, prompts, POOLINGS * 3, strict=True):
        right = normalized(by(pooling, states(theirs, prompt)))
        closeness = float(normalized(np.frombuffer(got, "<f4")) @ right)
        assert closeness > (0.9 if mode["quantization"] == "int4" else 0.99)


def test_models_that_transformers_runs_are_pooled_too(tmp_path: Path) -> None:
    plain = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
    theirs = checkpoints.save(tmp_path, GPTNeoXConfig(**plain))
    one = Session(setup(tmp_path, max_slots=16, kv_bytes=1 << 23))
    assert one.capacity.backend == "transformers"
    prompts = [tokens(n, 151, seed=n) for n in (60, 33, 1)]
    for got, prompt, pooling in zip(embed(one, prompts, POOLINGS, 3), prompts, POOLINGS, strict=True):
        right = normalized(by(pooling, states(theirs, prompt)))
        np.testing.assert_allclose(normalized(np.frombuffer(got, "<f4")), right, rtol=0, atol=1e-5)


@pytest.mark.full
def test_the_real_models_embeddings_are_those_of_transformers(model_path: Path) -> None:
    one = Session(setup(model_path, max_slots=8, block_size=32, kv_bytes=64 << 20, max_model_len=512))
    prompts = [tokens(n, 49152, seed=n) for n in (120, 40, 7)]
    found = embed(one, prompts, POOLINGS, 5)
    for got, prompt, pooling in zip(found, prompts, POOLINGS, strict=True):
        right = normalized(by(pooling, states(oracle(model_path), prompt)))
        np.testing.assert_allclose(normalized(np.frombuffer(got, "<f4")), right, rtol=0, atol=1e-5)
    assert embed(one, prompts, POOLINGS, None) == found


def test_a_mean_that_lacks_its_beginning_is_refused(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    one = cpu_session(tmp_path)
    admit = Admit(1, tokens(40, 151), 40, [[1, 2]], Sampling(0), pooling="mean")
    with pytest.raises(SlotError, match="slot 1 pools by mean, and has 8 of the 40 states"):
        one.step([Row(1, 32, 8)], [admit])


def test_a_slots_next_holder_begins_anew(tmp_path: Path) -> None:
    """Whoever left in the middle of its prompt leaves nothing behind."""
    checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    one = cpu_session(tmp_path)
    prompt = tokens(40, 151)
    admit = Admit(1, prompt, 40, [[1, 2]], Sampling(0), pooling="mean")
    (whole,) = one.step([Row(1, 0, 40)], [admit])
    one.step([Row(1, 0, 10)], [admit], [1])
    (again,) = one.step([Row(1, 0, 40)], [admit], [1])
    assert again.pooled == whole.pooled
    with pytest.raises(SlotError, match="pooled by 'max'"):
        one.step([Row(1, 0, 40)], [Admit(1, prompt, 40, [[1, 2]], Sampling(0), pooling="max")], [1])


def test_scores_from_a_position_on_are_those_of_the_whole_prompt(tmp_path: Path) -> None:
    """In float32 and over cached blocks: only what is asked for comes, with the same bits."""
    checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    one, prompt = Session(setup(tmp_path)), tokens(40, 151)
    whole = Admit(1, prompt, 40, [[1, 2, 3, 4, 5]], Sampling(0, prompt_logprobs=2))
    (every,) = one.step([Row(1, 0, 40)], [whole])
    later = Admit(2, prompt, 40, [[1, 2, 3, 6, 7]], Sampling(0, prompt_logprobs=2, prompt_logprobs_from=25))
    results = one.step([Row(2, 24, 7)], [later]) + one.step([Row(2, 31, 9)])
    assert len(every.prompt_logprobs) == 39
    assert [score for result in results for score in result.prompt_logprobs] == every.prompt_logprobs[24:]

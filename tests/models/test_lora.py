"""Adapters in float32: a step of several is what each model merged by hand computes, and rows without one do not
notice.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, Qwen3Config

from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.lora import ALL, ATTENTION, adapted, merge, save_adapter
from tests.models.peft import make as fixtures
from tests.models.stepping import tokens
from worker_svc.adapters.peft import read_adapter
from worker_svc.inputs import StepInputs
from worker_svc.kv_cache import KVCache
from worker_svc.model_runner import ModelRunner
from worker_svc.models.loader import open_model
from worker_svc.trial_step import TrialRow, trial_step

SIZE = 8  # of a block
RANKS = (1, 2, 3, 4, 8, 11, 16, 5)


class Made(NamedTuple):
    model: Path
    base: Any  # transformers' model
    adapters: list[Path]


def make(path: Path, config: Any, names: tuple[str, ...] = ALL) -> Made:
    base = checkpoints.save(path / "base", config)
    adapters = [path / f"adapter-{i}" for i in range(1, 9)]
    for i, (adapter, rank) in enumerate(zip(adapters, RANKS, strict=True)):
        chosen = names if i % 2 else tuple(name for name in names if name in (*ATTENTION, "qkv_proj"))
        save_adapter(adapter, base, rank=rank, alpha=2.0 * rank, names=chosen, seed=i, size=0.3, use_rslora=i == 3)
    return Made(path / "base", base, adapters)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return make(tmp_path_factory.mktemp("lora"), LlamaConfig(**SMALL, attention_bias=True))


def opened(made: Made, dtype: Any = "float32") -> ModelRunner:
    model = open_model(made.model)
    assert model is not None
    runner = ModelRunner(model, dtype, 512, lambda share: None)
    for i, path in enumerate(made.adapters, 1):
        runner.adapters.load(i, read_adapter(path, model.spec, 16), exact=dtype == "float32")
    return runner


@pytest.fixture(scope="module")
def runner(llama: Made) -> ModelRunner:
    return opened(llama)


def rows_of(count: int, length: int) -> list[TrialRow]:
    blocks = -(-length // SIZE)
    return [
        TrialRow(np.array(tokens(length, 151, seed=i)), 0, np.arange(1 + i * blocks, 1 + (i + 1) * blocks))
        for i in range(count)
    ]


def logits(runner: ModelRunner, inputs: StepInputs, blocks: int = 64) -> torch.Tensor:
    cache = KVCache(runner.kv_shape, blocks, SIZE)
    return runner.step(inputs, cache)(np.arange(len(inputs.token_ids)))


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3"])
def test_eight_in_one_step_are_the_merged_models(family: str, llama: Made, tmp_path: Path) -> None:
    made = llama
    if family == "phi3":
        names = ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
        made = make(tmp_path, Phi3Config(**SMALL, pad_token_id=0), names)
    elif family == "qwen3":
        made = make(tmp_path, Qwen3Config(**SMALL, head_dim=16))
    order = [3, 0, 1, 8, 2, 7, 0, 4, 6, 5]
    rows = rows_of(len(order), 19)
    mixed = logits(opened(made), adapted(trial_step(rows, SIZE), order)).view(len(order), 19, -1)
    for row, index, ours in zip(rows, order, mixed, strict=True):
        merged = copy.deepcopy(made.base)
        if index:
            merge(merged, made.adapters[index - 1])
        theirs = checkpoints.logits(merged, row.tokens.tolist())
        assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
        assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_a_row_has_the_same_bits_in_any_company(runner: ModelRunner) -> None:
    """Mixed, alone, in chunks; and without an adapter as in a server that has none (R2)."""
    order = [1, 0, 4, 4, 8, 0, 6]
    rows = rows_of(len(order), 33)
    mixed = logits(runner, adapted(trial_step(rows, SIZE), order)).view(len(order), 33, -1)
    plain = logits(runner, trial_step(rows, SIZE)).view(len(order), 33, -1)
    for row, index, ours, bare in zip(rows, order, mixed, plain, strict=True):
        assert torch.equal(ours, logits(runner, adapted(trial_step([row], SIZE), [index])))
        assert torch.equal(ours, bare) == (index == 0)
        cache = KVCache(runner.kv_shape, 64, SIZE)
        parts = []
        for start, end in ((0, 5), (5, 6), (6, 27), (27, 33)):
            step = adapted(trial_step([TrialRow(row.tokens[:end], start, row.blocks)], SIZE), [index])
            parts.append(runner.step(step, cache)(np.arange(end - start)))
        assert torch.equal(ours, torch.cat(parts))


def test_bfloat16_is_near(llama: Made, runner: ModelRunner) -> None:
    rows, order = rows_of(4, 12), [2, 4, 0, 8]
    coarse = logits(opened(llama, "bfloat16"), adapted(trial_step(rows, SIZE), order))
    fine = logits(runner, adapted(trial_step(rows, SIZE), order))
    assert float((coarse - fine).norm() / fine.norm()) < 0.02


def test_what_was_unloaded_makes_room(llama: Made, runner: ModelRunner) -> None:
    rows = rows_of(1, 9)
    model = open_model(llama.model)
    assert model is not None
    second = logits(runner, adapted(trial_step(rows, SIZE), [2]))
    runner.adapters.unload(1)
    runner.adapters.load(1, read_adapter(llama.adapters[1], model.spec, 16), exact=True)
    assert torch.equal(logits(runner, adapted(trial_step(rows, SIZE), [1])), second)


@pytest.mark.parametrize("name", fixtures.ADAPTERS)
def test_what_peft_wrote_and_computed(name: str, tmp_path: Path) -> None:
    fixtures.base(tmp_path)
    model, path = open_model(tmp_path), Path(fixtures.__file__).parent / name
    assert model is not None
    runner = ModelRunner(model, "float32", 512, lambda share: None)
    runner.adapters.load(1, read_adapter(path, model.spec, 16), exact=True)
    row = TrialRow(np.array(fixtures.PROMPT), 0, np.arange(1, 3))
    ours, theirs = logits(runner, adapted(trial_step([row], SIZE), [1])), torch.from_numpy(np.load(path / "logits.npy"))
    assert float((ours - theirs).abs().max() / theirs.abs().max()) < 1e-5
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))

"""Adapters in the C library's step: near merged models, the same bits in any company, and nothing to other rows."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
from transformers import Gemma2Config, LlamaConfig, Phi3Config

from kernels.cpu import library
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.cpu_stepping import Logits, Runner, packed
from tests.models.lora import adapted, merge
from tests.models.stepping import tokens
from tests.models.test_lora import Made, make
from worker_svc.adapters.peft import read_adapter
from worker_svc.backends.cpu_adapters import loras
from worker_svc.backends.cpu_model import batch
from worker_svc.inputs import StepInputs
from worker_svc.trial_step import TrialRow, trial_step

SIZE, LENGTH = 32, 21
ORDER = [1, 0, 4, 4, 8, 0, 6, 7]
# Mean error of a logit in standard deviations of logits.
TOLERANCE = {"": 0.02, "int8": 0.06}
# No dimension is a multiple of what the kernels like; heads of q, k and v begin inside of panels.
ODD = LlamaConfig(
    **{**SMALL, "hidden_size": 55, "intermediate_size": 77, "num_attention_heads": 5, "num_key_value_heads": 1},
    head_dim=16,
)
FAMILIES = {
    "odd": ODD,
    "phi3": Phi3Config(**SMALL, pad_token_id=0),
    "gemma2": Gemma2Config(**SMALL, head_dim=16, query_pre_attn_scalar=16),  # what o and down give is normed
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Made]:
    path, fused = tmp_path_factory.mktemp("lora"), ("qkv_proj", "o_proj", "gate_up_proj", "down_proj")
    return {name: make(path / name, config, *([fused] if name == "phi3" else [])) for name, config in FAMILIES.items()}


def opened(made: Made, mode: str, isa: str = "auto", threads: int = 2) -> Runner:
    model = packed(made.model, mode, made.model.parent)
    runner = Runner(model, isa=isa, threads=threads, num_blocks=32)
    for i, path in enumerate(made.adapters, 1):
        runner.model.set_adapter(i, loras(read_adapter(path, model.spec, 16)))
    return runner


def rows() -> list[TrialRow]:
    return [
        TrialRow(np.array(tokens(LENGTH, 151, seed=i)), 0, np.array([1 + 2 * i, 2 + 2 * i])) for i in range(len(ORDER))
    ]


def logits(runner: Runner, inputs: StepInputs, wanted: list[int] | None = None) -> Logits:
    """Of `wanted` alone, where some are."""
    asked = np.arange(len(inputs.token_ids)) if wanted is None else np.array(wanted, np.int64)
    runner.model.forward(batch(inputs, asked))
    return runner.model.logits(asked)


@pytest.mark.parametrize(("family", "mode"), [(f, "") for f in FAMILIES] + [("odd", "int8")])
def test_eight_in_one_step_are_near_the_merged_models(made: dict[str, Made], family: str, mode: str) -> None:
    mixed = logits(opened(made[family], mode), adapted(trial_step(rows(), SIZE), ORDER))
    plain = logits(opened(made[family], mode), trial_step(rows(), SIZE))
    for i, index in enumerate(ORDER):
        theirs_model = copy.deepcopy(made[family].base)
        if index:
            merge(theirs_model, made[family].adapters[index - 1])
        theirs = checkpoints.logits(theirs_model, rows()[i].tokens.tolist()).numpy()
        ours, bare = mixed[i * LENGTH : (i + 1) * LENGTH], plain[i * LENGTH : (i + 1) * LENGTH]
        error = np.abs(ours - theirs).mean() / theirs.std()
        assert error < TOLERANCE[mode], (index, error)
        if index:
            assert np.abs(bare - theirs).mean() / theirs.std() > 3 * error


@pytest.mark.parametrize("isa", library.load().isas)
def test_a_row_has_the_same_bits_in_any_company(made: dict[str, Made], isa: str) -> None:
    """Mixed, alone, chunked, on one thread or two, where the last layer is computed for some; and without an adapter
    as if there were none (R2).
    """
    for mode in ("", "int4"):
        runner, alone = opened(made["odd"], mode, isa), opened(made["odd"], mode, isa, threads=1)
        step = trial_step(rows(), SIZE)
        mixed = logits(runner, adapted(step, ORDER))
        some = [0, 5, LENGTH - 1, 2 * LENGTH, 3 * LENGTH + 7, 8 * LENGTH - 1]
        assert np.array_equal(logits(runner, adapted(step, ORDER), some), mixed[some])
        plain = logits(runner, step)
        for i, (row, index) in enumerate(zip(rows(), ORDER, strict=True)):
            ours, bare = mixed[i * LENGTH : (i + 1) * LENGTH], plain[i * LENGTH : (i + 1) * LENGTH]
            assert np.array_equal(ours, bare) == (index == 0)
            parts = []
            for start, end in ((0, 3), (3, 4), (4, LENGTH)):
                chunk = trial_step([TrialRow(row.tokens[:end], start, row.blocks)], SIZE)
                parts.append(logits(alone, adapted(chunk, [index])))
            assert np.array_equal(ours, np.concatenate(parts))


def test_what_was_taken_away_can_be_named_no_more(made: dict[str, Made]) -> None:
    runner = opened(made["odd"], "")
    runner.model.set_adapter(4, [])
    with pytest.raises(library.LibraryError, match=r"adapters\[2\] is 4, and none is there"):
        runner.model.forward(batch(adapted(trial_step(rows(), SIZE), ORDER)))


def test_what_cannot_be_an_adapter(made: dict[str, Made], tmp_path: Path) -> None:
    runner = opened(made["odd"], "")
    spec = packed(made["odd"].model, "", made["odd"].model.parent).spec
    each = loras(read_adapter(made["odd"].adapters[3], spec, 16))
    with pytest.raises(library.LibraryError, match="index is 1025, and must be 1 to 1024"):
        runner.model.set_adapter(1025, each)
    each[9].rank = 17
    with pytest.raises(library.LibraryError, match="lora 2 of layer 1: rank 17 must be a multiple of 16"):
        runner.model.set_adapter(1, each)

"""R2: whoever proposes, a stream is the one without drafts, token for token and score for score."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen3Config

from protos.wire import Setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import EPOCH
from tests.speculation.house import House, submits
from worker_svc import backends
from worker_svc.backends.base import BackendError, DeviceBackend, Options

VOCAB: int = SMALL["vocab_size"]
MODES: dict[str, dict[str, Any]] = {
    "cpu-bf16": {"dtype": "bfloat16"},
    "cpu-int4-int8": {"quantization": "int4", "kv_dtype": "int8"},
    "torch-float32": {"dtype": "float32"},
}
PROPOSERS = ("ngram", "suffix", "draft", "draft-other")
CASES = [
    pytest.param(proposer, mode, marks=[] if mode == "cpu-bf16" or proposer == one else pytest.mark.full)
    for proposer in PROPOSERS
    for mode, one in zip(MODES, ("", "ngram", "draft"), strict=True)
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    checkpoints.save(path / "target", LlamaConfig(**SMALL))
    checkpoints.save(path / "other", LlamaConfig(**{**SMALL, "num_hidden_layers": 1}), seed=3)
    checkpoints.save(path / "narrow", Qwen3Config(**{**SMALL, "vocab_size": 90, "head_dim": 16}))
    return path


def setup(models: Path, speculation: str, num_drafts: int, draft: str = "target", **fields: Any) -> Setup:
    common: dict[str, Any] = {"block_size": 32, "max_slots": 12, "threads": 2, "max_model_len": 128, **fields}
    if speculation:
        common |= {"speculation": speculation, "num_drafts": num_drafts}
    if speculation == "draft":
        common["draft_model"] = str(models / draft)
    return Setup(EPOCH, str(models / "target"), **common)


def create(message: Setup) -> DeviceBackend:
    return backends.create("auto", message, Options(Path(message.model).parent / "home", "cpu"))


@pytest.mark.parametrize(("proposer", "mode"), CASES)
def test_streams_are_those_without_drafts(models: Path, proposer: str, mode: str) -> None:
    is_quick = mode.startswith("cpu")  # torch looks whether it is exact whenever it loads: too slow to crash
    made = submits(48 if is_quick else 8, VOCAB, random.Random(f"{proposer} {mode}"))
    alone = House(setup(models, "", 0, kv_bytes=1 << 23, **MODES[mode]), create)
    alone.ready()
    expected = alone.run(made)
    name, _, draft = proposer.partition("-")
    mirrored = {"draft": 2, "draft-other": 4 / 3}.get(proposer, 1)
    few = int(6.5 * mirrored * (1 << 23) / alone.scheduler.stats().num_blocks)  # bytes: so that some are preempted
    house = House(setup(models, name, 5, draft or "target", kv_bytes=few, **MODES[mode]), create, depth=2)
    house.ready()
    assert house.run(made, crashes=(6, 12) if is_quick else ()) == expected
    assert house.drafted > house.accepted > 0
    assert house.scheduler.stats().preemptions > 0 or not is_quick


def test_a_draft_model_that_is_the_target_is_always_right(models: Path) -> None:
    """So its keys and values are where they should be, across the borders of blocks and cached prefixes."""
    made = submits(8, VOCAB, random.Random(1), temperature=0.0, max_tokens=70, stop_token_ids=(), **PLAIN)
    house = House(setup(models, "draft", 5, dtype="bfloat16"), create)
    house.ready()
    house.run(made)
    assert house.accepted == house.drafted > 300


PLAIN: dict[str, Any] = {
    "min_tokens": 0,
    "bad_words": (),
    "logit_bias": (),
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_draft_model_of_other_tokens_is_refused(models: Path, dtype: str) -> None:
    message = setup(models, "draft", 3, "narrow", dtype=dtype)
    with pytest.raises(BackendError, match=r"narrow has a vocabulary of 90 tokens, and .*target one of 151"):
        create(message).load(message, lambda phase, share: None)

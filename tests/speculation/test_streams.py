"""R2: whoever proposes, a stream is the one without drafts, token for token and score for score."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config

from protos.adapter_files import digest
from protos.wire import Setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.lora import save_adapter
from tests.models.session import EPOCH, load
from tests.speculation.eagle3_head import random_head
from tests.speculation.house import House, submits
from worker_svc import backends
from worker_svc.backends.base import BackendError, DeviceBackend, Options
from worker_svc.backends.cpu import CpuBackend

VOCAB: int = SMALL["vocab_size"]
MODES: dict[str, dict[str, Any]] = {
    "cpu-bf16": {"dtype": "bfloat16"},
    "cpu-int4-int8": {"quantization": "int4", "kv_dtype": "int8"},
    "torch-float32": {"dtype": "float32"},
}
PROPOSERS = ("ngram", "suffix", "draft", "draft-other", "eagle3")
CASES = [
    pytest.param(proposer, mode, marks=[] if mode == "cpu-bf16" or proposer == one else pytest.mark.full)
    for proposer in PROPOSERS
    for mode, one in zip(MODES, ("", "ngram", "draft"), strict=True)
    if proposer != "eagle3" or mode.startswith("cpu")
]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    target = checkpoints.save(path / "target", LlamaConfig(**SMALL))
    random_head(LlamaConfig(**SMALL, head_dim=16), len(target.model.layers)).save(path / "head")
    checkpoints.save(path / "other", LlamaConfig(**{**SMALL, "num_hidden_layers": 1}), seed=3)
    checkpoints.save(path / "narrow", Qwen3Config(**{**SMALL, "vocab_size": 90, "head_dim": 16}))
    return path


def setup(models: Path, speculation: str, num_drafts: int, draft: str = "target", **fields: Any) -> Setup:
    common: dict[str, Any] = {"block_size": 32, "max_slots": 12, "threads": 2, "max_model_len": 128, **fields}
    if speculation:
        common |= {"speculation": speculation, "num_drafts": num_drafts}
    if speculation in ("draft", "eagle3"):
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
    mirrored = {"draft": 2, "draft-other": 4 / 3, "eagle3": 11 / 6}.get(proposer, 1)
    few = int(6.5 * mirrored * (1 << 23) / alone.scheduler.stats().num_blocks)  # bytes: so that some are preempted
    model = draft or ("head" if name == "eagle3" else "target")
    house = House(setup(models, name, 5, model, kv_bytes=few, **MODES[mode]), create, depth=2)
    house.ready()
    assert house.run(made, crashes=(6, 12) if is_quick else ()) == expected
    assert house.drafted > house.accepted > 0, (house.drafted, house.accepted)
    assert house.scheduler.stats().preemptions > 0 or not is_quick


@pytest.mark.parametrize("proposer", ["ngram", "draft", "eagle3"])
def test_drafts_of_the_base_model_are_verified_under_each_rows_adapter(models: Path, proposer: str) -> None:
    target = LlamaForCausalLM.from_pretrained(models / "target")
    paths = {name: models / name for name in ("a", "b")}
    for seed, path in enumerate(paths.values()):
        save_adapter(path, target, rank=4 + 4 * seed, seed=seed, size=0.5)
    fields: dict[str, Any] = {"dtype": "bfloat16", "max_adapters": 2, "max_adapter_rank": 8}
    made = [
        replace(submit, adapter=name, adapter_digest=digest(paths[name]) if name else "")
        for submit, name in zip(submits(24, VOCAB, random.Random(7)), ["", "a", "b"] * 8, strict=True)
    ]
    alone = House(setup(models, "", 0, **fields), create, adapters=paths)
    alone.ready()
    expected = alone.run(made)
    model = "head" if proposer == "eagle3" else "target"
    house = House(setup(models, proposer, 5, model, **fields), create, 2, paths)
    house.ready()
    assert house.run(made, crashes=(6,)) == expected
    assert house.drafted > house.accepted > 0, (house.drafted, house.accepted)
    bare = House(setup(models, "", 0, **fields), create)
    bare.ready()
    theirs = bare.run([replace(submit, adapter="", adapter_digest="") for submit in made])
    assert sum(theirs[name] != expected[name] for name in theirs) > 8, "the adapters change nothing"


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


def test_what_a_step_takes_is_measured(models: Path) -> None:
    message = setup(models, "draft", 3, dtype="bfloat16", max_step_tokens=40)
    backend = create(message)
    capacity = load(backend, message)
    assert [size for size, _ in capacity.step_seconds] == [1, 2, 4, 8, 16, 32]
    assert [size for size, _ in capacity.propose_seconds] == [1, 2, 4, 8, 16]
    assert all(seconds > 0 for _, seconds in (*capacity.step_seconds, *capacity.propose_seconds))
    assert isinstance(backend, CpuBackend)
    assert not backend._model.kv()[:, 1:].any()
    plain = setup(models, "", 0, dtype="bfloat16")
    assert load(create(plain), plain).step_seconds == ()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_draft_model_of_other_tokens_is_refused(models: Path, dtype: str) -> None:
    message = setup(models, "draft", 3, "narrow", dtype=dtype)
    with pytest.raises(BackendError, match=r"narrow has a vocabulary of 90 tokens, and .*target one of 151"):
        create(message).load(message, lambda phase, share: None)

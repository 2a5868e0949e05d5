"""Speculation on the device of the tests, by the scheduler's own plans, two steps in flight: the streams are those
without, and drafts and plans are those of the torch backend's prompt lookup.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace
from transformers import LlamaConfig

from protos.adapter_files import digest
from protos.engine_wire import Submit
from protos.wire import RowResult, Sampling, Setup, StepPlan, StepResult
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.test_backend import setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.lora import save_adapter
from tests.speculation.house import House
from worker_svc.backends.base import BackendError, DeviceBackend, Landing
from worker_svc.backends.torch import TorchBackend
from worker_svc.gpu.backend import GpuBackend
from worker_svc.gpu.step_words import StepShape
from worker_svc.gpu.stepping import Flight

VOCAB, DRAFTS = 10, 3


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of so few tokens that much of what it says has been said before."""
    path = tmp_path_factory.mktemp("llama")
    model = checkpoints.save(path, LlamaConfig(**{**SMALL, "num_hidden_layers": 1, "vocab_size": VOCAB}))
    save_adapter(path / "adapter", model, size=0.5)
    return path


class Watched(House):
    """Remembers how each step was launched."""

    def __init__(self, *arguments: Any) -> None:
        self.shapes: list[StepShape] = []
        super().__init__(*arguments)

    def _landed(self, plan: StepPlan, answer: list[RowResult] | Landing) -> StepResult:
        if isinstance(answer, Flight):
            self.shapes.append(answer.packed.shape)
        return super()._landed(plan, answer)


def served(path: Path, made: list[Submit], captured: Sequence[int] | None, **fields: Any) -> Watched:
    """By the device where something is said of its captures, else by torch; what names the adapter has it."""
    adapters = {each.adapter: path / each.adapter for each in made if each.adapter}
    if adapters:
        fields |= {"max_adapters": 1, "max_adapter_rank": 16}

    def create(message: Setup) -> DeviceBackend:
        if captured is None:
            return TorchBackend(threads=1)
        return GpuBackend(FakePlace(random.Random(7)), lambda: None, 0.5, captured)

    house = Watched(setup(path, max_step_tokens=64, **fields), create, 2, adapters)
    house.ready()
    house.run(made)
    return house


def asked(rng: random.Random, wishes: Sequence[dict[str, Any]], max_tokens: int) -> list[Submit]:
    def prompt() -> list[int]:
        return (rng.choices(range(VOCAB), k=rng.randint(1, 4)) * 9)[: rng.randint(1, 12)]

    prompts = [prompt() for _ in wishes]
    fields = ({"max_tokens": max_tokens, "seed": rng.getrandbits(64), **wish} for wish in wishes)
    return [
        Submit(f"r{i}", tokens, len(tokens), Sampling(**each))
        for i, (tokens, each) in enumerate(zip(prompts, fields, strict=True))
    ]


PLAIN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 0.4, "min_p": 0.02},
]
# Many drafts stand, and each of them counts for what comes behind it: the first says a few tokens in turn.
EDITED: list[dict[str, Any]] = [
    {"temperature": 0.0, "frequency_penalty": 9.0, "logit_bias": ((1, 50.0), (2, 50.0), (3, 50.0)), "logprobs": 2},
    {"temperature": 0.0, "frequency_penalty": -2.0, "bad_words": ((4,), *((token,) * 4 for token in range(VOCAB)))},
    {
        "temperature": 0.3, "presence_penalty": -3.0, "min_tokens": 6, "eos_token_ids": (0, 1, 2, 3, 4, 5),
        "logit_bias": ((6, 1.0),), "prompt_logprobs": 1,
    },
]  # fmt: skip


@pytest.mark.parametrize(
    ("wishes", "captured"),
    [(PLAIN, (2,)), (EDITED, ()), pytest.param(EDITED, (2, 3), marks=pytest.mark.full)],
)
def test_streams_are_those_without(llama: Path, wishes: list[dict[str, Any]], captured: tuple[int, ...]) -> None:
    made = asked(random.Random(2), wishes, 10)
    if wishes is PLAIN:
        made[1] = replace(made[1], adapter="adapter", adapter_digest=digest(llama / "adapter"))
    speculation = {"speculation": "ngram", "num_drafts": DRAFTS}
    ours = served(llama, made, captured, **speculation)
    theirs = served(llama, made, None, **speculation)
    alone = served(llama, made, None)
    for name, stream in alone.streams.items():
        assert ours.streams[name].token_ids == stream.token_ids, name
        assert ours.streams[name].reason == stream.reason
        scores, expected = ours.streams[name].logprobs, stream.logprobs
        assert [(each.token_id, each.rank) for each in scores] == [(each.token_id, each.rank) for each in expected]
        assert len(ours.streams[name].prompt_logprobs) == len(stream.prompt_logprobs)
    assert (ours.plans, ours.drafted, ours.accepted) == (theirs.plans, theirs.drafted, theirs.accepted)
    assert ours.drafted > ours.accepted > 0
    replayed = [
        (shape.captured * DRAFTS, drafts)
        for shape, plan in zip(ours.shapes, ours.plans, strict=True)
        if shape.laid > 1 and (drafts := sum(row.num_drafts for row in plan.rows))
    ]
    assert bool(replayed) is bool(captured)
    assert isinstance(ours._backend, GpuBackend)
    assert [rows for rows, _ in ours._backend._engine.step_seconds] == list(captured)[::-1]
    assert not captured or any(drafts < most for most, drafts in replayed), "no row has fewer drafts than its graph"


@pytest.mark.parametrize("name", ["suffix", "draft", "eagle3"])
def test_other_proposers_are_refused(llama: Path, name: str) -> None:
    backend = GpuBackend(FakePlace(random.Random(0)), lambda: None, 0.5, ())
    message = setup(llama, speculation=name, num_drafts=2, draft_model=str(llama))
    with pytest.raises(
        BackendError, match=f"speculation '{name}' is not supported by the cuda backend, only '', 'ngram'"
    ):
        backend.load(message, lambda phase, share: None)

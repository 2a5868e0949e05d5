"""Whole steps on the device of the tests: plans as words, inputs made there, graphs, steps in flight. The tokens are
those of the CPU's torch backend, and there is no hazard, whatever finishes when.
"""

from __future__ import annotations

import random
from pathlib import Path

import msgspec
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from kernels.gpu.slot_state import SlotState
from protos.wire import Epoch, Row, RowResult, Setup, StepPlan
from tests.device.fake import FakeDevice
from tests.gpu_worker.plans import Plans
from tests.gpu_worker.runner import WHERE, GpuRunner
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.backends.torch import TorchBackend
from worker_svc.device.base import Event
from worker_svc.gpu.engine import GpuEngine, Room
from worker_svc.gpu.step_words import StepPacker, StepShape, Words
from worker_svc.gpu.stepping import Flight, Steps
from worker_svc.kv_cache import KVCache
from worker_svc.pipeline import Pipeline, Sizes
from worker_svc.slots import SlotError, SlotTable

SLOTS, BLOCK_SIZE, BLOCKS, LENGTH = 4, 8, 64, 64


class Greedy:
    """The likeliest token, and nothing else that a sampler does."""

    width = 1

    def sample(self, logits: Tensor, slots: Tensor, mask: Tensor | None, results: Tensor) -> Tensor:
        tokens = logits.argmax(-1, keepdim=True).to(torch.int32)
        results.copy_(tokens)
        return tokens

    def read(self, words: Words, flight: Flight) -> list[RowResult]:
        sampled = dict(zip(flight.packed.inputs.sample_rows.tolist(), words[:, 0].tolist(), strict=False))
        starts = flight.packed.starts.tolist()
        rows = enumerate(flight.plan.rows)
        return [RowResult(row.slot, starts[i], [sampled[i]] if i in sampled else []) for i, row in rows]


class NoWatch:
    def follow(self, event: Event) -> None: ...

    def close(self) -> None: ...


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**{**SMALL, "num_hidden_layers": 2}))
    return path


def steps_on(device: FakeDevice, path: Path, captured: tuple[int, ...], depth: int) -> Steps:
    runner = GpuRunner(path, block_size=BLOCK_SIZE)
    state = SlotState.empty(SLOTS, LENGTH, LENGTH // BLOCK_SIZE, WHERE)
    cache = KVCache(runner.kv_shape, BLOCKS, BLOCK_SIZE)
    table = SlotTable(
        max_slots=SLOTS, max_model_len=LENGTH, block_size=BLOCK_SIZE, num_blocks=BLOCKS, vocab_size=runner.vocab_size
    )
    sampler, room = Greedy(), Room(SLOTS, 64, BLOCK_SIZE)
    engine = GpuEngine(device, runner.model, runner.attention, cache.pages, state, sampler, room, captured)
    pipeline = Pipeline(device, engine, Sizes(plan=1024, mask=64, results=64), depth)
    return Steps(pipeline, engine, StepPacker(table, state, captured), sampler, sampler.width, NoWatch())


def on_the_cpu(path: Path, plans: list[StepPlan]) -> list[list[RowResult]]:
    block = 2 * 2 * 2 * 16 * BLOCK_SIZE * 4  # layers, K and V, kv heads, head_dim, tokens, float32
    backend = TorchBackend(threads=1)
    backend.load(
        Setup(
            Epoch(1, 1), str(path), block_size=BLOCK_SIZE, max_slots=SLOTS, max_model_len=LENGTH,
            kv_bytes=block * BLOCKS,
        ),
        lambda phase, share: None,
    )  # fmt: skip
    answers = []
    for plan in plans:
        backend.forward(plan)
        answers.append(backend.sample(None))
    return answers


def flown(
    steps: Steps, plans: list[StepPlan], rng: random.Random, shapes: list[StepShape] | None = None
) -> list[list[RowResult]]:
    flights, answers = [], []
    for plan in plans:
        steps.forward(plan)
        flights.append(steps.sample(None))
        if shapes is not None:
            shapes.append(flights[-1].packed.shape)
        while flights and flights[0].has_come() and rng.random() < 0.5:
            answers.append(flights.pop(0).rows())
    return answers + [flight.rows() for flight in flights]


def test_tokens_are_those_of_the_cpu(llama: Path) -> None:
    rng = random.Random(2)
    plans = list(Plans(rng, vocab=151, slots=SLOTS).take(12, streams=5, temperature=0.0))
    assert any(row.append_token_ids for plan in plans for row in plan.rows)
    assert sum(len(plan.rows) > 1 for plan in plans) > 5
    device = FakeDevice(rng, eager=0.4)
    assert flown(steps_on(device, llama, (), 2), plans, rng) == on_the_cpu(llama, plans)


@pytest.mark.parametrize(("captured", "depth"), [((1, 2, 4), 2), ((4,), 3)])
def test_steps_of_one_token_a_row_are_replayed(llama: Path, captured: tuple[int, ...], depth: int) -> None:
    rng = random.Random(depth)
    some = Plans(rng, vocab=151, slots=SLOTS, chunk=25, eager=1.0, outputs=(3, 6))
    plans = list(some.take(12, streams=5, temperature=0.0))
    shapes: list[StepShape] = []
    device = FakeDevice(rng, eager=0.4)
    assert flown(steps_on(device, llama, captured, depth), plans, rng, shapes) == on_the_cpu(llama, plans)
    filled = [shape.captured - len(plan.rows) for shape, plan in zip(shapes, plans, strict=True) if shape.captured]
    assert len(filled) >= 4
    assert max(filled) > 0, "no null rows"


def test_what_cannot_be_followed_is_refused_before_it_is_launched(llama: Path) -> None:
    device = FakeDevice(random.Random(0))
    steps = steps_on(device, llama, (), 2)
    plan = next(Plans(random.Random(1), vocab=151).take(1, streams=1))
    launched = len(device.pending)
    with pytest.raises(SlotError, match="slot 3 is not admitted"):
        steps.forward(msgspec.structs.replace(plan, rows=[Row(3, 0, 1)]))
    assert len(device.pending) == launched

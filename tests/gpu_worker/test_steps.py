"""Whole steps on the device of the tests: plans as words, inputs made there, graphs, steps in flight. The tokens are
those of the CPU's torch backend, and there is no hazard, whatever finishes when.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import msgspec
import pytest
from transformers import LlamaConfig

from kernels.gpu.slot_state import SlotState
from protos.wire import Epoch, Mask, Row, RowResult, Setup, StepPlan
from tests.device.fake import FakeDevice
from tests.gpu_worker.place import NoWatch
from tests.gpu_worker.plans import EPOCH, Plans
from tests.gpu_worker.runner import WHERE, GpuRunner
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.backends.torch import TorchBackend
from worker_svc.gpu.engine import GpuEngine, Room
from worker_svc.gpu.sample_words import SamplePacker
from worker_svc.gpu.step_words import StepPacker, StepShape
from worker_svc.gpu.stepping import Steps
from worker_svc.kv_cache import KVCache
from worker_svc.pipeline import Pipeline, Sizes
from worker_svc.sampling_rules import SamplerError
from worker_svc.slots import SlotError, SlotTable

SLOTS, BLOCK_SIZE, BLOCKS, LENGTH = 4, 8, 64, 64


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
    room = Room(SLOTS, 64, BLOCK_SIZE)
    engine = GpuEngine(device, runner.model, runner.attention, cache.pages, state, room, captured)
    pipeline = Pipeline(device, engine, Sizes(plan=1024, mask=1024, results=1024), depth)
    return Steps(pipeline, engine, StepPacker(table, state, captured), SamplePacker(table), NoWatch())


Masks = list[Mask | None]


def on_the_cpu(path: Path, plans: list[StepPlan], masks: Masks | None = None) -> list[list[RowResult]]:
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
    for plan, mask in zip(plans, masks or [None] * len(plans), strict=True):
        backend.forward(plan)
        answers.append(backend.sample(mask))
    return answers


def flown(
    steps: Steps,
    plans: list[StepPlan],
    rng: random.Random,
    shapes: list[StepShape] | None = None,
    masks: Masks | None = None,
) -> list[list[RowResult]]:
    flights, answers = [], []
    for plan, mask in zip(plans, masks or [None] * len(plans), strict=True):
        steps.forward(plan)
        flights.append(steps.sample(mask))
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


@pytest.mark.parametrize(("captured", "depth"), [((1, 2, 4), 2), pytest.param((4,), 3, marks=pytest.mark.full)])
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


WISHES: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_k": 7, "top_p": 0.8, "logprobs": 2},
    {"temperature": 1.3, "min_p": 0.02, "prompt_logprobs": 3, "frequency_penalty": 0.7, "repetition_penalty": 1.2},
    {"temperature": 0.0, "logit_bias": ((5, 9.0), (9, -100.0)), "bad_words": ((5,), (9, 5), (5, 9)), "logprobs": 0},
    {"temperature": 1.0, "min_tokens": 4, "eos_token_ids": tuple(range(3, 140)), "presence_penalty": -1.5},
]


def masks_of(plans: list[StepPlan], rng: random.Random) -> Masks:
    """Of whole words of bits, so that hardly a row is left with nothing."""
    masks: Masks = []
    for plan in plans:
        rows = [i for i, row in enumerate(plan.rows) if row.masked]
        bits = bytes(rng.choice((0x00, 0xFF, 0x55)) for _ in range(len(rows) * 4 * -(-151 // 32)))
        masks.append(Mask(EPOCH, plan.step, rows, bits) if rows else None)
    return masks


@pytest.mark.parametrize("captured", [pytest.param((), marks=pytest.mark.full), (1, 2, 4)])
def test_what_requests_wish_for_is_done_on_the_device(llama: Path, captured: tuple[int, ...]) -> None:
    rng = random.Random(len(captured))
    some = Plans(rng, vocab=151, slots=SLOTS, chunk=25, outputs=(4, 8))
    plans = list(some.take(14, streams=6, wishes=WISHES, masked=0.3))
    masks = masks_of(plans, rng)
    assert sum(mask is not None for mask in masks) >= 3
    device = FakeDevice(rng, eager=0.4)
    ours = flown(steps_on(device, llama, captured, 2), plans, rng, masks=masks)
    theirs = on_the_cpu(llama, plans, masks)
    assert [bare(step) for step in ours] == [bare(step) for step in theirs]
    scores = [[logprob for row in step for logprob in numbers(row)] for step in ours]
    assert sum(map(len, scores)) > 50
    for mine, step in zip(scores, theirs, strict=True):
        assert mine == pytest.approx([logprob for row in step for logprob in numbers(row)], abs=1e-4)


def bare(step: list[RowResult]) -> list[object]:
    """All but the probabilities themselves."""
    return [
        (
            row.slot,
            row.start,
            row.token_ids,
            *((e.token_id, e.rank, e.top_ids) for e in row.logprobs + row.prompt_logprobs),
        )
        for row in step
    ]


def numbers(row: RowResult) -> list[float]:
    return [number for e in row.logprobs + row.prompt_logprobs for number in (e.logprob, *e.top_logprobs)]


def test_a_row_that_cannot_be_sampled_is_named(llama: Path) -> None:
    rng = random.Random(5)
    plans = list(Plans(rng, vocab=151, chunk=25, eager=1.0).take(1, streams=1, masked=1.0))
    nothing = Mask(EPOCH, 1, [0], bytes(4 * -(-151 // 32)))
    steps = steps_on(FakeDevice(rng), llama, (), 2)
    with pytest.raises(SamplerError, match="slot 1: no token is allowed"):
        flown(steps, plans, rng, masks=[nothing])


def test_what_cannot_be_followed_is_refused_before_it_is_launched(llama: Path) -> None:
    device = FakeDevice(random.Random(0))
    steps = steps_on(device, llama, (), 2)
    plan = next(Plans(random.Random(1), vocab=151).take(1, streams=1))
    launched = len(device.pending)
    with pytest.raises(SlotError, match="slot 3 is not admitted"):
        steps.forward(msgspec.structs.replace(plan, rows=[Row(3, 0, 1)]))
    assert len(device.pending) == launched

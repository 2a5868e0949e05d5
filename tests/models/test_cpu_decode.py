"""Steps that only count up: the same results as the general way, and its errors."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from protos.wire import Admit, Mask, Row, RowResult, Sampling
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import EPOCH, Session
from tests.models.stepping import tokens
from tests.models.test_cpu_backend import create, setup
from worker_svc.backends import cpu
from worker_svc.backends.cpu_decode import Decode
from worker_svc.sampling_rules import SamplerError
from worker_svc.slots import SlotError

BLOCK = 32
Step = tuple[list[Row], list[Admit], list[int]]  # rows, admit, release


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**SMALL))
    return path


def session(path: Path) -> Session:
    message = setup(path)
    return Session(message, create(message, "cpu"))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """What `advance` answered, plan by plan."""
    answers: list[bool] = []
    advance = Decode.advance

    def watched(self: Decode, plan: Any) -> bool:
        answers.append(advance(self, plan))
        return answers[-1]

    monkeypatch.setattr(Decode, "advance", watched)
    return answers


class Story:
    """Plans at random, as a scheduler may send them: who comes, goes, is in a prompt, gets blocks ahead of time."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.free = list(range(1, 60))
        self.slots: dict[int, tuple[int, int, list[int]]] = {}  # slot → length, computed, blocks
        self.masked: set[int] = set()

    def steps(self, count: int) -> Iterator[Step]:
        for _ in range(count):
            calm = self.rng.random() < 0.8
            release = [] if calm else [slot for slot in self.slots if self.rng.random() < 0.3]
            for slot in release:
                self.free += self.slots.pop(slot)[2]
            admit = [] if calm and self.slots else [self._admit()] if len(self.slots) < 4 else []
            order = list(self.slots)
            if not calm:
                self.rng.shuffle(order)
            yield [self._row(slot) for slot in order if calm or self.rng.random() < 0.8], admit, release

    def _blocks(self, count: int) -> list[int]:
        return [self.free.pop(self.rng.randrange(len(self.free))) for _ in range(count)]

    def _admit(self) -> Admit:
        slot = next(slot for slot in range(1, 9) if slot not in self.slots)
        length = self.rng.randrange(1, 70)
        blocks = self._blocks(-(-length // BLOCK))
        self.slots[slot] = length, 0, blocks
        (self.masked.add if self.rng.random() < 0.3 else self.masked.discard)(slot)
        sampling = Sampling(
            max_tokens=999,
            seed=self.rng.getrandbits(64),
            temperature=self.rng.choice([0.0, 1.0]),
            logprobs=self.rng.choice([-1, -1, -1, 2]),
            repetition_penalty=1.3 if self.rng.random() < 0.05 else 1.0,
        )
        return Admit(slot, tokens(length, 151, seed=length), length, [list(blocks)], sampling)

    def _row(self, slot: int) -> Row:
        length, computed, blocks = self.slots[slot]
        count = min(length - computed, self.rng.choice([1, 16, 64]))
        new: list[int] = []
        if length + 1 > len(blocks) * BLOCK or self.rng.random() < 0.02:
            new = self._blocks(self.rng.choice([1, 1, 2]))
        start = computed if computed + 1 < length or self.rng.random() < 0.2 else -1
        start = computed if computed == 0 else start
        samples = computed + count == length
        self.slots[slot] = length + samples, computed + count, blocks + new
        return Row(
            slot,
            start,
            count,
            0,
            [new] if new else [],
            samples,
            samples and (slot in self.masked) != (self.rng.random() < 0.02),
        )


def told(one: Session, steps: list[Step]) -> list[list[RowResult]]:
    """Masks are random, and those of their step."""
    results = []
    for number, (rows, admit, release) in enumerate(steps):
        masked = [i for i, row in enumerate(rows) if row.masked]
        words = random.Random(number).randbytes(4 * 5 * len(masked))
        mask = Mask(EPOCH, number + 1, masked, words) if masked else None
        results.append(one.step(rows, admit, release, mask=mask))
    return results


@pytest.mark.parametrize("seed", range(6))
def test_the_same_results_as_the_general_way(
    llama: Path, seed: int, counted: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = list(Story(seed).steps(200))
    got = told(session(llama), steps)
    assert counted.count(True) > 30, "most steps only count up"
    assert counted.count(False) > 3
    monkeypatch.setattr(cpu, "repeatable", lambda inputs, outputs: False)
    counted.clear()
    assert got == told(session(llama), steps)
    assert not counted


def begun(path: Path, prompt: int = 4, blocks: int = 1, slots: tuple[int, ...] = (1, 2), **fields: Any) -> Session:
    """Two steps behind the prompts, so that the next one only counts up."""
    one = session(path)
    sampling = Sampling(max_tokens=999, **{"temperature": 0.0, **fields})
    admits = [
        Admit(slot, tokens(prompt, 151), prompt, [list(range(20 * i + 1, 20 * i + 1 + blocks))], sampling)
        for i, slot in enumerate(slots)
    ]
    one.step([Row(slot, 0, prompt, sample=True) for slot in slots], admits)
    for _ in range(2):
        one.step([Row(slot, -1, 1, sample=True) for slot in slots])
    return one


ONE, OTHER = Row(1, -1, 1, sample=True), Row(2, -1, 1, sample=True)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ONE, Row(2, 5, 1, sample=True)], "slot 2 cannot compute positions 5..5 and sample: it knows 7 .* computed 6"),
        ([ONE, Row(2, -1, 1, 0, [[9999]], True)], "slot 2 gets blocks 9999..9999"),
        ([ONE, Row(2, -1, 1, 0, [[5], [6]], True)], "slot 2 gets blocks of 2 KV groups"),
        ([ONE, OTHER, OTHER], "has two rows for slot 2"),
        ([ONE, Row(3, -1, 1, sample=True)], "slot 3 is not admitted"),
        ([ONE, Row(2, -1, 0, sample=True)], "slot 2 cannot compute"),
        ([ONE, Row(2, -1, 1, 0, [], True, False, [151])], "slot 2 gets token 151"),
    ],
)
def test_a_row_that_contradicts_its_slot_is_refused(llama: Path, rows: list[Row], message: str) -> None:
    with pytest.raises(SlotError, match=message):
        begun(llama).step(rows)


def test_a_position_without_a_block_is_refused(llama: Path, counted: list[bool]) -> None:
    one = begun(llama, prompt=28)
    one.step([ONE, OTHER])
    one.step([ONE, Row(2, -1, 1, 0, [[50]], True)])
    with pytest.raises(SlotError, match=r"slot 1 cannot compute positions 32\.\.32 .* has blocks for 32"):
        one.step([ONE, OTHER])
    assert counted == [True, True, True]


def test_a_slot_that_would_outgrow_its_table_is_refused(llama: Path, counted: list[bool]) -> None:
    one = begun(llama, prompt=507, blocks=16)
    one.step([ONE, OTHER])
    one.step([ONE, OTHER])
    with pytest.raises(SlotError, match="slot 1 would hold more tokens than max_model_len 512"):
        one.step([ONE, OTHER])
    assert counted == [True, True, True, False]


def test_another_epoch_forgets_the_count(llama: Path) -> None:
    one = begun(llama)
    one.backend.reset(one.setup)
    with pytest.raises(SlotError, match="slot 1 is not admitted"):
        one.step([ONE, OTHER])


def test_logits_that_are_no_numbers_name_their_slot(tmp_path: Path, counted: list[bool]) -> None:
    """Found while counting up: a forced choice of the token that overflows."""
    made = checkpoints.save(tmp_path, LlamaConfig(**SMALL))
    checkpoints.overflow(made, 5)
    made.save_pretrained(tmp_path)
    one = begun(tmp_path)
    one.backend._decode.outputs.sampled[1] = 5  # type: ignore[attr-defined]
    with pytest.raises(SamplerError, match="slot 2: the model's logits are not numbers"):
        one.step([ONE, OTHER])
    assert counted == [True, True]

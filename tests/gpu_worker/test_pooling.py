"""Pooled prompts on the device of the tests: the torch backend's vectors, whole and in chunks, beside a stream."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from transformers import LlamaConfig

from protos.wire import Admit, Row, RowResult, Sampling, StepPlan
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.plans import EPOCH
from tests.gpu_worker.test_backend import setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.models.session import load
from tests.models.stepping import tokens
from worker_svc.backends.base import DeviceBackend
from worker_svc.backends.torch import TorchBackend
from worker_svc.gpu import pooling
from worker_svc.gpu.backend import GpuBackend
from worker_svc.slots import SlotError

PROMPTS = [("mean", 13), ("last", 9), ("cls", 7), ("mean", 1), ("", 3)]
WHOLE = [[13], [9], [7], [1], [3]]
CHUNKS = [[4, 5, 13], [2, 8, 9], [1, 6, 7], [1], [2, 3]]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    return path


def pooled_by(backend: DeviceBackend, ends: Sequence[Sequence[int]]) -> list[bytes]:
    """Prompts up to `ends`, all in one batch; the one that is not pooled samples, and goes on while others end."""
    prompts = [tokens(length, 151, seed=length) for _, length in PROMPTS]
    admits = [
        Admit(slot, prompt, len(prompt), [[2 * slot - 1, 2 * slot]], Sampling(0 if how else 9), pooling=how)
        for slot, (prompt, (how, _)) in enumerate(zip(prompts, PROMPTS, strict=True), 1)
    ]
    answers = []
    for step in range(3):
        rows = []
        for slot, (stops, prompt) in enumerate(zip(ends, prompts, strict=True), 1):
            samples = slot == len(PROMPTS) and (step >= len(stops) or stops[step] == len(prompt))
            if step < len(stops):
                start = stops[step - 1] if step else 0
                rows.append(Row(slot, start, stops[step] - start, sample=samples))
            elif samples:
                rows.append(Row(slot, -1, 1, sample=True))
        backend.forward(StepPlan(EPOCH, step + 1, [], [] if step else admits, [], rows[::-1]))
        answers.append(backend.sample(None))
    results = [row for answer in answers for row in (answer if isinstance(answer, list) else answer.rows())]
    assert sum(len(row.token_ids) for row in results) == 4 - len(ends[-1])
    found = {row.slot: row.pooled for row in results if row.pooled}
    assert len(found) == sum(bool(row.pooled) for row in results) == 4
    return [found[slot] for slot in range(1, 5)]


def check_vectors(ours: list[bytes], theirs: list[bytes]) -> None:
    for vector, right in zip(ours, theirs, strict=True):
        floats, expected = np.frombuffer(vector, "<f4"), np.frombuffer(right, "<f4")
        np.testing.assert_allclose(floats, expected, rtol=0, atol=1e-5 * float(np.linalg.norm(expected)))


def opened(path: Path, attention: str = "torch", **fields: object) -> GpuBackend:
    backend = GpuBackend(FakePlace(random.Random(2), eager=0.2), lambda: None, 0.5, (1, 4), attention)
    capacity = load(backend, setup(path, **{"max_slots": 5, "max_step_tokens": 40, **fields}))
    assert capacity.hidden_size == 64
    return backend


def test_vectors_are_those_of_the_torch_backend(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And to the bit the same in chunks, where rows do not feel each other. A new epoch begins anew."""
    monkeypatch.setattr(pooling, "STATES_AT_ONCE", 6)
    torch_backend = TorchBackend(threads=1)
    load(torch_backend, setup(llama, max_slots=5, kv_bytes=1 << 20))
    expected = pooled_by(torch_backend, WHOLE)
    backend = opened(llama, "triton", batch_invariant=True)
    whole = pooled_by(backend, WHOLE)
    check_vectors(whole, expected)
    backend.reset(setup(llama))
    assert pooled_by(backend, CHUNKS) == whole
    backend.close()


def test_what_a_slots_holder_left_is_not_the_nexts(llama: Path) -> None:
    backend = opened(llama)
    prompt, other = tokens(6, 151), tokens(6, 151, seed=9)

    def step(number: int, admit: list[int], row: Row, release: list[int]) -> list[RowResult]:
        admits = [Admit(1, admit, 6, [[1, 2]], Sampling(0), pooling="mean")] if admit else []
        backend.forward(StepPlan(EPOCH, number, release, admits, [], [row]))
        answer = backend.sample(None)
        return answer if isinstance(answer, list) else answer.rows()

    (alone,) = step(1, prompt, Row(1, 0, 6), [])
    assert step(2, other, Row(1, 0, 4), [1])[0].pooled == b""
    (again,) = step(3, prompt, Row(1, 0, 6), [1])
    assert again.pooled == alone.pooled != b""
    with pytest.raises(SlotError, match="slot 1 pools by mean, and has 2 of the 6 states for it"):
        step(4, prompt, Row(1, 4, 2), [1])
    backend.close()

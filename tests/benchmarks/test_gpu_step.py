"""The plans by which a GPU worker is measured, on the device of the tests."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from transformers import LlamaConfig

from benchmarks.gpu_step import BLOCK_SIZE, EPOCH, Driver, measure
from protos.wire import Setup
from tests.gpu_worker.place import FakePlace
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.gpu.backend import GpuBackend


def test_every_row_gets_its_tokens(tmp_path: Path) -> None:
    checkpoints.save(tmp_path, LlamaConfig(**{**SMALL, "num_hidden_layers": 1}))
    backend = GpuBackend(FakePlace(random.Random(1)), lambda: None, 0.5, (1, 2))
    setup = Setup(EPOCH, str(tmp_path), block_size=BLOCK_SIZE, max_slots=2, max_model_len=32, max_step_tokens=16)
    driver = Driver(backend, backend.load(setup, lambda phase, share: None).vocab_size)
    prompts = driver.run(driver.prompts(2, 20, 7, 16))
    assert [[len(row.token_ids) for row in step] for step in prompts] == [[0], [1, 0], [1]]
    decodes = driver.run(driver.decodes(2, 7))
    assert [[(row.start, len(row.token_ids)) for row in step] for step in decodes] == [
        [(21 + i, 1)] * 2 for i in range(7)
    ]
    driver.run(driver.releases(2))
    figures = measure(driver, 1, argparse.Namespace(input=20, output=7, chunk=16))
    assert figures.batch == 1
    assert min(figures.step_ms, figures.launch_ms, figures.prompt_tokens_a_second) > 0

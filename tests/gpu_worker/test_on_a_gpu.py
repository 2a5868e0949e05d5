"""The cuda backend on a GPU: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu_worker`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.gpu_worker.plans import Plans
from tests.gpu_worker.test_backend import setup
from tests.gpu_worker.test_steps import WISHES, bare, on_the_cpu
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.backends.base import Landing
from worker_svc.backends.cuda import cuda_backend

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**{**SMALL, "num_hidden_layers": 2}))
    return path


@pytest.mark.parametrize("captured", [(), (1, 2, 4)])
def test_tokens_are_those_of_the_cpu(captured: tuple[int, ...], llama: Path) -> None:
    rng = random.Random(len(captured))
    backend = cuda_backend("cuda", lambda: None, 0.2, captured)
    backend.load(setup(llama), lambda phase, share: None)
    some = Plans(rng, vocab=151, chunk=25, outputs=(4, 8))
    plans = list(some.take(40, streams=20, wishes=WISHES))
    landings: list[Landing] = []
    torch.cuda.set_sync_debug_mode("error")  # whatever waits for the GPU without saying so
    for plan in plans:
        backend.forward(plan)
        landings.append(backend.sample(None))
    torch.cuda.set_sync_debug_mode("default")
    answers = [landing.rows() for landing in landings]
    assert [bare(step) for step in answers] == [bare(step) for step in on_the_cpu(llama, plans)]
    backend.close()

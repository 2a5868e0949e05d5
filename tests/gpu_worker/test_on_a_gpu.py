"""The cuda backend on a GPU: `TRITON_INTERPRET=0 pytest -m gpu tests/gpu_worker`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from tests.gpu_worker.plans import Plans
from tests.gpu_worker.test_adapters import check_mixed, make
from tests.gpu_worker.test_backend import setup
from tests.gpu_worker.test_pooling import CHUNKS, WHOLE, check_vectors, pooled_by
from tests.gpu_worker.test_speculation import DRAFTS, EDITED, PLAIN, VOCAB, asked, served
from tests.gpu_worker.test_steps import WISHES, bare, on_the_cpu
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from tests.speculation.house import House
from worker_svc.backends.base import BackendError, DeviceBackend, Landing
from worker_svc.backends.cuda import cuda_backend
from worker_svc.backends.torch import TorchBackend

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


def test_adapters_are_those_of_the_merged_models(tmp_path: Path) -> None:
    made = make(tmp_path, LlamaConfig(**{**SMALL, "num_hidden_layers": 2}))
    backend = cuda_backend("cuda", lambda: None, 0.2, (5,))
    backend.load(setup(made.model, max_slots=5, max_adapters=3, max_adapter_rank=16), lambda phase, share: None)
    check_mixed(backend, made, 5)
    backend.close()


def test_pooled_prompts_are_those_of_torch(llama: Path) -> None:
    asked = setup(llama, max_slots=5, kv_bytes=1 << 20)
    backends: list[DeviceBackend] = [cuda_backend("cuda", lambda: None, 0.2, (1, 4)), TorchBackend(threads=1)]
    for backend in backends:
        backend.load(asked, lambda phase, share: None)
    ours, theirs = (pooled_by(*pair) for pair in zip(backends, (CHUNKS, WHOLE), strict=True))
    check_vectors(ours, theirs)
    for backend in backends:
        backend.close()


@pytest.mark.parametrize("captured", [(), (1, 2, 4)])
def test_streams_with_drafts_are_those_of_the_cpu_without(captured: tuple[int, ...], tmp_path: Path) -> None:
    checkpoints.save(tmp_path, LlamaConfig(**{**SMALL, "num_hidden_layers": 1, "vocab_size": VOCAB}))
    made = asked(random.Random(2), [*PLAIN, *EDITED], 20)
    speculation = {"max_slots": 8, "speculation": "ngram", "num_drafts": DRAFTS}
    message = setup(tmp_path, max_step_tokens=64, **speculation)
    house = House(message, lambda message: cuda_backend("cuda", lambda: None, 0.2, captured), depth=2)
    house.ready()
    streams = house.run(made)
    for name, stream in served(tmp_path, made, None).streams.items():
        assert streams[name].token_ids == stream.token_ids, name
    assert house.drafted > house.accepted > 0


@pytest.mark.parametrize("library", ["flash_attn", "flashinfer", "triton"])
def test_every_library_that_is_there_has_the_tokens_of_torch(library: str, tmp_path: Path) -> None:
    """In bfloat16, greedy, for as long as they agree: most of a stream, since one rounding may turn a token."""
    checkpoints.save(tmp_path, LlamaConfig(**{**SMALL, "num_hidden_layers": 2, "head_dim": 64}))
    same = total = 0
    for ours, expected in zip(_greedy(tmp_path, library), _greedy(tmp_path, "torch"), strict=True):
        same += sum(a == b for a, b in zip(ours, expected, strict=True))
        total += len(expected)
    assert same >= 0.9 * total > 0


def _greedy(path: Path, library: str) -> list[list[object]]:
    backend = cuda_backend("cuda", lambda: None, 0.2, (1, 2, 4), library)
    try:
        backend.load(setup(path, dtype="auto", block_size=16), lambda phase, share: None)
    except BackendError as error:
        pytest.skip(str(error))
    plans = Plans(random.Random(3), vocab=151, block_size=16, chunk=25, outputs=(4, 8)).take(
        30, streams=16, temperature=0.0
    )
    answers = []
    for plan in plans:
        backend.forward(plan)
        answers.append(bare(backend.sample(None).rows()))
    backend.close()
    return answers

"""The device's backend by its seam: what it can do, what it refuses, and a new epoch on top of steps in flight."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
from transformers import GPTNeoXConfig, LlamaConfig

from protos.wire import LoadAdapter, Phase, Setup
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.plans import EPOCH, Plans
from tests.gpu_worker.test_steps import on_the_cpu
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.adapters.places import AdapterError
from worker_svc.backends.base import BackendError, Capacity
from worker_svc.gpu.backend import GpuBackend
from worker_svc.gpu.memory import DeviceMemory, blocks_that_fit

BLOCK = 2 * 2 * 2 * 16 * 8 * 4  # bytes: layers, K and V, kv heads, head_dim, tokens, float32


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("llama")
    checkpoints.save(path, LlamaConfig(**{**SMALL, "num_hidden_layers": 2}))
    return path


def setup(path: Path, **fields: Any) -> Setup:
    given = {"dtype": "float32", "block_size": 8, "max_slots": 4, "max_model_len": 64, "max_step_tokens": 48, **fields}
    return Setup(epoch=EPOCH, model=str(path), **given)


def loaded(
    path: Path, rng: random.Random, captured: tuple[int, ...] = (), **fields: Any
) -> tuple[GpuBackend, Capacity]:
    backend = GpuBackend(FakePlace(rng), lambda: None, 0.5, captured)
    return backend, backend.load(setup(path, **fields), lambda phase, share: None)


def test_it_says_what_it_can_do(llama: Path) -> None:
    phases: list[tuple[Phase, float]] = []
    backend = GpuBackend(FakePlace(random.Random(0)), lambda: None, 0.5, (1, 2, 16))
    capacity = backend.load(setup(llama), lambda phase, share: phases.append((phase, share)))
    assert capacity.num_blocks == (1 << 20) // BLOCK
    assert (capacity.graph_shapes, capacity.max_model_len, capacity.exact) == ((1, 2), 64, False)
    assert (capacity.backend, capacity.device, capacity.dtype) == ("cuda", "a device of the tests", "float32")
    assert phases[-1] == (Phase.COMPILING, 1.0)
    assert any(phase is Phase.LOADING for phase, _ in phases)
    with pytest.raises(AdapterError, match="max_adapters is 0"):
        backend.load_adapter(LoadAdapter(EPOCH, 0, "any", "", "nowhere"))
    assert loaded(llama, random.Random(0), dtype="auto")[1].fingerprint != capacity.fingerprint
    backend.close()


def test_a_new_epoch_over_steps_in_flight(llama: Path) -> None:
    rng = random.Random(1)
    backend, _ = loaded(llama, rng, (1, 2, 4))
    old = list(Plans(rng, vocab=151).take(4, streams=3, temperature=0.0))
    for plan in old:
        backend.forward(plan)
        backend.sample(None)
    backend.reset(setup(llama))
    plans = list(Plans(rng, vocab=151, chunk=25, outputs=(3, 5)).take(8, streams=4, temperature=0.0))
    answers = []
    for plan in plans:
        backend.forward(plan)
        answers.append(backend.sample(None))
    assert [landing.rows() for landing in answers] == on_the_cpu(llama, plans)
    backend.close()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dtype": "float16"}, "dtype 'float16' is not supported by the cuda backend"),
        ({"quantization": "int2"}, "quantization 'int2' is not supported by the cuda backend"),
        ({"kv_dtype": "int8"}, "kv_dtype 'int8'"),
        ({"max_model_len": 513}, "max_model_len 513 is over the model's 512"),
        ({"max_slots": 2000}, "max_slots 2000 is more than the 1024 rows"),
        ({"kv_bytes": 1 << 22}, "kv_bytes is 0.00 GiB, and 0.00 GiB of the device's memory are free"),
    ],
)
def test_what_it_refuses(fields: dict[str, Any], message: str, llama: Path) -> None:
    with pytest.raises(BackendError, match=message):
        loaded(llama, random.Random(0), **fields)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (GPTNeoXConfig(**{**SMALL, "num_key_value_heads": None}), "its architecture is none that runs on this device"),
    ],
)
def test_models_that_it_refuses(config: Any, message: str, tmp_path: Path) -> None:
    checkpoints.save(tmp_path, config)
    with pytest.raises(BackendError, match=message):
        loaded(tmp_path, random.Random(0))


GIB = 1 << 30
H100 = DeviceMemory(80 * GIB, 18 * GIB, GIB)


def test_memory_for_blocks() -> None:
    block = 2 << 20
    assert blocks_that_fit(H100, 0.9, block, 16, 8192) == int(53 * GIB // block)
    assert blocks_that_fit(H100, 0.9, block, 16, 8192, 10 * GIB) == 5120
    with pytest.raises(BackendError, match=r"kv_bytes is 62\.00 GiB, and 61\.00 GiB of the device's memory are free"):
        blocks_that_fit(H100, 0.9, block, 16, 8192, 62 * GIB)
    expected = (
        "0.25 of 80.00 GiB less 18.00 GiB for weights and the largest step, less 1.00 GiB that is in use besides, "
        "leave 1.00 GiB for KV, and a sequence of max_model_len 8192 tokens needs 1.00 GiB"
    )
    with pytest.raises(BackendError, match=re.escape(expected)):
        blocks_that_fit(H100, 0.25, block, 16, 8192)
    assert blocks_that_fit(H100, 0.25, block, 16, 8176) == 512
    with pytest.raises(BackendError, match=r"leave -7\.00 GiB for KV, and one block needs"):
        blocks_that_fit(H100, 0.15, block, 16, 0)

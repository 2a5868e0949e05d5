"""Keys and values in float8 on a device: what the pages hold, what attention makes of it, and a backend of it."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from kernels.gpu.attention_plan import AttentionShape
from tests.gpu_worker.place import FakePlace
from tests.gpu_worker.plans import Plans
from tests.gpu_worker.runner import KIND, WHERE, GpuRunner
from tests.gpu_worker.test_backend import setup
from tests.models import checkpoints
from tests.models.checkpoints import SMALL
from worker_svc.attention.choice import Where, choose
from worker_svc.attention.paged import Rows
from worker_svc.backends.base import BackendError
from worker_svc.gpu.backend import GpuBackend
from worker_svc.gpu.model import StepTensors

FP8, PROMPT, BLOCK_SIZE = torch.float8_e4m3fn, 41, 16


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("qwen")
    checkpoints.save(path, Qwen3Config(**{**SMALL, "num_hidden_layers": 2}, head_dim=32))
    return path


def prefill(
    runner: GpuRunner, kv_dtype: torch.dtype, library: str, scales: tuple[float, float]
) -> tuple[Tensor, Tensor]:
    """Pages and logits [PROMPT, vocab] of one prompt."""
    model, spec = runner.model, runner.model.spec
    kv_scales = torch.tensor([scales[0]], device=WHERE), torch.tensor([scales[1]], device=WHERE)
    model.layers = [replace(layer, kv_scales=kv_scales) for layer in model.layers]
    shape = AttentionShape(
        spec.num_heads, spec.num_kv_heads, spec.head_dim, BLOCK_SIZE, torch.float32, kv_dtype, spec.query_scale, 64
    )
    attention = choose(library, [shape], Where(KIND, WHERE, (0, 0), 2, 1)).attention
    blocks = torch.tensor([[2, 1, 3]], dtype=torch.int32, device=WHERE)
    at = torch.arange(PROMPT, dtype=torch.int32, device=WHERE)
    slots = blocks[0, (at // BLOCK_SIZE).long()] * BLOCK_SIZE + at % BLOCK_SIZE
    tokens = (at * 7 + 3) % runner.vocab_size
    lens = torch.tensor([PROMPT], dtype=torch.int32, device=WHERE)
    rows = Rows(torch.tensor([0, PROMPT], dtype=torch.int32, device=WHERE), lens, blocks)
    plans = {window: each.plan([PROMPT], [PROMPT]) for window, each in attention.items()}
    size = (spec.num_layers, 2, 4, spec.num_kv_heads, BLOCK_SIZE, spec.head_dim)
    pages = torch.zeros(size, dtype=kv_dtype, device=WHERE)
    hidden = model.forward(StepTensors(tokens, at, slots, rows, plans), pages, attention)
    logits = torch.empty(PROMPT, runner.vocab_size, device=WHERE)
    model.logits(hidden, at, logits)
    return pages, logits


@pytest.mark.parametrize("scales", [pytest.param((1.0, 1.0), marks=pytest.mark.full), (0.25, 2.0)])
def test_pages_hold_rounded_keys_and_attention_reads_them_so(qwen: Path, scales: tuple[float, float]) -> None:
    runner = GpuRunner(qwen, block_size=BLOCK_SIZE)
    exact, expected = prefill(runner, torch.float32, "triton", (1.0, 1.0))
    pages, logits = prefill(runner, FP8, "triton", scales)
    stored = exact[0] / torch.tensor(scales, device=WHERE).view(2, 1, 1, 1, 1)
    assert torch.equal(pages[0].float(), stored.to(FP8).float()), "the first layer's depend on no other's"
    theirs = prefill(runner, FP8, "torch", scales)
    torch.testing.assert_close(logits, theirs[1], atol=2e-2, rtol=2e-2)  # a last bit of a key may turn in layer 2
    assert 0 < (logits - expected).abs().mean() < 0.05 * expected.std()


def test_a_backend_of_it(qwen: Path) -> None:
    """Half the memory of bfloat16 a block; greedy tokens are mostly those of float32 KV; steps are replayed."""
    rng = random.Random(4)
    answers, blocks = {}, {}
    for kv_dtype in ("auto", "fp8"):
        backend = GpuBackend(FakePlace(rng), lambda: None, 0.5, (1, 2), "torch")
        message = setup(qwen, dtype="auto", kv_dtype=kv_dtype, max_slots=2)
        capacity = backend.load(message, lambda phase, share: None)
        assert capacity.kv_dtype == ("fp8" if kv_dtype == "fp8" else "")
        flights = []
        for plan in Plans(random.Random(5), vocab=151, slots=2, chunk=25).take(8, streams=3, temperature=0.0):
            backend.forward(plan)
            flights.append(backend.sample(None))
        answers[kv_dtype] = [[row.token_ids for row in landing.rows()] for landing in flights]
        blocks[kv_dtype] = capacity.num_blocks, capacity.fingerprint
        backend.close()
    assert blocks["fp8"][0] == 2 * blocks["auto"][0]
    assert blocks["fp8"][1] != blocks["auto"][1]
    pairs = [(a, b) for ours, theirs in zip(*answers.values(), strict=True) for a, b in zip(ours, theirs, strict=True)]
    assert sum(a == b for a, b in pairs) > 0.7 * len(pairs) > 5


def test_what_computes_it_and_what_does_not(qwen: Path) -> None:
    with pytest.raises(BackendError, match="kv_dtype 'bf16' is not supported by the cuda backend, only 'auto', 'fp8'"):
        GpuBackend(FakePlace(random.Random(0)), lambda: None, 0.5, ()).load(
            setup(qwen, kv_dtype="bf16"), lambda phase, share: None
        )
    place = FakePlace(random.Random(0), capability=(9, 0))
    with pytest.raises(BackendError, match="attention_backend 'flash_attn': flash_attn would want queries of float8"):
        GpuBackend(place, lambda: None, 0.5, (), "flash_attn").load(
            setup(qwen, dtype="auto", kv_dtype="fp8"), lambda phase, share: None
        )

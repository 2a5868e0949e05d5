"""Layers and attention against the plain oracles of kernels/reference.py."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from kernels import reference
from worker_svc.attention.cpu import attend, lay_out
from worker_svc.kv_cache import KVCache, KVShape
from worker_svc.layers.activation import ACTIVATIONS, silu
from worker_svc.layers.linear import Linear, padded_rows
from worker_svc.layers.norm import rms_norm
from worker_svc.layers.rotary import rotate
from worker_svc.models.rope import Rope
from worker_svc.trial_step import TrialRow, trial_step


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 96), (8, 1, 128), (6, 2, 10), (5, 5, 33)])
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (1, 0.0), (50, 0.0), (128, 3.0)])
def test_paged_attention(heads: int, kv_heads: int, dim: int, window: int, softcap: float) -> None:
    torch.manual_seed(0)
    block_size = 16
    cache = KVCache(KVShape(2, kv_heads, dim, torch.float32), 64, block_size)
    cache.pages.copy_(torch.randn(cache.pages.shape))
    free = iter(np.random.default_rng(0).permutation(np.arange(1, 64)).tolist())
    lengths = [(300, 210), (128, 127), (129, 128), (40, 0), (1, 0), (7, 6)]  # known, first computed
    rows = [
        TrialRow(np.zeros(n, np.int64), start, np.array([next(free) for _ in range(-(-n // block_size))]))
        for n, start in lengths
    ]
    inputs = trial_step(rows, block_size)
    q = torch.randn(padded_rows(len(inputs.token_ids)), heads, dim)
    out = attend(q, lay_out(inputs, cache, window), cache, layer=1, scale=dim**-0.5, softcap=softcap)
    for i, row in enumerate(rows):
        mine = slice(int(inputs.cu[i]), int(inputs.cu[i + 1]))
        expected = reference.paged_attention(
            q[mine],
            cache.pages[1],
            torch.from_numpy(row.blocks),
            torch.from_numpy(inputs.positions[mine]),
            dim**-0.5,
            window,
            softcap,
        )
        torch.testing.assert_close(out[mine].view(-1, heads, dim), expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("dim", [8, 10])
def test_rotate(dim: int) -> None:
    x, positions = torch.randn(7, 3, 10), torch.tensor([0, 1, 5, 99, 1000, 8191, 3])
    rope = Rope(dim=dim, theta=1e5)
    cos, sin = (torch.from_numpy(table)[positions][:, None] for table in rope.tables(8192))
    expected = reference.rotate(x, positions, torch.from_numpy(rope.frequencies(8192)))
    torch.testing.assert_close(rotate(x, cos, sin), expected, atol=1e-5, rtol=1e-5)


def test_rms_norm_and_swiglu() -> None:
    x, weight, up = torch.randn(5, 576) * 3, torch.randn(576), torch.randn(5, 576)
    torch.testing.assert_close(rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5))
    torch.testing.assert_close(silu(x) * up, reference.swiglu(x, up))
    extreme = torch.tensor([-1e4, -100.0, 0.0, 100.0, 1e4])
    assert torch.equal(silu(extreme), torch.tensor([0.0, 0.0, 0.0, 100.0, 1e4]))


@pytest.mark.parametrize(("name", "approximate"), [("gelu", "none"), ("gelu_tanh", "tanh")])
def test_gelu(name: str, approximate: str) -> None:
    x = torch.linspace(-9, 9, 1001)
    torch.testing.assert_close(
        ACTIVATIONS[name](x), torch.nn.functional.gelu(x, approximate=approximate), atol=1e-6, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, bias: bool) -> None:
    weight, offset = torch.randn(77, 33).to(dtype), torch.randn(77).to(dtype) if bias else None
    x = torch.randn(padded_rows(300), 33).to(dtype)
    expected = x.double() @ weight.double().T + (offset.double() if offset is not None else 0)
    tolerance = 1e-4 if dtype == torch.float32 else 0.01 * math.sqrt(33)
    torch.testing.assert_close(Linear(weight, offset)(x).double(), expected, atol=tolerance, rtol=tolerance)

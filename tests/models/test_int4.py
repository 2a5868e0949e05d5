"""Codes of four bits: a file's own are kept to the last bit, others are chosen well."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from worker_svc.models.checkpoint import open_checkpoint
from worker_svc.models.raw_tensor import CheckpointError, RawTensor
from worker_svc.quant.int4 import GROUP, Int4, int4, rounded

Floats = NDArray[np.float32]


def decoded(weights: Int4) -> Floats:
    k = weights.codes.shape[1]
    d, m = (np.repeat(part.view(np.float16).astype(np.float32), GROUP, 1)[:, :k] for part in (weights.d, weights.m))
    back: Floats = d * weights.codes + m
    return back


def blocks(kind: str, n: int, k: int) -> RawTensor:
    """Random ones: float16 scales of 2⁻⁸ … 2⁻⁵, any nibbles."""
    rng = np.random.default_rng(k)
    heads = 1 if kind == "Q4_0" else 2
    scales = rng.uniform(2**-8, 2**-5, (n * k // 32, heads)) * rng.choice([-1, 1], (n * k // 32, heads))
    data = np.concatenate(
        [scales.astype(np.float16).view(np.uint8), rng.integers(0, 256, (n * k // 32, 16), np.uint8)], axis=1
    )
    return RawTensor("t", kind, (n, k), data)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1"])
def test_a_files_own_blocks_are_kept(kind: str) -> None:
    tensor = blocks(kind, 5, 96)
    made = int4(tensor)
    assert np.array_equal(decoded(made), tensor.float32())
    order = np.array([4, 0, 2])
    assert np.array_equal(decoded(int4(tensor.take(order))), tensor.float32()[order])


def test_the_real_models_blocks_are_kept(model_path: Path) -> None:
    checkpoint = open_checkpoint(model_path)
    for name in ("blk.0.attn_q.weight", "blk.17.ffn_down.weight"):
        tensor = checkpoint.tensor(name)
        assert np.array_equal(decoded(int4(tensor)), tensor.float32())


@pytest.mark.parametrize("k", [32, 64, 50, 7])
def test_rounding_beats_the_plain_grid(k: int) -> None:
    w = (np.random.default_rng(k).standard_t(5, (200, k)) * 0.02).astype(np.float32)
    made = rounded(w)
    assert made.codes.shape == (200, k)
    assert made.codes.max() <= 15
    assert made.d.shape == made.m.shape == (200, -(-k // 32))
    ours = ((decoded(made) - w) ** 2).sum()
    plain = 0.0
    for begin in range(0, k, 32):
        part = w[:, begin : begin + 32]
        low = part.min(1, keepdims=True)
        step = (part.max(1, keepdims=True) - low) / 15
        plain += float(((np.rint((part - low) / step) * step + low - part) ** 2).sum())
    assert ours < (0.93 if k >= 32 else 1.01) * plain


def test_odd_groups() -> None:
    """All equal, zeros, one outlier, values beyond what a float16 scale resolves."""
    w = np.zeros((4, 32), np.float32)
    w[1] = 0.37
    w[2, 5] = 4.0
    w[3] = np.linspace(-1e-7, 1e-7, 32)
    back = decoded(rounded(w))
    assert np.array_equal(back[0], w[0])
    assert np.abs(back[1] - w[1]).max() < 2e-4
    assert abs(back[2, 5] - 4.0) < 0.01
    assert np.abs(back[2] - w[2]).max() < 0.01
    assert np.abs(back[3] - w[3]).max() < 2e-7


def test_weights_that_are_no_numbers_are_refused() -> None:
    w = np.zeros((2, 32), np.float32)
    w[1, 3] = np.inf
    with pytest.raises(CheckpointError, match="'t' has weights that are not finite"):
        int4(RawTensor("t", "F32", (2, 32), w))
    for kind, at in (("Q4_0", 0), ("Q4_1", 0), ("Q4_1", 2)):
        good = blocks(kind, 2, 64)
        good.data[3, at : at + 2] = np.array([0x7E00], "<u2").view(np.uint8)
        with pytest.raises(CheckpointError, match="'t' has weights that are not finite"):
            int4(good)


@pytest.mark.parametrize(
    "tensor",
    [
        RawTensor("t", "F32", (1, 40), np.full((1, 40), 1e9, np.float32)),
        RawTensor("t", "F32", (1, 32), np.where(np.arange(32) == 5, 1e38, 0).astype(np.float32)[None]),
        RawTensor("t", "Q4_0", (1, 32), np.array([[0xFF, 0x7B, *range(16)]], np.uint8)),  # 65504, and 8 times that
    ],
)
def test_weights_that_float16_scales_cannot_say_are_refused(tensor: RawTensor) -> None:
    with pytest.raises(CheckpointError, match="'t' has weights too great for int4"):
        int4(tensor)

"""Routing, sorting by expert and the fused MLPs of experts, against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from kernels.gpu.moe import TILES, experts, tile_for
from kernels.gpu.routing import route, sort_pairs
from tests.kernels_triton.compare import DEVICE, INTERPRETED, normal, padded
from tests.kernels_triton.paged import SM90, this_device

KIND = "sm_90" if INTERPRETED else this_device(SM90).kind


def expected_route(logits: Tensor, top_k: int, normalized: bool) -> tuple[Tensor, Tensor]:
    chosen = torch.sort(logits, dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = logits.double().softmax(-1).gather(1, chosen)
    return chosen.int(), weights / weights.sum(-1, keepdim=True) if normalized else weights


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 9),
    num=st.sampled_from([1, 2, 5, 8, 60, 128]),
    top_k=st.integers(1, 8),
    normalized=st.booleans(),
    equal=st.booleans(),
)
def test_route(tokens: int, num: int, top_k: int, normalized: bool, equal: bool) -> None:
    logits = normal(tokens, num) * 3
    if equal:
        logits = logits.round()  # many ties: the lower number first
    top_k = min(top_k, num)
    chosen, weights = route(logits, top_k, normalized=normalized)
    theirs, expected = expected_route(logits, top_k, normalized)
    assert chosen.equal(theirs)
    torch.testing.assert_close(weights.double(), expected, atol=1e-6, rtol=1e-5)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 330),
    num=st.sampled_from([1, 3, 8, 128]),
    top_k=st.integers(1, 3),
    rows=st.sampled_from([16, 64]),
    skew=st.sampled_from([0, 1, 50]),
)
def test_pairs_lie_by_expert_in_tiles(tokens: int, num: int, top_k: int, rows: int, skew: int) -> None:
    """`skew`: 50 is almost all to one expert, and none to most."""
    generator = torch.Generator().manual_seed(tokens)
    chosen = (torch.rand(tokens, top_k, generator=generator) ** (1 + skew) * num).int().clamp(max=num - 1).to(DEVICE)
    pairs = sort_pairs(chosen, num, rows)
    assert pairs.order.long().equal(chosen.flatten().argsort(stable=True))
    sorted_experts = chosen.flatten()[pairs.order.long()].tolist()
    covered = []
    for expert, first, end in pairs.tiles.T.tolist():
        assert 0 <= expert < num
        assert end - first <= rows
        covered += [(at, expert) for at in range(first, end)]
    assert covered == list(enumerate(sorted_experts))


def expected_experts(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalized: bool) -> Tensor:
    chosen, weights = expected_route(logits, top_k, normalized)
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for token, (mine, shares) in enumerate(zip(chosen.tolist(), weights.tolist(), strict=True)):
        for expert, share in zip(mine, shares, strict=True):
            gate, up = (gate_up[expert].double() @ x[token].double()).chunk(2)
            out[token] += share * (down[expert].double() @ (functional.silu(gate) * up))
    return out


def check(
    tokens: int, num: int, top_k: int, hidden: int, inner: int, dtype: torch.dtype, tolerance: float, skew: float = 1.0
) -> None:
    x, out = normal(tokens, hidden + 3, dtype=dtype)[:, :hidden], padded(tokens, hidden, 5, dtype)
    logits = normal(tokens, num, seed=1) * 2 + torch.arange(num, device=DEVICE) * (skew - 1)
    gate_up = normal(num * 2 * inner, hidden, dtype=dtype, seed=2).view(num, 2 * inner, hidden) * hidden**-0.5
    down = normal(num * hidden, inner, dtype=dtype, seed=3).view(num, hidden, inner) * inner**-0.5
    experts(x, logits, gate_up, down, "silu", top_k, out, normalized=True, kind=KIND)
    expected = expected_experts(x, logits, gate_up, down, top_k, True)
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("tokens", "num", "top_k", "hidden", "inner"),
    [
        (1, 4, 1, 32, 16),
        (3, 8, 2, 48, 40),
        (17, 8, 3, 100, 33),
        (64, 128, 8, 40, 24),
        pytest.param(200, 8, 2, 128, 80, marks=pytest.mark.full),
    ],
)
def test_experts(tokens: int, num: int, top_k: int, hidden: int, inner: int) -> None:
    check(tokens, num, top_k, hidden, inner, torch.float32, 2e-5)


@pytest.mark.parametrize("skew", [1.0, 9.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_experts_of_halves(dtype: torch.dtype, skew: float) -> None:
    check(23, 4, 2, 136, 72, dtype, 3e-2 if dtype == torch.bfloat16 else 4e-3, skew)


def test_tiles_are_as_tall_as_an_expert_has_rows() -> None:
    for kind, tiles in TILES.items():
        assert [tile_for(kind, torch.bfloat16, n, 8).rows for n in (1, 128, 129, 500, 8192)] == [16, 16, 32, 64, 128]
        assert {tile_for(kind, torch.bfloat16, n, 8, batch_invariant=True) for n in (1, 500, 8192)} == {tiles[2]}


def test_refusals() -> None:
    x, weights = normal(2, 8), normal(4 * 12, 8).view(4, 12, 8)
    with pytest.raises(ValueError, match="top_k 5 of 4 experts"):
        route(normal(2, 4), 5, normalized=True)
    with pytest.raises(ValueError, match=r"down has shape \[4, 12, 8\], not \[4, 8, 6\]"):
        experts(x, normal(2, 4), weights, weights, "silu", 2, x.clone(), normalized=True, kind=KIND)
    down = normal(4 * 8, 6).view(4, 8, 6)
    with pytest.raises(ValueError, match=r"logits has shape \[2, 5\], not \[2, 4\]"):
        experts(x, normal(2, 5), weights, down, "silu", 2, x.clone(), normalized=True, kind=KIND)

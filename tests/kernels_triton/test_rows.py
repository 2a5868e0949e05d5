"""Gated activations, embedding rows, grammar masks and flat block tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import reference
from kernels.gpu.activation import ACTIVATIONS, gated
from kernels.gpu.embedding import embed
from kernels.gpu.flat_tables import flatten_tables
from kernels.gpu.grammar_mask import mask_logits
from tests.kernels_triton.compare import DEVICE, PLACE, beside, near, normal, padded

DTYPES = list(PLACE)


@pytest.mark.parametrize("size", [1, 31, 1024, 1536, 2049])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gated(size: int, activation: str, dtype: torch.dtype) -> None:
    gate_up = normal(3, 2 * size + 5, dtype=dtype)[:, :-5] * 4
    out = padded(3, size, 8, dtype)
    gated(gate_up, activation, out)
    expected = reference.gated(gate_up[:, :size].double(), gate_up[:, size:].double(), activation)
    near(out, expected, atol=2e-6)
    assert (beside(out) == 7).all()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gates_far_out(activation: str) -> None:
    """Where exp overflows: nothing, or the gate itself."""
    gate = torch.tensor([[-1e4, -200.0, 0.0, 200.0, 1e4]], device=DEVICE)
    out = torch.empty(1, 5, device=DEVICE)
    gated(torch.cat([gate, torch.ones_like(gate)], 1), activation, out)
    near(out, gate.clamp(0), atol=1e-30)


@settings(max_examples=30)
@given(
    tokens=st.integers(1, 5),
    hidden=st.integers(1, 2100),
    vocab=st.integers(1, 40),
    first=st.integers(0, 30),
    scale=st.sampled_from([1.0, 24.0]),
    dtype=st.sampled_from(DTYPES),
    ids=st.sampled_from([torch.int32, torch.int64]),
)
def test_embedding(
    tokens: int, hidden: int, vocab: int, first: int, scale: float, dtype: torch.dtype, ids: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    token_ids = torch.randint(-1, 60, (tokens,), generator=generator).to(DEVICE, ids)
    table, out = normal(vocab, hidden + 3, dtype=dtype)[:, :hidden], padded(tokens, hidden, 4, dtype)
    embed(token_ids, table, out, first_id=first, scale=scale)
    near(out, reference.embed(token_ids.cpu(), table.cpu(), first, scale))
    assert (beside(out) == 7).all()


def test_shards_of_a_vocabulary_add_up() -> None:
    table, token_ids = normal(10, 33), torch.tensor([0, 3, 4, 9], device=DEVICE)
    parts = torch.empty(2, 4, 33, device=DEVICE)
    embed(token_ids, table[:4], parts[0])
    embed(token_ids, table[4:], parts[1], first_id=4)
    assert torch.equal(parts.sum(0), table[token_ids])


@settings(max_examples=30)
@given(
    vocab=st.integers(1, 2200),
    order=st.permutations(range(5)),
    masks=st.integers(1, 5),
    skipped=st.sets(st.integers(0, 4)),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_mask(vocab: int, order: list[int], masks: int, skipped: set[int], dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (masks, -(-vocab // 32)), generator=generator).int()
    rows = torch.tensor([-1 if i in skipped else row for i, row in enumerate(order)][:masks], dtype=torch.int32)
    logits = padded(5, vocab, 9, dtype)
    logits.copy_(normal(5, vocab, dtype=dtype, seed=seed))
    expected = logits.clone().cpu()
    mask_logits(logits, words.to(DEVICE), rows.to(DEVICE))
    reference.mask_logits(expected, words, rows)
    assert torch.equal(logits.cpu(), expected)
    assert (beside(logits) == 7).all()


def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(*shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (gated, (normal(2, 9), "silu", normal(2, 4)), r"gate_up has shape \[2, 9\], not \[2, 8\]"),
        (gated, (normal(2, 8), "relu", normal(2, 4)), "activation is 'relu', not one of silu, gelu_tanh, gelu"),
        (gated, (normal(2, 8), "silu", integers(2, 4)), "out is torch.int32"),
        (embed, (normal(2), normal(5, 4), normal(2, 4)), "token_ids is torch.float32"),
        (embed, (integers(2), normal(5, 3), normal(2, 4)), r"table has shape \[5, 3\], not \[any, 4\]"),
        (embed, (integers(2), normal(4, 5).T, normal(2, 4)), "table has stride 5"),
        (mask_logits, (normal(4, 65), integers(2, 2), integers(2)), r"bitmask has shape \[2, 2\], not \[2, 3\]"),
        (mask_logits, (normal(4, 64), integers(2, 2, dtype=torch.int64), integers(2)), "bitmask is torch.int64"),
        (mask_logits, (normal(4, 64), integers(2, 2), integers(3)), r"rows has shape \[3\], not \[2\]"),
    ],
)
def test_what_does_not_fit_is_named(function: Any, arguments: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        function(*arguments)


def test_nothing_to_do() -> None:
    gated(normal(0, 8), "silu", normal(0, 4))
    embed(integers(0), normal(5, 4), normal(0, 4))
    mask_logits(normal(4, 64), integers(0, 2), integers(0))


@settings(max_examples=20)
@given(counts=st.lists(st.integers(0, 300), min_size=1, max_size=5), spare=st.integers(0, 3))
def test_flat_tables(counts: list[int], spare: int) -> None:
    tables = torch.arange(len(counts) * (max(counts) + spare), dtype=torch.int32, device=DEVICE).view(len(counts), -1)
    borders = torch.tensor([0, *counts], device=DEVICE).cumsum(0).int()
    blocks = torch.full((sum(counts) + 2,), -7, dtype=torch.int32, device=DEVICE)
    flatten_tables(tables, borders, blocks)
    expected = torch.cat([table[:count] for table, count in zip(tables, counts, strict=True)])
    assert blocks[:-2].equal(expected)
    assert (blocks[-2:] == -7).all()

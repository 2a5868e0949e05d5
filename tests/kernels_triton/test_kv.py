"""Keys and values into pages: alone, and after norm and rope."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import reference
from kernels.gpu.kv_write import PAGES, kv_write
from kernels.gpu.rope import rope_kv_write
from tests.kernels_triton.compare import DEVICE, PLACE, near, normal

FLOAT8 = torch.float8_e4m3fn
BLOCKS = 7


class Shape(NamedTuple):
    heads: int
    kv_heads: int
    dim: int
    rotary: int


SHAPES = [
    Shape(9, 3, 64, 64),  # SmolLM2
    Shape(8, 2, 128, 128),
    Shape(4, 1, 80, 32),  # part of the dimensions turns, no power of two
    Shape(3, 3, 96, 96),
    Shape(5, 5, 24, 10),
]


def new_pages(shape: Shape, block_size: int, dtype: torch.dtype) -> Tensor:
    """Of two layers, the second one: not at the start of its memory, and full of something."""
    whole = normal(2, 2, BLOCKS, shape.kv_heads, block_size, shape.dim, seed=9)
    return whole.to(dtype)[1]


def new_slots(tokens: int, block_size: int, seed: int) -> Tensor:
    """All different, some -1."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.randperm(BLOCKS * block_size, generator=generator)[:tokens]
    slots[torch.rand(tokens, generator=generator) < 0.2] = -1
    return slots.to(DEVICE)


def new_scales(dtype: torch.dtype) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if dtype != FLOAT8:
        return None, None
    return torch.tensor(0.037, device=DEVICE), torch.tensor([0.11], device=DEVICE)


def table_of(frequencies: Tensor, positions: int) -> Tensor:
    angles = torch.arange(positions)[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], 1).to(DEVICE)


def same_pages(actual: Tensor, expected: Tensor, exact: bool) -> None:
    if exact:
        assert torch.equal(actual.cpu().view(torch.uint8), expected.view(torch.uint8))
    elif actual.dtype == FLOAT8:  # another float32 may fall to the other side of a border: one place
        torch.testing.assert_close(actual.cpu().float(), expected.float(), rtol=2.0**-3, atol=2.0**-9)
    else:
        near(actual, expected, atol=1e-5)


@pytest.mark.parametrize("block_size", [1, 16, 20])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pages_dtype", PAGES, ids=str)
def test_write_alone(shape: Shape, pages_dtype: torch.dtype, block_size: int) -> None:
    """Out of a packed qkv; what is not named keeps its bits."""
    dtype = torch.float32 if pages_dtype == FLOAT8 else pages_dtype
    tokens = 6
    packed = normal(tokens, 2 * shape.kv_heads + 1, shape.dim, dtype=dtype)
    k, v = packed[:, : shape.kv_heads], packed[:, shape.kv_heads : -1]
    pages, slots = new_pages(shape, block_size, pages_dtype), new_slots(tokens, block_size, seed=block_size)
    expected = pages.clone().cpu()
    scales = new_scales(pages_dtype)
    kv_write(k, v, slots, pages, *scales)
    reference.kv_write(k.cpu(), v.cpu(), slots.cpu(), expected, *(s if s is None else s.cpu() for s in scales))
    same_pages(pages, expected, exact=True)


@settings(max_examples=40)
@given(
    shape=st.sampled_from(SHAPES),
    block_size=st.sampled_from([1, 16, 20]),
    tokens=st.integers(1, 6),
    dtype=st.sampled_from(list(PLACE)),
    pages_dtype=st.sampled_from(PAGES),
    normed=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    seed=st.integers(0, 99),
)
def test_norm_rope_and_write(
    shape: Shape,
    block_size: int,
    tokens: int,
    dtype: torch.dtype,
    pages_dtype: torch.dtype,
    normed: bool,
    offset: float,
    seed: int,
) -> None:
    width = (shape.heads + 2 * shape.kv_heads) * shape.dim
    qkv = normal(tokens, width + 16, dtype=dtype, seed=seed)[:, :width]
    before = qkv.clone()
    positions = torch.randint(0, 50, (tokens,), generator=torch.Generator().manual_seed(seed))
    frequencies = 10_000.0 ** -(torch.arange(0, shape.rotary, 2) / shape.rotary)
    norms = (normal(shape.dim, dtype=dtype, seed=1), normal(shape.dim, dtype=dtype, seed=2)) if normed else (None, None)
    pages, slots = new_pages(shape, block_size, pages_dtype), new_slots(tokens, block_size, seed)
    expected, scales = pages.clone().cpu(), new_scales(pages_dtype)
    q_out = torch.empty(tokens, shape.heads, shape.dim, dtype=dtype, device=DEVICE)
    rope_kv_write(
        qkv, positions.to(DEVICE, torch.int32), table_of(frequencies, 50), slots, q_out, pages,
        q_norm=norms[0], k_norm=norms[1], eps=1e-6, weight_offset=offset, k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip
    on_cpu: dict[str, Any] = {
        "norms": tuple(weight.cpu() for weight in norms if weight is not None) or None,
        "scales": tuple(scale if scale is None else scale.cpu() for scale in scales),
    }
    q = reference.rope_kv_write(
        qkv.cpu(), positions, frequencies, slots.cpu(), expected, shape.heads, eps=1e-6, offset=offset, **on_cpu
    )
    near(q_out, q, atol=1e-5)
    same_pages(pages, expected, exact=False)
    unnamed = torch.ones(BLOCKS * block_size, dtype=torch.bool)
    unnamed[slots[slots >= 0].cpu()] = False
    untouched = new_pages(shape, block_size, pages_dtype)
    kept = [one.cpu().view(torch.uint8).transpose(2, 3).flatten(1, 2)[:, unnamed] for one in (pages, untouched)]
    assert torch.equal(*kept)
    if pages_dtype in (dtype, FLOAT8):  # values do not turn, and there is one way to round them
        same_pages(pages[1], expected[1], exact=True)
    assert torch.equal(qkv, before)


def test_tokens_of_one_slot_mapping_do_not_meet() -> None:
    """Each program writes its own token alone: the same token in other company has the same bits."""
    shape, tokens = SHAPES[0], 5
    qkv = normal(tokens, (shape.heads + 2 * shape.kv_heads) * shape.dim)
    table = table_of(10_000.0 ** -(torch.arange(0, 64, 2) / 64), 50)
    positions, slots = torch.arange(tokens, device=DEVICE), torch.arange(tokens, device=DEVICE) * 3
    results = []
    for part in (slice(0, tokens), slice(2, 3)):
        pages = new_pages(shape, 16, FLOAT8)
        q_out = torch.empty(tokens, shape.heads, shape.dim, device=DEVICE)[part]
        scale = torch.ones(1, device=DEVICE)
        rope_kv_write(qkv[part], positions[part], table, slots[part], q_out, pages, k_scale=scale, v_scale=scale)
        results.append((q_out[2] if len(q_out) > 1 else q_out[0], pages.view(torch.uint8)[:, 0, :, 6]))
    (q, page), (q_alone, page_alone) = results
    assert torch.equal(q, q_alone)
    assert torch.equal(page, page_alone)


def fine() -> dict[str, Any]:
    return {
        "qkv": normal(2, 5 * 16),
        "positions": torch.zeros(2, dtype=torch.int64, device=DEVICE),
        "table": normal(9, 16),
        "slot_mapping": torch.zeros(2, dtype=torch.int64, device=DEVICE),
        "q_out": normal(2, 3, 16),
        "pages": normal(2, 4, 1, 8, 16).to(torch.bfloat16),
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"qkv": normal(2, 81)}, r"qkv has shape \[2, 81\], not \[2, 80\]"),
        ({"positions": normal(2)}, "positions is torch.float32"),
        ({"slot_mapping": torch.zeros(3, dtype=torch.int64, device=DEVICE)}, "slot_mapping has shape"),
        ({"table": normal(9, 18)}, "table turns 18 dimensions, not an even number up to 16"),
        ({"table": normal(9, 15)}, "table turns 15 dimensions"),
        ({"table": normal(9, 16).double()}, "table is torch.float64"),
        ({"q_out": normal(2, 16, 3).transpose(1, 2)}, "q_out has stride 3"),
        ({"q_out": normal(3, 2, 16).transpose(0, 1)}, "q_out is not contiguous"),
        ({"pages": normal(2, 4, 1, 8, 16).to(torch.int32)}, "pages is torch.int32"),
        ({"pages": normal(4, 1, 8, 16).bfloat16()}, "pages has shape"),
        ({"pages": normal(2, 4, 1, 8, 16).to(FLOAT8)}, "k_scale is missing, and pages are torch.float8_e4m3fn"),
        ({"k_scale": torch.ones(1, device=DEVICE)}, "k_scale is given, and pages are torch.bfloat16"),
        ({"q_norm": normal(16)}, "k_norm is missing"),
        ({"q_norm": normal(16), "k_norm": normal(15)}, "k_norm has shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_does_not_fit_is_named(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        rope_kv_write(**{**fine(), **changed})


def test_what_does_not_fit_alone_is_named() -> None:
    k, pages = normal(2, 1, 16), fine()["pages"]
    slots = torch.zeros(2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"v is torch\.bfloat16"):
        kv_write(k, k.bfloat16(), slots, pages)
    with pytest.raises(ValueError, match=r"pages has shape .*, not \[2, any, 1, any, 15\]"):
        kv_write(k[..., :15], k[..., :15], slots, pages)
    with pytest.raises(ValueError, match=r"v_scale has shape \[2\], not \[1\]"):
        kv_write(k, k, slots, pages.to(FLOAT8), torch.ones(1, device=DEVICE), torch.ones(2, device=DEVICE))


def test_no_tokens() -> None:
    empty = {name: value[:0] for name, value in fine().items() if name not in ("table", "pages")}
    rope_kv_write(**empty, table=fine()["table"], pages=fine()["pages"])
    k = normal(0, 1, 16)
    kv_write(k, k, torch.zeros(0, dtype=torch.int64, device=DEVICE), fine()["pages"])

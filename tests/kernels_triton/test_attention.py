"""The Triton paged attention against the oracle: shapes, types, masks, splits, padding, and what it must not read."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.gpu.attention import paged_attention
from kernels.gpu.attention_plan import plan_capture
from kernels.gpu.attention_tile import load_kv
from kernels.gpu.attention_tuning import Device
from tests.kernels_triton.paged import FP8, GFX942, SM80, SM90, WHERE, Batch, Row, a_shape, this_device

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def check(batch: Batch, device: Device = SM90) -> None:
    for answer, expected in zip(batch.attend(batch.plan(device)), batch.expected(), strict=True):
        tolerance = TOLERANCE[batch.shape.dtype]
        torch.testing.assert_close(answer.float(), expected, atol=tolerance, rtol=tolerance)


def rows(most_queries: int) -> st.SearchStrategy[list[Row]]:
    def row(queries: int, before: int, seed: int) -> Row:
        return Row(before + queries, queries, seed)

    one = st.builds(row, st.integers(1, most_queries), st.integers(0, 900), st.integers(0, 9))
    return st.lists(st.one_of(one, st.just(Row(0, 1))), min_size=1, max_size=3)


@settings(deadline=None, max_examples=6)
@given(
    rows=rows(40),
    kv_heads=st.integers(1, 2),
    group=st.integers(1, 5),
    dim=st.sampled_from([16, 64, 80, 96]),
    block_size=st.sampled_from([16, 32, 64]),
    types=st.sampled_from([(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, FP8)]),
    window=st.sampled_from([0, 0, 1, 7, 64, 300]),
    softcap=st.sampled_from([0.0, 2.0]),
    batch_invariant=st.booleans(),
    device=st.sampled_from([SM80, SM90, GFX942]),
)
def test_any_batch(
    rows: list[Row],
    kv_heads: int,
    group: int,
    dim: int,
    block_size: int,
    types: tuple[torch.dtype, torch.dtype],
    window: int,
    softcap: float,
    batch_invariant: bool,
    device: Device,
) -> None:
    shape = a_shape(kv_heads * group, kv_heads, dim, block_size, *types, window, softcap, batch_invariant)
    check(Batch(shape, rows), device)


@settings(deadline=None, max_examples=6)
@given(
    rows=rows(6),
    group=st.integers(1, 9),
    window=st.sampled_from([0, 0, 600, 33]),
    softcap=st.sampled_from([0.0, 2.0]),
    batch_invariant=st.booleans(),
)
def test_any_decode(rows: list[Row], group: int, window: int, softcap: float, batch_invariant: bool) -> None:
    shape = a_shape(group, 1, window=window, softcap=softcap, batch_invariant=batch_invariant)
    check(Batch(shape, rows))


TYPES = [
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float16, FP8),
    (torch.bfloat16, FP8), (torch.float32, torch.bfloat16), (torch.float32, FP8),
]  # fmt: skip


@pytest.mark.parametrize(
    ("types", "dim", "device"), [(TYPES[0], 64, SM90), (TYPES[3], 80, GFX942), (TYPES[2], 128, SM80)]
)
def test_some_types_and_heads(types: tuple[torch.dtype, torch.dtype], dim: int, device: Device) -> None:
    check_types(types, dim, device, False)


@pytest.mark.full
@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("device", [SM80, SM90, GFX942], ids=lambda device: device.kind)
@pytest.mark.parametrize("dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("types", TYPES)
def test_all_types_and_heads(
    types: tuple[torch.dtype, torch.dtype], dim: int, device: Device, batch_invariant: bool
) -> None:
    check_types(types, dim, device, batch_invariant)


def check_types(types: tuple[torch.dtype, torch.dtype], dim: int, device: Device, batch_invariant: bool) -> None:
    dtype, kv_dtype = types
    shape = a_shape(3, 1, dim, 16, dtype, kv_dtype, batch_invariant=batch_invariant)
    check(Batch(shape, [Row(600, 1), Row(90, 20, seed=1)]), device)


@pytest.mark.parametrize("queries", [1, 2, 20])
@pytest.mark.parametrize("heads", [71, 130])
def test_more_heads_share_keys_than_a_tile_has_rows(heads: int, queries: int) -> None:
    check(Batch(a_shape(heads, 1, 16, dtype=torch.float16), [Row(70, queries)]))


@pytest.mark.parametrize(
    "window", [1, 64, 65, *(pytest.param(w, marks=pytest.mark.full) for w in (2, 63, 511, 512, 513))]
)
@pytest.mark.parametrize("batch_invariant", [False, True])
def test_borders_of_windows(window: int, batch_invariant: bool) -> None:
    """A key more or less shows: its value is 100 times as great as another's."""
    shape = a_shape(window=window, batch_invariant=batch_invariant)
    for queries in (1, 3, 17):
        batch = Batch(shape, [Row(context, queries) for context in (1024, 1023, 577, 576) if context >= queries])
        batch.pages[1] *= 100
        for answer, expected in zip(batch.attend(batch.plan(SM90)), batch.expected(), strict=True):
            torch.testing.assert_close(answer, expected, atol=2e-3, rtol=1e-4)


def test_queries_at_any_stride() -> None:
    batch = Batch(a_shape(), [Row(300, 1), Row(50, 20)])
    expected = batch.expected()
    fused = torch.randn(len(batch.q), 4 + 2 * 2, 64, device=WHERE)
    fused[:, :4] = batch.q
    out = torch.empty_like(batch.q)
    paged_attention(batch.plan(SM90), out=out, **{**batch.inputs(), "q": fused[:, :4]})
    torch.testing.assert_close(out.cpu(), torch.cat(expected), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("batch_invariant", [False, True])
@pytest.mark.parametrize("queries", [1, 3])
def test_one_captured_plan_serves_any_lengths(queries: int, batch_invariant: bool) -> None:
    shape = a_shape(max_context=2000, batch_invariant=batch_invariant)
    plan = plan_capture(shape, this_device(SM90), 4, queries, WHERE)
    assert plan.splits is not None
    assert plan.splits.num_splits > 1
    for contexts in [(2000, 3, 700, 64), (1, 512, 513, 1025)]:
        lengths = [Row(context, min(context, queries), seed) for seed, context in enumerate(contexts)]
        batch = Batch(shape, lengths)
        for answer, expected in zip(batch.attend(plan), batch.expected(), strict=True):
            torch.testing.assert_close(answer, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_padding_writes_zeros_or_nothing(batch_invariant: bool) -> None:
    """Rows of context 0 get zeros; rows without tokens, and what comes after all rows, stay as they were."""
    shape = a_shape(batch_invariant=batch_invariant)
    for max_context in (2048, 200):  # several splits, and one
        shape = replace(shape, max_context=max_context)
        batch = Batch(shape, [Row(150, 1), Row(0, 1), Row(0, 0)])
        plan = plan_capture(shape, this_device(SM90), 3, 1, WHERE)
        q = torch.cat([batch.q, batch.q])
        out = torch.full_like(q, 7.0)
        paged_attention(plan, out=out, **{**batch.inputs(), "q": q})
        out = out.cpu()
        torch.testing.assert_close(out[0], batch.expected()[0][0], atol=2e-5, rtol=2e-5)
        assert (out[1] == 0).all()
        assert (out[2:] == 7).all()


def test_a_plan_refuses_tensors_of_another_shape() -> None:
    batch = Batch(a_shape(), [Row(20, 1)])
    plan, out = batch.plan(SM90), torch.empty_like(batch.q)
    good = {**batch.inputs(), "out": out}
    paged_attention(plan, **good)
    for name, wrong in {
        "q": batch.q[:, :2],
        "pages": batch.pages[:, :, :, :8],
        "block_tables": batch.tables.long(),
        "out": out.half(),
        "k_scale": torch.ones(1, device=WHERE),
    }.items():
        with pytest.raises(ValueError, match=name):
            paged_attention(plan, **{**good, name: wrong})


@triton.jit
def _converted(codes_ptr: tl.tensor, out_ptr: tl.tensor, FP8: tl.constexpr) -> None:
    at = tl.arange(0, 256)
    like = tl.zeros([1], out_ptr.dtype.element_ty)
    tl.store(out_ptr + at, load_kv(codes_ptr + at, at >= 0, like, FP8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("way", ["native", "bits"])
def test_every_float8_is_converted_exactly(way: str, dtype: torch.dtype) -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    out = torch.empty(256, dtype=dtype, device=WHERE)
    _converted[(1,)](codes.to(WHERE), out, FP8=way)
    expected = codes.view(FP8).float()
    numbers = ~expected.isnan()
    assert torch.equal(out.float().cpu()[numbers], expected[numbers])

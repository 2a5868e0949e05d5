"""Batch invariance, bit by bit: what a token gets depends on what it sees, not on neighbours or on chunks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.gpu.attention_plan import AttentionPlan, AttentionShape, plan_capture
from tests.kernels_triton.paged import FP8, SM90, WHERE, Batch, Row, a_shape, this_device

LENGTH = 1300  # two borders of splits and a half

SHAPES = {
    "float32": a_shape(2, 1, batch_invariant=True),
    "bfloat16": a_shape(3, 1, 64, 16, torch.bfloat16, batch_invariant=True),
    "float8 and softcap": a_shape(4, 1, 80, 32, torch.float16, FP8, softcap=3.0, batch_invariant=True),
    "window": a_shape(4, 2, 64, 16, torch.bfloat16, window=600, batch_invariant=True),
}


def attend(shape: AttentionShape, rows: list[Row], shuffle: int = 0, plan: AttentionPlan | None = None) -> list[Tensor]:
    batch = Batch(shape, rows, shuffle)
    return batch.attend(plan or batch.plan(SM90))


@pytest.fixture(
    scope="module",
    params=["window", *(pytest.param(n, marks=pytest.mark.full) for n in SHAPES if n != "window")],
)
def whole(request: pytest.FixtureRequest) -> tuple[AttentionShape, Tensor]:
    """A shape, and the answers to a sequence that came in one piece."""
    shape = SHAPES[request.param]
    return shape, attend(shape, [Row(LENGTH, LENGTH)])[0]


def test_chunks(whole: tuple[AttentionShape, Tensor]) -> None:
    shape, expected = whole
    at = 0
    for n, size in enumerate([511, 2, 1, 17, 490, 16, 263]):
        at += size
        neighbours = [Row(40, 40, seed=9), Row(900, 1, seed=8)][: n % 3]
        answer = attend(shape, [*neighbours, Row(at, size)], shuffle=n)[-1]
        assert torch.equal(answer, expected[at - size : at])
    assert at == LENGTH


def test_decode(whole: tuple[AttentionShape, Tensor]) -> None:
    shape, expected = whole
    for context in (1, 63, 64, 65, 512, 513, 1024, 1025, LENGTH):
        others = [Row(context // 2 + 1, 1, seed=5), Row(LENGTH, 1, seed=6)]
        for rows in ([Row(context, 1)], [*others, Row(context, 1)]):
            assert torch.equal(attend(shape, rows, shuffle=context)[-1][0], expected[context - 1])


@pytest.mark.parametrize("queries", [1, 3])
def test_a_captured_decode(whole: tuple[AttentionShape, Tensor], queries: int) -> None:
    shape, expected = whole
    plan = plan_capture(shape, this_device(SM90), 3, queries, WHERE)
    for context in (queries, 514, LENGTH):
        answer = attend(shape, [Row(0, 1), Row(context, queries), Row(77, 1, seed=3)], context, plan)[1]
        assert torch.equal(answer, expected[context - queries : context])


@pytest.mark.full
def test_without_it_the_bits_differ() -> None:
    """Else the tests above would show nothing."""
    shape = a_shape(2, 1)
    expected = attend(shape, [Row(LENGTH, LENGTH)])[0]
    assert not torch.equal(attend(shape, [Row(LENGTH, 1)])[0][0], expected[-1])


@settings(deadline=None, max_examples=4)
@given(
    context=st.integers(20, 1400),
    queries=st.integers(1, 40),
    window=st.sampled_from([0, 0, 40, 700]),
    others=st.lists(st.builds(Row, st.integers(40, 700), st.sampled_from([1, 2, 33]), st.just(7)), max_size=2),
)
def test_the_last_token_of_any_chunk(context: int, queries: int, window: int, others: list[Row]) -> None:
    shape = a_shape(4, 2, 64, 16, torch.bfloat16, window=window, batch_invariant=True)
    chunk = attend(shape, [*others, Row(context, min(queries, context))], shuffle=1)[-1]
    assert torch.equal(chunk[-1], attend(shape, [Row(context, 1)])[0][0])


@pytest.mark.full
def test_both_kernels_multiply_and_add_in_the_same_layouts() -> None:
    """What the interpreter cannot show: how a device's threads share a tile decides the order in which they add."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels_triton.layouts_of"]
    root = Path(__file__).parents[2]
    said = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, timeout=110, check=True)
    found = json.loads(said.stdout)
    assert len(found) == 12
    for name, (decode, prefill) in found.items():
        assert len(decode) >= 4, name  # two products, a maximum and a sum
        assert decode == prefill, name

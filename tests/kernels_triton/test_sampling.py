"""The sampling kernels against the CPU's torch sampler: the very tokens, whatever is cut and drawn."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from kernels import philox
from kernels.gpu import sampling, sampling_cut, sampling_values
from kernels.gpu.sampling import NONE_ALLOWED, NOT_NUMBERS
from kernels.gpu.slot_state import SlotState, sampling_words
from tests.kernels_triton.compare import DEVICE, INTERPRETED, beside, normal, padded
from worker_svc.sampler import _draw, _filter, _floors
from worker_svc.sampling_rules import GREEDY_BELOW
from worker_svc.slots import PARAMS

Param = tuple[int, float, float, int, float]  # seed, temperature, min_p, top_k, top_p


def state_of(params: list[Param], lengths: list[int]) -> SlotState:
    """Row i is slot i + 1."""
    state = SlotState.empty(len(params), 8, 1, torch.device(DEVICE))
    for slot, (param, length) in enumerate(zip(params, lengths, strict=True), 1):
        state.sampling[slot] = torch.from_numpy(sampling_words(*param)).to(DEVICE)
        state.lengths[slot] = length
    return state


def sampled(logits: Tensor, params: list[Param], lengths: list[int]) -> tuple[list[int], list[int]]:
    rows = len(params)
    slots = torch.arange(1, rows + 1, dtype=torch.int32, device=DEVICE)
    out, status = (torch.full((rows,), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))
    state = state_of(params, lengths)
    sampling.sample(logits, slots, state, state.lengths[1:], out, status)
    return out.tolist(), status.tolist()


def as_array(params: list[Param]) -> NDArray[np.void]:
    array = np.zeros(len(params), PARAMS)
    for i, (seed, temperature, min_p, top_k, top_p) in enumerate(params):
        for name, value in (("seed", seed), ("temperature", temperature), ("min_p", min_p), ("top_k", top_k)):
            array[name][i] = value
        array["top_p"][i] = top_p
    return array


def by_the_cpu(logits: Tensor, params: list[Param], lengths: list[int]) -> list[int]:
    array = as_array(params)
    greedy = array["temperature"] < GREEDY_BELOW
    tokens = logits.cpu().argmax(-1).numpy()
    drawn = np.flatnonzero(~greedy)
    if len(drawn):
        tokens[drawn] = _draw(logits.cpu()[torch.from_numpy(drawn)], array[drawn], np.array(lengths)[drawn])
    return [int(token) for token in tokens]


def left(logits: Tensor, params: list[Param]) -> list[set[int]]:
    """Tokens of each row that may still be drawn."""
    slots = torch.arange(1, len(params) + 1, dtype=torch.int32, device=DEVICE)
    tops = torch.empty(len(params), device=DEVICE)
    cuts = sampling_cut.cut_rows(logits, slots, state_of(params, [1] * len(params)), sampling._maxima(logits)[0], tops)
    bits = (logits.cpu() / torch.tensor([[param[1]] for param in params]) + 0.0).view(torch.int32).long()
    last = (1 << sampling_values.ID_BITS) - 1
    keys = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << sampling_values.ID_BITS) + last
    keys -= torch.arange(logits.shape[1])
    return [set(row.nonzero()[:, 0].tolist()) for row in keys >= cuts.cpu()[:, None]]


def left_by_the_cpu(logits: Tensor, params: list[Param]) -> list[set[int]]:
    array = as_array(params)
    scaled = logits.cpu() / torch.from_numpy(array["temperature"].copy())[:, None] + 0.0
    survivors = _filter(scaled, _floors(scaled, array), array)
    return [set(survivors.ids[survivors.rows == row].tolist()) for row in range(len(params))]


@pytest.mark.parametrize("vocab", [5, 97, 1003, 2048])
def test_every_kind_of_row_beside_each_other(vocab: int) -> None:
    logits = 4 * normal(9, vocab, seed=vocab)
    params: list[Param] = [
        (1, 0.0, 0.0, 0, 1.0),
        (2**64 - 1, 1.0, 0.0, 0, 1.0),
        (3 << 40, 0.7, 0.1, 0, 1.0),
        (4, 1.3, 0.0, 3, 1.0),
        (5, 1.0, 0.0, 0, 0.8),
        (6, 2.0, 0.01, 40, 0.95),
        (7, 1.0, 0.0, vocab + 9, 1e-9),
        (8, 1e-6, 0.5, 1, 0.5),
        (9, 5.0, 0.0, vocab - 1, 0.999),
    ]
    lengths = [1, 8191, 3, 4, 5, 6, 7, 8, 9]
    tokens, status = sampled(logits, params, lengths)
    assert tokens == by_the_cpu(logits, params, lengths)
    assert status == [0] * 9


LOGITS = st.sampled_from([-math.inf, -1e4, -3.0, -0.5, -0.0, 0.0, 0.5, 1.0, 1.5, 3.0, 1e4])  # ties are many


@settings(max_examples=30, deadline=None)
@given(
    st.lists(LOGITS, min_size=1, max_size=40),
    st.integers(0, 2**64 - 1),
    st.sampled_from([0.3, 1.0, 4.0]),
    st.sampled_from([0.0, 0.05, 0.6, 1.0]),
    st.integers(0, 41),
    st.sampled_from([0.0, 0.1, 0.5, 0.9, 0.999, 1.0]),
    st.integers(0, 2**20),
)
def test_ties_and_extremes(
    values: list[float], seed: int, temperature: float, min_p: float, top_k: int, top_p: float, length: int
) -> None:
    logits = torch.tensor([values], dtype=torch.float32, device=DEVICE)
    params: list[Param] = [(seed, temperature, min_p, top_k, top_p)]
    tokens, status = sampled(logits, params, [length])
    if max(values) == -math.inf:
        assert status == [NONE_ALLOWED]
    else:
        assert (tokens, status) == (by_the_cpu(logits, params, [length]), [0])
        assert left(logits, params) == left_by_the_cpu(logits, params)


CUT = st.tuples(
    st.integers(0, 2**64 - 1),
    st.sampled_from([1e-5, 0.2, 1.0, 3.0, 100.0]),
    st.sampled_from([0.0, 0.0, 0.01, 0.3, 1.0]),
    st.sampled_from([0, 0, 1, 2, 33, 64, 1000, 5000]),
    st.sampled_from([0.0, 0.3, 0.7, 0.95, 1.0, 1.0]),
)


@settings(max_examples=12, deadline=None)
@given(st.lists(CUT, min_size=1, max_size=3), st.sampled_from([97, 1003, 2500]), st.integers(0, 2**31), st.data())
def test_mixes_of_parameters(params: list[Param], vocab: int, seed: int, data: st.DataObject) -> None:
    """Rows farther apart than they are long, some of them coarse, so that many tokens have one logit."""
    logits = padded(len(params), vocab, 16, torch.float32)
    logits.copy_(normal(len(params), vocab, seed=seed) * data.draw(st.sampled_from([0.1, 3.0, 30.0])))
    for row in data.draw(st.sets(st.integers(0, len(params) - 1))):
        logits[row].round_()
        logits[row, data.draw(st.integers(0, vocab - 1)) :] = -math.inf
        logits[row, 0] = 0.0
    lengths = [seed % 4096 + row for row in range(len(params))]
    assert left(logits, params) == left_by_the_cpu(logits, params)
    assert sampled(logits, params, lengths) == (by_the_cpu(logits, params, lengths), [0] * len(params))
    assert (beside(logits) == 7).all()


@pytest.mark.parametrize("parts", [1, pytest.param(6, marks=pytest.mark.full)])
def test_a_vocabulary_of_several_parts(parts: int) -> None:
    """And more than are whole. The sixth row's list is all of it."""
    vocab = parts * sampling_cut.PART + 77
    logits = 3 * normal(7, vocab, seed=1)
    logits[0, [5, 5 + sampling_cut.BLOCK, -1]] = 90.0  # the lowest id of equals, in different blocks and parts
    logits[5] = 1.0
    params: list[Param] = [
        (1, 0.0, 0.0, 0, 1.0), (2, 1.0, 0.0, 0, 1.0), (3, 1.0, 0.0, 50, 0.9), (4, 1.0, 0.0, 0, 0.9),
        (5, 0.7, 1e-4, vocab - 9, 0.99), (6, 1.0, 0.0, 0, 0.3), (7, 1.0, 0.02, 0, 0.7),
    ]  # fmt: skip
    lengths = [7, 8, 9, 10, 11, 12, 13]
    tokens, _ = sampled(logits, params, lengths)
    assert tokens == by_the_cpu(logits, params, lengths)
    assert tokens[0] == 5
    assert left(logits[2:], params[2:]) == left_by_the_cpu(logits[2:], params[2:])


def test_null_rows_and_rows_beside_change_nothing() -> None:
    logits = torch.cat([torch.full((2, 300), math.nan, device=DEVICE), 4 * normal(3, 300)])
    params: list[Param] = [(1, 0.9, 0.0, 0, 0.8), (2, 0.9, 0.0, 7, 1.0), (3, 0.9, 0.1, 0, 1.0)]
    state = state_of(params, [4, 5, 6])
    before = state.words.clone()
    out, status = (torch.full((5,), -7, dtype=torch.int32, device=DEVICE) for _ in range(2))
    slots = torch.tensor([0, 0, 3, 1, 2], dtype=torch.int32, device=DEVICE)
    sampling.sample(logits, slots, state, state.lengths[slots], out, status)
    assert torch.equal(state.words, before)
    assert status.tolist() == [NOT_NUMBERS, NOT_NUMBERS, 0, 0, 0]
    assert all(0 <= token < 300 for token in out.tolist())
    alone = [by_the_cpu(logits[[row]], [params[slot - 1]], [slot + 3])[0] for row, slot in ((2, 3), (3, 1), (4, 2))]
    assert out.tolist()[2:] == alone


def test_what_was_wrong_before_edits_is_told_first() -> None:
    logits = normal(3, 50)
    logits[2] = -math.inf
    slots, out, status = (torch.zeros(3, dtype=torch.int32, device=DEVICE) for _ in range(3))
    before = torch.tensor([0, NONE_ALLOWED, NOT_NUMBERS], dtype=torch.int32, device=DEVICE)
    sampling.sample(logits, slots, state_of([], []), slots, out, status, before)
    assert status.tolist() == [0, NONE_ALLOWED, NOT_NUMBERS]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([0.0, math.nan, 1.0], NOT_NUMBERS),
        ([0.0, math.inf, 1.0], NOT_NUMBERS),
        ([0.0, 4e33, 1.0], NOT_NUMBERS),
        ([-math.inf] * 3, NONE_ALLOWED),
        ([-4e33] * 3, NOT_NUMBERS),
        ([-math.inf, -math.inf, -2.0], 0),
    ],
)
def test_what_cannot_be_sampled_is_told_by_row(values: list[float], expected: int) -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0], values, [3.0, 1.0, 2.0]], device=DEVICE)
    params: list[Param] = [(1, 0.0, 0.0, 0, 1.0), (1, 0.8, 0.0, 2, 0.9), (1, 0.0, 0.0, 0, 1.0)]
    tokens, status = sampled(logits, params, [1, 1, 1])
    assert status == [0, expected, 0]
    assert (tokens[0], tokens[2]) == (2, 0)
    status_alone = torch.empty(3, dtype=torch.int32, device=DEVICE)
    sampling.check(logits, status_alone)
    assert status_alone.tolist() == status


def test_more_tokens_than_a_key_can_tell_apart_are_refused() -> None:
    rows = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="logits has 1048576 columns"):
        sampling.sample(torch.empty(1, 1 << 20, device=DEVICE), rows, state_of([], []), rows, rows, rows)


@triton.jit
def _noise_kernel(uniforms: Any, out: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, -sampling_values.rounded_log(-sampling_values.rounded_log(tl.load(uniforms + at))))


@triton.jit
def _weight_kernel(x: Any, out: Any, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, sampling_values.weight(tl.load(x + at)))


def test_all_the_noise_there_is_has_the_same_bits_on_every_device() -> None:
    """2²³ uniforms. Any logarithm in float64 that is right to 48 places rounds to the same float32."""
    uniforms = ((np.arange(1 << 23) + 0.5) * 2.0**-23).astype(np.float32)
    right = uniforms
    for _ in range(2):
        exact = -np.log(right.astype(np.float64))
        right = exact.astype(np.float32)
        above, below = (np.nextafter(right, np.float32(to)).astype(np.float64) for to in (np.inf, -np.inf))
        middles = np.abs((right + above) / 2 - exact), np.abs((right + below) / 2 - exact)
        assert (np.minimum(*middles) > 48 * np.spacing(np.abs(exact))).all()
    out = torch.empty(1 << 23, device=DEVICE)
    block = 1 << 17 if INTERPRETED else 1024
    _noise_kernel[((1 << 23) // block,)](torch.from_numpy(uniforms).to(DEVICE), out, BLOCK=block)
    assert torch.equal(out.cpu(), torch.from_numpy(right))


def test_weights_are_exponentials_to_two_places() -> None:
    x = -torch.cat(
        [torch.rand(3000) * 30, torch.rand(1000) * 1e-3, torch.tensor([0.0, 27.7, 28.0, 88.0, 1e4, math.inf])]
    )
    x = torch.cat([x, torch.zeros(4096 - len(x))]).to(DEVICE)
    out = torch.empty(4096, dtype=torch.int64, device=DEVICE)
    _weight_kernel[(4,)](x, out, BLOCK=1024, enable_fp_fusion=False)
    right = x.cpu().double().exp() * 2.0**40
    assert ((out.cpu() - right).abs() <= right * 2.0**-22 + 1).all()
    assert out[4000:4006].tolist() == [1 << 40, 1, 0, 0, 0, 0]


def test_noise_is_that_of_the_house() -> None:
    """By way of tokens: with equal logits the greatest noise wins."""
    logits = torch.zeros(40, 999, device=DEVICE)
    params: list[Param] = [(i * 0x9E3779B97F4A7C15 % 2**64, 1.0, 0.0, 0, 1.0) for i in range(40)]
    tokens, _ = sampled(logits, params, list(range(40)))
    for i, (seed, *_) in enumerate(params):
        seeds = torch.full((999,), seed - (seed >> 63 << 64))
        noise = philox.gumbel(seeds, torch.full((999,), i), torch.arange(999))
        assert tokens[i] == int(noise.argmax())

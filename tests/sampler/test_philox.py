from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats  # type: ignore[import-untyped]

from kernels.philox import CHUNK, MAX_GUMBEL, gumbel, philox4x32
from tests.sampler import reference

ONES = (1 << 32) - 1
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
# Random123's known answers, kat_vectors: philox4x32 10.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (PI, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]
U32 = st.integers(0, ONES)


def words(counters: list[tuple[int, ...]], keys: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    answer = philox4x32(torch.tensor(counters).T, torch.tensor(keys).T)
    return [tuple(column) for column in answer.T.tolist()]


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], answer: tuple[int, int, int, int]
) -> None:
    assert reference.philox4x32(counter, key) == answer
    assert words([counter], [key]) == [answer]


@given(st.lists(st.tuples(U32, U32, U32, U32, U32, U32), min_size=1, max_size=8))
def test_torch_equals_python_integers(calls: list[tuple[int, ...]]) -> None:
    expected = [reference.philox4x32((a, b, c, d), (e, f)) for a, b, c, d, e, f in calls]
    assert words([call[:4] for call in calls], [call[4:] for call in calls]) == expected


def test_arguments_are_left_as_they_are_and_chunks_meet() -> None:
    counter = torch.arange(4 * (CHUNK + 3)).reshape(4, -1)
    key = counter[:2].clone()
    before = counter.clone()
    whole = philox4x32(counter, key)
    assert torch.equal(counter, before)
    assert torch.equal(whole[:, CHUNK - 1 :], philox4x32(counter[:, CHUNK - 1 :], key[:, CHUNK - 1 :]))


def noise(calls: list[tuple[int, int, int]]) -> list[float]:
    seeds = np.array([seed for seed, _, _ in calls], np.uint64).view(np.int64)
    positions, tokens = (torch.tensor([call[i] for call in calls]) for i in (1, 2))
    return [float(value) for value in gumbel(torch.from_numpy(seeds), positions, tokens)]


CALLS = st.tuples(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 20), st.integers(0, 1 << 18))


@given(st.lists(CALLS, min_size=1, max_size=8))
def test_noise_is_a_function_of_seed_position_and_token(calls: list[tuple[int, int, int]]) -> None:
    assert noise(calls) == [float(reference.gumbel(*call)) for call in calls]
    assert noise(calls[::-1]) == noise(calls)[::-1]


@given(CALLS, st.integers(1, 9))
def test_neighbours_share_calls_without_sharing_noise(call: tuple[int, int, int], count: int) -> None:
    seed, position, token = call
    run = [(seed, position, token + i) for i in range(count)]
    assert noise(run) == [noise([one])[0] for one in run]
    assert len(set(noise(run))) == count


@pytest.mark.parametrize("varied", ["seeds", "positions", "tokens"])
def test_noise_is_gumbel_along_each_of_its_arguments(varied: str) -> None:
    """Kolmogorov and Smirnov, with fixed arguments: the answer is always the same."""
    count = 50_000
    arguments = {name: torch.full((count,), 12_345) for name in ("seeds", "positions", "tokens")}
    arguments[varied] = torch.arange(count)
    values = gumbel(arguments["seeds"], arguments["positions"], arguments["tokens"]).double().numpy()
    assert stats.kstest(values, "gumbel_r").pvalue > 0.01
    assert abs(np.corrcoef(values[1:], values[:-1])[0, 1]) < 4 / math.sqrt(count)


def test_the_ends_of_the_range_are_finite_and_below_the_bound() -> None:
    word = torch.tensor([0, ONES])
    uniform = ((word >> 9).to(torch.float32) + 0.5) * 2.0**-23
    assert uniform.tolist() == [2.0**-24, 1 - 2.0**-24]
    ends = -torch.log(-torch.log(uniform))
    assert torch.isfinite(ends).all()
    assert float(ends[1]) < MAX_GUMBEL < float(ends[1]) + 0.001

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Admit, Epoch, Row, Sampling, StepPlan, TokenLogprobs
from tests.sampler.bench import Bench
from worker_svc.inputs import build_inputs
from worker_svc.sampler import token_logprobs
from worker_svc.sampling_rules import SamplerError
from worker_svc.slots import SlotTable

VOCAB = 50


def scores(
    logits: np.ndarray[tuple[int, int], np.dtype[np.float32]], tokens: list[int], num_top: list[int]
) -> list[TokenLogprobs]:
    return token_logprobs(torch.from_numpy(logits), np.array(tokens), num_top)


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    rows=st.integers(1, 40),
    coarse=st.booleans(),
)
def test_logprobs_ranks_and_alternatives(seed: int, scale: float, rows: int, coarse: bool) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, VOCAB)).astype(np.float32)
    if coarse:
        logits = logits.round()  # ties
    tokens = rng.integers(0, VOCAB, rows).tolist()
    num_top = rng.integers(0, VOCAB + 5, rows).tolist()
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1).numpy()
    for row, score in enumerate(scores(logits, tokens, num_top)):
        order = sorted(range(VOCAB), key=lambda token, row=row: (-logits[row, token], token))  # type: ignore[misc]
        assert score.token_id == tokens[row]
        assert score.logprob == pytest.approx(exact[row, tokens[row]], abs=2e-6)
        assert score.rank == order.index(tokens[row]) + 1
        assert list(score.top_ids) == order[: num_top[row]]
        assert list(score.top_logprobs) == pytest.approx(exact[row, order[: num_top[row]]], abs=2e-6)


def test_as_close_as_float32_on_a_real_vocabulary() -> None:
    logits = np.random.default_rng(1).normal(0, 4, (8, 49_152)).astype(np.float32)
    tokens = logits.argmax(-1).tolist()
    exact = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    got = [score.logprob for score in scores(logits, tokens, [0] * 8)]
    assert got == pytest.approx([float(exact[i, token]) for i, token in enumerate(tokens)], abs=2e-6)


def test_a_token_that_is_ruled_out_has_no_probability() -> None:
    logits = np.array([[0.0, -math.inf, 0.0]], np.float32)
    [score] = scores(logits, [1], [3])
    assert (score.logprob, score.rank) == (-math.inf, 3)
    assert score.top_logprobs == (-math.log(2), -math.log(2), -math.inf)


def test_both_zeros_are_one_value() -> None:
    [score] = scores(np.array([[-0.0, 0.0]], np.float32), [1], [2])
    assert (score.rank, score.top_ids) == (2, (0, 1))


def test_logits_that_are_not_numbers() -> None:
    with pytest.raises(SamplerError):
        scores(np.array([[0.0, math.nan]], np.float32), [0], [0])


def test_of_the_raw_distribution_where_asked_for() -> None:
    """Neither bias nor bans, temperature or filters show."""
    logits = np.random.default_rng(2).normal(0, 2, (3, VOCAB)).astype(np.float32)
    bench = Bench(VOCAB)
    plain = {"max_tokens": 9, "seed": 1, "logprobs": 2}
    bent = plain | {"logit_bias": ((4, 50.0),), "temperature": 0.1, "bad_words": ((0,),), "top_k": 2}
    for slot, fields in enumerate([bent, plain, {"max_tokens": 9}], 1):
        bench.admit(slot, [1], [], Sampling(**fields))  # type: ignore[arg-type]
    sampled = bench.step([1, 2, 3], logits)
    assert sampled.token_ids[0] == 4
    expected = scores(logits[:2], sampled.token_ids[:2].tolist(), [2, 2])
    assert sampled.logprobs == [*expected, None]


def test_prompt_logprobs_in_chunks_and_parts() -> None:
    """A prompt of 9 in two steps: eight scores, of the tokens 1 to 8, by the logits one position before."""
    slots = SlotTable(max_slots=2, max_model_len=16, block_size=16, num_blocks=3, vocab_size=VOCAB)
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5]
    admit = Admit(1, prompt, 9, [[1]], Sampling(9, prompt_logprobs=2))
    other = Admit(2, prompt, 9, [[2]], Sampling(9))
    sampler = Bench(VOCAB).sampler
    by_position = np.random.default_rng(4).normal(0, 2, (9, VOCAB)).astype(np.float32)
    got: list[TokenLogprobs] = []
    for admits, start, count in [([admit, other], 0, 4), ([], 4, 5)]:
        rows = [Row(2, start, count, sample=start > 0), Row(1, start, count, sample=start > 0)]
        plan = StepPlan(Epoch(1, 1), 1, [], list(admits), [], rows)
        slots.apply(plan)
        inputs = build_inputs(plan, slots)
        wanted = inputs.positions[inputs.prompt_logprob_tokens]
        for first in range(0, len(wanted), 3):
            logits = torch.from_numpy(by_position[wanted[first : first + 3]])
            got += sampler.prompt_logprobs(logits, inputs, slots, first)
    assert got == scores(by_position[:8], prompt[1:], [2] * 8)

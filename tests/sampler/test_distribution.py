"""Chi-square of what is drawn against exact probabilities. Seeds are fixed: the answer is always the same."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats  # type: ignore[import-untyped]

from protos.wire import Sampling
from tests.sampler import reference
from tests.sampler.bench import Bench

VOCAB, DRAWS = 24, 3_000
PROMPT, OUTPUT = [3, 4, 5], [1, 7, 7, 2]

SETTINGS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature below 1": {"temperature": 0.6},
    "temperature above 1": {"temperature": 1.8},
    "min_p": {"min_p": 0.12},
    "top_k": {"top_k": 6},
    "top_p": {"top_p": 0.75},
    "top_k, then top_p": {"top_k": 8, "top_p": 0.8},
    "all three": {"min_p": 0.05, "top_k": 9, "top_p": 0.9, "temperature": 1.4},
    "repetition": {"repetition_penalty": 1.6},
    "presence": {"presence_penalty": 0.9},
    "frequency": {"frequency_penalty": 0.6},
    "all penalties and a filter": {
        "repetition_penalty": 1.2,
        "presence_penalty": -0.4,
        "frequency_penalty": 0.3,
        "top_p": 0.9,
    },
    "logit_bias": {"logit_bias": ((0, 1.5), (9, -2.0))},
    "bad words": {"bad_words": ((4,), (7, 2, 6), (2, 8), (9, 1))},
    "min_tokens": {"min_tokens": 5, "eos_token_ids": (0,), "stop_token_ids": (11,)},
}


def logits() -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    return np.random.default_rng(5).normal(0, 1.3, VOCAB).astype(np.float32)


@pytest.mark.parametrize("name", SETTINGS)
def test_draws_follow_the_exact_distribution(name: str) -> None:
    fields = {"max_tokens": 99} | SETTINGS[name]
    bench = Bench(VOCAB, max_slots=DRAWS, max_model_len=8)
    for slot in range(1, DRAWS + 1):
        bench.admit(slot, PROMPT, OUTPUT, Sampling(**fields, seed=slot))
    at = reference.Context(logits(), Sampling(**fields), PROMPT, OUTPUT)
    drawn = bench.step(range(1, DRAWS + 1), np.tile(logits(), (DRAWS, 1))).token_ids
    counts = np.bincount(drawn, minlength=VOCAB)
    expected = reference.distribution(at) * DRAWS
    assert not counts[expected == 0].any()
    likely = expected >= 5
    rare = expected[~likely].sum()
    observed = np.append(counts[likely], counts[~likely].sum()) if rare else counts[likely]
    wanted = np.append(expected[likely], rare) if rare else expected[likely]
    assert len(wanted) > 2
    assert stats.chisquare(observed, wanted).pvalue > 0.01


def test_positions_of_one_stream_are_drawn_independently() -> None:
    """One seed, a thousand positions: as good as a thousand seeds, and pairs of neighbours are independent."""
    length = 1_000
    bench = Bench(VOCAB, max_slots=1, max_model_len=length + 1)
    bench.admit(1, PROMPT, [], Sampling(length, seed=99, top_k=4))
    drawn = [int(bench.step([1], logits()[None]).token_ids[0]) for _ in range(length - len(PROMPT))]
    at = reference.Context(logits(), Sampling(1, top_k=4), PROMPT, [])
    probabilities = reference.distribution(at)
    support = np.flatnonzero(probabilities)
    counts = np.bincount(drawn, minlength=VOCAB)
    assert stats.chisquare(counts[support], probabilities[support] * len(drawn)).pvalue > 0.01
    pairs = np.zeros((VOCAB, VOCAB))
    np.add.at(pairs, (drawn[:-1], drawn[1:]), 1)
    assert stats.chi2_contingency(pairs[np.ix_(support, support)]).pvalue > 0.01

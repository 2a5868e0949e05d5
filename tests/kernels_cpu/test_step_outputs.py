"""Outputs of a step: greedy or not, alone or among others, in one call or in two, logits, hidden states and scores."""

from __future__ import annotations

import numpy as np
import pytest

from kernels.cpu.library import Model
from tests.kernels_cpu import plain
from tests.kernels_cpu.tiny import ODD, TINY, Text, arrays, batch_of, opened, random_model, random_tokens, samples_of

TOKENS = random_tokens(100)


def _forward(model: Model) -> None:
    model.forward(batch_of([(Text(TOKENS, [1, 2, 3, 4]), len(TOKENS))]))


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_the_fused_greatest_is_that_of_the_logits(isa: str, kind: str) -> None:
    """Any number of outputs, of any tokens, repeated."""
    with opened(ODD, kind, isa=isa, threads=2) as model:
        _forward(model)
        greatest = model.logits(np.arange(100)).argmax(1)
        for count in (1, 2, 9, 70, 130):
            tokens = np.random.default_rng(count).integers(0, 100, count)
            samples = samples_of(tokens.tolist())
            model.sample(samples)
            assert np.array_equal(arrays(samples)["token_ids"], greatest[tokens])


def test_greedy_among_others_is_the_same(isa: str) -> None:
    with opened(TINY, isa=isa, threads=2) as model:
        _forward(model)
        greatest = model.logits(np.arange(100)).argmax(1)
        for count in (3, 90):
            samples = samples_of(list(range(count)))
            arrays(samples)["params"]["temperature"][::3] = 0.8
            model.sample(samples)
            drawn = arrays(samples)["token_ids"]
            greedy = np.arange(count) % 3 != 0
            assert np.array_equal(drawn[greedy], greatest[:count][greedy])
            assert (drawn >= 0).all()
            assert (drawn < TINY.vocab_size).all()


def test_a_sample_depends_on_seed_and_position_alone(isa: str) -> None:
    with opened(TINY, isa=isa, threads=3, cpus=3) as model:
        _forward(model)

        def draw(tokens: list[int]) -> dict[int, int]:
            samples = samples_of(tokens, temperature=1.0)
            arrays(samples)["params"]["position"] = tokens
            arrays(samples)["params"]["seed"] = 11
            model.sample(samples)
            return dict(zip(tokens, arrays(samples)["token_ids"].tolist(), strict=True))

        together = draw(list(range(80)))
        for tokens in ([5], [79, 3], list(range(40, 70))):
            assert draw(tokens) == {token: together[token] for token in tokens}


def test_a_step_is_forward_and_sample(isa: str) -> None:
    with opened(TINY, isa=isa, threads=2) as model:
        _forward(model)
        apart = samples_of([99, 7], temperature=0.7, logprobs=3)
        model.sample(apart)
        batch, together = (
            batch_of([(Text(TOKENS, [5, 6, 7, 8]), 100)]),
            samples_of([99, 7], temperature=0.7, logprobs=3),
        )
        model.step(batch, together)
        for name in ("token_ids", "logprobs", "ranks", "top_ids", "top_logprobs"):
            assert np.array_equal(arrays(apart)[name], arrays(together)[name])


def test_logprobs_and_scores_are_those_of_the_raw_logits(isa: str) -> None:
    with opened(ODD, isa=isa, threads=2) as model:
        _forward(model)
        logits = model.logits(np.arange(100)).astype(np.float64)
        expected = logits - np.log(np.exp(logits - logits.max(1, keepdims=True)).sum(1, keepdims=True))
        expected -= logits.max(1, keepdims=True)
        ids = np.random.default_rng(3).integers(0, ODD.vocab_size, 100)
        logprobs, ranks, top_ids, top_logprobs = model.score(np.arange(100), ids, np.full(100, 4, np.int32))
        samples = samples_of(list(range(100)), logprobs=4)
        model.sample(samples)
    rows = np.arange(100)
    np.testing.assert_allclose(logprobs, expected[rows, ids], atol=1e-5)
    assert np.array_equal(ranks, 1 + (logits > logits[rows, ids][:, None]).sum(1))
    best = np.argsort(-logits, 1, kind="stable")[:, :4]
    assert np.array_equal(top_ids, best)
    np.testing.assert_allclose(top_logprobs, np.take_along_axis(expected, best, 1), atol=1e-5)
    assert np.array_equal(arrays(samples)["top_ids"], best)
    assert np.array_equal(arrays(samples)["logprobs"], top_logprobs[:, 0])


def test_hidden_states_are_those_after_the_final_norm(isa: str) -> None:
    with opened(TINY, isa=isa, threads=2) as model:
        _forward(model)
        hidden, logits = model.hidden(np.array([99, 0, 0])), model.logits(np.array([99, 0]))
    assert np.array_equal(hidden[1], hidden[2])
    head = plain.linear(random_model(TINY, "bf16", "bf16"), "lm_head", hidden[:2], head=True)
    np.testing.assert_allclose(logits, head, atol=2e-5)


def test_edits_reach_their_output_alone(isa: str) -> None:
    with opened(TINY, isa=isa, threads=2) as model:
        _forward(model)
        best = np.argsort(-model.logits(np.array([50, 60])), 1)
        samples = samples_of([50, 60])
        samples.num_bans = 1
        samples.point(ban_at=np.array([TINY.vocab_size + best[1, 0]], np.int64))
        model.sample(samples)
        assert arrays(samples)["token_ids"].tolist() == [best[0, 0], best[1, 1]]


def test_a_mask_reaches_its_output_alone(isa: str) -> None:
    words = np.zeros((1, -(-TINY.vocab_size // 32)), np.uint32)
    words[0, 2] = 1 << 5  # token 69 alone
    with opened(TINY, isa=isa, threads=2) as model:
        _forward(model)
        greatest = int(model.logits(np.array([50])).argmax())
        samples = samples_of([50, 50]).point(mask_rows=np.array([-1, 0], np.int32), bitmask=words)
        model.sample(samples)
        assert arrays(samples)["token_ids"].tolist() == [greatest, 69]

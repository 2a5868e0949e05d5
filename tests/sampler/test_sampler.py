"""The sampler against the slow reference, token by token."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Epoch, Mask, Sampling
from tests.sampler import reference
from tests.sampler.bench import Bench
from worker_svc.sampling_rules import SamplerError

VOCAB = 37  # neither a multiple of 4 (a call of Philox) nor of 32 (a word of a mask)
TOKENS = st.integers(0, VOCAB - 1)
# Few values, so that ties are common, among them both zeros and a logit that the model itself rules out.
LOGITS = st.lists(
    st.sampled_from([-math.inf, -3.0, -0.0, 0.0, 0.25, 1.0, 2.5]) | st.floats(-5, 5, width=32),
    min_size=VOCAB,
    max_size=VOCAB,
)
SAMPLINGS = st.builds(
    Sampling,
    max_tokens=st.just(50),
    seed=st.integers(0, (1 << 64) - 1),
    bad_words=st.lists(st.lists(TOKENS, min_size=1, max_size=3).map(tuple), max_size=3).map(tuple),
    logit_bias=st.dictionaries(TOKENS, st.floats(-3, 3, width=32), max_size=3).map(lambda d: tuple(d.items())),
    min_tokens=st.integers(0, 4),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    presence_penalty=st.sampled_from([0.0, 0.5, -0.5]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.4]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    min_p=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    top_k=st.sampled_from([0, 1, 3, 8, VOCAB, 99]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
    stop_token_ids=st.lists(TOKENS, max_size=2).map(tuple),
    eos_token_ids=st.lists(TOKENS, max_size=2).map(tuple),
)


@st.composite
def contexts(draw: Any) -> reference.Context:
    prompt = draw(st.lists(TOKENS, min_size=1, max_size=6))
    output = draw(st.lists(TOKENS, max_size=6))
    logits = np.array(draw(LOGITS), np.float32)
    sampling = draw(SAMPLINGS)
    return reference.Context(logits, sampling, prompt, output)


# What no validated request asks for: none of it may end a worker, which other people's streams run on.
EXTREMES: list[dict[str, Any]] = [
    {"repetition_penalty": 1e-38},
    {"repetition_penalty": 1e-38, "temperature": 0.0},
    {"repetition_penalty": 1e38},
    {"presence_penalty": -3e38, "frequency_penalty": 3e38},
    {"frequency_penalty": -3e38, "temperature": 1e-5},
    {"logit_bias": ((1, 3e38), (2, 3e38), (3, -3e38)), "temperature": 1e-5},
    {"logit_bias": tuple((token, -3e38) for token in range(VOCAB)), "temperature": 1e-5, "top_p": 0.5},
    {"temperature": 3e38, "min_p": 1.0},
    {"bad_words": tuple((token,) for token in range(VOCAB)), "top_k": 3},
    {"bad_words": tuple((token,) for token in range(VOCAB)), "temperature": 0.0},
]
BEYOND: list[dict[str, Any]] = [
    {field: value}
    for field in ("repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "min_p", "top_p")
    for value in (math.nan, math.inf, -math.inf, 0.0, -1.0, 1e300)
] + [{"logit_bias": ((1, value), (2, 1.0))} for value in (math.nan, math.inf, -math.inf, 1e300)]


def sampled(contexts: list[reference.Context]) -> list[int]:
    bench = Bench(VOCAB)
    for slot, at in enumerate(contexts, 1):
        bench.admit(slot, at.prompt, at.output, at.sampling)
    logits = np.stack([at.logits for at in contexts])
    return [int(token) for token in bench.step(range(1, len(contexts) + 1), logits).token_ids]


@given(contexts())
def test_equals_the_reference(at: reference.Context) -> None:
    if max(at.logits) == -math.inf:
        with pytest.raises(SamplerError, match="slot 1: no token is allowed"):
            sampled([at])
        return
    assert sampled([at]) == [reference.sample(at)]


@given(st.lists(contexts(), min_size=1, max_size=8))
def test_a_batch_equals_the_reference_row_by_row(batch: list[reference.Context]) -> None:
    batch = [at for at in batch if max(reference.edited(at)) > -math.inf]
    if batch:
        assert sampled(batch) == [reference.sample(at) for at in batch]


@pytest.mark.parametrize("extreme", EXTREMES)
def test_extreme_parameters_equal_the_reference_in_any_company(extreme: dict[str, Any]) -> None:
    rng = np.random.default_rng(1)
    rows = []
    for seed in range(8):
        logits = rng.normal(0, 9, VOCAB).astype(np.float32)
        logits[30] = -math.inf
        wish = extreme if seed % 2 == 0 else {}
        rows.append(reference.Context(logits, Sampling(9, seed=seed, **wish), [1, 2, 30], [3, 2, 2]))
    expected = [reference.sample(at) for at in rows]
    assert sampled(rows) == expected
    assert [sampled([at])[0] for at in rows] == expected


@pytest.mark.parametrize("beyond", BEYOND)
def test_no_parameter_ends_a_worker(beyond: dict[str, Any]) -> None:
    logits = np.array([0.0, -1.0, 2.0, *[0.5] * (VOCAB - 4), -math.inf], np.float32)
    plain = reference.Context(logits, Sampling(9, seed=5), [1, VOCAB - 1], [0, 2])
    for more in ({}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0.0}):
        wild = reference.Context(logits, Sampling(9, **(more | beyond)), [1, VOCAB - 1], [0, 2])
        tokens = sampled([wild, plain])
        assert tokens[0] in range(VOCAB)
        assert tokens[1] == reference.sample(plain)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_what_is_pruned_could_not_have_won(seed: int, spread: float) -> None:
    """A large vocabulary without filters: the reference draws noise for every token."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, 2_000).astype(np.float32)
    at = reference.Context(logits, Sampling(9, seed=seed), [1], [])
    bench = Bench(2_000)
    bench.admit(1, at.prompt, at.output, at.sampling)
    assert bench.step([1], logits[None]).token_ids.tolist() == [reference.sample(at)]


@pytest.mark.parametrize("top_p", [0.3, 0.9, 0.9999])
def test_top_p_of_a_large_vocabulary(top_p: float) -> None:
    rng = np.random.default_rng(7)
    for seed in range(20):
        # Rounded, as bfloat16 logits are: the border of the nucleus runs through a tie.
        logits = (rng.normal(0, 2.0, 500).round(1)).astype(np.float32)
        at = reference.Context(logits, Sampling(9, seed=seed, top_p=top_p), [1], [])
        bench = Bench(500)
        bench.admit(1, at.prompt, at.output, at.sampling)
        assert bench.step([1], logits[None]).token_ids.tolist() == [reference.sample(at)]


def context(logits: list[float], sampling: Sampling, output: tuple[int, ...] = ()) -> reference.Context:
    return reference.Context(
        np.array(logits + [-9.0] * (VOCAB - len(logits)), np.float32), sampling, [20], list(output)
    )


def test_greedy_takes_the_lowest_of_equals() -> None:
    greedy = Sampling(9, temperature=0.0)
    assert sampled([context([0, 2, 1, 2], greedy), context([-0.0, 0.0, -0.0], greedy)]) == [1, 0]


def test_top_k_keeps_the_lowest_of_equals() -> None:
    rows = [context([1, 1, 3, 1, 1], Sampling(9, seed=seed, top_k=3)) for seed in range(60)]
    assert set(sampled(rows)) == {0, 1, 2}


def test_top_p_ends_with_the_token_that_reaches_it() -> None:
    """Two equal tokens of a half each: the first reaches 0.5, and only 0.51 asks for the second."""
    never = ((token, -1e9) for token in range(2, VOCAB))
    half = {"max_tokens": 9, "logit_bias": tuple(never)}
    for top_p, support in [(0.5, {0}), (0.51, {0, 1})]:
        rows = [context([0, 0], Sampling(**half, seed=seed, top_p=top_p)) for seed in range(40)]  # type: ignore[arg-type]
        assert set(sampled(rows)) == support


def test_both_zeros_are_one_value() -> None:
    rows = [context([-0.0, 0.0, -0.0], Sampling(9, seed=seed, top_k=1)) for seed in range(20)]
    assert set(sampled(rows)) == {0}


def test_a_slots_next_holder_inherits_nothing() -> None:
    bench = Bench(VOCAB)
    first = Sampling(9, temperature=0.0, bad_words=((1,),), repetition_penalty=9.0)
    logits = np.array([[1, 3, 2] + [0] * (VOCAB - 3)], np.float32)
    bench.admit(1, [20, 2], [], first)
    assert bench.step([1], logits).token_ids.tolist() == [0]
    bench.release(1)
    bench.admit(1, [0, 1, 20, 20], [], Sampling(9, temperature=0.0, repetition_penalty=9.0))
    assert bench.step([1], logits).token_ids.tolist() == [2]


def test_a_bad_word_is_banned_only_after_its_beginning() -> None:
    sampling = Sampling(9, temperature=0.0, bad_words=((5, 6, 1), (2,)))
    logits: list[float] = [0, 3, 4]
    assert sampled([context(logits, sampling, output) for output in [(), (6,), (5, 6), (5, 5, 6), (5, 6, 7)]]) == [
        1,
        1,
        0,
        0,
        1,
    ]


def test_min_tokens_holds_back_every_end() -> None:
    sampling = Sampling(9, temperature=0.0, min_tokens=2, eos_token_ids=(1,), stop_token_ids=(2,))
    rows = [context([0, 5, 4, 3], sampling, output) for output in [(), (9,), (9, 9)]]
    assert sampled(rows) == [3, 3, 1]


def test_penalties_count_the_output_and_repetition_the_prompt_as_well() -> None:
    def logits_after(sampling: Sampling, output: tuple[int, ...]) -> list[float]:
        """The bias that makes each of three tokens win tells its logit: ask by bisection would be slow, so ask once."""
        return [float(x) for x in reference.edited(context([2.0, 2.0, -2.0], sampling, output))[:3]]

    twice = Sampling(9, temperature=0.0, frequency_penalty=0.5, presence_penalty=0.25)
    assert logits_after(twice, (0, 0)) == [0.75, 2.0, -2.0]
    assert sampled([context([2.0, 0.8, 0.0], twice, (0, 0)), context([2.0, 0.7, 0.0], twice, (0, 0))]) == [1, 0]
    again = Sampling(9, temperature=0.0, repetition_penalty=2.0)
    in_prompt = [3.0] + [0.0] * 19 + [4.0]  # token 20 is the prompt
    assert sampled([context(in_prompt, again)]) == [0]


def test_tokens_that_the_model_does_not_have_are_no_trouble() -> None:
    sampling = Sampling(
        9,
        temperature=0.0,
        min_tokens=3,
        eos_token_ids=(VOCAB, 1),
        bad_words=((VOCAB + 1,),),
        logit_bias=((VOCAB, 5.0),),
    )
    assert sampled([context([1, 2], sampling)]) == [0]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e34])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_a_fault(bad: float, temperature: float) -> None:
    with pytest.raises(SamplerError, match="slot 2: the model's logits are not numbers"):
        sampled([context([1], Sampling(9)), context([0, bad], Sampling(9, temperature=temperature))])


def mask_of(rows: dict[int, set[int]]) -> Mask:
    """Written bit by bit: token t is bit t % 32 of word t // 32."""
    words = np.zeros((len(rows), -(-VOCAB // 32)), "<u4")
    for i, allowed in enumerate(rows.values()):
        for token in allowed:
            words[i, token // 32] |= np.uint32(1 << token % 32)
    return Mask(Epoch(1, 1), 1, list(rows), words.tobytes())


@given(st.lists(st.tuples(contexts(), st.none() | st.sets(TOKENS, min_size=1)), min_size=1, max_size=5))
def test_masked_rows_equal_the_reference(batch: list[tuple[reference.Context, set[int] | None]]) -> None:
    rows: list[tuple[reference.Context, set[int] | None]] = []
    for at, allowed in batch:
        if allowed is not None:
            at.allowed = np.array([token in allowed for token in range(VOCAB)])
        if max(reference.edited(at)) > -math.inf:
            rows.append((at, allowed))
    masks = {i: allowed for i, (_, allowed) in enumerate(rows) if allowed is not None}
    if not rows:
        return
    bench = Bench(VOCAB)
    for slot, (at, _) in enumerate(rows, 1):
        bench.admit(slot, at.prompt, at.output, at.sampling)
    logits = np.stack([at.logits for at, _ in rows])
    slots = range(1, len(rows) + 1)
    got = bench.step(slots, logits, mask_of(masks) if masks else None, [i + 1 for i in masks])
    assert got.token_ids.tolist() == [reference.sample(at) for at, _ in rows]
    assert all(int(got.token_ids[i]) in allowed for i, allowed in masks.items())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bans_that_leave_nothing_are_lifted_and_the_mask_stays(temperature: float) -> None:
    bias = ((4, 9.0), (5, 9.0))  # the latter of a token that the mask forbids, which it does not bring back
    banned = Sampling(9, temperature=temperature, top_k=1, bad_words=((3,), (4,)), logit_bias=bias)
    bench = Bench(VOCAB)
    bench.admit(1, [20], [], banned)
    logits = np.zeros((1, VOCAB), np.float32)
    logits[0, [3, 5]] = 1, 7
    assert bench.step([1], logits, mask_of({0: {3, 4}}), [1]).token_ids.tolist() == [3]


def test_a_grammar_that_can_only_end_ends() -> None:
    bench = Bench(VOCAB)
    bench.admit(1, [20], [], Sampling(9, temperature=0.0, min_tokens=5, eos_token_ids=(3,)))
    assert bench.step([1], np.zeros((1, VOCAB), np.float32), mask_of({0: {3}}), [1]).token_ids.tolist() == [3]


@pytest.mark.parametrize(
    ("mask", "masked", "message"),
    [
        (None, [1], r"masks the rows \[0\], and the mask that came is for \[\]"),
        (mask_of({0: {1}}), [], r"masks the rows \[\]"),
        (mask_of({1: {1}}), [1], r"is for \[1\]"),
        (Mask(Epoch(1, 1), 1, [0], bytes(7)), [1], "7 bytes"),
        (mask_of({0: set()}), [1], "slot 1: no token is allowed"),
    ],
)
def test_a_mask_that_does_not_fit_never_samples(mask: Mask | None, masked: list[int], message: str) -> None:
    bench = Bench(VOCAB)
    bench.admit(1, [20], [], Sampling(9))
    with pytest.raises(SamplerError, match=message):
        bench.step([1], np.zeros((1, VOCAB), np.float32), mask, masked)


def test_the_callers_logits_are_left_as_they_are() -> None:
    everything = Sampling(9, logit_bias=((1, 3.0),), bad_words=((2,),), repetition_penalty=1.5, top_k=3, logprobs=2)
    at = context([-0.0, 1, 2, 3], everything, (3,))
    before = at.logits.tobytes()
    sampled([at])
    assert at.logits.tobytes() == before

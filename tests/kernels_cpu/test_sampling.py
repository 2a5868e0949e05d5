"""The C++ sampler against torch's, token by token, on vocabularies and parameters of every kind.

Logarithms and exponentials may be rounded otherwise here than there. So a token may differ where, and only where, what
decides between the two lies within a rounding error: `explained` says so from float64, with no trust in either.
"""

from __future__ import annotations

import ctypes
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from kernels.cpu.library import address
from kernels.philox import gumbel
from protos.wire import Admit, Epoch, Row, Sampling, StepPlan, TokenLogprobs
from tests.kernels_cpu.sampling import CpuBench, CpuModel, Floats, scores
from tests.sampler import reference
from tests.sampler.bench import Bench
from tests.sampler.test_philox import KNOWN
from worker_svc.inputs import build_inputs
from worker_svc.sampler import token_logprobs
from worker_svc.sampling_rules import SamplerError
from worker_svc.slots import SlotTable

VOCABS = [1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 100, 1000, 1023, 2049]
Doubles = NDArray[np.float64]


def random_logits(rng: np.random.Generator, vocab: int) -> Floats:
    """One row of one of many kinds."""
    x = rng.normal(0, rng.choice([0.0, 0.01, 1.0, 3.0, 30.0]), vocab)
    match rng.integers(8):
        case 0:
            x = x.round(1)  # ties
        case 1:
            x[rng.integers(0, vocab, 5)] += 30  # peaks
        case 2:
            x[rng.random(vocab) < 0.5] = -math.inf
        case 3:
            x *= 1e31
        case 4:
            x = np.where(rng.random(vocab) < 0.5, -0.0, 0.0)
        case 5:
            x = x * 1e-30
    if x.max() == -math.inf:
        x[rng.integers(vocab)] = 0
    return x.astype(np.float32)


def random_sampling(rng: np.random.Generator, vocab: int) -> Sampling:
    def maybe(value: Any, plain: Any) -> Any:
        return value if rng.random() < 0.35 else plain

    tokens = rng.integers(0, vocab, 6).tolist()
    return Sampling(
        20,
        seed=int(rng.integers(0, 1 << 64, dtype=np.uint64)),
        temperature=float(rng.choice([0.0, 0.3, 1.0, 1.0, 1.7, 30.0])),
        top_k=maybe(int(rng.choice([1, 2, 5, 50, vocab - 1, vocab, vocab + 9])), 0),
        top_p=maybe(float(rng.choice([0.0, 1e-9, 0.1, 0.5, 0.9, 0.999])), 1.0),
        min_p=maybe(float(rng.choice([1e-30, 1e-3, 0.1, 0.5, 1.0])), 0.0),
        repetition_penalty=maybe(float(rng.choice([0.5, 1.2, 3.0])), 1.0),
        presence_penalty=maybe(float(rng.normal()), 0.0),
        frequency_penalty=maybe(float(rng.normal()), 0.0),
        logit_bias=maybe(tuple((t, float(rng.normal(0, 4))) for t in set(tokens)), ()),
        bad_words=maybe(((tokens[0],), (tokens[1], tokens[2])), ()),
        min_tokens=maybe(10, 0),
        eos_token_ids=(tokens[3],),
        logprobs=maybe(min(int(rng.choice([0, 1, 5, 20])), vocab), -1),
    )


def explained(at: reference.Context, one: int, other: int) -> bool:
    """Whether float64 finds these two tokens so close that rounding decides between them."""
    s = at.sampling
    x = np.array([float(v) for v in reference.edited(at)]) / float(np.float32(s.temperature))
    order = np.lexsort((np.arange(len(x)), -x))
    with np.errstate(over="ignore", divide="ignore"):
        kept = order[x[order] >= max(x.max() + math.log(s.min_p), -1e300) if s.min_p else x[order] > -math.inf]
        kept = kept[: s.top_k] if s.top_k > 0 else kept
        weights = np.exp(x[kept] - x.max())
    before = (np.cumsum(weights) - weights) / weights.sum()
    place = {int(token): i for i, token in enumerate(kept)}
    if s.top_p < 1 and any(t in place and abs(before[place[t]] - s.top_p) < 1e-6 for t in (one, other)):
        return True
    noise = [
        gumbel(torch.tensor([s.seed]).to(torch.int64), torch.tensor([at.position]), torch.tensor([t]))
        for t in (one, other)
    ]
    a, b = (float(x[t]) + float(n) for t, n in zip((one, other), noise, strict=True))
    return abs(a - b) < 4e-7 * max(1.0, abs(a))


def same_scores(got: TokenLogprobs | None, wanted: TokenLogprobs | None) -> None:
    if got is None or wanted is None:
        assert got is wanted
        return
    assert (got.token_id, got.rank, got.top_ids) == (wanted.token_id, wanted.rank, wanted.top_ids)
    assert got.logprob == pytest.approx(wanted.logprob, abs=1e-6, rel=2e-7)
    assert got.top_logprobs == pytest.approx(wanted.top_logprobs, abs=1e-6, rel=2e-7)


@pytest.mark.parametrize("vocab", VOCABS)
def test_the_same_tokens_as_torch(cdll: ctypes.CDLL, isa: str, vocab: int) -> None:
    rows, rng = 48, np.random.default_rng(vocab)
    cpu, bench = CpuBench(cdll, isa, vocab), Bench(vocab)
    contexts = []
    for slot in range(1, rows + 1):
        prompt, output = (rng.integers(0, vocab, n).tolist() for n in (3, int(rng.integers(0, 6))))
        at = reference.Context(random_logits(rng, vocab), random_sampling(rng, vocab), prompt, output)
        contexts.append(at)
        for each in (cpu, bench):
            each.admit(slot, prompt, output, at.sampling)
    logits = np.stack([at.logits for at in contexts])
    before = logits.copy()
    got, wanted = (each.step(range(1, rows + 1), logits) for each in (cpu, bench))
    assert logits.tobytes() == before.tobytes()
    differ = np.flatnonzero(got.token_ids != wanted.token_ids).tolist()
    assert len(differ) <= 1
    for i in range(rows):
        if i in differ:
            assert explained(contexts[i], int(got.token_ids[i]), int(wanted.token_ids[i])), contexts[i].sampling
        else:
            same_scores(got.logprobs[i], wanted.logprobs[i])


@pytest.mark.parametrize("spread", [0.01, 2.0, 6.0])
def test_the_same_tokens_as_torch_of_a_real_vocabulary(cdll: ctypes.CDLL, isa: str, spread: float) -> None:
    rng = np.random.default_rng(int(spread * 100))
    vocab = 49_152 if spread == 2.0 else 50_257
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.7},
        {"temperature": 0.0, "logprobs": 5},
        {"top_k": 50, "top_p": 0.9},
        {"top_p": 0.9, "logprobs": 2},
        {"top_k": 3000},
        {"min_p": 0.05},
    ]
    cpu, bench = CpuBench(cdll, isa, vocab), Bench(vocab)
    for slot, kind in enumerate(kinds, 1):
        for each in (cpu, bench):
            each.admit(slot, [slot], [], Sampling(**({"max_tokens": 9, "seed": slot} | kind)))
    for _ in range(3):
        logits = rng.normal(0, spread, (len(kinds), vocab)).astype(np.float32)
        got, wanted = (each.step(range(1, len(kinds) + 1), logits) for each in (cpu, bench))
        assert got.token_ids.tolist() == wanted.token_ids.tolist()
        for ours, theirs in zip(got.logprobs, wanted.logprobs, strict=True):
            same_scores(ours, theirs)


@pytest.mark.parametrize("value", [0.0, -0.0, 7.5])
def test_all_logits_alike(cdll: ctypes.CDLL, isa: str, value: float) -> None:
    """The most ties there can be, in more blocks than a selection looks at first."""
    vocab = 49_153
    kinds: list[dict[str, Any]] = [{"top_k": 2}, {"top_k": 2000}, {"top_p": 0.001}, {"top_k": 900, "top_p": 0.5}]
    bench = CpuBench(cdll, isa, vocab)
    for slot, kind in enumerate(kinds, 1):
        bench.admit(slot, [slot], [], Sampling(99, seed=slot, logprobs=slot, **kind))
    logits = np.full((len(kinds), vocab), value, np.float32)
    limits = [2, 2000, 50, 450]  # 0.001 of 49153 tokens are 49.2: the fiftieth reaches it
    for _ in range(20):
        for limit, token, told in zip(limits, *_both(bench.step(range(1, 5), logits)), strict=True):
            assert token < limit
            assert told is not None
            assert told.rank == token + 1
            assert told.top_ids == tuple(range(len(told.top_ids)))
            assert told.logprob == pytest.approx(-math.log(vocab), abs=1e-6)  # a sum that fills 32 bits


def _both(sampled: Any) -> tuple[list[int], list[TokenLogprobs | None]]:
    return sampled.token_ids.tolist(), sampled.logprobs


def test_a_nucleus_is_the_shortest_run_that_reaches_it(cdll: ctypes.CDLL, isa: str) -> None:
    """Over many seeds the tokens drawn are all those of the nucleus, and no other."""
    logits = np.tile(np.log(np.array([0.4, 0.05, 0.3, 0.05, 0.2], np.float32)), (200, 1))
    for top_p, support in [
        (0.39, {0}),
        (0.69, {0, 2}),
        (0.72, {0, 2, 4}),
        (0.93, {0, 1, 2, 4}),
        (0.97, {0, 1, 2, 3, 4}),
    ]:
        bench = CpuBench(cdll, isa, 5, max_slots=200)
        for slot in range(1, 201):
            bench.admit(slot, [1], [], Sampling(9, seed=slot, top_p=top_p))
        assert set(bench.step(range(1, 201), logits).token_ids.tolist()) == support


@pytest.mark.parametrize("fields", [{}, {"top_k": 2}])
def test_the_greatest_noise_there_is_can_win(cdll: ctypes.CDLL, isa: str, fields: dict[str, Any]) -> None:
    """Found by a search: seed 38 has the greatest uniform for this token at position 1."""
    lucky, vocab = 32_681, 40_000
    noise = [float(reference.gumbel(38, 1, token)) for token in (5, lucky)]
    assert noise[1] > 16.635
    for lead, winner in [(-0.01, lucky), (0.01, 5)]:
        bench = CpuBench(cdll, isa, vocab)
        bench.admit(1, [1], [], Sampling(9, seed=38, **fields))
        logits = np.full((1, vocab), -math.inf, np.float32)
        logits[0, [5, lucky]] = noise[1] - noise[0] + lead, 0
        assert bench.step([1], logits).token_ids.tolist() == [winner]


def test_no_penalty_lifts_a_ban(cdll: ctypes.CDLL, isa: str) -> None:
    """Even where it would make −inf · 0 of it, and press the only other token down to the limit."""
    bench = CpuBench(cdll, isa, 3)
    wild = Sampling(9, temperature=0.0, repetition_penalty=0.0, presence_penalty=3e38)
    bench.admit(1, [0, 1, 2], [0, 1, 2], wild)
    assert bench.step([1], np.array([[-math.inf, 1.0, -math.inf]], np.float32)).token_ids.tolist() == [1]


@pytest.mark.parametrize("fields", [{}, {"top_k": 20}])
def test_equal_scores_go_to_the_lower_id(cdll: ctypes.CDLL, isa: str, fields: dict[str, Any]) -> None:
    """Logits so large that a sum with noise is rounded to multiples of 8."""
    rng = np.random.default_rng(3)
    bench, contexts = CpuBench(cdll, isa, 40), []
    for slot in range(1, 61):
        logits = (1e8 + 8 * rng.integers(0, 3, 40)).astype(np.float32)
        contexts.append(reference.Context(logits, Sampling(9, seed=slot, **fields), [1], []))
        bench.admit(slot, [1], [], contexts[-1].sampling)
    drawn = bench.step(range(1, 61), np.stack([at.logits for at in contexts])).token_ids
    assert drawn.tolist() == [reference.sample(at) for at in contexts]
    assert any(at.logits[token] < at.logits.max() for at, token in zip(contexts, drawn, strict=True))


def test_every_failure_is_told_and_the_rest_is_sampled(cdll: ctypes.CDLL, isa: str) -> None:
    rows: list[list[float]] = [[1, 2], [math.nan, 2], [2, math.nan], [-math.inf] * 2, [3, 1], [0, math.inf], [4e33, 0]]
    for fields in ({"temperature": 0.0}, {}, {"top_k": 1}, {"logprobs": 1, "logit_bias": ((0, 1.0),)}):
        bench = CpuBench(cdll, isa, 2)
        for slot in range(1, 8):
            bench.admit(slot, [1], [], Sampling(9, **fields))
        plan, inputs = bench.plan(range(1, 8))
        out = bench.cpu.prepare(plan, inputs, bench.slots, None)
        assert bench.call(out, np.array(rows, np.float32)) == 5
        assert np.minimum(out.sampled, 0).tolist() == [0, -1, -1, -2, 0, -1, -1]
        with pytest.raises(SamplerError, match="slot 2: the model's logits are not numbers"):
            bench.cpu.finish(out)


@given(
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.1, 3.0, 40.0]),
    rows=st.integers(1, 8),
    vocab=st.sampled_from([1, 3, 50, 64, 700]),
    coarse=st.booleans(),
)
@settings(max_examples=40)
def test_scores_equal_those_of_torch(
    cdll: ctypes.CDLL, isa: str, seed: int, scale: float, rows: int, vocab: int, coarse: bool
) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, scale, (rows, vocab)).astype(np.float32)
    logits[rng.random((rows, vocab)) < 0.1] = -math.inf
    logits[:, 0] = np.where(rng.random(rows) < 0.5, -0.0, 0.0)
    if coarse:
        logits = logits.round()
    tokens, num_top = rng.integers(0, vocab, rows).tolist(), rng.integers(0, vocab + 5, rows).tolist()
    wanted = token_logprobs(torch.from_numpy(logits), np.array(tokens), num_top)
    for ours, theirs in zip(scores(cdll, isa, logits, tokens, num_top), wanted, strict=True):
        same_scores(ours, theirs)


def test_scores_of_what_is_no_number_fail(cdll: ctypes.CDLL, isa: str) -> None:
    logits = np.array([[0, math.nan], [-math.inf, -math.inf], [math.inf, 0], [0, 1]], np.float32)
    model = CpuModel(cdll, isa, logits)
    ranks = model.score(np.arange(4), np.zeros(4, np.int64), np.zeros(4, np.int32))[1]
    assert model.failed == 3
    assert ranks.tolist() == [-1, -1, -1, 2]


def test_prompt_logprobs_of_several_rows(cdll: ctypes.CDLL, isa: str) -> None:
    vocab, prompt = 50, [3, 1, 4, 1, 5, 9, 2, 6, 5]
    slots = SlotTable(max_slots=3, max_model_len=16, block_size=16, num_blocks=4, vocab_size=vocab)
    wishes = [Sampling(9, prompt_logprobs=2), Sampling(9), Sampling(9, prompt_logprobs=vocab)]
    admits = [Admit(slot, prompt, 9, [[slot]], wish) for slot, wish in enumerate(wishes, 1)]
    plan = StepPlan(Epoch(1, 1), 1, [], admits, [], [Row(1, 0, 9, sample=True), Row(2, 0, 4), Row(3, 0, 5)])
    slots.apply(plan)
    inputs = build_inputs(plan, slots)
    logits = np.random.default_rng(4).normal(0, 2, (18, vocab)).astype(np.float32)
    model: Any = CpuModel(cdll, isa, logits)
    got = CpuBench(cdll, isa, vocab).cpu.prompt_logprobs(model, inputs, slots)
    at = [*range(8), *range(13, 18)]
    wanted = token_logprobs(torch.from_numpy(logits[at]), np.array([*prompt[1:], *prompt[1:6]]), [2] * 8 + [vocab] * 5)
    assert len(got) == 13
    for ours, theirs in zip(got, wanted, strict=True):
        same_scores(ours, theirs)


@pytest.mark.parametrize(("counter", "key", "answer"), KNOWN)
def test_known_answers_of_philox(
    cdll: ctypes.CDLL, counter: tuple[int, ...], key: tuple[int, int], answer: tuple[int, ...]
) -> None:
    words = np.repeat(np.array(counter, np.uint32)[:, None], 8, axis=1).copy()
    cdll.pw_test_philox(ctypes.c_void_p(address(words)), ctypes.c_uint64(key[0] | key[1] << 32))
    assert (words == np.array(answer, np.uint32)[:, None]).all()


@given(st.integers(0, (1 << 64) - 1), st.integers(0, 1 << 20), st.integers(0, 1 << 16))
def test_noise_is_that_of_torch_and_below_its_bound(cdll: ctypes.CDLL, seed: int, position: int, quad: int) -> None:
    """Within 2 ulp: the uniforms are the same bits, only logarithms may be rounded otherwise."""
    by_run, by_id, bound = (np.zeros(32, np.float32) for _ in range(3))
    cdll.pw_test_noise(
        ctypes.c_uint64(seed),
        ctypes.c_int64(position),
        4 * quad,
        *(ctypes.c_void_p(address(array)) for array in (by_run, by_id, bound)),
    )
    seeds = torch.from_numpy(np.full(32, seed, np.uint64).view(np.int64))
    wanted = gumbel(seeds, torch.full((32,), position), 4 * quad + torch.arange(32)).numpy()
    assert by_run.tobytes() == by_id.tobytes()
    np.testing.assert_allclose(by_run, wanted, rtol=3e-7, atol=1.5e-7)
    assert (bound >= by_run).all()
    large = by_run > 4
    assert (bound[large] < by_run[large] + 0.08).all()


def test_instruction_sets_draw_the_same_tokens(cdll: ctypes.CDLL) -> None:
    """Noise has the same bits on each of them, and nothing but top_p takes an exponential."""
    cdll.pw_isas.restype = ctypes.c_char_p
    rng = np.random.default_rng(11)
    logits = rng.normal(0, 2, (32, 5001)).astype(np.float32)
    drawn = set()
    for isa in cdll.pw_isas().decode().split():
        bench = CpuBench(cdll, isa, 5001)
        for slot in range(1, 33):
            bench.admit(
                slot, [1], [], Sampling(9, seed=slot, top_k=(0, 40, 4000)[slot % 3], min_p=(0.0, 0.01)[slot % 2])
            )
        drawn.add(tuple(bench.step(range(1, 33), logits).token_ids.tolist()))
    assert len(drawn) == 1

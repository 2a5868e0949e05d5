"""Edits and logprobs on the device against the CPU's, from requests and histories at random."""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.gpu import logit_edits
from kernels.gpu.logprobs import logprobs
from kernels.gpu.slot_state import SlotState
from protos.wire import Admit, Sampling
from tests.kernels_triton.compare import DEVICE, normal
from worker_svc.logit_edits import LogitEditor
from worker_svc.sampler import _apply, token_logprobs
from worker_svc.slots import SlotTable

VOCAB, LENGTH = 61, 40
SIZES = [(VOCAB, LENGTH, seed) for seed in range(5)] + [(1503, 2500, 5)]  # the last more than a block of either


def words(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def slots_of(sampling: list[Sampling], rng: random.Random, vocab: int, length: int) -> tuple[SlotTable, SlotState]:
    """Histories in which the few tokens of the tests come often."""
    table = SlotTable(max_slots=len(sampling), max_model_len=length, block_size=8, num_blocks=8, vocab_size=vocab)
    state = SlotState.empty(len(sampling), length, 1, torch.device(DEVICE))
    for slot, each in enumerate(sampling, 1):
        known = length if slot == 1 else rng.randint(1, length)
        history = [rng.choice((rng.randrange(9), rng.randrange(vocab))) for _ in range(known)]
        table._admit(Admit(slot, history, rng.randint(1, len(history)), [[]], each))
        state.token_ids[slot, : len(history)] = words(history)
        state.lengths[slot] = len(history)
    return table, state


@pytest.mark.parametrize(("vocab", "length", "seed"), SIZES)
def test_penalties_biases_and_bans(vocab: int, length: int, seed: int) -> None:
    rng = random.Random(seed)
    sampling = [
        Sampling(
            max_tokens=9,
            repetition_penalty=rng.choice((1.0, 1.7, 0.5, 1e-30)),
            presence_penalty=rng.choice((0.0, 1.5, -2.0)),
            frequency_penalty=rng.choice((0.0, 0.3, -3e38)),
            logit_bias=tuple((rng.randrange(vocab), rng.choice((2.5, -math.inf, 3e38))) for _ in range(4)),
            bad_words=tuple(tuple(rng.randrange(9) for _ in range(rng.randint(1, 3))) for _ in range(20)),
        )
        for _ in range(4)
    ]
    sampling.insert(0, Sampling(max_tokens=9, repetition_penalty=1.1, presence_penalty=0.2, frequency_penalty=0.01))
    table, state = slots_of(sampling, rng, vocab, length)
    logits = normal(5, vocab, seed=seed) * 10
    logits[1, :5] = -math.inf
    slots = np.arange(1, 6)
    edits = LogitEditor(vocab).edits(table, slots, table.lengths[slots], None)
    assert edits is not None
    expected = logits.cpu().clone()
    _apply(expected.view(-1), table.params[slots], edits)

    ours = logits.clone()
    on_device = words(slots.tolist())
    logit_edits.add_bias(ours, words(edits.bias_at), torch.from_numpy(edits.bias).to(DEVICE))
    singles = [row * vocab + word[0] for row, s in enumerate(sampling) for word in s.bad_words if len(word) == 1]
    logit_edits.ban(ours, words(singles))
    long = [(row, word) for row, s in enumerate(sampling) for word in s.bad_words if len(word) > 1]
    borders = np.cumsum([0, *(len(word) for _, word in long)])
    prompts = table.prompt_lens[1:]
    logit_edits.ban_words(
        ours, on_device, state, words([row for row, _ in long]), words(borders), words([t for _, w in long for t in w]),
        words([prompts[row] for row, _ in long]), state.lengths[1:],
    )  # fmt: skip
    of = table.params[slots]
    penalties = torch.from_numpy(np.stack([of["repetition"], of["frequency"], of["presence"]])).to(DEVICE)
    logit_edits.penalize(ours, on_device, state, words(range(5)), words(prompts), penalties, state.lengths[1:])
    assert torch.equal(ours.cpu(), expected)
    assert (expected == -math.inf).sum() > 8


def test_edits_behind_drafts() -> None:
    """Outputs of one slot, each behind one draft more: what they have said ends where they stand."""
    rng = random.Random(3)
    sampling = [
        Sampling(
            max_tokens=9,
            min_tokens=min_tokens,
            stop_token_ids=(20, 21),
            frequency_penalty=0.3,
            repetition_penalty=1.2,
            bad_words=tuple((rng.randrange(9), rng.randrange(9)) for _ in range(30)),
        )
        for min_tokens in (3, 4)
    ]
    table, state = slots_of(sampling, rng, VOCAB, LENGTH)
    for slot, known, prompt in ((1, 10, 8), (2, 20, 18)):
        table.lengths[slot], table.prompt_lens[slot], state.lengths[slot] = known, prompt, known
        table.token_ids[slot, known : known + 5] = [rng.randrange(9) for _ in range(5)]
        state.token_ids[slot].copy_(words(table.token_ids[slot]))
    ids, positions = np.array([1, 1, 1, 2, 2, 2]), np.array([10, 11, 13, 20, 21, 22])
    edits = LogitEditor(VOCAB).edits(table, ids, positions, None)
    assert edits is not None
    logits = normal(6, VOCAB, seed=1) * 10
    expected = logits.cpu().clone()
    _apply(expected.view(-1), table.params[ids], edits)

    slots, at, prompts = words(ids), words(positions), table.prompt_lens[ids]
    long = [(row, word) for row, slot in enumerate(ids) for word in sampling[slot - 1].bad_words]
    logit_edits.ban_until(
        logits, words([row * VOCAB + token for row in range(6) for token in (20, 21)]),
        words(np.repeat(prompts + np.array([3, 4])[ids - 1], 2)), at,
    )  # fmt: skip
    logit_edits.ban_words(
        logits, slots, state, words([row for row, _ in long]), words(2 * np.arange(len(long) + 1)),
        words([token for _, word in long for token in word]), words([prompts[row] for row, _ in long]), at,
    )  # fmt: skip
    of = table.params[ids]
    penalties = torch.from_numpy(np.stack([of["repetition"], of["frequency"], of["presence"]])).to(DEVICE)
    logit_edits.penalize(logits, slots, state, words(range(6)), words(prompts), penalties, at)
    assert torch.equal(logits.cpu(), expected)
    assert (expected[:, 20] == -math.inf).tolist() == [True, False, False, True, True, False]


def test_bans_that_leave_nothing_are_lifted() -> None:
    logits = normal(4, VOCAB)
    edited = logits.clone()
    edited[[0, 2]] = -math.inf
    edited[1, 1:] = -math.inf
    bitmask = words([[0b1010, 0]])
    logit_edits.lift(edited, logits, words([0, 1, 2]), words([-1, -1, 0]), bitmask)
    assert torch.equal(edited[0], logits[0])
    assert edited[1, 0] == logits[1, 0]
    assert (edited[1, 1:] == -math.inf).all()
    assert edited[2, [1, 3]].equal(logits[2, [1, 3]])
    assert torch.isfinite(edited[2]).sum() == 2


@pytest.mark.parametrize(("vocab", "num_top"), [(5, 5), (61, 0), (1500, 7)])
def test_logprobs_are_those_of_the_cpu(vocab: int, num_top: int) -> None:
    logits = (normal(6, vocab, seed=vocab) * 5).round(decimals=1)  # ties
    logits[2, : vocab // 2] = -math.inf
    rows, tokens = [0, 2, 2, 5], [0, vocab - 1, 1, 3]
    out = torch.zeros(4, 2 + 2 * num_top, dtype=torch.int32, device=DEVICE)
    logprobs(logits, words(rows), words(tokens), num_top, out)
    right = token_logprobs(logits.cpu()[rows], np.array(tokens), [num_top] * 4)
    for ours, theirs in zip(out.cpu(), right, strict=True):
        scores = ours.view(torch.float32)
        assert ours[1] == theirs.rank
        assert tuple(ours[2 : 2 + num_top].tolist()) == theirs.top_ids[:num_top]
        expected = torch.tensor([theirs.logprob, *theirs.top_logprobs], dtype=torch.float32)
        torch.testing.assert_close(torch.cat([scores[:1], scores[2 + num_top :]]), expected, rtol=2e-7, atol=1e-7)


def test_more_alternatives_than_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="num_top is 9, and the vocabulary has 4"):
        logprobs(normal(1, 4), words([0]), words([0]), 9, words([[0] * 20]))

"""A row's result depends on the row alone: the same bits alone, batched, preempted and resumed."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from protos.wire import Sampling, TokenLogprobs
from tests.sampler.bench import Bench

VOCAB = 1_000
LENGTH = 12  # output tokens of each stream
MIX: list[dict[str, Any]] = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05, "temperature": 1.3},
    {"top_k": 50, "top_p": 0.95, "repetition_penalty": 1.1},
    {"presence_penalty": 0.7, "frequency_penalty": 0.4},
    {"temperature": 0.0, "repetition_penalty": 1.3, "bad_words": ((3,), (5, 6)), "logprobs": 3},
    {"top_p": 0.5, "logit_bias": ((7, 4.0),), "min_tokens": 4, "eos_token_ids": (7,), "logprobs": 0},
]
Stream = tuple[list[int], list[TokenLogprobs | None]]


def sampling(stream: int) -> Sampling:
    return Sampling(**({"max_tokens": LENGTH, "seed": 1_000 + stream} | MIX[stream % len(MIX)]))


def prompt(stream: int) -> list[int]:
    return [(7 * stream + i) % VOCAB for i in range(1 + stream % 5)]


def model(prefix: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits that depend on the whole prefix, some of them equal."""
    rng = np.random.default_rng([len(prefix), *prefix.tolist()])
    return rng.normal(0, 2.5, VOCAB).round(1).astype(np.float32)


def advance(bench: Bench, slots: dict[int, int], streams: dict[int, Stream]) -> None:
    """One step of `slots` (stream by slot)."""
    held = list(slots)
    logits = np.stack([model(bench.slots.token_ids[slot, : bench.slots.lengths[slot]]) for slot in held])
    sampled = bench.step(held, logits)
    for slot, token, score in zip(held, sampled.token_ids.tolist(), sampled.logprobs, strict=True):
        streams[slots[slot]][0].append(token)
        streams[slots[slot]][1].append(score)


@cache
def alone(stream: int) -> Stream:
    bench = Bench(VOCAB)
    bench.admit(1, prompt(stream), [], sampling(stream))
    streams: dict[int, Stream] = {stream: ([], [])}
    for _ in range(LENGTH):
        advance(bench, {1: stream}, streams)
    return streams[stream]


def test_many_together_equal_each_alone() -> None:
    count = 40
    bench = Bench(VOCAB)
    streams: dict[int, Stream] = {stream: ([], []) for stream in range(count)}
    for stream in range(count):
        bench.admit(stream + 1, prompt(stream), [], sampling(stream))
    for _ in range(LENGTH):
        advance(bench, {stream + 1: stream for stream in range(count)}, streams)
    for stream in range(count):
        assert streams[stream] == alone(stream), stream


@pytest.mark.parametrize("seed", range(4))
def test_streams_go_on_in_whatever_company_slot_and_epoch(seed: int) -> None:
    """Each step a random part of the streams runs; now and then one is admitted anew elsewhere, or the worker dies."""
    rng = np.random.default_rng(seed)
    bench = Bench(VOCAB, max_slots=16)
    streams: dict[int, Stream] = {stream: ([], []) for stream in range(len(MIX))}
    homes: dict[int, int] = {}
    while waiting := [stream for stream, (tokens, _) in streams.items() if len(tokens) < LENGTH]:
        if rng.random() < 0.1:
            bench, homes = Bench(VOCAB, max_slots=16), {}
        for stream in waiting:
            if stream in homes and rng.random() < 0.15:
                bench.release(homes.pop(stream))
            if stream not in homes:
                free = [slot for slot in range(1, 17) if slot not in homes.values()]
                homes[stream] = int(rng.choice(free))
                bench.admit(homes[stream], prompt(stream), streams[stream][0], sampling(stream))
        running = rng.permutation(waiting)[: rng.integers(1, len(waiting) + 1)].tolist()
        advance(bench, {homes[stream]: stream for stream in running}, streams)
    assert streams == {stream: alone(stream) for stream in streams}


def test_a_row_has_the_same_bits_at_any_place_of_a_real_vocabulary() -> None:
    """49,152 tokens: several chunks of every vectorized loop, and what is left over."""
    rng = np.random.default_rng(3)
    vocab = 49_152
    logits = rng.normal(0, 3, (33, vocab)).astype(np.float32)
    batch, single = Bench(vocab), Bench(vocab)
    for stream in range(33):
        batch.admit(stream + 1, prompt(stream), [], sampling(stream))
        single.admit(stream + 1, prompt(stream), [], sampling(stream))
    together = batch.step(range(1, 34), logits)
    for stream in range(33):
        one = single.step([stream + 1], logits[stream : stream + 1])
        assert one.token_ids[0] == together.token_ids[stream], stream
        assert one.logprobs[0] == together.logprobs[stream], stream


def test_threads_do_not_matter() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if before > 1 else 2)
        for stream in range(len(MIX)):
            assert alone.__wrapped__(stream) == alone(stream)
    finally:
        torch.set_num_threads(before)

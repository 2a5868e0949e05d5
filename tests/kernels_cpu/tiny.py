"""Small random models, opened, and steps over them as a worker would take them."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from benchmarks.random_model import RandomModel, Shape
from kernels.cpu import build
from kernels.cpu.library import PARAMS, Batch, Floats, Library, Model, Samples, Spec, Struct

TINY = Shape(
    vocab_size=301, hidden_size=64, intermediate_size=100, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=32,
    max_model_len=512,
)  # fmt: skip
# Sizes that no unit divides, and everything that a family may ask for.
ODD = Shape(
    vocab_size=307, hidden_size=72, intermediate_size=130, num_layers=2, num_heads=6, num_kv_heads=2, head_dim=48,
    max_model_len=512, bias=True, qk_norm=True, windows=(0, 5), logit_softcap=5.0, attention_softcap=3.0,
    embedding_scale=2.0, rotary_dim=32,
)  # fmt: skip
BLOCK, BLOCKS = 32, 64


@functools.cache
def library() -> Library:
    return Library(build.library(testing=True, sanitize=bool(os.environ.get("PAGEWIRE_TEST_SANITIZE"))))


@functools.cache
def random_model(shape: Shape, kind: str, kv: str) -> RandomModel:
    return RandomModel(library(), shape, kind, kv)


@functools.cache
def spec_of(shape: Shape, kind: str, kv: str) -> Spec:
    return random_model(shape, kind, kv).spec(BLOCKS, BLOCK)


@contextlib.contextmanager
def opened(
    shape: Shape, kind: str = "bf16", kv: str = "bf16", threads: int = 1, isa: str = "auto", cpus: int = 0
) -> Iterator[Model]:
    model = library().open(spec_of(shape, kind, kv), threads, isa, cpus)
    try:
        yield model
    finally:
        model.close()


@dataclass
class Text:
    """One sequence: its tokens, those whose KV is in its blocks, and the blocks."""

    token_ids: list[int]
    blocks: list[int]
    computed: int = 0


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return [int(token) for token in np.random.default_rng(seed).integers(0, TINY.vocab_size, count)]


def batch_of(rows: Sequence[tuple[Text, int]]) -> Batch:
    """The next so many tokens of each."""
    counts = [count for _, count in rows]
    cu = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    ends = np.array([text.computed + count for text, count in rows], np.int64)
    tables = np.zeros((len(rows), max((len(text.blocks) for text, _ in rows), default=1)), np.int64)
    token_ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    for row, (text, count) in enumerate(rows):
        tables[row, : len(text.blocks)] = text.blocks
        at = range(text.computed, text.computed + count)
        token_ids += text.token_ids[at.start : at.stop]
        positions += at
        slots += [text.blocks[position // BLOCK] * BLOCK + position % BLOCK for position in at]
    return Batch(num_rows=len(rows), num_tokens=len(token_ids), table_stride=tables.shape[1]).point(
        cu=cu,
        context_lens=ends,
        token_ids=np.array(token_ids, np.int64),
        positions=np.array(positions, np.int64),
        slot_mapping=np.array(slots, np.int64),
        block_tables=tables,
    )


def advance(model: Model, *rows: tuple[Text, int]) -> list[Floats]:
    """One step; the logits of each row's tokens [count, vocab]."""
    batch = batch_of(rows)
    model.forward(batch)
    logits = model.logits(np.arange(batch.num_tokens))
    for text, count in rows:
        text.computed += count
    return np.split(logits, np.cumsum([count for _, count in rows])[:-1])


def samples_of(tokens: Sequence[int], **params: float) -> Samples:
    """Greedy unless `params` say otherwise, with room for as many alternatives as they ask for."""
    values = np.zeros(len(tokens), PARAMS)
    values["top_p"], values["repetition"], values["logprobs"] = 1, 1, -1
    for name, value in params.items():
        values[name] = value
    count, most = len(tokens), max(0, int(values["logprobs"].max(initial=0)))
    return Samples(num=count, max_top=most).point(
        tokens=np.array(tokens, np.int64),
        params=values,
        token_ids=np.full(count, -7, np.int64),
        logprobs=np.zeros(count),
        ranks=np.zeros(count, np.int64),
        top_ids=np.zeros((count, most), np.int64),
        top_logprobs=np.zeros((count, most)),
    )


def arrays(struct: Struct) -> dict[str, Any]:
    """What a struct's pointers point to."""
    kept: dict[str, Any] = struct.__dict__["_kept"]
    return kept

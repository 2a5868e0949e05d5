"""A token's attention has the same bits whoever else is in the batch, however its sequence is cut into chunks, wherever
its pages lie, whatever they held before, and however many threads share the work (R2).
"""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from tests.kernels_cpu.paged import Attention, Chunk, Floats, Memory, blocks_for, in_chunks

LENGTH = 570  # two borders of spans of 256 keys

ATTENTIONS = [
    Attention(),
    Attention(kv="int8"),
    Attention(heads=8, kv_heads=1, dim=48, window=70),
    Attention(heads=8, kv_heads=1, dim=48, window=70, kv="int8", block_size=64),
    Attention(heads=4, kv_heads=2, dim=96, window=300, softcap=3.0, qk_norm=True),
]


def name(attention: Attention) -> str:
    return f"{attention.heads}x{attention.kv_heads}x{attention.dim}-{attention.kv}-w{attention.window}"


@pytest.fixture(params=ATTENTIONS, ids=name)
def attention(request: pytest.FixtureRequest) -> Attention:
    chosen: Attention = request.param
    return chosen


def same(a: Floats, b: Floats) -> bool:
    return a.tobytes() == b.tobytes()


def whole(cdll: ctypes.CDLL, isa: str, attention: Attention, qkv: Floats) -> Floats:
    return Memory(cdll, isa, attention).run([Chunk(qkv, blocks_for(attention, len(qkv)), 0, len(qkv))])


@pytest.mark.parametrize("size", [1, 7, 32, 64, 100])
def test_chunks(cdll: ctypes.CDLL, isa: str, attention: Attention, size: int) -> None:
    qkv = attention.tokens(LENGTH)
    got = in_chunks(Memory(cdll, isa, attention), qkv, blocks_for(attention, LENGTH), size)
    assert same(got, whole(cdll, isa, attention, qkv))


@pytest.mark.parametrize("neighbours", [1, 2, 5, 63])
def test_neighbours(cdll: ctypes.CDLL, isa: str, attention: Attention, neighbours: int) -> None:
    """The last token of a sequence beside those of others, one of which brings a prompt."""
    qkv = attention.tokens(LENGTH)
    alone = whole(cdll, isa, attention, qkv)[-1:]
    memory = Memory(cdll, isa, attention, 256)
    table = blocks_for(attention, LENGTH)
    memory.write([Chunk(qkv, table, 0, LENGTH - 1)])
    first = len(table) + 1
    others = []
    for i in range(neighbours):
        length = 40 + i
        others.append(Chunk(attention.tokens(length, seed=i + 1), blocks_for(attention, length, first), 0, length))
        first += len(others[-1].table)
    memory.write(others)
    ends = [Chunk(other.qkv, other.table, other.end - 1 if i else 0, other.end) for i, other in enumerate(others)]
    chunks = [*ends[: neighbours // 2], Chunk(qkv, table, LENGTH - 1, LENGTH), *ends[neighbours // 2 :]]
    before = sum(chunk.end - chunk.start for chunk in ends[: neighbours // 2])
    got = memory.run(chunks, threads=2)
    assert same(got[before : before + 1], alone)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads_and_layers(cdll: ctypes.CDLL, isa: str, attention: Attention, threads: int) -> None:
    """With more than one, the spans of a context are shared, and the last to end merges: also in the next layer."""
    qkv = attention.tokens(LENGTH)
    expected = whole(cdll, isa, attention, qkv)
    memory, table = Memory(cdll, isa, attention), blocks_for(attention, LENGTH)
    memory.write([Chunk(qkv, table, 0, LENGTH)])
    for start in (0, LENGTH - 20, LENGTH - 1):
        chunks = [Chunk(qkv, table, start, LENGTH)]
        got = memory.attend(chunks, memory.write(chunks), threads=threads, layers=3)
        assert same(got, expected[start:]), start


def test_blocks_and_what_they_held(cdll: ctypes.CDLL, isa: str, attention: Attention) -> None:
    """Blocks in any order, from which a longer sequence has just gone, or that were never written: NaN bits."""
    qkv = attention.tokens(LENGTH)
    expected = whole(cdll, isa, attention, qkv)
    memory = Memory(cdll, isa, attention)
    table = np.random.default_rng(3).permutation(blocks_for(attention, LENGTH)).tolist()
    assert same(in_chunks(memory, qkv, table, 100), expected)
    other = attention.tokens(LENGTH, seed=9) * 1e4
    memory.write([Chunk(other, table[::-1], 0, LENGTH)])
    assert same(in_chunks(memory, qkv, table, 97), expected)


def test_blocks_before_the_window_may_be_gone(cdll: ctypes.CDLL, isa: str) -> None:
    for kv in ("bf16", "int8"):
        attention = Attention(window=70, kv=kv)
        qkv = attention.tokens(LENGTH)
        expected = whole(cdll, isa, attention, qkv)
        memory, table = Memory(cdll, isa, attention), blocks_for(attention, LENGTH)
        memory.write([Chunk(qkv, table, 0, LENGTH)])
        gone = (LENGTH - 5 - 69) // 32  # blocks that the query at LENGTH − 5 does not see
        chunks = [Chunk(qkv, [0] * gone + table[gone:], LENGTH - 5, LENGTH)]
        assert same(memory.run(chunks), expected[-5:])

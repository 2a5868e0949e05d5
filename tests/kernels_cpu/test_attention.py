"""Attention over pages against the oracle, on every instruction set that this host runs."""

from __future__ import annotations

import ctypes
from ctypes import byref

import numpy as np
import pytest

from tests.kernels_cpu.paged import Attention, Chunk, Floats, Memory, blocks_for, in_chunks

# Weights of V are rounded, to bfloat16 (2⁻⁹ of outputs of about 1) or to bytes, the heaviest of a span being 254. A
# query's or key's code that lies between two may fall either way.
MOST = {"bf16": 1e-2, "int8": 6e-2}
TYPICAL = {"bf16": 2e-3, "int8": 4e-3}

SHAPES = [
    Attention(),
    Attention(heads=9, kv_heads=3, block_size=64),
    Attention(heads=4, kv_heads=4, dim=96),
    Attention(heads=8, kv_heads=1, dim=128, block_size=96),
    Attention(heads=14, kv_heads=2, rotary_dim=32),
    Attention(heads=71, kv_heads=1, dim=16),
    Attention(heads=2, kv_heads=1, dim=48, rotary_dim=0),
    Attention(heads=2, kv_heads=2, dim=256, rotary_dim=20),
    Attention(window=40),
    Attention(window=257, qk_norm=True),
    Attention(softcap=5.0, window=1),
    Attention(heads=6, kv_heads=2, dim=128, qk_norm=True),
]


def name(attention: Attention) -> str:
    flags = f"{'-norm' * attention.qk_norm}{f'-w{attention.window}' * bool(attention.window)}"
    return f"{attention.heads}x{attention.kv_heads}x{attention.dim}{flags}"


def with_kv(attention: Attention, kv: str) -> Attention:
    fields = ("heads", "kv_heads", "dim", "block_size", "rotary_dim", "window", "softcap", "qk_norm")
    return Attention(kv=kv, **{field: getattr(attention, field) for field in fields})


def assert_near(got: Floats, expected: Floats, kv: str) -> None:
    np.testing.assert_allclose(got, expected, atol=MOST[kv], rtol=0)
    assert np.sqrt(((got - expected) ** 2).mean()) < TYPICAL[kv]


@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("attention", SHAPES, ids=name)
def test_prompt_and_tokens_match_the_oracle(cdll: ctypes.CDLL, isa: str, attention: Attention, kv: str) -> None:
    attention = with_kv(attention, kv)
    qkv = attention.tokens(301)
    memory, table = Memory(cdll, isa, attention), blocks_for(attention, 301)
    prompt = memory.run([Chunk(qkv, table, 0, 270)], threads=2)
    tokens = np.concatenate([memory.run([Chunk(qkv, table, i, i + 1)]) for i in range(270, 301)])
    expected = attention.expected(qkv)
    assert_near(np.concatenate([prompt, tokens]), expected, kv)


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_long_context_matches_the_oracle(cdll: ctypes.CDLL, isa: str, kv: str) -> None:
    """Of many spans, shared by threads."""
    attention = Attention(heads=2, kv=kv, max_len=4096)
    qkv = attention.tokens(3001)
    qkv[:, : 2 * attention.dim] *= 3  # some keys stand out
    memory, table = Memory(cdll, isa, attention, 128), blocks_for(attention, 3001)
    memory.write([Chunk(qkv, table, 0, 2990)])
    chunk = [Chunk(qkv, table, 2990, 3001)]
    got = memory.run(chunk, threads=3)
    assert_near(got, attention.expected(qkv)[2990:], kv)


def test_int8_keys_and_values_are_near_the_exact(cdll: ctypes.CDLL, isa: str) -> None:
    attention = Attention(kv="int8")
    qkv = attention.tokens(256)
    got = Memory(cdll, isa, attention).run([Chunk(qkv, blocks_for(attention, 256), 0, 256)])
    error = got - attention.expected(qkv, rounded=False)
    assert np.sqrt((error**2).mean()) < 0.01
    assert np.abs(error).max() < 0.06


@pytest.mark.parametrize("first_value", [0.001, 0.1])
def test_int8_tail_of_small_weights_counts(cdll: ctypes.CDLL, isa: str, first_value: float) -> None:
    """One key takes nearly all, as a first token often does: 255 others, of a sixth of a byte each, have the rest."""
    attention = Attention(heads=1, kv="int8", rotary_dim=0)
    qkv = np.abs(attention.tokens(256)) * np.float32(0.1)
    q, k, v = (qkv[:, i * 64 : i * 64 + 64] for i in range(3))
    q[:], k[0], v[0] = 1.0, 1.0, first_value
    memory = Memory(cdll, isa, attention)
    got = memory.run([Chunk(qkv, blocks_for(attention, 256), 0, 256)])[-1]
    np.testing.assert_allclose(got, attention.expected(qkv, rounded=False)[-1], rtol=0.02)


def test_unseen_shapes_are_told(cdll: ctypes.CDLL, isa: str) -> None:
    def fits(attention: Attention) -> bool:
        return bool(cdll.pw_test_attention_fits(isa.encode(), byref(attention.shape)))

    cdll.pw_test_attention_fits.restype = ctypes.c_bool
    assert all(map(fits, SHAPES))
    for wrong in [
        Attention(dim=40),
        Attention(dim=272),
        Attention(heads=3, kv_heads=2),
        Attention(block_size=48),
        Attention(rotary_dim=80),
    ]:
        assert not fits(wrong)


def test_values_of_zero_and_huge_scores(cdll: ctypes.CDLL, isa: str) -> None:
    for kv in ("bf16", "int8"):
        attention = Attention(kv=kv)
        qkv = attention.tokens(70)
        qkv[:, : 4 * 64] *= 100  # scores of thousands: all weights but one are 0
        qkv[:, 4 * 64 :] = 0
        got = in_chunks(Memory(cdll, isa, attention), qkv, blocks_for(attention, 70), 33)
        assert not got.any()


SPOILED = 75
BAD = {"nan": np.float32("nan"), "negative-nan": -np.float32("nan"), "inf": np.float32("inf")}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("part", ["key", "value"])
@pytest.mark.parametrize("softcap", [0.0, 5.0], ids=["plain", "softcap"])
def test_what_is_no_number_in_int8_kv_makes_all_that_sees_it_none(
    cdll: ctypes.CDLL, isa: str, part: str, softcap: float, bad: np.float32
) -> None:
    """In a prompt, in steps of one token, and where threads share the spans: and nothing else changes."""
    attention = Attention(kv="int8", softcap=softcap)
    qkv, table = attention.tokens(600), blocks_for(attention, 600)
    expected = Memory(cdll, isa, attention).run([Chunk(qkv, table, 0, 600)])
    first = attention.dim * (attention.heads + attention.kv_heads * (part == "value"))
    qkv[SPOILED, first + 20] = bad
    for threads in (1, 3):
        memory = Memory(cdll, isa, attention)
        prompt = memory.run([Chunk(qkv, table, 0, 590)], threads=threads)
        tokens = [memory.run([Chunk(qkv, table, i, i + 1)], threads=threads) for i in range(590, 600)]
        got = np.concatenate([prompt, *tokens])
        assert np.array_equal(got[:SPOILED], expected[:SPOILED])
        assert np.isnan(got[SPOILED:]).all()


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_a_softcap_hides_no_nan(cdll: ctypes.CDLL, isa: str, kv: str) -> None:
    attention = Attention(kv=kv, softcap=5.0)
    qkv = attention.tokens(40)
    qkv[20, 5] = np.nan  # of a query
    got = Memory(cdll, isa, attention).run([Chunk(qkv, blocks_for(attention, 40), 0, 40)])
    assert np.isnan(got[20, : attention.dim]).all()
    assert np.isfinite(np.delete(got, 20, 0)).all()

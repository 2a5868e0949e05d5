"""Whole steps: against a plain forward, and the same bits however a text came to be computed."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from benchmarks.random_model import Shape
from kernels.cpu.library import Floats
from tests.kernels_cpu import plain
from tests.kernels_cpu.tiny import (
    ODD,
    TINY,
    Text,
    advance,
    arrays,
    batch_of,
    opened,
    random_model,
    random_tokens,
    samples_of,
    spec_of,
)

MODES = [("bf16", "bf16"), ("int8", "bf16"), ("int8", "int8"), ("int4", "bf16")]
MODES += [("w4a16", "bf16"), ("w8a16", "int8"), ("w8a8", "bf16")]
# Of the plain forward's spread, root mean square. What is rounded to integers falls on another side here and there.
CLOSE = {("bf16", "bf16"): 0.01, ("int8", "bf16"): 0.02, ("int8", "int8"): 0.05, ("int4", "bf16"): 0.03}
CLOSE |= {("w4a16", "bf16"): 0.01, ("w8a16", "int8"): 0.05, ("w8a8", "bf16"): 0.03}
TOKENS = random_tokens(75)


@pytest.mark.parametrize("shape", [TINY, ODD], ids=["tiny", "odd"])
@pytest.mark.parametrize("mode", MODES, ids="+".join)
def test_a_forward_is_the_plain_one(isa: str, mode: tuple[str, str], shape: Shape) -> None:
    with opened(shape, *mode, isa=isa) as model:
        (logits,) = advance(model, (Text(TOKENS, [3, 1, 2]), len(TOKENS)))
    expected = plain.logits(random_model(shape, *mode), TOKENS)
    assert np.sqrt(np.mean((logits - expected) ** 2)) < CLOSE[mode] * expected.std()


def _whole(shape: Shape, mode: tuple[str, str], isa: str, tokens: list[int]) -> Floats:
    with opened(shape, *mode, isa=isa) as model:
        return advance(model, (Text(tokens, [1, 2, 3]), len(tokens)))[0]


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("mode", MODES, ids="+".join)
def test_the_bits_are_those_of_chunks_neighbours_blocks_and_threads(
    isa: str, mode: tuple[str, str], threads: int
) -> None:
    """One text in one step, on one thread — and in chunks of 1 to 40 beside others, in other blocks, on `threads`."""
    expected = _whole(ODD, mode, isa, TOKENS)
    neighbours = [Text(random_tokens(90, seed), [10 + 3 * seed, 11 + 3 * seed, 12 + 3 * seed]) for seed in range(12)]
    text, found = Text(TOKENS, [9, 4, 7]), []
    with opened(ODD, *mode, isa=isa, threads=threads) as model:
        for step, count in enumerate([1, 1, 5, 2, 1, 17, 3, 40, 4, 1]):
            others = [(other, 1 + (step + i) % 9) for i, other in enumerate(neighbours[: 2 * step % 13])]
            rows = [*others[: step % 4], (text, count), *others[step % 4 :]]
            found.append(advance(model, *rows)[min(step % 4, len(others))])
    assert np.array_equal(np.concatenate(found).view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("mode", MODES, ids="+".join)
def test_a_prefix_that_another_computed_gives_the_same_bits(isa: str, mode: tuple[str, str]) -> None:
    expected = _whole(TINY, mode, isa, TOKENS)
    with opened(TINY, *mode, isa=isa, threads=2) as model:
        advance(model, (Text(TOKENS[:64] + [7] * 8, [5, 6, 7]), 72))
        (logits,) = advance(model, (Text(TOKENS, [5, 6, 8], computed=64), 11))
    assert np.array_equal(logits.view(np.uint32), expected[64:].view(np.uint32))


@pytest.mark.parametrize("mode", MODES, ids="+".join)
def test_the_bits_are_the_same_where_few_outputs_are_wanted(isa: str, mode: tuple[str, str]) -> None:
    """The last layer of wanted tokens alone: none, the last of each row, runs within rows, nearly all."""
    texts = [(Text(random_tokens(90, 1), [9, 4, 7]), 75), (Text(random_tokens(3, 2), [5]), 3)]
    cases = [[], [74, 77], [0, 1, 2, 40, 73, 74, 75, 77], [76], list(range(1, 78))]
    with opened(ODD, *mode, isa=isa, threads=2) as model:
        batch = batch_of(texts)
        model.forward(batch)
        expected, hidden = model.logits(np.arange(78)), model.hidden(np.arange(78))
        for case in cases:
            wanted = np.array(case, np.int64)
            batch.num_wanted = len(wanted)
            model.forward(batch.point(wanted=wanted))
            assert np.array_equal(model.logits(wanted).view(np.uint32), expected[wanted].view(np.uint32))
            assert np.array_equal(model.hidden(wanted[::-1].copy()), hidden[wanted[::-1]])
            samples = samples_of(case)
            model.step(batch, samples)
            assert np.array_equal(arrays(samples)["token_ids"], expected[wanted].argmax(1))
        again = batch_of([(Text(texts[0][0].token_ids, [9, 4, 7], computed=75), 15)])
        model.forward(again)
        tail = model.logits(np.arange(15))
    whole = _whole(ODD, mode, isa, texts[0][0].token_ids)
    assert np.array_equal(tail.view(np.uint32), whole[75:].view(np.uint32))


def test_a_long_prefill_in_one_step(isa: str) -> None:
    """More rows than any kernel takes at a time, and a step of one after it: buffers are the same ones."""
    texts = [Text(random_tokens(350, seed), list(range(1 + 11 * seed, 12 + 11 * seed))) for seed in range(3)]
    with opened(TINY, isa=isa, threads=2) as model:
        together = advance(model, *((text, 350) for text in texts))
        again = Text(texts[1].token_ids, texts[1].blocks)
        parts = [advance(model, (again, 1))[0], advance(model, (again, 299))[0], advance(model, (again, 50))[0]]
    assert np.array_equal(np.concatenate(parts).view(np.uint32), together[1].view(np.uint32))


def test_steps_of_no_rows(isa: str) -> None:
    with opened(TINY, isa=isa, threads=2) as model:
        assert advance(model) == [] or advance(model)[0].shape == (0, TINY.vocab_size)


def test_structs_are_those_of_the_library(cdll: ctypes.CDLL) -> None:
    """Python's mirrors against sizes and offsets that the compiler tells."""
    from kernels.cpu import library

    cdll.pw_test_layout.restype = ctypes.c_char_p
    told = dict(line.split("=") for line in cdll.pw_test_layout().decode().split())
    mirrors: dict[str, int] = {}
    for name in ("Weight", "Layer", "Spec", "Batch", "Samples"):
        struct = getattr(library, name)
        mirrors[name] = ctypes.sizeof(struct)
        mirrors |= {f"{name}.{field}": getattr(struct, field).offset for field, _ in struct._fields_}
    mirrors["Params"] = library.PARAMS.itemsize
    assert library.PARAMS.fields is not None
    mirrors |= {f"Params.{name}": field[1] for name, field in library.PARAMS.fields.items()}
    assert {name: int(value) for name, value in told.items()} == mirrors


def test_the_embedding_is_the_head_where_they_are_tied(isa: str) -> None:
    spec = spec_of(TINY, "bf16", "bf16")
    tied = type(spec).from_buffer_copy(spec).keep(spec)
    tied.embed = None
    rows = random_model(TINY, "bf16", "bf16").dense["lm_head"]
    from tests.kernels_cpu.tiny import library

    model = library().open(tied, 1, isa)
    (logits,) = advance(model, (Text(TOKENS, [3, 1, 2]), len(TOKENS)))
    model.close()
    twin = random_model(TINY, "bf16", "bf16")
    own, twin.dense["embed"] = twin.dense["embed"], rows
    try:
        expected = plain.logits(twin, TOKENS)
    finally:
        twin.dense["embed"] = own
    assert np.sqrt(np.mean((logits - expected) ** 2)) < 0.01 * expected.std()

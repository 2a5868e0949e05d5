"""Whatever is wrong with a spec, a plan or a wish is an error that names field and limit; the next step is sound."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from kernels.cpu.library import PANEL, Batch, Layer, LibraryError, Samples, address, array_of
from tests.kernels_cpu import tiny
from tests.kernels_cpu.tiny import (
    BLOCK,
    BLOCKS,
    ODD,
    TINY,
    Text,
    arrays,
    batch_of,
    opened,
    random_model,
    random_tokens,
    samples_of,
    spec_of,
)

VOCAB = TINY.vocab_size


def _two_rows() -> Batch:
    return batch_of([(Text(random_tokens(40), [1, 2]), 40), (Text(random_tokens(5), [3]), 5)])


def _set(name: str, index: Any, value: int) -> Callable[[Batch], object]:
    return lambda batch: arrays(batch)[name].__setitem__(index, value)


def _wanted(tokens: list[int]) -> Callable[[Batch], object]:
    def want(batch: Batch) -> None:
        batch.num_wanted = len(tokens)
        batch.point(wanted=np.array(tokens, np.int64))

    return want


BATCHES: list[tuple[str, Callable[[Batch], object], str]] = [
    ("token", _set("token_ids", 7, VOCAB), rf"token_ids\[7\] is {VOCAB}, outside of the vocabulary of {VOCAB}"),
    ("negative token", _set("token_ids", 44, -1), r"token_ids\[44\] is -1"),
    ("position", _set("positions", 3, 4), r"positions\[3\] is 4, and by its row's length 3"),
    ("slot", _set("slot_mapping", 41, 1), rf"slot_mapping\[41\] is 1, and by its row's table {3 * BLOCK + 1}"),
    ("block", _set("block_tables", (0, 1), BLOCKS), rf"block_tables\[0, 1\] is {BLOCKS}, and there are {BLOCKS}"),
    ("negative block", _set("block_tables", (1, 0), -1), r"block_tables\[1, 0\] is -1"),
    ("length", _set("context_lens", 1, 10_000), rf"context_lens\[1\] is 10000, and must be 5 to {TINY.max_model_len}"),
    ("short", _set("context_lens", 0, 39), r"context_lens\[0\] is 39, and must be 40"),
    ("table", _set("context_lens", 0, 65), r"row 0 sees 3 blocks, and its table has 2"),
    ("begin", _set("cu", 0, 1), r"cu is from 1 to 45, and must be from 0 to 45"),
    ("end", _set("cu", 2, 46), r"cu is from 0 to 46, and must be from 0 to 45"),
    ("backward", _set("cu", 1, 50), r"cu of row 0 is 0 … 50"),
    ("empty row", _set("cu", 1, 0), r"cu of row 0 is 0 … 0"),
    ("tokens", lambda batch: setattr(batch, "num_tokens", 1), r"num_tokens is 1, and must be 2"),
    ("rows", lambda batch: setattr(batch, "num_rows", -1), r"num_rows is -1"),
    ("wanted", _wanted([3, 3]), r"wanted\[1\] is 3: they must ascend, and there are 45 tokens"),
    ("wanted beyond", _wanted([44, 45]), r"wanted\[1\] is 45"),
    ("many wanted", _wanted(list(range(46))), r"num_wanted is 46, and must be 0 to 45"),
    ("adapters", lambda batch: batch.point(adapters=np.array([0, 1], np.int32)), r"adapters\[1\] is 1, and none is"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "reason"), BATCHES, ids=[name for name, _, _ in BATCHES])
def test_a_bad_batch(name: str, spoil: Callable[[Batch], object], reason: str) -> None:
    with opened(TINY, threads=2) as model:
        batch = _two_rows()
        spoil(batch)
        with pytest.raises(LibraryError, match=reason):
            model.forward(batch)
        model.step(_two_rows(), samples_of([39, 44]))


def _edit(name: str, at: int) -> Callable[[Samples], object]:
    def edit(samples: Samples) -> None:
        lists: dict[str, Any] = {f"{name}_at": np.array([0, at], np.int64)}
        if name == "bias":
            lists["bias"] = np.zeros(2, np.float32)
        if name == "penalty":
            lists["penalty_counts"] = np.zeros(2, np.int64)
        samples.point(**lists)
        setattr(samples, {"bias": "num_bias", "ban": "num_bans", "penalty": "num_penalties"}[name], 2)

    return edit


SAMPLES: list[tuple[str, Callable[[Samples], object], str]] = [
    ("token", _set("tokens", 1, 45), r"tokens\[1\] is 45, and the last forward had 45"),  # type: ignore[list-item]
    ("negative", _set("tokens", 0, -1), r"tokens\[0\] is -1"),  # type: ignore[list-item]
    ("bias", _edit("bias", 2 * VOCAB), rf"bias_at\[1\] is {2 * VOCAB}, and there are {2 * VOCAB} logits"),
    ("ban", _edit("ban", -1), r"ban_at\[1\] is -1"),
    ("penalty", _edit("penalty", 1 << 40), r"penalty_at\[1\] is"),
    ("top", lambda s: arrays(s)["params"]["logprobs"].__setitem__(0, 3), r"params\[0\].logprobs is 3, more than"),
    ("null", lambda s: (arrays(s)["params"]["logprobs"].__setitem__(0, 0), s.point(ranks=None)), "ranks is null"),
    ("number", lambda s: setattr(s, "num", -1), "num is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "spoil", "reason"), SAMPLES, ids=[name for name, _, _ in SAMPLES])
def test_bad_wishes(name: str, spoil: Callable[[Samples], object], reason: str) -> None:
    with opened(TINY, threads=2) as model:
        model.forward(_two_rows())
        samples = samples_of([39, 44])
        spoil(samples)
        with pytest.raises(LibraryError, match=reason):
            model.sample(samples)
        model.sample(samples_of([39, 44]))


def test_outputs_that_were_not_wanted() -> None:
    with opened(TINY, threads=2) as model:
        batch = _two_rows()
        _wanted([39, 44])(batch)
        model.forward(batch)
        for ask in (lambda: model.sample(samples_of([39, 40])), lambda: model.logits(np.array([39, 40]))):
            with pytest.raises(LibraryError, match=r"tokens\[1\] is 40, which the last forward's `wanted` left out"):
                ask()
        model.sample(samples_of([44, 39]))


def test_outputs_of_no_forward() -> None:
    with opened(TINY) as model:
        with pytest.raises(LibraryError, match=r"tokens\[0\] is 0, and the last forward had 0"):
            model.logits(np.array([0]))
        model.forward(_two_rows())
        with pytest.raises(LibraryError, match=rf"token_ids\[1\] is {VOCAB}, outside of the vocabulary"):
            model.score(np.array([0, 1]), np.array([0, VOCAB]), np.array([0, 0], np.int32))


SPECS: list[tuple[dict[str, Any], str]] = [
    ({"abi": 7}, "abi is 7, and this library's is 6"),
    ({"vocab_size": 0}, "vocab_size is 0, and must be 1 to"),
    ({"num_blocks": -3}, "num_blocks is -3"),
    ({"block_size": 48}, "block_size 48 must be a multiple of 32"),
    ({"num_kv_heads": 3}, "num_heads 4 must be a multiple of num_kv_heads 3"),
    ({"head_dim": 24, "rotary_dim": 24}, "head_dim 24"),
    ({"rotary_dim": 33}, "rotary_dim is 33, and must be 0 to 32"),
    ({"kv_kind": 2}, "kv_kind is 2"),
    ({"activation": 3}, "activation is 3"),
    ({"cos": None}, "cos is null"),
    ({"layers": None}, "layers is null"),
    ({"hidden_size": 96}, r"lm_head is \[301, 64\], and must be \[301, 96\]"),
    ({"intermediate_size": 30}, r"gate_up of layer 0 is \[288, 64\], and must be \[96, 64\]"),
    ({"num_blocks": 1 << 24, "num_layers": 2}, "no memory for the KV cache|more KV than can be addressed"),
]


@pytest.mark.parametrize(("fields", "reason"), SPECS, ids=[next(iter(fields)) for fields, _ in SPECS])
def test_a_bad_spec(fields: dict[str, Any], reason: str) -> None:
    good = spec_of(TINY, "bf16", "bf16")
    bad = type(good).from_buffer_copy(good).keep(good)
    for name, value in fields.items():
        setattr(bad, name, value)
    if fields == {"num_blocks": 1 << 24, "num_layers": 2}:
        bad.block_size = 1 << 16
    with pytest.raises(LibraryError, match=reason):
        tiny.library().open(bad, 1)


@pytest.mark.parametrize("group", [0, 48])
def test_groups_that_cannot_be(group: int) -> None:
    good = spec_of(TINY, "w4a16", "bf16")
    first = Layer.from_buffer_copy(good.layers[0]).keep(good)
    first.qkv.group = group
    bad = type(good).from_buffer_copy(good).keep(good)
    bad.layers = array_of([first, *(Layer.from_buffer_copy(good.layers[i]) for i in range(1, TINY.num_layers))])
    with pytest.raises(LibraryError, match=f"qkv of layer 0: group {group} is no multiple of 32"):
        tiny.library().open(bad, 1)


def test_orders_that_cannot_be() -> None:
    good, order = spec_of(TINY, "w4a16", "bf16"), np.arange(TINY.hidden_size, dtype=np.int32)
    order[3] = TINY.hidden_size
    first = Layer.from_buffer_copy(good.layers[0]).keep(good)
    first.qkv.order = address(order)
    bad = type(good).from_buffer_copy(good).keep(good)
    bad.layers = array_of([first, *(Layer.from_buffer_copy(good.layers[i]) for i in range(1, TINY.num_layers))])
    with pytest.raises(LibraryError, match=r"qkv of layer 0: order\[3\] is 64, and there are 64 columns"):
        tiny.library().open(bad, 1)


def test_weights_that_are_not_there_or_not_aligned() -> None:
    good = spec_of(TINY, "int8", "bf16")
    for name, value in [("data", None), ("data", good.lm_head.data + 4), ("scale", None), ("kind", 6)]:
        bad = type(good).from_buffer_copy(good).keep(good)
        setattr(bad.lm_head, name, value)
        with pytest.raises(LibraryError, match=f"lm_head: .*{name}"):
            tiny.library().open(bad, 1)


def test_an_isa_or_a_number_of_threads_that_there_is_not() -> None:
    spec = spec_of(TINY, "bf16", "bf16")
    with pytest.raises(LibraryError, match=r"isa 'avx1024' is none that this host can run: .*generic"):
        tiny.library().open(spec, 1, "avx1024")
    with pytest.raises(LibraryError, match="threads 0 must be 1 to 1024"):
        tiny.library().open(spec, 0)


def test_logits_that_are_no_numbers() -> None:
    good = spec_of(TINY, "bf16", "bf16")
    bad = type(good).from_buffer_copy(good).keep(good)
    bad.point(final_norm=np.full(TINY.hidden_size, np.nan, np.float32))
    model = tiny.library().open(bad, 2)
    model.forward(_two_rows())
    for wanted in (samples_of([39, 44]), samples_of([39, 44], temperature=1.0)):
        with pytest.raises(LibraryError, match="output 0: the model's logits are not numbers"):
            model.sample(wanted)
    model.close()


@pytest.mark.parametrize("kind", ["bf16", "int8", "int4"])
@pytest.mark.parametrize("kv", ["bf16", "int8"])
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_no_numbers_are_the_same_error_in_every_form(isa: str, kind: str, kv: str, bad: float) -> None:
    """A bias puts them into values alone, in a shape whose scores and logits have soft caps."""
    good = spec_of(ODD, kind, kv)
    model = random_model(ODD, kind, kv)
    copies = [Layer.from_buffer_copy(good.layers[i]).keep(good) for i in range(ODD.num_layers)]
    width = (ODD.num_heads + 2 * ODD.num_kv_heads) * ODD.head_dim
    bias = np.zeros(-(-width // PANEL) * PANEL, np.float32)
    bias[:width] = model.dense["qkv.0.bias"]
    bias[width - 1] = bad
    copies[0].qkv.bias = address(bias)
    spoiled = type(good).from_buffer_copy(good).keep(good, bias, copies)
    spoiled.layers = array_of(copies)
    opened_model = tiny.library().open(spoiled, 2, isa)
    try:
        for wanted in (samples_of([39, 44]), samples_of([39, 44], temperature=1.0)):
            with pytest.raises(LibraryError, match="output 0: the model's logits are not numbers"):
                opened_model.step(_two_rows(), wanted)
    finally:
        opened_model.close()


def test_a_plan_of_no_tokens_may_come_without_arrays() -> None:
    with opened(TINY) as model:
        model.forward(batch_of([]))
        model.sample(samples_of([]))

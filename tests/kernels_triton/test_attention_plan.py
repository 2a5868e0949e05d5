"""What the host decides: who is split and in how many parts, which tiles there are, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels.gpu.attention_plan import LONG_SPLIT, MAX_SPLITS, AttentionShape, plan_capture, plan_step
from kernels.gpu.attention_tuning import TILES, Device, tile_for
from tests.kernels_triton.paged import FP8, GFX942, SM80, SM90, a_shape

META = torch.device("meta")
CPU = torch.device("cpu")
LLAMA = a_shape(32, 8, 128, 16, torch.bfloat16, max_context=1 << 15)
INVARIANT = a_shape(32, 8, 128, 16, torch.bfloat16, max_context=1 << 15, batch_invariant=True)


def splits(shape: AttentionShape, contexts: list[int]) -> int:
    plan = plan_step(shape, SM90, [1] * len(contexts), contexts, META)
    assert plan.splits is not None
    assert plan.tiles is None
    return plan.splits.num_splits


def test_few_rows_are_split_among_all_multiprocessors_and_many_are_not() -> None:
    assert splits(LLAMA, [1024]) == 4  # of 256 positions, the least
    assert splits(LLAMA, [1 << 15]) == 33  # 8 kv heads · 33 parts for 132 multiprocessors twice
    assert splits(LLAMA, [1 << 20]) == MAX_SPLITS
    assert splits(LLAMA, [2048] * 64) == 1
    assert splits(LLAMA, [2048] * 64 + [1 << 15]) == (1 << 15) // LONG_SPLIT  # one long row holds up nobody


def test_invariant_borders_depend_on_the_longest_context_allowed_only() -> None:
    assert INVARIANT.split == 1024
    assert splits(INVARIANT, [1 << 15]) == splits(INVARIANT, [1 << 15] * 256) == 32
    for capture in (1, 256):
        plan = plan_capture(INVARIANT, SM90, capture, 1, META)
        assert plan.splits is not None
        assert plan.splits.split_tiles * plan.splits.tile.keys == 1024


def test_a_window_needs_no_more_parts_than_it_has() -> None:
    assert splits(a_shape(window=512, max_context=1 << 15, batch_invariant=True), [1 << 15]) == 2
    assert splits(a_shape(window=512, max_context=1 << 15), [1 << 15]) == 2


@pytest.mark.parametrize("shape", [LLAMA, INVARIANT], ids=["", "invariant"])
def test_tiles_cover_each_query_once_the_longest_first(shape: AttentionShape) -> None:
    queries, contexts = [1, 100, 1, 17, 0, 333], [5000, 100, 30, 3000, 0, 400]
    plan = plan_step(shape, SM90, queries, contexts, CPU)
    assert plan.splits is not None
    assert plan.splits.rows is not None
    assert plan.splits.rows.tolist() == [0]  # the others' keys are few, or their queries many
    assert plan.tiles is not None
    size = plan.tiles.tile.rows // plan.tiles.heads
    tiles = [(row, first) for row, first in plan.tiles.tiles.tolist()]
    assert sorted(tiles) == [(row, first) for row in (1, 2, 3, 5) for first in range(0, queries[row], size)]
    ends = [contexts[row] - queries[row] + min(first + size, queries[row]) for row, first in tiles]
    assert ends == sorted(ends, reverse=True)


@pytest.mark.parametrize("device", [SM80, SM90, GFX942], ids=lambda device: device.kind)
@pytest.mark.parametrize("queries", [1, 2, 5, 16])
@pytest.mark.parametrize("heads", [1, 3, 4, 8, 71])
def test_a_program_has_a_row_for_every_query_and_head_it_serves(device: Device, heads: int, queries: int) -> None:
    for invariant in (False, True):
        shape = a_shape(heads, 1, 64, 16, torch.bfloat16, batch_invariant=invariant)
        plan = plan_capture(shape, device, 8, queries, META)
        assert plan.splits is not None
        assert plan.splits.heads * queries <= plan.splits.tile.rows <= 64
        assert plan.splits.tile.rows >= 16
        assert plan.splits.parts.numel() == 8 * queries * heads * plan.splits.num_splits * 64


def test_rows_of_unlike_queries_share_few_kernels() -> None:
    for queries, padded in ((1, 1), (2, 2), (3, 4), (9, 16), (16, 16)):
        plan = plan_step(LLAMA, SM90, [1, queries], [100, 100], META)
        assert plan.splits is not None
        assert plan.splits.num_queries == padded


def test_a_step_of_padding_is_planned() -> None:
    plan = plan_step(LLAMA, SM90, [1, 1], [0, 0], META)
    assert plan.splits is not None
    assert plan.splits.num_splits == 1
    nothing = plan_step(LLAMA, SM90, [], [], META)
    assert (nothing.splits, nothing.tiles) == (None, None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 7}, "evenly"),
        ({"dim": 8}, "heads of 8"),
        ({"dim": 512}, "heads of 512"),
        ({"block_size": 24}, "powers of two"),
        ({"dtype": torch.float64}, "float64"),
        ({"dtype": torch.float16, "kv_dtype": torch.bfloat16}, "bfloat16 pages"),
        ({"window": -1}, "window -1"),
        ({"max_context": 0}, "max_context 0"),
    ],
)
def test_refusals(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        a_shape(**wrong)
    a_shape(dtype=torch.float32, kv_dtype=FP8)


def test_unknown_devices_and_too_many_queries_are_refused() -> None:
    with pytest.raises(ValueError, match="sm_70"):
        tile_for("sm_70", "decode", 128, torch.bfloat16)
    with pytest.raises(ValueError, match="1 to 16"):
        plan_capture(LLAMA, SM90, 8, 17, META)


def test_splits_are_whole_tiles() -> None:
    for tile in TILES.values():
        assert 512 % tile.keys == 0

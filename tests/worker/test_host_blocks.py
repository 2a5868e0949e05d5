"""Whole blocks go to the host and come back as they were, in the order of the plan."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protos.wire import Copy, Direction
from worker_svc.host_blocks import HostBlocks
from worker_svc.slots import SlotError

OUT, IN = Direction.TO_HOST, Direction.TO_DEVICE
RUNS, BLOCKS, HOST, SIZE = 6, 5, 3, 8


def pages() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (RUNS, BLOCKS, SIZE), np.uint8)


@given(
    st.lists(
        st.tuples(
            st.sampled_from(Direction), st.integers(1, BLOCKS - 1), st.integers(0, HOST - 1), st.integers(0, 255)
        ),
        max_size=30,
    )
)
def test_copies_are_those_of_a_dictionary(moves: list[tuple[Direction, int, int, int]]) -> None:
    device = pages()
    host = HostBlocks(device, HOST)
    blocks = {block: device[:, block].copy() for block in range(BLOCKS)}
    held: dict[int, np.ndarray] = {}
    for direction, block, host_block, written in moves:
        if direction is OUT:
            held[host_block] = blocks[block].copy()
        elif host_block not in held:
            continue
        else:
            blocks[block] = held[host_block].copy()
        host.copy([(direction, block, host_block)])
        device[:, block, 0] = blocks[block][:, 0] = written  # as a step writes there
    for block, expected in blocks.items():
        assert (device[:, block] == expected).all()


def test_a_later_copy_of_a_plan_reads_what_an_earlier_one_wrote() -> None:
    device = pages()
    two, three = device[:, 2].copy(), device[:, 3].copy()
    host = HostBlocks(device, HOST)
    host.copy([(OUT, 3, 1)])
    host.copy([(OUT, 2, 0), (IN, 2, 1)])  # block 2 is reused for what was in 3
    assert (device[:, 2] == three).all()
    host.copy([(IN, 4, 0)])
    assert (device[:, 4] == two).all()


@pytest.mark.parametrize(
    ("copy", "message"),
    [
        ((OUT, 0, 1), "block 0, where 1..4 exist"),
        ((OUT, 5, 1), "block 5, where 1..4"),
        ((IN, -1, 1), "block -1"),
        ((OUT, 1, 3), "host block 3, where this worker keeps 3"),
        ((IN, 1, -1), "host block -1"),
        ((IN, 1, 2), "host block 2 is copied to block 1, and nothing was copied there"),
    ],
)
def test_a_copy_of_what_is_not_there_is_refused(copy: Copy, message: str) -> None:
    device = pages()
    before = device.copy()
    with pytest.raises(SlotError, match=message):
        HostBlocks(device, HOST).copy([copy])
    assert (device == before).all()


def test_another_epoch_reads_nothing_of_the_one_before() -> None:
    host = HostBlocks(pages(), HOST)
    host.copy([(OUT, 1, 0)])
    host.forget()
    with pytest.raises(SlotError, match="nothing was copied there"):
        host.copy([(IN, 1, 0)])


def test_a_worker_without_a_tier_says_so() -> None:
    with pytest.raises(SlotError, match="this worker keeps 0"):
        HostBlocks(pages(), 0).copy([(OUT, 1, 0)])

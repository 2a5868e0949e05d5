"""The second tier of KV: whole blocks in the host's memory, copied there and back as plans say. numpy only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from protos.wire import Copy, Direction
from worker_svc.slots import SlotError


class HostLedger:
    """Which copies make sense. Which block holds what, only the scheduler knows; here is known whether anything was
    copied to a host block in this epoch.
    """

    def __init__(self, num_blocks: int, num_host_blocks: int) -> None:
        self._num_blocks = num_blocks
        self._filled = np.zeros(num_host_blocks, bool)

    def __len__(self) -> int:
        return len(self._filled)

    def forget(self) -> None:
        """Another epoch: what is there belongs to nobody."""
        self._filled[:] = False

    def enter(self, copies: Sequence[Copy]) -> None:
        """In the order of the plans. Raises SlotError for what is no copy."""
        for direction, block, host_block in copies:
            if not 0 < block < self._num_blocks:
                raise SlotError(f"a copy names block {block}, where 1..{self._num_blocks - 1} exist")
            if not 0 <= host_block < len(self):
                raise SlotError(f"a copy names host block {host_block}, where this worker keeps {len(self)}")
            if direction is Direction.TO_HOST:
                self._filled[host_block] = True
            elif not self._filled[host_block]:
                raise SlotError(f"host block {host_block} is copied to block {block}, and nothing was copied there")


class HostBlocks:
    """`pages` uint8 [runs, num_blocks, bytes] is a view of the first tier: a block is one run of bytes in each.

    A host block holds its runs one behind the other. The system hands out their memory as they are first written.
    """

    def __init__(self, pages: NDArray[np.uint8], num_host_blocks: int) -> None:
        runs, num_blocks, size = pages.shape
        self._pages = pages
        self._host = np.zeros((num_host_blocks, runs, size), np.uint8)
        self._ledger = HostLedger(num_blocks, num_host_blocks)

    def __len__(self) -> int:
        return len(self._ledger)

    def forget(self) -> None:
        self._ledger.forget()

    def copy(self, copies: Sequence[Copy]) -> None:
        """One after the other: a later one may read what an earlier one wrote. Raises SlotError for what is none."""
        self._ledger.enter(copies)
        for direction, block, host_block in copies:
            if direction is Direction.TO_HOST:
                self._host[host_block] = self._pages[:, block]
            else:
                self._pages[:, block] = self._host[host_block]

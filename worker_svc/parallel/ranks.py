"""What the ranks of a group say to each other within a step: tensors, by torch.distributed. Nothing is pickled.

Every rank takes the same steps through the same code, so all of them come to each exchange, in the same order. One
that does not come is dead or hangs: what the others exchange fails, after `patience` at the latest, and the epoch ends
(R5).
"""

from __future__ import annotations

import functools
import operator
import os
from datetime import timedelta
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

_INTERFACE: Final = "lo"  # ranks of one host need no other, and strangers find no port


class Ranks:
    """A group of `size`, of which this process is `rank`; alone where nothing else is said."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    def gather(self, x: Tensor) -> Tensor:
        """x of each rank, of one shape and dtype: [size, *x.shape], in the order of ranks."""
        if self.size == 1:
            return x[None]
        parts = x.new_empty((self.size, *x.shape))
        dist.all_gather(list(parts), x.contiguous())
        return parts

    def add(self, x: Tensor) -> Tensor:
        """The sum of each rank's x, in float32 unless this rank is alone.

        Rank after rank, not by all_reduce: that adds in an order which depends on an element's place in the tensor, so
        on what else is in the batch (R2). Here every rank gets the same bits, at any number of rows.
        """
        return x if self.size == 1 else functools.reduce(operator.add, self.gather(x).float())

    def sum(self, x: Tensor) -> Tensor:
        """The sum of each rank's x, in its place and dtype, as fast as the library has it: bits may depend on where in
        a tensor an element lies.
        """
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def all(self, flag: bool) -> bool:
        """Whether it is true for every rank."""
        return self.least(int(flag)) == 1

    def least(self, number: int) -> int:
        return int(self.gather(torch.tensor(number)).min())

    def close(self) -> None:
        if self.size > 1:
            dist.destroy_process_group()


def join(rank: int, size: int, address: str, patience: float, device: str = "cpu") -> Ranks:
    """Waits for the others, who meet at `address`: a file that the scheduler names anew for each epoch, in a directory
    which nobody else can read. `patience`: seconds that this and every later exchange may take. Tensors of a device
    "cuda" go by NCCL or RCCL, of the host by gloo.

    Raises RuntimeError where they do not come.
    """
    if size == 1:
        return Ranks()
    os.environ["GLOO_SOCKET_IFNAME"] = _INTERFACE
    store = dist.FileStore(address, size)  # type: ignore[attr-defined]
    library = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(library, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=patience))
    return Ranks(rank, size)

"""Paged KV memory: one allocation, cut into blocks that the scheduler numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BITS = {torch.float32: np.int32, torch.bfloat16: np.int16}


@dataclass(frozen=True)
class KVShape:
    """What one token's keys and values take."""

    num_layers: int
    num_kv_heads: int
    head_dim: int
    dtype: torch.dtype

    def block_bytes(self, block_size: int) -> int:
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim * block_size * self.dtype.itemsize


class KVCache:
    """pages [layer, K or V, block, kv head, offset in block, head_dim]; block 0 is null.

    A block's positions lie together for each head ("HND"), so that a sequence's keys are gathered as runs of
    block_size * head_dim elements and come out ready for a product over heads. Zeros at the start: what a masked key
    weighs 0 must be finite. The system hands out such pages as they are first written, about 2 ms a MiB: touching them
    all here would add a second to every start, and a crash is a start.
    """

    def __init__(self, shape: KVShape, num_blocks: int, block_size: int) -> None:
        self.num_blocks, self.block_size = num_blocks, block_size
        self.num_kv_heads, self.head_dim = shape.num_kv_heads, shape.head_dim
        pages = np.zeros(
            (shape.num_layers, 2, num_blocks, self.num_kv_heads, block_size, self.head_dim), _BITS[shape.dtype]
        )
        self.pages = torch.from_numpy(pages).view(shape.dtype)
        # Of the same memory: [layer × K or V, block, bytes], a block in as many runs.
        self.runs = pages.view(np.uint8).reshape(2 * shape.num_layers, num_blocks, -1)

    def rows_of(self, slot_mapping: Tensor) -> Tensor:
        """[T] block * block_size + offset → [T * kv_heads] rows of head_dim elements, token by token."""
        blocks, offsets = slot_mapping // self.block_size, slot_mapping % self.block_size
        heads = torch.arange(self.num_kv_heads)
        return ((blocks[:, None] * self.num_kv_heads + heads) * self.block_size + offsets[:, None]).flatten()

    def write(self, layer: int, rows: Tensor, k: Tensor, v: Tensor) -> None:
        """k, v [T, kv_heads, head_dim] go to `rows` = rows_of(slot_mapping)."""
        for which, values in enumerate((k, v)):
            flat = self.pages[layer, which].view(-1, self.head_dim)
            flat.index_copy_(0, rows, values.reshape(-1, self.head_dim).to(flat.dtype))

    def runs_of(self, block_tables: Tensor) -> Tensor:
        """[R, B] block ids → [R * kv_heads * B] runs for `gather`: row, head, then position order."""
        heads = torch.arange(self.num_kv_heads)
        return (block_tables[:, None, :] * self.num_kv_heads + heads[:, None]).flatten()

    def gather(self, layer: int, which: int, runs: Tensor, num_groups: int) -> Tensor:
        """K (0) or V (1) of `runs` = runs_of(block_tables), as float32 [num_groups, positions, head_dim]."""
        pages = self.pages[layer, which].view(-1, self.block_size * self.head_dim)
        return pages.index_select(0, runs).view(num_groups, -1, self.head_dim).float()

"""Checks of what a kernel is launched with: a wrong stride would read another tensor's memory, and say nothing."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
INTEGERS = (torch.int32, torch.int64)
# What a kernel's signature calls them; float8 pages are handed over as bytes (fp8.py).
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.float8_e4m3fn: "*u8"}


def expect(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: Collection[torch.dtype],
    like: Tensor,
    *,
    contiguous: bool = False,
) -> None:
    """Raises ValueError naming the argument; None in `shape` is any size, the last dimension must be dense."""
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device}, the other arguments on {like.device}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    fits = tensor.dim() == len(shape) and all(b in (None, a) for a, b in zip(tensor.shape, shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} has shape {list(tensor.shape)}, not [{wanted}]")
    if tensor.numel() and tensor.dim() and tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name} has stride {tensor.stride(-1)} in its last dimension, not 1")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} is not contiguous")

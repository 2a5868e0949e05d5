"""Rotary embedding over halves: dimensions (j, j + dim/2) turn together."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, D] float32; cos and sin [T, 1, dim/2]. Dimensions from dim on stay as they are."""
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    turned = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        turned.append(x[..., 2 * half :])
    return torch.cat(turned, -1)

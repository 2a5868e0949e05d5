"""RMS norm: each row by itself, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [..., D] float32, weight [D] float32 → float32. One reduction over the last dimension, whatever the rows."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True).add_(eps)) * weight

"""Activations of the gated MLP.

torch's own silu and gelu compute the last few elements of a thread's share by another formula than the rest, so the
same number at another place gives other bits. exp, tanh and erf do not: the float32 forms are built from those.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def silu(x: Tensor) -> Tensor:
    return x / torch.exp(-x).add_(1)


def gelu(x: Tensor) -> Tensor:
    return torch.erf(x * math.sqrt(0.5)).add_(1) * x * 0.5


def gelu_tanh(x: Tensor) -> Tensor:
    return torch.tanh((x * x * x * 0.044715 + x) * math.sqrt(2 / math.pi)).add_(1) * x * 0.5


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh}

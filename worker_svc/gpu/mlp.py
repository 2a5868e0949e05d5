"""What follows attention in a layer: one gated MLP, or the experts that a router chooses for each token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from kernels.gpu.activation import gated
from kernels.gpu.linear import linear
from kernels.gpu.moe import experts
from worker_svc.gpu.quantized import Multiply
from worker_svc.layers.lora import Adapt, unadapted
from worker_svc.models.spec import Experts


@dataclass(frozen=True)
class Product:
    """Weight [N, K] and bias [N]. `kind`: of device, for our own kernel, whose rows do not feel each other; empty: the
    library's.
    """

    weight: Tensor
    bias: Tensor | None = None
    kind: str = ""

    def __call__(self, x: Tensor) -> Tensor:
        if self.kind:
            return linear(x, self.weight, self.bias, self.kind)
        return functional.linear(x, self.weight, self.bias)


@dataclass(frozen=True)
class DenseMLP:
    gate_up: Multiply  # rows: all gates, then all ups
    down: Multiply
    activation: str

    def __call__(self, x: Tensor, adapt: Adapt = unadapted) -> Tensor:
        both = adapt("gate_up", x, self.gate_up(x))
        inner = both.new_empty(len(both), both.shape[1] // 2)
        gated(both, self.activation, inner)
        return adapt("down", inner, self.down(inner))


@dataclass(frozen=True)
class ExpertMLP:
    """The router decides, and near decisions are many: it is float32 whatever the rest is."""

    router: Product  # [experts, hidden] float32
    gate_up: Tensor  # [experts, 2 · inner, hidden]
    down: Tensor  # [experts, hidden, inner]
    experts: Experts
    activation: str
    kind: str  # of device
    batch_invariant: bool

    def __call__(self, x: Tensor) -> Tensor:
        out = torch.empty_like(x)
        experts(
            x, self.router(x.float()), self.gate_up, self.down, self.activation, self.experts.top_k, out,
            normalized=self.experts.normalized, kind=self.kind, batch_invariant=self.batch_invariant,
        )  # fmt: skip
        return out

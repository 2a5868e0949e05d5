"""The gated MLP."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from worker_svc.layers.linear import Linear
from worker_svc.layers.lora import Adapt, unadapted


class GatedMLP:
    """down(activation(gate(x)) * up(x)): products in the dtype of the weights, what is between them in float32."""

    def __init__(self, gate_up: Linear, down: Linear, activation: Callable[[Tensor], Tensor]) -> None:
        """`gate_up`: rows of gate, then of up."""
        self._gate_up, self._down, self._activation = gate_up, down, activation

    def __call__(self, x: Tensor, adapt: Adapt = unadapted) -> Tensor:
        """[T, hidden] → [T, hidden], both of the weights' dtype; T = padded_rows(T)."""
        gate, up = adapt("gate_up", x, self._gate_up(x)).float().chunk(2, -1)
        gated = (self._activation(gate) * up).to(x.dtype)
        return adapt("down", gated, self._down(gated))

    def linears(self) -> list[Linear]:
        return [self._gate_up, self._down]

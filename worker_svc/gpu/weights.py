"""A rank's weights, from a checkpoint to the device, one tensor at a time: no second copy in the host's memory."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from worker_svc.gpu.mlp import DenseMLP, ExpertMLP, Product
from worker_svc.models.loader import DType, Model
from worker_svc.parallel.shard import Piece, Shard


class WeightReader:
    def __init__(
        self, model: Model, shard: Shard, dtype: DType, where: torch.device, kind: str, *, batch_invariant: bool
    ) -> None:
        """`kind`: of device."""
        self.model, self.shard, self._name, self._where = model, shard, dtype, where
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._kind, self._invariant = kind, batch_invariant

    def piece(self, name: str, piece: Piece) -> Tensor:
        array = self.model.read(name, piece.shape, self._name, piece.heads, piece.cut)
        return _tensor(array).view(self._dtype).to(self._where)

    def norm(self, name: str, size: int) -> Tensor:
        """float32, whatever the dtype: the kernels round once, behind the weight."""
        return torch.from_numpy(self.model.read_norm(name, size)).to(self._where)

    def as_product(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        return Product(weight, bias, self._kind if self._invariant else "")

    def product(self, i: int, product: str, bias: bool) -> Product:
        """This rank's pieces, stacked."""
        names, pieces = self.model.layer, self.shard.pieces(product)
        weight = torch.cat([self.piece(names(i, piece.role), piece) for piece in pieces])
        if not bias or not self.shard.adds_bias(product):
            return self.as_product(weight)
        biases = [piece._replace(shape=piece.shape[:1]) for piece in pieces]
        return self.as_product(weight, torch.cat([self.piece(names(i, piece.role, "bias"), piece) for piece in biases]))

    def mlp(self, i: int) -> DenseMLP | ExpertMLP:
        spec = self.shard.spec
        if not (spec.experts and spec.sparse(i)):
            gate_up, down = (self.product(i, product, spec.mlp_bias) for product in ("gate_up", "down"))
            return DenseMLP(gate_up, down, spec.activation)
        shape = (spec.experts.num, spec.hidden_size)
        router = _tensor(self.model.read(self.model.layer(i, "router"), shape, "float32")).to(self._where)
        return ExpertMLP(
            self.as_product(router),
            self._experts(i, "expert_gate_up", spec.experts.num),
            self._experts(i, "expert_down", spec.experts.num),
            spec.experts,
            spec.activation,
            self._kind,
            self._invariant,
        )

    def _experts(self, i: int, product: str, num: int) -> Tensor:
        """[num, rows, columns]"""
        pieces = self.shard.pieces(product)
        rows = sum(piece.cut.bottom - piece.cut.top for piece in pieces)
        columns = pieces[0].cut.right - pieces[0].cut.left
        weight = torch.empty(num, rows, columns, dtype=self._dtype, device=self._where)
        for expert in range(num):
            arrays = [self.model.read_expert(i, expert, p.role, p.shape, self._name, p.cut) for p in pieces]
            weight[expert].copy_(torch.cat([_tensor(array).view(self._dtype) for array in arrays]))
        return weight


def _tensor(array: NDArray[Any]) -> Tensor:
    """What is read-only is a view of the file, of which torch wants a copy."""
    return torch.from_numpy(array if array.flags.writeable else array.copy())

"""A rank's weights, from a checkpoint to the device, one tensor at a time: no second copy in the host's memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker_svc.gpu.mlp import DenseMLP, ExpertMLP, Product
from worker_svc.gpu.quantized import Multiply, Stacked, Target, product_of
from worker_svc.models.loader import DType, Model, split_halves
from worker_svc.models.raw_tensor import Tensor as Stored
from worker_svc.parallel.shard import Piece, Shard
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.gpu_choice import choose, joined
from worker_svc.quant.on_load import on_load


class WeightReader:
    def __init__(self, model: Model, shard: Shard, dtype: DType, target: Target, quantization: str) -> None:
        """`quantization`: what the products of a float checkpoint's layers become; empty: they stay floats."""
        self.model, self.shard, self._name, self._where = model, shard, dtype, target.where
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._target, self._quantization = target, quantization
        self.kernels: Counter[str] = Counter()  # of products, "int4 g64 sym: w4a16", and how many there are

    def piece(self, name: str, piece: Piece) -> Tensor:
        array = self.model.read(name, piece.shape, self._name, piece.heads, piece.cut)
        return _tensor(array).view(self._dtype).to(self._where)

    def norm(self, name: str, size: int) -> Tensor:
        """float32, whatever the dtype: the kernels round once, behind the weight."""
        return torch.from_numpy(self.model.read_norm(name, size)).to(self._where)

    def as_product(self, weight: Tensor, bias: Tensor | None = None) -> Product:
        return Product(weight, bias, self._target.kind if self._target.batch_invariant else "")

    def product(self, i: int, product: str, bias: bool) -> Multiply:
        """This rank's pieces, stacked."""
        names, pieces, added = self.model.layer, self.shard.pieces(product), None
        if bias and self.shard.adds_bias(product):
            biases = [piece._replace(shape=piece.shape[:1]) for piece in pieces]
            added = torch.cat([self.piece(names(i, piece.role, "bias"), piece) for piece in biases])
        if self._quantization or self.model.quantization:
            stored = [self._stored(names(i, piece.role), piece) for piece in pieces]
            if any(isinstance(tensor, QuantizedTensor) for tensor in stored):
                return self._quantized(stored, added)
        self.kernels["float: float"] += 1
        return self.as_product(torch.cat([self.piece(names(i, piece.role), piece) for piece in pieces]), added)

    def head(self, name: str, piece: Piece) -> Multiply:
        tensor, _ = self.model.tensor(name, piece.shape).cut(piece.cut)
        if isinstance(tensor, QuantizedTensor):
            return self._quantized([tensor], None)
        return self.as_product(self.piece(name, piece))

    def _stored(self, name: str, piece: Piece) -> Stored:
        """A piece as it is in the checkpoint, or as it becomes on its way."""
        tensor = self.model.tensor(name, piece.shape)
        if self._quantization:
            tensor = on_load(tensor, self._quantization)
        taken, _ = tensor.cut(piece.cut)
        if piece.heads and self.model.spec.names.interleaved_qk:
            taken = taken.take(split_halves(np.arange(taken.shape[0]), piece.heads))
        return taken

    def _quantized(self, tensors: Sequence[Stored], bias: Tensor | None) -> Multiply:
        """One product, where kernels can take all as one matrix; else one of each, side by side."""
        if not joined(tensors):
            products, first = [], 0
            for tensor in tensors:
                rows = tensor.shape[0]
                products.append(self._quantized([tensor], None if bias is None else bias[first : first + rows]))
                first += rows
            return Stacked(tuple(products))
        choice = choose(tensors[0], self._target.float8 is not None)
        why = f" ({choice.why})" if choice.why else ""
        self.kernels[f"{tensors[0].dtype}{why}: {choice.kernel}"] += 1
        codes = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
        if choice.kernel != "float":
            return product_of(codes, choice.kernel, bias, self._target)
        floats = [tensor.float32() if self._name == "float32" else tensor.bfloat16() for tensor in tensors]
        weight = torch.cat([_tensor(array).view(self._dtype) for array in floats]).to(self._where)
        return self.as_product(weight, bias)

    def mlp(self, i: int) -> DenseMLP | ExpertMLP:
        spec = self.shard.spec
        if not (spec.experts and spec.sparse(i)):
            gate_up, down = (self.product(i, product, spec.mlp_bias) for product in ("gate_up", "down"))
            return DenseMLP(gate_up, down, spec.activation)
        self.kernels["experts: float"] += 1  # whatever they are stored as
        shape = (spec.experts.num, spec.hidden_size)
        router = _tensor(self.model.read(self.model.layer(i, "router"), shape, "float32")).to(self._where)
        return ExpertMLP(
            self.as_product(router),
            self._experts(i, "expert_gate_up", spec.experts.num),
            self._experts(i, "expert_down", spec.experts.num),
            spec.experts,
            spec.activation,
            self._target.kind,
            self._target.batch_invariant,
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

"""Low-rank additions on a device: y += scale · B (A x), each token by the adapter of its own index.

    a [max_adapters + 1, R, K] | b [max_adapters + 1, N, R] | scales [max_adapters + 1]      of each role of each layer

All of it is allocated once and stays where it is, so captured steps read whatever was loaded since. Index 0 is none,
and a scale of 0 is that of a role which an adapter does not have: rows of either are left as they are. R is the
kernels' next rank; of several ranks of a group each has its part, as of the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from kernels.gpu.lora import RANKS, lora
from worker_svc.adapters.peft import PRODUCTS, Lora, LoraAdapter, part
from worker_svc.backends.base import BackendError
from worker_svc.layers.lora import Adapt, unadapted
from worker_svc.parallel.shard import Shard


class Term(NamedTuple):
    """Of one role: columns `first` … of its product's y."""

    role: str
    first: int
    a: Tensor
    b: Tensor
    scales: Tensor


class Staged(NamedTuple):
    """What goes to an index of one term; None: nothing is added there."""

    a: Tensor  # [R, K], of the host, as b
    b: Tensor  # [N, R]
    scale: float


class Adapters:
    """Room for `most` adapters of rank `max_rank`; for none there is nothing, and nothing is launched."""

    def __init__(self, shard: Shard, most: int, max_rank: int, dtype: torch.dtype, where: torch.device) -> None:
        """Raises BackendError where no kernel has that rank."""
        if most and max_rank > RANKS[-1]:
            raise BackendError(f"max_adapter_rank {max_rank} is over {RANKS[-1]}, the most of the cuda backend")
        self._shard, self._dtype, self._where = shard, dtype, where
        self._places, self._rank = most + 1, next((rank for rank in RANKS if rank >= max_rank), 0)
        self.are_there = most > 0
        layers = range(shard.spec.num_layers if most else 0)
        self._layers = [{product: self._terms(product, i) for product in PRODUCTS} for i in layers]

    def of(self, index: Tensor | None) -> Callable[[int], Adapt]:
        """How each layer of a step adapts its products; `index` [T] int32, None where no token has an adapter."""
        if index is None or not self.are_there:
            return lambda layer: unadapted

        def adapted(layer: int) -> Adapt:
            terms = self._layers[layer]

            def adapt(product: str, x: Tensor, y: Tensor) -> Tensor:
                for term in terms[product]:
                    lora(x, term.a, term.b, term.scales, index, y, term.first)
                return y

            return adapt

        return adapted

    def stage(self, adapter: LoraAdapter) -> list[Staged | None]:
        """On the host, of each term in turn: pinned where the device is a GPU, so that nobody waits for the copy."""
        found = [
            self._staged(product, term, layer.get(term.role))
            for layer, terms in zip(adapter.layers, self._layers, strict=True)
            for product in PRODUCTS
            for term in terms[product]
        ]
        there = [tensor for each in found if each for tensor in (each.a, each.b)]
        together = torch.empty(sum(t.numel() for t in there), dtype=self._dtype, pin_memory=self._where.type == "cuda")
        parts = iter(together.split([tensor.numel() for tensor in there]))

        def moved(tensor: Tensor) -> Tensor:
            pinned: Tensor = next(parts).view(tensor.shape).copy_(tensor)
            return pinned

        return [each and Staged(moved(each.a), moved(each.b), each.scale) for each in found]

    def put(self, index: int, staged: list[Staged | None]) -> None:
        """Launches the copies. What was at `index` is gone, all of it."""
        terms = (term for layer in self._layers for product in PRODUCTS for term in layer[product])
        for term, each in zip(terms, staged, strict=True):
            if each:
                term.a[index].copy_(each.a, non_blocking=True)
                term.b[index].copy_(each.b, non_blocking=True)
            term.scales[index].fill_(each.scale if each else 0.0)

    def _terms(self, product: str, layer: int) -> tuple[Term, ...]:
        """Zeros. Of experts there are none."""
        if product in ("gate_up", "down") and self._shard.spec.sparse(layer):
            return ()
        columns = {piece.cut.right - piece.cut.left for piece in self._shard.pieces(product)}.pop()
        terms, first = [], 0
        for section in self._shard.spec.sections(product):
            a = torch.zeros(self._places, self._rank, columns, dtype=self._dtype, device=self._where)
            b = torch.zeros(self._places, section.rows, self._rank, dtype=self._dtype, device=self._where)
            terms.append(Term(section.role, first, a, b, torch.zeros(self._places, device=self._where)))
            first += section.rows
        return tuple(terms)

    def _staged(self, product: str, term: Term, whole: Lora | None) -> Staged | None:
        if whole is None:
            return None
        a, b, scale = part(product, whole, self._shard.rank, self._shard.size)
        more = self._rank - len(a)
        a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
        return Staged(torch.from_numpy(a).to(self._dtype), torch.from_numpy(b).to(self._dtype), scale)

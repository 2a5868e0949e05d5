"""Low-rank additions to the products of some of a step's rows: y += scale · B (A x).

A and B are products like any other, in row tiles: so what a row gains depends neither on its neighbours nor on which of
them have the same adapter (R2). Rows without one are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from worker_svc.adapters.peft import PRODUCTS, Lora, LoraAdapter, part
from worker_svc.adapters.places import AdapterError
from worker_svc.inputs import StepInputs
from worker_svc.layers.linear import Linear, padded_rows
from worker_svc.models.spec import ModelSpec

RANKS = 16  # a rank goes up to a multiple: each shape is compiled and probed once, so there are few

Adapt = Callable[[str, Tensor, Tensor], Tensor]  # (product, x [T, in], y [T, out]) → y, with what is added


def unadapted(product: str, x: Tensor, y: Tensor) -> Tensor:
    return y


class Term(NamedTuple):
    """Of one role: columns `top` … of its product's y."""

    top: int
    a: Linear
    b: Linear
    scale: float


Terms = Mapping[str, tuple[Term, ...]]  # by product


class Adapters:
    """Those that are loaded, each as this rank of `size` computes it."""

    def __init__(self, spec: ModelSpec, dtype: torch.dtype, rank: int, size: int) -> None:
        """`spec`: of this rank's part."""
        self._spec, self._dtype, self._rank, self._size = spec, dtype, rank, size
        self._layers: dict[int, list[Terms]] = {}  # by index
        self._probed: set[tuple[int, int]] = set()

    def load(self, index: int, adapter: LoraAdapter, exact: bool) -> None:
        """Raises AdapterError where `exact` is promised and these shapes are not."""
        layers: list[Terms] = [
            {product: self._terms(product, layer) for product in PRODUCTS} for layer in adapter.layers
        ]
        for linear in (linear for layer in layers for terms in layer.values() for t in terms for linear in (t.a, t.b)):
            shape = (linear.out_features, linear.in_features)
            if shape not in self._probed and not linear.probe() and exact:
                raise AdapterError(f"a product of [{shape[0]}, {shape[1]}] is not exact on this CPU")
            self._probed.add(shape)
        self._layers[index] = layers

    def unload(self, index: int) -> None:
        del self._layers[index]

    def clear(self) -> None:
        self._layers.clear()

    def of(self, inputs: StepInputs) -> Callable[[int], Adapt]:
        """How each layer of a step adapts its products."""
        if inputs.adapters is None:
            return lambda layer: unadapted
        of_tokens = np.repeat(inputs.adapters, np.diff(inputs.cu))
        groups = [(_rows(of_tokens, index), self._layers[index]) for index in np.unique(of_tokens).tolist() if index]
        return lambda layer: lambda product, x, y: _add([(rows, each[layer][product]) for rows, each in groups], x, y)

    def _terms(self, product: str, layer: Mapping[str, Lora]) -> tuple[Term, ...]:
        terms, top = [], 0
        for section in self._spec.sections(product):
            if lora := layer.get(section.role):
                a, b, _ = part(product, lora, self._rank, self._size)
                more = -len(a) % RANKS
                a, b = np.pad(a, ((0, more), (0, 0))), np.pad(b, ((0, 0), (0, more)))
                terms.append(Term(top, self._linear(a), self._linear(b), lora.scale))
            top += section.rows
        return tuple(terms)

    def _linear(self, weight: NDArray[np.float32]) -> Linear:
        return Linear(torch.from_numpy(weight).to(self._dtype))


def _rows(of_tokens: NDArray[np.int32], index: int) -> Tensor:
    return torch.from_numpy(np.flatnonzero(of_tokens == index))


def _add(groups: list[tuple[Tensor, tuple[Term, ...]]], x: Tensor, y: Tensor) -> Tensor:
    for rows, terms in groups:
        if not terms:
            continue
        padded = rows.new_zeros(padded_rows(len(rows)))
        padded[: len(rows)] = rows
        chosen = x[padded]
        for term in terms:
            gain = term.b(term.a(chosen))[: len(rows)].float() * term.scale
            columns = slice(term.top, term.top + gain.shape[1])
            y[rows, columns] = (y[rows, columns].float() + gain).to(y.dtype)
    return y

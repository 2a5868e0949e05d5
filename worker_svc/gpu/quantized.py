"""Products of quantized weights on a device: what a checkpoint's codes become there, and the kernel that takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels.gpu.quantize_rows import quantize_by, quantize_groups, quantize_rows
from kernels.gpu.quantized_linear import GroupedWeight, grouped_linear, pack_grouped
from kernels.gpu.scaled_linear import as_fnuz, fp8_linear, int8_linear
from worker_svc.quant.form import Grouped, QuantizedTensor
from worker_svc.quant.gpu_choice import Kernel

Multiply = Callable[[Tensor], Tensor]  # x [M, K] → [M, N]

# Rows from which on the library multiplies float8, if it can: prompts, which are bound by products, not by reading
# weights. By the design's figures our block kernel reaches six tenths of the library's speed there; not measured here.
LIBRARY_ROWS: Final = 128


@dataclass(frozen=True)
class Target:
    """`kind`: of device, a key of the kernels' tiles. `float8`: the one that it multiplies; None: it has none."""

    where: torch.device
    kind: str
    float8: torch.dtype | None
    batch_invariant: bool


@dataclass(frozen=True)
class GroupedProduct:
    weight: GroupedWeight
    bias: Tensor | None
    target: Target

    def __call__(self, x: Tensor) -> Tensor:
        t = self.target
        return grouped_linear(x, self.weight, self.bias, t.kind, batch_invariant=t.batch_invariant)


@dataclass(frozen=True)
class Int8Product:
    weight: Tensor  # int8 [N, K]
    scales: Tensor  # [N, 1]
    bias: Tensor | None
    target: Target

    def __call__(self, x: Tensor) -> Tensor:
        t = self.target
        codes, scales = quantize_rows(x, torch.int8)
        return int8_linear(
            codes, scales, self.weight, self.scales, self.bias, x.dtype, t.kind, batch_invariant=t.batch_invariant
        )


@dataclass(frozen=True)
class Float8Product:
    """`per`: what activations have a scale for: "token"; "group", 128 columns of one; "tensor", which is `given` [1].
    Empty: they stay as they are.
    """

    weight: Tensor  # float8 [N, K]
    scales: Tensor  # [N, 1], or [N, ⌈K / 128⌉]
    per: str
    given: Tensor | None
    bias: Tensor | None
    target: Target

    def __call__(self, x: Tensor) -> Tensor:
        t, codes, scales = self.target, x, None
        if self.per == "token":
            codes, scales = quantize_rows(x, self.weight.dtype)
        elif self.per == "group":
            codes, scales = quantize_groups(x, self.weight.dtype)
        elif self.per == "tensor":
            assert self.given is not None
            codes, scales = quantize_by(x, self.given, self.weight.dtype), self.given
        if scales is not None and self._is_the_librarys(len(x)):
            return self._by_library(codes, scales, x.dtype)
        return fp8_linear(
            codes, scales, self.weight, self.scales, self.bias, x.dtype, t.kind,
            native=t.float8, batch_invariant=t.batch_invariant,
        )  # fmt: skip

    def _is_the_librarys(self, rows: int) -> bool:
        """It takes a scale a row of either side, and whole sixteens; with other rows beside it may add otherwise."""
        n, k = self.weight.shape
        whole = n % 16 == 0 and k % 16 == 0 and self.scales.shape[1] == 1 and self.per != "group"
        return rows >= LIBRARY_ROWS and whole and not self.target.batch_invariant

    def _by_library(self, codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
        rows = scales.expand(len(codes), 1).contiguous()
        y: Tensor = torch._scaled_mm(codes, self.weight.t(), rows, self.scales.t(), out_dtype=torch.bfloat16)
        y = y if self.bias is None else y + self.bias
        return y.to(dtype)


@dataclass(frozen=True)
class Stacked:
    """Products of the same rows that are no one matrix: their results side by side."""

    products: tuple[Multiply, ...]

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in self.products], 1)


def product_of(tensors: Sequence[QuantizedTensor], kernel: Kernel, bias: Tensor | None, target: Target) -> Multiply:
    """Of tensors one below the other that are one matrix to `kernel`, which is none of floats."""
    order = tensors[0].order()
    forms = [tensor.form().sorted() for tensor in tensors]
    if kernel in ("fp8", "fp8 a16"):
        return _float8(forms, tensors[0], kernel, bias, target)
    if kernel == "w8a8":
        codes = _put([form.codes ^ np.uint8(128) for form in forms], target).view(torch.int8)
        return Int8Product(codes, _put([form.scales for form in forms], target), bias, target)
    zeros = [form.zeros for form in forms if form.zeros is not None]
    # Orders are checked and codes packed where they are: on the device there is room for what comes of it alone.
    host = replace(target, where=torch.device("cpu"))
    weight = pack_grouped(
        _put([form.codes for form in forms], host),
        _put([form.scales for form in forms], host),
        _put(zeros, host),
        4 if kernel == "w4a16" else 8,
        tensors[0].scheme.group_size,
        None if order is None else torch.from_numpy(order).to(torch.int32),
    )
    where, columns = target.where, weight.order
    codes, grid = weight.codes.to(where), weight.grid.to(where)
    on_device = replace(weight, codes=codes, grid=grid, order=None if columns is None else columns.to(where))
    return GroupedProduct(on_device, bias, target)


def _float8(
    forms: Sequence[Grouped], first: QuantizedTensor, kernel: Kernel, bias: Tensor | None, target: Target
) -> Float8Product:
    weight = _put([form.codes for form in forms], target).view(torch.float8_e4m3fn)
    scales = _put([form.scales for form in forms], target)
    wanted = first.scheme.activations if kernel == "fp8" else None
    given = None if wanted is None or wanted.scale is None else torch.tensor([wanted.scale], device=target.where)
    if wanted and target.float8 == torch.float8_e4m3fnuz:
        weight, scales = as_fnuz(weight, scales)
        given = None if given is None else given * 2
    return Float8Product(weight, scales, wanted.per if wanted else "", given, bias, target)


def _put(arrays: Sequence[NDArray[Any]], target: Target) -> Tensor:
    """One below the other."""
    return torch.from_numpy(np.ascontiguousarray(np.concatenate(arrays))).to(target.where)

"""Which Triton kernel multiplies a matrix of a quantized checkpoint on a GPU, by its scheme. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

import numpy as np

from worker_svc.models.raw_tensor import Tensor
from worker_svc.quant.choice import order_of, same_order
from worker_svc.quant.form import QuantizedTensor

Kernel = Literal["float", "w4a16", "w8a16", "w8a8", "fp8", "fp8 a16"]
FP8_GROUP: Final = 128  # columns


class Choice(NamedTuple):
    kernel: Kernel
    why: str = ""  # it is float although it is quantized, or activations are not as the checkpoint wants them


def choose(tensor: Tensor, float8: bool) -> Choice:
    """`float8`: the device multiplies such numbers; else they become bfloat16 on their way, and activations stay."""
    if not isinstance(tensor, QuantizedTensor):
        return Choice("float")
    scheme, columns = tensor.scheme, tensor.shape[1]
    size = scheme.group_size or columns
    groups, order = tensor.column_groups(), order_of(tensor)
    if not np.array_equal(groups if order is None else groups[order], np.arange(columns) // size):
        return Choice("float", "its groups are of different sizes")
    wanted = scheme.activations
    if scheme.kind == "e4m3":
        if size not in (columns, FP8_GROUP):
            return Choice("float", f"float8 has scales of a row or of {FP8_GROUP} columns, not of {size}")
        if wanted and not float8:
            return Choice("fp8 a16", "activations stay as they are: the device does not multiply float8")
        return Choice("fp8" if wanted else "fp8 a16")
    if scheme.bits == 8 and scheme.symmetric and size >= columns and order is None and wanted and wanted.symmetric:
        return Choice("w8a8", "activations have a scale each token, not one for all" if wanted.per == "tensor" else "")
    if size < columns and size != 32 and size % 64:
        return Choice("float", f"groups of {size} columns are neither 32 nor a multiple of 64")
    why = "activations stay as they are: those of 8 bits are for symmetric weights by channel" if wanted else ""
    return Choice("w4a16" if scheme.bits <= 4 else "w8a16", why)


def joined(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors one below the other are one matrix to a kernel: bits, groups, activations and order agree."""
    first, *others = tensors
    if not all(isinstance(tensor, QuantizedTensor) for tensor in tensors):
        return not any(isinstance(tensor, QuantizedTensor) for tensor in tensors)
    return all(
        other.dtype == first.dtype and _activations(other) == _activations(first)
        and same_order(order_of(other), order_of(first))
        for other in others
    )  # fmt: skip


def _activations(tensor: Tensor) -> object:
    return tensor.scheme.activations if isinstance(tensor, QuantizedTensor) else None

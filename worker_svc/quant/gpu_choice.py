"""Which Triton kernel multiplies a matrix of a quantized checkpoint on a GPU, by its scheme. numpy only."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from worker_svc.models.raw_tensor import Tensor
from worker_svc.quant.form import QuantizedTensor, same_order

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
    if not tensor.has_even_groups():
        return Choice("float", "its groups are of different sizes")
    wanted = scheme.activations
    if scheme.kind == "e4m3":
        if size not in (columns, FP8_GROUP):
            return Choice("float", f"float8 has scales of a row or of {FP8_GROUP} columns, not of {size}")
        if wanted and not float8:
            return Choice("fp8 a16", "activations stay as they are: the device does not multiply float8")
        return Choice("fp8" if wanted else "fp8 a16")
    if scheme.bits == 8 and scheme.symmetric and size >= columns and wanted and wanted.symmetric:
        return Choice("w8a8", "activations have a scale each token, not one for all" if wanted.per == "tensor" else "")
    if size < columns and size != 32 and size % 64:
        return Choice("float", f"groups of {size} columns are neither 32 nor a multiple of 64")
    why = "activations stay as they are: those of 8 bits are for symmetric weights by channel" if wanted else ""
    return Choice("w4a16" if scheme.bits <= 4 else "w8a16", why)


def joined(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors one below the other are one matrix to a kernel: bits, groups, activations and order agree."""
    quantized = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    if len(quantized) < len(tensors):
        return not quantized
    first, *others = quantized
    return all(other.scheme == first.scheme and same_order(other.order(), first.order()) for other in others)

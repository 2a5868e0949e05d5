"""Which of the cpu backend's kernels multiplies a matrix, by the schemes of the tensors that it is made of. numpy only.

A kernel either takes codes, scales and zero points as they are, or does not get them: where none does, the matrix is
brought to bfloat16, each weight rounded once, and the choice says why.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import GROUP, Kind
from worker_svc.models.raw_tensor import Tensor
from worker_svc.quant.form import Codes, Floats, Grouped, QuantizedTensor, same_order
from worker_svc.quant.on_load import on_load


class Choice(NamedTuple):
    kind: Kind
    group: int = 0  # of w4a16 and w8a16
    scaled: bool = False  # bf16 with a scale for each row
    permuted: bool = False
    why: str = ""  # it is bf16 although something is quantized, or activations are not as the checkpoint wants them


def choose(tensors: Sequence[Tensor], *, may_permute: bool = True, narrow: bool = False) -> Choice:
    """For tensors that lie one below the other. `may_permute`: x can be put in another order on its way. `narrow`:
    activations get 8 bits, whatever the checkpoint says, where a kernel takes them.
    """
    parts = [tensor for tensor in tensors if isinstance(tensor, QuantizedTensor)]
    if not parts:
        return Choice("bf16")
    schemes = [part.scheme for part in parts]
    if len(parts) < len(tensors) or len({scheme.kind for scheme in schemes}) > 1:
        return Choice("bf16", why=f"its parts differ: {', '.join(tensor.dtype for tensor in tensors)}")
    if schemes[0].kind == "e4m3":
        if any(scheme.group_size for scheme in schemes):
            return Choice("bf16", why="scales of blocks are multiplied in")
        return Choice("bf16", scaled=True)
    return _of_integers(parts, may_permute, narrow)


def _of_integers(parts: Sequence[QuantizedTensor], may_permute: bool, narrow: bool) -> Choice:
    schemes, order = [part.scheme for part in parts], parts[0].order()
    if not all(same_order(order, part.order()) for part in parts[1:]):
        return Choice("bf16", why="its parts have their columns in different orders")
    if order is not None and not may_permute:
        return Choice("bf16", why="its columns are in an order of their own")
    if not all(part.has_even_groups() for part in parts):
        return Choice("bf16", why="its groups are of different sizes")
    sizes, wanted = {scheme.group_size for scheme in schemes}, [scheme.activations for scheme in schemes]
    plain = all(scheme.symmetric and scheme.bits == 8 for scheme in schemes) and sizes == {0} and order is None
    if plain and all(activations and activations.symmetric for activations in wanted):
        fixed = any(activations and activations.per == "tensor" for activations in wanted)
        return Choice("w8a8", why="activations have a scale each token, not one for all" if fixed else "")
    if narrow and max(scheme.bits for scheme in schemes) == 8:
        return Choice("int8", why="bytes are rotated, and rounded again")
    group = math.gcd(*sizes) or -(-parts[0].shape[1] // GROUP) * GROUP
    if group % GROUP:
        return Choice("bf16", why=f"groups of {group} columns are no multiple of {GROUP}")
    why = "activations stay bfloat16: those of 8 bits and symmetric weights by channel are multiplied as such alone"
    bits, why = max(scheme.bits for scheme in schemes), why if any(wanted) else ""
    if narrow and all(_are_halves(part) for part in parts):
        return Choice("int4", permuted=order is not None, why="zero points are multiplied by scales, in float16")
    return Choice("w4a16" if bits <= 4 else "w8a16", group, permuted=order is not None, why=why)


def affine(tensor: Tensor, group: int) -> tuple[Codes, Floats, Codes]:
    """Codes [N, K] with columns in order, scales and zero points [N, ⌈K / group⌉], of what `choose` took."""
    form = _form(tensor).sorted()
    assert form.zeros is not None
    columns = form.codes.shape[1]
    size = form.scheme.group_size or columns
    at = np.arange(-(-columns // group)) * group // size
    codes = np.ascontiguousarray(form.codes)
    return codes, np.ascontiguousarray(form.scales[:, at]), np.ascontiguousarray(form.zeros[:, at])


def halves(tensor: Tensor) -> tuple[Codes, NDArray[np.uint16], NDArray[np.uint16]]:
    """Codes [N, K] of 4 bits with columns in order, d and m [N, ⌈K / 32⌉] as bits of float16: w = d · code + m."""
    codes, scales, zeros = affine(tensor, GROUP)
    return codes, scales.astype(np.float16).view(np.uint16), (-scales * zeros).astype(np.float16).view(np.uint16)


def _are_halves(tensor: QuantizedTensor) -> bool:
    """Whether float16 holds scales, and what `halves` makes of zero points, to 11 bits."""
    sizes = np.abs(tensor.scales)
    return bool(((sizes == 0) | ((sizes > 2.0**-14) & (sizes < 2.0**11))).all())


def codes_and_scale(tensor: Tensor) -> tuple[Codes, Floats]:
    """Of a symmetric matrix of 8 bits by channel: codes [N, K], scales [N]."""
    form = _form(tensor)
    return np.ascontiguousarray(form.codes), np.ascontiguousarray(form.scales[:, 0])


def floats_and_scale(tensor: Tensor) -> tuple[NDArray[np.uint16], Floats]:
    """Of an e4m3 matrix by channel, or of one brought to that: floats [N, K] as bfloat16, which holds each of them, and
    scales [N].
    """
    form = _form(tensor if isinstance(tensor, QuantizedTensor) else on_load(tensor, "fp8"))
    ones = np.ones_like(form.scales)
    bits = Grouped(form.scheme, form.codes, ones, None, form.groups).float32().view(np.uint32) >> 16
    return bits.astype(np.uint16), np.ascontiguousarray(form.scales[:, 0])


def _form(tensor: Tensor) -> Grouped:
    assert isinstance(tensor, QuantizedTensor), "a kernel for codes was chosen for a tensor that has none"
    return tensor.form()

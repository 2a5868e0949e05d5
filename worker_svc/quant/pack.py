"""From a checkpoint to packed weights: rows are put in order while they are still in the file's form, then brought to
the form that a step multiplies, a chunk of panels at a time, by several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import PANEL, Bytes, Floats, Library
from worker_svc.models.loader import Model
from worker_svc.models.raw_tensor import Tensor
from worker_svc.models.spec import Part
from worker_svc.quant.choice import affine, codes_and_scale, floats_and_scale, halves
from worker_svc.quant.form import QuantizedTensor
from worker_svc.quant.int4 import int4
from worker_svc.quant.layout import Layout, Matrix, panels
from worker_svc.quant.plan import tensors_of

Ints = NDArray[np.int64]
Arrays = Mapping[str, NDArray[Any]]

CHUNK: Final = 1 << 20  # weights at a time
_NORMED: Final = {"attn_norm": "qkv", "mlp_norm": "gate_up"}


class Rows(NamedTuple):
    """Row i of a matrix is row order[i] of the tensors laid one below the other; −1 is a row of zeros."""

    tensors: list[Tensor]
    biases: list[Tensor]
    order: Ints


def pack(
    model: Model, layout: Layout, arrays: Arrays, library: Library, threads: int, progress: Callable[[float], None]
) -> None:
    """Fills `arrays` (views of zeroed memory, as `layout` has them). Raises CheckpointError where a weight is missing,
    misshapen or not a finite number.
    """
    tasks: list[Callable[[], None]] = []
    for name, matrix in layout.matrices.items():
        rows = _rows(model, name, matrix, layout)
        if matrix.ordered:
            order = _order(rows.tensors[0])
            assert order is not None
            arrays[f"{name}.order"][:] = order
        tasks += _tasks(name, matrix, rows, arrays, library)
    if "embed" in arrays:
        embed = model.tensor(model.top("embed"), arrays["embed"].shape)
        tasks += [_embed_task(embed, arrays["embed"], part) for part in _chunks(*embed.shape)]
    _vectors(model, arrays)
    with ThreadPoolExecutor(threads) as pool:
        for done, _ in enumerate(pool.map(lambda task: task(), tasks), 1):
            if done % 32 == 0:
                progress(done / len(tasks))


def _tasks(name: str, matrix: Matrix, rows: Rows, arrays: Arrays, library: Library) -> Iterator[Callable[[], None]]:
    if matrix.bias:
        bias = np.concatenate([tensor.finite() for tensor in rows.biases])
        arrays[f"{name}.bias"][: matrix.n] = np.where(rows.order < 0, 0, bias[rows.order])
    for part in _chunks(matrix.n, matrix.k):

        def task(part: slice = part) -> None:
            begin = library.packed_bytes(matrix.kind, part.start, matrix.k, matrix.group)
            scale = arrays[f"{name}.scale"][part.start :] if f"{name}.scale" in arrays else None
            _pack_rows(matrix, rows.tensors, rows.order[part], arrays[name][begin:], scale, library)

        yield task


def _pack_rows(
    matrix: Matrix, tensors: list[Tensor], order: Ints, out: Bytes, scale: Floats | None, library: Library
) -> None:
    """Whole panels of it into `out`, and into `scale` what their rows have beside."""
    match matrix.kind:
        case "bf16":
            if scale is None:
                (rounded,) = _gather(tensors, order, lambda raw: (raw.finite_bfloat16(),))
            else:
                rounded, scale[: len(order)] = _gather(tensors, order, floats_and_scale)
            library.pack_bf16(rounded, out)
        case "int8":
            assert scale is not None
            (weights,) = _gather(tensors, order, lambda raw: (raw.finite(),))
            library.pack_int8(weights, out, scale)
        case "int4":
            codes, d, m = _gather(tensors, order, halves if matrix.origin else int4)
            library.pack_int4(codes, d, m, out)
        case "w8a8":
            assert scale is not None
            codes, scale[: len(order)] = _gather(tensors, order, codes_and_scale)
            library.pack_w8a8(codes, out)
        case "w4a16" | "w8a16":
            codes, scales, zeros = _gather(tensors, order, lambda raw: affine(raw, matrix.group))
            library.pack_affine(matrix.kind, codes, scales, zeros, matrix.group, out)


def _embed_task(tensor: Tensor, out: NDArray[Any], part: slice) -> Callable[[], None]:
    def task() -> None:
        out[part] = tensor.take(np.arange(part.start, part.stop)).finite_bfloat16()

    return task


def _gather(
    tensors: list[Tensor], order: Ints, form: Callable[[Tensor], tuple[NDArray[Any], ...]]
) -> tuple[NDArray[Any], ...]:
    """The rows `order` in a form: each of its arrays has a row for each."""
    made: tuple[NDArray[Any], ...] = ()
    first = 0
    for tensor in tensors:
        rows = tensor.shape[0]
        at = np.flatnonzero((order >= first) & (order < first + rows))
        if len(at):
            given = form(tensor.take(order[at] - first))
            if len(at) == len(order):
                return given
            made = made or tuple(np.zeros((len(order), *one.shape[1:]), one.dtype) for one in given)
            for whole, one in zip(made, given, strict=True):
                whole[at] = one
        first += rows
    return made


def _rows(model: Model, name: str, matrix: Matrix, layout: Layout) -> Rows:
    spec, tensors = model.spec, tensors_of(model, name, matrix)
    if name == "lm_head":
        return Rows(tensors, [], np.arange(matrix.n))
    layer, _, role = name.partition(".")
    i, parts = int(layer), spec.parts(role)
    biases = [model.tensor(model.layer(i, part.role, "bias"), (part.rows,)) for part in parts if matrix.bias]
    if role == "gate_up":
        down = f"{layer}.down"
        return Rows(tensors, biases, _alternating(_inner_order(model, layout.matrices[down], down)))
    return Rows(tensors, biases, _stacked(parts, spec.names.interleaved_qk))


def _inner_order(model: Model, down: Matrix, name: str) -> Ints:
    """Rows of gate, and of up, in the order in which down's columns are packed: then nobody has to move them."""
    order = _order(*tensors_of(model, name, down)) if down.kind in ("w4a16", "w8a16", "int4") else None
    return np.arange(down.k) if order is None else order


def _order(tensor: Tensor) -> Ints | None:
    return tensor.order() if isinstance(tensor, QuantizedTensor) else None


def _stacked(parts: Sequence[Part], interleaved: bool) -> Ints:
    """One below the other; rotary neighbours (0, 1, 2, 3 …) of q and k heads become rotary halves (0, 2 … 1, 3 …)."""
    orders, first = [], 0
    for part in parts:
        order = np.arange(part.rows)
        if part.heads and interleaved:
            order = order.reshape(part.heads, -1, 2).swapaxes(1, 2).reshape(-1)
        orders.append(first + order)
        first += part.rows
    return np.concatenate(orders)


def _alternating(rows: Ints) -> Ints:
    """A panel of gate, the same panel of up, and so on: both are at hand where one is multiplied by the other. `rows`
    of each, in this order.
    """
    inner = len(rows)
    column = np.pad(rows, (0, panels(inner) - inner), constant_values=-1).reshape(-1, 1, PANEL)
    return np.where(column < 0, -1, np.concatenate([column, column + inner], axis=1)).reshape(-1)


def _chunks(n: int, k: int) -> list[slice]:
    """Whole panels."""
    step = max(1, CHUNK // (PANEL * k)) * PANEL
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def _vectors(model: Model, arrays: Arrays) -> None:
    """Norm weights, the model's offset added; in the order of what they norm, where the product after has one."""
    for name, out in arrays.items():
        layer, _, role = name.rpartition(".")
        if role.endswith("norm"):
            source = model.layer(int(layer), role) if layer else model.top(role)
            out[:] = model.tensor(source, out.shape).finite() + np.float32(model.spec.norm_offset)
            order = arrays.get(f"{layer}.{_NORMED.get(role)}.order")
            if order is not None:
                out[:] = out[order]

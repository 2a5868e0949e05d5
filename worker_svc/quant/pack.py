"""From a checkpoint to packed weights: rows are put in order while they are still in the file's form, then brought to
the form that a step multiplies, a chunk of panels at a time, by several threads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from kernels.cpu.library import PANEL, Library
from worker_svc.models.loader import Model
from worker_svc.models.raw_tensor import Tensor
from worker_svc.models.spec import Part
from worker_svc.quant.int4 import int4
from worker_svc.quant.layout import Layout, Matrix, panels

Ints = NDArray[np.int64]
Arrays = Mapping[str, NDArray[Any]]

CHUNK: Final = 1 << 20  # weights at a time


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
        tasks += _tasks(name, matrix, _rows(model, name, matrix), arrays, library)
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
            begin = library.packed_bytes(matrix.kind, part.start, matrix.k)
            out = arrays[name][begin:]
            order = rows.order[part]
            if matrix.kind == "bf16":
                (rounded,) = _gather(rows.tensors, order, lambda raw: (raw.finite_bfloat16(),))
                library.pack_bf16(rounded, out)
            elif matrix.kind == "int8":
                (weights,) = _gather(rows.tensors, order, lambda raw: (raw.finite(),))
                library.pack_int8(weights, out, arrays[f"{name}.scale"][part.start :])
            else:
                codes, d, m = _gather(rows.tensors, order, int4)
                library.pack_int4(codes, d, m, out)

        yield task


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


def _rows(model: Model, name: str, matrix: Matrix) -> Rows:
    spec = model.spec
    if name == "lm_head":
        tensor = model.tensor(model.top("embed" if spec.tied else "lm_head"), (matrix.n, matrix.k))
        return Rows([tensor], [], np.arange(matrix.n))
    layer, _, role = name.partition(".")
    i, parts = int(layer), spec.parts(role)
    tensors = [model.tensor(model.layer(i, part.role), (part.rows, matrix.k)) for part in parts]
    biases = [model.tensor(model.layer(i, part.role, "bias"), (part.rows,)) for part in parts if matrix.bias]
    order = _alternating(spec.intermediate_size) if role == "gate_up" else _stacked(parts, spec.names.interleaved_qk)
    return Rows(tensors, biases, order)


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


def _alternating(inner: int) -> Ints:
    """A panel of gate, the same panel of up, and so on: both are at hand where one is multiplied by the other."""
    column = np.arange(panels(inner)).reshape(-1, 1, PANEL)
    both = np.concatenate([column, column + inner], axis=1)
    return np.where(column < inner, both, -1).reshape(-1)


def _chunks(n: int, k: int) -> list[slice]:
    """Whole panels."""
    step = max(1, CHUNK // (PANEL * k)) * PANEL
    return [slice(begin, min(begin + step, n)) for begin in range(0, n, step)]


def _vectors(model: Model, arrays: Arrays) -> None:
    """Norm weights, the model's offset added."""
    for name, out in arrays.items():
        layer, _, role = name.rpartition(".")
        if role.endswith("norm"):
            source = model.layer(int(layer), role) if layer else model.top(role)
            out[:] = model.tensor(source, out.shape).finite() + np.float32(model.spec.norm_offset)

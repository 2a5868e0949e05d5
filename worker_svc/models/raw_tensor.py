"""A weight as its file has it, and the two forms that backends ask for. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from worker_svc.models.ggml_quants import CHUNK, QUANTS, dequantize, finite

# BF16 and F8_E4M3 travel as their bits: numpy has no such types.
NUMPY_TYPES: Final = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "BF16": "<u2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U8": "u1",
    "BOOL": "?",
    "F8_E4M3": "u1",
}


class CheckpointError(ValueError):
    """A checkpoint that cannot be read: the message names the file, the tensor and the trouble."""


class Cut(NamedTuple):
    """Rows [top, bottom) of a matrix, and of those the columns [left, right)."""

    top: int
    bottom: int
    left: int
    right: int


class Tensor(Protocol):
    """A weight, whatever it is stored as: what backends and packing ask of one."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> str:
        """How it is stored."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def take(self, rows: NDArray[np.int64]) -> Tensor:
        """Some of a matrix's rows, in the order of `rows`; still as it is stored."""

    def cut(self, cut: Cut) -> tuple[Tensor, slice]:
        """Rows and columns of a matrix, or rows of a vector; the slice says which of the answer's columns those are."""

    def part(self, index: int) -> Tensor:
        """One of the tensors that this one stacks."""

    def float32(self) -> NDArray[np.float32]: ...

    def bfloat16(self) -> NDArray[np.uint16]: ...

    def finite(self) -> NDArray[np.float32]:
        """float32, or CheckpointError where one is no number."""

    def finite_bfloat16(self) -> NDArray[np.uint16]: ...


@dataclass(frozen=True)
class RawTensor:
    """`data` is a read-only view of the mapped file, which lives as long as the view does.

    Of `shape` for the types in NUMPY_TYPES; for a block-quantized type uint8 [number of blocks, bytes of a block],
    where blocks are consecutive elements in row-major order.
    """

    name: str
    dtype: str  # a key of NUMPY_TYPES or of QUANTS
    shape: tuple[int, ...]
    data: NDArray[Any]

    def take(self, rows: NDArray[np.int64]) -> RawTensor:
        """A copy of some of a matrix's rows, in the order of `rows`; still in the file's form."""
        shape = (len(rows), *self.shape[1:])
        if self.dtype not in QUANTS:
            return RawTensor(self.name, self.dtype, shape, self.data[rows])
        blocks = self.data.reshape(self.shape[0], -1, self.data.shape[-1])[rows]
        return RawTensor(self.name, self.dtype, shape, blocks.reshape(-1, self.data.shape[-1]))

    def cut(self, cut: Cut) -> tuple[RawTensor, slice]:
        """Rows and columns of a matrix, or rows of a vector. A view; of a block-quantized type with the whole blocks
        that the columns are in: the slice says which of the answer's columns were asked for.
        """
        rows, left, right = slice(cut.top, cut.bottom), cut.left, cut.right
        if len(self.shape) == 1:
            return RawTensor(self.name, self.dtype, (cut.bottom - cut.top,), self.data[rows]), slice(None)
        if self.dtype not in QUANTS:
            columns = slice(left, right)
            return RawTensor(
                self.name, self.dtype, (cut.bottom - cut.top, right - left), self.data[rows, columns]
            ), slice(None)
        size = QUANTS[self.dtype].block_size
        first, last = left // size, -(-right // size)
        blocks = self.data.reshape(self.shape[0], -1, self.data.shape[-1])[rows, first:last]
        shape = (cut.bottom - cut.top, (last - first) * size)
        return (
            RawTensor(self.name, self.dtype, shape, blocks.reshape(-1, self.data.shape[-1])),
            slice(left - first * size, right - first * size),
        )

    def part(self, index: int) -> RawTensor:
        """One of the tensors that this one stacks, of its shape without the first dimension. A view."""
        whole = self.data.reshape(self.shape[0], -1, self.data.shape[-1]) if self.dtype in QUANTS else self.data
        return RawTensor(f"{self.name}[{index}]", self.dtype, self.shape[1:], whole[index])

    def float32(self) -> NDArray[np.float32]:
        """[shape]; a view where the file has F32. Raises CheckpointError for a type that is not a number's."""
        match self.dtype:
            case "F32" | "F16" | "F64":
                return self.data.astype(np.float32, copy=False)
            case "BF16":
                return (self.data.astype(np.uint32) << 16).view(np.float32)
            case kind if kind in QUANTS:
                return dequantize(kind, self.data).reshape(self.shape)
        raise CheckpointError(f"tensor {self.name!r} has type {self.dtype}, which cannot be read as weights")

    def finite(self) -> NDArray[np.float32]:
        """float32, or CheckpointError: one weight that is no number would leave its neighbours without a scale."""
        self.check_blocks()
        values = self.float32()
        if self.dtype not in QUANTS and not np.isfinite(values).all():
            raise self._not_finite()
        return values

    def finite_bfloat16(self) -> NDArray[np.uint16]:
        """bfloat16, or CheckpointError: what is no number as a weight makes none of whatever it meets."""
        self.check_blocks()
        bits = self.bfloat16()
        if self.dtype not in QUANTS and ((bits & 0x7F80) == 0x7F80).any():
            raise self._not_finite()
        return bits

    def check_blocks(self) -> None:
        """Raises CheckpointError where a weight of a block-quantized type is not finite: reads scales only."""
        if self.dtype in QUANTS and not finite(self.dtype, self.data):
            raise self._not_finite()

    def _not_finite(self) -> CheckpointError:
        return CheckpointError(f"tensor {self.name!r} has weights that are not finite numbers")

    def bfloat16(self) -> NDArray[np.uint16]:
        """[shape], as bits; a view where the file has BF16, else rounded to the nearest, ties to even."""
        if self.dtype == "BF16":
            return self.data
        return to_bfloat16(self.float32())


def to_bfloat16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Bits of the nearest, ties to even; of the same shape."""
    flat = np.ascontiguousarray(values).view(np.uint32).reshape(-1)
    rounded = np.empty(flat.shape, np.uint16)
    for begin in range(0, len(flat), CHUNK):  # what is between the two stays in the cache
        bits, out = flat[begin : begin + CHUNK], rounded[begin : begin + CHUNK]
        sums = bits >> 16
        sums &= 1
        sums += 0x7FFF
        sums += bits
        sums >>= 16
        out[:] = sums
        nan = (bits & 0x7FFFFFFF) > 0x7F800000  # rounding could carry a NaN over into an infinity
        if nan.any():
            out[nan] = 0x7FC0
    return rounded.reshape(values.shape)


class Checkpoint(Protocol):
    """Weights by name. Opening one reads headers only; the bytes come in as they are touched."""

    @property
    def metadata(self) -> Mapping[str, Any]: ...

    def names(self) -> list[str]:
        """Every tensor there is. A model asks for those of its spec alone: this is for tests and tools."""

    def tensor(self, name: str) -> Tensor:
        """Raises CheckpointError where there is no such tensor."""

    def __contains__(self, name: object) -> bool: ...

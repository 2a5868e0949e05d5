"""The one form between quantized checkpoints and kernels: codes, scales, zero points, groups. numpy only.

A format is a function from a checkpoint's tensors to a QuantizedTensor; a kernel takes what `form` gives, or says that
it cannot. So a new format is one file, and so is a new kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from worker_svc.models.raw_tensor import CheckpointError, Cut, to_bfloat16

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Activations:
    """In which form a checkpoint wants what its weights are multiplied by. `scale`: None is one of each `per`."""

    kind: Literal["int8", "e4m3"]
    per: Literal["token", "tensor", "group"]  # group: 128 of a token
    scale: float | None = None
    symmetric: bool = True


@dataclass(frozen=True)
class Scheme:
    """What all of a matrix's weights have in common."""

    kind: Literal["int", "e4m3"]
    bits: int
    group_size: int  # columns that share a scale; 0: all columns
    symmetric: bool  # every zero point is the middle of the codes
    permuted: bool = False  # groups are not runs of columns
    activations: Activations | None = None

    def __str__(self) -> str:
        """As `model inspect` and the log have it: "int4 g64 asym permuted", "e4m3 channel, activations e4m3"."""
        name = f"int{self.bits}" if self.kind == "int" else self.kind
        words = [name, f"g{self.group_size}" if self.group_size else "channel"]
        if self.kind == "int":
            words.append("sym" if self.symmetric else "asym")
        if self.permuted:
            words.append("permuted")
        activations = f", activations {self.activations.kind}" if self.activations else ""
        return " ".join(words) + activations


@dataclass(frozen=True)
class Grouped:
    """W[n, k] = (codes[n, k] − zeros[n, g]) · scales[n, g], where g = groups[k]; of kind e4m3 a code is the bits of a
    float, and there are no zero points.
    """

    scheme: Scheme
    codes: Codes  # [N, K]
    scales: Floats  # [N, G]
    zeros: Codes | None  # [N, G]
    groups: Ints  # [K]

    def float32(self) -> Floats:
        """[N, K]: every product is rounded once."""
        if self.zeros is None:
            values = E4M3[self.codes]
        else:
            values = self.codes.astype(np.float32)
            values -= self.zeros[:, self.groups]
        values *= self.scales[:, self.groups]
        return values

    def sorted(self) -> Grouped:
        """The same matrix with its columns in `order_of` its groups."""
        order = order_of(self.groups)
        if order is None:
            return self
        return replace(self, codes=np.ascontiguousarray(self.codes[:, order]), groups=self.groups[order])


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix of a quantized checkpoint, in the place of a RawTensor. `unpack` gives codes of some rows, all columns:
    what is packed stays in the mapped file until those rows are asked for.
    """

    name: str
    scheme: Scheme
    unpack: Callable[[Ints], Codes]
    scales: Floats  # [N, G]
    zeros: Codes | None  # [N, G]
    groups: Ints  # [columns of the file]
    rows: Ints  # [N] of the file
    columns: slice

    @property
    def dtype(self) -> str:
        return str(self.scheme)

    @property
    def shape(self) -> tuple[int, ...]:
        return len(self.rows), len(self.groups[self.columns])

    def take(self, rows: Ints) -> QuantizedTensor:
        zeros = None if self.zeros is None else self.zeros[rows]
        return replace(self, rows=self.rows[rows], scales=self.scales[rows], zeros=zeros)

    def cut(self, cut: Cut) -> tuple[QuantizedTensor, slice]:
        """Rows and columns; the slice is of all of the answer's columns."""
        first = self.columns.start
        taken = self.take(np.arange(cut.top, cut.bottom))
        return replace(taken, columns=slice(first + cut.left, first + cut.right)), slice(None)

    def part(self, index: int) -> QuantizedTensor:
        raise CheckpointError(f"tensor {self.name!r} is one matrix: it has no part {index}")

    def column_groups(self) -> Ints:
        """[K] of the columns taken, counted from the first group that one of them is of."""
        groups = self.groups[self.columns]
        rebased: Ints = groups - groups.min()
        return rebased

    def order(self) -> Ints | None:
        """[K] the columns taken, those of a group together; None where they are already."""
        return order_of(self.column_groups())

    def has_even_groups(self) -> bool:
        """Whether groups, their columns together, are of the scheme's size each, but for the last: kernels count so."""
        groups, size = self.column_groups(), self.scheme.group_size or self.shape[1]
        return np.array_equal(np.sort(groups), np.arange(len(groups)) // size)

    def form(self) -> Grouped:
        codes, groups = self.unpack(self.rows)[:, self.columns], self.column_groups()
        first = int(self.groups[self.columns].min())
        taken = slice(first, first + int(groups.max()) + 1)
        zeros = None if self.zeros is None else self.zeros[:, taken]
        return Grouped(self.scheme, codes, self.scales[:, taken], zeros, groups)

    def float32(self) -> Floats:
        return self.form().float32()

    def finite(self) -> Floats:
        return self.float32()  # scales are looked at when a tensor is opened, floats as they are unpacked

    def bfloat16(self) -> NDArray[np.uint16]:
        return to_bfloat16(self.float32())

    def finite_bfloat16(self) -> NDArray[np.uint16]:
        return self.bfloat16()


def order_of(groups: Ints) -> Ints | None:
    """[K] the columns, those of a group together; None where they are already."""
    return np.argsort(groups, kind="stable") if (np.diff(groups) < 0).any() else None


def same_order(one: Ints | None, other: Ints | None) -> bool:
    """Of what `order_of` gives."""
    if one is None or other is None:
        return one is other
    return np.array_equal(one, other)


def quantized(
    name: str,
    scheme: Scheme,
    unpack: Callable[[Ints], Codes],
    scales: Floats,
    zeros: Codes | None,
    columns: int,
    groups: Ints | None = None,
) -> QuantizedTensor:
    """What a format makes. `groups` None: runs of `group_size` columns, of which the last may be short.

    Raises CheckpointError where scales are no numbers, or where zero points, scales and groups do not fit each other.
    """
    size = scheme.group_size or columns
    if groups is None:
        groups = np.arange(columns) // size
    count = scales.shape[1]
    if not np.isfinite(scales).all():
        raise CheckpointError(f"the scales of {name!r} are not all finite numbers")
    most = 448 if scheme.kind == "e4m3" else 1 << scheme.bits
    if scales.size and float(np.abs(scales).max()) * most > GREATEST:
        raise CheckpointError(
            f"the scales of {name!r} reach {np.abs(scales).max():g}: its weights are no finite numbers"
        )
    if len(groups) != columns or (columns and not 0 <= groups.min() <= groups.max() < count):
        raise CheckpointError(f"the groups of {name!r} are not those of {columns} columns with {count} scales a row")
    if zeros is not None and zeros.shape != scales.shape:
        raise CheckpointError(f"{name!r} has zero points {list(zeros.shape)} and scales {list(scales.shape)}")
    return QuantizedTensor(
        name, scheme, unpack, scales, zeros, groups.astype(np.int64), np.arange(len(scales)), slice(0, columns)
    )


GREATEST: Final = 3.38e38  # of float32, and of bfloat16


def _e4m3() -> Floats:
    """Every code's value: OCP 8-bit floating point, e4m3fn. There is no infinity; 0x7F and 0xFF are NaN."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, (code & 7) / 8
    values = np.where(exponent == 0, mantissa * 2.0**-6, (1 + mantissa) * 2.0 ** (exponent - 7.0))
    values = np.where(code & 0x7F == 0x7F, np.nan, values)
    return np.where(code < 128, values, -values).astype(np.float32)


E4M3: Final = _e4m3()

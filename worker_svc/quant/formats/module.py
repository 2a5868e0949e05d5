"""A module of a quantized checkpoint as formats see it: its tensors by what their names end in. numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from worker_svc.models.raw_tensor import CheckpointError, RawTensor
from worker_svc.quant.bits import Codes, Words
from worker_svc.quant.form import Floats, Ints, QuantizedTensor

FLOATS = ("F16", "BF16", "F32")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Module:
    """`tensors` by suffix: "qweight" of "model.layers.0.mlp.up_proj.qweight"."""

    name: str
    tensors: Mapping[str, RawTensor]

    def __contains__(self, suffix: object) -> bool:
        return suffix in self.tensors

    def tensor(self, suffix: str, types: tuple[str, ...], dimensions: int) -> RawTensor:
        """Raises CheckpointError where it is missing, or of another type or number of dimensions."""
        found = self.tensors.get(suffix)
        if found is None:
            raise self.trouble(suffix, f"is missing beside {', '.join(sorted(self.tensors))}")
        if found.dtype not in types:
            raise self.trouble(suffix, f"has type {found.dtype}, not {' or '.join(types)}")
        if len(found.shape) != dimensions:
            raise self.trouble(suffix, f"has shape {list(found.shape)}, not {dimensions} dimensions")
        if 0 in found.shape:
            raise self.trouble(suffix, f"has shape {list(found.shape)}, which holds nothing")
        return found

    def words(self, suffix: str, shape: Shape | None = None) -> Words:
        """Of 32 bits, in two dimensions."""
        return self.shaped(self.tensor(suffix, ("I32",), 2), suffix, shape).view(np.uint32)

    def floats(self, suffix: str, shape: Shape) -> Floats:
        found = self.tensor(suffix, FLOATS, len(shape))
        self.shaped(found, suffix, shape)
        return found.finite()

    def shaped(self, tensor: RawTensor, suffix: str, shape: Shape | None) -> NDArray[Any]:
        if shape is not None and tensor.shape != shape:
            raise self.trouble(suffix, f"has shape {list(tensor.shape)}, and must have {list(shape)} beside the others")
        return tensor.data

    def groups(self, suffix: str, columns: int, count: int) -> Ints | None:
        """Which group each column is of; None where the module does not say.

        Raises CheckpointError for one that is none of `count`.
        """
        if suffix not in self:
            return None
        groups = self.shaped(self.tensor(suffix, ("I32",), 1), suffix, (columns,)).astype(np.int64)
        if (groups == -1).all():  # as early compressed-tensors leaves it where columns are in order
            return None
        if groups.min() < 0 or groups.max() >= count:
            raise self.trouble(suffix, f"names groups {groups.min()} to {groups.max()}, and there are {count}")
        return groups

    def trouble(self, suffix: str, what: str) -> CheckpointError:
        return CheckpointError(f"tensor '{self.name}.{suffix}' {what}")


class Method(Protocol):
    """A quantization_config, understood. Making one raises SpecError for what it says that is not understood."""

    @property
    def name(self) -> str:
        """What people call it."""

    @property
    def markers(self) -> frozenset[str]:
        """Suffixes of tensors of which a module that is quantized has one."""

    @property
    def suffixes(self) -> frozenset[str]:
        """All that a quantized module may have, beside "bias" and what any method's attention may have."""

    def read(self, module: Module) -> QuantizedTensor:
        """Raises CheckpointError, naming the tensor and what is wrong with it or with what the config says of it."""


def middle(bits: int, shape: Shape) -> Codes:
    """Zero points of a symmetric matrix."""
    return np.full(shape, 1 << (bits - 1), np.uint8)


def num_groups(columns: int, group_size: int) -> int:
    """`group_size` 0: all columns are one."""
    return -(-columns // group_size) if group_size else 1

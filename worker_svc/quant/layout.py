"""What a packed model is made of: every array with its place in one run of bytes. It follows from spec and matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from kernels.cpu.library import PANEL, Kind, Library
from worker_svc.models.spec import ModelSpec

ALIGN: Final = 64  # bytes


class Matrix(NamedTuple):
    """W[n, k] of y = x Wᵀ + bias."""

    kind: Kind
    n: int
    k: int
    bias: bool = False
    group: int = 0  # of w4a16 and w8a16: columns that share a scale
    scaled: bool = False  # rows have scales beside
    ordered: bool = False  # x's columns are put in an order first
    origin: str = ""  # what it is in the checkpoint, where that is quantized
    why: str = ""  # it is not multiplied as the checkpoint has it


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """`matrices` by name, and `arrays`: NAME (its packed weights), NAME.scale, NAME.order, NAME.bias of each, and the
    vectors.
    """

    matrices: Mapping[str, Matrix]
    arrays: dict[str, Array]
    nbytes: int


def layout(spec: ModelSpec, matrices: Mapping[str, Matrix], library: Library) -> Layout:
    found: dict[str, Array] = {}
    end = 0
    for name, dtype, shape, nbytes in _arrays(spec, matrices, library):
        found[name] = Array(dtype, shape, end, nbytes)
        end += -(-nbytes // ALIGN) * ALIGN
    return Layout(matrices, found, end)


def panels(n: int) -> int:
    """Rows rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def _arrays(
    spec: ModelSpec, matrices: Mapping[str, Matrix], library: Library
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, bytes), in the order that a step reads them, but for embedding rows: those come last."""

    def vector(name: str, length: int, dtype: str = "<f4") -> tuple[str, str, tuple[int, ...], int]:
        return name, dtype, (length,), 4 * length

    for name, matrix in matrices.items():
        layer, _, role = name.partition(".")
        if role == "qkv":
            yield vector(f"{layer}.attn_norm", spec.hidden_size)
            if spec.post_norms:
                yield vector(f"{layer}.attn_post_norm", spec.hidden_size)
                yield vector(f"{layer}.mlp_post_norm", spec.hidden_size)
            if spec.qk_norm:
                yield vector(f"{layer}.q_norm", spec.head_dim)
                yield vector(f"{layer}.k_norm", spec.head_dim)
        if role == "gate_up":
            yield vector(f"{layer}.mlp_norm", spec.hidden_size)
        if name == "lm_head":
            yield vector("final_norm", spec.hidden_size)
        size = library.packed_bytes(matrix.kind, matrix.n, matrix.k, matrix.group)
        yield name, "u1", (size,), size
        if matrix.kind in ("int8", "w8a8") or matrix.scaled:
            yield vector(f"{name}.scale", panels(matrix.n))
        if matrix.ordered:
            yield vector(f"{name}.order", matrix.k, "<i4")
        if matrix.bias:
            yield vector(f"{name}.bias", panels(matrix.n))
    head = matrices["lm_head"]
    if not (spec.tied and head.kind == "bf16" and not head.scaled):  # else the rows are read from the head
        size = 2 * spec.vocab_size * spec.hidden_size
        yield "embed", "<u2", (spec.vocab_size, spec.hidden_size), size

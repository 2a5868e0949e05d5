"""What a packed model is made of: every array with its place in one run of bytes. It follows from spec and mode."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from kernels.cpu.library import PANEL, Library
from worker_svc.models.spec import ModelSpec

ALIGN: Final = 64  # bytes

Kind = Literal["bf16", "int8", "int4"]


class Mode(NamedTuple):
    """Which form a model's products have. Embedding rows are bfloat16 in each, for they are read, not multiplied."""

    layers: Kind
    head: Kind


MODES: Final = {
    "": Mode("bf16", "bf16"),
    "int8": Mode("int8", "int8"),
    "int4": Mode("int4", "int8"),  # the head decides between near tokens, and is read once a step
}


class Matrix(NamedTuple):
    """W[n, k] of y = x Wᵀ + bias."""

    kind: Kind
    n: int
    k: int
    bias: bool = False


class Array(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    offset: int  # bytes
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """`matrices` by name, and `arrays`: NAME (its packed weights), NAME.scale, NAME.bias of each, and the vectors."""

    matrices: dict[str, Matrix]
    arrays: dict[str, Array]
    nbytes: int


def layout(spec: ModelSpec, mode: Mode, library: Library) -> Layout:
    found: dict[str, Array] = {}
    matrices, end = _matrices(spec, mode), 0
    for name, dtype, shape, nbytes in _arrays(spec, mode, matrices, library):
        found[name] = Array(dtype, shape, end, nbytes)
        end += -(-nbytes // ALIGN) * ALIGN
    return Layout(matrices, found, end)


def panels(n: int) -> int:
    """Rows rounded up to whole panels."""
    return -(-n // PANEL) * PANEL


def _matrices(spec: ModelSpec, mode: Mode) -> dict[str, Matrix]:
    q_rows, kv_rows = spec.num_heads * spec.head_dim, spec.num_kv_heads * spec.head_dim
    hidden, inner = spec.hidden_size, spec.intermediate_size
    of_layer = {
        "qkv": Matrix(mode.layers, q_rows + 2 * kv_rows, hidden, spec.qkv_bias),
        "o": Matrix(mode.layers, hidden, q_rows, spec.o_bias),
        "gate_up": Matrix(mode.layers, 2 * panels(inner), hidden, spec.mlp_bias),
        "down": Matrix(mode.layers, hidden, inner, spec.mlp_bias),
    }
    found = {f"{i}.{name}": matrix for i in range(spec.num_layers) for name, matrix in of_layer.items()}
    return found | {"lm_head": Matrix(mode.head, spec.vocab_size, hidden)}


def _arrays(
    spec: ModelSpec, mode: Mode, matrices: dict[str, Matrix], library: Library
) -> Iterator[tuple[str, str, tuple[int, ...], int]]:
    """(name, dtype, shape, bytes), in the order that a step reads them, but for embedding rows: those come last."""

    def vector(name: str, length: int) -> tuple[str, str, tuple[int, ...], int]:
        return name, "<f4", (length,), 4 * length

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
        size = library.packed_bytes(matrix.kind, matrix.n, matrix.k)
        yield name, "u1", (size,), size
        if matrix.kind == "int8":
            yield vector(f"{name}.scale", panels(matrix.n))
        if matrix.bias:
            yield vector(f"{name}.bias", panels(matrix.n))
    if not (spec.tied and mode.head == "bf16"):  # else the rows are read from the head
        size = 2 * spec.vocab_size * spec.hidden_size
        yield "embed", "<u2", (spec.vocab_size, spec.hidden_size), size
